# %% [markdown]
# # 34 · MonteCLoRA
#
# **In one sentence.** During training LoRA's $A$ is drawn from a cloud whose width is learned; at evaluation the cloud's mean is left, and that is plain LoRA. The promise: less depends on learning rate and batch size.
#
# **Paper.** Seth et al., *Robust and Efficient Fine-tuning of LLMs with Bayesian Reparameterization of Low-Rank Adaptation*, TMLR 2025, arXiv:2411.04358 (version 3). Its body is not quoted here; what is said about the method follows the abstract, the authors' page and their code.
#
# **Read first.** [30 LoRA](30_lora.ipynb).
#
# **Time.** 45 minutes to read, about 80 seconds to run on one core.

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
# 1. derive what the Wishart, the Dirichlet and the average of draws amount to: one line of noise on $A$;
# 2. check a divergence against an independent implementation, and find a wrong sign in a released one;
# 3. design a sensitivity study with the two controls it needs, and read its spread with an interval.

# %%
figures.taxonomy(lit="monteclora")

# %% [markdown]
# ## The problem
#
# The lecture: *LoRA is highly sensitive to hyper-parameters such as learning rate or batch size.* Here is the smallest case: one task, one seed, three learning rates.

# %%
import runpy

from minipeft.lab import results

study = runpy.run_path(str(results.ROOT / "data" / "sensitivity.py"))
live = {lr: study["run"]("lora", lr, 64, 0)["test"] for lr in (3e-3, 3e-2, 3e-1)}
print("LoRA, batches of 64, test accuracy by learning rate:", {k: round(v, 2) for k, v in live.items()})
assert max(live.values()) - min(live.values()) > 0.2

# %% [markdown]
# ## The idea
#
# A single $A$ is one point. If training sees a cloud of points around it, a good result must be good for the whole cloud, so the place found should be flatter and care less how it was reached. The width of the cloud is learned too, held by priors. That is the promise. This chapter builds the method and then puts the promise to the test.
#
# ## The derivation, in six steps
#
# $A$ is $(r, d_{in})$, $B$ is $(d_{out}, r)$, $s$ is LoRA's scale. New: $\sigma$ (one number per row of $A$), $a$ (one per draw, $N$ in all), $\varepsilon$ (a constant). Trained are $A$, $B$, $\log\sigma$ and $\log a$.
#
# **Step 1. Draw around the mean.** In training the layer computes with $\tilde A = A + \text{noise}$:
#
# $$y = xW^\top + b + s\,(x\tilde A^\top)B^\top .$$
#
# $A$ is a parameter and the noise is added to it, so the gradient reaches $A$ as in LoRA. (The released code does something else; see below.)
#
# **Step 2. A covariance from a Wishart.** $\Sigma \sim \mathcal W_r(\mathrm{diag}(\sigma^2))$ is the law of $\sum_{i\le r} g_i g_i^\top$ with $g_i\sim N(0,\mathrm{diag}(\sigma^2))$. Bartlett draws it without the sum: a lower triangle $L$ with normals below the diagonal and $\sqrt{\chi^2}$ on it. $LL^\top$ is the draw, so $L$ is its Cholesky factor for free.

# %%
from torch.distributions import Chi2, Dirichlet, Wishart, kl_divergence

r, draws = 4, 4000
df = torch.arange(r, 0, -1).double()
L = torch.randn(draws, r, r).double().tril(-1) + torch.diag_embed(Chi2(df).sample((draws,)).sqrt())
S = L @ L.mT
theory = Wishart(torch.tensor(4.0).double(), torch.eye(r).double())
assert (S.mean(0) - theory.mean).abs().max() < 0.2
assert (S.var(0) / theory.variance - 1).abs().max() < 0.2

# %% [markdown]
# **Step 3. Only the diagonal is used.** All implementations keep the diagonal of $\Sigma$. The diagonal of a Wishart is $r$ independent $\chi^2_r$ variables: $\Sigma_{jj}=\sigma_j^2\,\chi^2_{r,j}$. So the Wishart amounts to a random scale per row.

