"""Adapters of several widths on `sentiment`, LayerNorms alone beside them, 3 seeds, for chapter 10.

Run: python data/adapter_width.py      (about 6 minutes on one core; resumable)
"""

import torch

from minipeft.additive import adapter
from minipeft.lab import loop, models, results, tasks

SEEDS, STEPS, LR = (0, 1, 2), 120, 1e-3


def run(arm, seed):
    """arm: a width m; "norms", adapters attached and kept at nothing."""
    task = tasks.load("sentiment")
    model, tokenizer = models.load("minilm", 2, seed=seed)
    torch.manual_seed(seed)
    if arm == "norms":
        adapter.attach(model, bottleneck=1)
        for m in adapter.sites(model).values():
            if isinstance(m, adapter.Adapter):
                torch.nn.init.zeros_(m.W_up)
                m.requires_grad_(False)
    else:
        adapter.attach(model, bottleneck=arm)
    models.unfreeze_head(model)
    ledger = loop.train(model, tokenizer, task, steps=STEPS, lr=LR, seed=seed)
    return {"trained": ledger.trained,
            "test": loop.accuracy(model, tokenizer, task.test),
            "validation": loop.accuracy(model, tokenizer, task.validation)}


if __name__ == "__main__":
    jobs = [{"arm": arm, "seed": seed} for seed in SEEDS for arm in (32, "norms", 4)]
    rows = results.sweep("adapter_width", jobs, run)
    results.write("adapter_width", rows, seeds=SEEDS, steps=STEPS, batch=16, lr=LR)
