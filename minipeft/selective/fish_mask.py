"""FISH Mask: train the numbers on which the model's predictions depend most.

Paper      Sung, Nair, Raffel, "Training Neural Networks with Fixed Sparse
           Masks", NeurIPS 2021, arXiv:2111.09839.

Idea       Fisher information says how much the predicted distribution moves
           when a parameter does. Measure it once on some examples, let the k
           parameters with the most of it train, and never look again.

Math       p(y|x) the model, d a small change of all parameters

               mean over x of KL(p || p moved by d)  ->  (1/2) d' F d
               F = mean over x, and y ~ p(y|x), of  grad log p . grad log p'

           Only the diagonal is kept, one number per parameter, N examples:

               true       F_j = 1/N sum_i (d/dtheta_j log p(y|x_i))^2,  y drawn
               empirical  the same with the given label y_i

           Each term squares the gradient of one example. The square of a
           batch's mean gradient is something else.
           Linear softmax, class c, input j: true x_j^2 p_c (1 - p_c),
           empirical x_j^2 (1[y=c] - p_c)^2, averaged over the examples.

Steps      1. Sum squared gradients, one example at a time, dropout off.
           2. Freeze; open the k largest, one ranking for the whole model.
           3. Train them; the mask stays as it is. Merge.

Cost       Trained    k numbers.
           Selection  N forward and backward passes of one example, and while
                      they run one float32 score for every eligible number:
                      dense, and gone afterwards. One dense gradient at a time.
           Memory     gradients, optimiser state, checkpoint and what workers
                      exchange O(k). A dense gradient for one tensor at a time.
           Inference  none.

Differs    The paper's scripts use the empirical Fisher, its text the true one;
           kind= picks. Their code sums over all classes with weight p; here one
           label is drawn. Their head is always trained and charged to the
           budget; here: exclude= it, unfreeze it, and subtract it yourself.
           Their training keeps dense gradients and optimiser state.

Pitfalls   - log p is minus the model's own loss: a mean over the tokens in a
             language model, so long examples count less.
           - The true Fisher draws each token given the true ones before it.
           - The score depends on a new head's random start: seed it first.
           - Words not seen in the N examples score exactly zero; a budget that
             reaches them takes the earliest.
           - In float16 and bfloat16 gradients, small ones are lost before squaring.
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
    batches,
    loss=None,
    samples: int | None = None,
    kind: str = "true",
    among: str = "all",
    exclude: tuple[str, ...] = (),
    seed: int = 0,
    freeze: bool = True,
) -> list[str]:
    """Freeze `model`; let `budget` numbers train; return the names of the tensors they are in.

    targets  modules or parameters (none: all). among="trainable": what trains already, as LoRA's
             A and B. The other keywords are those of `fisher`.
    ValueError: an unknown target, or a budget that cannot be met; the model is then as it was.
    """
    tensors = _eligible(model, targets, exclude, among)
    k = _count(budget, sum(W.numel() for W in tensors.values()))
    scores = fisher(model, tensors, batches, loss=loss, samples=samples, kind=kind, seed=seed)
    return _open(model, _sites(model, _top(scores.items(), k)), freeze)


def fisher(model, tensors, batches, loss=None, samples=None, kind="true", seed=0) -> dict[str, Tensor]:
    """{name: diagonal of the Fisher information} for `tensors` ({name: parameter}).

    batches  dicts of tensors with "labels", the arguments of the model; taken apart into examples.
    samples  how many examples (None: each once; more than there are: round again).
    loss     loss(logits, labels) of one example, -log p; None: the model's own.
    kind     "true": labels drawn from the model. "empirical": the given ones.
    """
    if kind not in ("true", "empirical"):
        raise ValueError(f"kind = {kind!r}, expected 'true' or 'empirical'")
    rows = [(b, i) for b in batches for i in range(len(b["labels"]))]
    n = len(rows) if samples is None else samples
    if n < 1 or not rows:
        raise ValueError(f"{n} of {len(rows)} examples: expected at least one")
    g = torch.Generator().manual_seed(seed)
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    modes = [(m, m.training) for m in model.modules()]
    score = {name: torch.zeros_like(W, dtype=torch.promote_types(W.dtype, torch.float32))
             for name, W in tensors.items()}

    def add(name):
        def hook(W):  # one dense gradient at a time
            score[name].add_(W.grad.to(score[name].dtype).square() / n)
            W.grad = None
        return hook

    hooks = []
    try:
        model.eval().requires_grad_(False)
        for p, _, _ in before:
            p.grad = None
        for name, W in tensors.items():
            W.requires_grad_(True)
            hooks.append(W.register_post_accumulate_grad_hook(add(name)))
        with torch.enable_grad():
            for s in range(n):
                batch, i = rows[s % len(rows)]
                _nll(model, {k: v[i : i + 1] for k, v in batch.items()}, loss, kind, g).backward()
    finally:
        for hook in hooks:
            hook.remove()
        for m, mode in modes:
            m.training = mode
        for p, flag, grad in before:
            p.requires_grad_(flag)
            p.grad = grad
    return score


def _nll(model: nn.Module, example: dict[str, Tensor], loss, kind: str, g) -> Tensor:
    """-log p(y|x) of one example: y its label, or drawn from the model."""
    out, y = model(**example), example["labels"]
    given = loss(out.logits, y) if loss else out.loss
    if kind == "empirical":
        return given
    pairs = [(out.logits, y)]
    if not loss:  # is the logit at t for the label at t, or for the next one?
        pairs += [(out.logits[:, :-1], y[:, 1:])] if y.dim() > 1 else []
        pairs = [(z, t) for z, t in pairs if z.shape[:-1] == t.shape and not t.is_floating_point()]
        gaps = [abs(_cross_entropy(*pair).item() - given.item()) for pair in pairs]
        if not pairs or min(gaps) > 0.02 * abs(given.item()) + 1e-4:
            raise ValueError("the model's own loss is no cross-entropy of its logits and labels: "
                             "give loss=, or take kind='empirical'")
    logits, y = pairs[0 if loss else gaps.index(min(gaps))]
    p = logits.detach().float().softmax(-1).flatten(0, -2).cpu()
    drawn = torch.multinomial(p, 1, generator=g).view(y.shape).to(y)
    return (loss or _cross_entropy)(logits, drawn.where(y != -100, y))


def _cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return nn.functional.cross_entropy(wide.flatten(0, -2), y.flatten())


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


if __name__ == "__main__":  # python fish_mask.py: the claims above, checked on a toy

    class Toy(nn.Module):
        def __init__(self):
            super().__init__()
            self.out = nn.Linear(5, 3, bias=False)

        def forward(self, x, labels):
            logits = self.out(x)
            both = {"logits": logits, "loss": nn.functional.cross_entropy(logits, labels)}
            return type("Output", (), both)

    torch.manual_seed(0)
    model, x, y = Toy().double(), torch.randn(8, 5).double(), torch.randint(0, 3, (8,))
    base, p = model.out.weight.detach().clone(), model.out(x).softmax(-1).detach()
    attach(model, budget=4, batches=[{"x": x, "labels": y}], kind="empirical")
    exact = (p - nn.functional.one_hot(y, 3)).square().T @ x.square() / 8  # (3, 5)
    kept = sites(model)["out.weight"].idx.sort().values
    assert torch.equal(kept.long(), exact.view(-1).topk(4).indices.sort().values)
    trained = [p for p in model.parameters() if p.requires_grad]
    opt = torch.optim.AdamW(trained, lr=0.1, weight_decay=0.1)
    for _ in range(3):
        opt.zero_grad()
        model(x, y).loss.backward()
        opt.step()
    tuned = model(x, y).logits
    merge(model)
    assert torch.equal(model(x, y).logits, tuned) and not sites(model)
    assert torch.equal((model.out.weight != base).view(-1).nonzero().view(-1), kept.long())
    print("fish_mask: ok")
