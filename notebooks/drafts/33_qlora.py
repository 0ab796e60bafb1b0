# %% [markdown]
# # 33 · QLoRA
#
# **In one sentence.** The base never trains, so it can be stored in about four bits a weight; LoRA beside it stays in full precision, and a model that needed a cluster fits on one card.
#
# **Paper.** Dettmers et al., *QLoRA: Efficient Finetuning of Quantized LLMs*, NeurIPS 2023, arXiv:2305.14314. Section 2 is quantisation, section 3 the method.
#
# **Read first.** [30 LoRA](30_lora.ipynb).
#
# **Time.** 40 minutes to read, about 100 seconds to run on one core.

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
# 1. derive the 16 levels of NF4 and bound the error of one weight;
# 2. write a 4-bit layer whose backward pass keeps no dequantised weight, and count its bits;
# 3. decide where a trained update may be merged, and say what each merge loses.

# %%
figures.taxonomy(lit="qlora")

# %% [markdown]
# ## The problem
#
# LoRA shrinks gradients and optimiser state. The frozen weights stay, at two bytes each. For 65 billion parameters that is 131 GB before any training starts, and the largest common card holds 80. The smallest failing idea is to round the weights to 16 equally spaced values over the whole matrix.

# %%
from minipeft.lab import loop, models, tasks

model, tokenizer = models.load("minilm", labels=2, seed=0)
W = model.bert.encoder.layer[0].attention.self.query.weight.detach()  # (384, 384)
step = W.abs().max() / 7
coarse = (W / step).round() * step
print(f"one scale for the matrix: error {((coarse - W).norm() / W.norm()).item():.2f} of the weight's norm")
assert (coarse - W).norm() > 0.2 * W.norm()

# %% [markdown]
# One large entry sets the scale, and most entries fall on the few levels around zero. Two repairs follow. A scale for every small block keeps an outlier's damage at home. Levels that lie where weights lie waste fewer codes.
#
# ## The derivation, in six steps
#
# $W$ is flattened row by row and cut into blocks of 64. One block's largest absolute value is its scale $c$. The 16 levels are $q_0 < \dots < q_{15}$, in $[-1, 1]$. The rounded weight is $\tilde W$.
#
# **Step 1. Choose levels for a normal variable.** Weights look normal. If each level stood for the same share of a normal variable, the levels would be quantiles $\Phi^{-1}(p)$ at evenly spaced $p$. The ends need care: $\Phi^{-1}(0)=-\infty$, which is what equation 4 of the paper asks for. The authors' code starts at a number just inside, 0.9677083, which the paper does not give.

# %%
from statistics import NormalDist

quantile = NormalDist().inv_cdf
above = [quantile(p) for p in torch.linspace(0.9677083, 0.5, 9)[:-1].tolist()]
below = [-quantile(p) for p in torch.linspace(0.9677083, 0.5, 8)[:-1].tolist()]
print(len(above), "levels above zero,", len(below), "below, and zero itself")
assert len(above) + len(below) + 1 == 16

# %% [markdown]
# **Step 2. Scale them to $[-1,1]$.** Zero is a level, so a zero weight stays zero. The two halves have different lengths, so the levels are not symmetric. The sixteen floats below are the published ones to the last bit.

# %% tags=["claim-63"]
q = torch.tensor(sorted([0.0, *above, *below]))
q = q / q.max()
published = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0])
assert torch.equal(q, published)
worst = (q.diff().max() / 2).item()
assert abs(worst - 0.1519) < 1e-4
print("Claim 63, QLoRA (the lecture lists it; here is its number format): proved, "
      f"16 levels equal the published ones and no weight moves by more than {worst:.3f} of its block's scale")

# %% [markdown]
# **Step 3. Round.** Divide a block by its scale and take the nearest level. "Nearest" is decided by the 15 midpoints; a value on a midpoint takes the lower level.

# %%
def to_codes(block):
    c = block.abs().max()
    return torch.bucketize(block / c, (q[1:] + q[:-1]) / 2), c


codes, c = to_codes(W.flatten()[:64])
error = (q[codes] * c - W.flatten()[:64]).abs()
assert error.max() <= worst * c and error[W.flatten()[:64].abs().argmax()] == 0
print("codes of the first eight weights:", codes[:8].tolist())

