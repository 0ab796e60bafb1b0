"""FISH Mask against a random mask of the same size: MiniLM, `sentiment`, 60 steps, 3 seeds. For chapter 21.

Run: python data/fish_against_random.py      (about 3 minutes on one core; resumable)

As many numbers train as MiniLM has biases. Each arm has the better of two rates on validation, with seed 0. The
comparison of the whole family, with longer runs, is that of chapter 24. Nothing is chosen on test.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import torch

from minipeft.lab import loop, models, results, tasks
from minipeft.selective import fish_mask, pafi

SEEDS, STEPS, RATES, BUDGET, SAMPLES = (0, 1, 2), 60, (1e-3, 4e-3), 26_112, 32


def attach(arm, model, tokenizer, task, seed):
    if arm == "random":
        return pafi.attach(model, budget=BUDGET, keep="random", exclude=("classifier",), seed=seed)
    stream = loop.batches(task.train, tokenizer, seed=100 + seed)
    sample = [next(stream) for _ in range(SAMPLES // 16)]
    return fish_mask.attach(model, budget=BUDGET, batches=sample, exclude=("classifier",), seed=seed)


def run(arm, lr, seed):
    task = tasks.load("sentiment")
    model, tokenizer = models.load("minilm", 2, seed=seed)
    attach(arm, model, tokenizer, task, seed)
    models.unfreeze_head(model)
    losses = loop.train(model, tokenizer, task, steps=STEPS, lr=lr, seed=seed).losses
    return {"test": loop.accuracy(model, tokenizer, task.test),
            "validation": loop.accuracy(model, tokenizer, task.validation),
            "loss": sum(losses[-10:]) / 10}


if __name__ == "__main__":
    torch.set_num_threads(1)
    arms = ("fish", "random")
    first = results.sweep("fish_against_random", [dict(arm=a, lr=lr, seed=0) for a in arms for lr in RATES], run)
    best = {a: max((r for r in first if r["arm"] == a), key=lambda r: r["validation"])["lr"] for a in arms}
    rest = [dict(arm=a, lr=best[a], seed=s) for a in arms for s in SEEDS[1:]]
    rows = first + results.sweep("fish_against_random", rest, run)
    results.write("fish_against_random", rows, seeds=SEEDS, steps=STEPS, batch=16, rates=RATES, chosen=best,
                  budget=BUDGET, samples=SAMPLES)
    for row in rows:
        print(row)
