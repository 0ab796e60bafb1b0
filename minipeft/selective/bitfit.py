"""BitFit: train the biases that a model has, and nothing else.

Paper      Ben Zaken, Goldberg, Ravfogel, "BitFit: Simple Parameter-efficient
           Fine-tuning for Transformer-based Masked Language-models",
           ACL 2022, arXiv:2106.10199.

Idea       A fine-tuned model may differ from its base only in which features
           fire, and an offset is enough for that. So only the offsets train:
           about one number in a thousand.

Math       y = x W' + b            b trains; W and every LayerNorm gain do not

           A BERT layer of width d and inner width f has 7 d + f biases:
           query, key, value, attention.output.dense, two LayerNorms and
           output.dense have d each, intermediate.dense has f. The paper calls
           the last one b_m2, "the middle of the MLP".

           The key bias cancels in plain softmax attention:
               q . (k_j + b_k) = q . k_j + q . b_k     the same for every j

Steps      1. Freeze every parameter of the model.
           2. Copy the chosen biases into small trainable vectors.
           3. Train them; every forward reads the bias with its vector in it.
           4. Merge: leave the values in the biases.

Cost       Trained    L (7 d + f) + 2 d in a BERT of L layers: 102,912 of the
                      108 million numbers of BERT-base, with its pooler.
           Memory     gradients and optimiser state of the chosen entries only;
                      activations of frozen linear layers are not kept either.
           Inference  none.

Differs    The authors' code finds biases by the letters "bias" anywhere in a
           name, which also catches T5's relative_attention_bias.weight, and
           adds the pooler's bias to every subset. Here the parameter's own
           name must end in "bias", and a subset is what it says.
           A fused layer is cut: "c_attn:q" is the query's third of GPT-2's.

Pitfalls   - Llama, T5 and most recent decoders have no biases to train.
           - Learning rates are 10 to 100 times those of full fine-tuning.
           - The key bias trains without effect in BERT, GPT-2 and OPT. With
             rotary positions (Qwen2) or disentangled attention (DeBERTa) it
             has one.
           - A new head's bias is a bias too; its weight is the caller's to
             unfreeze. Name the head in exclude= to train the whole of it.
           - While attached, read a tensor by its name on its module; the raw
             storage (parametrizations.*.original) lags one step behind.
"""

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


class Write(torch.autograd.Function):
    """W with `values` at the positions `idx`: no copy of W, a gradient of k numbers."""

    @staticmethod
    def forward(ctx, W: Tensor, values: Tensor, idx: Tensor) -> Tensor:
        ctx.save_for_backward(values, idx)  # values too: a step before the backward is an error
        W.data.view(-1)[idx] = values.to(W.dtype)  # .data: a tied tensor may be read twice
        return W.view_as(W)

    @staticmethod
    def backward(ctx, g: Tensor):
        values, idx = ctx.saved_tensors
        return None, g.reshape(-1)[idx].to(values.dtype), None


class Chosen(nn.Module):
    """k entries of one tensor; all the others are the base's and cannot move."""

    def __init__(self, W: Tensor, idx: Tensor):
        super().__init__()
        flat = W.detach().view(-1)
        # Half-precision weights get float32 values: a small step must not round away.
        dtype = W.dtype if W.dtype in (torch.float32, torch.float64) else torch.float32
        # Not buffers: DDP would send them at every forward.
        self.idx = idx.to(torch.int32 if W.numel() < 2**31 else torch.int64)  # (k,)
        self.before = flat[idx].clone()  # (k,)
        self.values = nn.Parameter(flat[idx].to(dtype))  # (k,)

    def forward(self, W: Tensor) -> Tensor:
        if W.requires_grad and self.idx.numel() < W.numel():
            raise RuntimeError("a tensor of which some entries train was unfrozen: exclude= it instead")
        return Write.apply(W.detach(), self.values, self.idx)

    def _apply(self, fn, recurse=True):
        self.idx, self.before = fn(self.idx), fn(self.before)
        return super()._apply(fn, recurse)


