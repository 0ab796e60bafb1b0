"""ID3: open the numbers to train step by step, where gradient is large and weight small.

Paper      Agarwal, Ramesh, Sengupta, Chakraborty, "Step-by-Step Unmasking for
           Parameter-Efficient Fine-Tuning of Large Language Models",
           TACL 13 (2025), arXiv:2408.14470.

Idea       A mask chosen before training cannot know what training will need.
           ID3 opens a few more numbers at every step, those that matter then,
           and never closes one.

Math       theta (N,) the eligible numbers of all tensors, g (N,) a step's
           gradient, budget B, T steps

               H_i = |g_i| / (|theta_i| + eps)^exp        |g_i|^2 with square
               step t opens the best B(t+1)/T - B t/T (floors) not yet open

           exp = 0 ranks by gradient, exp -> infinity by smallness, exp = -1
           and eps = 0 by |g theta|. Scores are compared as logarithms.
           square with exp = 2p ranks as |g| with exp = p does.
           Updates of single numbers: B (T + 1) / 2 where T divides B, and B T
           when all are open from the start.

Steps      1. Freeze; allot one vector of B slots, all of them empty.
           2. In the backward, when a tensor's gradient is complete: copy out
              the numbers its open entries need, score the closed ones, merge
              its best with the best so far. The last tensor completes the
              choice: it is exact, and one dense gradient lives at a time.
           3. The optimiser steps the vector, this step's new entries with it:
              select, mask, step, in the authors' order.
           4. advance(model, step), after each step, makes the choice final.

Cost       Trained    B numbers at the end, B / T at the start.
           Memory     values, gradient, optimiser state, checkpoint O(B).
                      Activations as in full fine-tuning of the tensors touched.
           Time       a score of every eligible number in each step: slower
                      than a fixed mask. Half the updates is not half the work.
           Inference  none.

Differs    The authors' code ends above B when T does not divide it, fails when
           B < T and once everything is open, and keeps dense state. Here a
           shortfall is made up later and ties go to the earlier place.
           Their paper compares with choosing anew at each step; that touches
           more than B numbers and has no O(B) form: not here.
           clock="per_entry" is not theirs, see below. exclude= a new head, and
           charge it to B yourself.

Pitfalls   - Adam corrects its averages by the optimiser's count: an entry that
             opens late starts with steps of up to several lr. "per_entry"
             rescales each update to the entry's own count (Adam's default
             betas, no weight decay; exact up to Adam's eps).
           - Over fresh LoRA, A has no gradient: all first choices are in B.
           - Several backwards before a step: the first one chooses.
           - One process: refused under torch.distributed, where the choice
             would need every worker's dense gradient. All tensors on one device.
           - Re-entrant checkpointing scores a tied tensor by its first part.
           - Without advance nothing that opened is ever read by a forward.
           - torch.compile leaves each tensor that entries open in to plain Python.
"""

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


