"""Which biases suffice? All, or the queries' and the first FFN layers': MiniLM, `sentiment`, 3 seeds.

Run: python data/bitfit_subsets.py      (about 4 minutes on one core; resumable)

Each arm trains the new head too and has the better of two rates on validation, with seed 0. The head alone and
full fine-tuning are those of data/tasks_table.py, under the same steps. Nothing is chosen on test.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import torch

from minipeft.lab import loop, models, results, tasks
from minipeft.selective import bitfit

SEEDS, STEPS, RATES = (0, 1, 2), 120, (3e-3, 6e-3)
ARMS = {"all": (), "query + first FFN": ("query", "intermediate.dense")}


def run(arm, lr, seed):
    task = tasks.load("sentiment")
    model, tokenizer = models.load("minilm", 2, seed=seed)
    bitfit.attach(model, *ARMS[arm], exclude=("classifier",))
    models.unfreeze_head(model)
    ledger = loop.train(model, tokenizer, task, steps=STEPS, lr=lr, seed=seed)
    return {"test": loop.accuracy(model, tokenizer, task.test),
            "validation": loop.accuracy(model, tokenizer, task.validation),
            "trained": ledger.trained - 770}


if __name__ == "__main__":
    torch.set_num_threads(1)
    first = results.sweep("bitfit_subsets", [dict(arm=a, lr=lr, seed=0) for a in ARMS for lr in RATES], run)
    best = {a: max((r for r in first if r["arm"] == a), key=lambda r: r["validation"])["lr"] for a in ARMS}
    rest = [dict(arm=a, lr=best[a], seed=s) for a in ARMS for s in SEEDS[1:]]
    rows = first + results.sweep("bitfit_subsets", rest, run)
    results.write("bitfit_subsets", rows, seeds=SEEDS, steps=STEPS, batch=16, rates=RATES, chosen=best)
    for row in rows:
        print(row)
