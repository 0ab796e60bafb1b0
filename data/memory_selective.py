"""What a selective method keeps, against how much it trains and how large the model is.

    python data/memory_selective.py        about a minute on one core

Optimiser state, kept gradients and the file, in bytes, after three AdamW steps of a GPT-2 from a configuration.
"""

import pathlib
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import torch
import transformers as tf
from safetensors.torch import save_file

from minipeft.lab import results
from minipeft.selective import bitfit, fish_mask, id3, pafi

WIDTHS = {"small": 128, "middle": 256, "large": 512}
BUDGETS = (1_000, 10_000, 40_000)
STEPS, SEED = 3, 0


def build(width):
    torch.manual_seed(SEED)
    return tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=2000, n_positions=64, n_embd=width, n_layer=4, n_head=4))


def inputs():
    ids = torch.randint(0, 2000, (2, 32), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids}


def size(tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def measure(method: str, width: int, k: int) -> dict:
    model, batch = build(width), inputs()
    numbers = sum(p.numel() for p in model.parameters())
    module = {"bitfit": bitfit, "fish_mask": fish_mask, "pafi": pafi, "id3": id3}.get(method)
    start = time.perf_counter()
    if method == "bitfit":
        bitfit.attach(model)
    elif method == "fish_mask":
        fish_mask.attach(model, budget=k, batches=[batch])
    elif method == "pafi":
        pafi.attach(model, budget=k)
    elif method == "id3":
        id3.attach(model, budget=k, steps=STEPS)
    choosing = time.perf_counter() - start
    trained = [p for p in model.parameters() if p.requires_grad]
    opt = torch.optim.AdamW(trained)
    clock = []
    for step in range(STEPS):
        start = time.perf_counter()
        opt.zero_grad()
        model(**batch).loss.backward()
        opt.step()
        if method == "id3":
            id3.advance(model, step)
        clock.append(time.perf_counter() - start)
    aliases = [m.alias for m in id3.sites(model).values()]
    kept = [p.grad for p in [*model.parameters(), *aliases] if p is not None and p.grad is not None]
    saved = module.state(model) if module else {n: p.detach().clone() for n, p in model.named_parameters()}
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "saved.safetensors")
        save_file(saved, path)
        written = path.stat().st_size
    return {
        "numbers": numbers,
        "trained": sum(p.numel() for p in trained),
        "optimizer_bytes": size(v for s in opt.state.values() for v in s.values()),
        "gradient_bytes": size(kept),
        "checkpoint_bytes": written,
        "choosing_seconds": round(choosing, 3),
        "step_seconds": round(sorted(clock)[len(clock) // 2], 3),
    }


if __name__ == "__main__":
    jobs = [{"method": m, "width": w, "k": k} for w in WIDTHS.values() for k in BUDGETS
            for m in ("fish_mask", "pafi", "id3")]
    jobs += [{"method": m, "width": w, "k": 0} for w in WIDTHS.values() for m in ("bitfit", "full")]
    rows = results.sweep("memory_selective", jobs, measure)
    print(results.write("memory_selective", rows, seeds=[SEED]))
