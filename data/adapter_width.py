"""Adapters of several widths on `sentiment`, LayerNorms alone beside them, 3 seeds, for chapter 10.

At width 32 the trained adapters are also switched off: a layer alone, layers 0 to i, and all of
them with the LayerNorms.

Run: python data/adapter_width.py      (about 8 minutes on one core; resumable)
"""

import torch

from minipeft.additive import adapter
from minipeft.lab import loop, models, results, tasks

SEEDS, STEPS, LR = (0, 1, 2), 120, 1e-3


def run(arm, seed):
    """arm: a width m; "norms", adapters attached and kept at nothing."""
    task = tasks.load("sentiment")
    model, tokenizer = models.load("minilm", 2, seed=seed)
    torch.manual_seed(seed)
    if arm == "norms":
        adapter.attach(model, bottleneck=1)
        for m in adapter.sites(model).values():
            if isinstance(m, adapter.Adapter):
                torch.nn.init.zeros_(m.W_up)
                m.requires_grad_(False)
    else:
        adapter.attach(model, bottleneck=arm)
    models.unfreeze_head(model)
    ledger = loop.train(model, tokenizer, task, steps=STEPS, lr=LR, seed=seed)
    out = {"trained": ledger.trained,
           "test": loop.accuracy(model, tokenizer, task.test),
           "validation": loop.accuracy(model, tokenizer, task.validation)}
    return {**out, **removed(model, tokenizer, task)} if arm == 32 else out


def without(model, layers):
    """Switch off the trained adapters of these layers: W_up = 0 and b_up = 0."""
    off, trained = [f"layer.{i}." for i in layers], adapter.state(model)
    adapter.load(model, {k: v * 0 if any(o in k for o in off) and k.endswith("_up") else v
                         for k, v in trained.items()})


def removed(model, tokenizer, task):
    """{what is off: [test accuracy, share of predictions that flip]}; nothing is trained again."""
    labels = torch.tensor([r["label"] for r in task.test])
    trained, layers = adapter.state(model), len(model.bert.encoder.layer)

    def now():
        return loop.predict(model, tokenizer, task.test).argmax(-1)

    def score(chosen):
        return [round((chosen == other).float().mean().item(), 4) for other in (labels, whole)]

    whole, out = now(), {"alone": [], "upto": []}
    for kind, spans in (("alone", [[i] for i in range(layers)]),
                        ("upto", [range(i + 1) for i in range(layers)])):
        for span in spans:
            without(model, span)
            accuracy, same = score(now())
            out[kind].append([accuracy, round(1 - same, 4)])
            adapter.load(model, trained)
    adapter.detach(model)
    accuracy, same = score(now())
    return {**out, "bare": [accuracy, round(1 - same, 4)]}


if __name__ == "__main__":
    jobs = [{"arm": arm, "seed": seed} for seed in SEEDS for arm in (32, "norms", 4)]
    rows = results.sweep("adapter_width", jobs, run)
    results.write("adapter_width", rows, seeds=SEEDS, steps=STEPS, batch=16, lr=LR)
