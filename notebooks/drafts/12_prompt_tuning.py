# %% [markdown]
# # 12 · Prompt-tuning
#
# **In one sentence.** Let the first few embeddings of the input be any vectors, train them, and a frozen model does a task that is stored in $P\cdot d$ numbers; one batch may hold many tasks.
#
# **Paper.** Lester, Al-Rfou and Constant, *The Power of Scale for Parameter-Efficient Prompt Tuning*, EMNLP 2021, arXiv:2104.08691. Section 2 is the method, 3.2 the initialisation, figure 2 the mixed batch.
#
# **Read first.** [11 Prefix-tuning](11_prefix_tuning.ipynb): the sibling that trains keys and values in every layer.
#
# **Time.** 35 minutes to read, about 60 seconds to run on one core.

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
# 1. derive prompt-tuning from the embedding lookup, and show that a decoder's prompt is a special prefix;
# 2. place a prompt beside padded text, initialise it three ways, and run several tasks in one batch, in training and in generation;
# 3. judge the claim that prompts are weaker than prefixes when data is scarce, from seeds and intervals.

# %%
figures.taxonomy(lit="prompt")

# %% [markdown]
# ## The problem
#
# A prompt in words is chosen from a grid. With 920 tokens and four positions there are $7\times10^{11}$ prompts, most of them nonsense, and no gradient leads from one to the next. Here are the best and the worst of 40 random ones, on the code of chapter 11 (letters reversed, in capitals).

# %%
from minipeft.lab import loop, models, tasks

model, tokenizer = models.load("scribe")
task = tasks.load("letters")
rows = loop.collate([loop.encode(r, tokenizer) for r in task.test[:24]], tokenizer)


@torch.no_grad()
def loss_behind(ids):
    """Loss of 24 rows behind the same hard prompt."""
    front = ids.expand(24, -1)
    more = {"input_ids": front, "attention_mask": torch.ones_like(front), "labels": torch.full_like(front, -100)}
    joined = {k: torch.cat([more[k], rows[k]], 1) for k in rows}
    return model(**joined).loss.item()


losses = [loss_behind(torch.randint(2, 920, (1, 4))) for _ in range(40)]
print(f"loss behind 40 random prompts of four tokens: {min(losses):.2f} to {max(losses):.2f}")
assert min(losses) > 3

# %% [markdown]
# ## The idea
#
# The model never sees tokens. It sees rows of its embedding table. Nothing forces the first rows of the input to be rows of that table. Let them be any vectors, and let gradient descent write them. Everything behind them is the model as usual: the vectors get positions, pass through all layers, and the text attends to them.

# %% [markdown]
# ## The derivation, in six steps
#
# Letters, for the whole chapter: $E$ is the embedding table $(V, d)$, $X$ the text's embeddings $(T, d)$, $S$ the soft prompt $(P, d)$.
#
# **Step 1. A lookup is a product.** Row $i$ of $E$ is a one-hot vector times $E$. A prompt in words is a choice of $P$ one-hot vectors. Let the choice be any real weights and the products fill the span of $E$. With more tokens than dimensions that is all of $\mathbb{R}^d$, so train the $P$ vectors themselves.

# %%
E = model.model.embed_tokens.weight.detach()  # (920, 192)
onehot = torch.nn.functional.one_hot(torch.tensor([5, 17]), len(E)).float()
assert torch.equal(onehot @ E, E[[5, 17]])
print("rank of the table:", torch.linalg.matrix_rank(E.double()).item(), "of", E.shape[1])

# %% [markdown]
# **Step 2. Concatenate.** The input becomes $[S; X]$ with $P+T$ rows. This *is* a longer sequence: the lecture's formula for prefix-tuning, $X' = [P; X]$ with shape $(n+m)\times d$, describes this chapter's method (claim 20 is settled in chapter 11).

# %%
S = torch.randn(3, 192)
X = E[torch.tensor([30, 31, 32, 33])]
assert torch.cat([S, X]).shape == (3 + 4, 192)

# %% [markdown]
# **Step 3. The gradient passes through the whole model.** $\partial L/\partial S$ is the gradient at the input. No weight's gradient is needed, and no optimiser state but that of $P\cdot d$ numbers. The activations of every layer are, for backpropagation runs through all of them.
#
# **Step 4. Slots are tokens.** They have an order: permute them and the output changes, other than with a prefix. No loss is taken at a slot. The last slot does predict the first word of the text, which in words nothing predicts.

# %%
from minipeft.additive import prompt_tuning

