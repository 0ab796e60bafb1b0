# %% [markdown]
# # 31 · AdaLoRA
#
# **The claim in one sentence.** Written as an SVD, an update can lose rank one triplet at a time; AdaLoRA starts with more rank than it keeps and lets the gradients say, over all matrices together, which triplets stay.
#
# **Paper.** Zhang et al., *Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning*, ICLR 2023 (arXiv:2303.10512).
#
# **To have read.** [30 LoRA](30_lora.ipynb). **Time.** About 40 minutes to read, about 100 seconds to run.

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
# - *derive* the score of a triplet from the change of the loss that its loss would cause;
# - *write* the shrinking budget and the cut over all matrices, and *say* where the printed schedule is wrong;
# - *test* whether ranks go where they are needed, on a teacher whose needs are known.

# %%
figures.taxonomy(lit="adalora")

# %% [markdown]
# ## The problem
#
# LoRA gives every matrix the same rank. The matrices do not need the same. The smallest failing example has two of them: one should change by a matrix of rank 6, the other should not change at all. A budget of six triplets is enough for both together. Split evenly, three and three, it leaves a part of the first change out, and three triplets without work.

# %%
g = torch.Generator().manual_seed(0)
needed = torch.randn(16, 6, generator=g).double() @ torch.randn(6, 16, generator=g).double()
left = torch.linalg.svdvals(needed)[3:].square().sum() / needed.square().sum()
print(f"the best rank 3 leaves {left:.2f} of the squared size of the change; the best rank 6 leaves nothing")
assert left > 0.1 and torch.linalg.matrix_rank(needed) == 6

# %% [markdown]
# ## The idea
#
# Write the update as a sum of *triplets*: a column of $P$, one number $\lambda$, a row of $Q$. Setting one $\lambda$ to zero removes one rank and touches nothing else. So: begin with more triplets than the budget allows, watch during training how much the loss would notice if each one went, and switch the weakest off, whichever matrix they stand in. The number that may stay falls from step to step.
#
# The ranks of the layers are then not a choice of the user. They come out of training.
#
# ## The derivation, step by step
#
# **Step 1: the form.** For a weight $W$ of shape $(d_{out}, d_{in})$,
#
# $$ y = xW^\top + b + s\,(xQ^\top)\,\mathrm{diag}(\lambda)\,P^\top, \qquad \Delta W = s\,P\,\mathrm{diag}(\lambda)\,Q, $$
#
# with $P$ of shape $(d_{out}, r)$, $\lambda$ of shape $(r)$, $Q$ of shape $(r, d_{in})$ and $s = \alpha / r$, where $r$ is the rank at the *start*. If $P$ has orthonormal columns and $Q$ orthonormal rows, this is an SVD: the singular values of $\Delta W$ are $|s\lambda_i|$. Setting a $\lambda$ to zero then removes exactly one of them.

# %%
P = torch.linalg.qr(torch.randn(7, 3).double()).Q
Q = torch.linalg.qr(torch.randn(5, 3).double()).Q.T
lam = torch.tensor([0.5, -2.0, 1.0]).double()
assert torch.allclose(torch.linalg.svdvals(P @ torch.diag(lam) @ Q)[:3], torch.tensor([2.0, 1.0, 0.5]).double())

# %% [markdown]
# **Step 2: orthonormal by a penalty.** No SVD is computed. The loss gets a term that is zero when the factors are orthonormal,
#
# $$ \gamma \sum \|P^\top P - I\|_F^2 + \|QQ^\top - I\|_F^2, \qquad \frac{\partial}{\partial P}\|P^\top P - I\|_F^2 = 4\,P\,(P^\top P - I). $$
#
# The second line is the first exercise; autograd confirms it here.

# %%
P = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
M = P.T @ P - torch.eye(3)
(M**2).sum().backward()
assert torch.allclose(P.grad, 4 * P @ M)

# %% [markdown]
# **Step 3: importance.** How much does the loss $L$ change if a number $w$ becomes zero? To first order by $-w\,\partial L/\partial w$. The size of that, $I(w) = |w\,g|$ with $g$ the gradient, is called sensitivity. It costs one product of two numbers that training has anyway.

