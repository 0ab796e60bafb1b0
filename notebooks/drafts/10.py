# %% [markdown]
# # 10 Adapters
#
# **The claim in one sentence.** A small network placed after every sub-layer of a frozen Transformer, almost the identity at first, learns a task with a few per cent of the parameters; the price is that it stays in the model at inference.
#
# **Paper.** Houlsby et al., *Parameter-Efficient Transfer Learning for NLP*, ICML 2019 (arXiv:1902.00751).
#
# **To have read.** [Chapter 02](02_full_finetuning.ipynb), and how a Transformer layer is put together. **Time.** About 35 minutes to read, about 90 seconds to run.

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
# - *derive* how far a fresh adapter is from the identity, and choose its starting scale;
# - *place* adapters in BERT, GPT-2, Llama and T5 without editing a line of the model's source;
# - *measure* what they cost at inference, and *prove* that they cannot be folded into the weights.

# %%
figures.taxonomy(lit="adapter")

# %% [markdown]
# ## The problem
#
# Freeze a pretrained network and add new layers inside it: then only the new layers need training and storing. The trouble is the first step. A new layer with the usual random start stands between layers that were trained to talk to each other, and what they say is lost. The smallest failing example puts one ordinary linear layer behind each sub-layer of MiniLM and asks what is left of its sentence vectors.

# %%
import copy

from torch import nn
from torch.nn import functional as F

from minipeft.lab import loop, models, tasks

base, tokenizer = models.load("minilm", labels=2)
task = tasks.load("sentiment")
inputs = loop.collate([loop.encode(r, tokenizer) for r in task.validation[:32]], tokenizer)
inputs = {k: v.to(base.device) for k, v in inputs.items() if k != "labels"}


@torch.no_grad()
def vectors(model):
    """One vector per sentence: the last layer's first token."""
    return model.bert(**inputs).last_hidden_state[:, 0]


before = vectors(base)

# %%
def with_layers(make):
    """MiniLM with `make()` behind the dropout that closes each sub-layer."""
    model = copy.deepcopy(base)
    for layer in model.bert.encoder.layer:
        for block in (layer.attention.output, layer.output):
            block.dropout = nn.Sequential(block.dropout, make().to(base.device))
    return model


_ = torch.manual_seed(0)
broken = with_layers(lambda: nn.Linear(384, 384))
kept = F.cosine_similarity(vectors(broken), before).mean().item()
assert kept < 0.5
print(f"cosine to the pretrained vectors: {kept:.2f}")

# %% [markdown]
# Little is left, and no training step was taken. The new layers have to start as nearly nothing.
#
# ## The idea, in plain words
#
# Let the new network *add a correction* to what it reads. Squeeze the $d$ numbers of a token through $m$ numbers, $m$ much smaller than $d$; bend them; spread them to $d$ again; add the result to what came in. If the weights are small, the correction is small, and the network starts as the pretrained one. It departs only where the task pays for it.
#
# ## Derivation
#
# ### Step 1: the adapter
#
# A token's vector $u \in \mathbb{R}^d$ is what a sub-layer is about to add to its residual stream. With $W_{down} \in \mathbb{R}^{m \times d}$ and $W_{up} \in \mathbb{R}^{d \times m}$,
#
# $$ A(u) = u + W_{up}\, \phi(W_{down} u + b_{down}) + b_{up}. $$
#
# The nonlinearity $\phi$ is GELU in the authors' code. The check: with $W_{up} = 0$ and $b_{up} = 0$ it is the identity, to the last bit.

# %%
class Bottleneck(nn.Module):
    def __init__(self, d, m, sigma=1e-3):
        super().__init__()
        self.down, self.up = nn.Linear(d, m), nn.Linear(m, d)
        for layer in (self.down, self.up):
            nn.init.trunc_normal_(layer.weight, 0, sigma, -2 * sigma, 2 * sigma)
            nn.init.zeros_(layer.bias)

    def forward(self, u):
        return u + self.up(F.gelu(self.down(u), approximate="tanh"))


# %%
toy, u = Bottleneck(12, 3, sigma=0.5).double(), torch.randn(7, 12).double()
nn.init.zeros_(toy.up.weight)
assert torch.equal(toy(u), u)
print("with W_up = 0, A(u) equals u")

