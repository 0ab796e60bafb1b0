"""Train, evaluate, generate: plain functions around the loop that chapter 02 writes out in full."""

import random
import sys
import time
from dataclasses import dataclass, field

import torch
from tqdm import tqdm

from .tasks import Task


@dataclass
class Ledger:
    """What a run cost and what came of it."""

    trained: int  # numbers that train
    total: int  # numbers in the model
    steps: int = 0
    seconds: float = 0.0
    gradient_bytes: int = 0
    optimizer_bytes: int = 0
    peak_bytes: int | None = None  # on a GPU: the allocator's peak
    losses: list[float] = field(default_factory=list)
    curve: list[tuple[int, float]] = field(default_factory=list)  # (step, validation accuracy)

    @property
    def share(self) -> float:
        return self.trained / self.total


def count(model) -> tuple[int, int]:
    """(numbers that train, all numbers); a tied tensor counts once."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, on in sizes if on), sum(n for n, _ in sizes)


def batches(rows, tokenizer, size=16, *, seed=0, max_length=64, two_texts=False):
    """An endless stream of batches, padded to their longest row, rows of like length together.

    The order depends on `seed` alone. Rows with "target" give labels on the target only;
    with `two_texts` (an encoder-decoder) the target is a text of its own.
    """
    if not rows:
        raise ValueError("no rows to make batches of")
    rng = random.Random(seed)
    encoded = [encode(r, tokenizer, max_length, two_texts) for r in rows]
    while True:
        order = list(range(len(encoded)))
        rng.shuffle(order)
        chunks = [order[i : i + 8 * size] for i in range(0, len(order), 8 * size)]
        groups = []
        for chunk in chunks:
            chunk.sort(key=lambda i: len(encoded[i]["input_ids"]))  # stable: ties stay shuffled
            groups += [chunk[i : i + size] for i in range(0, len(chunk), size)]
        rng.shuffle(groups)
        for group in groups:
            yield collate([encoded[i] for i in group], tokenizer)


def encode(row, tokenizer, max_length=64, two_texts=False):
    """One row as {"input_ids", "labels"}; a pair is written "first [SEP] second"."""
    if "target" not in row:
        made = tokenizer(*row["text"].split(" [SEP] "), truncation=True, max_length=max_length)
        out = {"input_ids": made["input_ids"], "labels": row["label"]}
        if any(made.get("token_type_ids", ())):  # the second text of a pair, as BERT marks it
            out["token_type_ids"] = made["token_type_ids"]
        return out
    prompt, target = (tokenizer(row[k], add_special_tokens=False)["input_ids"] for k in ("prompt", "target"))
    end = [tokenizer.eos_token_id]
    if two_texts:
        return {"input_ids": prompt[: max_length - 1] + end, "labels": target[: max_length - 1] + end}
    start = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    ids = (start + prompt + target + end)[:max_length]
    labels = ([-100] * len(start + prompt) + target + end)[:max_length]
    return {"input_ids": ids, "labels": labels}


def collate(encoded, tokenizer):
    """Padded on the tokenizer's side; labels of padding are -100."""
    left = tokenizer.padding_side == "left"

    def pad(rows, fill):
        longest = max(map(len, rows))
        gaps = ([fill] * (longest - len(r)) for r in rows)
        return torch.tensor([gap + r if left else r + gap for gap, r in zip(gaps, rows)])

    ids, labels = ([e[k] for e in encoded] for k in ("input_ids", "labels"))
    batch = {
        "input_ids": pad(ids, tokenizer.pad_token_id),
        "attention_mask": pad([[1] * len(row) for row in ids], 0),
        "labels": torch.tensor(labels) if isinstance(labels[0], int) else pad(labels, -100),
    }
    if any("token_type_ids" in e for e in encoded):
        types = (e.get("token_type_ids", [0] * len(row)) for e, row in zip(encoded, ids))
        batch["token_type_ids"] = pad(list(types), 0)
    return batch