# %%
diagonal = S.diagonal(dim1=1, dim2=2)
print(f"mean {diagonal.mean():.1f} (r = {r}), variance {diagonal.var(0).mean():.1f} (2 r = {2 * r})")
assert (diagonal.T.corrcoef() - torch.eye(r)).abs().max() < 0.08

# %% [markdown]
# **Step 4. An average, not a mixture.** $N$ draws $Z_n\sim N(0,\Sigma)$ are averaged with weights $\pi\sim\mathrm{Dirichlet}(a)$. A mixture would *pick* one. Given $\pi$, an average of normals is normal, with variance $\lVert\pi\rVert^2\Sigma$: one draw, scaled by $\lVert\pi\rVert$, has the same law and needs no $N$ copies of $A$.

# %%
pi = Dirichlet(torch.ones(4).double()).sample()
average = (pi[:, None] * torch.randn(4, 20000).double()).sum(0)
kurtosis = ((average / average.std()) ** 4).mean()
print(f"variance of the average {average.var():.3f}, |pi|^2 {pi.square().sum():.3f}; kurtosis {kurtosis:.1f}")
assert abs(average.var() / pi.square().sum() - 1) < 0.05 and abs(kurtosis - 3) < 0.2

# %% [markdown]
# **Step 5. All of it in one line.** For row $j$ and column $i$,
#
# $$\tilde A_{ji}-A_{ji} = \varepsilon\,\lVert\pi\rVert\,\sigma_j\sqrt{\chi^2_{r,j}}\;\xi_{ji},\qquad \xi\sim N(0,1),$$
#
# with variance $\varepsilon^2\, r\, \sigma_j^2\, E\lVert\pi\rVert^2$. For equal $a_n=a$: $E\lVert\pi\rVert^2=(a+1)/(Na+1)$, so more draws mean less noise, about like $2/N$.

# %%
for N in (1, 4, 16):
    a = torch.full((N,), 1.0).double()
    square = 1.0 if N == 1 else Dirichlet(a).sample((20000,)).square().sum(1).mean().item()
    print(f"N = {N:<2} E|pi|^2 sampled {square:.2f}, formula {2 / (N + 1):.2f}")
    assert abs(square - 2 / (N + 1)) < 0.01

# %% [markdown]
# **Step 6. What holds the cloud.** A penalty joins the loss, averaged over the layers:
#
# $$\eta\,(D_{\mathrm{Dir}} + D_{\mathrm{Wish}} + D_{\mathrm{Gauss}}) + E\lVert\pi\rVert^2 ,$$
#
# the divergences of $\mathrm{Dirichlet}(a)$ from a reference, of the Wishart from $\sigma=1$, and of $N(0,\Sigma)$ from $N(0,I)$, $N$ times. The last term is called *cooperation* on the authors' page; by step 5 it multiplies the variance of the noise. The two covariance terms pull apart: one wants $\sigma^2=1$, the other $r\sigma^2=1$. They meet at $\sigma^2=(r+N)/(r(1+N))$.

# %%
from minipeft.reparam import monteclora

layer = monteclora.MonteCLoRALinear(torch.nn.Linear(12, 9).double(), r=8, alpha=16.0, samples=4, eps=0.1)
layer.log_sigma.data.fill_(0.5 * torch.tensor((8 + 4) / (8 * (1 + 4)), dtype=torch.float64).log())
D, wishart, gauss, cooperation = layer.divergences(prior=1.0)
(wishart + gauss).backward()
assert layer.log_sigma.grad.abs().max() < 1e-9
a = layer.log_alpha.detach().exp()
torch.testing.assert_close(D.detach(), kl_divergence(Dirichlet(a), Dirichlet(torch.ones_like(a))))
print("sigma^2 where the two terms meet, r = 8, N = 4:", (8 + 4) / (8 * (1 + 4)))

# %% [markdown]
# ## Built by hand
#
# The definition, written out as it stands: a Wishart, a Dirichlet, $N$ copies, an average.

# %%
def noise_by_definition(sigma, a, d_in, eps):
    r, N = len(sigma), len(a)
    V = Wishart(torch.tensor(float(r)).double(), torch.eye(r).double()).sample()
    Sigma = (sigma[:, None] * V * sigma).diagonal()  # the diagonal is kept
    Z = Sigma.sqrt()[None, :, None] * torch.randn(N, r, d_in).double()
    pi = Dirichlet(a).sample()
    return eps * (pi[:, None, None] * Z).sum(0)  # (r, d_in)

