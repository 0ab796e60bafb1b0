"""Lengths and directions under full fine-tuning, LoRA and DoRA: the measurement of chapter 32.

    python data/dora_decomposition.py     # ten minutes on one core; goes on where it stopped

Every job fine-tunes MiniLM on the sentiment task and writes down, at four steps and for the query
and value matrix of every layer, how far the rows' lengths and directions went from the start.
"""

from types import SimpleNamespace

import torch

from minipeft.lab import loop, models, results, tasks
from minipeft.reparam import dora, lora

SEEDS, STEPS, AT = 5, 60, (15, 30, 45, 60)
RATES = {"full": 2e-4, "lora": 5e-3, "dora": 5e-3}  # the book's standard rates
TARGETS = ("query", "value")


def moved(W0, W):
    """(mean change of the rows' length, mean of 1 - cosine of the rows' direction)."""
    length = (W.norm(dim=1) - W0.norm(dim=1)).abs().mean()
    direction = (1 - torch.cosine_similarity(W, W0, dim=1)).mean()
    return length.item(), direction.item()


def weights(model):
    """{path: the weight that the layer computes with}, for plain, LoRA and DoRA layers."""
    out = {}
    for path, m in model.named_modules():
        if isinstance(m, lora.LoRALinear):
            out[path] = m.base.weight + m.delta()
        elif isinstance(m, dora.DoRALinear):
            V = m.base.weight + m.s * m.B @ m.A
            out[path] = m.ratio()[:, None] * V
        elif path.endswith(TARGETS):
            out[path] = m.weight
    return {p: W.detach().double() for p, W in out.items()}


def run(method, seed, steps=STEPS, at=AT):
    task = tasks.load("sentiment")
    model, tokenizer = models.load("minilm", labels=2, seed=seed, device="cpu")
    start = {p: W.clone() for p, W in weights(model).items()}
    torch.manual_seed(seed)
    if method == "full":
        model.requires_grad_(True)
    else:
        {"lora": lora, "dora": dora}[method].attach(model, *TARGETS, r=8, alpha=16)
        models.unfreeze_head(model)
    points = []

    @torch.no_grad()
    def record(model, step):
        if step + 1 in at:
            for path, W in weights(model).items():
                layer = int(path.split("layer.")[1].split(".")[0])
                length, direction = moved(start[path], W)
                points.append([step + 1, layer, path.rpartition(".")[2], length, direction])

    loop.train(model, tokenizer, task, steps=steps, lr=RATES[method], seed=seed,
               method=SimpleNamespace(advance=record))
    return {"points": points, "accuracy": loop.accuracy(model, tokenizer, task.validation)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    jobs = [{"method": m, "seed": s} for s in range(SEEDS) for m in RATES]
    rows = results.sweep("dora_decomposition", jobs, run)
    print(results.write("dora_decomposition", rows, seeds=list(range(SEEDS))))
