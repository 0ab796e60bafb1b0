"""AdaLoRA: LoRA in the form of an SVD, whose ranks go where the loss needs them.

Paper      Zhang et al., "Adaptive Budget Allocation for Parameter-Efficient
           Fine-Tuning", ICLR 2023, arXiv:2303.10512. Equations (3) to (12).

Idea       Give every matrix more rank than it will keep. While training, score the
           triplets (a column of P, a lambda, a row of Q) of all matrices together
           and switch the weakest off, down to a budget that shrinks.

Math       x (..., d_in)   W (d_out, d_in)   P (d_out, r)   lam (r)   Q (r, d_in)

               y  = x W' + b + s (x Q') diag(lam) P'        ' = transpose
               dW = s P diag(lam) Q                         s = alpha / r
               penalty = gamma * sum over matrices of |P'P - I|^2 + |Q Q' - I|^2

           Start: lam = 0, P and Q from N(0, 0.02^2). Step 0 is the base exactly.
           For every number w with gradient g, with b = 0.85:

               I = |w g|    mean <- b mean + (1 - b) I    dev <- b dev + (1 - b) |I - mean|

           A triplet scores mean * dev of its lam plus the averages of mean * dev
           over its column of P and its row of Q. Triplets kept after step t: b0 up
           to `warmup`, bT in the last `final` steps, between them
               int(bT + (b0 - bT) (1 - (t - warmup) / (total - final - warmup))^3)

Steps      1. (loss + penalty).backward(), step(), advance(model, t), zero_grad().
           2. advance averages, and every `every` steps sets lam = 0 outside the best
              triplets. P and Q stay: before the last phase one may return.
           3. In the last phase the choice stands; what is on trains on.
           4. state drops what is off. Merge: W <- W + dW.

Cost       Trained    r (d_in + d_out + 1) per layer, and averages of twice that,
                      to the end: nothing is freed before export.
           Inference  two thin matmuls of the rank that is left; none after merging.

Differs    Equation (12) prints t - warmup - final above the same denominator: more
           than b0 at first, a jump to bT at last. The authors' code has the form
           above. Its penalty averages norms that are not squared: a gamma does not
           carry over. I takes w after the step and g before it, as the code does.
           The cut is an exact top-b; the code's threshold loses ties.

Pitfalls   - Without advance nothing is ever cut: `state` warns.
           - Unscale fp16 gradients first, or their scale enters the score squared.
           - s keeps the first r; rescaling by the rank left changes the function.
           - The penalty is no part of the loss to report at evaluation.
           - Perfectly steady |w g| has dev = 0, so the score is 0.
"""

import warnings
from collections import Counter

import torch
from torch import Tensor, nn
from torch.nn import functional as F

try:  # GPT-2's linear layer: its weight is (d_in, d_out)
    from transformers.pytorch_utils import Conv1D
except ImportError:  # torch alone is enough for everything else
    Conv1D = nn.Linear

KINDS = (nn.Linear, Conv1D)
PARTS = ("P", "lam", "Q")
BETA = 0.85  # of both averages