# %%
w = (0.01 * torch.randn(5).double()).requires_grad_()
loss = lambda w: torch.exp(w @ torch.arange(5).double())
(grad,) = torch.autograd.grad(loss(w), w)
for i in range(5):
    change = loss(w) - loss(w * (torch.arange(5) != i))
    assert abs(change - w[i] * grad[i]) <= 0.05 * abs(change) + 1e-12
print("sensitivity predicts the change of the loss within five percent here, for small numbers")

# %% [markdown]
# **Step 4: averages.** One batch is a noisy witness. Two running averages smooth it, both starting at zero, both with $\beta = 0.85$: the mean of $I$, and how far $I$ strays from its mean,
#
# $$ \bar I \leftarrow \beta \bar I + (1-\beta) I, \qquad U \leftarrow \beta U + (1-\beta)\,|I - \bar I|, \qquad \text{score}(w) = \bar I \cdot U. $$
#
# A number is worth keeping if it matters *and* is not settled. After the first step $\bar I = 0.15\,I$ and $U = 0.15 \cdot 0.85\,I$, so the score is $0.019125\,I^2$.

# %%
first, mean, dev = 3.0, 0.0, 0.0
mean = 0.85 * mean + 0.15 * first
dev = 0.85 * dev + 0.15 * abs(first - mean)
assert abs(mean * dev - 0.019125 * first**2) < 1e-12

# %% [markdown]
# The product has an odd side. Under a perfectly steady sensitivity $U$ decays, and the score of a number that matters goes to zero.

# %%
mean = dev = 0.0
for _ in range(60):
    mean += 0.15 * (first - mean)
    dev += 0.15 * (abs(first - mean) - dev)
print(f"after 60 equal steps: mean {mean:.2f}, deviation {dev:.3f}")
assert mean > 2.9 and dev < 0.02

# %% [markdown]
# **Step 5: the triplet.** A triplet holds $1 + d_{out} + d_{in}$ numbers. Its score is the score of its $\lambda$ plus the *average* score over its column of $P$ plus the average over its row of $Q$. Averages and not sums: a wide layer must not win for being wide.
#
# **Step 6: the budget.** $b(t)$ is the number of triplets that stay after step $t$, in all matrices together. It is $b_0$ during a warm-up of $t_i$ steps, $b_T$ in the last $t_f$ of $T$ steps, and falls between them as a cube:
#
# $$ b(t) = \left\lfloor b_T + (b_0 - b_T)\left(1 - \frac{t - t_i}{T - t_f - t_i}\right)^3 \right\rfloor. $$
#
# The cube falls fast while all triplets are still weak, and slowly where the choice is hard.

# %%
from minipeft.reparam import adalora

plan = {"b0": 24, "bT": 8, "total": 30, "warmup": 5, "final": 10}
curve = [adalora.budget(t, **plan) for t in range(30)]
assert curve == [24] * 6 + [21, 18, 16, 14, 12, 11, 10, 9, 9] + [8] * 15

# %%
import matplotlib.pyplot as plt

fig, ax = plt.subplots(figsize=(7.2, 3.2))
ax.step(range(30), curve, where="post", color=figures.COLOURS["adalora"])
ax.axvspan(0, 5, color="#F2F2F2")
ax.axvspan(20, 29, color="#F2F2F2")
for x, text in ((0.3, "warm-up:\nall stay"), (9.5, "a cut every\nfew steps"), (20.4, "the choice stands,\nwhat is on trains on")):
    ax.text(x, 18.2, text, fontsize=10, va="center")
ax.set(title="The budget falls as a cube", xlabel="step", ylabel="triplets that stay", ylim=(0, 26))
figures.describe("the budget stays at 24 for 6 steps, falls fast to 14 at step 9, slowly to 8 at step 15, and stays.")

# %% [markdown]
# ## Built by hand
#
# The layer first. $\lambda$ starts at zero, so that step 0 is the base model; $P$ and $Q$ start small.

# %%
from torch import nn


class Hand(nn.Module):
    def __init__(self, base, r, alpha):
        super().__init__()
        self.base, self.s = base, alpha / r
        shapes = {"P": (base.out_features, r), "Q": (r, base.in_features)}
        self.P, self.Q = (nn.Parameter(0.02 * torch.randn(n, dtype=torch.float64)) for n in shapes.values())
        self.lam = nn.Parameter(torch.zeros(r, dtype=torch.float64))
        self.averages = dict.fromkeys(("P", "lam", "Q"), (0.0, 0.0))

    def forward(self, x):
        return self.base(x) + self.s * (x @ self.Q.T * self.lam) @ self.P.T