toy = models.load("scribe", dtype=torch.float64)[0]
(place,) = prompt_tuning.attach(toy, length=3)
soft = toy.get_submodule(place).prompt  # (tasks, P, d)
with torch.no_grad():
    y = toy(**rows).logits
    soft.copy_(soft.flip(1))
    moved = (toy(**rows).logits - y)[rows["labels"] != -100].abs().max()
print(f"slots reversed: the logits move by up to {moved:.1f}")
assert moved > 0.1 and y.shape[1] == rows["input_ids"].shape[1]  # logits come back for the text alone

# %% [markdown]
# **Step 5. In a decoder, a prompt is a prefix.** The slots stand first and see only each other, so their keys and values do not depend on the text. Compute them once, hand them to every layer as a prefix, and the text cannot tell the difference. Prompts are those prefixes that the model itself can produce from $P\cdot d$ numbers: a subset of what chapter 11 can reach. In an encoder the slots see the text, and the equivalence ends.

# %%
from minipeft.additive import prefix_tuning

ids = torch.tensor([[40, 41, 42, 43, 44]])
with torch.no_grad():
    by_prompt = toy(ids).logits
    out = toy(ids, use_cache=True)
pairs = [(layer.keys[0, :, :3], layer.values[0, :, :3]) for layer in out.past_key_values.layers]
twin = models.load("scribe", dtype=torch.float64)[0]
places = prefix_tuning.attach(twin, length=3)
prefix_tuning.load(twin, {f"{p}.{n}": t for p, kv in zip(places, pairs) for n, t in zip("KV", kv)})
with torch.no_grad():
    by_prefix = twin(ids, position_ids=torch.arange(3, 8)[None]).logits
print("a prompt of 3 slots as a prefix: differs by less than 1e-12:", (by_prefix - by_prompt).abs().max().item() < 1e-12)
assert (by_prefix - by_prompt).abs().max() < 1e-12

# %% [markdown]
# **Step 6. Count.** $P\cdot d$ per task, nothing per layer. With the paper's 100 slots:

# %% tags=["claim-22"]
sizes = {"T5-small": (512, 60_506_624), "T5-base": (768, 222_903_552), "T5-XXL": (4096, 11_135_332_352),
         "GPT-2": (768, 124_439_808), "LLaMA-7B": (4096, 6_738_415_616)}
share = {name: 100 * 100 * d / total for name, (d, total) in sizes.items()}
print({name: f"{s:.3f} %" for name, s in share.items()})
ours = 100 * 100 * 192 / loop.count(model)[1]
print(f"the book's decoder: {ours:.2f} %; 100 slots stay below 0.1 % from {100 * 192 / 1e-3 / 1e6:.0f} million numbers on, at this width")
assert max(share.values()) < 0.1 < ours
print("Claim 22, a prompt is below 0.1 % of the model: proved (for the usual sizes; false for a small model)")

# %% [markdown]
# ## Built by hand
#
# Give the slots ids of their own, beyond the vocabulary. Then masks, positions, caches and `generate()` need no special case: a slot is a token whose embedding trains.

# %%
class HandEmbedding(torch.nn.Module):
    def __init__(self, base, S):
        super().__init__()
        self.base, self.S = base, torch.nn.Parameter(S)

    def forward(self, ids):
        slot = ids - self.base.num_embeddings  # 0 .. P-1 at a slot, negative at a word
        words = self.base(ids.masked_fill(slot >= 0, 0))
        return torch.where(slot[..., None] >= 0, self.S[slot.clamp(min=0)], words)

# %% [markdown]
# Placing: the slots go next to the text. In a batch padded on the left they stand *behind* the padding. Positions are counted from the mask.