# %% [markdown]
# **Step 4. Pack.** Two codes share a byte, the first in the high half. With one float32 scale for 64 weights the cost is $4 + 32/64 = 4.5$ bits a weight.

# %%
packed = (codes[::2] << 4 | codes[1::2]).to(torch.uint8)
assert torch.equal(torch.stack((packed >> 4, packed & 15), 1).flatten(), codes)
assert 8 * (packed.nbytes + c.nbytes) / 64 == 4.5

# %% [markdown]
# **Step 5. Quantise the scales too.** Half a bit of the 4.5 is scales. Scales are positive and alike, so subtract their mean (one number for the matrix) and keep the rest in 8 bits, with one float32 for 256 of them:
#
# $$4 + \frac{8}{64} + \frac{32}{64\cdot 256} = 4.127 \text{ bits.}$$
#
# The paper calls the 8-bit type FP8. The code uses a table of 256 levels over seven decades, each decade twice as fine as the one below.

# %%
from minipeft.reparam import nf4

levels = nf4.dynamic()
per_decade = [int(((levels > 10.0 ** (i - 7)) & (levels < 10.0 ** (i - 6))).sum()) for i in range(7)]
print("positive levels per decade, 1e-7 to 1:", per_decade)
assert per_decade == [2**i for i in range(7)] and 4 + 8 / 64 + 32 / (64 * 256) == 4.126953125

# %% [markdown]
# **Step 6. Compute.** The layer dequantises, multiplies and forgets:
#
# $$y = x\tilde W^\top + b + s\,(xA^\top)B^\top, \qquad \frac{\partial L}{\partial x} = G\tilde W + s\,(GB)A .$$
#
# Nothing quantised trains, so rounding needs no derivative. The gradient passes *through* $\tilde W$ on its way down, and for that $\tilde W$ is needed a second time. Keeping it from forward to backward would undo the saving. It is made again.

# %%
class FourBit(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dequantise):
        ctx.dequantise = dequantise  # a recipe, not a matrix
        return x @ dequantise().T

    @staticmethod
    def backward(ctx, g):
        return g @ ctx.dequantise(), None

# %%
rounded = nf4.dequantise(*nf4.quantise(W), W.shape, torch.float64)
x = torch.randn(4, 384).double().requires_grad_()
G = torch.randn(4, 384).double()
FourBit.apply(x, lambda: rounded).backward(G)
torch.testing.assert_close(x.grad, G @ rounded)

# %% [markdown]
# ## Built by hand, and the package's file
#
# The loop over blocks, written out, equals the package on a real matrix to the bit. The package takes all blocks at once and looks up one byte, that is two weights, at a time.

# %%
blocks = W.flatten().view(-1, 64)
by_hand = [to_codes(b) for b in blocks]
codes = torch.stack([k for k, _ in by_hand]).flatten()
scales = torch.stack([c for _, c in by_hand])
packed, absmax = nf4.quantise(W)
assert torch.equal(scales, absmax)
flips = (codes != torch.stack((packed >> 4, packed & 15), 1).flatten()).sum().item()
print(f"{len(codes):,} codes, {flips} differ")
assert flips <= 2  # divided here, multiplied by 1 / c there: a value on an edge may fall to the other side

# %%
import inspect

print(inspect.getsource(nf4.quantise))
print(inspect.getsource(nf4._Frozen4bit))

# %% [markdown]
# `nf4.py` is a base in four bits and nothing else. `qlora.py` holds the same layer with LoRA beside it. The tests compare both with bitsandbytes, the authors' library: codes, scales, nested scales and values are equal to the last bit.
#
# ## Do weights look normal?
#
# **Question.** Do the levels suit a real model? **Hypothesis.** MiniLM's weights, divided by their block's scale, follow the levels, but not evenly: dividing by the block's maximum changes the distribution for which the levels were made.

# %%
linears = {n: m.weight.detach() for n, m in model.bert.encoder.named_modules() if isinstance(m, torch.nn.Linear)}
scaled, used = [], torch.zeros(16)
for weight in linears.values():
    packed, absmax = nf4.quantise(weight)
    scaled.append((weight.flatten().view(-1, 64) / absmax[:, None]).flatten()[::50])
    used += torch.stack((packed >> 4, packed & 15)).flatten().long().bincount(minlength=16)