def attach(
    model: nn.Module, *names: str, exclude: tuple[str, ...] = (), freeze: bool = True
) -> list[str]:
    """Freeze `model`; let the biases of `names` (modules; none: all) train; return their names.

    "c_attn:q" is the first third of a fused bias, "c_attn:k" and "c_attn:v" the others.
    ValueError: a name without a bias, or a model without biases; the model is then as it was.
    """
    chosen = {}
    for target in names or ("",):
        owner, _, part = target.partition(":")
        tensors = _eligible(model, (owner,) if owner else (), exclude)
        biases = {n: b for n, b in tensors.items() if n.endswith("bias")}
        if not biases:
            raise ValueError(f"nothing named {target!r} has a bias" if names else "this model has no biases")
        for name, b in biases.items():
            idx = torch.arange(b.numel(), device=b.device)
            if part:
                W = model.get_submodule(name.rpartition(".")[0]).weight
                if part not in ("q", "k", "v") or sorted(W.shape) != [b.numel() // 3, b.numel()]:
                    raise ValueError(f"{target!r}: expected a layer that fuses q, k and v, with :q, :k or :v")
                idx = idx.view(3, -1)["qkv".index(part)]
            chosen[name] = torch.cat([chosen.get(name, idx[:0]), idx]).unique()
    return _open(model, _sites(model, chosen), freeze)


def sites(model: nn.Module) -> dict[str, Chosen]:
    """{name of the tensor: its chosen entries}, found by type."""
    return {_name(p): m for p, m in model.named_modules() if isinstance(m, Chosen)}


def state(model: nn.Module) -> dict[str, Tensor]:
    """What was learned and nothing else: a copy of the values and where they stand."""
    saved = {}
    for path, m in model.named_modules():
        if isinstance(m, Chosen):
            saved[f"{path}.values"] = m.values.detach().clone()
            saved[f"{path}.idx"] = m.idx.clone()
    return saved


@torch.no_grad()
def load(model: nn.Module, saved: dict[str, Tensor]) -> None:
    """Inverse of `state`; all or nothing. On a plain model the file says which entries to open.

    KeyError: missing or unexpected names. ValueError: a wrong shape, or positions that do not fit.
    """
    idx = {k.removesuffix(".idx"): v for k, v in saved.items() if k.endswith(".idx")}
    if fresh := not sites(model):
        _open(model, _sites(model, {_name(k): v for k, v in idx.items()}), freeze=True)
    try:
        _check(sites(model), state(model), saved)
        for k, v in idx.items():
            _fits(_name(k), v, model.get_submodule(k.rpartition(".")[0]).original)
    except (KeyError, ValueError):
        if fresh:
            detach(model)
        raise
    for k, v in idx.items():
        m, flat = model.get_submodule(k), model.get_submodule(k.rpartition(".")[0]).original.view(-1)
        flat[m.idx] = m.before
        m.idx.copy_(v)
        m.before.copy_(flat[m.idx])
        m.values.copy_(saved[f"{k}.values"])


def merge(model: nn.Module) -> dict[str, float]:
    """Leave the values in the plain tensors. Cannot be undone.

    Returns {name: largest rounding error of one entry}, in the tensor's own unit.
    """
    rounding = {n: (m.values - m.values.to(m.before.dtype)).abs().max().item()
                for n, m in sites(model).items()}
    _close(model, Chosen, lambda m: m.values)
    return rounding


def detach(model: nn.Module) -> None:
    """Put the k original numbers back: the base, bit for bit."""
    _close(model, Chosen, lambda m: m.before)


def _eligible(model: nn.Module, targets, exclude=(), among="all") -> dict[str, nn.Parameter]:
    """{name: tensor}, tied ones once: what `targets` name, by module or parameter, less `exclude`."""
    if among not in ("all", "trainable"):
        raise ValueError(f"among = {among!r}, expected 'all' or 'trainable'")
    named = [(n, p, f".{n}.") for n, p in model.named_parameters(remove_duplicate=False)]
    for t in (*targets, *exclude):
        if not any(f".{t}." in dotted for _, _, dotted in named):
            some = ", ".join(dict.fromkeys(n.split(".")[-2] for n, _, _ in named if "." in n))
            raise ValueError(f"nothing with parameters is named {t!r}; there are: {some}")
    seen = {id(p) for _, p, dotted in named if any(f".{t}." in dotted for t in exclude)}
    found = {}
    for name, p, dotted in named:
        hit = not targets or any(f".{t}." in dotted for t in targets)
        if hit and id(p) not in seen and p.is_floating_point() and (among == "all" or p.requires_grad):
            if "parametrizations." in name or not p.is_contiguous():
                raise ValueError(f"{name}: already parametrised or not contiguous")
            seen.add(id(p))
            found[name] = p
    if not found:
        raise ValueError("nothing to choose from: no eligible floating-point parameter")
    return found


def _sites(model: nn.Module, chosen: dict[str, Tensor]) -> dict[str, Chosen]:
    tensors = dict(model.named_parameters(remove_duplicate=False))
    if lost := chosen.keys() - tensors:
        raise KeyError(f"the model has no {sorted(lost)}")
    for name, idx in chosen.items():
        _fits(name, idx, tensors[name])
    return {n: Chosen(tensors[n], idx.to(tensors[n].device).long()) for n, idx in chosen.items()}


def _open(model: nn.Module, new: dict[str, nn.Module], freeze: bool) -> list[str]:
    """Put a site on each tensor named in `new`, wherever that tensor is held; return the names."""
    holders = [(m, n, p) for m in model.modules() for n, p in m._parameters.items()]
    site = {id(model.get_parameter(name)): m for name, m in new.items()}
    if freeze:
        model.requires_grad_(False)
    for holder, name, W in holders:
        if id(W) in site:
            W.requires_grad_(False)
            order = list(holder._parameters)
            parametrize.register_parametrization(holder, name, site[id(W)], unsafe=True)
            holder.parametrizations[name].order = order
    return list(sites(model))


def _close(model: nn.Module, kind: type, last) -> None:
    """Write last(site) into each tensor and make it plain again."""
    for holder in [m for m in model.modules() if parametrize.is_parametrized(m)]:
        shared = type(holder)  # with deep copies of the model, and about to change
        holder.__class__ = type(shared.__name__, shared.__bases__, dict(vars(shared)))
        for name, stack in reversed(list(holder.parametrizations.items())):
            if isinstance(stack[0], kind):
                stack.original.data.view(-1)[stack[0].idx] = last(stack[0]).detach().to(stack.original.dtype)
                parametrize.remove_parametrizations(holder, name, leave_parametrized=False)
                plain = holder._parameters
                plain.update({n: plain.pop(n) for n in stack.order if n in plain})


def _name(path: str) -> str:
    """The tensor's own name, from the path of its site."""
    return path.replace("parametrizations.", "").rpartition(".")[0]


def _fits(name: str, idx: Tensor, W: Tensor) -> None:
    if not idx.numel() or idx.min() < 0 or idx.max() >= W.numel() or idx.unique().numel() < idx.numel():
        raise ValueError(f"{name}: expected positions in 0..{W.numel() - 1}, none twice")


def _check(places: dict, mine: dict[str, Tensor], saved: dict[str, Tensor]) -> None:
    if held := [p for p, m in places.items() if hasattr(m, "parametrizations")]:
        raise ValueError(f"{held[0]} holds a selection, expected plain tensors: detach that first")
    if odd := sorted(mine.keys() ^ saved.keys()):
        raise KeyError(f"only in one of model and file: {odd}")
    if bad := [k for k in mine if mine[k].shape != saved[k].shape]:
        k = bad[0]
        raise ValueError(f"{k} has shape {tuple(saved[k].shape)}, expected {tuple(mine[k].shape)}")


if __name__ == "__main__":  # python bitfit.py: the claims above, checked on a toy
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 3)).double()
    base = {k: v.clone() for k, v in model.state_dict().items()}
    x = torch.randn(4, 6).double()
    before = model(x)
    assert attach(model) == ["0.bias", "1.bias", "2.bias"]
    assert torch.equal(model(x), before), "step 0 must be the base model"
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == 5 + 5 + 3
    opt = torch.optim.AdamW(trained, lr=0.1, weight_decay=0.1)
    for _ in range(3):
        opt.zero_grad()
        model(x).square().sum().backward()
        opt.step()
    tuned = model(x)
    merge(model)
    assert torch.equal(model(x), tuned) and not sites(model)
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, base[k])}
    assert moved == {"0.bias", "1.bias", "2.bias"}, "weights and gains must stay"
    print("bitfit: ok")