# %% [markdown]
# ### Step 2: how far from the identity it starts
#
# For a small argument GELU is almost linear, $\phi(s) \approx s / 2$. So $A(u) - u \approx \tfrac12 W_{up} W_{down} u$. If $u$ has entries of variance 1 and the weights have standard deviation $\tau$, each entry of $W_{down}u$ has variance $d\tau^2$, and each entry of the correction has variance $\tfrac14 \cdot m\tau^2 \cdot d\tau^2$. Hence
#
# $$ \frac{\lVert A(u) - u \rVert}{\lVert u \rVert} \approx \tfrac12\, \tau^2 \sqrt{d\,m}. $$
#
# The authors cut their normal distribution at two standard deviations, which leaves $\tau = 0.88\,\sigma$. The *square* matters: a ten times smaller $\sigma$ starts a hundred times closer.

# %%
def distance(d, m, sigma):
    a, u = Bottleneck(d, m, sigma), torch.randn(400, d)
    return ((a(u) - u).norm() / u.norm()).item()


for sigma in (1e-3, 1e-2):
    formula = 0.5 * (0.88 * sigma) ** 2 * (768 * 64) ** 0.5
    measured = distance(768, 64, sigma)
    assert abs(measured / formula - 1) < 0.1
    print(f"sigma {sigma}: formula {formula:.1e}, measured {measured:.1e}")

# %% [markdown]
# ### Step 3: the gradients
#
# Write $s = W_{down}u + b_{down}$ and $z = \phi(s)$, tokens as rows, and $D$ for the gradient that arrives at $A(u)$. The chain rule gives
#
# $$ \partial W_{up} = D^\top z, \qquad g = (D\,W_{up}) \odot \phi'(s), \qquad \partial W_{down} = g^\top u, \qquad \partial u = D + g\,W_{down}. $$
#
# Two things can be read off. The gradient that flows *down* is $D$ plus a little: the adapter is no obstacle to the layers below. And if $W_{up} = 0$, then $g = 0$: at the first step $W_{down}$ stands still and $W_{up}$ moves, as $B$ does in LoRA.

# %%
toy = Bottleneck(12, 3, sigma=0.5).double()
u, D = torch.randn(7, 12).double().requires_grad_(), torch.randn(7, 12).double()
toy(u).backward(D)

s = toy.down(u).detach().requires_grad_()
z = F.gelu(s, approximate="tanh")
(slope,) = torch.autograd.grad(z.sum(), s)
g = (D @ toy.up.weight) * slope
assert torch.allclose(toy.up.weight.grad, D.T @ z) and torch.allclose(toy.down.weight.grad, g.T @ u)
assert torch.allclose(u.grad, D + g @ toy.down.weight)
print("the written gradients are autograd's")

# %% [markdown]
# ### Step 4: where it stands
#
# Twice in each layer: after the attention with its output projection, and after the second matrix of the FFN. Behind the dropout, before the residual is added:
#
# $$ \text{BERT:}\;\; y = \mathrm{LN}\bigl(x + A(\mathrm{dropout}(S(x)))\bigr), \qquad \text{GPT-2, Llama, T5:}\;\; y = x + A(\mathrm{dropout}(S(\mathrm{LN}(x)))). $$
#
# No source needs to change for that. In BERT, GPT-2 and T5 each sub-layer *ends* with a dropout module, and what wraps the dropout reads exactly $\mathrm{dropout}(S(x))$. Llama has no dropout there; its output projections are wrapped. `attach` derives these places from the model. The check recomputes one FFN block of MiniLM from its parts.

# %%
from minipeft.additive import adapter

_ = torch.manual_seed(0)
model = copy.deepcopy(base)
places = adapter.attach(model, bottleneck=32, sigma=0.5, norms=False)
block, plain = model.bert.encoder.layer[2].output, base.bert.encoder.layer[2].output
a = block.dropout
h, x = torch.randn(4, 1536, device=base.device), torch.randn(4, 384, device=base.device)
u = plain.dense(h)
correction = F.gelu(u @ a.W_down.T + a.b_down, approximate="tanh") @ a.W_up.T + a.b_up
assert torch.allclose(block(h, x), plain.LayerNorm(x + u + correction), atol=1e-5)
print(places[:2])

# %% [markdown]
# ### Step 5: LayerNorms, and the count
#
# The paper trains every LayerNorm as well. Its gain and bias are few and belong to the task, so they are stored with the adapters. With $L$ layers,
#
# $$ N = \underbrace{2L\,(2md + d + m)}_{\text{adapters}} + \underbrace{(2L + 1)\,2d}_{\text{LayerNorms of BERT}}. $$