# %%
def place_by_hand(ids, mask, P, first):
    new_ids, new_mask = [], []
    for row, real in zip(ids.tolist(), mask.tolist()):
        start = real.index(1)
        new_ids.append(row[:start] + list(range(first, first + P)) + row[start:])
        new_mask.append(real[:start] + [1] * P + real[start:])
    mask = torch.tensor(new_mask)
    return {"input_ids": torch.tensor(new_ids), "attention_mask": mask,
            "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


print(place_by_hand(torch.tensor([[0, 0, 7, 8]]), torch.tensor([[0, 0, 1, 1]]), 2, 920)["input_ids"].tolist())

# %%
import copy

package, hand = copy.deepcopy(model), copy.deepcopy(model).requires_grad_(False)
prompt_tuning.attach(package, length=10)
S = prompt_tuning.state(package)["model.embed_tokens.prompt"][0]
hand.model.embed_tokens = HandEmbedding(hand.model.embed_tokens, S)
inputs = place_by_hand(rows["input_ids"], rows["attention_mask"], 10, 920)
real = rows["labels"] != -100
with torch.no_grad():
    by_hand = hand(**inputs).logits[:, 10:]  # left padding: the text keeps the right end
    assert torch.equal(by_hand[real], package(**rows).logits[real])
print("equal, bit for bit")

# %%
import inspect

print(inspect.getsource(prompt_tuning.SoftEmbedding.forward))

# %% [markdown]
# ## Invariants, before any training
#
# The embeddings of real words are those words, bit for bit. A padded row is the row alone. Nothing but the prompt trains, and the vocabulary keeps its rows: the prompt is a copy.

# %%
context = "\n".join(r["prompt"] + r["target"] for r in task.train[:4]) + "\n"
words = tokenizer(context, return_tensors="pt", add_special_tokens=False)["input_ids"][0]
spoken = copy.deepcopy(model)
prompt_tuning.attach(spoken, length=len(words), init=words[:, None].tolist())
text = tokenizer(task.test[0]["prompt"], return_tensors="pt", add_special_tokens=False)["input_ids"]
with torch.no_grad():
    as_words = model(torch.cat([words[None], text], 1)).logits[:, len(words):]
    as_prompt = spoken(text).logits
    padded = spoken(torch.cat([torch.zeros(1, 6).long(), text], 1),
                    attention_mask=torch.cat([torch.zeros(1, 6), torch.ones(text.shape)], 1).long()).logits[:, 6:]
assert torch.equal(as_prompt, as_words)
torch.testing.assert_close(padded, as_prompt, rtol=1e-4, atol=1e-4)
trained, total = loop.count(spoken)
assert trained == len(words) * 192
print(f"{trained:,} of {total:,} numbers train = {100 * trained / total:.2f} %")

# %% [markdown]
# ## Experiment 1: prompt against prefix, with little data
#
# **Question.** The lecture says that prompt-tuning is less effective than prefix-tuning in low-data regimes. Is it, on this decoder?
#
# **Set-up.** The code of letters, 16, 64 or 256 training rows, five seeds, 120 steps of 16. Both methods start from the same four rows as a context: the prompt from their embeddings, the prefix from their keys and values. By step 5 they are then *the same function at step 0*, and differ only in what trains. Each method's rate is the best of three by validation loss at 64 rows, with a seed of its own.
#
# **Hypothesis.** As in the lecture: at 16 rows the prefix is better by more than two standard errors, and the gap shrinks with data.
#
# The runs are stored by `data/low_data.py`; one of them is run again here.

# %%
import random
from dataclasses import replace

from minipeft.lab import results

stored = results.read("low_data")
run = next(r for r in stored["rows"] if (r["arm"], r["size"], r["seed"]) == ("prompt", 64, 0))
few = random.Random(0).sample(task.train, 64)
context = "\n".join(r["prompt"] + r["target"] for r in few[:4]) + "\n"
words = tokenizer(context, return_tensors="pt", add_special_tokens=False)["input_ids"][0]
tuned = copy.deepcopy(model)
prompt_tuning.attach(tuned, length=len(words), init=words[:, None].tolist())
ledger = loop.train(tuned, tokenizer, replace(task, train=few), steps=stored["steps"], lr=run["lr"], seed=0)

# %%
@torch.no_grad()
def score(model, rows, **more):
    """Loss per target token, and the share of rows whose every target token is the likeliest."""
    inputs = loop.collate([loop.encode(r, tokenizer) for r in rows], tokenizer)
    out, labels = model(**inputs, **more), inputs["labels"]
    right = (out.logits[:, :-1].argmax(-1) == labels[:, 1:]) | (labels[:, 1:] == -100)
    return out.loss.item(), right.all(1).float().mean().item()


loss, exact = score(tuned, task.test)
print(f"prompt, 64 rows, seed 0: all letters right in {exact:.2f}, stored {run['exact test']:.2f}")
assert abs(exact - run["exact test"]) < 0.1, "the stored run and this one differ"

# %%
SIZES = (16, 64, 256)
table = {(arm, n): [r for r in stored["rows"] if (r["arm"], r["size"]) == (arm, n)]
         for arm in ("prefix", "prompt") for n in SIZES}
for (arm, n), part in table.items():
    cells = [figures.interval([r[f"{k} test"] for r in part]) for k in ("loss", "exact")]
    print(f"{arm} {n:4} rows: loss {cells[0][0]:.2f} +- {cells[0][1]:.2f}   all right {cells[1][0]:.2f} +- {cells[1][1]:.2f}")
print("numbers that train, seed 0:", {arm: table[arm, 16][0]["trained"] for arm in ("prefix", "prompt")})

# %%
import matplotlib.pyplot as plt

fig, axes = plt.subplots(1, 2, figsize=(8.2, 3.6))
for ax, (key, unit) in zip(axes, (("loss test", "test loss, nats per token"), ("exact test", "all letters right"))):
    for arm, shift in (("prefix", 0.94), ("prompt", 1.06)):
        colour = figures.COLOURS[arm]
        stats = [figures.interval([r[key] for r in table[arm, n]]) for n in SIZES]
        for n in SIZES:
            ax.plot([n * shift] * 5, [r[key] for r in table[arm, n]], "o", color=colour, alpha=0.35, markersize=4)
        ax.errorbar([n * shift for n in SIZES], [m for m, _ in stats], yerr=[h for _, h in stats],
                    color=colour, marker="D", capsize=4, label=f"{arm}-tuning")
    ax.set(xscale="log", xlabel="training rows (log scale)", ylabel=unit, xticks=SIZES, xticklabels=SIZES)
    ax.minorticks_off()
axes[1].legend(loc="upper left")
TITLE
figures.describe("test loss and share of rows with all letters right against 16, 64 and 256 training rows, for prefix "
                 "and prompt; five seeds as dots, the mean with its 95 % interval.")

# %% tags=["claim-24"]
import statistics

VERDICT

# %% [markdown]
# SAYS
#
# ## Experiment 2: several tasks in one batch
#
# A prompt is chosen per row: `bank[task_ids]` is a gather of shape $(N, P, d)$. One model then serves many tasks at once. Below, row by row, the trained prompt and an untrained one take turns.

# %%
both = copy.deepcopy(model)
(place,) = prompt_tuning.attach(both, length=len(words), tasks=2)
bank = both.get_submodule(place).prompt
with torch.no_grad():
    bank[0] = prompt_tuning.state(tuned)["model.embed_tokens.prompt"][0]
    bank[1] = model.model.embed_tokens(words)  # the four examples, as they were
some = loop.collate([loop.encode(r, tokenizer) for r in task.test[:6]], tokenizer)
turns = torch.arange(6) % 2
mixed = both(**some, task_ids=turns).logits

# %% tags=["claim-23"]
worst = 0.0
for i, t in enumerate(turns.tolist()):
    alone = {k: v[i : i + 1, -int(some["attention_mask"][i].sum()) :] for k, v in some.items()}  # no padding either
    y = both(**alone, task_ids=[t]).logits[0]
    worst = max(worst, (mixed[i, -len(y) :] - y).abs().max().item())
gradient = torch.autograd.grad(mixed[turns == 0].sum(), bank)[0]
assert worst < 1e-3 and gradient[1].eq(0).all() and gradient[0].abs().max() > 0
print("Claim 23, several tasks run in one batch: proved (each row equals that row alone, and a task without rows "
      "gets a gradient of zero)")

# %%
prompts = [r["prompt"] for r in task.test[:6]]
for t, r, text in zip(turns.tolist(), task.test, loop.generate(both, tokenizer, prompts, max_new_tokens=10, task_ids=turns)):
    print(f"task {t}: {r['prompt'].splitlines()[0]:18} -> {text[:24]}")

# %% [markdown]
# ## An encoder with a pooler
#
# MiniLM classifies by its first token, `[CLS]`: the pooler reads what stands first. Put the prompt before it, as HF peft does, and the pooler reads slot 0 in its place. The file leaves `[CLS]` first and puts the prompt behind it; `after=0` gives the other order.

# %%
bert, bert_tokenizer = models.load("minilm", labels=2, seed=0)
reviews = loop.collate([loop.encode(r, bert_tokenizer) for r in tasks.load("sentiment").test[:16]], bert_tokenizer)
reviews.pop("labels")
held = {}
for after in (1, 0):
    net = copy.deepcopy(bert)
    torch.manual_seed(0)
    prompt_tuning.attach(net, length=10, after=after)
    net.register_forward_pre_hook(lambda m, args, kw: held.update(ids=kw["input_ids"]), with_kwargs=True)
    net.bert.pooler.register_forward_hook(lambda m, args, out: held.update(pooled=out))
    with torch.no_grad():
        net(**reviews)
        cosine = torch.cosine_similarity(held["pooled"], bert.bert(**reviews).pooler_output).mean()
    print(f"the pooler reads {'[CLS] ' if after else 'slot 0'}; cosine to the pooled vector without a prompt {cosine:.2f}")
    assert (held["ids"][:, 0] == bert_tokenizer.cls_token_id).all() == bool(after)

# %% [markdown]
# The cosines hardly differ: ten foreign vectors in the input disturb MiniLM more than the order does, and a head that trains from scratch can learn to read either place. The order matters for what was pretrained to read `[CLS]`, and it matters for anyone who compares two libraries.

# %% [markdown]
# ## Where to start
#
# The paper compares three starts: uniform in $\pm0.5$, rows of frequent words, and the words of the classes (the mean, where a word has several tokens). Random vectors are far longer than the words they stand beside.

# %%
torch.manual_seed(0)
for init in ("random", "vocabulary", [[int(i)] for i in words[:10]]):
    net = copy.deepcopy(model)
    (place,) = prompt_tuning.attach(net, length=10, init=init)
    norm = net.get_submodule(place).prompt.norm(dim=-1).mean()
    name = init if isinstance(init, str) else "words"
    print(f"{name:11} mean norm {norm:.2f}, words of the table {E.norm(dim=-1).mean():.2f}; "
          f"loss at step 0 {score(net, task.test[:50])[0]:.2f}")

# %% [markdown]
# ## It breaks
#
# **A view is not a copy.** A prompt that shares storage with the table trains the vocabulary with it, and with tied output weights the scores too.

# %%
table = torch.nn.Embedding(6, 3)
view = torch.nn.Parameter(table.weight.data[:2])  # no clone
start = table.weight.detach().clone()
torch.optim.SGD([view], lr=1.0).zero_grad()
view.grad = torch.ones_like(view)
torch.optim.SGD([view], lr=1.0).step()
print("rows of the table that moved:", (table.weight != start).any(1).sum().item())
assert (table.weight != start).any()

# %% [markdown]
# **The prompt before the padding.** In a batch padded on the left, a prompt at column 0 stands far from its text, and positions count the gap. The same row, placed both ways:

# %%
gap = torch.zeros(1, 6).long()
far = {"input_ids": torch.cat([torch.arange(920, 930)[None], gap, text], 1),
       "attention_mask": torch.cat([torch.ones(1, 10), gap, torch.ones(text.shape)], 1).long()}
with torch.no_grad():
    alone = package(text).logits
    near = package(torch.cat([gap, text], 1), attention_mask=far["attention_mask"][:, 10:]).logits[:, 6:]
    wrong = hand(**far).logits[:, 16:]
print(f"next to the text: off by {(near - alone).abs().max():.3f}; before the padding: off by {(wrong - alone).abs().max():.1f}")
assert (wrong - alone).abs().max() > 0.1 > (near - alone).abs().max()

# %% [markdown]
# **A task that is absent still moves.** Its gradient is zero and not `None`, so weight decay and momentum act on it. Mix every task into every batch, or set both to zero.

# %%
optimizer = torch.optim.AdamW([bank], lr=0.1, weight_decay=0.5)
absent = bank[1].detach().clone()
both(**some, task_ids=torch.zeros(6).long()).loss.backward()
optimizer.step()
print(f"the absent task's prompt shrank to {(bank[1].norm() / absent.norm()).item():.2f} of its norm")
assert bank[1].norm() < absent.norm()

# %% [markdown]
# ## Save, switch, take out
#
# A task is one file of $P\cdot d$ numbers. There is no `merge`: what the slots do depends on the text.

# %%
import pathlib
import tempfile

from minipeft.lab import store

folder = pathlib.Path(tempfile.mkdtemp())
size = store.save(folder / "letters.safetensors", tuned, prompt_tuning)
other = copy.deepcopy(model)
prompt_tuning.attach(other, length=len(words), init="random")
store.load(folder / "letters.safetensors", other, prompt_tuning)
assert score(other, task.test[:50]) == score(tuned, task.test[:50])
prompt_tuning.detach(other)
assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), model.state_dict().values()))
print(f"{size / 1e3:.0f} kB; taken out, the base is back bit for bit")