# %% [markdown]
# The package's one draw must have the same law. Second and fourth moments of each row agree, within what 3,000 draws can tell.

# %%
import warnings

warnings.filterwarnings("ignore", message="Singular sample detected")
sigma, a = layer.log_sigma.detach().exp(), layer.log_alpha.detach().exp()
torch.manual_seed(1)
slow = torch.stack([noise_by_definition(sigma, a, 12, 0.1) for _ in range(3000)])
with torch.no_grad():
    fast = torch.stack([layer.noise() for _ in range(3000)])
moments = {p: ((fast**p).mean() / (slow**p).mean()).item() for p in (2, 4)}
predicted = 0.1**2 * 8 * sigma.square().mean() * cooperation
print("package / definition:", {f"moment {p}": round(v, 1) for p, v in moments.items()})
assert abs(moments[2] - 1) < 0.05 and abs(moments[4] - 1) < 0.15
assert abs(fast.square().mean() / predicted - 1) < 0.05

# %%
import inspect

print(inspect.getsource(monteclora.MonteCLoRALinear.forward))
print(inspect.getsource(monteclora.MonteCLoRALinear.noise))

# %% [markdown]
# ## Invariants, before any training
#
# Step 0 is the base model, noise or not, because $B=0$. Without noise it is LoRA to the last bit. In eval mode it is LoRA too. It trains $r+N$ numbers more per layer. And the loss alone moves all four parameters, through the noise.

# %%
import copy

from minipeft.lab import loop, models, tasks
from minipeft.reparam import lora

model, tokenizer = models.load("minilm", labels=4, seed=0)
batch = next(loop.batches(tasks.load("domain").test, tokenizer))
tuned, plain = copy.deepcopy(model), copy.deepcopy(model)
places = monteclora.attach(tuned, "query", "value", r=8, alpha=16.0, samples=4, eps=5e-3)
lora.attach(plain, "query", "value", r=8, alpha=16.0)
with torch.no_grad():
    assert torch.equal(tuned.train()(**batch).logits, model(**batch).logits)
print("numbers that train:", loop.count(tuned)[0], "and LoRA:", loop.count(plain)[0])
assert loop.count(tuned)[0] - loop.count(plain)[0] == len(places) * (8 + 4)

# %%
for m, n in zip(monteclora.sites(tuned).values(), lora.sites(plain).values()):
    torch.nn.init.normal_(m.B, std=0.02)
    n.A.data.copy_(m.A)
    n.B.data.copy_(m.B)
tuned(**batch).loss.backward()
reached = {n.rpartition(".")[2] for n, p in tuned.named_parameters() if p.grad is not None and p.grad.any()}
with torch.no_grad():
    assert torch.equal(tuned.eval()(**batch).logits, plain(**batch).logits)
print("reached by the task's loss:", sorted(reached))
assert reached == {"A", "B", "log_sigma", "log_alpha"}

# %% [markdown]
# **How large is the noise?** The entries of $A$ have standard deviation $1/\sqrt{3d_{in}}$. The noise reaches that at $\varepsilon\approx 0.5/\sqrt{r\,d_{in}}$.

# %%
site = next(iter(monteclora.sites(tuned).values()))
for eps in (1e-6, 1e-4, 5e-3, 2e-2):
    site.eps = eps
    with torch.no_grad():
        size = torch.stack([site.noise() for _ in range(100)]).std() / site.A.std()
    print(f"eps = {eps:<6g} noise / A = {size:.1g}")