# %% [markdown]
# Then the bookkeeping after every step, the score, and the cut.

# %%
def observe(layer):
    for name, (mean, dev) in layer.averages.items():
        w = getattr(layer, name)
        now = (w * w.grad).abs().detach()
        mean = 0.85 * mean + 0.15 * now
        layer.averages[name] = mean, 0.85 * dev + 0.15 * (now - mean).abs()


def score(layer):
    P, lam, Q = (mean * dev for mean, dev in layer.averages.values())
    return lam + P.mean(0) + Q.mean(1)


# %%
def cut(layers, b):
    s = torch.cat([score(m) for m in layers])
    keep = torch.zeros(len(s), dtype=torch.bool)
    keep[s.argsort(descending=True)[:b]] = True
    for m, on in zip(layers, keep.split([len(m.lam) for m in layers])):
        m.lam.data *= on


def orthogonality(layers):
    grams = [G for m in layers for G in (m.P.T @ m.P, m.Q @ m.Q.T)]
    return sum((G - torch.eye(len(G))).square().sum() for G in grams)


# %% [markdown]
# Now both, the hand-made one and the package's file, learn the same toy for 20 steps with a cut in every step after the second. They must agree in every number and every choice.

# %%
def toy():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double(), torch.randn(32, 6).double()


hand, x = toy()
torch.manual_seed(2)
for i in (0, 2):
    hand[i] = Hand(hand[i].requires_grad_(False), r=4, alpha=6.0)
package, _ = toy()
torch.manual_seed(2)
places = adalora.attach(package, "0", "2", r=4, target=2, alpha=6.0, total=20, warmup=2, final=5, gamma=0.1)
print("AdaLoRA sits at", places)

# %%
layers, plan = [hand[0], hand[2]], package[0].plan
opts = [torch.optim.Adam([p for p in m.parameters() if p.requires_grad], lr=0.05) for m in (hand, package)]
for t in range(20):
    for model, opt in zip((hand, package), opts):
        opt.zero_grad()
        extra = 0.1 * orthogonality(layers) if model is hand else adalora.penalty(package)
        ((model(x) - x[:, :4].sin()).square().mean() + extra).backward()
        opt.step()
    for m in layers if t < 15 else []:
        observe(m)
    if t > 2:
        cut(layers, adalora.budget(t, **plan))
    adalora.advance(package, t)

# %%
for mine, theirs in zip(layers, (package[0], package[2])):
    assert torch.equal(mine.lam != 0, theirs.lam != 0)
    assert all(torch.allclose(getattr(mine, n), getattr(theirs, n)) for n in ("P", "lam", "Q"))
print("on, per layer:", [int(m.lam.count_nonzero()) for m in layers], "- the same triplets and numbers in both")

# %% [markdown]
# The package's forward multiplies $Q$ by $\lambda$ first, which is cheaper for long inputs. Here it is, as it stands in the file.

# %%
import inspect

print(inspect.getsource(adalora.AdaLoRALinear.forward))

# %% [markdown]
# ## Before training
#
# Three promises, on the pretrained MiniLM with all six matrices of every layer as targets: the start is the base model, only triplets and the head train, and the count is $r\,(d_{in} + d_{out} + 1)$ per matrix.

# %%
from minipeft.lab import loop, models, tasks

task = tasks.load("sentiment")
WHERE = ("query", "key", "value", "output.dense", "intermediate.dense")  # output.dense names two


def fresh(seed=0, steps=60):
    model, tokenizer = models.load("minilm", labels=2, seed=seed, device="cpu")
    before = loop.predict(model, tokenizer, task.validation[:8])
    torch.manual_seed(seed)
    adalora.attach(model, *WHERE, r=6, target=2, alpha=96, total=steps, warmup=10, final=20, gamma=0.001)
    return model, tokenizer, before


# %%
model, tokenizer, before = fresh()
sites = adalora.sites(model)
formula = sum(6 * (sum(m.base.weight.shape) + 1) for m in sites.values())
assert torch.equal(loop.predict(model, tokenizer, task.validation[:8]), before)
assert loop.count(model)[0] == formula and len(sites) == 36
print(f"{len(sites)} matrices, {formula:,} numbers train, {formula / loop.count(model)[1]:.3f} of all")

