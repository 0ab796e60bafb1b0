# %% [markdown]
# # Solutions to 11 · Prefix-tuning
#
# The checks are those of [the chapter](../11_prefix_tuning.ipynb).

# %%
import copy
import random
from dataclasses import replace

import torch

from minipeft.additive import prefix_tuning
from minipeft.lab import exercises, loop, models, results, tasks

torch.set_num_threads(1)
T, P, d_h = 5, 3, 6
g = torch.Generator().manual_seed(0)
q, K, V = (torch.randn(P + T, d_h, generator=g, dtype=torch.float64)[P:] for _ in range(3))
P_K, P_V = (torch.randn(P, d_h, generator=g, dtype=torch.float64) for _ in range(2))

# %% [markdown]
# **1.** Two tensors per layer, and the 8 heads of keys and values.

# %% tags=["exercise-1"]
answer_1 = 2 * 80 * 20 * 8 * 128

# %%
exercises.check(answer_1, 2 * 80 * 20 * 8 * 128, "keys and values, per layer, and the heads of keys, not of queries")

# %% [markdown]
# **2.** The softmax over all keys, summed over the slots.

# %% tags=["exercise-2"]
def gate_of(q, K, P_K):
    scores = q @ torch.cat([P_K, K]).T / q.shape[1] ** 0.5
    return scores.softmax(-1)[:, : len(P_K)].sum(-1)

# %%
expected = (q @ torch.cat([P_K, K]).T / d_h**0.5).softmax(-1)[:, :P].sum(-1)
exercises.check(gate_of(q, K, P_K), expected, "did you scale by the square root of d_h?")

# %% [markdown]
# **3.** A slot is a pair (key, value). Join each pair into one row and compare the rows as sets, here after sorting them by their first numbers.

# %% tags=["exercise-3"]
def same_function(A, B):
    rows = [torch.cat(pair, dim=1) for pair in (A, B)]  # (P, 2 d_h)
    ordered = [r[r[:, 0].argsort()] for r in rows]
    return torch.equal(*ordered)

# %%
def right_same(f):
    if f((P_K, P_V), (P_K, P_V)) is None:
        return "it returns None"
    flip = (P_K.flip(0), P_V.flip(0))
    if not f((P_K, P_V), flip):
        return "the same slots in another order are the same function"
    return "keys and values must move together" if f((P_K, P_V), (P_K.flip(0), P_V)) else ""


exercises.check(None if same_function((P_K, P_V), (P_K, P_V)) is None else same_function, right_same)

# %% [markdown]
# **4.** Train the chapter's prefix once more, then leave out one layer's at a time. The layer whose absence costs most is the answer.

# %% tags=["exercise-4"]
model, tokenizer = models.load("scribe")
task = tasks.load("letters")
few = random.Random(0).sample(task.train, 256)
context = "\n".join(r["prompt"] + r["target"] for r in few[:4]) + "\n"
words = tokenizer(context, return_tensors="pt", add_special_tokens=False)["input_ids"][0]
rate = next(r["lr"] for r in results.read("low_data")["rows"] if r["arm"] == "prefix")
tuned = copy.deepcopy(model)
tuned.set_attn_implementation("eager")
prefix_tuning.attach(tuned, words=words)
loop.train(tuned, tokenizer, replace(task, train=few), steps=120, lr=rate, seed=0)


@torch.no_grad()
def score(model, rows):
    inputs = loop.collate([loop.encode(r, tokenizer) for r in rows], tokenizer)
    return (model(**inputs).loss.item(),)


losses = []
for block in tuned.model.layers:
    held = block.self_attn.prefix
    del block.self_attn.prefix
    losses.append(score(tuned, task.test[:64])[0])
    block.self_attn.prefix = held
answer_4 = max(range(5), key=losses.__getitem__)
print("loss with all", round(score(tuned, task.test[:64])[0], 1), "without layer 0, 1, ...:", [round(v, 1) for v in losses])

# %%
def right_layer(answer):
    losses = []
    for block in tuned.model.layers:
        held = block.self_attn.prefix
        del block.self_attn.prefix
        losses.append(score(tuned, task.test[:64])[0])
        block.self_attn.prefix = held
    return "" if answer == max(range(5), key=losses.__getitem__) else "another layer's absence costs more"


exercises.check(answer_4, right_layer)

# %% [markdown]
# **5.** In peft a query of the text at $t$ is turned by $(t+P)\theta$, here by $t\theta$. The product of query and key depends on the difference of their turns, so each key is turned by $-P\theta$ and every score is what it was.

# %% tags=["exercise-5"]
answer_5 = -10

# %%
exercises.check(answer_5, -10, "the query at position t + P becomes the query at t: turn the key by the same amount")