# %%
def formula(L, d, m):
    return 2 * L * (2 * m * d + d + m) + (2 * L + 1) * 2 * d


_ = torch.manual_seed(0)
model = copy.deepcopy(base)
places = adapter.attach(model, bottleneck=32)
trained, total = loop.count(model)
assert trained == formula(6, 384, 32)
print(f"{len(places)} places, {trained:,} numbers train, {trained / total:.2%} of the model")

# %% [markdown]
# The norms are wrapped too. `TunedNorm` runs the model's own norm with a gain and a bias of its own, and keeps the pretrained ones beside them. That is why `detach` can give the base back bit for bit.
#
# ## By hand, until it equals the file
#
# The model at the top of the chapter is the whole method: a `Sequential` of the dropout and a bottleneck. Filled with the numbers of the package's adapters it must compute the same logits.

# %%
by_hand = with_layers(lambda: Bottleneck(384, 32))
package = [m for m in adapter.sites(model).values() if isinstance(m, adapter.Adapter)]
own = [m for m in by_hand.modules() if isinstance(m, Bottleneck)]
with torch.no_grad():
    for mine, theirs in zip(own, package, strict=True):
        mine.down.weight.copy_(theirs.W_down)
        mine.up.weight.copy_(theirs.W_up)
    difference = (by_hand(**inputs).logits - model(**inputs).logits).abs().max().item()
assert difference < 1e-6 and len(own) == 12
print("twelve adapters by hand give the package's logits")

# %% [markdown]
# The file itself, for comparison. It casts its thin matrices to the type of what it reads, so that a model in bfloat16 keeps adapters in float32 and pays no copy of its activations.

# %%
import inspect

print(inspect.getsource(adapter.Adapter.forward))

# %% [markdown]
# ## Before training
#
# Only adapters and norms train; the pooler, the embeddings and the matrices do not. Every token is handled alone, so a permutation of the tokens passes through.

# %%
state = adapter.state(model)
assert {n for n, p in model.named_parameters() if p.requires_grad} == set(state)
one = package[0]
u = torch.randn(2, 9, 384, device=base.device)
order = torch.randperm(9)
assert torch.allclose(one(u)[:, order], one(u[:, order]), atol=1e-6)
print(f"{len(state)} tensors train; each token is handled alone")

# %% [markdown]
# ### How near to the base is step 0?
#
# **Question.** How does the whole network, twelve adapters deep, depend on $\sigma$? **Hypothesis.** It follows the square of step 2 as long as the correction is small, and saturates when the correction is as large as what it corrects.

# %%
import matplotlib.pyplot as plt

sigmas, far = [1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0], []
for sigma in sigmas:
    _ = torch.manual_seed(0)
    fresh = copy.deepcopy(base)
    adapter.attach(fresh, bottleneck=64, sigma=sigma)
    far.append(((vectors(fresh) - before).norm() / before.norm()).item())
assert far[3] / far[1] > 30 and far[1] < 1e-3 < far[3] < 0.1 and far[-1] > 0.5

# %%
fig, ax = plt.subplots()
ax.loglog(sigmas, far, "o-", color=figures.COLOURS["adapter"])
guide = [far[1] * (s / 1e-3) ** 2 for s in sigmas[:6]]
ax.loglog(sigmas[:6], guide, ":", color="grey")
ax.annotate("slope 2", (1.5e-2, 1.5e-2 * guide[3] / 1e-2), color="grey", ha="left", va="top",
            xytext=(8, -12), textcoords="offset points")
for name, place in (("the authors' code", 1), ("the paper", 3)):
    ax.annotate(name, (sigmas[place], far[place]), xytext=(0, 22), textcoords="offset points",
                ha="right", arrowprops=dict(arrowstyle="-", color="grey"))
ax.axhline(1, color="grey", lw=0.8)
ax.set(xlabel="sigma of the start (log scale)", ylabel="relative change (log scale)",
       title="A fresh adapter is near the identity, with the square of sigma")
figures.describe("relative change of MiniLM's sentence vectors against the starting scale, log-log: a straight "
                 "line of slope 2 up to a sigma of about 0.03, where it reaches the size of the vectors and flattens.")