share = used / used.sum()
entropy = -(share * share.log2()).sum().item()
print("share of each code, %:", [round(v, 1) for v in (100 * share).tolist()])
print(f"entropy {entropy:.2f} bits of 4")
assert 3.8 < entropy < 3.95 and share.max() / share.min() > 3

# %%
import matplotlib.pyplot as plt

fig, (top, low) = plt.subplots(2, 1, figsize=(7.2, 4.6), sharex=True, height_ratios=(2, 1))
top.hist(torch.cat(scaled).tolist(), bins=121, range=(-1, 1), density=True, color="#BBBBBB")
for level in q.tolist():
    top.axvline(level, color=figures.COLOURS["qlora"], linewidth=1.2)
top.set_ylabel("density")
top.set_title("NF4's levels stand where the weights are")
low.plot(q, 100 * share, "o-", color=figures.COLOURS["qlora"])
low.axhline(100 / 16, color="#888888", linestyle=":")
low.text(-1, 100 / 16 + 0.3, "equal use", color="#888888", va="bottom")
low.set_ylabel("% of weights")
low.set_xlabel("weight / scale of its block (MiniLM, 36 linear layers)")
figures.describe("histogram of MiniLM's weights divided by their block's scale, the 16 NF4 levels as "
                 "lines, dense near zero; below, the share of weights each level takes, from under 2 % "
                 "at the ends to about 9 % near zero.")

# %% [markdown]
# The peaks at $\pm1$ are the blocks' maxima, one in 64. "Every bin is used equally", as the construction promises, does not survive the division (Yoshida 2023, arXiv:2306.06965, makes levels for the divided variable). Being made for the wrong variable costs little:

# %%
def relative_error(weight, table):
    flat = weight.flatten().view(-1, 64)
    c = flat.abs().amax(1, keepdim=True)
    near = table[torch.bucketize(flat / c, (table[1:] + table[:-1]) / 2)] * c
    return ((near - flat).norm() / flat.norm()).item()


even = torch.arange(-7, 8) / 7.0  # the 4-bit integers, symmetric
errors = {name: sum(relative_error(w, t) for w in linears.values()) / len(linears)
          for name, t in (("NF4", q), ("Int4", even))}
print({k: round(v, 3) for k, v in errors.items()})
assert errors["NF4"] < 0.9 * errors["Int4"]

# %% [markdown]
# ## Invariants, before any training
#
# QLoRA's step 0 is the *rounded* model, not the original: the original weight is gone. That moves the first line of the contract that every method of this book keeps. The rest holds: only the factors train, the count is the formula's, and codes stay byte for byte.

# %%
import copy

from minipeft.reparam import qlora

ALL = ("query", "key", "value", "dense")
batch = next(loop.batches(tasks.load("sentiment").test, tokenizer))
tuned, reference = copy.deepcopy(model), copy.deepcopy(model)
torch.manual_seed(0)
places = qlora.attach(tuned, *ALL, r=8, alpha=16.0)
nf4.attach(reference, *ALL)
with torch.no_grad():
    start, plain = tuned(**batch).logits, model(**batch).logits
    assert torch.equal(start, reference(**batch).logits)
print(f"{len(places)} places; the logits of step 0 are off the original by up to {(start - plain).abs().max():.3f}")
assert 0 < (start - plain).abs().max() < 0.5

# %%
trained, _ = loop.count(tuned)
assert trained == sum(8 * sum(m.base.shape) for m in qlora.sites(tuned).values())
stored = sum(b.nbytes for n, b in tuned.named_buffers() if n.endswith(("packed", "absmax", "top", "mean")))
weights = sum(m.base.shape.numel() for m in qlora.sites(tuned).values())
print(f"measured: {8 * stored / weights:.3f} bits a weight over {weights:,} weights; {trained:,} numbers train")
assert abs(8 * stored / weights - 4.127) < 0.002

# %% [markdown]
# **Nothing large is kept for backward.** PyTorch lets one see what a forward pass saves.

# %%
def saved_for_backward(module, inputs):
    sizes = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t)
    with hooks:
        module(inputs)
    return sizes