# %% [markdown]
# The default of Hugging Face's `peft`, $10^{-4}$, is a hundredth of $A$ here. The authors' page recommends about $5\cdot10^{-3}$, and a study must include a noise of that size.
#
# ## The study: does less depend on learning rate and batch size?
#
# **Question.** Over a grid of learning rates and batch sizes, does MonteCLoRA's accuracy vary less than LoRA's?
#
# **Two controls.** LoRA, and MonteCLoRA with $\varepsilon=10^{-6}$: the same code, the same penalty, a noise too small to matter. Whatever the second differs from the first is chance. *A spread is a noisy number, and a claim about it must beat this placebo.*
#
# **Hypothesis.** The authors': a smaller spread and a median that is not lower. For it: the interval of spread(MonteCLoRA) $-$ spread(placebo) lies below zero. Against it: it contains zero.
#
# **Design.** `domain` (four classes), 5 rates from $3\cdot10^{-3}$ to $3\cdot10^{-1}$, batches of 8 and 64, one pass over 800 rows, 4 seeds, 5 arms: 200 runs by `data/sensitivity.py`. To afford them, only MiniLM's last layer is adapted. For each seed and arm: *best* is the test accuracy of the cell with the best validation accuracy, *median* and *spread* (best minus worst) are over the 10 cells. Three runs above were live and must agree.

# %%
stored = results.read("sensitivity")
cells = {(w["arm"], w["lr"], w["batch"], w["seed"]): w for w in stored["rows"]}
for lr, value in live.items():
    assert abs(cells["lora", lr, 64, 0]["test"] - value) < 0.04, "the stored run and this one differ"
ARMS, SEEDS = list(stored["eps"]), stored["seeds"]


def grid(arm, seed, what="test"):
    return [cells[arm, lr, b, seed][what] for lr in stored["rates"] for b in stored["batches"]]


def summary(arm, seed):
    test, validation = grid(arm, seed), grid(arm, seed, "validation")
    middle = torch.tensor(test).quantile(0.5).item()
    return {"best": test[validation.index(max(validation))], "median": middle, "spread": max(test) - min(test)}


table = {arm: [summary(arm, s) for s in SEEDS] for arm in ARMS}
for arm, rows in table.items():
    print(f"{arm:18}", "  ".join(f"{k} {figures.interval([w[k] for w in rows])[0]:.2f} "
                                 f"+- {figures.interval([w[k] for w in rows])[1]:.2f}" for k in rows[0]))

# %%
import matplotlib.pyplot as plt

names = {"full": "all weights", "lora": "LoRA", "monteclora placebo": "placebo\n(eps 1e-6)",
         "monteclora 5e-3": "MonteCLoRA\n(eps 5e-3)", "monteclora 2e-2": "MonteCLoRA\n(eps 2e-2)"}
fig, ax = plt.subplots(figsize=(7.2, 3.8))
for x, arm in enumerate(ARMS):
    values = [v for s in SEEDS for v in grid(arm, s)]
    colour = figures.COLOURS[arm.split()[0]]
    parts = ax.violinplot(values, [x], widths=0.8, showextrema=False)
    parts["bodies"][0].set(facecolor=colour, alpha=0.25)
    ax.boxplot(values, positions=[x], widths=0.18, showfliers=False, medianprops={"color": colour})
    shift = torch.linspace(-0.12, 0.12, len(values)).tolist()
    ax.plot([x + 0.24 + 0.5 * d for d in shift], values, ".", color=colour, markersize=3)
ax.set_xticks(range(len(ARMS)), [names[a] for a in ARMS])
ax.set_ylabel("test accuracy")
ax.set_title("TITLE_VIOLIN")
figures.describe("violins of the test accuracy over 5 learning rates, 2 batch sizes and 4 seeds, one per arm, "
                 "each run a dot and a box for the quartiles.")

# %%
fig, ax = plt.subplots(figsize=(7.2, 3.4))
for arm in ARMS:
    for b, style in zip(stored["batches"], ("--", "-")):
        mean = [figures.interval([cells[arm, lr, b, s]["test"] for s in SEEDS])[0] for lr in stored["rates"]]
        dark = {"monteclora placebo": "#C9A0B4", "monteclora 5e-3": "#882255", "monteclora 2e-2": "#4A1230"}
        ax.plot(stored["rates"], mean, style, marker="o", markersize=4, linewidth=1.4,
                color=dark.get(arm, figures.COLOURS[arm.split()[0]]), label=names[arm].replace("\n", " ") if style == "-" else None)
ax.set_xscale("log")
ax.set_xlabel("learning rate (log scale; all weights take 0.04 of it). Solid: batches of 64, dashed: 8")
ax.set_ylabel("test accuracy, mean of 4 seeds")
ax.legend(fontsize=9)
ax.set_title("TITLE_CURVES")
figures.describe("test accuracy against learning rate for five arms and two batch sizes.")

