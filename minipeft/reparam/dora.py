"""DoRA: LoRA turns the rows of a weight, a trained number per row sets their length.

Paper      Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", ICML 2024,
           arXiv:2402.09353. Equations (5), (6) and (11).

Idea       Full fine-tuning changes the length and the direction of a weight's
           rows in its own proportions; LoRA ties the two together. DoRA splits
           them: m holds the lengths, V = W + s B A the directions.

Math       x (..., d_in)   W (d_out, d_in)   A (r, d_in)   B (d_out, r)   m (d_out)

               V = W + s B A     c_i = |V_i|     k = m / c     ' = transpose
               y = x (diag(k) V)' + b            row i has the length |m_i|
               c_i^2 = |W_i|^2 + 2 s (W A')_i . B_i + s^2 B_i (A A') B_i'

           Start: B = 0 and m_i = |W_i|. Then k = 1, and step 0 is the base
           model exactly. With D the new weight's gradient and u_i = V_i / c_i,
               dL/dm_i = D_i . u_i
               dL/dV_i = k_i D_i                          c detached (default)
               dL/dV_i = k_i (D_i - (D_i . u_i) u_i)      detached=False

Steps      1. Freeze every parameter of the model.
           2. Put DoRALinear(base) in the place of each chosen layer.
           3. Train A, B and m.
           4. Merge: W <- diag(k) (W + s B A), and put the plain layer back.

Cost       Trained    r (d_in + d_out) + d_out per layer.
           Training   W A' per forward; one more tensor of the output's size; x W'
                      a second time with dropout on.
           Inference  as in training; none after merging.

Differs    The paper's norm of a (d x k) weight reads as one per input; its code
           takes one per output, a row of torch's (d_out, d_in). So does this.
           Dropout as in the authors' code, with z = dropout(x):
           y = x W' + b + (k - 1) z W' + k s (z A') B'.
           A row of zeros is 0 / 0 in theirs. Here k = 1 while V_i = 0: the row
           starts like LoRA's and gets a length one step later.

Pitfalls   - The bias is not scaled, and s belongs inside the norm.
           - Detached means no gradient through c; c itself follows V. A and B then
             get the gradient of no function: finite differences disagree with it.
           - Recipes that treat vectors apart (no decay, a faster rate) catch m.
           - The squared norm loses digits when s B A comes close to -W.
           - All of LoRA's, whose file this one grew from.
"""

from collections import Counter

import torch
from torch import Tensor, nn
from torch.nn import functional as F

try:  # GPT-2's linear layer: its weight is (d_in, d_out)
    from transformers.pytorch_utils import Conv1D
except ImportError:  # torch alone is enough for everything else
    Conv1D = nn.Linear

KINDS = (nn.Linear, Conv1D)


class DoRALinear(nn.Module):
    """y = x (diag(m / c) V)' + b; the base's own parameters are not touched."""

    weight = property(lambda self: self.base.weight.new_empty(0))  # a dtype for T5, no numbers

    def __init__(self, base: nn.Module, r: int, alpha: float, dropout=0.0, detached=True):
        super().__init__()
        d_out, d_in = _by_output(base).shape
        if not 1 <= r <= min(d_in, d_out):
            raise ValueError(f"r = {r}: the rank must lie in 1..{min(d_in, d_out)} here")
        W = base.weight
        # Half-precision weights get float32 factors: a small step must not round away.
        dtype = W.dtype if W.dtype in (torch.float32, torch.float64) else torch.float32
        bound = d_in**-0.5
        self.base = base
        # Drawn on the CPU, so that a seed gives the same A on every device.
        A = torch.empty(r, d_in, dtype=dtype).uniform_(-bound, bound)
        self.A = nn.Parameter(A.to(W.device))
        self.B = nn.Parameter(torch.zeros(d_out, r, dtype=dtype, device=W.device))
        self.m = nn.Parameter(torch.linalg.vector_norm(_by_output(base).detach(), dim=1, dtype=dtype))
        self.dropout = nn.Dropout(dropout)
        self.s = alpha / r
        self.detached = detached

    def forward(self, x: Tensor) -> Tensor:  # (..., d_in) -> (..., d_out)
        y = self.base(x)
        A, B = self.A.to(x.dtype), self.B.to(x.dtype)  # cast the thin factors, never x
        dropped = self.dropout(x)
        h = F.linear(F.linear(dropped, A), B) * self.s  # (..., d_out)
        if self.training and self.dropout.p:
            u = F.linear(dropped, _by_output(self.base)) + h  # dropped x times V', a second matmul
        else:
            u = h + (y if self.base.bias is None else y - self.base.bias.to(y.dtype))  # x V'
        return torch.addcmul(y + h, (self.ratio() - 1).to(u.dtype), u)  # k - 1: small, so exact

    def ratio(self) -> Tensor:
        """k = m / c, shape (d_out,)."""
        W, A, B, s = _by_output(self.base), self.A, self.B, self.s
        grad = torch.is_grad_enabled() and not self.detached
        with torch.set_grad_enabled(grad), torch.autocast(W.device.type, enabled=False):
            w = torch.linalg.vector_norm(W, dim=1, dtype=A.dtype)
            WA = F.linear(A.to(W.dtype), W).to(A.dtype)  # (r, d_out): cast the thin factor, never W
            c2 = w * w + 2 * s * (WA.T * B).sum(1) + s * s * ((B @ (A @ A.T)) * B).sum(1)
        return _ratio(self.m, c2)


