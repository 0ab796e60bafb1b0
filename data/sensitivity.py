"""MonteCLoRA's promise: less depends on learning rate and batch size. For chapter 34.

Run: python data/sensitivity.py      (about 6 minutes on one core; resumable)

Five arms over 5 learning rates x 2 batch sizes x 8 seeds on `domain`, one pass over the 800
training rows each. Two arms are controls: LoRA, and MonteCLoRA with a noise too small to matter.

To afford 400 runs, the last layer of MiniLM is adapted and the five below it are run once: their
output does not change. Of the last layer only the first token is computed, all that the head reads.
Chapter 33 runs LoRA and QLoRA the same way.
"""

import copy
import functools

import torch
from torch.nn import functional as F

from minipeft.lab import loop, models, results, tasks
from minipeft.reparam import lora, monteclora, nf4, qlora

SEEDS, RATES, BATCHES = range(8), (3e-3, 1e-2, 3e-2, 1e-1, 3e-1), (8, 64)
ARMS = {"full": None, "lora": None,
        "monteclora placebo": 1e-6, "monteclora 5e-3": 5e-3, "monteclora 2e-2": 2e-2}  # eps
LINEAR = ("query", "key", "value", "dense")
FULL = 0.04  # all weights of the layer take this share of the rate: 2e-4 where LoRA takes 5e-3


class Top(torch.nn.Module):
    """The last layer, the pooler and the head of a BERT, for the first token alone."""

    def __init__(self, model):
        super().__init__()
        self.layer, self.pooler = model.bert.encoder.layer[-1], model.bert.pooler
        self.classifier = model.classifier

    def forward(self, hidden, mask):  # (n, length, d), (n, length) -> (n, classes)
        a, first = self.layer.attention.self, hidden[:, :1]
        q, k, v = (
            f(h).unflatten(-1, (a.num_attention_heads, -1)).transpose(1, 2)
            for f, h in ((a.query, first), (a.key, hidden), (a.value, hidden))
        )
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None].bool())
        x = self.layer.attention.output(mixed.transpose(1, 2).flatten(2), first)
        x = self.layer.output(self.layer.intermediate(x), x)
        return self.classifier(self.pooler(x))


@functools.cache
@torch.no_grad()
def prepared(four_bits=False):
    """(the model without a task, {split: what the fifth layer gives, mask, label})."""
    task = tasks.load("domain")
    model, tokenizer = models.load("minilm", 4, device="cpu")
    for layer in model.bert.encoder.layer[:-1] if four_bits else ():
        nf4.attach(layer, *LINEAR)
    parts = {}
    for name in ("train", "validation", "test"):
        rows = [loop.encode(r, tokenizer) for r in getattr(task, name)]
        inputs = loop.collate(rows, tokenizer)
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        hidden = torch.zeros(*ids.shape, model.config.hidden_size)
        for index in mask.sum(1).argsort().split(50):  # rows of like length together
            short = mask[index].sum(1).max()
            out = model.bert(ids[index, :short], mask[index, :short], output_hidden_states=True)
            hidden[index, :short] = out.hidden_states[-2]
        parts[name] = (hidden, mask, inputs["labels"])
    return model, parts


def rows(part, index):
    """Some rows, cut at the longest of them."""
    mask = part[1][index]
    width = int(mask.sum(1).max())
    return part[0][index, :width], mask[:, :width], part[2][index]


def build(arm, seed):
    """(model, method) of one arm; the head and A are drawn from the seed."""
    model = copy.deepcopy(prepared(arm == "qlora")[0])
    models._new_head(model, seed)
    top, method = Top(model).requires_grad_(False), None
    torch.manual_seed(seed)
    if arm == "full":
        top.layer.requires_grad_(True)
    elif arm == "lora":
        method = lora
        lora.attach(top, "query", "value", r=8, alpha=16.0)
    elif arm in ("lora everywhere", "qlora"):
        method = qlora if arm == "qlora" else lora
        method.attach(top, *LINEAR, r=8, alpha=16.0)
    else:
        method = monteclora
        monteclora.attach(top, "query", "value", r=8, alpha=16.0, samples=4, eps=ARMS[arm])
    return top, method


def run(arm, lr, batch, seed):
    return train(*build(arm, seed), arm, lr, batch, seed)


def train(top, method, arm, lr, batch, seed):
    _, parts = prepared(arm == "qlora")
    params = [p for p in top.parameters() if p.requires_grad]
    groups = [{"params": params, "lr": lr * (FULL if arm == "full" else 1)},
              {"params": list(top.classifier.requires_grad_(True).parameters()), "lr": lr}]
    opt = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
    order = torch.randperm(800, generator=torch.Generator().manual_seed(seed)).split(batch)
    ramp = max(1, len(order) // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        opt, lambda t: min((t + 1) / ramp, (len(order) - t) / max(1, len(order) - ramp)))
    torch.manual_seed(seed)
    top.train()
    for index in order:
        hidden, mask, label = rows(parts["train"], index)
        loss = F.cross_entropy(top(hidden, mask), label)
        if method is monteclora:
            loss = loss + monteclora.penalty(top)
        loss.backward()
        opt.step()
        opt.zero_grad()
        schedule.step()
    top.eval()
    out = {}
    with torch.no_grad():
        for name in ("validation", "test"):
            hidden, mask, label = parts[name]
            logits = top(hidden, mask)
            out[name] = (logits.argmax(-1) == label).float().mean().item()
            out[f"{name}_nll"] = F.cross_entropy(logits, label).item()
    return out


if __name__ == "__main__":
    torch.set_num_threads(1)
    jobs = [dict(arm=a, lr=lr, batch=b, seed=s)
            for s in SEEDS for a in ARMS for lr in RATES for b in BATCHES]
    table = results.sweep("sensitivity", jobs, run)
    results.write("sensitivity", table, seeds=list(SEEDS), rates=RATES, batches=BATCHES, full=FULL,
                  r=8, alpha=16.0, samples=4, eps=ARMS, rows_seen=800)
