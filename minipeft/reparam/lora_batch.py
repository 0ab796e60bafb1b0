"""LoRA for many tasks: a stack of updates on one base, one chosen for each row of the batch.

Paper      Hu et al. 2021, arXiv:2106.09685, section 4.2: once merged, rows of
           different tasks cannot share a batch. Unmerged they can: Chen et al.,
           "Punica", arXiv:2310.18547; Sheng et al., "S-LoRA", arXiv:2311.03285.

Idea       One base serves K tasks. Each row of a batch brings its own thin
           factors; the wide matmul with W is done once for all rows.

Math       x (N, ..., d_in)   W (d_out, d_in)   t (N,) the task of each row
           A (K, r, d_in)     B (K, d_out, r)   s (K,)     s = alpha / r

               y_n = x_n W' + b + s[t_n] (x_n A[t_n]') B[t_n]'

           t_n = -1 is the base alone. Task k learns from its own rows alone:
           its gradients are those of lora.py, summed over n with t_n = k.

Steps      1. Freeze every parameter of the model.
           2. Put LoRABatch(base) in the place of each chosen layer.
           3. Before every batch: choose(model, task_ids).
           4. Train A and B; or insert(model, task, lora.state(other)).

Cost       Trained    K r (d_in + d_out) per layer.
           Memory     each call gathers N r (d_in + d_out) numbers.
           Inference  two thin batched matmuls per layer, always.

Differs    Torch indexes where the papers gather with their own GPU kernels.
           One rank for all tasks; an inserted task brings its own s.

Pitfalls   - No merge: one W cannot hold K updates. Extract a task into lora.py.
           - A choice stays until the next: gradient checkpointing runs the
             forward again. Choose before every batch: N may be a multiple of
             len(task_ids), copies of a row side by side, as generate() makes
             beams; an old choice whose length divides N is taken for that.
           - The input's first dimension must be the batch.
           - Under AdamW a task without rows in a batch still moves: momentum
             and weight decay act on the whole stack.
"""

import torch
from torch import Tensor, nn

try:  # GPT-2's linear layer: its weight is (d_in, d_out)
    from transformers.pytorch_utils import Conv1D
except ImportError:  # torch alone is enough for everything else
    Conv1D = nn.Linear

KINDS = (nn.Linear, Conv1D)