# %%
def paired(arm, control, what):
    return figures.interval([m[what] - c[what] for m, c in zip(table[arm], table[control])])


for control in ("monteclora placebo", "lora"):
    for arm in ("monteclora 5e-3", "monteclora 2e-2"):
        line = []
        for what in ("spread", "median", "best"):
            mean, half = paired(arm, control, what)
            line.append(f"{what} {mean:+.2f} +- {half:.2f}{'' if abs(mean) > half else ' (contains 0)'}")
        print(f"{arm} minus {names[control].split(chr(10))[0]}:", ", ".join(line))
chance, width = paired("monteclora placebo", "lora", "spread")
print(f"placebo minus LoRA, which is chance: spread {chance:+.2f} +- {width:.2f}")

# %% [markdown]
# READING
#
# ## What the lecture says
#
# The lecture's slides on MonteCLoRA, one claim at a time.

# %% tags=["claim-64"]
layer = monteclora.MonteCLoRALinear(torch.nn.Linear(12, 9).double(), r=4, alpha=16.0, samples=4, eps=0.5)
torch.nn.init.normal_(layer.B)
x = torch.randn(5, 12).double()
layer.train()(x).square().sum().backward()
assert layer.log_sigma.grad.any() and layer.log_alpha.grad.any()
print("Claim 64, the variance comes from a Wishart and the weights from a Dirichlet whose prior is a "
      "hyper-parameter: corrected (the concentrations are learned; only their reference is fixed)")

# %% tags=["claim-65"]
torch.manual_seed(2)
with torch.no_grad():
    outputs = torch.stack([layer(x) for _ in range(2000)])
    mean = layer.eval()(x)
    error = (outputs.mean(0) - mean) / (outputs.std(0) / len(outputs) ** 0.5)
assert error.abs().max() < 5
print("Claim 65, the output is an unbiased estimator of LoRA's: proved for one layer (E noise = 0); "
      "2,000 draws stay within 5 standard errors: reproduced")

# %% tags=["claim-66"]
target = torch.randn(5, 9).double()
gain = (outputs - target).square().mean(0) - (outputs.mean(0) - target).square()
torch.testing.assert_close(gain, outputs.var(0, unbiased=False))
assert gain.mean() > 0.01
print("Claim 66, 'therefore no additional expected loss': corrected "
      f"(a squared loss grows by exactly the output's variance, here {gain.mean():.1f})")

# %% [markdown]
# **The claim on curvature.** The lecture: *noise reduces the Lipschitz bound, the largest eigenvalue of the Hessian.* Training under noise minimises the smoothed loss $E_z\,L(\theta+\tau z)$, whose Hessian is $E_z\,H(\theta+\tau z)$: an average of Hessians in the neighbourhood. Its largest eigenvalue is at most the largest *in the neighbourhood*. That is a bound, and no promise for the point itself. Three cases that fit on a line:
#
# - a quadratic has one Hessian everywhere, and nothing changes;
# - $\cos(k\theta)$ smooths to $e^{-k^2\tau^2/2}\cos(k\theta)$: curvature shrinks towards zero, which at a maximum means *up*;
# - $\theta^4$ has curvature $12\theta^2$, and smoothed $12(\theta^2+\tau^2)$: at its minimum noise *raises* it.

# %% tags=["claim-67"]
z = torch.randn(200_000).double()


def curvature(second_derivative, theta, tau):
    return second_derivative(theta + tau * z).mean().item()


cases = {"quadratic": (lambda t: 3.0 + 0 * t, 0.0), "cos(3 t) at its maximum": (lambda t: -9 * torch.cos(3 * t), 0.0),
         "cos(3 t) at its minimum": (lambda t: -9 * torch.cos(3 * t), torch.pi / 3), "t^4": (lambda t: 12 * t**2, 0.0)}
for name, (f, theta) in cases.items():
    print(f"{name:24}", [round(curvature(f, theta, tau), 1) for tau in (0.0, 0.3, 1.0)])