# %% [markdown]
# ## The row in the ledger

# %%
row = {"trained numbers": ledger.trained, "share of the model, %": 100 * ledger.trained / total,
       "gradients, MB": ledger.gradient_bytes / 1e6, "AdamW's state, MB": ledger.optimizer_bytes / 1e6,
       "to store per task, MB": size / 1e6, "more tokens per row": len(words)}
for name, value in row.items():
    print(f"{name:22} {value:,.3f}" if isinstance(value, float) else f"{name:22} {value:,}")
assert ledger.optimizer_bytes == 2 * 4 * ledger.trained

# %% [markdown]
# ## Recall
#
# 1. Why can a prompt in words not be found by gradient descent, and a soft one can?
# 2. Why is every prompt of a decoder a prefix, and not every prefix a prompt?
# 3. Which labels stand at the slots, and which slot predicts a word?
# 4. Why must positions be counted from the mask?
# 5. What happens to a classifier whose prompt stands before `[CLS]`?
#
# ## Exercises
#
# Solutions are in [solutions/12_prompt_tuning.ipynb](solutions/12_prompt_tuning.ipynb).
#
# **1. Derive (easy, 5 minutes).** A model of width 4096 and 32 layers, 32 heads of keys and values of 128. How many times as many numbers has a prefix as a prompt of the same length?