# %% [markdown]
# The paper writes $\sigma = 10^{-2}$ and its code uses $10^{-3}$. Both lie on the straight part. The figure says nothing about training; the paper reports that results hold up to $10^{-2}$ and get worse above.
#
# ## Training on real text
#
# **Question.** Does a width of 32 learn `sentiment`, a task of short reviews with irony and comparisons, in 120 steps? **Hypothesis.** It beats a head on the frozen encoder. The learning rate $10^{-3}$ was chosen on the validation rows from $3 \cdot 10^{-4}$, $10^{-3}$, $3 \cdot 10^{-3}$ and $10^{-2}$; the upper two do not learn at all.

# %%
model, tokenizer = models.load("minilm", labels=2, seed=0)
_ = torch.manual_seed(0)
_ = adapter.attach(model, bottleneck=32)
head = models.unfreeze_head(model)
ledger = loop.train(model, tokenizer, task, steps=120, lr=1e-3, method=adapter, seed=0)
logits = loop.predict(model, tokenizer, task.test)
labels = torch.tensor([r["label"] for r in task.test])
whole = (logits.argmax(-1) == labels).float().mean().item()
print(f"test accuracy {whole:.2f} with {ledger.trained:,} trained numbers, {ledger.share:.2%} of the model")

# %% [markdown]
# ### Does width matter?
#
# Three seeds each, run once by `data/adapter_width.py` and stored; the run above is one of them and must agree. The row *norms* trains the LayerNorms and holds the adapters at nothing. The frozen body, LoRA and full fine-tuning come from the book's table of tasks: the same rows, steps and seeds, each with its own learning rate.

# %%
from minipeft.lab import results

table = [r for r in results.read("tasks_table")["rows"] if r["task"] == "sentiment"]
runs = {arm: [r["test"] for r in table if r["arm"] == arm] for arm in ("frozen", "lora", "full")}
for row in results.read("adapter_width")["rows"]:
    name = "norms" if row["arm"] == "norms" else f"adapter m={row['arm']}"
    runs.setdefault(name, []).append(row["test"])
assert abs(runs["adapter m=32"][0] - whole) < 0.05, "the stored run and this one differ"
intervals = {name: figures.interval(values) for name, values in runs.items()}
for name, (mean, half) in intervals.items():
    print(f"{name:13} {mean:.2f} +- {half:.2f}")

# %%
fig, ax = plt.subplots(figsize=(7.2, 3.4))
order = ("frozen", "norms", "adapter m=4", "adapter m=32", "lora", "full")
figures.dots(ax, {name: runs[name] for name in order}, "test accuracy on sentiment (3 seeds, mean and 95 % interval)")
ax.axvline(0.5, color="#999999", linestyle=":")
ax.set_title("WIDTHTITLE")
WIDTHASSERT
figures.describe("WIDTHWORDS")

# %% [markdown]
# WIDTHTEXT
#
# ### Which layers did the work?
#
# The paper removes trained adapters *without retraining*, one layer at a time. Removing means $W_{up} = 0$ and $b_{up} = 0$, and a changed `state` can be loaded like any other. **Hypothesis**, from the paper: a single layer costs little, the lower ones least, and all of them together cost everything. The LayerNorms and the head stay as trained.

# %%
trained_state = adapter.state(model)


def without(layers):
    """Logits on the test rows with the adapters of these layers switched off."""
    off = [f"layer.{i}." for i in layers]
    changed = {k: v * 0 if any(o in k for o in off) and k.endswith("_up") else v for k, v in trained_state.items()}
    adapter.load(model, changed)
    return loop.predict(model, tokenizer, task.test)


alone = [without([i]) for i in range(6)]
upto = [without(range(i + 1)) for i in range(6)]
adapter.load(model, trained_state)

# %%
flips = lambda runs: [(r.argmax(-1) != logits.argmax(-1)).float().mean().item() for r in runs]
right = lambda runs: [(r.argmax(-1) == labels).float().mean().item() for r in runs]
fig, axes = plt.subplots(1, 2, figsize=(8.4, 3.6))
for ax, measure, unit in zip(axes, (flips, right), ("share of predictions that flip", "test accuracy")):
    ax.plot(range(6), measure(alone), "o-", color=figures.COLOURS["adapter"], label="this layer alone")
    ax.plot(range(6), measure(upto), "s--", color="black", label="layers 0 to this one")
    ax.set(xlabel="layer whose adapters are off", ylabel=unit)
