"""FISH Mask against random masks of the same size: MiniLM, `sentiment`, 60 steps, 3 seeds. For chapter 21.

Run: python data/fish_against_random.py      (about 4 minutes on one core; resumable)

As many numbers train as MiniLM has biases. The Fisher mask puts most of them into the pooler, the layer below the
new head, so a second one leaves the pooler out. One rate, set in advance, for every arm; the comparison of the whole
family, with tuned rates and longer runs, is that of chapter 24.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import torch

from minipeft.lab import loop, models, results, tasks
from minipeft.selective import fish_mask, pafi

SEEDS, STEPS, RATE, BUDGET, SAMPLES = (0, 1, 2), 60, 2e-3, 26_112, 32


def attach(arm, model, tokenizer, task, seed):
    if arm == "random":
        return pafi.attach(model, budget=BUDGET, keep="random", exclude=("classifier",), seed=seed)
    stream = loop.batches(task.train, tokenizer, seed=100 + seed)
    sample = [next(stream) for _ in range(SAMPLES // 16)]
    out = ("classifier",) if arm == "FISH" else ("classifier", "pooler")
    return fish_mask.attach(model, budget=BUDGET, batches=sample, exclude=out, seed=seed)


def run(arm, seed):
    task = tasks.load("sentiment")
    model, tokenizer = models.load("minilm", 2, seed=seed)
    attach(arm, model, tokenizer, task, seed)
    models.unfreeze_head(model)
    losses = loop.train(model, tokenizer, task, steps=STEPS, lr=RATE, seed=seed).losses
    return {"test": loop.accuracy(model, tokenizer, task.test),
            "validation": loop.accuracy(model, tokenizer, task.validation),
            "loss": sum(losses[-10:]) / 10}


if __name__ == "__main__":
    torch.set_num_threads(1)
    arms = ("FISH", "FISH without pooler", "random")
    rows = results.sweep("fish_against_random", [dict(arm=a, seed=s) for s in SEEDS for a in arms], run)
    results.write("fish_against_random", rows, seeds=SEEDS, steps=STEPS, batch=16, rate=RATE, budget=BUDGET,
                  samples=SAMPLES)
    for row in rows:
        print(row)
