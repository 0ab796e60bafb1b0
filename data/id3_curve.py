"""Along one run of ID3 the mask grows. Is the model better because it has more, or because it is later?

Run: python data/id3_curve.py      (about 6 minutes on one core; resumable)

scribe on `letters`, every number of the model to choose from, loss and right answers on validation
every 20 steps. "increment" is ID3; with "own clocks" Adam counts the steps of each entry from its
opening. "static" opens the same number of entries in the first step, by the same score. "static,
half the steps" makes as many updates of single numbers as ID3. Each arm's rate is that of the best
validation loss at the end, on a walk with another seed.
"""

import torch
from low_data import score

from minipeft.lab import loop, models, results, tasks
from minipeft.selective import id3

TASK, SEEDS, SEARCH, STEPS, BUDGET, EVERY = "letters", (0, 1, 2, 3, 4), 10, 80, 2_000, 20
ARMS = {"increment": ("increment", STEPS, "global"), "increment, own clocks": ("increment", STEPS, "per_entry"),
        "static": ("static", STEPS, "global"), "static, half the steps": ("static", STEPS // 2, "global")}


class Watch:
    """id3, noting validation every so many steps."""

    def __init__(self, tokenizer, rows):
        self.tokenizer, self.rows, self.curve = tokenizer, rows, []

    def advance(self, model, step):
        id3.advance(model, step)
        if (step + 1) % EVERY == 0:
            at = sum(m.idx.numel() for m in id3.sites(model).values())
            self.curve.append({"step": step + 1, "open": at, **score(model, self.tokenizer, self.rows)})
            model.train()


def run(arm, lr, seed):
    task, (model, tokenizer) = tasks.load(TASK), models.load("scribe", device="cpu")
    schedule, steps, clock = ARMS[arm]
    torch.manual_seed(seed)
    id3.attach(model, budget=BUDGET, steps=steps, schedule=schedule, clock=clock)
    watch = Watch(tokenizer, task.validation)
    loop.train(model, tokenizer, task, steps=steps, lr=lr, method=watch, seed=seed)
    return {"curve": watch.curve} | ({} if seed == SEARCH else {"test": score(model, tokenizer, task.test)})


if __name__ == "__main__":
    torch.set_num_threads(1)
    tried, rows = [], []
    for arm in ARMS:
        job = dict(arm=arm, seed=SEARCH)
        found = results.walk("id3_curve", job, run, 1e-1, lambda row: row["curve"][-1]["loss"])
        tried += found
        rows += results.sweep("id3_curve", [dict(arm=arm, lr=found[0]["lr"], seed=s) for s in SEEDS], run)
    results.write("id3_curve", rows, task=TASK, seeds=SEEDS, steps=STEPS, batch=16, budget=BUDGET,
                  rates={r["arm"]: r["lr"] for r in rows}, search=tried)
