"""Adapters: a small bottleneck network after every sub-layer of a frozen Transformer.

Paper      Houlsby et al., "Parameter-Efficient Transfer Learning for NLP",
           ICML 2019, arXiv:1902.00751. Section 2.1, figure 2.

Idea       Leave every weight alone and correct what each sub-layer says: squeeze
           its output through m numbers, and add the result back. With small
           weights the correction is almost nothing, so training starts from the
           pretrained model.

Math       u (..., d) = what a sub-layer S is about to add to its residual
           W_down (m, d)   b_down (m)   W_up (d, m)   b_up (d)

               s    = u W_down' + b_down         ' = transpose, (..., m)
               z    = gelu(s)                    tanh form
               A(u) = u + z W_up' + b_up         (..., d)

           Where: output projection -> dropout -> A -> residual -> LayerNorm,
           once after the attention and once after the FFN of every layer:

               y = LayerNorm(x + A(dropout(S(x))))        BERT
               y = x + A(dropout(S(LayerNorm(x))))        GPT-2, Llama, T5

           Start: W_down and W_up normal with deviation sigma, cut at 2 sigma;
           biases 0. A(u) - u is of order sigma^2, so step 0 is almost the base
           model. With D = dL/dA, rows flattened to N, and g = (D W_up) * gelu'(s),

               dL/dW_up   = D' z   (d, m)        dL/db_up   = sum of rows of D
               dL/dW_down = g' u   (m, d)        dL/db_down = sum of rows of g
               dL/du      = D + g W_down

Steps      1. Freeze every parameter of the model.
           2. Put Adapter(base) in the place of the module that closes each
              sub-layer: its dropout, or its output projection where there is none.
           3. Give every LayerNorm its own trained gain and bias.
           4. Train these and the head. Store them per task.

Cost       Trained    2 m d + d + m per adapter, two adapters per layer, plus the
                      LayerNorms, 2 d each. BERT-large, m = 64: 6,343,680 + 100,352.
           Memory     gradients and optimiser state shrink; activations do not.
           Inference  two thin matmuls and a GELU after every sub-layer, for ever.

Differs    sigma is 1e-3, as in the authors' code; the paper says 1e-2.
           The paper has BERT only; pre-LN models, RMSNorm and T5's cross-attention
           follow by analogy. Pfeiffer et al. (2021) adapt the FFN alone: name its
           closing modules, with norms=False. Their ReLU is not built, nor is their
           W_down that reads LayerNorm(u + x): a closing module does not see x.

Pitfalls   - No `merge`: gelu is not linear, so no matrix W computes A(S(x)).
           - Without the inner "u +" a small W_up deletes the sub-layer.
           - W_down = W_up = 0 never moves: all gradients but that of b_up are 0.
             W_up = 0 alone is fine, and is the base model exactly.
           - LayerNorms belong to the task: stored with it, taken back by `detach`,
             and best left out of weight decay, which pulls a gain to 0, not to 1.
           - The head is the task's: unfreeze it after `attach`. BERT's pooler stays
             frozen, in the authors' code too.
"""

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

try:  # GPT-2's linear layer: its width is nf
    from transformers.pytorch_utils import Conv1D
except ImportError:  # torch alone is enough for everything else
    Conv1D = nn.Linear

# What closes the sub-layers when no target is given: the first row that fits the whole model.
CLOSING = (
    ("output.dropout",),  # BERT, RoBERTa, DeBERTa: attention.output and output
    ("resid_dropout", "mlp.dropout"),  # GPT-2
    ("layer.0.dropout", "layer.1.dropout", "layer.2.dropout"),  # T5; its decoder has three
    ("layer.0.dropout", "layer.1.dropout"),  # T5's encoder alone
    ("o_proj", "down_proj"),  # Llama, Mistral, Qwen: no dropout there
)


class Adapter(nn.Module):
    """A(u) = u + gelu(u W_down' + b_down) W_up' + b_up, with u = base(x)."""

    weight = None  # who computes with it behind our back fails loudly

    def __init__(self, base: nn.Module, d: int, m: int, sigma=1e-3, dtype=None, device=None):
        super().__init__()
        if m < 1 or sigma <= 0:
            raise ValueError(f"bottleneck = {m}, sigma = {sigma}: both must be positive")

        def normal(rows, columns):  # drawn on the CPU: a seed gives the same on every device
            W, cut = torch.empty(rows, columns, dtype=dtype), 2 * sigma
            return nn.Parameter(nn.init.trunc_normal_(W, 0, sigma, -cut, cut).to(device))

        self.base = base
        self.W_down, self.W_up = normal(m, d), normal(d, m)
        self.b_down = nn.Parameter(torch.zeros(m, dtype=dtype, device=device))
        self.b_up = nn.Parameter(torch.zeros(d, dtype=dtype, device=device))

    def forward(self, x: Tensor) -> Tensor:
        u = self.base(x)  # (..., d)
        names = ("W_down", "b_down", "W_up", "b_up")  # by name: a selection may stand on them
        cast = {n: getattr(self, n).to(u.dtype) for n in names}  # never u
        s = F.linear(u, cast["W_down"], cast["b_down"])  # (..., m)
        return u + F.linear(F.gelu(s, approximate="tanh"), cast["W_up"], cast["b_up"])


