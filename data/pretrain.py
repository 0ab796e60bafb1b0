"""Pretrains `scribe`, the book's own decoder: python data/pretrain.py

Trains a byte-level BPE on generated text, then a Llama of about 2 M parameters, and writes
data/scribe/ in the hub's format with its card. Every batch is a function of (seed, step), so a
run that was killed continues from its last checkpoint in runs/ and ends with the same weights.
On a GPU it computes in bfloat16; give it more --steps there.
"""

import argparse
import json
import math
import os
import platform
import random
import sys
import time
from pathlib import Path

import tokenizers
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parent))
import generators

HERE = Path(__file__).resolve().parent
LENGTH = 128
PAD, END = "<pad>", "<end>"


def train_tokenizer(seed, vocab_size=1024, documents=20_000):
    """Byte-level BPE. Merges never cross a space, so letters written with spaces stay tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[PAD, END], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator((t for _, t in generators.documents(f"bpe/{seed}", documents)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token=PAD, eos_token=END, padding_side="left",
        model_max_length=256, clean_up_tokenization_spaces=False)


def row(tokenizer, key, skill=None, phase=0):
    """One packed row of LENGTH ids and its labels. A row keeps to one skill."""
    rng = random.Random(key)
    skill = skill or generators.pick_skill(rng, phase)
    ids = []
    while len(ids) < LENGTH:
        text = generators.SKILLS[skill](rng)
        ids += tokenizer.encode(text, add_special_tokens=False) + [tokenizer.eos_token_id]
    ids = ids[:LENGTH]
    labels = list(ids)
    if skill == "in_context":
        # Nobody can guess the letters that are asked: only answers count.
        opens, equals = tokenizer.convert_tokens_to_ids([">", "Ġ="])
        asking = False
        for i, t in enumerate(ids):
            asking = t == opens or (asking and t != equals)
            if asking or t == equals:
                labels[i] = -100
    if skill == "twice":
        # Nobody can guess the restaurant: only the second telling counts.
        line, first = tokenizer.convert_tokens_to_ids("Ċ"), True
        for i, t in enumerate(ids):
            if first:
                labels[i] = -100
            first = t == tokenizer.eos_token_id or (first and t != line)
    return ids, labels


def batch(tokenizer, seed, step, rows, phase=0, device="cpu"):
    ids, labels = zip(*(row(tokenizer, f"train/{seed}/{step}/{i}", phase=phase)
                        for i in range(rows)))
    return torch.tensor(ids, device=device), torch.tensor(labels, device=device)


@torch.no_grad()
def held_out_loss(model, tokenizer, seed, rows=8, skills=tuple(generators.SKILLS)):
    """Mean loss per skill on rows that training never draws."""
    losses = {}
    for skill in skills:
        pairs = (row(tokenizer, f"held out/{seed}/{skill}/{i}", skill) for i in range(rows))
        ids, labels = (torch.tensor(x, device=model.device) for x in zip(*pairs))
        losses[skill] = round(model(input_ids=ids, labels=labels).loss.item(), 4)
    return losses


def build(tokenizer, seed, hidden, layers, heads, kv_heads, ff):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=ff,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
        max_position_embeddings=256, tie_word_embeddings=True, attention_bias=False,
        mlp_bias=False, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id))


def phase_of(step, turns):
    return sum(step >= turn for turn in turns)


def rate(step, steps, lr, warmup, turns, horizon):
    """A warm-up and a cosine towards `horizon` in the first phase, a cosine to zero in the second,
    a warm-up and a cosine to zero in the third and the fourth together.
    """
    def cosine(start, end):
        return 0.5 * (1 + math.cos(math.pi * (step - start) / max(1, end - start)))

    if step < warmup:
        return lr * (step + 1) / warmup
    if step < turns[0]:
        return lr * (0.05 + 0.95 * cosine(warmup, horizon))
    if step < turns[1]:
        return lr * cosine(turns[0], turns[1])
    return lr * min((step - turns[1] + 1) / warmup, cosine(turns[1], steps))


@torch.no_grad()
def restart(model, optimizer):
    """As from the files on disk: float16 weights, an optimizer without a past."""
    for p in model.parameters():
        p.copy_(p.half())
    optimizer.state.clear()


def save_checkpoint(path, **what):
    """Written beside, then renamed: a kill leaves the old one or the new one, never half of one."""
    torch.save(what, path.with_suffix(".new"))
    os.replace(path.with_suffix(".new"), path)


def pretrain(args):
    device = "cuda" if torch.cuda.is_available() and not args.cpu else "cpu"
    tokenizer = train_tokenizer(args.seed)
    model = build(tokenizer, args.seed, args.hidden, args.layers, args.heads, args.kv_heads,
                  args.ff).to(device)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=args.lr, betas=(0.9, 0.95))
    settings = {k: getattr(args, k) for k in SETTINGS}
    args.runs.mkdir(parents=True, exist_ok=True)
    checkpoint = args.runs / "pretrain.pt"
    start, log, seconds = 0, [], 0.0
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location=device, weights_only=True)
        if saved["settings"] != settings:
            raise SystemExit(f"{checkpoint} was made with {saved['settings']}, not {settings}: "
                             "delete it, or give --runs another folder")
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        start, log, seconds = saved["step"], saved["log"], saved["seconds"]
    began = time.perf_counter() - seconds

    def save(step):
        save_checkpoint(checkpoint, settings=settings, model=model.state_dict(), step=step,
                        optimizer=optimizer.state_dict(), log=log,
                        seconds=time.perf_counter() - began)

    model.train()
    bar = tqdm(range(start, args.steps), initial=start, total=args.steps, file=sys.stderr,
               mininterval=2)
    recent = []
    for step in bar:
        if step == args.turns[1]:
            restart(model, optimizer)
        ids, labels = batch(tokenizer, args.seed, step, args.rows,
                            phase_of(step, args.turns), device)
        for group in optimizer.param_groups:
            group["lr"] = rate(step, args.steps, args.lr, args.warmup, args.turns,
                               args.horizon)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        recent.append(loss.item())
        done = step + 1
        if done % args.every == 0 or done == args.steps:
            entry = {"step": done, "train": round(sum(recent) / len(recent), 4),
                     **held_out_loss(model, tokenizer, args.seed, skills=tuple(
                         generators.PHASES[phase_of(step, args.turns)]))}
            log.append(entry)
            recent = []
            bar.write(json.dumps(entry), file=sys.stderr)
            save(done)
        if args.stop_after and done >= args.stop_after:
            return model, tokenizer, log, time.perf_counter() - began, device
    return model, tokenizer, log, time.perf_counter() - began, device


def write(model, tokenizer, log, seconds, device, args):
    """The folder in the hub's format, the curve and the card."""
    out = args.out
    out.mkdir(parents=True, exist_ok=True)
    model = model.float().cpu().eval()
    model.generation_config.update(
        do_sample=False, max_new_tokens=64, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.half().save_pretrained(out)
    # Stored in half precision, loaded in single: training on a CPU needs it.
    config = json.loads((out / "config.json").read_text())
    config["dtype"] = "float32"
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tokenizer.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)
    draw(log, out / "loss.png")
    size = sum(p.numel() for p in model.parameters())
    names = ["step", "train", *generators.SKILLS]
    shown = [e for e in log if e["step"] % (5 * args.every) == args.every or e is log[-1]]
    lines = ["| " + " | ".join(names) + " |", "|" + "---:|" * len(names)]
    lines += ["| " + " | ".join(str(e.get(n, "")) for n in names) + " |" for e in shown]

    def shares(s):
        return ", ".join(f"{k} {v:.0%}" for k, v in s.items())

    default = arguments([])
    command = " ".join(["python data/pretrain.py"] + [
        f"--{k.replace('_', '-')} {str(getattr(args, k)).strip('[]').replace(',', '')}"
        for k in SETTINGS
        if getattr(args, k) != getattr(default, k)])
    machine = (torch.cuda.get_device_name() + ", bfloat16" if device == "cuda" else
               f"{torch.get_num_threads()} core(s) of a {os.cpu_count()}-core "
               f"{platform.machine()} CPU, float32")
    card = CARD.format(
        size=size, vocab=len(tokenizer), steps=args.steps, rows=args.rows, length=LENGTH,
        tokens=args.steps * args.rows * LENGTH / 1e6, minutes=seconds / 60, machine=machine,
        command=command, table="\n".join(lines), seed=args.seed, torch=torch.__version__,
        transformers=transformers.__version__, tokenizers=tokenizers.__version__,
        python=platform.python_version(), hidden=args.hidden, layers=args.layers,
        heads=args.heads, kv=args.kv_heads, ff=args.ff, lr=args.lr, warmup=args.warmup,
        turns=args.turns, horizon=args.horizon, shares=[shares(p) for p in generators.PHASES])
    readme = out / "README.md"
    kept = readme.read_text().partition(MEASURED)[2] if readme.exists() else "\n"
    readme.write_text(card + MEASURED + kept)


