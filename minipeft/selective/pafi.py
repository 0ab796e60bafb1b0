"""PaFI: train the numbers that are smallest in the pretrained model.

Paper      Liao, Meng, Monz, "Parameter-Efficient Fine-Tuning without
           Introducing New Latency", ACL 2023, arXiv:2305.16742.

Idea       A number close to zero does little in the base, so moving it costs
           little. Which ones are close to zero needs no data: one mask serves
           every task, and everybody who has the base can compute it.

Math       theta (N,) all eligible numbers of all tensors together, budget k

               M_i = 1  for the k smallest |theta_i|, one ranking for the model
               theta <- theta - lr (M . step)

           For zero-mean Gaussian tensors of deviation s, a threshold t picks
           about the share 2 t / (s sqrt(2 pi)) of each: narrow tensors give more.

Steps      1. Freeze every parameter of the model.
           2. Rank |theta|, tensor by tensor, keeping the best k so far.
           3. Copy the chosen numbers into small trainable vectors; train them.
           4. Merge: leave the values in the tensors.

Cost       Trained    k numbers.
           Selection  one pass over the weights, O(k) memory beside one tensor.
           Memory     gradients, optimiser state, checkpoint O(k). A dense
                      gradient lives for one tensor at a time. Activations as
                      in full fine-tuning of the tensors touched.
           Inference  none.

Differs    The authors' code is not published. Whether they rank globally, and
           whether embeddings, biases and gains take part, is not confirmed.
           Here the ranking is global and everything eligible takes part.
           The paper's 0.03 % of stored numbers belongs to its other method.
           keep="largest" and keep="random" are the controls.

Pitfalls   - Exact zeros come first: a fresh zero bias is taken whole, and over
             LoRA all of B (zero at the start) before anything of A.
             zeros=False leaves exact zeros out.
           - LayerNorm gains are near 1 and hardly ever among the smallest.
           - Key biases are tiny and without effect: a softmax cancels them.
           - The rows of words that a task never uses get no gradient.
           - In bfloat16 many magnitudes are equal: ties go to the earlier place.
           - A new head is small too: name it in exclude= and unfreeze it.
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
    model: nn.Module,
    *targets: str,
    budget: int,
    keep: str = "smallest",
    zeros: bool = True,
    among: str = "all",
    exclude: tuple[str, ...] = (),
    seed: int = 0,
    freeze: bool = True,
) -> list[str]:
    """Freeze `model`; let `budget` numbers train; return the names of the tensors they are in.

    targets  modules or parameters (none: all). among="trainable": what trains already, as LoRA's
             A and B. keep: "smallest", "largest" or "random" (with `seed`).
    ValueError: an unknown target, or a budget that cannot be met; the model is then as it was.
    """
    tensors = _eligible(model, targets, exclude, among)
    if keep not in ("smallest", "largest", "random"):
        raise ValueError(f"keep = {keep!r}, expected 'smallest', 'largest' or 'random'")
    g = torch.Generator().manual_seed(seed)

    def score(W):
        size = W.detach().abs().float() if W.dtype != torch.float64 else W.detach().abs()
        if keep == "random":
            size = torch.rand(W.shape, generator=g, dtype=torch.float64).to(size)
        rank = -size if keep == "smallest" else size
        return rank if zeros else rank.masked_fill(W.detach() == 0, -torch.inf)

    most = sum(W.numel() if zeros else int(W.count_nonzero()) for W in tensors.values())
    chosen = _top(((n, score(W)) for n, W in tensors.items()), _count(budget, most))
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


def _count(budget: int, most: int) -> int:
    if isinstance(budget, bool) or not isinstance(budget, int) or not 1 <= budget <= most:
        raise ValueError(f"budget = {budget}: expected a whole number of scalars in 1..{most}")
    return budget


def _top(scores, k: int) -> dict[str, Tensor]:
    """Positions of the k largest of all (name, scores) together; among equals the earliest."""
    names, best = [], torch.empty(0, dtype=torch.float64)
    owner = place = torch.empty(0, dtype=torch.long)
    for name, score in scores:  # one tensor at a time
        if score.isnan().any():
            raise ValueError(f"{name}: a score is not a number")
        flat = score.reshape(-1)
        i = _first(flat, k)
        names.append(name)
        best = torch.cat([best, flat[i].to(best)])
        place = torch.cat([place, i.cpu()])
        owner = torch.cat([owner, torch.full(i.shape, len(names) - 1)])
        keep = _first(best, k)
        best, place, owner = best[keep], place[keep], owner[keep]
    parts = place.split(owner.bincount(minlength=len(names)).tolist())
    return {name: idx for name, idx in zip(names, parts, strict=True) if idx.numel()}


def _first(scores: Tensor, k: int) -> Tensor:
    """Positions of the k largest in ascending order; among equals the earliest."""
    if k >= scores.numel():
        return torch.arange(scores.numel(), device=scores.device)
    edge = scores.topk(k).values[-1]
    above, equal = scores > edge, scores == edge
    return (above | equal & (equal.cumsum(0) <= k - above.sum())).nonzero().view(-1)


if __name__ == "__main__":  # python pafi.py: the claims above, checked on a toy
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    base = {k: v.clone() for k, v in model.state_dict().items()}
    x = torch.randn(4, 6).double()
    before = model(x)
    attach(model, budget=7)
    assert torch.equal(model(x), before), "step 0 must be the base model"
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == 7
    opt = torch.optim.AdamW(trained, lr=0.1, weight_decay=0.1)
    for _ in range(3):
        opt.zero_grad()
        model(x).square().sum().backward()
        opt.step()
    tuned = model(x)
    merge(model)
    assert torch.equal(model(x), tuned) and not sites(model)
    moved = {k: v != base[k] for k, v in model.state_dict().items()}
    size = torch.cat([base[k].abs().view(-1) for k in base])
    mask = torch.cat([moved[k].view(-1) for k in base])
    assert mask.sum() == 7 and size[mask].max() <= size[~mask].min(), "the smallest, and only they"
    print("pafi: ok")
