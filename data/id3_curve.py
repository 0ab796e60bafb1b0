"""Along one run of ID3 the mask grows. Is the model better because it has more, or because it is later?

Run: python data/id3_curve.py      (about 3 minutes on one core; resumable)

MiniLM on `sentiment`, the upper three layers and the pooler, the new head beside them, validation
accuracy every 15 steps. "increment" is ID3. "static" opens the same number of entries in the first
step, by the same score. "static, half the steps" makes as many updates of single numbers as ID3.
One rate serves all arms; it was set after one seed at PaFI's 1e-2 had stayed near chance.
"""

import torch

from minipeft.lab import loop, models, results, tasks
from minipeft.selective import id3

SEEDS, STEPS, BUDGET, EVERY, RATE = (0, 1, 2), 60, 10_800, 15, 2e-3
PLACES = ("layer.3", "layer.4", "layer.5", "pooler")
ARMS = {"increment": ("increment", STEPS), "static": ("static", STEPS),
        "static, half the steps": ("static", STEPS // 2)}


def run(arm, lr, seed):
    task = tasks.load("sentiment")
    model, tokenizer = models.load("minilm", 2, seed=seed)
    schedule, steps = ARMS[arm]
    torch.manual_seed(seed)
    id3.attach(model, *PLACES, budget=BUDGET, steps=steps, schedule=schedule)
    models.unfreeze_head(model)
    ledger = loop.train(model, tokenizer, task, steps=steps, lr=lr, method=id3, seed=seed, every=EVERY)
    opened = [BUDGET * t // steps if schedule == "increment" else BUDGET for t, _ in ledger.curve]
    assert sum(m.idx.numel() for m in id3.sites(model).values()) == BUDGET
    return {"test": loop.accuracy(model, tokenizer, task.test), "curve": ledger.curve, "open": opened}


if __name__ == "__main__":
    jobs = [dict(arm=a, lr=RATE, seed=s) for s in SEEDS for a in ARMS]
    rows = results.sweep("id3_curve", jobs, run)
    results.write("id3_curve", rows, seeds=SEEDS, steps=STEPS, batch=16, budget=BUDGET, places=PLACES,
                  lr=RATE)