def draw(log, path):
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
    for skill in generators.SKILLS:
        seen = [e for e in log if skill in e]
        axes.plot([e["step"] for e in seen], [e[skill] for e in seen], label=skill)
    axes.plot([e["step"] for e in log], [e["train"] for e in log], "k:", label="training")
    axes.set(xlabel="step", ylabel="loss on held-out rows (nats per token)", yscale="log")
    axes.set_yticks([0.1, 0.2, 0.5, 1, 2, 4], ["0.1", "0.2", "0.5", "1", "2", "4"])
    axes.minorticks_off()
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=100, metadata={"Software": None})


MEASURED = "## Measured\n"
CARD = """\
# scribe

A small decoder for this book: Llama architecture (RoPE, grouped-query attention, RMSNorm, SwiGLU,
no biases, tied embeddings), {size:,} parameters, byte-level BPE of {vocab} tokens. {layers} layers
of width {hidden}, {heads} heads over {kv} key-value heads, feed-forward {ff}. Stored in float16,
loaded in float32. Pad `<pad>`, end `<end>`, left padding. Trained on {length} tokens of context.

    from transformers import AutoModelForCausalLM, AutoTokenizer
    model = AutoModelForCausalLM.from_pretrained("data/scribe")
    tokenizer = AutoTokenizer.from_pretrained("data/scribe")

It knows nothing of the world: all its text comes from `data/generators.py`.

## Data

Shares of rows in the four phases:

1. to step {turns[0]}, to write: {shares[0]};
2. to step {turns[1]}, letter functions, which take longest: {shares[1]};
3. to step {turns[2]}, to say again what stands before: {shares[2]};
4. to the end, all of it: {shares[3]}.

`twice` says words, prose or a table twice, never prose and a table together: that is what the tasks
ask for. Half of its restaurants have words in the wrong place, so that only copying tells them, and
only the second telling carries loss.

A row is {length} tokens of one skill; documents end with `<end>`. No row occurs twice: each is
drawn from (seed, step, row). In `in_context` rows the letters that are asked carry no loss, only the
answers do. Letters are written with spaces between them, so each is one token. The letter families
`second`, `middle`, `rotate_right`, `swap_first`, `reverse_upper` and `rotate_right_upper` never
occur in pretraining, nor do a quarter of the restaurants' names, nor any prompt of `data/tasks/`.

## Training

{steps} steps of {rows} x {length} tokens = {tokens:.1f} M tokens, AdamW (0.9, 0.95), weight decay
0.1 on matrices, peak rate {lr} after {warmup} steps, clipping at 1, seed {seed}. A cosine towards
step {horizon} in the first phase, to zero in the second. The third starts as from the files on disk,
from float16 weights with a new optimizer; its warm-up and cosine to zero reach to the end.
{minutes:.0f} minutes on {machine}.
Python {python}, torch {torch}, transformers {transformers}, tokenizers {tokenizers}.

To redo it (continues after a kill; a GPU is used when there is one):

    {command}

Loss on held-out rows, in nats per token (`train` is the mean over the steps since the last line):

{table}

![loss](loss.png)

"""
SETTINGS = ("steps", "turns", "horizon", "rows", "lr", "warmup", "seed", "hidden", "layers", "heads",
            "kv_heads", "ff", "every")


def arguments(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--steps", type=int, default=7400)
    p.add_argument("--turns", type=int, nargs=3, default=[2400, 5600, 6200],
                   help="steps at which the later phases start")
    p.add_argument("--horizon", type=int, default=4400, help="where the first cosine would end")
    p.add_argument("--rows", type=int, default=16, help="sequences in a batch")
    p.add_argument("--lr", type=float, default=2e-3)
    p.add_argument("--warmup", type=int, default=100)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--hidden", type=int, default=192)
    p.add_argument("--layers", type=int, default=5)
    p.add_argument("--heads", type=int, default=6)
    p.add_argument("--kv-heads", type=int, default=2)
    p.add_argument("--ff", type=int, default=512)
    p.add_argument("--every", type=int, default=100, help="steps between checkpoints")
    p.add_argument("--stop-after", type=int, default=0, help="stop early, as a kill would")
    p.add_argument("--cpu", action="store_true")
    p.add_argument("--runs", type=Path, default=HERE.parent / "runs" / "scribe")
    p.add_argument("--out", type=Path, default=HERE / "scribe")
    return p.parse_args(argv)


if __name__ == "__main__":
    args = arguments()
    result = pretrain(args)
    if not args.stop_after:
        write(*result, args)
