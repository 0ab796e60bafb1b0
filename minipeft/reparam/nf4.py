"""NF4: a frozen linear layer kept in four bits a weight. The half of QLoRA that does not train.

Paper      Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs",
           NeurIPS 2023, arXiv:2305.14314. Sections 2 and 3.

Idea       A weight that never trains need not be stored in a form that can be
           trained. Weights of a network look normal, so 16 levels that lie where a
           normal variable lies lose less than 16 equally spaced ones.

Math       W, flattened row by row as it is stored, cut into blocks of 64

               a    = max |w| of the block
               code = index of the level next to w / a      16 levels, 4 bits
               W~   = level[code] a                          |W~ - W| <= 0.1520 a
               y    = x W~' + b        dx = g W~             nothing else has a gradient

           Levels: quantiles of N(0, 1), 7 below zero, zero, 8 above, divided by the
           largest. Double quantisation: a minus the mean of all a is kept in 8 bits,
           in blocks of 256 with one float32 maximum each.

Steps      1. Quantise each chosen layer; its 16- or 32-bit weight is dropped.
           2. Forward: dequantise, multiply, forget. Backward: dequantise again.

Cost       Stored     4 + 32/64 = 4.5 bits a weight; with double quantisation
                      4 + 8/64 + 32/(64 256) = 4.127.
           Time       two dequantisations per step and layer.
           Memory     one dequantised layer at a time; none is kept for backward.

Differs    Codes and scales are bitsandbytes' bit for bit (CPU), also where the paper
           differs: its equation (4) has a level at minus infinity, and its 8-bit
           float is bitsandbytes' "dynamic" map.

Pitfalls   - W is thrown away: `detach` gives W~.
           - A block's largest weight is kept exactly, zeros too, with double=False.
             With double=True quantising again moves W~ a little.
           - The levels are not symmetric: NF4(-w) is not -NF4(w).
           - The model must fit in memory before `attach` makes it small.
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


def attach(model: nn.Module, *targets: str, double: bool = True, freeze: bool = True) -> list[str]:
    """Freeze `model`; keep every linear layer that `targets` name in 4 bits; return their paths.

    ValueError: a target that names no linear layer, a weight that is shared or not finite; the
    model is then as it was. freeze=False leaves every requires_grad but that of W as it is.
    """
    paths = _find(model, targets)
    _alone(model, paths)
    new = {p: NF4Linear(model.get_submodule(p), double) for p in paths}
    if freeze:
        model.requires_grad_(False)
    for path, layer in new.items():
        layer.train(model.training)
        layer.shell[0].weight = None  # here the 16- or 32-bit weight goes
        _put(model, path, layer)
    return paths


def sites(model: nn.Module) -> dict[str, NF4Linear]:
    """{path: layer}, found by type and never by a substring of a name."""
    return {p: m for p, m in model.named_modules() if isinstance(m, NF4Linear)}


def detach(model: nn.Module) -> None:
    """Plain layers with W~. The original W is gone."""
    for path, m in sites(model).items():
        _put(model, path, m.plain(m.W()))


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


def _put(model: nn.Module, path: str, new: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, new)


if __name__ == "__main__":  # python nf4.py: the claims above, checked on a toy
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(640, 512, bias=False)), torch.randn(4, 640)
    W = model[0].weight.detach().clone()
    assert dequantise(*quantise(nf4()), nf4().shape, W.dtype).equal(nf4()), "levels are exact"
    attach(model, "0")
    bits = sum(b.nbytes for b in model[0].buffers()) * 8 / W.numel()
    assert abs(bits - 4.127) < 0.001, bits
    assert (model[0].W() - W).norm() < 0.1 * W.norm()
    y = model(x)
    detach(model)
    assert torch.equal(model(x), y) and not torch.equal(model[0].weight, W)
    print("nf4: ok")
