"""What adapters cost in a forward pass, beside LoRA attached and merged, for chapter 10.

Run: python data/adapter_latency.py      (about half a minute on one core)

All four models run in every round, one after another, on one thread. What is kept is processor
time over the base's of the same round, so that a busy machine slows all four alike.
"""

import copy
import statistics
import time

import torch

from minipeft.additive import adapter
from minipeft.lab import loop, models, results, tasks
from minipeft.reparam import lora

WIDTH, RANK = 64, 8


def build():
    """(runners, tokenizer): MiniLM as it is, with LoRA merged and attached, with adapters."""
    torch.manual_seed(0)
    base, tokenizer = models.load("minilm", labels=2, device="cpu")
    adapted, attached = copy.deepcopy(base), copy.deepcopy(base)
    adapter.attach(adapted, bottleneck=WIDTH, norms=False)
    lora.attach(attached, "query", "key", "value", "dense", r=RANK)
    with torch.no_grad():
        for site in lora.sites(attached).values():
            site.B.normal_(0, 0.02)
    merged = copy.deepcopy(attached)
    lora.merge(merged)
    runners = {"base": base, "LoRA merged": merged, "LoRA attached": attached, "adapters": adapted}
    return runners, tokenizer


@torch.no_grad()
def ratios(runners, tokenizer, rows, rounds, repeat=1):
    """{name: [time over the base's, a number per round]}; the first round warms up."""
    batch = loop.collate([loop.encode(r, tokenizer) for r in rows], tokenizer)
    batch.pop("labels")
    out = {name: [] for name in runners if name != "base"}
    for turn in range(rounds + 1):
        spent = {}
        for name, model in runners.items():
            start = time.process_time()
            for _ in range(repeat):
                model(**batch)
            spent[name] = time.process_time() - start
        for name, seen in out.items() if turn else ():
            seen.append(round(spent[name] / spent["base"], 4))
    return out


if __name__ == "__main__":
    torch.set_num_threads(1)
    runners, tokenizer = build()
    rows = tasks.load("sentiment").test
    table = {"one sentence": ratios(runners, tokenizer, rows[:1], 60, repeat=5),
             "a batch of 16": ratios(runners, tokenizer, rows[:16], 30)}
    results.write("adapter_latency", table, width=WIDTH, rank=RANK, seeds=[0], threads=1)
    for title, runs in table.items():
        print(title, {name: statistics.median(values) for name, values in runs.items()})
