"""IA3: rescale the keys, the values and the FFN's hidden numbers, one learned factor each.

Paper      Liu et al., "Few-Shot Parameter-Efficient Fine-Tuning is Better and
           Cheaper than In-Context Learning", NeurIPS 2022, arXiv:2205.05638, 3.3.

Idea       A pretrained model already computes useful numbers. Make some louder and
           some quieter, at every token alike, and learn nothing else.

Math       K, V (T, d_k), (T, d_v)   hidden h (T, d_ff)   l_k (d_k)  l_v (d_v)  l_ff (d_ff)

               softmax(Q (l_k * K)' / sqrt(d_head)) (l_v * V)     ' = transpose
               W_2 (l_ff * h) + b_2,   h = act(W_1 x + b_1)

           d_k and d_v are full widths, all heads together. Start: ones, so step 0
           is the base model exactly. y before scaling, G = gradient after it, rows n:
           dL/dl_j = sum over n of G_nj y_nj.

Steps      1. Freeze every parameter of the model.
           2. Scale what key and value layers give, and what the second FFN matrix gets.
           3. Train the factors.
           4. Merge: W_k <- diag(l_k) W_k, b_k <- l_k * b_k, the same for v;
              W_2 <- W_2 diag(l_ff), b_2 as it is.

Cost       Trained    d_k + d_v + d_ff per layer; a decoder with cross-attention has
                      two pairs of d_k + d_v. T0-3B 540,672; Llama-3.2-3B 286,720.
           Inference  one product per number and site; none after merging.
           Batch      rows of several tasks run together, each with its own factors.

Differs    The authors scale the output of wi_1; in a gated FFN that is the input of
           wo, which is what this file scales, gated or not. GPT-2's c_attn computes
           q, k and v at once: only k and v are scaled. HF peft scales q too, and on
           BERT the input of attention.output.dense; it ignores a choice per row.

Pitfalls   - A scale before the nonlinearity is another method.
           - Weight decay pulls a factor to 0, not to 1: leave it out.
           - The factors stay float32: next to 1 bfloat16 moves in steps of 1/128.
           - With RoPE, scaled keys are not scaled queries; without, they are.
           - `choose` holds until the next call. A beam is a row: give each its id.
"""

import re
from collections import Counter

import torch
from torch import Tensor, nn
from torch.nn import functional as F

try:  # GPT-2's linear layer: its weight is (d_in, d_out)
    from transformers.pytorch_utils import Conv1D
except ImportError:  # torch alone is enough for everything else
    Conv1D = nn.Linear

KINDS = (nn.Linear, Conv1D)

# Keys and values, second FFN matrix: what to scale when no target is given.
LAYOUTS = (
    (r"[.](k_proj|v_proj)$", r"[.]down_proj$"),  # Llama, Mistral, Qwen, Gemma
    (r"[.]c_attn$", r"mlp[.]c_proj$"),  # GPT-2
    (r"[.](key|value)$", r"layer[.][0-9]+[.]output[.]dense$"),  # BERT, RoBERTa
    (r"[.](k|v)$", r"[.]wo$"),  # T5
)
FUSED = ("query_key_value", "qkv_proj", "Wqkv")  # each in an order of its own


class Scaled(nn.Module):
    """base with its outputs, or its inputs, scaled by l; l has one row per task."""

    weight = property(lambda self: self.base.weight.new_empty(0))  # a dtype for T5, no numbers

    def __init__(self, base: nn.Module, side: str, tasks: int = 1, skip: int = 0):
        super().__init__()
        if tasks < 1:
            raise ValueError(f"tasks = {tasks}: expected at least 1")
        W = base.weight
        width = _shape(base)[side == "in"] - skip  # skip: the first outputs are not scaled
        # Half-precision weights get float32 factors: a small step must not round away.
        dtype = W.dtype if W.dtype in (torch.float32, torch.float64) else torch.float32
        self.base, self.side, self.skip = base, side, skip
        self.l = nn.Parameter(torch.ones(tasks, width, dtype=dtype, device=W.device))
        self.rows = None  # the task of every row of the batch, see `choose`

    def scale(self, x: Tensor) -> Tensor:  # (B, ..., n) -> (B, ..., n)
        l = F.pad(self.l, (self.skip, 0), value=1.0)  # (tasks, n)
        if len(l) == 1:
            return (x * l[0]).to(x.dtype)
        if self.rows is None or len(self.rows) != len(x):
            raise ValueError(f"a batch of {len(x)} rows needs as many task ids: see `choose`")
        return (x * l[self.rows].view(len(x), *[1] * (x.dim() - 2), -1)).to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:  # (B, ..., d_in) -> (B, ..., d_out)
        return self.scale(self.base(x)) if self.side == "out" else self.base(self.scale(x))


