"""Does PaFI's choice matter? The smallest numbers against the largest and random ones, for chapter 22.

Run: python data/pafi_controls.py      (about 4 minutes on one core; resumable)

MiniLM on `sentiment`: the same number of entries of the upper three layers and the pooler in every
arm (the backward pass ends there, at half the cost), the new head beside them. Each arm's rate is
the better of two on the validation rows with another seed; "smallest, no zeros" takes the rate of
"smallest".
"""

import torch

from minipeft.lab import loop, models, results, tasks
from minipeft.selective import pafi

SEEDS, SEARCH, STEPS, BUDGET, RATES = (0, 1, 2), 10, 60, 10_800, (1e-2, 3e-2)
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
    out = {"validation": loop.accuracy(model, tokenizer, task.validation), "trained": ledger.trained}
    return out if seed == SEARCH else {**out, "test": loop.accuracy(model, tokenizer, task.test)}


if __name__ == "__main__":
    tuned = [a for a in ARMS if a != "smallest, no zeros"]
    search = [dict(arm=a, lr=lr, seed=SEARCH) for a in tuned for lr in RATES]
    tried = results.sweep("pafi_controls", search, run)
    best = {a: max((r for r in tried if r["arm"] == a), key=lambda r: r["validation"])["lr"] for a in tuned}
    best["smallest, no zeros"] = best["smallest"]
    jobs = [dict(arm=a, lr=best[a], seed=s) for s in SEEDS for a in ARMS]
    rows = results.sweep("pafi_controls", jobs, run)
    results.write("pafi_controls", rows, seeds=SEEDS, steps=STEPS, batch=16, budget=BUDGET, places=PLACES,
                  rates=best, search=tried)
