"""Prefix against prompt with few training rows: `letters` on the small decoder, 5 seeds.

Run: python data/low_data.py      (about 6 minutes on one core; resumable)

Both arms start from the same training rows as a context: the prompt from their embeddings, the
prefix from their keys and values. At step 0 the two are therefore one function. Each arm's rate is
that of the best validation loss on a walk at 64 rows, with a seed that is not reported.
"""

import functools
import hashlib
import random
import statistics
from dataclasses import replace

import torch

from minipeft.additive import prefix_tuning, prompt_tuning
from minipeft.lab import figures, loop, models, results, tasks

TASK, SHOTS = "letters", {"letters": 2, "table_to_text": 1}  # rows of the context: 40 to 60 tokens
ARMS, SIZES, SEEDS, STEPS, BATCH = ("prefix", "prompt"), (16, 64, 256), (0, 1, 2, 3, 4), 100, 8
SEARCH_SIZE, SEARCH_SEED = 64, 100

load_task = functools.cache(tasks.load)


def subset(name, size, seed):
    """The task with `size` of its training rows, and a context: the first of them."""
    task = load_task(name)
    rows = random.Random(seed).sample(task.train, size)
    return replace(task, train=rows), "".join(r["prompt"] + r["target"] + "\n" for r in rows[: SHOTS[name]])


def attach(model, tokenizer, arm, context):
    words = tokenizer(context, return_tensors="pt", add_special_tokens=False)["input_ids"][0]
    if arm == "prefix":
        prefix_tuning.attach(model, words=words)
    else:
        prompt_tuning.attach(model, length=len(words), init=words[:, None].tolist())


@torch.no_grad()
def score(model, tokenizer, rows, context="", size=50):
    """Loss per target token, and the share of rows whose every target token is the likeliest."""
    model.eval()
    lost, tokens, right = 0.0, 0, 0
    for i in range(0, len(rows), size):
        part = [{**r, "prompt": context + r["prompt"]} for r in rows[i : i + size]]
        inputs = loop.collate([loop.encode(r, tokenizer, 256) for r in part], tokenizer)
        out, labels = model(**inputs), inputs["labels"][:, 1:]
        count = (labels != -100).sum().item()
        lost, tokens = lost + out.loss.item() * count, tokens + count
        right += ((out.logits[:, :-1].argmax(-1) == labels) | (labels == -100)).all(1).sum().item()
    return {"loss": lost / tokens, "exact": right / len(rows)}


def weights():
    """Which `scribe` it is: a run with other weights is another run."""
    return hashlib.sha256((models.DATA / "scribe" / "model.safetensors").read_bytes()).hexdigest()[:12]


def run(arm, size, seed, lr, weights):
    part, context = subset(TASK, size, seed)
    model, tokenizer = models.load("scribe", device="cpu")
    torch.manual_seed(seed)
    attach(model, tokenizer, arm, context)
    ledger = loop.train(model, tokenizer, part, steps=STEPS, lr=lr, batch_size=BATCH, seed=seed)
    found = {f"{k} validation": v for k, v in score(model, tokenizer, part.validation).items()}
    if seed in SEEDS:  # the search never sees the test rows
        found |= {f"{k} test": v for k, v in score(model, tokenizer, part.test).items()}
    return {**found, "train loss": statistics.fmean(ledger.losses[-10:]), "trained": ledger.trained}


if __name__ == "__main__":
    torch.set_num_threads(1)
    key = weights()
    tried, rows = [], []
    for arm in ARMS:
        place = dict(arm=arm, size=SEARCH_SIZE, seed=SEARCH_SEED, weights=key)
        found = results.walk("low_data", place, run, 0.1, lambda row: row["loss validation"])
        tried += found
        rows += results.sweep("low_data", [{**place, "size": n, "seed": s, "lr": found[0]["lr"]}
                                           for n in SIZES for s in SEEDS], run)
    results.write("low_data", rows, task=TASK, seeds=SEEDS, sizes=SIZES, steps=STEPS, batch=BATCH,
                  rates={r["arm"]: r["lr"] for r in rows}, search=tried, weights=key)
    for n, a in [(n, a) for n in SIZES for a in ARMS]:
        part = [r for r in rows if (r["arm"], r["size"]) == (a, n)]
        print(f"{a:7} {n:4} rows", *(f"{k} %.3f +- %.3f" % figures.interval(r[k] for r in part)
                                     for k in ("loss test", "exact test")))