axes[1].axhline(0.5, color="grey", lw=0.8)
axes[1].axhline(whole, color="grey", lw=0.8)
axes[1].annotate("all adapters on", (5, whole), ha="right", va="bottom", color="grey")
axes[0].legend()
axes[0].set_title("No single layer decides")
assert max(flips(alone)) < 0.2 and flips(upto)[-1] > max(flips(alone)) and whole - min(right(alone)) < 0.1
figures.describe("two panels over the six layers. Left, predictions that flip: few for any single layer, most in the "
                 "middle; more and more as layers 0 to this one are off. Right, test accuracy: nearly level for single "
                 "layers, a little lower with more layers off, never down to guessing.")

# %% [markdown]
# No single layer flips more than one prediction in ten. The two lowest layers cost little, as in the paper; so do the two highest here, and the middle does most. The second half of the hypothesis fails: with *all* adapters off the accuracy does not fall to guessing, because the tuned norms and the head are still there and carry a part of the task. The paper, on larger data, saw its models fall to the majority class. On 200 rows one point is two reviews; differences of 0.03 are noise, so the left panel, which compares row by row, says more than the right one.
#
# ## What the lecture claims
#
# ### Claim 17: down, nonlinearity, up, residual
#
# The slide's four parts are those of step 1. The residual inside the adapter is the part that carries the claim: with it and $W_{up} = 0$ the model is unchanged, without it the sub-layer is gone.

# %% tags=["claim-17"]
fresh = copy.deepcopy(base)
adapter.attach(fresh, bottleneck=32)
adapter.load(fresh, {k: v * 0 if k.endswith("W_up") else v for k, v in adapter.state(fresh).items()})
assert torch.equal(vectors(fresh), before)
print("Claim 17, an adapter is down, nonlinearity, up and a residual, and the identity at W_up = 0: proved")

# %% [markdown]
# ### Claim 18: 3.6 % of BERT-large
#
# The count needs no weights, only the configuration. On the `meta` device a model has shapes and no numbers.

# %%
import transformers as tf

with torch.device("meta"):
    large = tf.BertModel(tf.BertConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16,
                                       intermediate_size=4096))
N = loop.count(large)[1]
body = sum(p.numel() for p in large.encoder.parameters())
for m in (8, 64, 256):
    n = formula(24, 1024, m)
    print(f"m = {m:>3}: {n:>10,} numbers, {n / N:.2%} of all {N / 1e6:.1f} M, {n / body:.2%} of the layers' {body / 1e6:.1f} M")

# %% tags=["claim-18"]
adapter.attach(large, bottleneck=64)
assert sum(p.numel() for p in large.parameters() if p.requires_grad) == formula(24, 1024, 64) == 6_343_680 + 100_352
m_mean = (0.036 * N - formula(24, 1024, 0)) / (formula(24, 1024, 1) - formula(24, 1024, 0))
thirds = sum(formula(24, 1024, m) / body for m in (8, 64, 256)) / 3
assert round(m_mean) == 121 and abs(thirds - 0.036) < 5e-4
print(f"3.6 % of all parameters needs a mean width of {m_mean:.0f}; equal thirds of 8, 64, 256 are {thirds:.1%} of the layers")
print("Claim 18, adapters add 3.6 % to BERT-large: partly")

# %% [markdown]
# The slide's number is an *average over tasks*. The paper picks the best of $m = 8, 64, 256$ for each, so no single model has 3.6 %. Its other figure, 2.1 % for $m = 64$ everywhere, comes out only if the embeddings are left out of the denominator.
#
# ### Claim 19: 99.6 % of the performance of full fine-tuning
#
# The abstract says *within 0.4 points*: a GLUE score of 80.0 against 80.4, both quoted from the paper's table 1. Points are not per cent of a score.

# %% tags=["claim-19"]
ratio = 80.0 / 80.4
full = [60.5, 94.9, 89.3, 87.6, 72.1, 86.7, 85.9, 91.1, 70.1]  # CoLA SST MRPC STS-B QQP MNLI-m -mm QNLI RTE
adapters = [59.5, 94.0, 89.5, 86.9, 71.8, 84.9, 85.1, 90.7, 71.5]
plain = sum(adapters) / sum(full)
assert abs(ratio - 0.995) < 1e-3 and abs(plain - 0.995) < 1e-3 and ratio < 0.9955
print(f"ratio of the two totals {ratio:.2%}; of the plain means of nine columns {plain:.2%}; 100 - 0.4 = 99.6")
print("Claim 19, adapters reach 99.6 % of full fine-tuning: corrected")