assert abs(curvature(*cases["cos(3 t) at its minimum"], 0.3) - 9 * torch.exp(torch.tensor(-0.405))) < 0.05
assert curvature(*cases["t^4"], 0.3) > 1 and curvature(*cases["quadratic"], 1.0) == 3
print("Claim 67, added noise lowers the largest Hessian eigenvalue: corrected (it lowers the bound over a "
      "neighbourhood; at one point the eigenvalue may rise)")

# %% tags=["claim-68"]
X, theta = torch.randn(400, 3).double(), torch.randn(4, 3).double()
p = (X @ theta.T).softmax(1)


def matrices(labels):
    g = torch.einsum("nk,nd->nkd", p - torch.nn.functional.one_hot(labels, 4), X).flatten(1)
    H = torch.einsum("nkl,nd,ne->kdle", torch.diag_embed(p) - p[:, :, None] * p[:, None], X, X).reshape(12, 12)
    return H / 400, g.T @ g / 400


H, outer_model = matrices(p.multinomial(1)[:, 0])
_, outer_other = matrices(torch.randint(0, 4, (400,)))
gaps = [((H - o).norm() / H.norm()).item() for o in (outer_model, outer_other)]
print(f"relative gap: labels from the model {gaps[0]:.1f}, other labels {gaps[1]:.1f}")
assert gaps[0] < 0.5 < gaps[1]
print("Claim 68, the Hessian is the square of the gradient: corrected (on average, and for labels that the "
      "model itself draws; not otherwise)")

# %% tags=["claim-69"]
wide = monteclora.MonteCLoRALinear(torch.nn.Linear(64, 9).double(), r=2, alpha=16.0, samples=4, eps=0.1)
torch.manual_seed(3)
with torch.no_grad():
    row = torch.stack([wide.noise()[0] for _ in range(3000)])  # one row of A
tails = ((row / row.std()) ** 4).mean().item()
within = row.square().T.corrcoef().fill_diagonal_(0).sum().item() / (64 * 63)
print(f"kurtosis {tails:.0f} (a Gaussian has 3); correlation of squares within a row {within:.1f}")
assert tails > 4 and within > 0.1
print("Claim 69, the update is Gaussian noise on each LoRA parameter: partly (on A only, and a Gaussian of "
      "random scale shared by a row)")

# %% tags=["claim-70"]
shares = {}
for arm in ("full", "lora", "monteclora 5e-3"):
    values = torch.tensor([v for s in SEEDS for v in grid(arm, s)])
    q1, q3 = values.quantile(0.25), values.quantile(0.75)
    shares[arm] = (values < q1 - 1.5 * (q3 - q1)).float().mean().item()
print("runs below the lower whisker:", {k: round(v, 2) for k, v in shares.items()})
VERDICT70

# %% [markdown]
# ## What the released code does
#
# Two findings, stated as what happens when the public code is run. Whether the paper's tables came from this path is not known; the authors' later version inside Hugging Face's `peft` repairs the second.
#
# **A sign.** The divergence of two Dirichlets has three parts; the middle one carries a minus. Three public versions have a plus, and exponentiate $\log\Gamma$ on the way. A divergence cannot be negative, which is a test that needs no reference.

# %%
def released(a, prior):
    b, gamma = torch.full_like(a, prior), lambda t: t.lgamma().exp()
    return ((gamma(a.sum()) / gamma(b.sum())).log() + (gamma(a) / gamma(b)).log().sum()
            + ((a - b) * (a.digamma() - a.sum().digamma())).sum()).item()


for a, prior in (([0.8, 1.2, 2.0, 2.0, 2.5], 0.1), ([1.2, 1.5, 1.1, 2.0], 0.1), ([1.5] * 4, 1.0), ([0.5] * 4, 1.0)):
    a = torch.tensor(a).double()
    right = kl_divergence(Dirichlet(a), Dirichlet(torch.full_like(a, prior))).item()
    print(f"reference {prior}: released {released(a, prior):6.2f}, divergence {right:.2f}")
assert released(torch.full((40,), 1.5), 1.0) == float("inf")  # 40 draws in float32