inputs = torch.randn(2, 384, requires_grad=True)
site = qlora.sites(tuned)["bert.encoder.layer.0.attention.self.query"]
dense = torch.nn.Linear(384, 384).requires_grad_(False)
print("plain frozen layer saves:", saved_for_backward(dense, inputs))
print("4-bit layer saves:       ", saved_for_backward(site.base, inputs))
assert saved_for_backward(site.base, inputs) == [] and max(saved_for_backward(site, inputs)) < 384 * 384

# %% [markdown]
# A plain frozen layer saves a pointer to a weight that is in memory anyway. The 4-bit layer would save a *new* matrix, and one for every layer at once.
#
# ## Experiment: does LoRA train as well beside four bits?
#
# **Question.** On `domain` (four classes), LoRA beside a float32 base and beside one that is rounded to NF4 in every linear layer. **Hypothesis.** No difference that five seeds can show: the factors see the rounded base from the first step and learn around it.
#
# To afford ten runs on one core, the adapters sit on all linear layers of MiniLM's last layer, and the five layers below are run once for each base (`data/sensitivity.py`, which chapter 34 uses for 200 runs). One pass over 800 rows, batches of 16, rate $10^{-2}$.

# %%
import runpy

from minipeft.lab import results

study = runpy.run_path(str(results.ROOT / "data" / "sensitivity.py"))
runs = {"LoRA": [], "QLoRA": []}
for seed in range(5):
    for name, arm in (("LoRA", "lora everywhere"), ("QLoRA", "qlora")):
        runs[name].append(study["run"](arm, 1e-2, 16, seed)["test"])
for name, values in runs.items():
    print(f"{name:6} {figures.interval(values)[0]:.2f} +- {figures.interval(values)[1]:.2f}")
mean, half = figures.interval([a - b for a, b in zip(runs["QLoRA"], runs["LoRA"])])
print("QLoRA minus LoRA, seed by seed:", "indistinguishable" if abs(mean) < half else "they differ")
assert abs(mean) < 0.05

# %%
fig, ax = plt.subplots(figsize=(7.2, 2.0))
figures.dots(ax, runs, "test accuracy on domain (5 seeds, mean and 95 % interval)")
ax.set_title("Four bits under the adapter: a few points at most")
figures.describe("test accuracy of LoRA and QLoRA, every seed a dot, the mean with its 95 % interval; "
                 "the intervals overlap.")

# %% [markdown]
# The paper's Table 4 makes the same comparison on LLaMA: a mean MMLU of 53.0 in BF16 and 53.1 with NF4 and double quantisation. Five seeds of a small encoder cannot confirm a tenth of a point. They show that training runs and that nothing collapses.
#
# ## The memory bill: 65 billion in 48 GB
#
# LLaMA-65B has 80 layers of width 8192 with feed-forward width 22016, and 32,000 words. All of it is arithmetic.

# %%
d, ff, layers, words, r = 8192, 22016, 80, 32_000, 64
linear = layers * (4 * d * d + 3 * d * ff)
rest = 2 * words * d + (2 * layers + 1) * d  # embedding, head, norms: 16 bits
adapter = layers * (4 * r * (d + d) + 3 * r * (d + ff))
print(f"{linear + rest:,} parameters, {linear:,} in linear layers; LoRA r=64: {adapter:,}")
assert linear + rest == 65_285_660_672 and adapter == 799_539_200


def bill(bits, trained, frozen_linear):
    return {"weights": ((linear * bits / 8 if frozen_linear else 2 * linear) + 2 * rest) / 1e9,
            "adapter": 2 * adapter / 1e9 if trained == adapter else 0.0,
            "gradients": 2 * trained / 1e9, "Adam's averages": 8 * trained / 1e9}


bills = {"all weights": bill(16, linear + rest, False), "LoRA, 16-bit base": bill(16, adapter, False),
         "QLoRA, one scale each": bill(4.5, adapter, True), "QLoRA": bill(4.126953125, adapter, True)}
totals = {k: round(sum(v.values()), 1) for k, v in bills.items()}
print(totals, "GB")
assert abs(totals["QLoRA"] - 44.1) < 0.1 and totals["all weights"] > 780 and totals["QLoRA, one scale each"] > 47