# %% tags=["exercise-1"]
answer_1 = None  # a number

# %%
from minipeft.lab import exercises

exercises.check(answer_1, 64, "2 L P k d_h over P d")

# %% [markdown]
# **2. Code (easy, 10 minutes).** Write `gather(bank, task_ids, X)`: `bank` is $(tasks, P, d)$, `X` is $(N, T, d)$; the result is $(N, P+T, d)$ with each row's own prompt in front.

# %% tags=["exercise-2"]
def gather(bank, task_ids, X):
    return None

# %%
torch.manual_seed(5)
B5, X5, t5 = torch.randn(3, 2, 4), torch.randn(5, 6, 4), torch.tensor([2, 0, 1, 2, 2])
expected = torch.stack([torch.cat([B5[t], x]) for t, x in zip(t5, X5)])
exercises.check(gather(B5, t5, X5), expected, "is each row's own prompt in front?")

# %% [markdown]
# **3. Code (medium, 15 minutes).** Write `labels_of(labels, mask, P)` for a batch padded on either side: $-100$ at the $P$ slots, which stand right before the first real token.

# %% tags=["exercise-3"]
def labels_of(labels, mask, P):
    return None

# %%
L6 = torch.tensor([[-100, -100, 5, 6], [7, 8, -100, -100]])
M6 = torch.tensor([[0, 0, 1, 1], [1, 1, 0, 0]])
right = torch.tensor([[-100, -100, -100, -100, 5, 6], [-100, -100, 7, 8, -100, -100]])
exercises.check(labels_of(L6, M6, 2), right, "one row's text begins at column 2, the other's at column 0")

