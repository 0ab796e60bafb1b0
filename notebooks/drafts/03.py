# %% [markdown]
# # 03 In-context learning
#
# **The claim in one sentence.** A language model can take on a new task from a few examples in its input, with no weight changed; the examples are paid for at every call and are gone after it.
#
# **Paper.** Brown et al. 2020, *Language Models are Few-Shot Learners*, arXiv:2005.14165, section 2; on what attention can compute, von Oswald et al. 2022, arXiv:2212.07677.
#
# **To have read.** Chapter 01. **Time.** About 30 minutes to read, about a minute to run.

# %%
# The book's one setup cell: one thread, a seed, the book's look.
import torch

from minipeft.lab import figures

torch.set_num_threads(1)
_ = torch.manual_seed(0)
figures.style()

# %% [markdown]
# **After this chapter you can**
#
# - *measure* how accuracy grows with the number of examples, and on which tasks;
# - *compute* what an example costs in tokens, memory and time, at every call;
# - *decide* between examples in the context and a small LoRA trained on the same examples.
#
# In-context learning is no leaf on the map of methods: nothing is trained. It is what every method has to beat.

# %%
figures.taxonomy(lit="none")

# %% [markdown]
# ## The problem
#
# The lecture's example: four scrambled words with their answers, and a fifth without one. The model is to find out from the examples what is wanted. The book's own small decoder, `scribe`, has two million parameters and was pretrained on text in which such lists of examples occur. Letters are written with spaces, so each is one token.

# %%
import sys

from minipeft.lab import loop, models, results, tasks

sys.path.insert(0, str(models.DATA))
import generators
import in_context

model, tokenizer = models.load("scribe")
prompt = "> t a c = c a t\n> w l o = o w l\n> e b e = b e e\n> x f o = f o x\n> n e h ="
said = loop.generate(model, tokenizer, [prompt], max_new_tokens=4)[0]
print(prompt, "->", said.split("\n")[0])

# %% [markdown]
# An example in the prompt is called a *shot*. With no shot the model has no way to know which function of the letters is meant. That is the smallest failing example.

# %%
bare, shown = "> k i t e =", "> l a m p = p l a m\n> b i r d = d b i r\n> s t e n = n s t e\n> k i t e ="
for text in (bare, shown):
    said = loop.generate(model, tokenizer, [text], max_new_tokens=5)[0]
    print(f"{text.count(chr(10))} shots:", said.split("\n")[0])

# %% [markdown]
# ## The idea, and what it costs
#
# Words first. A language model continues text. If the text is a list of questions with answers, the likeliest continuation of the last question is its answer *under whatever rule made the others*. Pretraining on many lists with many rules teaches a model to look for the rule. Fine-tuning stores a rule in the weights; in-context learning stores it nowhere.
#
# Let $\theta$ be the weights, $(x_i, y_i)$ the shots and $x$ the question.
#
# $$ \hat y = \arg\max_y \; p_\theta(y \mid x_1, y_1, \dots, x_k, y_k, x). $$
#
# **Step 1. It is a function of the prompt.** $\theta$ stands still, so the same prompt gives the same numbers.

# %%
ids = tokenizer(shown, return_tensors="pt", add_special_tokens=False)["input_ids"]
with torch.no_grad():
    assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)

# %% [markdown]
# **Step 2. The prompt grows by $s$ tokens a shot.** With $q$ tokens for the question a call has $n = q + k s$ tokens. For functions that keep $m$ letters, $s = 2m + 3$: two lists of letters, `>`, `=` and the line's end.

# %%
def tokens(k, m=4):
    pairs = [("a" * m, "b" * m)] * (k + 1)
    return len(tokenizer.encode(generators.in_context_query(pairs)[0]))


assert all(tokens(k) - tokens(0) == k * (2 * 4 + 3) for k in range(9))
print(f"question {tokens(0)} tokens, a shot {tokens(1) - tokens(0)}, a question with 8 shots {tokens(8)}")

# %% [markdown]
# **Step 3. Each token holds memory while the answer is written.** A key and a value per layer and key-value head: $2 \, L \, h_{kv} \, d_h$ numbers. The attention's work grows with $n^2$, all other work with $n$.