# %%
fig, ax = plt.subplots(figsize=(7.2, 2.4))
figures.bars(ax, {k: v for k, v in bills.items() if k != "all weights"}, "GB, without activations")
ax.axvline(48, color="#BF616A", linestyle=":")
ax.text(49, 1.42, "a card of 48 GB", color="#BF616A", fontsize=9)
figures.describe("memory bars for LLaMA-65B: LoRA on a 16-bit base 140 GB, QLoRA without double "
                 "quantisation 47 GB, QLoRA 44 GB, against a line at 48 GB; all weights would need 783 GB.")

# %% [markdown]
# The bar that is left is the base. The second quantisation saves 3 GB, which decides whether activations find room. The paper's figure gives 45 GB in all, with checkpointing. And with $r=64$ on every layer the adapter's optimiser state is 6.4 GB, the next thing to move out of the way.
#
# ## Paged optimiser state
#
# Adam's two averages are used for a moment after backward and lie idle while activations need the room. The authors let CUDA's driver page them out when memory runs short. `paged.py` does it in plain torch: the state waits in pinned host memory and is copied in for the step. The numbers stay the same.

# %%
import warnings

from minipeft.reparam import paged

with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    handles = paged.attach(torch.optim.AdamW([torch.nn.Parameter(torch.zeros(3))]))
print("without a GPU:", handles, said[0].message)
assert handles == []

# %%
outcome = []
for paging in (False, True):
    p = torch.nn.Parameter(torch.linspace(-1, 1, 1000))
    optimizer = torch.optim.AdamW([p], lr=0.1)
    if paging:
        paged.attach(optimizer, pretend=True)  # copies from CPU to CPU, to try the mechanism
    for _ in range(3):
        p.grad = p.detach().sin()
        optimizer.step()
    outcome.append(p.detach())
assert torch.equal(*outcome)
print("three steps with and without paging: equal")

# %% [markdown]
# ## Two merges, and what each loses
#
# After training there is $\tilde W$ in four bits and an update $\Delta W = sBA$ in 32. Two ways lead to one weight:
#
# - **into the dequantised weight**: $\tilde W + \Delta W$ in 16 or 32 bits. Nothing is lost but rounding, and the model is large again;
# - **rounded to NF4 again**: the model stays small, and the update is rounded with it.
#
# `merge` returns for each place the error, in units of $\lVert\Delta W\rVert$, and the share of $\Delta W$ that is kept along its own direction.

# %%
top, _ = study["build"]("qlora", 0)
_ = study["train"](top, qlora, "qlora", 1e-2, 16, 0)
hidden, mask, label = study["prepared"](True)[1]["test"]
with torch.no_grad():
    before, small = top(hidden, mask), copy.deepcopy(top)
    for name, m, again in (("dequantised", top, False), ("NF4 again", small, True)):
        loss = qlora.merge(m, requantise=again)
        error, kept = (sum(v[i] for v in loss.values()) / len(loss) for i in (0, 1))
        moved = (m(hidden, mask) - before).abs().max()
        print(f"{name:12} error {error:.2f} of the update, kept {kept:.2f}; logits move by up to {moved:.1f}")
        assert error > 0.1 if again else error < 1e-3

# %% [markdown]
# How much survives depends on the size of the update. $\tilde W$ sits *on* the levels. An update that is smaller than half a gap crosses no midpoint and vanishes. Hypothesis: below some size nearly nothing is kept; and adding the update to the **original** $W$ before the first rounding keeps it on average, because $W$ lies anywhere between levels.

# %%
torch.manual_seed(0)
direction = torch.randn(384, 8) @ torch.randn(8, 384)
direction = direction / direction.norm()


def rounded_again(weight):
    return nf4.dequantise(*nf4.quantise(weight), weight.shape, weight.dtype)


snapped, sizes = rounded_again(W), torch.logspace(-3, 0, 13)
kept = {"from the rounded weight": [], "from the original": []}
for size in sizes:
    dW = size * W.norm() * direction
    kept["from the rounded weight"].append(((rounded_again(snapped + dW) - snapped) * dW).sum() / dW.square().sum())
    kept["from the original"].append(((rounded_again(W + dW) - snapped) * dW).sum() / dW.square().sum())
print({k: [round(v.item(), 2) for v in vs[::4]] for k, vs in kept.items()})
assert kept["from the rounded weight"][0] < 0.2 and kept["from the rounded weight"][-1] > 0.9