# %% [markdown]
# ## Experiment 1: a teacher with known needs
#
# **Question.** Do the ranks go where they are needed, and does it help?
#
# **Set-up.** A two-layer network, 16 wide. The teacher is the same network with the first matrix changed by rank 6 and the second left alone. AdaLoRA starts at rank 6 in both and ends at 6 triplets in all; LoRA has rank 3 in both. The control is a teacher that changes both matrices by rank 3, where an even split is right. Five seeds; the error is on new inputs, relative to the base model's.
#
# **Hypothesis.** With unequal needs AdaLoRA sends more triplets to the first layer in every seed and its error is smaller. In the control it gains nothing.

# %%
import copy

from minipeft.reparam import lora


def problem(seed, ranks):
    g = torch.Generator().manual_seed(100 + seed)
    rand = lambda *n: torch.randn(*n, generator=g, dtype=torch.float64)
    base = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16)).double()
    for p in base.parameters():
        p.data = rand(*p.shape) / 4
    teacher = copy.deepcopy(base)
    for i, r in zip((0, 2), ranks):
        teacher[i].weight.data += rand(16, r) @ rand(r, 16) / 16
    x, new = rand(512, 16), rand(512, 16)
    return base, x, teacher(x).detach(), new, teacher(new).detach()


# %%
def learn(base, x, y, method, steps=600, lr=1e-2, **keywords):
    torch.manual_seed(0)
    model = copy.deepcopy(base)
    method.attach(model, "0", "2", **keywords)
    opt = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr, fused=True)
    down = torch.optim.lr_scheduler.LambdaLR(opt, lambda t: min(1, 2 * (1 - t / steps)))
    for t in range(steps):
        loss = (model(x) - y).square().mean()
        (loss + method.penalty(model) if method is adalora else loss).backward()
        opt.step()
        if method is adalora:
            method.advance(model, t)
        opt.zero_grad()
        down.step()
    return model


# %%
ADA = {"r": 6, "target": 3, "alpha": 6, "total": 600, "warmup": 100, "final": 250, "gamma": 0.01, "every": 5}
found = {}
for needs in ((6, 0), (3, 3)):
    for seed in range(5):
        base, x, y, new, truth = problem(seed, needs)
        scale = (base(new) - truth).square().mean()
        for name, method, kw in (("lora", lora, {"r": 3, "alpha": 3}), ("adalora", adalora, ADA)):
            model = learn(base, x, y, method, **kw)
            error = ((model(new) - truth).square().mean() / scale).item()
            kept = [int(m.lam.count_nonzero()) for m in method.sites(model).values()] if method is adalora else [3, 3]
            found.setdefault((needs, name), []).append((error, kept))

# %%
for (needs, name), rows in found.items():
    errors = torch.tensor([e for e, _ in rows])
    print(f"needs {needs}  {name:8}", "ranks", [k for _, k in rows], f"median error {errors.median():.2g}")

# %%
fig, axes = plt.subplots(1, 2, figsize=(7.2, 2.9), sharey=True)
for ax, needs in zip(axes, ((6, 0), (3, 3))):
    for x_, name in enumerate(("lora", "adalora")):
        errors = [e for e, _ in found[needs, name]]
        ax.plot([x_] * 5, errors, "o", color=figures.COLOURS[name], alpha=0.6)
    for a, b in zip(*(found[needs, n] for n in ("lora", "adalora"))):
        ax.plot([0, 1], [a[0], b[0]], color="#BBBBBB", lw=1, zorder=0)
    ax.set_xticks([0, 1], ["LoRA", "AdaLoRA"])
    ax.set(yscale="log", xlim=(-0.5, 1.5), title=f"needed ranks {needs[0]} and {needs[1]}")
axes[0].set_ylabel("error on new inputs (log axis)")
figures.describe("five seeds as dots, paired by lines. With needs 6 and 0 every line falls from LoRA to AdaLoRA; "
                 "with needs 3 and 3 every line rises: LoRA fits exactly, AdaLoRA does not.")

# %% [markdown]
# The gain is measured as a difference of logarithms, paired by seed, with its 95 % interval. Errors below 0.0001 count as solved and as equal.

# %% tags=["claim-59"]
from math import log10

