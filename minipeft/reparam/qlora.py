"""QLoRA: LoRA beside a frozen linear layer that is kept in four bits.

Paper      Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs",
           NeurIPS 2023, arXiv:2305.14314. Section 3. Paged optimiser: paged.py.

Idea       The base never trains, so it need not be stored in a form that can be
           trained. Four bits a weight are enough to compute with; the adapter
           beside it stays in full precision and learns around the rounding.

Math       W~ is W rounded to NF4, levels and scales as in nf4.py, (d_out, d_in)
           x (..., d_in)   A (r, d_in)   B (d_out, r)

               y  = x W~' + b + s (x A') B'        s = alpha / r
               dx = g W~ + s (g B) A               no gradient for W~

           Start: A uniform in +-1/sqrt(d_in), B = 0: step 0 is the rounded model.

Steps      1. Quantise each chosen layer; its 16- or 32-bit weight is dropped.
           2. Forward: dequantise, multiply, forget. Backward: dequantise again.
           3. Train A and B.
           4. Merge into the dequantised weight, or round the sum to NF4 again.

Cost       Stored     4 + 8/64 + 32/(64 256) = 4.127 bits per weight (4.5 with
                      double=False), and LoRA's r (d_in + d_out).
           Time       LoRA's, and two dequantisations per step and layer.
           Memory     one dequantised layer at a time; none kept for backward.

Differs    A and B are float32 beside half-precision weights; the authors train them
           in bfloat16. Dropout is off by default; theirs is 0.1 or 0.05.

Pitfalls   - W is thrown away. Step 0, `detach` and `merge` know W~ only; keep
             the original elsewhere.
           - Rounding the merged weight to NF4 again loses most of a small dW.
             `merge` returns how much.
           - Quantising W~ again gives W~ again with double=False only.
           - The model must fit in memory before `attach` makes it small.
           - Names of base weights are gone: save the adapter with `state`.
"""

from collections import Counter
from functools import cache
from statistics import NormalDist

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

try:  # GPT-2's linear layer: its weight is (d_in, d_out)
    from transformers.pytorch_utils import Conv1D
except ImportError:  # torch alone is enough for everything else
    Conv1D = nn.Linear

KINDS = (nn.Linear, Conv1D)


def nf4() -> Tensor:
    """The 16 levels, ascending, from -1 to 1."""
    quantile = NormalDist().inv_cdf
    # The offset 0.9677083 is the authors'; in float32, as theirs, the levels agree to the last bit.
    up, down = (torch.linspace(0.9677083, 0.5, k)[:-1].tolist() for k in (9, 8))
    levels = torch.tensor(sorted([0.0, *map(quantile, up), *(-quantile(p) for p in down)]))
    return levels / levels.max()


def dynamic() -> Tensor:
    """The 256 levels for the scales: seven decades, each twice as fine as the one below."""
    levels = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1)
        middles = 10 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2)
        levels += middles.tolist() + (-middles).tolist()
    return torch.tensor(sorted(levels))


