"""The k-shot curve of the letter families, and LoRA trained on the same examples, for chapter 03.

Run: python data/in_context.py      (about 6 minutes on one core; resumable)

Families, queries and examples are those of data/generators.py; `scribe` is data/scribe.
"""

import copy
import functools
import pathlib
import random
import sys

import torch

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import generators

from minipeft.lab import loop, models, results, tasks
from minipeft.reparam import lora

SHOTS, QUERIES = (0, 1, 2, 4, 8), 100
SIZES, SEEDS, STEPS, LR = (1, 4, 32), (0, 1, 2), 100, 1e-2
TAUGHT = ("second", "rotate_right", "swap_first", "reverse_upper")


@torch.no_grad()
def right(model, tokenizer, rows, size=50):
    """Per row: does greedy decoding say the target? Its every token must be the likeliest."""
    out = []
    for i in range(0, len(rows), size):
        encoded = []
        for prompt, target in rows[i : i + size]:
            p, t = (tokenizer.encode(x) for x in (prompt, target))
            encoded.append({"input_ids": p + t, "labels": [-100] * len(p) + t})
        batch = loop.collate(encoded, tokenizer)
        batch = {k: v.to(model.device) for k, v in batch.items()}
        labels = batch.pop("labels")[:, 1:]
        guess = model(**batch).logits[:, :-1].argmax(-1)
        out += ((guess == labels) | (labels == -100)).all(1).tolist()
    return out


def question(pairs):
    """(prompt, target) of the last pair with the others as examples; the line's end is part of the target."""
    prompt, target = generators.in_context_query(pairs)
    return prompt, target + "\n"


def queries(family, k, count, seed=0):
    """`count` (prompt, target) of one family with k examples each; inputs of four and five letters."""
    rng = random.Random(f"curve/{seed}/{family}/{k}")
    asked = (generators.family_pairs(rng, family, 4 + i % 2, k + 1) for i in range(count))
    return [question(pairs) for pairs in asked]


def examples(family, count, seed):
    """`count` examples and 100 other inputs of the family, four letters each."""
    rng = random.Random(f"examples/{seed}/{family}")
    pairs = generators.family_pairs(rng, family, 4, count + QUERIES)
    return pairs[:count], pairs[count:]


load = functools.cache(lambda: models.load("scribe"))


def run(kind, family, size, seed):
    model, tokenizer = load()
    if kind == "curve":
        return {"right": sum(right(model, tokenizer, queries(family, size, QUERIES)))}
    shown, asked = examples(family, size, seed)
    in_context = [question([*shown[:8], pair]) for pair in asked]
    alone = [question([pair]) for pair in asked]
    found = {"in context": sum(right(model, tokenizer, in_context))}
    model = copy.deepcopy(model)
    torch.manual_seed(seed)
    lora.attach(model, "q_proj", "v_proj", r=8)
    rows = [dict(zip(("prompt", "target"), question([pair]))) for pair in shown]
    task = tasks.Task(family, [], rows, [], [])
    loop.train(model, tokenizer, task, steps=STEPS, lr=LR, batch_size=8, method=lora, seed=seed)
    return {**found, "lora": sum(right(model, tokenizer, alone))}


if __name__ == "__main__":
    torch.set_num_threads(1)
    names = [*generators.TRAINED, *generators.HELD_OUT]
    jobs = [dict(kind="curve", family=f, size=k, seed=0) for f in names for k in SHOTS]
    jobs += [dict(kind="lora", family=f, size=n, seed=s)
             for f in TAUGHT for n in SIZES for s in SEEDS]
    rows = results.sweep("in_context", jobs, run)
    results.write("in_context", rows, seeds=SEEDS, queries=QUERIES, steps=STEPS, lr=LR, r=8,
                  batch=8, targets=["q_proj", "v_proj"])