gain = {}
for needs in ((6, 0), (3, 3)):
    pairs = zip(found[needs, "lora"], found[needs, "adalora"])
    gain[needs] = figures.interval([log10(max(a[0], 1e-4) / max(b[0], 1e-4)) for a, b in pairs])
    print(f"needs {needs}: AdaLoRA's error is smaller by {gain[needs][0]:.1f} +- {gain[needs][1]:.1f} decades")
ranks = [k for _, k in found[(6, 0), "adalora"]]
assert all(first > second for first, second in ranks)
assert gain[6, 0][0] - gain[6, 0][1] > 0 and gain[3, 3][0] - gain[3, 3][1] < 0
print("Claim 59, better under a tight budget: partly")

# %% [markdown]
# *Partly*: where needs differ, the same six triplets do far more. Where they are equal, an even split is already right: the ranks come out even, and the search and the penalty only cost accuracy. Whether a real task's needs differ is a question about the task; the paper reports 89.3 against 88.3 for LoRA on GLUE, at one budget, with settings tuned per task (*quoted only*).
#
# ## Experiment 2: where the ranks of MiniLM go
#
# **Question.** Which layers and modules keep their triplets on the sentiment task?
#
# **Hypothesis.** From the paper's figure: more in the feed-forward matrices and in the upper layers. Two seeds, 60 steps of 16 each; two seeds give a picture and no ranking. $\alpha$ and $\gamma$ are the best of three pairs by validation accuracy.

# %%
from types import SimpleNamespace


def watched(seed):
    model, tokenizer, _ = fresh(seed)
    models.unfreeze_head(model)
    history = []

    def advance(model, t):
        adalora.advance(model, t)
        lams = {p: m.lam.detach().clone() for p, m in adalora.sites(model).items()}
        history.append((lams, adalora.penalty(model).item() / 0.001))

    method = SimpleNamespace(penalty=adalora.penalty, advance=advance)
    ledger = loop.train(model, tokenizer, task, steps=60, lr=5e-3, method=method, seed=seed)
    return model, history, ledger


runs = [watched(seed) for seed in range(2)]

# %%
MODULES = ("query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense")


def table(lams):
    grid = torch.zeros(6, 6, dtype=torch.long)
    for path, lam in lams.items():
        layer, rest = path.split("layer.")[1].split(".", 1)
        column = next(i for i, m in enumerate(MODULES) if rest.endswith(m))
        grid[int(layer), column] = lam.count_nonzero()
    return grid


ends = [table(history[-1][0]) for _, history, _ in runs]
assert all(int(g.sum()) == 36 * 2 for g in ends)

# %%
fig, axes = plt.subplots(1, 4, figsize=(9.4, 3.1), sharey=True)
shown = [(f"seed 0, step {t}", table(runs[0][1][t][0])) for t in (15, 25)]
shown += [(f"seed {s}, end", g) for s, g in enumerate(ends)]
for ax, (title, grid) in zip(axes, shown):
    ax.imshow(grid, vmin=0, vmax=6, origin="lower")
    for i in range(6):
        for j in range(6):
            ax.text(j, i, int(grid[i, j]), ha="center", va="center", color="white" if grid[i, j] < 4 else "black")
    ax.set_xticks(range(6), ["q", "k", "v", "o", "f1", "f2"])
    ax.set_title(title, fontsize=11)
    ax.grid(visible=False)
axes[0].set_ylabel("layer")
figures.describe("ranks over layers and modules at step 15, at step 25 and at the end for two seeds; "
                 "from 6 everywhere they thin out to 72 triplets, unevenly spread.")

# %%
for s, grid in enumerate(ends):
    ffn, upper = grid[:, 4:].sum() / 72, grid[3:].sum() / 72
    print(f"seed {s}: share of the feed-forward matrices {ffn:.1f} (of the matrices: 0.3), "
          f"of the upper three layers {upper:.1f} (0.5)")
agree = torch.corrcoef(torch.stack([g.flatten().double() for g in ends]))[0, 1]
print(f"the two maps correlate at {agree:.1f}")

# %% [markdown]
# The maps say where triplets *survived* under this rule, in 60 steps. They do not say that the empty cells are useless: a matrix may have lost its triplets early, while all were weak. Compare the two seeds before reading meaning into one cell. The map also depends on $\gamma$, because the gradient in the score is that of the whole loss, penalty included. Try `alpha=12, gamma=0.01`: after the same 60 steps no feed-forward matrix has a triplet left.

