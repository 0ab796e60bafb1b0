"""The table of the data card: does each task show what the book is about? 3 seeds, MiniLM.

Run: python data/tasks_table.py      (about 20 minutes on one core; resumable)

Learning rates are the same for every task. LoRA's was chosen among three on the validation rows of
`sentiment`, with one seed; the others were set in advance. Nothing is chosen on test.
"""

import torch

from minipeft.lab import figures, loop, models, results, tasks
from minipeft.reparam import lora

SEEDS, STEPS = (0, 1, 2), 120
RATES = {"frozen": 1e-2, "lora": 5e-3, "full": 2e-4, "random": 2e-4}


def run(task, arm, seed):
    data = tasks.load(task)
    model, tokenizer = models.load("minilm", len(data.labels), seed=seed, random=arm == "random")
    torch.manual_seed(seed)
    if arm == "frozen":
        model.requires_grad_(False)
    if arm == "lora":
        lora.attach(model, "query", "value", r=8, alpha=16.0)
    models.unfreeze_head(model)
    ledger = loop.train(model, tokenizer, data, steps=STEPS, lr=RATES[arm], seed=seed)
    return {
        "test": loop.accuracy(model, tokenizer, data.test),
        "validation": loop.accuracy(model, tokenizer, data.validation),
        "trained": ledger.trained,
    }


def majority(task):
    labels = [r["label"] for r in tasks.load(task).test]
    return max(labels.count(c) for c in set(labels)) / len(labels)


if __name__ == "__main__":
    jobs = [dict(task=t, arm=a, seed=s) for s in SEEDS for t in tasks.REVIEWS for a in RATES]
    rows = results.sweep("tasks_table", jobs, run)
    results.write("tasks_table", rows, seeds=SEEDS, steps=STEPS, batch=16, rates=RATES)
    print("| task | majority | " + " | ".join(RATES) + " |\n|---|---|" + "---|" * len(RATES))
    for t in tasks.REVIEWS:
        cells = []
        for a in RATES:
            mean, half = figures.interval(r["test"] for r in rows if r["task"] == t and r["arm"] == a)
            cells.append(f"{mean:.3f} ± {half:.3f}")
        print(f"| {t} | {majority(t):.3f} | " + " | ".join(cells) + " |")
