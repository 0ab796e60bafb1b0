"""A prefix trained directly and through the MLP: table-to-text on the small decoder, 5 seeds.

Run: python data/prefix_mlp.py      (about 3 minutes on one core; resumable)

Three arms: direct and through the MLP from random numbers, and direct from the words of a training
row. Each arm's rate is that of the best validation loss on a walk, with a seed that is not reported.
"""

import torch
from low_data import BATCH, score, subset, weights

from minipeft.additive import prefix_tuning
from minipeft.lab import figures, loop, models, results

TASK, SIZE, STEPS, SEEDS, SEARCH_SEED, WIDTH = "table_to_text", 256, 60, (0, 1, 2, 3, 4), 100, 96
ARMS = {("direct", "random"): 0.1, ("MLP", "random"): 0.01, ("direct", "words"): 0.1}  # the middle of the first five rates


def run(how, start, seed, lr, weights):
    part, context = subset(TASK, SIZE, seed)
    model, tokenizer = models.load("scribe", device="cpu")
    words = tokenizer(context, return_tensors="pt", add_special_tokens=False)["input_ids"][0]
    torch.manual_seed(seed)
    prefix_tuning.attach(model, length=len(words), words=words if start == "words" else None,
                         mlp=WIDTH if how == "MLP" else None)
    ledger = loop.train(model, tokenizer, part, steps=STEPS, lr=lr, batch_size=BATCH, seed=seed)
    found = {f"{k} validation": v for k, v in score(model, tokenizer, part.validation).items()}
    if seed in SEEDS:  # the search never sees the test rows
        found |= {f"{k} test": v for k, v in score(model, tokenizer, part.test).items()}
    return {**found, "trained": ledger.trained}


if __name__ == "__main__":
    torch.set_num_threads(1)
    key = weights()
    tried, rows = [], []
    for (how, start), middle in ARMS.items():
        arm = dict(how=how, start=start, weights=key)
        found = results.walk("prefix_mlp", {**arm, "seed": SEARCH_SEED}, run, middle, lambda row: row["loss validation"])
        tried += found
        rows += results.sweep("prefix_mlp", [{**arm, "seed": s, "lr": found[0]["lr"]} for s in SEEDS], run)
    results.write("prefix_mlp", rows, task=TASK, seeds=SEEDS, size=SIZE, steps=STEPS, batch=BATCH,
                  width=WIDTH, search=tried, weights=key)
    for h, s in ARMS:
        part = [r for r in rows if (r["how"], r["start"]) == (h, s)]
        print(f"{h:6} from {s:6}", *(f"{k} %.3f +- %.3f" % figures.interval(r[k] for r in part)
                                     for k in ("loss test", "exact test")))
