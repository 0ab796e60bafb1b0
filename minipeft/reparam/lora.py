"""LoRA: train a low-rank update beside a frozen linear layer.

Paper      Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models",
           ICLR 2022, arXiv:2106.09685. Section 4.1, equation (3).
           rsLoRA: Kalajdzievski 2023, arXiv:2312.03732.

Idea       Fine-tuning moves a weight W by some dW. LoRA bets that a good dW
           can be found among the matrices of rank at most r, and trains only
           the two thin factors of it.

Math       x (..., d_in)   W (d_out, d_in)   A (r, d_in)   B (d_out, r)

               y  = x W' + b + s (x A') B'       ' = transpose
               dW = s B A                        rank(dW) <= r
               s  = alpha / r                    alpha / sqrt(r) with rslora

           Start: A uniform in +-1/sqrt(d_in), B = 0. Then dW = 0, and step 0
           is the base model exactly. With G = dL/dy, rows flattened to N,

               dL/dB = s G' (x A')   (d_out, r)
               dL/dA = s (G B)' x    (r, d_in)   zero at step 0: B moves first

Steps      1. Freeze every parameter of the model.
           2. Put LoRALinear(base) in the place of each chosen layer.
           3. Train A and B.
           4. Merge: W <- W + s B A, and put the plain layer back.

Cost       Trained    r (d_in + d_out) per layer, instead of d_in d_out.
           Memory     gradients and optimiser state shrink alike; most of the
                      activations do not.
           Inference  two thin matmuls per layer; none after merging.

Differs    A is uniform, as in the authors' code; the paper says Gaussian.
           nn.Linear and GPT-2's Conv1D only; the authors' code also covers
           embeddings and convolutions. A fused layer (GPT-2's c_attn) gets
           one update of rank r for q, k and v together; theirs gets one each.

Pitfalls   - alpha acts through s: doubling r alone halves alpha / r.
           - A = B = 0 never moves. Both non-zero is not the base model.
           - Dropout sits on the branch's input only, so in train mode the
             merged layer is not the same function as the attached one.
           - nn.MultiheadAttention computes with out_proj.weight and never
             calls out_proj: wrapped, its forward raises.
           - Merging in bfloat16 rounds W + dW; a small dW may vanish. `merge`
             returns how much was rounded.
           - Re-entrant gradient checkpointing over a frozen embedding yields
             no gradient: call model.enable_input_require_grads() first.
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


class LoRALinear(nn.Module):
    """y = base(x) + s (x A') B'; the base's own parameters are not touched."""

    weight = property(lambda self: self.base.weight.new_empty(0))  # a dtype for T5, no numbers

    def __init__(self, base: nn.Module, r: int, alpha: float, dropout=0.0, rslora=False):
        super().__init__()
        d_out, d_in = _shape(base)
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
        self.dropout = nn.Dropout(dropout)
        self.s = alpha / (r**0.5 if rslora else r)

    def forward(self, x: Tensor) -> Tensor:  # (..., d_in) -> (..., d_out)
        y = self.base(x)
        A, B = self.A.to(x.dtype), self.B.to(x.dtype)  # cast the thin factors, never x
        z = F.linear(self.dropout(x), A)  # (..., r)
        return y + F.linear(z, B) * self.s

    def delta(self) -> Tensor:
        """dW, shape (d_out, d_in)."""
        return self.s * (self.B @ self.A)


def attach(
    model: nn.Module,
    *targets: str,
    r: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    rslora: bool = False,
    freeze: bool = True,
) -> list[str]:
    """Freeze `model`; wrap every linear layer that `targets` name; return their paths.

    ValueError: a target that names no linear layer, or r outside 1..min(d_in, d_out);
    the model is then as it was. freeze=False leaves every requires_grad as it is.
    """
    paths = _find(model, targets)
    new = {p: LoRALinear(model.get_submodule(p), r, alpha, dropout, rslora) for p in paths}
    if freeze:
        model.requires_grad_(False)
    for path, layer in new.items():
        layer.train(model.training)
        _put(model, path, layer)
    return paths


def sites(model: nn.Module) -> dict[str, LoRALinear]:
    """{path: layer}, found by type and never by a substring of a name."""
    return {p: m for p, m in model.named_modules() if isinstance(m, LoRALinear)}


def state(model: nn.Module) -> dict[str, Tensor]:
    """What was learned and nothing else: a copy of A, B and s of every site."""
    saved = {}
    for path, m in sites(model).items():
        saved[f"{path}.A"] = m.A.detach().clone()
        saved[f"{path}.B"] = m.B.detach().clone()
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
        m.s = saved[f"{path}.s"].item()


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
        dW = m.s * (m.B.double() @ m.A.double())  # (d_out, d_in)
        exact = W.double() + (dW if isinstance(m.base, nn.Linear) else dW.T)
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


if __name__ == "__main__":  # python lora.py: the claims above, checked on a toy
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x = torch.randn(4, 6).double()
    before = model(x)
    attach(model, "0", "2", r=2)
    assert torch.equal(model(x), before), "step 0 must be the base model"
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == 2 * (6 + 5) + 2 * (5 + 3)
    opt = torch.optim.SGD(trained, lr=0.01)
    for _ in range(3):
        opt.zero_grad()
        model(x).square().sum().backward()
        opt.step()
    tuned = model(x)
    assert not torch.allclose(tuned, before), "three steps must move the function"
    rounding = merge(model)
    assert torch.allclose(model(x), tuned) and not sites(model), "merging must not"
    assert max(rounding.values()) == 0.0, "float64 arithmetic on float64 weights"
    print("lora: ok")