# %%
fig, ax = plt.subplots(figsize=(7.2, 3.4))
ax.plot(sizes, kept["from the rounded weight"], "o-", color=figures.COLOURS["qlora"])
ax.plot(sizes, kept["from the original"], "o-", color="#888888")
ax.text(0.05, 0.25, "added to the rounded weight", color=figures.COLOURS["qlora"])
ax.text(0.0012, 1.12, "added to the original", color="#666666")
ax.set_xscale("log")
ax.set_xlabel("size of the update / size of the weight (log scale)")
ax.set_ylabel("share of the update kept")
ax.set_ylim(-0.1, 1.5)
ax.set_title("Rounding again eats small updates")
figures.describe("share of an update that survives rounding to NF4 against its size: near zero for updates "
                 "of a thousandth of the weight when added to the rounded weight, near one when added "
                 "to the original, both near one for large updates.")

# %% [markdown]
# So a merged 4-bit model is best made from the *original* weights: $W + \Delta W$, then one rounding. Even that adds the base's rounding error, which training never saw in this form. The safe merge is the first.
#
# ## Save, load, detach
#
# The state is LoRA's: factors and scale. The base is not in it; `attach` rounds the same original to the same codes. `detach` returns plain layers with $\tilde W$.

# %%
again = copy.deepcopy(model)
qlora.attach(again, *ALL, r=8, alpha=1.0)
site = next(iter(qlora.sites(again)))
saved = qlora.state(again)
fresh = copy.deepcopy(model)
qlora.attach(fresh, *ALL, r=8)
qlora.load(fresh, saved)
with torch.no_grad():
    assert torch.equal(fresh(**batch).logits, again(**batch).logits)
qlora.detach(fresh)
assert fresh.state_dict().keys() == model.state_dict().keys()
off = (fresh.get_submodule(site).weight - model.get_submodule(site).weight).norm() / model.get_submodule(site).weight.norm()
print(f"{len(saved)} tensors in the state; after detach the first weight is off the original by {off:.2f} of its norm")
assert 0.05 < off < 0.15

# %% [markdown]
# ## It breaks
#
# **The default of the libraries is not NF4.** bitsandbytes and transformers take FP4 without double quantisation unless told otherwise. FP4's levels are those of a tiny float.
#
# **The levels are not symmetric.** $-W$ does not round to $-\tilde W$, so a test that flips signs fails by design.

# %%
flip = (rounded_again(-W) + rounded_again(W)).abs().max() / W.abs().max()
print(f"rounding -W and negating it back differ by up to {flip:.2f} of the largest weight")
assert flip > 0.01

# %% [markdown]
# **Rounding twice.** With one float32 scale per block, rounding a rounded weight changes nothing. With double quantisation the scales move a little each time, so a chain of save, dequantise, quantise drifts.

# %%
def double(weight):
    packed, absmax = nf4.quantise(weight)
    return nf4.dequantise(packed, nf4.unsqueeze(*nf4.squeeze(absmax)), weight.shape, weight.dtype)


assert torch.equal(rounded_again(snapped), snapped)
once = double(W)
print(f"single: equal; double: the second time moves weights by up to {((double(once) - once).abs().max() / W.abs().max()):.0e}")
assert not torch.equal(double(once), once)

# %% [markdown]
# **A shared weight.** A head that is tied to the embedding cannot be dropped: the embedding still needs it. `attach` refuses.