class AdaLoRALinear(nn.Module):
    """y = base(x) + s (x Q') diag(lam) P'; the base's own parameters are not touched."""

    weight = property(lambda self: self.base.weight.new_empty(0))  # a dtype for T5, no numbers

    def __init__(self, base: nn.Module, r: int, alpha: float, dropout: float, plan: dict):
        super().__init__()
        d_out, d_in = _shape(base)
        if not 1 <= r <= min(d_in, d_out):
            raise ValueError(f"r = {r}: the rank must lie in 1..{min(d_in, d_out)} here")
        W = base.weight
        # Half-precision weights get float32 factors: a small step must not round away.
        dtype = W.dtype if W.dtype in (torch.float32, torch.float64) else torch.float32
        self.base, self.dropout = base, nn.Dropout(dropout)
        self.s, self.plan, self.advanced = alpha / r, plan, False
        # Drawn on the CPU, so that a seed gives the same P and Q on every device.
        P, Q = (0.02 * torch.randn(shape, dtype=dtype) for shape in ((d_out, r), (r, d_in)))
        self.put(P.to(W.device), torch.zeros(r, dtype=dtype, device=W.device), Q.to(W.device))

    def put(self, *parts: Tensor) -> None:
        """New P, lam and Q, with nothing averaged."""
        for name, p in zip(PARTS, parts, strict=True):
            trains = getattr(self, name).requires_grad if hasattr(self, name) else True
            setattr(self, name, nn.Parameter(p, trains))
            self.register_buffer(f"mean_{name}", torch.zeros_like(p))
            self.register_buffer(f"dev_{name}", torch.zeros_like(p))

    def forward(self, x: Tensor) -> Tensor:  # (..., d_in) -> (..., d_out)
        y = self.base(x)
        Q = (self.Q * self.lam[:, None]).to(x.dtype)  # cast the thin factors, never x
        z = F.linear(self.dropout(x), Q)  # (..., r)
        return y + F.linear(z, self.P.to(x.dtype)) * self.s

    def score(self) -> Tensor:
        """Importance of every triplet, shape (r,)."""
        P, lam, Q = (getattr(self, f"mean_{n}") * getattr(self, f"dev_{n}") for n in PARTS)
        return lam + P.mean(0) + Q.mean(1)


def attach(
    model: nn.Module,
    *targets: str,
    total: int,
    r: int = 12,
    target: int = 8,
    alpha: float = 16.0,
    warmup: int | None = None,
    final: int | None = None,
    every: int = 1,
    gamma: float = 0.1,
    dropout: float = 0.0,
    freeze: bool = True,
) -> list[str]:
    """Freeze `model`; wrap every linear layer that `targets` name; return their paths.

    `total` steps take the rank from r to `target` on average. warmup: a tenth of them,
    final: a half, unless given. ValueError: a target that names no linear layer, ranks
    or steps that do not fit; the model is then as it was.
    """
    warmup = total // 10 if warmup is None else warmup
    final = total // 2 if final is None else final
    if not 0 <= target <= r:
        raise ValueError(f"target = {target}: the final rank must lie in 0..{r}, the first rank")
    if not (0 <= warmup < total - final < total and every > 0):
        raise ValueError(
            f"total {total}, warmup {warmup}, final {final}, every {every}: "
            "expected warmup >= 0, final > 0, every > 0 and warmup + final < total"
        )
    if sites(model):
        raise ValueError("AdaLoRA is attached: one budget needs all targets in one call")
    paths = _find(model, targets)
    n = len(paths)
    plan = {"b0": n * r, "bT": n * target, "total": total, "warmup": warmup, "final": final}
    plan |= {"every": every, "gamma": gamma}
    new = {p: AdaLoRALinear(model.get_submodule(p), r, alpha, dropout, plan) for p in paths}
    if freeze:
        model.requires_grad_(False)
    for path, layer in new.items():
        layer.train(model.training)
        _put(model, path, layer)
    return paths


def sites(model: nn.Module) -> dict[str, AdaLoRALinear]:
    """{path: layer}, found by type and never by a substring of a name."""
    return {p: m for p, m in model.named_modules() if isinstance(m, AdaLoRALinear)}


def penalty(model: nn.Module) -> Tensor:
    """gamma times the squared distance of all P and Q from orthonormal; add it to the loss."""
    layers, same = list(sites(model).values()), {}
    for T in (t for m in layers for t in (m.P.mT, m.Q)):  # (r, d): the rows are the vectors
        same.setdefault(T.shape, []).append(T)
    grams = [T @ T.mT for T in map(torch.stack, same.values())]  # one product per shape
    eyes = (torch.eye(G.shape[-1], dtype=G.dtype, device=G.device) for G in grams)
    return layers[0].plan["gamma"] * sum(((G - I) ** 2).sum() for G, I in zip(grams, eyes))


def budget(t: int, b0: int, bT: int, total: int, warmup: int, final: int, **_) -> int:
    """Triplets to keep after step t, over all matrices."""
    if t <= warmup or t >= total - final:
        return b0 if t <= warmup else bT
    return int(bT + (b0 - bT) * (1 - (t - warmup) / (total - final - warmup)) ** 3)