# %% [markdown]
# The corrected sentence: *0.4 points below full fine-tuning, which is 99.5 % of its score.* The columns scatter by up to 1.8 points either way, so the second digit means little.
#
# ### Claim 16: higher inference time, and a changed model
#
# The measurement runs four models in turn, many rounds, and compares within each round: MiniLM as it is, with adapters of width 64, with LoRA of rank 8 on all matrices attached, and with that LoRA merged. The norms are left alone, since a trained gain costs no more than a pretrained one. **Hypothesis.** Merged LoRA costs nothing; adapters cost more than their share of the arithmetic when a single sentence is processed, because their two thin products wait for each other.

# %%
from minipeft.reparam import lora

plain_model, _ = models.load("minilm", labels=2, device="cpu")
adapted, branched = copy.deepcopy(plain_model), copy.deepcopy(plain_model)
adapter.attach(adapted, bottleneck=64, norms=False)
lora.attach(branched, "query", "key", "value", "dense", r=8)
with torch.no_grad():
    for site in lora.sites(branched).values():
        site.B.normal_(0, 0.02)
merged = copy.deepcopy(branched)
_ = lora.merge(merged)
runners = {"base": plain_model, "LoRA merged": merged, "LoRA attached": branched, "adapters": adapted}

# %%
import statistics
import time


@torch.no_grad()
def ratios(rows, rounds):
    """Processor time of every model over the base's, round by round."""
    batch = loop.collate([loop.encode(r, tokenizer) for r in rows], tokenizer)
    batch.pop("labels")
    out = {name: [] for name in runners}
    for turn in range(rounds + 1):  # the first round warms up
        spent = {}
        for name, m in runners.items():
            start = time.process_time()
            for _ in range(3 if len(rows) == 1 else 1):
                m(**batch)
            spent[name] = time.process_time() - start
        for name, t in spent.items():
            if turn:
                out[name].append(t / spent["base"])
    return out


single, many = ratios(task.test[:1], 30), ratios(task.test[:16], 8)

# %% tags=["claim-16"]
fig, axes = plt.subplots(1, 2, figsize=(8.4, 3.0), sharey=True, sharex=True)
names = ["LoRA merged", "LoRA attached", "adapters"]
for ax, runs, title in zip(axes, (single, many), ("one sentence", "a batch of 16")):
    for y, name in enumerate(names):
        colour = figures.COLOURS["adapter" if name == "adapters" else "lora"]
        ax.plot(runs[name], [y] * len(runs[name]), ".", color=colour, alpha=0.25)
        ax.plot(statistics.median(runs[name]), y, "D", color=colour, markersize=9)
    ax.axvline(1, color="black", lw=1)
    ax.set(xlabel="time over the base's", title=title, yticks=range(3), yticklabels=names, xlim=(0.7, 2.2))
typical = {name: statistics.median(single[name]) for name in names}
assert typical["adapters"] > 1.05 and typical["adapters"] > typical["LoRA merged"] + 0.05
figures.describe("time of a forward pass over the base's, round by round with the median as a diamond: merged LoRA lies "
                 "on the base, adapters lie to its right, LoRA that is not merged lies furthest right.")
with torch.no_grad():
    same = (merged(**{k: v.cpu() for k, v in inputs.items()}).logits
            - branched(**{k: v.cpu() for k, v in inputs.items()}).logits).abs().max()
assert same < 1e-5 and merged.state_dict().keys() == plain_model.state_dict().keys()
assert adapted.state_dict().keys() != plain_model.state_dict().keys()
print("Claim 16, adapters cost time at inference and change the model's code: reproduced")

# %% [markdown]
# Adapters of this width hold 5.6 % of the arithmetic of MiniLM's matrices, and cost more than that share for one sentence: each adds two products, a GELU and a sum that have to wait for each other. In a batch the arithmetic weighs more and the starts weigh less. LoRA on every matrix costs more still *until it is merged*; then it is the base's own code on the base's own keys. What the figure does not say: a GPU, a longer text or a wider model move all of these points.
#
# Why can LoRA be merged and an adapter not? A frozen matrix followed by an adapter would have to equal one matrix and one bias. Any such affine map $f$ satisfies $f(u + v) - f(u) - f(v) + f(0) = 0$. The adapter bends.

