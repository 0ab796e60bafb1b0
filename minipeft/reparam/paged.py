"""Paged optimiser state: out of the GPU's memory except while the optimiser steps.

Paper      Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs",
           NeurIPS 2023, arXiv:2305.14314. Section 3, Paged Optimizers.

Idea       The state of an optimiser (Adam: two numbers per trained weight) is
           used for a moment after backward and lies idle while the activations
           need the room. So it waits in the host's memory.

Math       None: every number stays the same.

Steps      1. Before each step: copy the state to the device of its parameter.
           2. The optimiser steps.
           3. Copy the state back to pinned host memory and free the device's.

Cost       Device     the state's bytes, during the step only.
           Host       the same bytes, pinned (page-locked, so that copies are fast).
           Time       the state crosses the bus twice in each step.

Differs    The authors use CUDA's managed memory: the driver moves pages when the
           device runs out, and nothing moves when it does not. Here everything
           moves in every step: plain torch, for any torch optimiser.

Pitfalls   - It helps when trained weights are many: LoRA's state is small.
           - Without CUDA there is nothing to page, and `attach` says so.
           - The peak during the step is as before; only its activations are gone.
"""

import warnings

import torch
from torch.optim import Optimizer


def attach(optimizer: Optimizer, pretend: bool = False) -> list:
    """Page the state of `optimizer` from its next step on; return the handles of the two hooks.

    Where no parameter is on CUDA it warns and returns []: the state stays where it is.
    pretend=True copies even then, from CPU to CPU, so that the mechanism can be tried.
    """
    params = [p for group in optimizer.param_groups for p in group["params"]]
    if not pretend and not any(p.is_cuda for p in params):
        warnings.warn("no parameter is on CUDA: the optimiser's state stays beside it, not paged")
        return []
    pages = {}  # (parameter, name) -> host tensor, pinned once and used again

    def moved(opt):
        """What there is to move: whole tensors, not the step's counter."""
        for p, state in opt.state.items():
            for name, t in state.items():
                if torch.is_tensor(t) and t.dim() and (pretend or p.is_cuda):
                    yield p, state, name, t

    def fetch(opt, args, kwargs):
        for p, state, name, t in moved(opt):
            state[name] = t.to(p.device, non_blocking=True, copy=True)

    def evict(opt, args, kwargs):
        for p, state, name, t in moved(opt):
            if (p, name) not in pages or pages[p, name].shape != t.shape:
                pages[p, name] = torch.empty(t.shape, dtype=t.dtype, pin_memory=p.is_cuda)
            state[name] = pages[p, name].copy_(t)  # waits for the copy: the device's may be freed

    evict(optimizer, (), {})
    return [optimizer.register_step_pre_hook(fetch), optimizer.register_step_post_hook(evict)]


def held(optimizer: Optimizer) -> dict[str, int]:
    """Bytes of state on each device, the pinned ones apart."""
    size = {}
    for state in optimizer.state.values():
        for t in filter(torch.is_tensor, state.values()):
            where = "pinned" if t.device.type == "cpu" and t.is_pinned() else t.device.type
            size[where] = size.get(where, 0) + t.nbytes
    return size


def detach(optimizer: Optimizer, hooks: list) -> None:
    """Stop paging: the state goes back beside its parameters."""
    for hook in hooks:
        hook.remove()
    for p, state in optimizer.state.items():
        for name, t in state.items():
            if torch.is_tensor(t) and t.dim():
                state[name] = t.to(p.device, copy=True)


if __name__ == "__main__":  # python paged.py: the claims above, checked on a toy
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    start, runs = torch.randn(1000, device=device), []
    for paging in (False, True):
        p = torch.nn.Parameter(start.clone())
        opt = torch.optim.AdamW([p], lr=0.1)
        hooks = attach(opt, pretend=True) if paging else []
        for _ in range(3):
            p.grad = p.detach().sin()
            opt.step()
        if paging and device == "cuda":
            assert held(opt).keys() <= {"pinned", "cpu"} and held(opt)["pinned"] == 8000
        detach(opt, hooks)
        runs.append(p.detach())
    assert torch.equal(*runs), "paging changes where numbers are, not what they are"
    print("paged: ok")
