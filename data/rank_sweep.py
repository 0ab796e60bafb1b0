"""Rank and learning rate of LoRA on `sentiment`, 3 seeds, for chapter 30.

Run: python data/rank_sweep.py      (about 12 minutes on one core; resumable)

The runs of rank 8 and of the standard rates are those of data/tasks_table.py.
"""

import torch

from minipeft.lab import loop, models, results, tasks
from minipeft.reparam import lora

SEEDS, STEPS = (0, 1, 2), 120


def run(part, arm, r, rslora, lr, seed):
    task = tasks.load("sentiment")
    model, tokenizer = models.load("minilm", 2, seed=seed)
    torch.manual_seed(seed)
    if arm == "lora":
        lora.attach(model, "query", "value", r=r, alpha=16.0, rslora=rslora)
        models.unfreeze_head(model)
    loop.train(model, tokenizer, task, steps=STEPS, lr=lr, seed=seed)
    return {"test": loop.accuracy(model, tokenizer, task.test),
            "validation": loop.accuracy(model, tokenizer, task.validation)}


if __name__ == "__main__":
    rank = [dict(part="rank", arm="lora", r=r, rslora=rs, lr=5e-3)
            for r, rs in ((1, False), (32, False), (32, True))]
    rate = [dict(part="rate", arm="lora", r=8, rslora=False, lr=lr) for lr in (5e-4, 5e-2)]
    rate += [dict(part="rate", arm="full", r=0, rslora=False, lr=lr) for lr in (2e-5, 2e-3)]
    jobs = [{**job, "seed": seed} for seed in SEEDS for job in rank + rate]
    rows = results.sweep("rank_sweep", jobs, run)
    results.write("rank_sweep", rows, seeds=SEEDS, steps=STEPS, batch=16, alpha=16.0)
