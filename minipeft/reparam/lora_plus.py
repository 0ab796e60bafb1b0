"""LoRA+: the same LoRA, with a faster learning rate for the factor that starts at zero.

Paper      Hayou, Ghosh, Yu, "LoRA+: Efficient Low Rank Adaptation of Large Models",
           ICML 2024, arXiv:2402.12354.

Idea       A and B do not need the same step. B starts at zero and must grow to order
           one; A starts there. One rate for both is too slow for B or too fast for A,
           the more so the wider the layer.

Math       A (r, d_in) takes the rate lr, B (d_out, r) takes ratio * lr. To first order

               change of B A x  =  dB (A x) + B (dA x)

           Under Adam every number of dA and dB has the size of its rate. A x sums
           d_in terms, B (dA x) too: for a width n the rates that keep both parts of
           order one, and both learning, are lr_A ~ 1 / n and lr_B ~ 1.

Steps      1. Attach LoRA, or any method with factors A and B.
           2. opt = AdamW(groups(model, lr=2e-4, ratio=16), weight_decay=0.01)
           3. Train as ever. A scheduler multiplies the rates of all groups alike, so
              their ratio stays.

Cost       Nothing: the same parameters, memory and time as with one rate.

Differs    The authors' code puts every vector (biases, norms, DoRA's m) into the fast
           group and takes weight decay from a setting of its own, 0 unless given.
           Here only B is fast, and weight decay is whatever the optimiser or the
           given groups say. No verbs: nothing is attached, merged or saved.

Pitfalls   - A good lr for LoRA is often too high here: the authors halve it.
           - The zero factor is the fast one. Where A starts at zero and B does not
             (LoRA on embeddings), pass fast=("A",).
           - At the first step A's gradient is zero, so only B moves, ratio times as
             far: a rate that diverges does so at once.
           - Ratio 16 is what most libraries document; the authors' scripts use 10
             for GPT-2 and 80 for RoBERTa. Tune it before comparing.
"""

from collections.abc import Iterable

import torch
from torch import nn


def groups(
    model: nn.Module,
    lr: float,
    ratio: float = 16.0,
    given: Iterable[dict] | None = None,
    fast: tuple[str, ...] = ("B", "lora_B"),
) -> list[dict]:
    """Parameter groups for any torch optimiser: what trains, split in slow and fast.

    `fast` holds own names, one dotted part of a parameter's name, never substrings.
    `given` are groups with settings of their own (weight decay, a rate); each is split
    in two and keeps them. ValueError: no fast parameter trains, or `given` leaves out,
    repeats or adds a parameter.
    """
    if lr <= 0 or ratio < 1:
        raise ValueError(f"lr = {lr}, ratio = {ratio}: expected lr > 0 and ratio >= 1")
    trains = {p: name for name, p in model.named_parameters() if p.requires_grad}
    quick = {p for p, name in trains.items() if not set(fast).isdisjoint(name.split("."))}
    if not quick:
        raise ValueError(f"no parameter that trains is named {' or '.join(fast)}")
    given = [{"params": list(trains)}] if given is None else [dict(g) for g in given]
    for g in given:
        g["params"] = [g["params"]] if isinstance(g["params"], torch.Tensor) else list(g["params"])
    listed = [p for g in given for p in g["params"]]
    if len(listed) != len(set(listed)) or set(listed) != set(trains):
        odd = sorted(trains.get(p, "a frozen one") for p in set(listed) ^ set(trains))
        raise ValueError(f"groups must hold what trains, each once; odd: {odd or 'a repetition'}")
    out = []
    for g in given:
        for is_fast in (False, True):
            params = [p for p in g["params"] if (p in quick) == is_fast]
            rate = g.get("lr", lr) * (ratio if is_fast else 1)
            out += [{**g, "params": params, "lr": rate}] if params else []
    return out


if __name__ == "__main__":  # python lora_plus.py: the claims above, checked on a toy

    class Toy(nn.Module):
        def __init__(self):
            super().__init__()
            self.A = nn.Parameter(torch.randn(2, 6))
            self.B = nn.Parameter(torch.zeros(5, 2))

        def forward(self, x):
            return x @ self.A.T @ self.B.T

    moved = {}
    for ratio in (1.0, 8.0):
        torch.manual_seed(0)
        toy, x = Toy(), torch.randn(4, 6)
        A, B = toy.A.detach().clone(), toy.B.detach().clone()
        opt = torch.optim.AdamW(groups(toy, lr=0.01, ratio=ratio), weight_decay=0.0)
        assert [g["weight_decay"] for g in opt.param_groups] == [0.0, 0.0]
        (toy(x) - 1).square().sum().backward()
        opt.step()
        assert torch.equal(toy.A, A), "A's first gradient is zero"
        moved[ratio] = (toy.B - B).norm()
    assert torch.isclose(moved[8.0], 8 * moved[1.0]), "B goes ratio times as far"
    print("lora_plus: ok")
