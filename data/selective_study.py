"""The selective family compared: budgets, selection inside LoRA, time per step. For chapter 24.

    python data/selective_study.py            all parts, three hours on one core; goes on where it stopped
    python data/selective_study.py encoder    one part only: encoder, decoder, lora or clock

encoder  MiniLM on `acceptability`. Eligible: the encoder and the pooler; the word embeddings are left out for
         everybody, and the new head trains in every arm, on top of the budget. One budget is BitFit's own.
decoder  scribe on `TASK`. Eligible: everything. Llama has no biases, so no BitFit.
lora     the same task; what LoRA of rank 32 trains is cut to what LoRA of rank 2 trains.
clock    CPU seconds of one training step on MiniLM, all arms in turn, the median of the rounds.

Every arm has a rate of its own at every budget: the best validation loss of `results.walk`, which has a seed
that is not reported. A part that is done joins the stored results; the others stay as they were.
"""

import statistics
import sys
import time

import torch

from minipeft.lab import loop, models, results, tasks
from minipeft.reparam import lora
from minipeft.selective import bitfit, fish_mask, id3, pafi

SEEDS, SEARCH = (0, 1, 2, 3, 4), 10
TASK = "letters"
SELECT = ("random", "pafi", "fish", "id3", "id3 own")  # own: with a clock for each entry
STEPS = {"encoder": 120, "decoder": 80, "lora": 80}
BIASES = 25_728  # of MiniLM's encoder and pooler
BUDGETS = {"encoder": (2_000, BIASES, 300_000), "decoder": (2_000, 20_000, 200_000)}
ARMS = {  # and the rate in the middle of the first five
    "encoder": {**dict.fromkeys((*SELECT, "bitfit", "frozen"), 1e-2), "full": 3e-4},
    "decoder": {**dict.fromkeys(SELECT, 1e-2), "full": 1e-3},
    "lora": dict.fromkeys(("lora r=32", "lora r=2", "random", "pafi", "id3", "id3 own"), 1e-2),
}
LINEAR = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")  # the lecture's budgets come from these five
EXAMPLES = 32  # for the Fisher information, one at a time


def choose(model, arm, budget, seed, *targets, batches=None, steps=None, **how):
    """Let `budget` numbers train, chosen as `arm` chooses; the module to hand to loop.train."""
    if arm == "fish":
        fish_mask.attach(model, *targets, budget=budget, batches=batches, seed=seed, **how)
    elif arm.startswith("id3"):
        clock = "per_entry" if arm == "id3 own" else "global"
        id3.attach(model, *targets, budget=budget, steps=steps, clock=clock, **how)
    else:
        keep = "random" if arm == "random" else "smallest"
        pafi.attach(model, *targets, budget=budget, keep=keep, seed=seed, **how)
    return id3 if arm.startswith("id3") else None