# %% [markdown]
# With a wrong sign the minimum is elsewhere: the penalty pulls the concentrations to the wrong place. At the default weight of $10^{-5}$ that is a small force.
#
# **A new parameter in every forward.** The repository's training step puts the noisy sample where the parameter was. The optimiser keeps the old object and trains an orphan; the noise of one step becomes the start of the next.

# %%
def walk(steps, replace):
    torch.manual_seed(4)
    m = monteclora.MonteCLoRALinear(torch.nn.Linear(400, 9), r=8, alpha=16.0, eps=1e-3).train()
    torch.nn.init.normal_(m.B)
    first, start = m.A, m.A.detach().clone()
    opt, inputs = torch.optim.SGD([m.A, m.B], lr=1e-4), torch.randn(16, 400)
    for _ in range(steps):
        if replace:
            m.A = torch.nn.Parameter((m.A + m.noise()).detach())
        opt.zero_grad()
        m(inputs).square().mean().backward()
        opt.step()
    noise = torch.stack([m.noise().detach() for _ in range(50)]).std()
    return torch.equal(first, start), ((m.A - start).std() / noise).item()


for name, replace in (("released", True), ("functional", False)):
    still, drift = walk(100, replace)
    print(f"{name:10} the optimiser's A moved: {not still}; the layer's A is {drift:.0f} noises from its start")
    assert still == replace
assert 6 < walk(100, True)[1] < 14

# %% [markdown]
# Ten noises after a hundred steps is $\sqrt{100}$: a random walk. Trained is only $B$, over a drifting random projection. The released code applies $\varepsilon$ twice as well, so its $5\cdot10^{-3}$ is $2.5\cdot10^{-5}$, which makes the walk slow. In this book the noise is added *functionally*, as in `peft`, and a test holds the parameter's identity over ten forwards.
#
# ## It breaks
#
# **Train mode draws.** Evaluating in train mode gives another answer each time; the lab's `predict` switches. **Without the penalty** nothing holds $\sigma$ and $a$. **The penalty's cooperation term** alone drives the concentrations up, and the noise down:

# %%
drift = copy.deepcopy(layer)
opt = torch.optim.Adam([drift.log_sigma, drift.log_alpha], lr=0.05)
history = []
for _ in range(200):
    opt.zero_grad()
    *kls, square = drift.divergences(1.0)
    (1e-5 * sum(kls) + square).backward()
    opt.step()
    history.append(square.item())
print(f"E|pi|^2 from {history[0]:.2f} to {history[-1]:.2f}; its minimum is 1 / N = 0.25")
assert history[-1] < 0.27

# %% [markdown]
# So over a long training the noise settles at its smallest for a given $N$, whatever the task says, unless $\eta$ is large enough to hold $a$.
#
# ## Merge, save, detach
#
# The merge is LoRA's: the mean is folded in, the noise is forgotten. $\sigma$ and $a$ are in the state, so that training can go on. $\varepsilon$ is not: it is a setting of the training, as dropout is.

# %%
merged = copy.deepcopy(tuned)
with torch.no_grad():
    before = merged(**batch).logits
    _ = monteclora.merge(merged)
    torch.testing.assert_close(merged(**batch).logits, before, rtol=1e-4, atol=1e-4)
fresh = copy.deepcopy(model)
monteclora.attach(fresh, "query", "value", r=8, alpha=1.0, samples=4)
monteclora.load(fresh, monteclora.state(tuned))
with torch.no_grad():
    assert torch.equal(fresh(**batch).logits, before)
monteclora.detach(fresh)
assert all(torch.equal(u, v) for u, v in zip(fresh.state_dict().values(), model.state_dict().values()))
print("merged: the same function; loaded: the same bits; detached: the base")

# %% [markdown]
# ## The row in the ledger

# %%
ledger = loop.train(tuned, tokenizer, tasks.load("domain"), steps=10, lr=5e-3, method=monteclora, seed=0)
print(f"trained {ledger.trained:,}; gradients {ledger.gradient_bytes / 1e6:.2f} MB; "
      f"AdamW's state {ledger.optimizer_bytes / 1e6:.2f} MB; kept noise: none")
per_module = 150 * 8 * 4096 * 32 * 4 / 1e6
print(f"`peft`'s buffer of 150 draws of 8 samples, d_in = 4096, r = 32: {per_module:.0f} MB for each module")
assert abs(per_module - 629) < 1