@torch.no_grad()
def advance(model: nn.Module, step: int) -> None:
    """After optimizer.step(), before zero_grad(): step = 0, ..., total - 1. Cuts to the budget."""
    layers = list(sites(model).values())
    plan = layers[0].plan
    last = step >= plan["total"] - plan["final"]
    if not last:
        w, mean, dev = _each(layers), _each(layers, "mean_"), _each(layers, "dev_")
        if all(p.grad is None for p in w):
            raise RuntimeError("no gradients: call advance after step() and before zero_grad()")
        g = [torch.zeros_like(p) if p.grad is None else p.grad for p in w]
        now = torch._foreach_abs(torch._foreach_mul(w, g))
        torch._foreach_lerp_(mean, now, 1 - BETA)
        torch._foreach_lerp_(dev, torch._foreach_abs(torch._foreach_sub(now, mean)), 1 - BETA)
    for m in layers:
        m.advanced = True
    if last or (step > plan["warmup"] and step % plan["every"] == 0):
        score = torch.cat([m.score().to(layers[0].lam.device) for m in layers])
        on = torch.zeros_like(score, dtype=torch.bool)
        on[score.argsort(descending=True, stable=True)[: budget(step, **plan)]] = True
        for m, part in zip(layers, on.split([len(m.lam) for m in layers]), strict=True):
            m.lam.masked_fill_(~part, 0)


def state(model: nn.Module) -> dict[str, Tensor]:
    """What was learned and nothing else: a copy of P, lam, Q and s, without what is off."""
    saved = {}
    for path, m in sites(model).items():
        if not m.advanced and m.lam.any():
            warnings.warn(f"{path} was trained without advance: nothing was cut", stacklevel=2)
        keep = (m.lam != 0) | (not m.advanced)  # at the start all are 0 and none is off
        saved[f"{path}.P"] = m.P.detach()[:, keep].clone()
        saved[f"{path}.lam"] = m.lam.detach()[keep].clone()
        saved[f"{path}.Q"] = m.Q.detach()[keep].clone()
        saved[f"{path}.s"] = torch.tensor(m.s, dtype=torch.float64)  # P, lam, Q need it
    return saved


@torch.no_grad()
def load(model: nn.Module, saved: dict[str, Tensor]) -> None:
    """Inverse of `state`, on a model with the same sites; all or nothing. The ranks are the file's.

    Makes new parameters: build the optimiser afterwards. KeyError: missing or
    unexpected names. ValueError: shapes that do not fit together, a selection on it.
    """
    new = {}
    for path, m in sites(model).items():
        k = saved.get(f"{path}.lam", m.lam).numel()
        shapes = (len(m.P), k), (k,), (k, m.Q.shape[1])
        new |= {f"{path}.{n}": m.P.new_empty(shape) for n, shape in zip(PARTS, shapes)}
        new[f"{path}.s"] = torch.empty(())
    _check(sites(model), new, saved)
    for path, m in sites(model).items():
        m.put(*(new[f"{path}.{n}"].copy_(saved[f"{path}.{n}"]) for n in PARTS))
        m.s, m.advanced = saved[f"{path}.s"].item(), True


def resumable(model: nn.Module) -> dict[str, Tensor]:
    """Every triplet with its averages: what a run needs to go on, beside the optimiser's state."""
    saved = {}
    for path, m in sites(model).items():
        for name in (before + part for before in ("", "mean_", "dev_") for part in PARTS):
            saved[f"{path}.{name}"] = getattr(m, name).detach().clone()
    return saved


@torch.no_grad()
def resume(model: nn.Module, saved: dict[str, Tensor]) -> None:
    """Inverse of `resumable`, on a model attached with the same arguments."""
    _check(sites(model), resumable(model), saved)
    for key, value in saved.items():
        path, _, name = key.rpartition(".")
        getattr(model.get_submodule(path), name).copy_(value)
    for m in sites(model).values():
        m.advanced = True


