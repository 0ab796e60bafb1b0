"""Does PaFI's choice matter? The smallest numbers against the largest and random ones, for chapter 22.

Run: python data/pafi_controls.py      (about 8 minutes on one core; resumable)

MiniLM on `sentiment`: the same number of entries of the upper three layers and the pooler in every
arm (the backward pass ends there, at half the cost), the new head beside them. Each arm's rate
is that of the best validation loss on a walk with another seed.
"""

import torch

from minipeft.lab import loop, models, results, tasks
from minipeft.selective import pafi

SEEDS, SEARCH, STEPS, BUDGET = (0, 1, 2, 3, 4), 10, 60, 10_800
PLACES = ("layer.3", "layer.4", "layer.5", "pooler")
ARMS = {"smallest": dict(keep="smallest"), "smallest, no zeros": dict(keep="smallest", zeros=False),
        "largest": dict(keep="largest"), "random": dict(keep="random")}


def run(arm, lr, seed):
    task = tasks.load("sentiment")
    model, tokenizer = models.load("minilm", 2, seed=seed)
    torch.manual_seed(seed)
    pafi.attach(model, *PLACES, budget=BUDGET, seed=seed, **ARMS[arm])
    models.unfreeze_head(model)
    ledger = loop.train(model, tokenizer, task, steps=STEPS, lr=lr, seed=seed)
    out = {"validation": loop.evaluate(model, tokenizer, task.validation), "trained": ledger.trained}
    return out if seed == SEARCH else {**out, "test": loop.accuracy(model, tokenizer, task.test)}


if __name__ == "__main__":
    tried, rows = [], []
    for arm in ARMS:
        found = results.walk("pafi_controls", dict(arm=arm, seed=SEARCH), run, 3e-2, lambda row: row["validation"]["loss"])
        tried += found
        rows += results.sweep("pafi_controls", [dict(arm=arm, lr=found[0]["lr"], seed=s) for s in SEEDS], run)
    results.write("pafi_controls", rows, seeds=SEEDS, steps=STEPS, batch=16, budget=BUDGET, places=PLACES,
                  rates={r["arm"]: r["lr"] for r in rows}, search=tried)
