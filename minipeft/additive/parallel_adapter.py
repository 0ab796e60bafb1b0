"""Parallel adapters: the bottleneck runs beside the FFN instead of after it.

Paper      He et al., "Towards a Unified View of Parameter-Efficient Transfer
           Learning", ICLR 2022, arXiv:2110.04366. "Scaled parallel adapter", part
           of their MAM adapter. Its sibling: adapter.py.

Idea       An adapter behind the FFN sees only what the FFN leaves. Let it see what
           the FFN sees, and add the two answers. Then it is LoRA with a
           nonlinearity, around a whole sub-layer.

Math       x (..., d) = input of the FFN F
           W_down (m, d)   b_down (m)   W_up (d, m)   b_up (d)

               P(x) = s (relu(x W_down' + b_down) W_up' + b_up)    ' = transpose
               y = LayerNorm(x + F(x) + P(x))                      BERT
               y = x + F(n) + P(n),  n = LayerNorm(x)              GPT-2, Llama, T5

           Start: W_down uniform in +-1/sqrt(d); W_up, b_down, b_up = 0. Then P = 0,
           and step 0 is the base model exactly.

Steps      1. Freeze every parameter of the model, LayerNorms too.
           2. Put ParallelAdapter(base) in the place of every FFN.
           3. Train the four tensors, and the head.

Cost       Trained    2 m d + d + m per layer: half of adapter.py, which has two.
           Inference  two thin matmuls beside each FFN, for ever.

Differs    The authors' models are post-LN, where the FFN's input is the residual
           stream. In a pre-LN model this file reads the normalised input, what the
           FFN itself reads; AdapterHub reads the stream before the LayerNorm.

Pitfalls   - No `merge`: relu is not linear, and it stands beside another network.
           - s is not W_up: the same function at s = 1 with s W_up, but Adam steps on
             W_up do not grow with s, so s sets how far a step moves the function.
           - W_down = W_up = 0 never moves anything but b_up.
"""

import re

import torch
from torch import Tensor, nn
from torch.nn import functional as F

try:  # GPT-2's linear layer: its width is nf
    from transformers.pytorch_utils import Conv1D
except ImportError:  # torch alone is enough for everything else
    Conv1D = nn.Linear

# The FFNs when no target is given: the first row that fits. BERT's `output` gets the FFN's input
# as its second argument, and adds it to the FFN's output.
LAYOUTS = (r"layer[.][0-9]+[.]output$", r"[.]mlp$", r"[.]DenseReluDense$")  # BERT; GPT-2, Llama; T5


class ParallelAdapter(nn.Module):
    """base(x) + s (relu(x W_down' + b_down) W_up' + b_up)."""

    def __init__(self, base: nn.Module, d: int, m: int, s=4.0, dtype=None, device=None):
        super().__init__()
        if m < 1 or s <= 0:
            raise ValueError(f"bottleneck = {m}, s = {s}: both must be positive")
        # Drawn on the CPU, so that a seed gives the same W_down on every device.
        W_down = torch.empty(m, d, dtype=dtype).uniform_(-(d**-0.5), d**-0.5)
        self.base, self.s = base, s
        self.W_down = nn.Parameter(W_down.to(device))
        self.b_down = nn.Parameter(torch.zeros(m, dtype=dtype, device=device))
        self.W_up = nn.Parameter(torch.zeros(d, m, dtype=dtype, device=device))
        self.b_up = nn.Parameter(torch.zeros(d, dtype=dtype, device=device))

    def branch(self, x: Tensor) -> Tensor:  # (..., d) -> (..., d)
        names = ("W_down", "b_down", "W_up", "b_up")  # by name: a selection may stand on them
        cast = {n: getattr(self, n).to(x.dtype) for n in names}  # never x
        z = F.relu(F.linear(x, cast["W_down"], cast["b_down"]))  # (..., m)
        return F.linear(z, cast["W_up"], cast["b_up"]) * self.s

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if residual is None:
            return self.base(x) + self.branch(x)
        return self.base(x, residual + self.branch(residual))  # BERT: LayerNorm(W_2 x + residual)