# %% tags=["claim-58"]
lams, orth = zip(*runs[0][1])
counts = [sum(int(v.count_nonzero()) for v in step.values()) for step in lams]
plan = next(iter(adalora.sites(runs[0][0]).values())).plan
assert counts[11:] == [adalora.budget(t, **plan) for t in range(11, 60)]
assert counts[-1] == 72 and orth[-1] < 0.5 * orth[0]
print(f"triplets {counts[0]} -> {counts[20]} -> {counts[-1]}; distance from orthonormal falls to {orth[-1] / orth[0]:.2f} of its start")
print("Claim 58, P Lambda Q, triplets pruned under one global cubic schedule: proved")

# %% [markdown]
# The lecture's step list begins with *initialise full-rank LoRA*. Its next slide says that the budget starts slightly above the target. The second is the paper's.

# %% tags=["claim-57"]
full = [min(m.base.weight.shape) for m in adalora.sites(runs[0][0]).values()]
paper = {2: 4, 4: 6, 8: 12}  # final rank: first rank, the authors' settings on GLUE
assert min(full) == 384 and all(first <= 2 * last for last, first in paper.items())
print(f"full rank would be {min(full)} per matrix; the authors start at {list(paper.values())} to end at {list(paper)}")
print("Claim 57, initialise full-rank LoRA: corrected")

# %% [markdown]
# ## It breaks
#
# **The order of the loop.** Scores are read off the gradients. After `zero_grad` there are none, and the file says so.

# %%
model, tokenizer, _ = fresh()
try:
    adalora.advance(model, 0)
except RuntimeError as error:
    print("RuntimeError:", error)

# %% [markdown]
# **No `advance` at all.** Then every triplet stays, and the model is a LoRA of the larger rank. `state` warns.

# %%
import warnings

adalora.sites(model)[next(iter(sites))].lam.data += 1
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    adalora.state(model)
print(str(said[0].message).partition("self.")[2])

# %% [markdown]
# **A threshold instead of a count.** The authors' code keeps what lies *above* the k-th smallest score. With equal scores, which happen at the start and for dead layers, it keeps too few.

# %%
scores, b = torch.zeros(8), 5
threshold = scores.kthvalue(8 - b).values
print("kept by threshold:", int((scores > threshold).sum()), " kept by count:", len(scores.argsort(descending=True)[:b]))

# %% [markdown]
# **Rescaling by the rank that is left.** $s = \alpha / r$ keeps the first $r$. A file that stores the kept rank and divides by it is another function.

# %%
model = runs[0][0]
inputs = task.validation[:64]
y = loop.predict(model, tokenizer, inputs)
kept = copy.deepcopy(model)
for m in adalora.sites(kept).values():
    m.s *= 6 / max(1, int(m.lam.count_nonzero()))
print(f"largest change of a logit: {(loop.predict(kept, tokenizer, inputs) - y).abs().max():.1f}")

# %% [markdown]
# ## Save, load, merge, detach
#
# The saved state leaves out what is off: small tensors, layers of rank 0 among them, the same function.

# %%
import pathlib
import tempfile

from minipeft.lab import store

with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / "adalora.safetensors"
    size = store.save(path, model, adalora)
    other, _, _ = fresh(seed=9)
    store.load(path, other, adalora)
assert torch.allclose(loop.predict(other, tokenizer, inputs), y, atol=1e-4)
numbers = sum(v.numel() for v in adalora.state(model).values())
print(f"{formula:,} numbers while training, {numbers:,} in the file")

# %%
detached = copy.deepcopy(model)
adalora.detach(detached)
adalora.merge(model)
plain, _ = models.load("minilm", labels=2, device="cpu")
assert torch.allclose(loop.predict(model, tokenizer, inputs), y, atol=1e-4) and not adalora.sites(model)
assert all(torch.equal(a, b) for a, b in zip(detached.bert.parameters(), plain.bert.parameters()))
print("merged: the same function; detached: the base, bit for bit")

# %%
ledger = runs[0][2]
test = loop.accuracy(model, tokenizer, task.test)
print("method   trained   in the file  optimiser MB  test accuracy, seed 0")
print(f"adalora  {ledger.trained:,}   {numbers:,}       {ledger.optimizer_bytes / 1e6:.1f}           {test:.2f}")

