# %% [markdown]
# # Solutions to 12 · Prompt-tuning
#
# The checks are those of [the chapter](../12_prompt_tuning.ipynb).

# %%
import torch

from minipeft.lab import exercises

# %% [markdown]
# **1.** $2LPkd_h / (Pd) = 2\cdot32\cdot32\cdot128/4096$.

# %% tags=["exercise-1"]
answer_1 = 2 * 32 * 32 * 128 / 4096

# %%
exercises.check(answer_1, 64, "2 L P k d_h over P d")

# %% [markdown]
# **2.** Index with the task numbers, then join.

# %% tags=["exercise-2"]
def gather(bank, task_ids, X):
    return torch.cat([bank[task_ids], X], dim=1)

# %%
torch.manual_seed(5)
B5, X5, t5 = torch.randn(3, 2, 4), torch.randn(5, 6, 4), torch.tensor([2, 0, 1, 2, 2])
expected = torch.stack([torch.cat([B5[t], x]) for t, x in zip(t5, X5)])
exercises.check(gather(B5, t5, X5), expected, "is each row's own prompt in front?")

# %% [markdown]
# **3.** Row by row, at the first 1 of the mask.

# %% tags=["exercise-3"]
def labels_of(labels, mask, P):
    rows = []
    for row, real in zip(labels.tolist(), mask.tolist()):
        start = real.index(1)
        rows.append(row[:start] + [-100] * P + row[start:])
    return torch.tensor(rows)

# %%
L6 = torch.tensor([[-100, -100, 5, 6], [7, 8, -100, -100]])
M6 = torch.tensor([[0, 0, 1, 1], [1, 1, 0, 0]])
right = torch.tensor([[-100, -100, -100, -100, 5, 6], [-100, -100, 7, 8, -100, -100]])
exercises.check(labels_of(L6, M6, 2), right, "one row's text begins at column 2, the other's at column 0")

# %% [markdown]
# **4.** The factor 5 cancels.

# %% tags=["exercise-4"]
answer_4 = round(5 * 11_135_332_352 / (5 * 100 * 4096))

# %%
exercises.check(answer_4, round(11_135_332_352 / (100 * 4096)), "both sides have the factor 5")

# %% [markdown]
# **5.** $(1-0.003)^{1000}$ is about $e^{-3}$: the prompt keeps a twentieth of its size. The rate belongs to Adafactor.

# %% tags=["exercise-5"]
answer_5 = (1 - 0.3 * 0.01) ** 1000

# %%
exercises.check(answer_5, (1 - 0.3 * 0.01) ** 1000, "one factor per step, a thousand of them", tol=0.005)