def attach(
    model: nn.Module, *targets: str, bottleneck: int = 64, s: float = 4.0, freeze: bool = True
) -> list[str]:
    """Freeze `model`; put an adapter beside every FFN that `targets` name; return their paths.

    Without targets LAYOUTS finds the FFNs. ValueError: a target that names no module with a
    linear layer in it; the model is then as it was.
    """
    new = {}
    for path in _ffns(model, targets):
        ffn = model.get_submodule(path)
        linear = [m for m in ffn.modules() if isinstance(m, (nn.Linear, Conv1D))][-1]
        d, W = linear.out_features if isinstance(linear, nn.Linear) else linear.nf, linear.weight
        new[path] = ParallelAdapter(ffn, d, bottleneck, s, _dtype(W), W.device)
    if freeze:
        model.requires_grad_(False)
    for path, module in new.items():
        module.train(model.training)
        _put(model, path, module)
    return list(new)


def sites(model: nn.Module) -> dict[str, ParallelAdapter]:
    """{path: layer}, found by type and never by a substring of a name."""
    return {p: m for p, m in model.named_modules() if isinstance(m, ParallelAdapter)}


def state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every adapter's four tensors and its s."""
    saved = {name: p.detach().clone() for name, p in _own(model).items()}
    return saved | {f"{p}.s": torch.tensor(m.s).double() for p, m in sites(model).items()}


@torch.no_grad()
def load(model: nn.Module, saved: dict[str, Tensor]) -> None:
    """Inverse of `state`, on a model with the same sites attached; all or nothing.

    KeyError: other names. ValueError: a wrong shape (another bottleneck), a selection on it.
    """
    _check(sites(model), state(model), saved)
    for name, p in _own(model).items():
        p.copy_(saved[name])
    for path, m in sites(model).items():
        m.s = saved[f"{path}.s"].item()


def detach(model: nn.Module) -> None:
    """Put the plain FFNs back. They were never touched: the base, bit for bit."""
    for path, m in sites(model).items():
        _put(model, path, m.base)


def _ffns(model: nn.Module, targets: tuple[str, ...]) -> list[str]:
    """Paths of the modules that `targets` name, or of the FFNs."""
    modules = dict(model.named_modules())

    def named(pattern):
        return [path for path in modules if re.search(pattern, path)]

    if targets:
        groups = {t: named(rf"(^|[.]){re.escape(t)}$") for t in targets}
    else:
        groups = {row: named(row) for row in LAYOUTS if named(row)}
        groups = dict(list(groups.items())[:1]) or {"a row of LAYOUTS": []}
    for name, paths in groups.items():
        kinds = [{type(m) for m in modules[p].modules()} for p in paths]
        if not paths or not all(k & {nn.Linear, Conv1D} for k in kinds):
            raise ValueError(f"{name} names no FFN, expected a module with linear layers in it")
    return [p for p in modules if any(p in paths for paths in groups.values())]


def _dtype(p: Tensor) -> torch.dtype:
    """Half-precision weights get float32 company: a small step must not round away."""
    return p.dtype if p.dtype in (torch.float32, torch.float64) else torch.float32


def _own(model: nn.Module) -> dict[str, nn.Parameter]:
    """What the sites added, by name."""
    pairs = [(f"{path}.", m.named_parameters()) for path, m in sites(model).items()]
    return {path + n: p for path, own in pairs for n, p in own if not n.startswith("base.")}


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


if __name__ == "__main__":  # python parallel_adapter.py: the claims above, checked on a toy
    torch.manual_seed(0)
    ffn = nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 6))
    model, x = nn.Sequential(), torch.randn(4, 6).double()
    model.mlp, model.head = ffn.double(), nn.Linear(6, 3).double()
    before = model(x)
    assert attach(model, "mlp", bottleneck=2) == ["mlp"]
    assert torch.equal(model(x), before), "step 0 must be the base model"
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == 2 * 2 * 6 + 6 + 2
    model(x).square().sum().backward()
    torch.optim.SGD(trained, lr=0.01).step()
    assert not torch.allclose(model(x), before), "a step must move the function"
    detach(model)
    assert torch.equal(model(x), before) and not sites(model), "the base again"
    print("parallel_adapter: ok")