class Pool(nn.Module):
    """B slots for entries of all tensors; the first `live` are open, the next `fresh` open now."""

    def __init__(self, tensors, budget, steps, eps, exp, square, schedule, clock):
        super().__init__()
        wide = any(W.dtype == torch.float64 for W in tensors)
        # Half-precision weights get float32 values: a small step must not round away.
        zeros = torch.zeros(budget, dtype=torch.float64 if wide else torch.float32, device=tensors[0].device)
        self.values = nn.Parameter(zeros.clone())  # (B,)
        self.register_buffer("before", zeros.clone())  # (B,)
        for name in ("owner", "place", "born"):  # which tensor, where in it, at which step
            self.register_buffer(name, zeros.long() if name == "place" else zeros.int())  # (B,)
        self.B, self.T, self.eps, self.exp, self.square = budget, steps, eps, exp, square
        self.static, self.per_entry = schedule == "static", clock == "per_entry"
        self.t = self.live = self.fresh = 0
        self.score = self.last = zeros[:0]
        self.__dict__["sites"] = []  # not as submodules: they stand on their tensors

    def _apply(self, fn, recurse=True):
        self.score, self.last = fn(self.score), fn(self.last)
        return super()._apply(fn, recurse)

    @torch.no_grad()
    def see(self, site, W: Tensor, g: Tensor) -> None:
        """A tensor's whole gradient: what the open entries need of it, and its best candidates."""
        W, g = W.reshape(-1), g.reshape(-1)
        if self.values.grad is None:
            self.values.grad = torch.zeros_like(self.values)
        grad, end = self.values.grad, self.live + self.fresh
        grad[site.slots] += g[site.idx].to(grad)
        if site.seen:  # a later backward of the same step
            new = self.live + (self.owner[self.live : end] == site.number).nonzero().view(-1)
            grad[new] += g[self.place[new]].to(grad)
            return
        site.seen = True
        due = (self.B if self.static else self.B * min(self.t + 1, self.T) // self.T) - self.live
        if due < 1:
            return
        low = torch.finfo(self.values.dtype).min
        H = g.abs().to(grad).log() * (2 if self.square else 1)
        H = H - self.exp * (W.abs().to(grad) + self.eps).log()
        H = H.nan_to_num(nan=low, neginf=low)  # no gradient: last of all, but still eligible
        H[site.idx] = -torch.inf  # open already
        i = _first(H, due)
        i = i[H[i] >= low]
        part, place = slice(self.live, end), self.place
        owner = torch.cat([self.owner[part], torch.full_like(i, site.number, dtype=torch.int32)])
        order = owner.argsort(stable=True)
        score = torch.cat([self.score, H[i]])[order]
        keep = _first(score, due)
        order, self.score, self.fresh = order[keep], score[keep], keep.numel()
        new = slice(self.live, self.live + self.fresh)
        both = ((self.owner, owner[: end - self.live], owner[end - self.live :]),
                (place, place[part], i), (self.values, self.values[part], W[i]), (grad, grad[part], g[i]))
        for vector, old, more in both:
            vector[new] = torch.cat([old, more.to(vector)])[order]
        self.before[new] = self.values[new]
        self.born[new] = self.t

    @torch.no_grad()
    def settle(self, step: int) -> None:
        """This step's entries are open from here on."""
        new = slice(self.live, self.live + self.fresh)
        if self.per_entry:
            start = self.before.clone()  # where each entry stood before this update
            start[: self.last.numel()] = self.last
            end, age = new.stop, step + 1 - self.born[: new.stop].double()  # updates so far
            ratio = (1 - 0.9 ** (step + 1)) / (1 - 0.9**age)
            ratio /= ((1 - 0.999 ** (step + 1)) / (1 - 0.999**age)).sqrt()
            moved = (self.values[:end] - start[:end]) * ratio.to(self.values)
            self.values[:end] = start[:end] + moved
        self.live, self.fresh, self.score, self.t = new.stop, 0, self.score[:0], step + 1
        self.deal()

    def deal(self) -> None:
        """Tell each tensor which slots are its own."""
        owner = self.owner[: self.live]
        parts = owner.argsort(stable=True).split(owner.bincount(minlength=len(self.sites)).tolist())
        for site, slots in zip(self.sites, parts, strict=True):
            site.slots, site.idx, site.seen = slots, self.place[slots], False
        if self.per_entry:
            self.last = self.values[: self.live].detach().clone()


class Growing(nn.Module):
    """One tensor that entries open in; its whole gradient is seen once and dropped."""

    def __init__(self, pool: Pool, number: int):
        super().__init__()
        (self._modules if number == 0 else self.__dict__)["pool"] = pool  # one place for the vector
        self.number, self.seen, self.alias = number, False, None
        self.slots = self.idx = pool.place[:0]
        pool.sites.append(self)

    @property
    def values(self) -> Tensor:
        return self.pool.values.detach()[self.slots]

    @property
    def before(self) -> Tensor:
        return self.pool.before[self.slots]

    @torch.compiler.disable(reason="id3 chooses in a hook of the backward: compile without fullgraph=True")
    def forward(self, W: Tensor) -> Tensor:
        W.data.view(-1)[self.idx] = self.values.to(W.dtype)
        if not torch.is_grad_enabled():
            return W.detach()
        group = torch.distributed.is_available() and torch.distributed.is_initialized()
        if group and torch.distributed.get_world_size() > 1:
            raise RuntimeError("id3 sees one process's gradients and cannot choose for several")
        if W.requires_grad:
            raise RuntimeError("a tensor of which some entries train was unfrozen: exclude= it instead")
        old = self.alias
        if old is None or (old.data_ptr(), old.dtype, old.device) != (W.data_ptr(), W.dtype, W.device):
            self.alias = W.detach().requires_grad_()  # the same memory; autograd sums a tensor's uses here
            self.alias.register_post_accumulate_grad_hook(self._see)
        return self.alias

    def _see(self, alias: Tensor) -> None:
        g, alias.grad = alias.grad, None
        self.pool.see(self, alias.detach(), g)

    def __getstate__(self):
        return {**self.__dict__, "alias": None}  # a copy of the model has memory of its own

    def _apply(self, fn, recurse=True):
        self.slots, self.idx, self.alias = fn(self.slots), fn(self.idx), None
        return super()._apply(fn, recurse)


def attach(
    model: nn.Module,
    *targets: str,
    budget: int,
    steps: int,
    eps: float = 0.1,
    exp: float = 1.0,
    square: bool = False,
    schedule: str = "increment",
    clock: str = "global",
    among: str = "all",
    exclude: tuple[str, ...] = (),
    freeze: bool = True,
) -> list[str]:
    """Freeze `model`; let `budget` numbers open over `steps` steps; return the tensors they may be in.

    targets  modules or parameters (none: all). among="trainable": what trains already, as LoRA's
             A and B. schedule="static": all `budget` in the first step, by the same score.
    ValueError: an unknown target, or a budget that cannot be met; the model is then as it was.
    """
    tensors = _eligible(model, targets, exclude, among)
    budget = _count(budget, sum(W.numel() for W in tensors.values()))
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1 or eps < 0:
        raise ValueError(f"steps = {steps}, eps = {eps}: expected steps of at least 1 and eps not below 0")
    if schedule not in ("increment", "static") or clock not in ("global", "per_entry"):
        raise ValueError(f"{schedule!r}, {clock!r}: expected schedule 'increment' or 'static', "
                         "clock 'global' or 'per_entry'")
    if len({W.device for W in tensors.values()}) > 1 or sites(model):
        raise ValueError("expected all tensors on one device, and id3 not attached yet")
    pool = Pool(list(tensors.values()), budget, steps, eps, exp, square, schedule, clock)
    return _open(model, {name: Growing(pool, i) for i, name in enumerate(tensors)}, freeze)


def advance(model: nn.Module, step: int) -> None:
    """Right after optimizer.step(): what opened in this step stays open. Counts from step 0."""
    _pool(model)[1].settle(step)


def sites(model: nn.Module) -> dict[str, Growing]:
    """{name of the tensor: its open entries}, found by type."""
    return {_name(p): m for p, m in model.named_modules() if isinstance(m, Growing)}


def state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the values, where they stand (tensor, position), since when, and how many are open."""
    path, pool = _pool(model)
    saved = {f"{path}.{k}": getattr(pool, k).detach().clone() for k in ("values", "owner", "place", "born")}
    return saved | {f"{path}.progress": torch.tensor([pool.live, pool.t])}


@torch.no_grad()
def load(model: nn.Module, saved: dict[str, Tensor]) -> None:
    """Inverse of `state`, on a model with the same targets and budget attached; all or nothing.

    KeyError: missing or unexpected names. ValueError: a wrong shape, or positions that do not fit.
    """
    _check(sites(model), state(model), saved)
    (path, pool), tensors = _pool(model), dict(model.named_parameters(remove_duplicate=False))
    W = [tensors[f"{p.rpartition('.')[0]}.original"].view(-1)
         for p, m in model.named_modules() if isinstance(m, Growing)]
    live, t = saved[f"{path}.progress"].tolist()
    owner, place = (saved[f"{path}.{k}"][:live].to(pool.place) for k in ("owner", "place"))
    if not 0 <= live <= pool.B or owner.numel() and not 0 <= owner.min() <= owner.max() < len(W):
        raise ValueError("the file names more entries or tensors than this model has")
    for i in owner.unique().tolist():
        _fits(f"tensor {i}", place[owner == i], W[i])
    for m, flat in zip(pool.sites, W, strict=True):
        flat[m.idx] = m.before.to(flat)
    for k in ("values", "owner", "place", "born"):
        getattr(pool, k).copy_(saved[f"{path}.{k}"])
    pool.live, pool.t, pool.fresh, pool.score = live, t, 0, pool.score[:0]
    pool.deal()
    for m, flat in zip(pool.sites, W, strict=True):
        pool.before[m.slots] = flat[m.idx].to(pool.before)


def merge(model: nn.Module) -> dict[str, float]:
    """Leave the values in the plain tensors. Cannot be undone.

    Returns {name: largest rounding error of one entry}, in the tensor's own unit.
    """
    kinds = {n: p.dtype for n, p in model.named_parameters()}
    rounding = {}
    for path, m in model.named_modules():
        if isinstance(m, Growing) and m.idx.numel():
            kind = kinds[f"{path.rpartition('.')[0]}.original"]
            rounding[_name(path)] = (m.values - m.values.to(kind)).abs().max().item()
    _close(model, Growing, lambda m: m.values)
    return rounding


def detach(model: nn.Module) -> None:
    """Put the original numbers back: the base, bit for bit."""
    _close(model, Growing, lambda m: m.before)


def _pool(model: nn.Module) -> tuple[str, Pool]:
    found = [(p, m) for p, m in model.named_modules() if isinstance(m, Pool)]
    if not found:
        raise ValueError("id3 is not attached to this model")
    return found[0]


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


def _first(scores: Tensor, k: int) -> Tensor:
    """Positions of the k largest in ascending order; among equals the earliest."""
    if k >= scores.numel():
        return torch.arange(scores.numel(), device=scores.device)
    edge = scores.topk(k).values[-1]
    above, equal = scores > edge, scores == edge
    return (above | equal & (equal.cumsum(0) <= k - above.sum())).nonzero().view(-1)


if __name__ == "__main__":  # python id3.py: the claims above, checked on a toy
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    base = {k: v.clone() for k, v in model.state_dict().items()}
    x = torch.randn(4, 6).double()
    before, B, T = model(x), 20, 6
    attach(model, budget=B, steps=T)
    assert torch.equal(model(x), before), "step 0 must be the base model"
    trained = [p for p in model.parameters() if p.requires_grad]
    opt, old = torch.optim.AdamW(trained, lr=0.1, weight_decay=0.1), {}
    for t in range(T):
        opt.zero_grad()
        model(x).square().sum().backward()
        opt.step()
        advance(model, t)
        now = {n: set(m.idx.tolist()) for n, m in sites(model).items()}
        assert sum(map(len, now.values())) == B * (t + 1) // T
        assert all(old[n] <= now[n] for n in old), "what is open stays open"
        old = now
    tuned = model(x)
    merge(model)
    assert torch.equal(model(x), tuned) and not sites(model)
    moved = sum((v != base[k]).sum() for k, v in model.state_dict().items())
    assert moved == B
    print("id3: ok")
