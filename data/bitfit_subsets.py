"""Which biases suffice? All, or the queries' and the first FFN layers': MiniLM, `sentiment`, 3 seeds.

Run: python data/bitfit_subsets.py      (about 7 minutes on one core; resumable)

Each arm trains the new head too and has the rate of the best validation loss on a walk with another seed. The
head alone and full fine-tuning are those of data/tasks_table.py, under the same steps. Nothing is chosen on test.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import torch

from minipeft.lab import loop, models, results, tasks
from minipeft.selective import bitfit

SEEDS, SEARCH, STEPS = (0, 1, 2), 10, 120
ARMS = {"all": (), "query + first FFN": ("query", "intermediate.dense")}


def run(arm, lr, seed):
    task = tasks.load("sentiment")
    model, tokenizer = models.load("minilm", 2, seed=seed)
    bitfit.attach(model, *ARMS[arm], exclude=("classifier",))
    models.unfreeze_head(model)
    ledger = loop.train(model, tokenizer, task, steps=STEPS, lr=lr, seed=seed)
    out = {"validation": loop.evaluate(model, tokenizer, task.validation), "trained": ledger.trained - 770}
    return out if seed == SEARCH else {**out, "test": loop.accuracy(model, tokenizer, task.test)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    tried, rows = [], []
    for arm in ARMS:
        found = results.walk("bitfit_subsets", dict(arm=arm, seed=SEARCH), run, 3e-3, lambda row: row["validation"]["loss"])
        tried += found
        rows += results.sweep("bitfit_subsets", [dict(arm=arm, lr=found[0]["lr"], seed=s) for s in SEEDS], run)
    results.write("bitfit_subsets", rows, seeds=SEEDS, steps=STEPS, batch=16,
                  chosen={r["arm"]: r["lr"] for r in rows}, search=tried)
    for row in rows:
        print(row)