def examples(task, tokenizer, seed):
    stream = loop.batches(task.train, tokenizer, 16, seed=seed)
    return [next(stream) for _ in range(EXAMPLES // 16)]


def encoder(arm, budget, seed, steps):
    task = tasks.load("acceptability")
    model, tokenizer = models.load("minilm", labels=2, seed=seed, device="cpu")
    torch.manual_seed(seed)
    method = None
    if arm in ("full", "frozen"):
        model.requires_grad_(False)
        for part in (model.bert.encoder, model.bert.pooler) if arm == "full" else ():
            part.requires_grad_(True)
    elif arm == "bitfit":
        bitfit.attach(model, exclude=("embeddings", "classifier"))
    else:
        found = examples(task, tokenizer, seed) if arm == "fish" else None
        method = choose(model, arm, budget, seed, "encoder", "pooler", batches=found, steps=steps)
    models.unfreeze_head(model)
    return model, tokenizer, task, method


def decoder(arm, budget, seed, steps):
    task = tasks.load(TASK)
    model, tokenizer = models.load("scribe", device="cpu")
    torch.manual_seed(seed)
    if arm == "full":
        model.requires_grad_(True)
        return model, tokenizer, task, None
    found = examples(task, tokenizer, seed) if arm == "fish" else None
    return model, tokenizer, task, choose(model, arm, budget, seed, batches=found, steps=steps)


def inside_lora(arm, budget, seed, steps):
    task = tasks.load(TASK)
    model, tokenizer = models.load("scribe", device="cpu")
    torch.manual_seed(seed)
    r = 2 if arm == "lora r=2" else 32
    lora.attach(model, *LINEAR, r=r, alpha=2 * r)
    if arm.startswith("lora"):
        return model, tokenizer, task, None
    return model, tokenizer, task, choose(model, arm, budget, seed, steps=steps, among="trainable")


BUILD = {"encoder": encoder, "decoder": decoder, "lora": inside_lora}


@torch.no_grad()
def score(model, tokenizer, task, rows):
    """{"loss", "right"}: nats per label or target token, and the share of rows that are right."""
    if task.labels:
        found = loop.evaluate(model, tokenizer, rows)
        return {"loss": found["loss"], "right": found["accuracy"]}
    total = tokens = 0
    for i in range(0, len(rows), 50):
        inputs = loop.collate([loop.encode(r, tokenizer) for r in rows[i : i + 50]], tokenizer)
        n = (inputs["labels"][:, 1:] != -100).sum().item()
        total, tokens = total + model(**inputs).loss.item() * n, tokens + n
    some = rows[:100]
    texts = loop.generate(model, tokenizer, [r["prompt"] for r in some], max_new_tokens=24)
    right = sum(t == r["target"].strip() for t, r in zip(texts, some)) / len(some)
    return {"loss": total / tokens, "right": right}


def run(part, arm, budget, lr, seed):
    steps = STEPS[part]
    start = time.process_time()
    model, tokenizer, task, method = BUILD[part](arm, budget, seed, steps)
    trained = loop.count(model)[0] - sum(model.get_parameter(n).numel() for n in models.head(model))
    loop.train(model, tokenizer, task, steps=steps, lr=lr, seed=seed, method=method)
    out = {"trained": trained, "validation": score(model, tokenizer, task, task.validation)}
    if seed != SEARCH:
        out["test"] = score(model, tokenizer, task, task.test)
    return {**out, "cpu_seconds": round(time.process_time() - start, 1)}


def budgets(part, arm):
    if part == "lora":
        return (0,) if arm.startswith("lora") else (lora_budget(),)
    return BUDGETS[part] if arm in SELECT else (0,)


def lora_budget():
    """What LoRA of rank 2 trains."""
    model, _ = models.load("scribe", device="cpu")
    lora.attach(model, *LINEAR, r=2, alpha=4)
    return loop.count(model)[0]


def study(part):
    """(search, rows) of one part."""
    search, rows = [], []
    for arm, middle in ARMS[part].items():
        for budget in budgets(part, arm):
            place = {"part": part, "arm": arm, "budget": budget, "seed": SEARCH}
            tried = results.walk("selective_study", place, run, middle, lambda row: row["validation"]["loss"])
            search += tried
            jobs = [{**place, "lr": tried[0]["lr"], "seed": s} for s in SEEDS]
            rows += results.sweep("selective_study", jobs, run)
    if part == "decoder":  # the base as it stands
        rows += results.sweep("selective_study", [{"part": part, "arm": "frozen"}], untrained)
    return search, rows


def untrained(part, arm):
    model, tokenizer = models.load("scribe", device="cpu")
    task = tasks.load(TASK)
    return {"seed": None, "budget": 0, "test": score(model, tokenizer, task, task.test)}


def clock(part, rounds):
    """Median CPU seconds of one step, the arms in turn, and of choosing."""
    torch.manual_seed(0)
    task, ready, choosing, spent = tasks.load("acceptability"), {}, {}, {}
    for arm in ("full", "frozen", "bitfit", *SELECT):
        start = time.process_time()
        model, tokenizer, _, method = encoder(arm, BIASES, 0, rounds + 3)
        choosing[arm] = round(time.process_time() - start, 2)
        opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)
        ready[arm], spent[arm] = (model.train(), opt, method), []
    stream = loop.batches(task.train, tokenizer, 16, seed=0)
    for step in range(rounds + 3):
        batch = next(stream)
        for arm, (model, opt, method) in ready.items():
            start = time.process_time()
            model(**batch).loss.backward()
            opt.step()
            if method:
                method.advance(model, step)
            opt.zero_grad()
            spent[arm].append(time.process_time() - start)
    return {"rounds": rounds, "load_and_choose": choosing,
            "step": {arm: round(statistics.median(t[3:]), 4) for arm, t in spent.items()}}


def stored():
    """What earlier calls measured."""
    try:
        return results.read("selective_study")
    except FileNotFoundError:
        return {"rows": [], "search": [], "clock": None}


if __name__ == "__main__":
    torch.set_num_threads(1)
    for part in sys.argv[1:] or ["encoder", "decoder", "lora", "clock"]:
        if part == "clock":
            new = {"clock": results.sweep("selective_study", [{"part": part, "rounds": 15}], clock)[0]}
        else:
            search, rows = study(part)
            new = {"search": search, "rows": rows}
        old = stored()
        rows, search = ([r for r in old[k] if r["part"] != part] + new.get(k, []) for k in ("rows", "search"))
        results.write(
            "selective_study", rows, seeds=list(SEEDS), search_seed=SEARCH, task=TASK, steps=STEPS, batch=16,
            budgets=BUDGETS, examples=EXAMPLES, search=search, clock=new.get("clock", old["clock"]))