def train(
    model,
    tokenizer,
    task: Task,
    *,
    steps: int,
    lr: float,
    method=None,
    batch_size: int = 16,
    seed: int = 0,
    weight_decay: float = 0.0,
    groups=None,
    every: int = 0,
    warmup: float = 0.1,
) -> Ledger:
    """Train what has requires_grad with AdamW, linear warm-up and decay; return the ledger.

    method  a module of minipeft; its `penalty` joins the loss, its `advance` follows each step.
    groups  optimizer groups in place of all trainable parameters (LoRA+).
    every   evaluate on validation after so many steps (0: never).

    ValueError: nothing trains. RuntimeError: the loss is not finite, or after ten steps no
    trained tensor has moved.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    if not params:
        raise ValueError("nothing to train: no parameter has requires_grad")
    device = params[0].device
    ledger = Ledger(*count(model))
    # Fused: the same arithmetic in one pass, on a CPU several times faster than the default.
    opt = torch.optim.AdamW(groups or params, lr=lr, weight_decay=weight_decay, fused=True)
    ramp = max(1, int(warmup * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        opt, lambda t: min((t + 1) / ramp, max(0.0, (steps - t) / max(1, steps - ramp)))
    )
    stream = batches(task.train, tokenizer, batch_size, seed=seed,
                     two_texts=model.config.is_encoder_decoder)
    watched = params[:: -(-len(params) // 64)]  # at most 64: enough to see whether anything moves
    start = [p.detach().clone() for p in watched]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    torch.manual_seed(seed)
    model.train()
    clock = time.perf_counter()
    bar = tqdm(range(steps), desc=task.name, leave=False, disable=not sys.stderr.isatty())
    for step in bar:
        inputs = {k: v.to(device) for k, v in next(stream).items()}
        loss = model(**inputs).loss
        if hasattr(method, "penalty"):
            loss = loss + method.penalty(model)
        if not torch.isfinite(loss):
            raise RuntimeError(f"the loss is {loss.item()} at step {step}; try a smaller lr than {lr}")
        loss.backward()
        if step == 0:
            ledger.gradient_bytes = sum(_bytes(p.grad) for p in params if p.grad is not None)
        opt.step()
        if hasattr(method, "advance"):  # before zero_grad: importance is read off the gradients
            method.advance(model, step)
        opt.zero_grad(set_to_none=True)
        schedule.step()
        ledger.losses.append(loss.item())
        bar.set_postfix(loss=f"{loss.item():.3f}")
        if step == 9 and all(torch.equal(a, p) for a, p in zip(start, watched)):
            raise RuntimeError("nothing is moving: ten steps changed no trained tensor")
        if every and (step + 1) % every == 0:
            ledger.curve.append((step + 1, accuracy(model, tokenizer, task.validation)))
            model.train()
    model.eval()
    ledger.steps, ledger.seconds = steps, time.perf_counter() - clock
    slots = [v for s in opt.state.values() for v in s.values() if torch.is_tensor(v) and v.dim()]
    ledger.optimizer_bytes = sum(map(_bytes, slots))
    if device.type == "cuda":
        ledger.peak_bytes = torch.cuda.max_memory_allocated(device)
    return ledger


@torch.no_grad()
def predict(model, tokenizer, rows, batch_size=64) -> torch.Tensor:
    """Logits (rows, classes), on the CPU, in the order of `rows`."""
    model.eval()
    device = next(model.parameters()).device
    encoded = [encode(r, tokenizer) for r in rows]
    order = sorted(range(len(rows)), key=lambda i: len(encoded[i]["input_ids"]))
    out = [None] * len(rows)
    for i in range(0, len(order), batch_size):
        part = order[i : i + batch_size]
        inputs = collate([encoded[j] for j in part], tokenizer)
        inputs.pop("labels")
        logits = model(**{k: v.to(device) for k, v in inputs.items()}).logits.float().cpu()
        for j, row in zip(part, logits):
            out[j] = row
    return torch.stack(out)


def accuracy(model, tokenizer, rows) -> float:
    return evaluate(model, tokenizer, rows)["accuracy"]


def evaluate(model, tokenizer, rows) -> dict[str, float]:
    """{"loss": nats per row, "accuracy"}. A loss tells two rates apart where an accuracy ties."""
    labels, logits = torch.tensor([r["label"] for r in rows]), predict(model, tokenizer, rows)
    right = (logits.argmax(-1) == labels).float().mean().item()
    return {"loss": torch.nn.functional.cross_entropy(logits, labels).item(), "accuracy": right}


@torch.no_grad()
def generate(model, tokenizer, prompts, *, max_new_tokens=48, batch_size=32, **more) -> list[str]:
    """Greedy continuations, in the order of `prompts`, without the prompt and special tokens."""
    model.eval()
    device = next(model.parameters()).device
    start, end = tokenizer.bos_token or "", ""
    if model.config.is_encoder_decoder:
        start, end = "", tokenizer.eos_token
    texts = []
    for i in range(0, len(prompts), batch_size):
        part = [start + p + end for p in prompts[i : i + batch_size]]
        inputs = tokenizer(part, return_tensors="pt", padding=True, add_special_tokens=False).to(device)
        inputs.pop("token_type_ids", None)
        ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False,
                             pad_token_id=tokenizer.pad_token_id, **more)
        new = ids if model.config.is_encoder_decoder else ids[:, inputs["input_ids"].shape[1]:]
        texts += [t.strip() for t in tokenizer.batch_decode(new, skip_special_tokens=True)]
    return texts


def _bytes(tensor):
    return tensor.numel() * tensor.element_size()
