"""Which biases suffice? All, the queries' and the first FFN layers', the keys', none: MiniLM, `sentiment`, 3 seeds.

Run: python data/bitfit_subsets.py      (about 5 minutes on one core; resumable)

The rates of "all" and "query + first FFN" are the better of two on validation, with seed 0. Every arm trains
the new head; "key" has the rate of the head alone. Nothing is chosen on test.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import torch

from minipeft.lab import loop, models, results, tasks
from minipeft.selective import bitfit

SEEDS, STEPS, RATES, HEAD_RATE = (0, 1, 2), 120, (3e-3, 6e-3), 1e-2
ARMS = {"all": (), "query + first FFN": ("query", "intermediate.dense"), "key": ("key",), "head alone": None}


def run(arm, lr, seed):
    task = tasks.load("sentiment")
    model, tokenizer = models.load("minilm", 2, seed=seed)
    model.requires_grad_(False)
    if ARMS[arm] is not None:
        bitfit.attach(model, *ARMS[arm], exclude=("classifier",))
    models.unfreeze_head(model)
    ledger = loop.train(model, tokenizer, task, steps=STEPS, lr=lr, seed=seed)
    return {"test": loop.accuracy(model, tokenizer, task.test),
            "validation": loop.accuracy(model, tokenizer, task.validation),
            "trained": ledger.trained - 770}


if __name__ == "__main__":
    torch.set_num_threads(1)
    tuned = ("all", "query + first FFN")
    first = results.sweep("bitfit_subsets", [dict(arm=a, lr=lr, seed=0) for a in tuned for lr in RATES], run)
    best = {a: max((r for r in first if r["arm"] == a), key=lambda r: r["validation"])["lr"] for a in tuned}
    rest = [dict(arm=a, lr=best.get(a, HEAD_RATE), seed=s) for a in ARMS for s in SEEDS if (a, s) not in
            {(a, 0) for a in tuned}]
    rows = first + results.sweep("bitfit_subsets", rest, run)
    results.write("bitfit_subsets", rows, seeds=SEEDS, steps=STEPS, batch=16, rates=RATES, chosen=best)
    for row in rows:
        print(row)