class TunedNorm(nn.Module):
    """The same LayerNorm or RMSNorm with a gain and a bias of its own; base keeps the old ones."""

    weight = None

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base = base
        copies = {n: p.detach().to(_dtype(p), copy=True) for n, p in base.named_parameters()}
        self.own = nn.ParameterDict(copies)

    def forward(self, x: Tensor) -> Tensor:
        cast = {n: p.to(getattr(self.base, n).dtype) for n, p in self.own.items()}
        return functional_call(self.base, cast, (x,))  # the norm's own code, our parameters


def attach(
    model: nn.Module,
    *targets: str,
    bottleneck: int = 64,
    sigma: float = 1e-3,
    norms: bool = True,
    freeze: bool = True,
) -> list[str]:
    """Freeze `model`; put an adapter behind every module that `targets` name, and tune every
    LayerNorm and RMSNorm; return the paths of both.

    A target is the dropout or the linear layer that closes a sub-layer; without targets CLOSING
    finds them. ValueError: a target that names no such module; the model is then as it was.
    """
    new = {}
    for path, linear in _closing(model, targets).items():
        d, W = linear.out_features if isinstance(linear, nn.Linear) else linear.nf, linear.weight
        new[path] = Adapter(model.get_submodule(path), d, bottleneck, sigma, _dtype(W), W.device)
    if norms:
        done = [m.base for m in sites(model).values()]
        for path, m in model.named_modules():
            is_norm = type(m).__name__.endswith(("LayerNorm", "RMSNorm")) and list(m.parameters())
            if is_norm and all(m is not d for d in done):
                new[path] = TunedNorm(m)
    if freeze:
        model.requires_grad_(False)
    for path, module in new.items():
        module.train(model.training)
        _put(model, path, module)
    return [path for path, _ in model.named_modules() if path in new]


def sites(model: nn.Module) -> dict[str, nn.Module]:
    """{path: Adapter or TunedNorm}, found by type and never by a substring of a name."""
    return {p: m for p, m in model.named_modules() if isinstance(m, (Adapter, TunedNorm))}


def state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every adapter's four tensors and of every tuned norm's gain and bias."""
    return {name: p.detach().clone() for name, p in _own(model).items()}


@torch.no_grad()
def load(model: nn.Module, saved: dict[str, Tensor]) -> None:
    """Inverse of `state`, on a model with the same sites attached; all or nothing.

    KeyError: other names. ValueError: a wrong shape (another bottleneck), a selection on it.
    """
    _check(sites(model), state(model), saved)
    for name, p in _own(model).items():
        p.copy_(saved[name])


def detach(model: nn.Module) -> None:
    """Put the plain modules and the pretrained norms back: the base, bit for bit."""
    for path, m in sites(model).items():
        _put(model, path, m.base)


def _closing(model: nn.Module, targets: tuple[str, ...]) -> dict[str, nn.Module]:
    """{path of a target: the linear layer that gives its output its width}."""
    paths = [f".{p}" for p, _ in model.named_modules()]

    def lost(names):
        return [t for t in names if not any(p.endswith(f".{t}") for p in paths)]

    targets = targets or next((row for row in CLOSING if not lost(row)), ())
    if not targets or lost(targets):
        names = ", ".join(map(repr, lost(targets))) or "as in any row of CLOSING: give targets"
        raise ValueError(f"no module is named {names}")
    found, linear = {}, None
    for path, m in model.named_modules():
        linear = m if isinstance(m, (nn.Linear, Conv1D)) else linear
        if f".{path}".endswith(tuple(f".{t}" for t in targets)):
            if not isinstance(m, (nn.Linear, Conv1D, nn.Dropout, nn.Identity)) or linear is None:
                kind = type(m).__name__
                raise ValueError(f"{path} is a {kind}, expected a linear layer, or dropout after one")
            found[path] = linear
    return found


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


if __name__ == "__main__":  # python adapter.py: the claims above, checked on a toy
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.0), nn.LayerNorm(5), nn.Linear(5, 3))
    model, x = model.double(), torch.randn(4, 6).double()
    before = model(x)
    assert attach(model, "1", bottleneck=2) == ["1", "2"], "one adapter, one norm"
    assert (model(x) - before).abs().max() < 1e-4, "step 0 is almost the base model"
    start = state(model)
    load(model, start | {"1.W_up": torch.zeros(5, 2)})
    assert torch.equal(model(x), before), "with W_up = 0 exactly"
    load(model, start)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == (2 * 2 * 5 + 5 + 2) + 2 * 5
    opt = torch.optim.SGD(trained, lr=0.1)
    model(x).square().sum().backward()
    opt.step()
    assert not torch.allclose(model(x), before), "a step must move the function"
    detach(model)
    assert torch.equal(model(x), before) and not sites(model), "the pretrained norm is back"
    print("adapter: ok")