@torch.no_grad()
def merge(model: nn.Module) -> dict[str, float]:
    """Fold dW into W and put the plain layers back. Cannot be undone.

    Returns {path: largest rounding error of one weight}, in the weight's own unit.
    ValueError: W is tied to another module, which would change with it.
    """
    held = Counter(id(x) for m in model.modules() for x in (*m.children(), *m._parameters.values()))
    for path, m in sites(model).items():
        if max(held[id(m.base)], held[id(m.base.weight)]) > 1:
            raise ValueError(f"{path}: its weight is shared with another module; untie it first")
    rounding = {}
    for path, m in sites(model).items():
        W = m.base.weight
        dW = m.s * (m.P.double() * m.lam.double() @ m.Q.double())  # (d_out, d_in)
        exact = W.double() + (dW if isinstance(m.base, nn.Linear) else dW.T)
        W.copy_(exact)
        rounding[path] = (W.double() - exact).abs().max().item()
        _put(model, path, m.base)
    return rounding


def detach(model: nn.Module) -> None:
    """Put the plain layers back. W was never touched: the base, bit for bit."""
    for path, m in sites(model).items():
        _put(model, path, m.base)


def _each(layers: list, prefix: str = "") -> list[Tensor]:
    return [getattr(m, prefix + name) for m in layers for name in PARTS]


def _find(model: nn.Module, targets: tuple[str, ...]) -> list[str]:
    """Paths of the linear layers whose name, or dotted end of path, is a target."""
    seen = {t: [] for t in targets}
    for path, m in model.named_modules():
        for t in targets:
            if path == t or path.endswith("." + t):
                if not isinstance(m, KINDS):
                    raise ValueError(f"{path} is a {type(m).__name__}, expected a linear layer")
                seen[t].append(path)
    if not targets or not all(seen.values()):
        names = {p.rpartition(".")[2]: 0 for p, m in model.named_modules() if isinstance(m, KINDS)}
        lost = ", ".join(repr(t) for t in targets if not seen[t]) or "nothing"
        raise ValueError(f"no linear layer is named {lost}; there are: {', '.join(names) or 'none'}")
    found = {p for paths in seen.values() for p in paths}
    return [p for p, _ in model.named_modules() if p in found]


def _shape(base: nn.Module) -> tuple[int, int]:
    """(d_out, d_in)."""
    shape = base.weight.shape
    return tuple(shape) if isinstance(base, nn.Linear) else tuple(shape)[::-1]


def _check(places: dict, mine: dict[str, Tensor], saved: dict[str, Tensor]) -> None:
    if held := [p for p, m in places.items() if hasattr(m, "parametrizations")]:
        raise ValueError(f"{held[0]} holds a selection, expected plain tensors: detach that first")
    if odd := sorted(mine.keys() ^ saved.keys()):
        raise KeyError(f"only in one of model and file: {odd}")
    if bad := [k for k in mine if mine[k].shape != saved[k].shape]:
        k = bad[0]
        raise ValueError(f"{k} has shape {tuple(saved[k].shape)}, expected {tuple(mine[k].shape)}")


def _put(model: nn.Module, path: str, new: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, new)


if __name__ == "__main__":  # python adalora.py: the claims above, checked on a toy
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x = torch.randn(4, 6).double()
    before = model(x)
    attach(model, "0", "2", r=3, target=1, total=9)
    assert torch.equal(model(x), before), "step 0 must be the base model"
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == 3 * (6 + 5 + 1) + 3 * (5 + 3 + 1)
    opt = torch.optim.Adam(trained, lr=0.01)
    for step in range(9):
        opt.zero_grad()
        (model(x).square().sum() + penalty(model)).backward()
        opt.step()
        advance(model, step)
    tuned = model(x)
    assert sum(int(m.lam.count_nonzero()) for m in sites(model).values()) == 2, "the budget"
    load(model, state(model))
    assert torch.allclose(model(x), tuned), "dropping what is off must not move it"
    merge(model)
    assert torch.allclose(model(x), tuned) and not sites(model), "merging must not"
    print("adalora: ok")