def attach(
    model: nn.Module,
    *targets: str,
    r: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    detached: bool = True,
    freeze: bool = True,
) -> list[str]:
    """Freeze `model`; wrap every linear layer that `targets` name; return their paths.

    ValueError: a target that names no linear layer, or r outside 1..min(d_in, d_out);
    the model is then as it was. freeze=False leaves every requires_grad as it is.
    """
    paths = _find(model, targets)
    new = {p: DoRALinear(model.get_submodule(p), r, alpha, dropout, detached) for p in paths}
    if freeze:
        model.requires_grad_(False)
    for path, layer in new.items():
        layer.train(model.training)
        _put(model, path, layer)
    return paths


def sites(model: nn.Module) -> dict[str, DoRALinear]:
    """{path: layer}, found by type and never by a substring of a name."""
    return {p: m for p, m in model.named_modules() if isinstance(m, DoRALinear)}


def state(model: nn.Module) -> dict[str, Tensor]:
    """What was learned and nothing else: a copy of A, B, m and s of every site."""
    saved = {}
    for path, m in sites(model).items():
        saved[f"{path}.A"] = m.A.detach().clone()
        saved[f"{path}.B"] = m.B.detach().clone()
        saved[f"{path}.m"] = m.m.detach().clone()
        saved[f"{path}.s"] = torch.tensor(m.s, dtype=torch.float64)  # A, B mean nothing without it
    return saved


@torch.no_grad()
def load(model: nn.Module, saved: dict[str, Tensor]) -> None:
    """Inverse of `state`, on a model with the same sites attached; all or nothing.

    KeyError: missing or unexpected names. ValueError: a wrong shape (another r), a selection on it.
    """
    _check(sites(model), state(model), saved)
    for path, m in sites(model).items():
        m.A.copy_(saved[f"{path}.A"])
        m.B.copy_(saved[f"{path}.B"])
        m.m.copy_(saved[f"{path}.m"])
        m.s = saved[f"{path}.s"].item()


@torch.no_grad()
def merge(model: nn.Module) -> dict[str, float]:
    """Write diag(m / c) V over W and put the plain layers back. Cannot be undone.

    Returns {path: largest rounding error of one weight}, in the weight's own unit.
    ValueError: W is tied to another module, which would change with it.
    """
    held = Counter(id(x) for m in model.modules() for x in (*m.children(), *m._parameters.values()))
    for path, m in sites(model).items():
        if max(held[id(m.base)], held[id(m.base.weight)]) > 1:
            raise ValueError(f"{path}: its weight is shared with another module; untie it first")
    rounding = {}
    for path, m in sites(model).items():
        W = _by_output(m.base)
        V = W.double() + m.s * (m.B.double() @ m.A.double())  # (d_out, d_in)
        exact = _ratio(m.m.double(), V.square().sum(1))[:, None] * V
        W.copy_(exact)
        rounding[path] = (W.double() - exact).abs().max().item()
        _put(model, path, m.base)
    return rounding


def detach(model: nn.Module) -> None:
    """Put the plain layers back. W was never touched: the base, bit for bit."""
    for path, m in sites(model).items():
        _put(model, path, m.base)


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


def _by_output(base: nn.Module) -> Tensor:
    """The weight as (d_out, d_in), a view."""
    return base.weight if isinstance(base, nn.Linear) else base.weight.T


def _ratio(m: Tensor, c2: Tensor) -> Tensor:
    """m / c from the square of c; 1 where a row of V is zero and has no direction."""
    zero = c2 <= 0
    return (m / c2.masked_fill(zero, 1).sqrt()).masked_fill(zero, 1)


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


if __name__ == "__main__":  # python dora.py: the claims above, checked on a toy
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x = torch.randn(4, 6).double()
    before = model(x)
    attach(model, "0", "2", r=2)
    assert torch.equal(model(x), before), "step 0 must be the base model"
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == 2 * (6 + 5) + 5 + 2 * (5 + 3) + 3
    opt = torch.optim.SGD(trained, lr=0.01)
    for _ in range(3):
        opt.zero_grad()
        model(x).square().sum().backward()
        opt.step()
    tuned = model(x)
    assert not torch.allclose(tuned, before), "three steps must move the function"
    m = sites(model)["2"].m
    merge(model)
    assert torch.allclose(model(x), tuned) and not sites(model), "merging must not"
    assert torch.allclose(model[2].weight.norm(dim=1), m), "m is the length of the rows"
    print("dora: ok")