# %%
bent = Bottleneck(12, 3, sigma=0.5).double()
u, v, zero = torch.randn(12).double(), torch.randn(12).double(), torch.zeros(12).double()
bend = (bent(u + v) - bent(u) - bent(v) + bent(zero)).abs().max().item()
assert bend > 1e-3 and not hasattr(adapter, "merge")
print("an adapter is not affine, so no weight can absorb it: the file has no merge")

# %% [markdown]
# ## It breaks
#
# **Both matrices at zero.** Then $z = \phi(0) = 0$ kills the gradient of $W_{up}$, and $W_{up} = 0$ kills that of everything below. One bias is left to learn.

# %%
dead = Bottleneck(12, 3).double()
nn.init.zeros_(dead.down.weight)
nn.init.zeros_(dead.up.weight)
dead(torch.randn(7, 12).double()).square().sum().backward()
moving = [n for n, p in dead.named_parameters() if p.grad.abs().max() > 0]
assert moving == ["up.bias"]
print("what can move:", moving)

# %% [markdown]
# **The inner skip forgotten.** A small branch then *replaces* the sub-layer's output, and every sub-layer of the network is deleted at once. Nothing raises.

# %%
class NoSkip(Bottleneck):
    def forward(self, u):
        return super().forward(u) - u


_ = torch.manual_seed(0)
kept = F.cosine_similarity(vectors(with_layers(lambda: NoSkip(384, 32))), before).mean().item()
right_way = F.cosine_similarity(vectors(with_layers(lambda: Bottleneck(384, 32))), before).mean().item()
assert kept < 0.9 and right_way > 0.999
print(f"cosine to the pretrained vectors: {kept:.2f} without the skip, {right_way:.2f} with it")

# %% [markdown]
# **The norms forgotten in the file.** Adapters that were trained beside tuned norms do not fit the pretrained ones. `load` refuses a file without them.

# %%
partial = {k: v for k, v in trained_state.items() if ".own." not in k}
try:
    adapter.load(model, partial)
except KeyError as error:
    print("refused:", str(error)[1:45], "...")
else:
    raise AssertionError("a file without norms must be refused")

# %% [markdown]
# ## Save, load, detach
#
# The file holds adapters, norms and the head; the base is stored once for all tasks. There is nothing to merge. `detach` takes the adapters out and puts the pretrained norms back.

# %%
import pathlib
import tempfile

from minipeft.lab import store

with tempfile.TemporaryDirectory() as folder:
    size_on_disk = store.save(pathlib.Path(folder) / "sentiment.safetensors", model, adapter)
    other, _ = models.load("minilm", labels=2, seed=9)
    adapter.attach(other, bottleneck=32, sigma=0.5)
    store.load(pathlib.Path(folder) / "sentiment.safetensors", other, adapter)
assert torch.equal(loop.predict(other, tokenizer, task.test[:32]), loop.predict(model, tokenizer, task.test[:32]))
adapter.detach(other)
assert torch.equal(vectors(other), before)
print(f"{size_on_disk / 1e6:.1f} MB for the task, {4 * ledger.total / 1e6:.0f} MB for the base")

# %% [markdown]
# The chapter's row in the ledger of the book:

# %%
print(f"trained {ledger.trained:,} ({ledger.share:.2%}); gradients {ledger.gradient_bytes / 1e6:.1f} MB; "
      f"optimizer {ledger.optimizer_bytes / 1e6:.1f} MB; merge: no")

# %% [markdown]
# ## Two relatives
#
# **Beside instead of behind.** He et al. (2022, arXiv:2110.04366) let the bottleneck read what the FFN *reads*, with ReLU, a factor $s$, no inner skip and $W_{up} = 0$ at the start. It is LoRA with a nonlinearity around a whole sub-layer. `parallel_adapter.py` differs from `adapter.py` in this forward:

# %%
from minipeft.additive import ia3, parallel_adapter

print(inspect.getsource(parallel_adapter.ParallelAdapter.forward))
fresh = copy.deepcopy(base)
beside = parallel_adapter.attach(fresh, bottleneck=32)
assert torch.equal(vectors(fresh), before)
print(f"{len(beside)} places, {loop.count(fresh)[0]:,} numbers, step 0 is the base exactly")

# %% [markdown]
# **Multiply instead of add.** IA3 (Liu et al. 2022, arXiv:2205.05638) keeps one learned factor per key, value and FFN number, all ones at first. A product with a diagonal is linear, so IA3 does what adapters cannot: it merges, exactly.