# %% [markdown]
# **4. Derive (medium, 10 minutes).** An ensemble of $N$ prompts by majority vote (the paper's section 6) costs one batch of $N$ rows. How many numbers are stored for 5 prompts of 100 slots on T5-XXL ($d = 4096$), and how many for 5 fully tuned models of 11,135,332,352? Give the ratio, rounded to a whole number.

# %% tags=["exercise-4"]
answer_4 = None  # a whole number

# %%
exercises.check(answer_4, round(11_135_332_352 / (100 * 4096)), "both sides have the factor 5")

# %% [markdown]
# **5. Criticise (hard, 15 minutes).** A report says: "with learning rate 0.3, as in the paper, our prompt under AdamW with weight decay 0.01 forgets everything." The paper uses Adafactor and a decay of 0.00001. AdamW multiplies a weight by $1 - \text{lr}\cdot\text{decay}$ in each step. By which factor does decay alone shrink the prompt in 1000 steps? (two digits)

# %% tags=["exercise-5"]
answer_5 = None  # a number

# %%
exercises.check(answer_5, (1 - 0.3 * 0.01) ** 1000, "one factor per step, a thousand of them", tol=0.005)

# %% [markdown]
# ## To remember
#
# - A soft prompt is $P$ trained embeddings before the text: $P\cdot d$ numbers, one input-side copy per task, the model untouched.
# - Slots are tokens with positions and an order. Next to the text, positions from the mask, no loss at a slot, `[CLS]` first.
# - In a decoder a prompt is a prefix that the model computes itself. Tasks mix within a batch by one gather.
#
# **Further reading.** The paper's sections 3.2 (what matters when), 5 (domain shift) and 6 (ensembling).
#
# **Next.** Chapter 20 leaves the additive family: BitFit trains biases that are already there.