# %% [markdown]
# ## Recall
#
# 1. What does the Dirichlet do to the noise, in one word?
# 2. Why is it not a mixture of Gaussians?
# 3. Why is an unbiased output no unbiased loss?
# 4. What is the placebo arm for, if LoRA is an arm already?
# 5. How would you notice a parameter that is replaced in every forward?
#
# ## Exercises
#
# Solutions are in [solutions/34_monteclora.ipynb](solutions/34_monteclora.ipynb).
#
# **1. Derive (easy, 5 minutes).** $N=4$, all concentrations 2. What is $E\lVert\pi\rVert^2$?

# %% tags=["exercise-1"]
answer_1 = None  # a number

# %%
from minipeft.lab import exercises

exercises.check(answer_1, 3 / 9, "put a = 2 and N = 4 into the formula of step 5")

# %% [markdown]
# **2. Code (medium, 15 minutes).** `noise_sd(eps, sigma, a, r)`: the standard deviation of one entry of the noise, for one row's $\sigma$ and a vector $a$ of any values.

# %% tags=["exercise-2"]
def noise_sd(eps, sigma, a, r):
    return None


# %%
a2 = torch.tensor([1.0, 2.0, 3.0]).double()
second = (Dirichlet(a2).variance + Dirichlet(a2).mean ** 2).sum()
exercises.check(noise_sd(0.1, 2.0, a2, 8), 0.1 * 2.0 * (8 * second) ** 0.5,
                "variance eps^2 r sigma^2 E|pi|^2, and E|pi|^2 is the variances plus the squared means, summed")

# %% [markdown]
# **3. Derive (medium, 15 minutes).** Which $\sigma^2$ minimises $D_{\mathrm{Wish}}+D_{\mathrm{Gauss}}$ for $r=16$ and $N=8$?

# %% tags=["exercise-3"]
answer_3 = None  # a number

# %%
exercises.check(answer_3, (16 + 8) / (16 * 9), "set the derivative by sigma^2 to zero: r/2 (1 - 1/v) + N/2 (r - 1/v)")

# %% [markdown]
# **4. Experiment (medium, 20 minutes).** The range (largest minus smallest) of $n$ independent normal numbers grows with $n$. Estimate its mean, in standard deviations, for $n=6$ and $n=15$, as a pair to one digit. A method swept over 15 cells looks less robust than one swept over 6.

# %% tags=["exercise-4"]
answer_4 = None  # (number, number)

# %%
exercises.check(None if answer_4 is None else torch.tensor(answer_4), torch.tensor([2.53, 3.47]),
                "torch.randn(100_000, n): max minus min of each row, then the mean", tol=0.03)

# %% [markdown]
# **5. Criticise (hard, 15 minutes).** "MonteCLoRA performs significantly better on commonsense reasoning." The slide prints 72.3 for LoRA and 72.3 for MonteCLoRA. From the six columns of the slide the means are as below. By how many points does MonteCLoRA lead (two digits, with its sign)?

# %% tags=["exercise-5"]
slide = {"LoRA": [77.7, 71.5, 67.7, 79.2, 62.8, 75.2], "MonteCLoRA": [78.0, 71.0, 65.8, 79.9, 62.9, 76.0]}
answer_5 = None  # a number

# %%
exercises.check(answer_5, -0.08, "the mean of MonteCLoRA's six numbers minus the mean of LoRA's", tol=0.05)

# %% [markdown]
# ## To remember
#
# - MonteCLoRA is LoRA with noise on $A$: a random scale per row, the size set by $\varepsilon$, $\sigma$ and $\lVert\pi\rVert$. At evaluation it is LoRA.
# - One draw scaled by $\lVert\pi\rVert$ has the law of the average of $N$.
# - REMEMBER
#
# **Further reading.** The paper's abstract and the authors' page for the model; Srivastava and Sutton 2017 (arXiv:1703.01488) for the logistic-normal stand-in for the Dirichlet (`logistic=True`); `peft`'s `MontecloraConfig`.
#
# **Next.** [40 All compared](40_all_compared.ipynb). The sibling file: `diff minipeft/reparam/lora.py minipeft/reparam/monteclora.py`.
