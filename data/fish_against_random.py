"""FISH Mask against random masks of the same size: MiniLM, `sentiment`, 60 steps, 5 seeds. For chapter 21.

Run: python data/fish_against_random.py      (about 7 minutes on one core; resumable)

As many numbers train as MiniLM has biases. The Fisher mask puts most of them into the pooler, the layer below the
new head, so a second one leaves the pooler out. Each arm's rate is that of the best validation loss on a walk
with another seed. Chapter 24 compares the whole family in longer runs.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import torch

from minipeft.lab import loop, models, results, tasks
from minipeft.selective import fish_mask, pafi

SEEDS, SEARCH, STEPS, BUDGET, SAMPLES = (0, 1, 2, 3, 4), 10, 60, 26_112, 32


def attach(arm, model, tokenizer, task, seed):
    if arm == "random":
        return pafi.attach(model, budget=BUDGET, keep="random", exclude=("classifier",), seed=seed)
    stream = loop.batches(task.train, tokenizer, seed=100 + seed)
    sample = [next(stream) for _ in range(SAMPLES // 16)]
    out = ("classifier",) if arm == "FISH" else ("classifier", "pooler")
    return fish_mask.attach(model, budget=BUDGET, batches=sample, exclude=out, seed=seed)


def run(arm, lr, seed):
    task = tasks.load("sentiment")
    model, tokenizer = models.load("minilm", 2, seed=seed)
    attach(arm, model, tokenizer, task, seed)
    models.unfreeze_head(model)
    losses = loop.train(model, tokenizer, task, steps=STEPS, lr=lr, seed=seed).losses
    out = {"validation": loop.evaluate(model, tokenizer, task.validation), "loss": sum(losses[-10:]) / 10}
    return out if seed == SEARCH else {**out, "test": loop.accuracy(model, tokenizer, task.test)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    tried, rows = [], []
    for arm in ("FISH", "FISH without pooler", "random"):
        job = dict(arm=arm, seed=SEARCH)
        found = results.walk("fish_against_random", job, run, 1e-2, lambda row: row["validation"]["loss"])
        tried += found
        rows += results.sweep("fish_against_random", [dict(arm=arm, lr=found[0]["lr"], seed=s) for s in SEEDS], run)
    results.write("fish_against_random", rows, seeds=SEEDS, steps=STEPS, batch=16, budget=BUDGET, samples=SAMPLES,
                  rates={r["arm"]: r["lr"] for r in rows}, search=tried)
    for row in rows:
        print(row)