# %%
class Tied(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = torch.nn.Embedding(50, 8), torch.nn.Linear(8, 50, bias=False)
        self.head.weight = self.embed.weight


try:
    qlora.attach(Tied(), "head", r=2)
except ValueError as error:
    print("ValueError:", error)

# %% [markdown]
# ## The row in the ledger

# %%
row = {"trained numbers": f"{trained:,}", "gradients, MB": f"{4 * trained / 1e6:.2f}",
       "AdamW's state, MB": f"{8 * trained / 1e6:.2f}", "base, bits a weight": f"{8 * stored / weights:.3f}",
       "linear layers in float32, MB": f"{4 * weights / 1e6:.1f}", "in NF4, MB": f"{stored / 1e6:.1f}"}
for name, value in row.items():
    print(f"{name:28} {value}")

# %% [markdown]
# ## Recall
#
# 1. Why does QLoRA need no derivative of the rounding?
# 2. What is made twice in a step, and what would it cost to make it once?
# 3. Where do the 0.127 bits come from?
# 4. Why does rounding a merged weight again lose small updates, although rounding is unbiased on average?
# 5. Which of the contract's promises can QLoRA not keep, and why?
#
# ## Exercises
#
# Solutions are in [solutions/33_qlora.ipynb](solutions/33_qlora.ipynb).
#
# **1. Derive (easy, 5 minutes).** Blocks of 32 in place of 64, with double quantisation as before. How many bits a weight?

# %% tags=["exercise-1"]
answer_1 = None  # a number

# %%
from minipeft.lab import exercises

exercises.check(answer_1, 4 + 8 / 32 + 32 / (32 * 256), "twice as many scales, in blocks of 256 as before")

# %% [markdown]
# **2. Code (easy, 10 minutes).** `unpack(packed)`: the codes of a row of bytes, in order.

# %% tags=["exercise-2"]
def unpack(packed):
    return None


# %%
exercises.check(unpack(torch.tensor([0xF0, 0x7C], dtype=torch.uint8)), torch.tensor([15, 0, 7, 12]),
                "the first code is in the high half of the byte")

# %% [markdown]
# **3. Derive (medium, 10 minutes).** The worst case of NF4 is 0.152 of the scale. What is it for the symmetric 4-bit integers $-7..7$, divided by 7? And whose mean error on MiniLM was smaller? Give the pair (worst case, name).

# %% tags=["exercise-3"]
answer_3 = None  # (number, "NF4" or "Int4")


# %%
def right_3(answer):
    worst_case, name = answer
    if abs(worst_case - 1 / 14) > 1e-3:
        return "half the gap between two neighbours"
    return "" if name == "NF4" else "the worst case and the mean need not agree: look at the printed errors"


exercises.check(answer_3, right_3)

# %% [markdown]
# **4. Experiment (medium, 20 minutes).** `quantise_with(W, size)`: NF4 with blocks of `size` along the flat weight, returned dequantised, float32 scales. Then the error falls with smaller blocks.

# %% tags=["exercise-4"]
def quantise_with(W, size):
    return None


# %%
def right_4(_):
    errors = []
    for size in (32, 64, 256):
        out = quantise_with(W, size)
        if out.shape != W.shape:
            return f"shape {tuple(out.shape)}, expected {tuple(W.shape)}"
        errors.append(((out - W).norm() / W.norm()).item())
    if not errors[0] < errors[1] < errors[2]:
        return "smaller blocks should give smaller errors"
    return "" if torch.allclose(quantise_with(W, 64), snapped, atol=1e-6) else "blocks of 64 should equal the package"


exercises.check(quantise_with(W, 64), right_4)

# %% [markdown]
# **5. Criticise (hard, 15 minutes).** "With QLoRA a 7-billion model trains in 4 GB." The base has 6.48e9 weights in linear layers (NF4, double quantisation) and 0.26e9 others in 16 bits; LoRA of 40 million numbers is kept in float32 with float32 gradients and Adam. How many GB without activations (two digits)?

# %% tags=["exercise-5"]
answer_5 = None  # a number

# %%
exercises.check(answer_5, (6.48e9 * 4.126953125 / 8 + 2 * 0.26e9 + 16 * 40e6) / 1e9,
                "base, the rest at 2 bytes, and 16 bytes for each trained number", tol=0.02)

# %% [markdown]
# ## To remember
#
# - NF4: 16 quantiles of a normal, one scale for 64 weights, scales quantised too: 4.127 bits. No weight moves by more than 0.152 of its block's scale.
# - Dequantise in forward, again in backward, keep nothing. Only LoRA trains, in full precision.
# - Merge into 16 or 32 bits. Rounding the sum again eats small updates.
#
# **Further reading.** The paper's sections 2 (quantisation), 3 (method) and 4 (data types compared); Yoshida 2023 on levels for the divided variable; LoftQ (arXiv:2310.08659) chooses $A$ and $B$ to undo the rounding at the start.
#
# **Next.** [34 MonteCLoRA](34_monteclora.ipynb) puts noise on LoRA's $A$. `diff minipeft/reparam/lora.py minipeft/reparam/qlora.py` shows what this chapter added.