class LoRABatch(nn.Module):
    """y_n = base(x_n) + s[t_n] (x_n A[t_n]') B[t_n]'; the base's own parameters are not touched."""

    weight = property(lambda self: self.base.weight.new_empty(0))  # a dtype for T5, no numbers

    def __init__(self, base: nn.Module, tasks: int, r: int, alpha: float, dropout=0.0):
        super().__init__()
        d_out, d_in = _shape(base)
        if tasks < 1:
            raise ValueError(f"tasks = {tasks}: expected at least one")
        if not 1 <= r <= min(d_in, d_out):
            raise ValueError(f"r = {r}: the rank must lie in 1..{min(d_in, d_out)} here")
        W = base.weight
        # Half-precision weights get float32 factors: a small step must not round away.
        dtype = W.dtype if W.dtype in (torch.float32, torch.float64) else torch.float32
        bound = d_in**-0.5
        self.base = base
        # Drawn on the CPU, so that a seed gives the same A on every device.
        A = torch.empty(tasks, r, d_in, dtype=dtype).uniform_(-bound, bound)
        self.A = nn.Parameter(A.to(W.device))
        self.B = nn.Parameter(torch.zeros(tasks, d_out, r, dtype=dtype, device=W.device))
        self.dropout = nn.Dropout(dropout)
        s = torch.full((tasks,), alpha / r, dtype=torch.float64, device=W.device)
        self.register_buffer("s", s, persistent=False)
        self.register_buffer("chosen", None, persistent=False)  # (n,) ids, set by `choose`

    def forward(self, x: Tensor) -> Tensor:  # (N, ..., d_in) -> (N, ..., d_out)
        if self.chosen is None:
            raise ValueError("no task is chosen: call choose(model, task_ids) first")
        n = len(self.chosen)
        if len(x) % n:
            raise ValueError(f"{len(x)} rows for {n} task ids: expected a multiple of {n}")
        t = self.chosen.repeat_interleave(len(x) // n)  # (N,)
        y = self.base(x)
        s = torch.where(t < 0, 0.0, self.s[t]).to(self.B.dtype)  # (N,)
        A = self.A[t].to(x.dtype)  # (N, r, d_in): gather, cast the thin factors, never x
        B = (s[:, None, None] * self.B[t]).to(x.dtype)  # (N, d_out, r)
        z = torch.einsum("n...i,nri->n...r", self.dropout(x), A)
        return y + torch.einsum("n...r,nor->n...o", z, B)


def attach(
    model: nn.Module,
    *targets: str,
    tasks: int,
    r: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    choice: int | None = None,
    freeze: bool = True,
) -> list[str]:
    """Freeze `model`; wrap every linear layer that `targets` name; return their paths.

    choice: the task of all rows until `choose` is called; None: a forward before that raises.
    ValueError: a target that names no linear layer, r outside 1..min(d_in, d_out), or no task;
    the model is then as it was. freeze=False leaves every requires_grad as it is.
    """
    paths = _find(model, targets)
    new = {p: LoRABatch(model.get_submodule(p), tasks, r, alpha, dropout) for p in paths}
    if choice is not None:
        choose(nn.ModuleList(new.values()), choice)
    if freeze:
        model.requires_grad_(False)
    for path, layer in new.items():
        layer.train(model.training)
        _put(model, path, layer)
    return paths


def choose(model: nn.Module, task_ids: int | list[int] | Tensor) -> None:
    """Give each row its task, at all sites, until the next call.

    task_ids: an id for each row, -1 for the base alone; an int, or a list of one, serves all rows.
    """
    tasks, ids = _tasks(model), torch.as_tensor(task_ids).reshape(-1)
    if ids.is_floating_point() or not len(ids):
        raise ValueError(f"task_ids = {task_ids}: expected whole numbers, one for each row")
    if ids.min() < -1 or ids.max() >= tasks:
        raise ValueError(f"task_ids = {task_ids}: expected 0..{tasks - 1}, or -1 for none")
    for m in sites(model).values():
        m.chosen = ids.to(m.A.device, torch.long, copy=True)


@torch.no_grad()
def insert(model: nn.Module, task: int, saved: dict[str, Tensor]) -> None:
    """Put what one LoRA learned, the state of lora.py, into slot `task`; all or nothing."""
    _check(sites(model), extract(model, task), saved)
    for path, m in sites(model).items():
        for name in ("A", "B", "s"):
            getattr(m, name)[task] = saved[f"{path}.{name}"].to(m.A.device)


def extract(model: nn.Module, task: int) -> dict[str, Tensor]:
    """Inverse of `insert`: slot `task` as a state that lora.py loads and merges."""
    if not 0 <= task < _tasks(model):
        raise ValueError(f"task = {task}: expected 0..{_tasks(model) - 1}")
    return {name: stack[task].clone() for name, stack in state(model).items()}


def sites(model: nn.Module) -> dict[str, LoRABatch]:
    """{path: layer}, found by type and never by a substring of a name."""
    return {p: m for p, m in model.named_modules() if isinstance(m, LoRABatch)}


def state(model: nn.Module) -> dict[str, Tensor]:
    """What was learned and nothing else: a copy of A, B and s of every site, all tasks."""
    saved = {}
    for path, m in sites(model).items():
        saved[f"{path}.A"] = m.A.detach().clone()
        saved[f"{path}.B"] = m.B.detach().clone()
        saved[f"{path}.s"] = m.s.double().cpu().clone()  # A, B mean nothing without it
    return saved


@torch.no_grad()
def load(model: nn.Module, saved: dict[str, Tensor]) -> None:
    """Inverse of `state`, on a model with the same sites attached; all or nothing.

    KeyError: missing or other names. ValueError: a wrong shape (another r or K), a selection on it.
    """
    _check(sites(model), state(model), saved)
    for path, m in sites(model).items():
        m.A.copy_(saved[f"{path}.A"])
        m.B.copy_(saved[f"{path}.B"])
        m.s.copy_(saved[f"{path}.s"])


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


def _tasks(model: nn.Module) -> int:  # K, of the shortest stack if they differ
    if not (found := sites(model)):
        raise ValueError("the model has no stack of adapters: attach one first")
    return min(len(m.s) for m in found.values())


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


if __name__ == "__main__":  # python lora_batch.py: the claims above, checked on a toy
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x = torch.randn(4, 7, 6).double()
    before = model(x)
    attach(model, "0", "2", tasks=2, r=2)
    choose(model, [0, 1, -1, 0])
    assert torch.equal(model(x), before), "step 0 must be the base model"
    opt = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(3):
        opt.zero_grad()
        model(x).square().sum().backward()
        opt.step()
    mixed = model(x)
    for row, task in enumerate([0, 1, -1, 0]):
        choose(model, task)
        alone = model(x)[row]
        assert torch.allclose(mixed[row], alone, rtol=1e-12), "a row must not see its neighbours"
    insert(model, 0, extract(model, 1))
    choose(model, 0)
    assert torch.allclose(model(x)[1], mixed[1], rtol=1e-12), "a slot holds what was put into it"
    detach(model)
    assert torch.equal(model(x), before), "the base was never touched"
    print("lora_batch: ok")