# %%
c = model.config
per_token = 2 * c.num_hidden_layers * c.num_key_value_heads * (c.hidden_size // c.num_attention_heads) * 4
with torch.no_grad():
    cache = model(input_ids=ids, use_cache=True).past_key_values
held = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
assert held == per_token * ids.shape[1]
print(f"{per_token:,} bytes a token; this prompt holds {held / 1e3:.1f} kB")

# %% [markdown]
# **Step 4. Attention can do what a gradient step would do.** Take a linear model $w$ that starts at 0, and one step of size $\eta$ on $\tfrac12 \sum_i (y_i - w \cdot x_i)^2$. The gradient at 0 is $-\sum_i y_i x_i$, so $w = \eta \sum_i y_i x_i$ and the prediction is
#
# $$ w \cdot x = \eta \sum_i y_i \, (x_i \cdot x). $$
#
# The right side is an attention without softmax: keys $x_i$, values $y_i$, query $x$. The weights of the model stand still; what a gradient step would have stored is computed anew in every forward pass. Trained transformers need not work this way. The identity says only that they could.

# %%
_ = torch.manual_seed(0)
X, y, x = (torch.randn(s, dtype=torch.float64) for s in ((6, 3), (6,), (3,)))
w = torch.zeros(3, dtype=torch.float64, requires_grad=True)
(0.5 * (y - X @ w).square().sum()).backward()
assert torch.allclose(-0.1 * w.grad @ x, 0.1 * (y * (X @ x)).sum(), atol=1e-12)

# %% [markdown]
# ## Built by hand: scoring an answer
#
# Greedy decoding writes the likeliest token, appends it, and goes on. It writes exactly the target if and only if each token of the target is the likeliest after the prompt and the target's tokens before it. So **one forward pass** on prompt and target tells whether the answer is right. That makes thousands of queries affordable. The line's end is part of the target: an answer that does not stop is wrong.

# %%
@torch.no_grad()
def right(rows):  # rows of (prompt, target); a list of True and False
    out = []
    for i in range(0, len(rows), 50):
        pairs = [(tokenizer.encode(p), tokenizer.encode(t)) for p, t in rows[i : i + 50]]
        batch = loop.collate([{"input_ids": p + t, "labels": [-100] * len(p) + t} for p, t in pairs], tokenizer)
        labels = batch.pop("labels")[:, 1:]
        guess = model(**batch).logits[:, :-1].argmax(-1)
        out += ((guess == labels) | (labels == -100)).all(1).tolist()
    return out


asked = in_context.queries("rotate_right", 2, 16)
written = loop.generate(model, tokenizer, [p for p, _ in asked], max_new_tokens=6)
assert [w.split("\n")[0].split() == t.split() for w, (_, t) in zip(written, asked)] == right(asked)
print("sixteen answers, written out and scored in one pass: the same verdicts")

# %% [markdown]
# ## Before any measurement: nothing changes
#
# The fingerprint of every weight, taken here. It is taken again at the end, after some thousands of calls.

# %%
import hashlib


def fingerprint(model):
    digest = hashlib.sha256()
    for name, t in sorted(model.state_dict().items()):
        digest.update(name.encode() + t.numpy().tobytes())
    return digest.hexdigest()


before = fingerprint(model)

# %% [markdown]
# ## Experiment 1: the k-shot curve
#
# **Question.** Does accuracy grow with the number of shots, and only for functions that pretraining has shown by name?
#
# **The families.** Eleven letter functions occur in pretraining (copy, reverse, first letter, ...). Six never do: `second`, `middle`, `rotate_right`, `swap_first`, `reverse_upper`, `rotate_right_upper`. Pretraining also shows rearrangements drawn at random, never one of these six.
#
# **Hypothesis.** Both groups start near zero and rise with $k$; the held-out group stays lower at every $k$.
#
# The full table (17 families, 100 queries for each $k$) comes from `data/in_context.py`. Two families are measured here again, one of each group.

# %%
stored = results.read("in_context")
curve = {(r["family"], r["size"]): r["right"] for r in stored["rows"] if r["kind"] == "curve"}
live = {}
for family in ("reverse", "rotate_right"):
    for k in (0, 1, 2, 4, 8):
        live[family, k] = sum(right(in_context.queries(family, k, 100)))
        assert abs(live[family, k] - curve[family, k]) <= 2, "the stored table is of another model"
    print(f"{family:14}" + "".join(f"{live[family, k]:5}" for k in (0, 1, 2, 4, 8)), " right of 100")

# %%
KS = (0, 1, 2, 4, 8)
groups = {"seen in pretraining": list(generators.TRAINED), "held out": list(generators.HELD_OUT)}
means = {}
for name, families in groups.items():
    for k in KS:
        means[name, k] = figures.interval([curve[f, k] / 100 for f in families])
    print(f"{name:20}", ", ".join(f"k={k}: {means[name, k][0]:.2f}±{means[name, k][1]:.2f}" for k in KS))

# %%
import matplotlib.pyplot as plt

LOOK = {"seen in pretraining": ("#4C566A", "o-"), "held out": ("#D08770", "D--")}
fig, ax = plt.subplots(figsize=(7.2, 3.8))
for name, (colour, mark) in LOOK.items():
    mid, half = zip(*(means[name, k] for k in KS))
    ax.plot(range(5), mid, mark, color=colour)
    ax.fill_between(range(5), [m - h for m, h in zip(mid, half)], [min(1, m + h) for m, h in zip(mid, half)],
                    color=colour, alpha=0.15)
ax.text(0.95, 0.99, "seen in pretraining", color="#4C566A", ha="right", fontweight="bold")
ax.text(1.15, 0.66, "held out", color="#D08770", fontweight="bold")
ax.set(xlabel="shots", ylabel="share of right answers", ylim=(-0.02, 1.06))
ax.set_xticks(range(5), KS)
ax.set_title("Two examples say most of it, also for functions never seen")
figures.describe("share of right answers against shots, with 95 % intervals over families. Both groups start near zero; "
                 "with one shot those seen in pretraining reach {:.2f} and those held out {:.2f}, with four {:.2f} and {:.2f}."
                 .format(*(means[n, k][0] for k in (1, 4) for n in LOOK)))

# %% [markdown]
# Both groups rise, and the held-out group is lower from one to four shots: the hypothesis holds there. With eight shots the two meet. One family explains it: `double` writes eight letters for four, so its eight shots no longer fit into what pretraining showed.

# %%
assert means["held out", 8][0] > 0.9 and means["held out", 0][0] < 0.05
assert means["held out", 1][0] < means["held out", 2][0] < means["held out", 4][0]
print("double:", [curve["double", k] for k in KS], "of 100; its prompt with eight shots has",
      len(tokenizer.encode(in_context.queries("double", 8, 1)[0][0])), "tokens at four letters")

# %% [markdown]
#
# What the figure does not say: the held-out functions are cousins of the ones seen. All move letters by position, some with capitals. A function of another kind (the next letter of the alphabet, had it not been in pretraining) would be a harder test.
#
# ### What a shot tells
#
# The lecture's unscrambling behaves differently, and the difference explains what shots do. A scrambled word of a known vocabulary has one sensible answer, so the model often unscrambles with *no* shot. Shots tell *which* task is meant; where the input gives the task away, they tell little.

# %%
for family in ("unscramble", "reverse"):
    counts = [sum(right(in_context.queries(family, k, 50))) / 50 for k in (0, 4)]
    print(f"{family:11} 0 shots {counts[0]:.2f}, 4 shots {counts[1]:.2f}")
    assert (counts[0] > 0.5) == (family == "unscramble") and counts[1] > 0.9

# %% [markdown]
# ## Experiment 2: the bill
#
# Tokens and cache come from steps 2 and 3. Time is measured and only drawn, since it belongs to this machine: 16 questions, the best of five calls.

# %%
import time


@torch.no_grad()
def seconds(k):
    texts = [p for p, _ in in_context.queries("reverse", k, 16)]
    batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    batch = {n: batch[n] for n in ("input_ids", "attention_mask")}
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        model(**batch)
        best = min(best, time.perf_counter() - start)
    return best


clock = [seconds(k) for k in KS]
assert clock[-1] > clock[0]
for k in KS:
    print(f"{k} shots: {tokens(k):3} tokens, {tokens(k) * per_token / 1e3:6.1f} kB of cache")

# %%
fig, (a, b) = plt.subplots(1, 2, figsize=(7.6, 3.2))
a.bar(range(5), [tokens(0)] * 5, color="#81A1C1")
a.bar(range(5), [tokens(k) - tokens(0) for k in KS], bottom=tokens(0), color="#D08770")
a.axhline(128, color="black", linestyle="--", linewidth=1)
a.text(-0.4, 130, "length of pretraining", fontsize=9, va="bottom")
a.text(2.6, 80, "shots", color="#D08770", fontweight="bold")
a.text(-0.4, 12, "question", color="#4C6A91", fontweight="bold")
a.set(xlabel="shots", ylabel="tokens in a call", ylim=(0, 145))
b.plot(range(5), [t / clock[0] for t in clock], "o-", color="#555555")
b.set(xlabel="shots", ylabel="time of a call (0 shots = 1)", ylim=(0, None))
for ax in (a, b):
    ax.set_xticks(range(5), KS)
a.set_title("The question is the small part")
b.set_title("Time follows tokens")
figures.describe("left, tokens in a call: 7 for the question with its mark and 11 more for each shot, 94 at eight shots, of 128; "
                 "right, the time of a call grows with the shots.")

# %% [markdown]
# The bill is paid at *every* call. A server can keep the cache of the shots and spare most of the computing, but not the memory, and not the window.
#
# ## Experiment 3: order
#
# **Question.** The shots are a set, the prompt is a sequence. Does their order matter? Lu et al. (arXiv:2104.08786) find large effects in big models on real text.
#
# **Hypothesis.** A little where all shots agree; a lot where they do not.
#
# First, shots that agree: 20 questions of `rotate_right`, each with three shots in all six orders.

# %%
import itertools
import random

rows = []
for i in range(20):
    *shots, ask = generators.family_pairs(random.Random(f"order/{i}"), "rotate_right", 4, 4)
    rows += [in_context.question([*order, ask]) for order in itertools.permutations(shots)]
grid = torch.tensor(right(rows)).view(20, 6).float()
flips = ((grid.mean(1) > 0) & (grid.mean(1) < 1)).float().mean().item()
print(f"right {grid.mean():.2f}; worst order {grid.mean(0).min():.2f}, best {grid.mean(0).max():.2f}; "
      f"questions whose answer depends on the order {flips:.2f}")
assert grid.mean() > 0.85 and flips < 0.3

# %% [markdown]
# Then shots that clash: two follow `rotate_right` (R), two follow `reverse` (V). The same four shots, in six arrangements, 40 questions each. Which rule does the answer follow?

# %%
R = generators._positional(*generators.HELD_OUT["rotate_right"])
V = generators._positional(*generators.TRAINED["reverse"])
PATTERNS = ("RRVV", "RVRV", "VRRV", "RVVR", "VRVR", "VVRR")


def clash(pattern, rule):
    out = []
    for i in range(40):
        words = random.Random(f"clash/{i}").sample(generators.BY_LENGTH[4], 5)
        r, v = iter(words[:2]), iter(words[2:4])
        pairs = [(word, R(word)) if p == "R" else (word, V(word))
                 for p, word in ((p, next(r if p == "R" else v)) for p in pattern)]
        out.append(in_context.question([*pairs, (words[4], rule(words[4]))]))
    return sum(right(out)) / 40


follows = {p: (clash(p, R), clash(p, V)) for p in PATTERNS}
for p, (r, v) in follows.items():
    print(f"{p}: rotate_right {r:.2f}, reverse {v:.2f}, neither {1 - r - v:.2f}")

# %%
fig, ax = plt.subplots(figsize=(7.2, 3.2))
for i, (r, v) in enumerate(follows.values()):
    for left, share, colour in ((0, r, "#D08770"), (r, v, "#4C566A"), (r + v, 1 - r - v, "#DDDDDD")):
        ax.barh(-i, share, left=left, color=colour)
        if share > 0.04:
            ax.text(left + share / 2, -i, f"{share:.2f}", ha="center", va="center", fontsize=9,
                    color="black" if colour == "#DDDDDD" else "white")
ax.set_yticks([-i for i in range(6)], PATTERNS)
for x0, text, colour in ((0, "rotate_right", "#D08770"), (0.35, "reverse", "#4C566A"), (0.7, "neither", "#888888")):
    ax.text(x0, 0.6, text, color=colour, fontweight="bold", fontsize=10)
ax.set(xlabel="share of answers", xlim=(0, 1), ylim=(-5.6, 1.0))
ax.grid(axis="y", visible=False)
ax.set_title("The same four shots, another order, another answer", pad=10)
spread = max(v for _, v in follows.values()) - min(v for _, v in follows.values())
figures.describe(f"bars of which rule the answers follow in six arrangements of four clashing shots; "
                 f"the share that follows reverse varies by {spread:.2f} with the order alone.")
assert spread > 0.2

# %% [markdown]
# The hypothesis holds. With shots that agree the order hardly matters to this model; with shots that clash it moves a large part of the answers, and many follow neither rule. The order is a setting that nobody chose on purpose. A trained model has such settings too (the order of its data), but only once.
#
# ## Experiment 4: against a LoRA trained on the same examples
#
# **Question.** There are $n$ examples of a held-out function. Put them in the context (at most eight fit), or train a LoRA on them and ask with no shot at all. Which is right more often?
#
# **Hypothesis.** With one and with four examples the context wins: training on so few fits them and nothing else. With 32 the LoRA wins.
#
# LoRA of rank 8 on query and value, 100 steps at rate 1e-2, both fixed in advance. Four held-out families, three draws of examples each, 100 questions per run, four letters throughout. One run here, the rest stored.

# %%
from minipeft.reparam import lora

shown, unseen = in_context.examples("rotate_right", 4, 0)
rows = [dict(zip(("prompt", "target"), in_context.question([pair]))) for pair in shown]
task = tasks.Task("rotate_right", [], rows, [], [])
student, _ = models.load("scribe")
_ = torch.manual_seed(0)
_ = lora.attach(student, "q_proj", "v_proj", r=8)
trained, total = loop.count(student)
ledger = loop.train(student, tokenizer, task, steps=100, lr=1e-2, batch_size=8, method=lora, seed=0)
alone = [in_context.question([pair]) for pair in unseen]
got = sum(in_context.right(student, tokenizer, alone))
here, = [r for r in stored["rows"] if (r["kind"], r["family"], r["size"], r["seed"]) == ("lora", "rotate_right", 4, 0)]
assert abs(got - here["lora"]) <= 12, "the stored run is of another model"
assert sum(right([in_context.question([*shown, pair]) for pair in unseen])) - here["in context"] in range(-2, 3)
print(f"{trained:,} of {total:,} trained; the live run agrees with the stored one")

# %%
SIZES = (1, 4, 32)
duel = {}
for n in SIZES:
    runs = [r for r in stored["rows"] if r["kind"] == "lora" and r["size"] == n]
    families = sorted({r["family"] for r in runs})
    for arm in ("in context", "lora"):  # the three draws of a family are averaged: four values
        duel[arm, n] = [sum(r[arm] for r in runs if r["family"] == f) / 300 for f in families]
    gap = [a - b for a, b in zip(duel["lora", n], duel["in context", n])]
    mean, half = figures.interval(gap)
    verdict = "indistinguishable" if abs(mean) < half else "LoRA" if mean > 0 else "context"
    print(f"{n:3} examples: in context {figures.interval(duel['in context', n])[0]:.2f}, "
          f"LoRA {figures.interval(duel['lora', n])[0]:.2f}, gap {mean:+.2f}±{half:.2f}: {verdict}")

# %%
fig, ax = plt.subplots(figsize=(7.2, 3.6))
for arm, colour, shift in (("in context", "#555555", -0.06), ("lora", figures.COLOURS["lora"], 0.06)):
    for i, n in enumerate(SIZES):
        mean, half = figures.interval(duel[arm, n])
        ax.plot([i + shift] * 4, duel[arm, n], "o", color=colour, alpha=0.35, markersize=4)
        ax.errorbar(i + shift, mean, yerr=half, fmt="D", color=colour, capsize=4)
    ax.plot([i + shift for i in range(3)], [figures.interval(duel[arm, n])[0] for n in SIZES], color=colour, linewidth=1)
ax.text(0.1, 0.96, "in context", color="#555555", fontweight="bold")
ax.text(0.35, 0.25, "LoRA, no shots", color=figures.COLOURS["lora"], fontweight="bold")
ax.set(xlabel="examples (in context: at most eight of them)", ylabel="share of right answers", ylim=(-0.05, 1.1))
ax.set_xticks(range(3), SIZES)
ax.set_title("With few examples the context wins; with many it is a draw")
figures.describe("share of right answers on held-out functions against the number of examples, four functions and their mean "
                 "with interval; in context from {:.2f} to {:.2f}, LoRA from {:.2f} to {:.2f}."
                 .format(*(figures.interval(duel[a, n])[0] for a in ("in context", "lora") for n in (1, 32))))

# %% [markdown]
# Half of the hypothesis holds. With one and four examples the context wins clearly. With 32 the LoRA does *not* win: both are at the ceiling, and the eight shots that fit were enough. What the LoRA has gained by then is the price: it answers with no shot at all.
#
# What the figure does not say: the context has an advantage here that real tasks seldom give it. Pretraining consisted of such lists, and the answers are short. The task files of the book ask for formats that pretraining never showed; there training wins, as chapters 10 and 30 show.
#
# ### When training pays
#
# Training costs once, shots cost at every call. Count token passes: a forward pass is 1, forward and backward together about 3.

# %%
question = tokens(0) + 5  # with its answer
training = 3 * 100 * 8 * question
extra = tokens(8) - tokens(0)
calls = training / extra
assert 200 < calls < 500
print(f"training {training:,} token passes, eight shots {extra} a call: even after about {round(calls, -1):.0f} calls")

# %% [markdown]
# Liu et al. (arXiv:2205.05638) make this argument for large models, and come to the title *few-shot parameter-efficient fine-tuning is better and cheaper than in-context learning*.
#
# ## The lecture's claims
#
# *No training required. Fast and flexible. But: prompt tokens consume the context window; it does not generalise or adapt across sessions; it cannot learn from errors.* Three checks. The weights after thousands of calls have the fingerprint from above. A question asked with shots and then without is answered as if it had never been shown. And telling the model that it was wrong is one more piece of text: in the next session it makes the same mistake.

# %% tags=["claim-13"]
def ask(text):
    return loop.generate(model, tokenizer, [text], max_new_tokens=5)[0].split("\n")[0]


session = [ask(bare), ask(shown), ask(bare)]
assert session[1] == "e k i t" and session[0] == session[2] != session[1]
assert fingerprint(model) == before, "a weight has changed"
assert tokens(8) > 10 * tokens(0)
print("without shots, with, and without again:", session)
print("Claim 13, no training, consumes the context, nothing persists: reproduced")

# %% [markdown]
# The other way to keep a task is to store it. The lecture's complaint about full fine-tuning was one model copy per task; here are the three sizes side by side.

# %% tags=["claim-12"]
copy = 2 * total  # bytes, at two a number
patch = 2 * trained
text = len(generators.in_context_lines(shown).encode())
assert copy == 4_289_664 and trained == 5 * 8 * ((192 + 192) + (192 + 64)) and copy > 80 * patch > 80 * 100 * text
print(f"to keep a task: full copy {copy / 1e6:.2f} MB, LoRA {patch / 1e3:.0f} kB, four shots {text} bytes")
print("Claim 12, full fine-tuning stores a full model copy for every task: proved")

# %% [markdown]
# ## It breaks: three ways
#
# **The window is full.** Twelve and sixteen shots exceed the 128 tokens of pretraining. The model accepts them, and falls apart.

# %%
full = {}
for k in (8, 12, 16):
    full[k] = sum(right(in_context.queries("rotate_right", k, 40))) / 40
    print(f"{k:2} shots, {tokens(k)} to {tokens(k, 5)} tokens: {full[k]:.2f} right")
assert full[8] > 0.9 and full[16] < 0.1

# %% [markdown]
# **The examples are wrong.** With the answers of four shots exchanged among them nothing is left; one wrong shot of four is mostly forgiven. The model reads the answers and not only the format.

# %%
sets = [generators.family_pairs(random.Random(f"b/{i}"), "rotate_right", 4, 5) for i in range(50)]


def share(change):
    return sum(right([in_context.question([*change(s[:4]), s[4]]) for s in sets])) / 50


good = share(lambda s: s)
one = share(lambda s: [(s[0][0], V(s[0][0])), *s[1:]])
moved = share(lambda s: [(a, s[(j + 1) % 4][1]) for j, (a, _) in enumerate(s)])
print(f"right shots {good:.2f}, one of four wrong {one:.2f}, answers exchanged {moved:.2f}")
assert good > one > moved and moved < 0.1

# %% [markdown]
# **The question leaves the format.** An arrow for the equals sign, or six letters where pretraining had three to five, and the rule is not applied. In-context learning generalises over what pretraining varied, and no further.

# %%
arrow = sum(right([(p.replace(" =", " ->"), t) for p, t in map(in_context.question, sets)])) / 50
longer = sum(right([in_context.question([*s[:4], (s[4][0] + "qz", R(s[4][0] + "qz"))]) for s in sets])) / 50
shorter = sum(right([in_context.question([*s[:4], (s[4][0][:3], R(s[4][0][:3]))]) for s in sets])) / 50
print(f"four shots of four letters: asked with an arrow {arrow:.2f}, six letters {longer:.2f}, three letters {shorter:.2f}")
assert arrow < 0.2 and longer < 0.2 and shorter > 0.8

# %% [markdown]
# ## Save, switch, remove
#
# The state of in-context learning is the text of the shots. Saving is copying a string, switching is another string, removing is leaving it out. There is nothing to merge. That is its strength: every method of this book has to earn its training.
#
# ## Questions
#
# 1. Why does one forward pass tell what greedy decoding would write?
# 2. A rule given in the context is computed anew at every call. Which part of it can a server keep, and what does keeping cost?
# 3. Why is unscrambling possible with no shot, and reversing not?
#
# ## Exercises
#
# **1** *(derive, easy, 5 minutes).* A function doubles each letter: four letters become eight. How many shots fit into 128 tokens together with the question and its answer? The question takes 6 tokens up to its equals sign, and the answer 8.

# %% tags=["exercise-1"]
answer = None

# %%
from minipeft.lab import exercises

exercises.check(answer, (128 - 6 - 8) // (4 + 8 + 3), "a shot holds both lists of letters and three more tokens")

# %% [markdown]
# **2** *(code, easy, 10 minutes).* Write `prompt_of(shots, question)`: the text that the model sees, in the book's format (`> a b = b a` and a line's end for each shot, then the question up to its equals sign).

# %% tags=["exercise-2"]
def prompt_of(shots, question):
    return None


answer = prompt_of([("cat", "tac"), ("owl", "lwo")], "bee")

# %%
exercises.check(answer, "> c a t = t a c\n> o w l = l w o\n> b e e =", "compare with the first prompt of this chapter, sign by sign")

# %% [markdown]
# **3** *(derive, middle, 10 minutes).* Llama 7B has 32 layers of 32 key-value heads with 128 numbers each, two bytes a number. How many gigabytes does the cache of 4,096 tokens hold?

# %% tags=["exercise-3"]
answer = None

# %%
exercises.check(answer, 2 * 32 * 32 * 128 * 2 * 4096 / 1e9, "keys and values, layers, heads, numbers, bytes, tokens", tol=1e-2)

# %% [markdown]
# **4** *(experiment, middle, 10 minutes).* Of `middle` with one shot and 50 queries (`in_context.queries("middle", 1, 50)`), what share is right? Use `right`.

# %% tags=["exercise-4"]
answer = None

# %%
exercises.check(answer, curve["middle", 1] / 100, "sum of the list over its length", tol=0.1)

# %% [markdown]
# **5** *(criticise, middle, 5 minutes).* A colleague says: *after a week of corrections in the chat, the model has learned our house style.* The chat's text is deleted at the end of each day. What has changed in the model: `"the weights"`, `"the cache"` or `"nothing"`?

# %% tags=["exercise-5"]
answer = None

# %%
exercises.check(answer, "nothing", "what does the fingerprint say, and what becomes of a cache?")

# %% [markdown]
# ## To remember
#
# - Shots tell a pretrained model which function is meant; nothing is stored, and the same prompt gives the same answer for ever.
# - Every shot is paid in tokens, memory and time at every call, and the window ends.
# - With few examples of a familiar kind the context beats training; with more, a small LoRA is as good and needs no shots.
#
# **Further reading.** Brown et al. 2020, section 2 and figure 1.2; von Oswald et al. 2022, section 2; Lu et al. 2021, sections 2 and 3; Liu et al. 2022, section 3.
#
# **Next.** Chapter 10 begins with the methods proper: adapters.