def attach(
    model: nn.Module, *targets: str, ffn: tuple[str, ...] = (), tasks: int = 1, freeze: bool = True
) -> list[str]:
    """Freeze `model`; scale the outputs of the linear layers that `targets` name and the inputs of
    those that `ffn` names; return their paths. With neither, LAYOUTS finds them.

    tasks > 1 makes one set of factors per task, see `choose`. ValueError, the model being as it
    was: a name without a linear layer, or a layer that mixes queries into the keys.
    """
    named = [_find(model, names) if names else [] for names in (targets, ffn)]
    outs, ins = named if targets or ffn else _layout(model)
    if twice := set(outs) & set(ins):
        raise ValueError(f"{min(twice)} is named twice: scale its outputs or its inputs")
    new = {p: Scaled(model.get_submodule(p), "out", tasks, _queries(model, p)) for p in outs}
    new |= {p: Scaled(model.get_submodule(p), "in", tasks) for p in ins}
    if freeze:
        model.requires_grad_(False)
    for path, layer in new.items():
        layer.train(model.training)
        _put(model, path, layer)
    return [path for path, _ in model.named_modules() if path in new]


def choose(model: nn.Module, task_ids) -> None:
    """Row i of every batch from here on belongs to task task_ids[i]."""
    ids = torch.as_tensor(task_ids)
    tasks = min(len(m.l) for m in sites(model).values())
    if ids.dim() != 1 or not all(0 <= i < tasks for i in ids.tolist()):
        raise ValueError(f"task ids {ids.tolist()}: expected a list of numbers below {tasks}")
    for m in sites(model).values():
        m.rows = ids.to(m.l.device)


def sites(model: nn.Module) -> dict[str, Scaled]:
    """{path: layer}, found by type and never by a substring of a name."""
    return {p: m for p, m in model.named_modules() if isinstance(m, Scaled)}


def state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every site's factors, (tasks, n). torch.cat of two states joins their tasks."""
    return {f"{path}.l": m.l.detach().clone() for path, m in sites(model).items()}


@torch.no_grad()
def load(model: nn.Module, saved: dict[str, Tensor]) -> None:
    """Inverse of `state`, on a model with the same sites attached; all or nothing.

    KeyError: missing or other names. ValueError: a wrong shape (other tasks), a selection on it.
    """
    _check(sites(model), state(model), saved)
    for path, m in sites(model).items():
        m.l.copy_(saved[f"{path}.l"])


@torch.no_grad()
def merge(model: nn.Module, task: int | None = None) -> dict[str, float]:
    """Fold the factors into W and b and put the plain layers back. Cannot be undone.

    Returns {path: largest rounding error of one weight}, in the weight's own unit.
    ValueError: no such task, several and none named, or W is tied to another module.
    """
    holders = Counter(id(p) for m in model.modules() for p in m._parameters.values())
    for path, m in sites(model).items():
        if holders[id(m.base.weight)] > 1:
            raise ValueError(f"{path}: its weight is shared with another module; untie it first")
        if task not in (range(len(m.l)) if len(m.l) > 1 else (None, 0)):
            raise ValueError(f"task = {task}: name one of {len(m.l)} tasks, counted from 0")
    rounding = {}
    for path, m in sites(model).items():
        W, b = m.base.weight, m.base.bias
        l = F.pad(m.l[task or 0].double(), (m.skip, 0), value=1.0)  # (n,)
        on_rows = (m.side == "out") == isinstance(m.base, nn.Linear)
        exact = W.double() * (l[:, None] if on_rows else l)
        W.copy_(exact)
        if m.side == "out" and b is not None:
            b.copy_(b.double() * l)
        rounding[path] = (W.double() - exact).abs().max().item()
        _put(model, path, m.base)
    return rounding


def detach(model: nn.Module) -> None:
    """Put the plain layers back. W was never touched: the base, bit for bit."""
    for path, m in sites(model).items():
        _put(model, path, m.base)


def _layout(model: nn.Module) -> tuple[list[str], list[str]]:
    paths = [p for p, m in model.named_modules() if isinstance(m, KINDS)]
    for row in LAYOUTS:
        outs, ins = ([p for p in paths if re.search(pattern, f".{p}")] for pattern in row)
        if outs and ins:
            return outs, ins
    raise ValueError("no row of LAYOUTS fits this model: name its layers")


def _queries(model: nn.Module, path: str) -> int:
    """How many of the layer's first outputs are queries: GPT-2's c_attn holds q, k and v."""
    name, (d_out, d_in) = path.rpartition(".")[2], _shape(model.get_submodule(path))
    if name in FUSED or name == "c_attn" and d_out not in (2 * d_in, 3 * d_in):
        raise ValueError(f"{path} mixes queries into the keys, expected keys or values alone")
    return d_out - 2 * d_in if name == "c_attn" else 0


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


if __name__ == "__main__":  # python ia3.py: the claims above, checked on a toy
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x = torch.randn(4, 6).double()
    before = model(x)
    assert attach(model, "0", ffn=("2",), tasks=2) == ["0", "2"]
    choose(model, [0, 1, 1, 0])
    assert torch.equal(model(x), before), "step 0 must be the base model"
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == 2 * (5 + 5), "two tasks, five factors a site"
    model(x).square().sum().backward()
    torch.optim.SGD(trained, lr=0.1).step()
    tuned = model(x)
    assert max(merge(model, task=1).values()) == 0.0, "float64 arithmetic on float64 weights"
    same = torch.isclose(model(x), tuned).all(1).tolist()
    assert same == [False, True, True, False], "the rows of task 1, and no others"
    print("ia3: ok")
