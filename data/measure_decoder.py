"""The measured table of the small decoder: python data/measure_decoder.py

Per task and over three seeds: zero-shot, k-shot, the same steps from random weights, full
fine-tuning and LoRA (rank 8, every linear layer). Learning rates are chosen by the loss on the
validation rows, with a seed of its own. Scores are on the first 100 test rows, decoded greedily.
Writes data/results/decoder.json and prints the table as markdown. Every finished cell is kept in
runs/measure/, so that a killed run continues. data/in_context.py has the k-shot curve.
"""

import argparse
import copy
import hashlib
import json
import os
import platform
import random
import re
import statistics
import sys
import time
from datetime import date
from functools import partial
from pathlib import Path

import torch
import transformers
from rouge_score import rouge_scorer
from sacrebleu import corpus_bleu
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import generators

from minipeft.reparam import lora

SEEDS = (0, 1, 2)
SHOTS = {"table_to_text": 1, "slots": 1, "word_problems": 2, "letters": 4}
ROWS = 8
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# method -> (pretrained, LoRA's targets, learning rates to choose from)
METHODS = {
    "from random weights": (False, None, (1e-3, 3e-3, 6e-3)),
    "full fine-tuning": (True, None, (5e-4, 1e-3, 2e-3, 4e-3)),
    "LoRA": (True, LINEAR, (5e-3, 1e-2)),
}


def load_task(name):
    splits = {"train": [], "validation": [], "test": []}
    for line in (HERE / "tasks" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        splits[row["split"]].append(row)
    return splits


def collate(tokenizer, rows):
    """Right padding for training; the loss is on the target and the end only."""
    ids, labels = [], []
    for row in rows:
        p = tokenizer.encode(row["prompt"])
        t = tokenizer.encode(row["target"]) + [tokenizer.eos_token_id]
        ids.append(p + t)
        labels.append([-100] * len(p) + t)
    width = max(map(len, ids))
    mask = [[1] * len(x) + [0] * (width - len(x)) for x in ids]
    ids = [x + [tokenizer.pad_token_id] * (width - len(x)) for x in ids]
    labels = [x + [-100] * (width - len(x)) for x in labels]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask),
            "labels": torch.tensor(labels)}


def train(model, tokenizer, rows, steps, lr, seed):
    torch.manual_seed(seed)
    rng = random.Random(seed)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.01, fused=True)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
    model.train()
    order = []
    for _ in range(steps):
        if len(order) < ROWS:
            order = rng.sample(rows, len(rows))
        chosen, order = order[:ROWS], order[ROWS:]
        model(**collate(tokenizer, chosen)).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.eval()


@torch.no_grad()
def answers(model, tokenizer, prompts, longest, stop_at_newline=False, size=100):
    model.eval()
    out = []
    for i in range(0, len(prompts), size):
        batch = tokenizer(prompts[i:i + size], padding=True, return_tensors="pt")
        made = model.generate(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"],
                              max_new_tokens=longest, do_sample=False)
        made = made[:, batch["input_ids"].shape[1]:]
        out += tokenizer.batch_decode(made, skip_special_tokens=True)
    return [o.split("\n")[0] if stop_at_newline else o for o in out]


def score(name, said, rows):
    """What the table reports, 0 to 100."""
    said, wanted = [s.strip() for s in said], [r["target"].strip() for r in rows]
    exact = 100 * sum(a == b for a, b in zip(said, wanted)) / len(rows)
    if name == "table_to_text":
        rouge = rouge_scorer.RougeScorer(["rougeL"])
        return {"BLEU": corpus_bleu(said, [wanted]).score,
                "ROUGE-L": 100 * statistics.mean(
                    rouge.score(b, a)["rougeL"].fmeasure for a, b in zip(said, wanted)),
                "exact": exact}
    if name == "word_problems":
        def last(text):
            return (re.findall(r"= (-?\d+)", text) or [None])[-1]

        right = sum(last(a) == last(b) for a, b in zip(said, wanted))
        return {"answer": 100 * right / len(rows), "exact": exact}
    return {"exact": exact}


def shots(rows, k, rng):
    return "".join(f"{r['prompt']}{r['target']}\n" for r in rng.sample(rows, k))


@torch.no_grad()
def validation_loss(model, tokenizer, rows):
    model.eval()
    return model(**collate(tokenizer, rows)).loss.item()


def start(base, pretrained, targets, seed):
    torch.manual_seed(seed)
    if pretrained:
        model = copy.deepcopy(base)
    else:
        model = AutoModelForCausalLM.from_config(copy.deepcopy(base.config)).float()
    if targets:
        lora.attach(model, *targets, r=8, alpha=16.0)
    return model