@cache
def _tables(device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """NF4 edges, the two levels in each byte, the dynamic map, and its index per 16-bit value."""
    N, D = nf4(), dynamic()
    edges, pairs = (N[1:] + N[:-1]) / 2, torch.cartesian_prod(N, N)  # (15,) (256, 2)
    near = torch.bucketize(torch.arange(65536) / 65535 * 2 - 1, (D[1:] + D[:-1]) / 2)
    return tuple(t.to(device) for t in (edges, pairs, D, near.to(torch.uint8)))


def quantise(W: Tensor) -> tuple[Tensor, Tensor]:
    """Codes, two in a byte and the first one high, (ceil(n / 2),); the maximum of each block."""
    n, tail = W.numel(), W.numel() % 64
    flat = F.pad(W.detach().float().flatten(), (0, -n % 64)).view(-1, 64)
    absmax = flat.abs().amax(1)
    if not absmax.isfinite().all():
        raise ValueError("the weight has entries that are not finite: nothing to quantise them to")
    scaled = flat * (1 / absmax.clamp(min=1e-38))[:, None]
    if tail:  # bitsandbytes divides here instead; the last bit may differ
        absmax[-1].clamp_(min=1e-38)
        scaled[-1] = flat[-1] / absmax[-1]
    edges = _tables(W.device)[0]
    codes = torch.bucketize(scaled.clamp(-1, 1).flatten()[: n + n % 2], edges).to(torch.uint8)
    return codes[::2] << 4 | codes[1::2], absmax  # a value on an edge took the lower level


def dequantise(packed: Tensor, absmax: Tensor, shape: tuple, dtype: torch.dtype) -> Tensor:
    """W~, rounded once to `dtype`."""
    n = shape.numel()
    flat = F.embedding(packed.int(), _tables(packed.device)[1]).flatten()[:n]
    flat = F.pad(flat, (0, -n % 64)).view(-1, 64) * absmax[:, None]
    return flat.flatten()[:n].view(shape).to(dtype)


def squeeze(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The second quantisation: 8-bit codes, one maximum for 256 of them, the mean taken off."""
    n, mean = len(absmax), absmax.mean()
    blocks = F.pad(absmax - mean, (0, -n % 256)).view(-1, 256)
    top = blocks.abs().amax(1)
    index = ((blocks * (1 / top)[:, None] + 1) * 0.5 * 65535 + 0.5).nan_to_num().int()
    return _tables(absmax.device)[3][index.flatten()[:n]], top, mean


def unsqueeze(codes: Tensor, top: Tensor, mean: Tensor) -> Tensor:
    return _tables(codes.device)[2][codes.int()] * top.repeat_interleave(256)[: len(codes)] + mean


class _Frozen4bit(torch.autograd.Function):
    """x W~' + b, with W~ made once in each direction and kept in neither."""

    @staticmethod
    def forward(ctx, x, bias, layer):
        ctx.layer = layer
        return F.linear(x, layer.W().to(x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        dx = g @ ctx.layer.W().to(g.dtype) if ctx.needs_input_grad[0] else None
        return dx, g.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None, None


class NF4Linear(nn.Module):
    """A linear layer in four bits a weight. Its bias stays as it was."""

    weight = property(lambda self: self.like.new_empty(0))  # a dtype for T5, no numbers

    def __init__(self, base: nn.Module, double: bool):
        super().__init__()
        self.shell = (base,)  # a tuple hides it: `attach` takes its weight, `plain` gives one back
        self.shape, self.double, self.bias = base.weight.shape, double, base.bias
        self.register_buffer("like", torch.empty_like(base.weight[:0]), persistent=False)  # a dtype
        self.store(base.weight)

    def store(self, W: Tensor) -> None:
        packed, absmax = quantise(W)
        parts = (packed, *squeeze(absmax)) if self.double else (packed, absmax)
        for name, t in zip(("packed", "absmax", "top", "mean"), parts):
            # float32 as int32 bits: model.to(torch.bfloat16) leaves integers alone
            self.register_buffer(name, t.view(torch.int32) if t.is_floating_point() else t)

    def W(self) -> Tensor:
        """W~, (d_out, d_in), in the dtype W had."""
        absmax = self.absmax if self.double else self.absmax.view(torch.float32)
        if self.double:
            absmax = unsqueeze(absmax, self.top.view(torch.float32), self.mean.view(torch.float32))
        W = dequantise(self.packed, absmax, self.shape, self.like.dtype)
        return self.turn(W)

    def turn(self, W: Tensor) -> Tensor:
        """Between (d_out, d_in) and the way the layer stores its weight."""
        return W if isinstance(self.shell[0], nn.Linear) else W.T

    def forward(self, x: Tensor) -> Tensor:  # (..., d_in) -> (..., d_out)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return _Frozen4bit.apply(x, None if self.bias is None else self.bias.to(x.dtype), self)

    def plain(self, W: Tensor) -> nn.Module:
        """The layer that was here, with the weight W (d_out, d_in)."""
        layer = self.shell[0]
        W = self.turn(W).to(self.like.dtype).contiguous()
        layer.weight = nn.Parameter(W, requires_grad=False)
        layer.bias = self.bias
        return layer


class QLoRALinear(nn.Module):
    """y = base(x) + s (x A') B', the base in four bits."""

    weight = property(lambda self: self.base.weight)

    def __init__(self, base: nn.Module, r: int, alpha: float, dropout=0.0, double=True):
        super().__init__()
        d_out, d_in = _shape(base)
        if not 1 <= r <= min(d_in, d_out):
            raise ValueError(f"r = {r}: the rank must lie in 1..{min(d_in, d_out)} here")
        W = base.weight
        # Half-precision weights get float32 factors: a small step must not round away.
        dtype = W.dtype if W.dtype in (torch.float32, torch.float64) else torch.float32
        bound = d_in**-0.5
        self.base = NF4Linear(base, double)
        # Drawn on the CPU, so that a seed gives the same A on every device.
        A = torch.empty(r, d_in, dtype=dtype).uniform_(-bound, bound)
        self.A = nn.Parameter(A.to(W.device))
        self.B = nn.Parameter(torch.zeros(d_out, r, dtype=dtype, device=W.device))
        self.dropout = nn.Dropout(dropout)
        self.s = alpha / r

    def forward(self, x: Tensor) -> Tensor:  # (..., d_in) -> (..., d_out)
        y = self.base(x)
        A, B = self.A.to(x.dtype), self.B.to(x.dtype)  # cast the thin factors, never x
        z = F.linear(self.dropout(x), A)  # (..., r)
        return y + F.linear(z, B) * self.s


def attach(
    model: nn.Module,
    *targets: str,
    r: int = 64,
    alpha: float = 16.0,
    dropout: float = 0.0,
    double: bool = True,
    freeze: bool = True,
) -> list[str]:
    """Freeze `model`; keep every linear layer that `targets` name in 4 bits, with LoRA beside it.

    Returns their paths. ValueError: a target that names no linear layer, r outside
    1..min(d_in, d_out), a weight that is shared or not finite; the model is then as it was.
    """
    paths = _find(model, targets)
    _alone(model, paths)
    new = {p: QLoRALinear(model.get_submodule(p), r, alpha, dropout, double) for p in paths}
    if freeze:
        model.requires_grad_(False)
    for path, layer in new.items():
        layer.train(model.training)
        layer.base.shell[0].weight = None  # here the 16- or 32-bit weight goes
        _put(model, path, layer)
    return paths


def sites(model: nn.Module) -> dict[str, QLoRALinear]:
    """{path: layer}, found by type and never by a substring of a name."""
    return {p: m for p, m in model.named_modules() if isinstance(m, QLoRALinear)}


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
def merge(model: nn.Module, requantise: bool = False) -> dict[str, tuple[float, float]]:
    """Plain layers with W~ + dW; requantise=True: 4-bit layers with that sum rounded to NF4.

    Returns {path: (error, kept)} of the new weight W': the size of W' - (W~ + dW) divided by that
    of dW, and the share of dW that W' - W~ holds along dW. Exact is (0, 1); nan where dW = 0.
    """
    losses = {}
    for path, m in sites(model).items():
        W, dW = m.base.W().double(), m.s * (m.B.double() @ m.A.double())  # (d_out, d_in)
        layer = m.base.plain(W + dW)
        if requantise:
            layer = NF4Linear(layer, m.base.double)
            layer.shell[0].weight = None
        new = layer.W() if requantise else m.base.turn(layer.weight)
        error, kept = (new - W - dW).norm() / dW.norm(), ((new - W) * dW).sum() / dW.square().sum()
        losses[path] = (error.item(), kept.item())
        _put(model, path, layer)
    return losses


def detach(model: nn.Module) -> None:
    """Plain layers with W~, the base that was trained beside. The original W is gone."""
    for path, m in sites(model).items():
        _put(model, path, m.base.plain(m.base.W()))


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


def _alone(model: nn.Module, paths: list[str]) -> None:
    """A weight that two modules hold would live on in the other one."""
    held = Counter(id(x) for m in model.modules() for x in m._parameters.values())
    held.update(id(x) for m in model.modules() for x in m._modules.values())
    for path in paths:
        base = model.get_submodule(path)
        if max(held[id(base)], held[id(base.weight)]) > 1:
            raise ValueError(f"{path}: its weight is shared with another module; untie it first")


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


if __name__ == "__main__":  # python qlora.py: the claims above, checked on a toy
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(640, 512), nn.Tanh(), nn.Linear(512, 3)), torch.randn(4, 640)
    W = model[0].weight.clone()
    attach(model, "0", r=2)
    assert not any(p.shape == W.shape for p in model.parameters()), "W is gone"
    bits = sum(b.nbytes for b in model[0].base.buffers()) * 8 / W.numel()
    assert abs(bits - 4.127) < 0.001, bits
    assert ((model[0].base.W() - W).abs() < 0.16 * W.abs().max()).all()
    before = model(x)
    opt = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(3):
        opt.zero_grad()
        model(x).square().sum().backward()
        opt.step()
    tuned = model(x)
    (error, kept) = merge(model)["0"]
    assert error < 1e-4 and abs(kept - 1) < 1e-4, "merging into 32 bits loses next to nothing"
    assert torch.allclose(model(x), tuned, atol=1e-5) and not torch.allclose(tuned, before)
    print("qlora: ok")
