# %% [markdown]
# # Solutions to 10 Adapters
#
# The same checks as in the chapter, with answers in front of them.

# %%
# The book's one setup cell: one thread, a seed, the book's look.
import torch

from minipeft.lab import figures

torch.set_num_threads(1)
_ = torch.manual_seed(0)
figures.style()

# %%
import copy

from minipeft.additive import adapter
from minipeft.lab import exercises, loop, models, tasks

base, tokenizer = models.load("minilm", labels=2)
rows = tasks.load("sentiment").validation[:32]
inputs = loop.collate([loop.encode(r, tokenizer) for r in rows], tokenizer)
inputs = {k: v.to(base.device) for k, v in inputs.items() if k != "labels"}


@torch.no_grad()
def vectors(model):
    return model.bert(**inputs).last_hidden_state[:, 0]


before = vectors(base)

# %% [markdown]
# **1.** Twelve adapters of $2md + d + m$ numbers; thirteen norms of $2d$: two per layer and the embeddings' own.

# %% tags=["exercise-1"]
trial = copy.deepcopy(base)
_ = adapter.attach(trial, bottleneck=16)
answer = loop.count(trial)[0]
print(f"{answer:,}")

# %%
exercises.check(answer, 2 * 6 * (2 * 16 * 384 + 384 + 16) + 13 * 2 * 384,
                "two adapters per layer with both biases; BERT has one norm more than two per layer", tol=1e-9)

# %% [markdown]
# **2.** Set $\tfrac12 \tau^2 \sqrt{dm} = 0.01$. At these sizes $\sqrt{dm} = 256$, so $\tau = \sqrt{0.02 / 256}$: what is left of the paper's $\sigma = 10^{-2}$ after the cut.

# %% tags=["exercise-2"]
answer = (0.02 / 256) ** 0.5
print(f"{answer:.4f}, and 0.88 times 0.01 is 0.0088")

# %%
exercises.check(answer, (2 * 0.01 / (1024 * 64) ** 0.5) ** 0.5, "solve step 2's formula for tau", tol=1e-2)

# %% [markdown]
# **3.** A target is a whole name or the dotted end of a path. `output.dropout` fits both sub-layers, so the full paths are needed.

# %% tags=["exercise-3"]
def ffn_only(model):
    paths = [p for p, _ in model.named_modules() if p.endswith(".output.dropout")]
    return [p for p in paths if ".attention." not in p]


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
# **4.** A change in layer 0 is met by five trained layers, whose attention averages over tokens and whose residual streams are scaled back by every LayerNorm. A change in layer 5 meets one norm.

# %% tags=["exercise-4"]
def change(layer):
    _ = torch.manual_seed(0)
    trial, at = copy.deepcopy(base), f"bert.encoder.layer.{layer}"
    adapter.attach(trial, f"{at}.attention.output.dropout", f"{at}.output.dropout",
                   bottleneck=32, sigma=0.1, norms=False)
    return ((vectors(trial) - before).norm() / before.norm()).item()


answer = "first" if change(0) > change(5) else "last"
print(f"layer 0: {change(0):.2f}, layer 5: {change(5):.2f}")

# %%
exercises.check(answer, "last", "attach at the full paths of one layer's two dropouts and compare with `before`")

# %% [markdown]
# **5.** The added products are small, but each waits for the one before it and costs a start of its own. The share of parameters says nothing about that.

# %% tags=["exercise-5"]
answer = "sequence"

# %%
exercises.check(answer, "sequence", "look at the left panel of the latency figure: is the arithmetic what takes the time?")