# %%
fresh = copy.deepcopy(base)
_ = ia3.attach(fresh)
count = loop.count(fresh)[0]
with torch.no_grad():
    for site in ia3.sites(fresh).values():
        site.l.normal_(1, 0.2)
scaled = vectors(fresh)
ia3.merge(fresh)
assert count == 6 * (2 * 384 + 1536) and torch.allclose(vectors(fresh), scaled, atol=1e-4)
print(f"IA3: {count:,} numbers, merged into a plain model")

# %% [markdown]
# ## Recall
#
# 1. Why does the distance from the base grow with $\sigma^2$ and not with $\sigma$?
# 2. Which of $W_{down}$, $W_{up}$ may start at zero, and what happens if both do?
# 3. Between which two operations does an adapter stand in BERT? In GPT-2?
# 4. What has to be stored for a task besides the adapters?
# 5. Which property of $\phi$ forbids merging, and would the identity as $\phi$ allow it?
#
# ## Exercises
#
# **1** *(derive, easy, 5 minutes).* How many numbers train with adapters of width 16 in a BERT of 6 layers and $d = 384$, LayerNorms included, the head not?

# %% tags=["exercise-1"]
answer = None

# %%
from minipeft.lab import exercises

exercises.check(answer, 2 * 6 * (2 * 16 * 384 + 384 + 16) + 13 * 2 * 384,
                "two adapters per layer with both biases; BERT has one norm more than two per layer", tol=1e-9)

# %% [markdown]
# **2** *(derive, middle, 10 minutes).* At $d = 1024$, $m = 64$: which standard deviation $\tau$ of the weights makes the correction 1 % of $u$?

# %% tags=["exercise-2"]
answer = None

# %%
exercises.check(answer, (2 * 0.01 / (1024 * 64) ** 0.5) ** 0.5, "solve step 2's formula for tau", tol=1e-2)

# %% [markdown]
# **3** *(code, middle, 10 minutes).* Pfeiffer et al. (2021) put one adapter in each layer, behind the FFN. Write `ffn_only(model)`: the paths of the modules to name as targets of `attach` in a BERT model.

# %% tags=["exercise-3"]
def ffn_only(model):
    return None


answer = ffn_only(base)

# %%
def problem(paths):
    trial = copy.deepcopy(base)
    try:
        got = adapter.attach(trial, *paths, norms=False)
    except ValueError as error:
        return str(error)
    if len(got) != 6:
        return f"{len(got)} adapters, expected one in each of 6 layers"
    return "some stand behind an attention" if any("attention" in p for p in got) else ""


exercises.check(answer, problem)

# %% [markdown]
# **4** *(experiment, middle, 10 minutes).* Give fresh adapters with $\sigma = 0.1$ to one layer of MiniLM alone, seed 0, width 32, norms left alone. Is the change of `vectors` larger with the adapters in layer 0 or in layer 5? Answer `"first"` or `"last"`.

# %% tags=["exercise-4"]
answer = None

# %%
exercises.check(answer, "last", "attach at the full paths of one layer's two dropouts and compare with `before`")

# %% [markdown]
# **5** *(criticise, middle, 5 minutes).* A slide says: *adapters add 3.6 % of parameters, so a forward pass takes 3.6 % longer.* Which fact refutes it first for a single sentence: `"count"` (the parameters are counted wrongly), `"sequence"` (added operations run one after another, each with its own start) or `"precision"` (adapters run in float32)?

# %% tags=["exercise-5"]
answer = None

# %%
exercises.check(answer, "sequence", "look at the left panel of the latency figure: is the arithmetic what takes the time?")

# %% [markdown]
# ## To remember
#
# - An adapter adds a small correction to what a sub-layer says; the inner skip and the small start make step 0 almost the pretrained model.
# - The task is adapters, LayerNorms and head. 3.6 % is an average of widths, 0.4 points are not 0.4 %.
# - The nonlinearity forbids merging, so the cost at inference stays.
#
# **Further reading.** Houlsby et al. 2019, section 2.1 and figure 2 for the place, section 3.6 for the start and the removal; He et al. 2022, section 3, for one view of adapters, prefixes and LoRA.
#
# **Next.** Chapter 11 leaves the layers alone and gives the attention something more to look at: prefix-tuning.