# %% [markdown]
# Nothing is freed during training: all triplets, their averages and the optimiser's moments stay until export. AdaLoRA saves numbers in the *result*.
#
# A run that is to go on after a break needs the averages too. `adalora.resumable(model)` and `adalora.resume(model, saved)` carry them.
#
# ## The difference to LoRA
#
# The two files have the same parts in the same order. In the forward, this is all:

# %%
import difflib

texts = [inspect.getsource(m.forward).splitlines() for m in (lora.LoRALinear, adalora.AdaLoRALinear)]
print("\n".join(line for line in difflib.ndiff(*texts) if line[0] in "+-"))

# %% [markdown]
# ## Recall
#
# 1. Why does a triplet, and not an entry of $\Delta W$, get a score?
# 2. Which two of the three parts move at the very first step, and why?
# 3. Why can a triplet that was cut come back, and until when?
# 4. What would happen to wide layers if scores were summed and not averaged?
#
# ## Exercises
#
# **1** *(derive and code, easy, 5 minutes).* Write the gradient of $\|QQ^\top - I\|_F^2$ with respect to $Q$, of shape $(r, d)$.

# %%
from minipeft.lab import exercises

Q = torch.arange(6.0).reshape(2, 3).requires_grad_()
((Q @ Q.T - torch.eye(2)) ** 2).sum().backward()

# %% tags=["exercise-1"]
def gradient(Q):
    return None


answer = gradient(Q.detach())

# %%
exercises.check(answer, Q.grad, "the rows are the vectors here: on which side does the Gram matrix stand?")

# %% [markdown]
# **2** *(criticise, middle, 10 minutes).* The paper prints its schedule with the numerator $t - t_i - t_f$ over the same denominator. Take $T = 30$, $t_i = 5$, $t_f = 10$, $b_0 = 24$, $b_T = 8$. What budgets does the printed formula give at $t = 5$ and at $t = 19$, before the constant phase? Answer as `torch.tensor([first, second])`, rounded down. Then say what is wrong with each.

# %% tags=["exercise-2"]
answer = None

# %%
exercises.check(answer, torch.tensor([82, 14]), "put t = 5 into 1 - (t - 15) / 15, cube it, scale it by 16 and add 8")

# %% [markdown]
# **3** *(derive, easy, 5 minutes).* With $\beta = 0.9$ for both averages, the score after the first step is which multiple of $I^2$?

# %% tags=["exercise-3"]
answer = None

# %%
exercises.check(answer, 0.009, "the deviation is measured from the updated mean")

# %% [markdown]
# **4** *(code, middle, 10 minutes).* Write a cut that keeps exactly $b$ triplets, ties or not, and returns one mask per layer for a list of score vectors.

# %% tags=["exercise-4"]
def masks(scores, b):
    return None


answer = masks([torch.tensor([1.0, 3.0]), torch.tensor([2.0, 3.0, 3.0])], 3)

# %%
def right(masks):
    if len(masks) != 2 or [len(m) for m in masks] != [2, 3]:
        return "one mask per layer, as long as its scores"
    if sum(int(m.sum()) for m in masks) != 3:
        return "three triplets must stay"
    return "" if masks[0].tolist() == [False, True] else "a triplet with a smaller score took the place of a larger"


exercises.check(answer, right)

# %% [markdown]
# **5** *(experiment, middle, 10 minutes).* The sensitivity of a number is the same in every step. Its score rises, has its largest value, and decays. Simulate it with $\beta = 0.85$. After how many steps, counted from the start, is the score for the first time below a tenth of its largest value?

# %% tags=["exercise-5"]
answer = None

# %%
exercises.check(answer, 33, "keep both averages in a loop, start at zero, and look only beyond the largest score")

# %% [markdown]
# ## To remember
#
# - A triplet is the unit of rank: one $\lambda$ set to zero removes one rank and nothing else.
# - The score is sensitivity times its own deviation, averaged over the vectors; the budget is one for all matrices and falls as a cube.
# - Ranks go where they are needed when needs differ. Training memory is not saved; the file is.
#
# **Further reading.** Zhang et al. 2023, section 3.2 on importance, equation 12 with exercise 2 at hand, figure 3 on the ranks; He et al. 2022 (SparseAdapter, arXiv:2210.04284) on pruning before training.
#
# **Next.** Chapter 32 changes another part of LoRA: how far a row's length may go while its direction turns.