def fine_tuned(base, tokenizer, name, data, method, args):
    """One cell of the table: the rate chosen on validation, then a run per seed."""
    pretrained, targets, candidates = METHODS[method]
    losses = {}
    for lr in candidates:
        model = start(base, pretrained, targets, 100)
        train(model, tokenizer, data["train"], args.steps // 2, lr, 100)
        losses[lr] = round(validation_loss(model, tokenizer, data["validation"]), 4)
    lr = min(losses, key=losses.get)
    scores, seconds = [], []
    for seed in SEEDS:
        model = start(base, pretrained, targets, seed)
        began = time.process_time()
        train(model, tokenizer, data["train"], args.steps, lr, seed)
        seconds.append((time.process_time() - began) / args.steps)
        scores.append(asked(model, tokenizer, name, data, args))
    return {"scores": scores, "rate": {"chosen": lr, "validation loss": losses},
            "trained parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "seconds per step": round(statistics.mean(seconds), 4)}


def asked(model, tokenizer, name, data, args, prefix=""):
    test = data["test"][:args.rows]
    longest = max(len(tokenizer.encode(r["target"])) for r in data["train"]) + 4
    said = answers(model, tokenizer, [prefix + r["prompt"] for r in test], longest,
                   stop_at_newline=True)
    return score(name, said, test)


def prompted(base, tokenizer, name, data, args, k, seeds):
    """The scores with k training rows in front of the question, drawn anew per seed."""
    return [asked(base, tokenizer, name, data, args, shots(data["train"], k, random.Random(seed)))
            for seed in seeds]


def cell(args, base, name, method, make):
    """`make()`, or what it gave before for the same weights, data and steps."""
    weights = args.model / "model.safetensors"
    if METHODS.get(method, (True,))[0]:
        key = weights.read_bytes()
    else:
        key = repr((base.config.hidden_size, base.config.num_hidden_layers,
                    base.config.vocab_size)).encode()
    key += repr((name, method, METHODS.get(method), args.steps, args.rows, SEEDS, ROWS)).encode()
    key += (HERE / "tasks" / f"{name}.jsonl").read_bytes()
    kept = args.runs / f"{name} {method} {hashlib.sha256(key).hexdigest()[:12]}.json"
    if not kept.exists():
        found = make()
        args.runs.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(found))
        print(name, method, found, file=sys.stderr, flush=True)
    return json.loads(kept.read_text())


def measure(args):
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    base = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    results, rates, sizes, seconds = {}, {}, {}, {}
    for name in args.tasks:
        data, k = load_task(name), SHOTS[name]
        rows = results[name] = {}
        if not args.methods:
            rows["zero-shot"] = cell(args, base, name, "zero-shot", partial(
                prompted, base, tokenizer, name, data, args, 0, SEEDS[:1]))
            rows[f"{k}-shot"] = cell(args, base, name, "k-shot", partial(
                prompted, base, tokenizer, name, data, args, k, SEEDS))
        for method in args.methods or METHODS:
            found = cell(args, base, name, method, partial(
                fine_tuned, base, tokenizer, name, data, method, args))
            rows[method] = found["scores"]
            rates[f"{name}/{method}"] = found["rate"]
            sizes[method] = found["trained parameters"]
            seconds[f"{name}/{method}"] = found["seconds per step"]
    if args.methods:
        return None
    return {
        "command": f"python data/measure_decoder.py --steps {args.steps} --rows {args.rows}",
        "date": str(date.today()),
        "machine": f"{torch.get_num_threads()} core of a {os.cpu_count()}-core "
                   f"{platform.machine()} CPU",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__,
                     "python": platform.python_version()},
        "seeds": SEEDS, "steps": args.steps, "rows per step": ROWS, "test rows": args.rows,
        "trained parameters": sizes, "processor seconds per step": seconds,
        "learning rates": rates, "tasks": results,
    }


def markdown(found):
    lines = ["| task | measure | method | mean | sd | seeds |", "|---|---|---|---:|---:|---|"]
    for task, methods in found["tasks"].items():
        for measure in next(iter(methods.values()))[0]:
            for method, runs in methods.items():
                scores = [r[measure] for r in runs]
                sd = f"{statistics.stdev(scores):.1f}" if len(scores) > 1 else ""
                lines.append(f"| {task} | {measure} | {method} | {statistics.mean(scores):.1f} | "
                             f"{sd} | {', '.join(f'{s:.1f}' for s in scores)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--model", type=Path, default=HERE / "scribe")
    p.add_argument("--steps", type=int, default=150)
    p.add_argument("--rows", type=int, default=100, help="test rows")
    p.add_argument("--tasks", nargs="+", default=list(generators.TASKS))
    p.add_argument("--methods", nargs="+", choices=METHODS, help="only fill these cells")
    p.add_argument("--runs", type=Path, default=HERE.parent / "runs" / "measure")
    p.add_argument("--out", type=Path, default=HERE / "results" / "decoder.json")
    args = p.parse_args()
    found = measure(args)
    if found:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(found, indent=1) + "\n")
        print(markdown(found))
