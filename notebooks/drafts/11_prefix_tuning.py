# %% [markdown]
# # 11 · Prefix-tuning
#
# **In one sentence.** A context steers a language model through the keys and values that it leaves in every layer, so prefix-tuning trains those keys and values directly and leaves the model as it is.
#
# **Paper.** Li and Liang, *Prefix-Tuning: Optimizing Continuous Prompts for Generation*, ACL 2021, arXiv:2101.00190. Section 4.2 is the method, 4.3 the reparameterisation, 7.4 the initialisation. The gate below is from He et al. 2022, arXiv:2110.04366.
#
# **Read first.** [02 Full fine-tuning](02_full_finetuning.ipynb). It helps to know attention with a key-value cache.
#
# **Time.** 40 minutes to read, about 60 seconds to run on one core.

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
# 1. derive what a prefix does to one attention head: a convex combination with a gate that depends on the input;
# 2. attach a prefix to a decoder, an encoder and an encoder-decoder, train it, save it in two forms and take it out again;
# 3. say what a prefix is not: not a longer sequence, not a no-op at zero, not something to rotate or to merge.

# %%
figures.taxonomy(lit="prefix")

# %% [markdown]
# ## The problem
#
# One way to teach a model a task without training is to show examples in the context (chapter 03). The examples cost room in every call, they must be words, and nobody knows the best ones. Here is the book's small decoder on a code it never saw in pretraining: letters reversed, in capitals. We ask without examples, and with four.

# %%
from minipeft.lab import loop, models, tasks

model, tokenizer = models.load("scribe")
task = tasks.load("letters")
print(task, *[(r["prompt"], r["target"]) for r in task.train[:2]], sep="\n  ")

# %%
@torch.no_grad()
def score(model, rows, context=""):
    """Loss per target token, and the share of rows whose every target token is the likeliest."""
    rows = [{**r, "prompt": context + r["prompt"]} for r in rows]
    inputs = loop.collate([loop.encode(r, tokenizer, 128) for r in rows], tokenizer)
    out, labels = model(**inputs), inputs["labels"]
    right = (out.logits[:, :-1].argmax(-1) == labels[:, 1:]) | (labels[:, 1:] == -100)
    return out.loss.item(), right.all(1).float().mean().item()

# %%
import random

few = random.Random(0).sample(task.train, 256)  # the rows of this chapter, drawn with seed 0
context = "\n".join(r["prompt"] + r["target"] for r in few[:4]) + "\n"
for name, words in (("no example", ""), ("four examples", context)):
    loss, exact = score(model, task.test[:100], words)
    print(f"{name:14} loss {loss:.2f}, all letters right in {exact:.0%} of the rows")
assert exact < 0.2

# %% [markdown]
# The four examples help the loss a little and solve nothing. They are also read again in every call. What would the *best* context be, if it did not have to consist of words?

# %% [markdown]
# ## The idea
#
# In a decoder, no token of the context sees the text behind it. So whatever the context does to the text passes through one door: the keys and the values it leaves in each attention layer. Prefix-tuning opens that door directly. It gives every layer $P$ keys and $P$ values as trained parameters. No words need correspond to them. The text looks at them as it would look at real tokens.

# %% [markdown]
# ## The derivation, in seven steps
#
# Letters, for the whole chapter: one head has queries $q$ of shape $(T, d_h)$ and keys and values $K, V$ of shape $(S, d_h)$. The prefix is $P_K, P_V$ of shape $(P, d_h)$. $k$ counts the heads of keys and values, $L$ the layers. All checks run in float64.
#
# **Step 1. A context is its keys and values.** Put a context $c$ before the text $x$ and compute causal attention. The rows of $x$ come out the same if $c$ is gone and only its keys and values are kept.

# %%
T, P, d_h = 5, 3, 6
g = torch.Generator().manual_seed(0)
q, K, V = (torch.randn(P + T, d_h, generator=g, dtype=torch.float64) for _ in range(3))
causal = torch.ones(P + T, P + T).tril().bool()
whole = ((q @ K.T / d_h**0.5).masked_fill(~causal, -torch.inf)).softmax(-1) @ V
kept = ((q[P:] @ K.T / d_h**0.5).masked_fill(~causal[P:], -torch.inf)).softmax(-1) @ V
torch.testing.assert_close(kept, whole[P:], rtol=0, atol=1e-12)

# %% [markdown]
# **Step 2. Set them free.** Let $P_K$ and $P_V$ be any numbers:
#
# $$o = \mathrm{softmax}\!\left(\frac{q\,[P_K; K]^\top}{\sqrt{d_h}} + \text{mask}\right)[P_V; V] .$$
#
# Every row of $q$ may look at every slot of the prefix. Among the real tokens the mask is what it was.

# %%
q, K, V = q[P:], K[P:], V[P:]  # the text alone
P_K, P_V = (torch.randn(P, d_h, generator=g, dtype=torch.float64) for _ in range(2))
mask = torch.cat([torch.ones(T, P), torch.ones(T, T).tril()], 1).bool()
scores = q @ torch.cat([P_K, K]).T / d_h**0.5
o = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ torch.cat([P_V, V])
print("queries", tuple(q.shape), "keys", tuple(scores.shape[1:]), "out", tuple(o.shape))

# %% [markdown]
# **Step 3. Count shapes.** $T$ queries come in and $T$ rows come out. The keys are longer, the sequence is not. There is no query, no MLP and no LayerNorm at a slot. The lecture's formula $X' = [P; X]$ with shape $(n+m)\times d$ lengthens the sequence itself: that is prompt-tuning, the next chapter.

# %% tags=["claim-20"]
n, m, d = T, P, d_h
X, soft = torch.randn(n, d), torch.randn(m, d)
assert torch.cat([soft, X]).shape == (n + m, d)  # the formula: the sequence grows
assert o.shape == (n, d) and scores.shape == (n, n + m)  # the method: only keys and values do
print(f"Claim 20, prefix-tuning is X' = [P; X]: corrected (queries stay n = {n}, keys are n + m = {n + m}, "
      f"output n; it trains 2 L m d numbers, [P; X] trains m d)")

# %% [markdown]
# **Step 4. The gate.** Split the softmax's sum in two, over the slots and over the tokens: $Z_P=\sum_i \exp(q P_{K,i}^\top/\sqrt{d_h})$ and $Z=\sum_j \exp(q k_j^\top/\sqrt{d_h})$ over the tokens that $q$ may see. Then
#
# $$o = (1-c)\,\mathrm{Attn}(q, K, V) + c\,\mathrm{Attn}(q, P_K, P_V), \qquad c = \frac{Z_P}{Z_P + Z} .$$
#
# The prefix mixes a second attention into the first. The weight $c$ is a number between 0 and 1 for each head and each query.

# %% tags=["claim-21"]
e = (q @ K.T / d_h**0.5).exp() * torch.ones(T, T).tril()
e_P = (q @ P_K.T / d_h**0.5).exp()
Z, Z_P = e.sum(-1, keepdim=True), e_P.sum(-1, keepdim=True)
c = Z_P / (Z_P + Z)
mixed = (1 - c) * (e / Z) @ V + c * (e_P / Z_P) @ P_V
gap = (mixed - o).abs().max().item()
assert gap < 1e-12 and 0 < c.min() and c.max() < 1
print("gate c of the five queries:", [round(v, 2) for v in c[:, 0].tolist()])
print("Claim 21, the prefix joins keys and values and no query: proved (o is a convex combination, to 1e-12)")

# %% [markdown]
# The gate falls along the text: later queries see more tokens, so the prefix has more to compete with.
#
# **Step 5. The gradients.** With $a$ the attention weights of the slots, $(T, P)$, and $G = \partial L/\partial o$,
#
# $$\frac{\partial L}{\partial P_V} = a^\top G, \qquad \frac{\partial L}{\partial P_{K,i}} = \sum_t a_{ti}\,\big(P_{V,i} - o_t\big)\cdot G_t\; \frac{q_t}{\sqrt{d_h}} .$$
#
# A slot that nobody looks at gets no gradient at all. A prefix whose keys start far from every query stays dead.

# %%
pk, pv = P_K.clone().requires_grad_(), P_V.clone().requires_grad_()
a_all = (q @ torch.cat([pk, K]).T / d_h**0.5).masked_fill(~mask, -torch.inf).softmax(-1)
out, G = a_all @ torch.cat([pv, V]), torch.randn(T, d_h, generator=g, dtype=torch.float64)
out.backward(G)
a = a_all[:, :P].detach()
torch.testing.assert_close(pv.grad, a.T @ G)
inner = torch.einsum("tid,td->ti", P_V[None] - o[:, None], G)
torch.testing.assert_close(pk.grad, (a * inner).T @ q / d_h**0.5)

# %% [markdown]
# **Step 6. Zero is not nothing.** With $P_K = P_V = 0$ every slot has score 0, so $Z_P = P$ and $c = P/(P+Z)$. The output shrinks towards zero. No finite prefix is the base model; only $c = 0$ would be, and that asks for a score of $-\infty$. It also shows why a prefix cannot be merged: $c$ depends on the input, and no weight does.

# %%
c_zero = P / (P + Z)
torch.testing.assert_close((1 - c_zero) * (e / Z) @ V, (scores * torch.cat([torch.zeros(P), torch.ones(T)])
                           ).masked_fill(~mask, -torch.inf).softmax(-1) @ torch.cat([P_V * 0, V]))
print("gate of a zero prefix:", [round(v, 2) for v in c_zero[:, 0].tolist()])

# %% [markdown]
# **Step 7. Count, and the MLP.** A prefix has $2\,L\,P\,k\,d_h$ numbers. The paper found direct training unstable and generates the prefix while training: a small table $E$ $(P, d)$, one shared layer of width $m$ with tanh, and one output layer per attention layer. Afterwards only the result is kept. GPT-2 medium with $P=5$ stores 245,760 numbers, the paper's 250K, and trains a hundred times as many.

# %%
L, d, mid, slots = 24, 1024, 512, 5
stored, with_mlp = 2 * L * slots * d, slots * d + d * mid + mid + (mid + 1) * 2 * L * d
print(f"stored {stored:,}, trained with the MLP {with_mlp:,}: {with_mlp / stored:.0f} times as many")
assert (stored, with_mlp) == (245_760, 25_744_896)

# %% [markdown]
# ## Built by hand
#
# transformers computes attention through a registry: a function per name, and a function that makes the mask. We add a name. The function puts the layer's own keys and values in front and widens the mask; the rest is the stock function. The mask is always made explicitly, for a reason shown under *It breaks*.

# %%
from transformers import AttentionInterface, AttentionMaskInterface


def hand_attention(layer, query, key, value, mask, **more):
    key, value = (torch.cat([p.expand(len(t), -1, -1, -1), t], 2) for p, t in zip(layer.hand, (key, value)))
    mask = torch.nn.functional.pad(mask, (key.shape[2] - mask.shape[-1], 0), value=True)
    return AttentionInterface()["sdpa"](layer, query, key, value, mask, **{**more, "is_causal": False})


def hand_mask(*args, **more):
    return AttentionMaskInterface()["sdpa"](*args, **{**more, "allow_is_causal_skip": False})


AttentionInterface.register("hand", hand_attention)
AttentionMaskInterface.register("hand", hand_mask)

# %% [markdown]
# Each layer gets its two tensors. The decoder has 6 heads of queries over 2 heads of keys and values, so a prefix is $(2, P, 32)$ per layer and not $(6, P, 32)$.

# %%
import copy

hand = copy.deepcopy(model).requires_grad_(False)
torch.manual_seed(1)
for block in hand.model.layers:
    attention = block.self_attn
    attention.hand = [torch.randn(2, 10, 32) for _ in "KV"]
hand.set_attn_implementation("hand")

# %% [markdown]
# The package's file does the same for encoders, decoders and encoder-decoders, in float32 beside half-precision weights, with errors that say what is wrong. With the same seed the two agree bit for bit.

# %%
from minipeft.additive import prefix_tuning

package = copy.deepcopy(model)
torch.manual_seed(1)
places = prefix_tuning.attach(package, length=10)
batch = next(loop.batches(task.test, tokenizer))
batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
with torch.no_grad():
    assert torch.equal(hand(**batch).logits, package(**batch).logits)
print(len(places), "places:", places[0], "to", places[-1])

# %%
import inspect

print(inspect.getsource(prefix_tuning.Prefix.forward), inspect.getsource(prefix_tuning._attention), sep="\n")

# %% [markdown]
# ## Invariants, before any training
#
# The model's own numbers are frozen, the count is the formula's, and the strongest check of all: a prefix made of the keys and values of real tokens *is* those tokens. We take a context from the model's own cache and load it as a prefix. The text then starts at position $P$, where it stood behind the real context.

# %%
trained, total = loop.count(package)
assert trained == 2 * 5 * 10 * 2 * 32  # 2 L P k d_h
print(f"prefix {trained:,} of {total:,} numbers = {100 * trained / total:.2f} %")

# %%
exact_model = models.load("scribe", dtype=torch.float64)[0]
ids = tokenizer(context + few[5]["prompt"], return_tensors="pt", add_special_tokens=False)["input_ids"]
length = len(tokenizer(context, add_special_tokens=False)["input_ids"])
with torch.no_grad():
    whole = exact_model(ids).logits[:, length:]
    cache = exact_model(ids[:, :length], use_cache=True).past_key_values
places = prefix_tuning.attach(exact_model, length=length)
pairs = [(layer.keys[0], layer.values[0]) for layer in cache.layers]
prefix_tuning.load(exact_model, {f"{p}.{n}": t for p, kv in zip(places, pairs) for n, t in zip("KV", kv)})

# %%
with torch.no_grad():
    behind = exact_model(ids[:, length:], position_ids=torch.arange(length, ids.shape[1])[None]).logits
    from_zero = exact_model(ids[:, length:]).logits
print(f"{length} tokens of context as a prefix: differs by less than 1e-12:", (behind - whole).abs().max().item() < 1e-12)
print(f"the same with the text at positions 0, 1, ...: differs by {(from_zero - whole).abs().max():.1f}")
assert (behind - whole).abs().max() < 1e-12 < (from_zero - whole).abs().max()

# %% [markdown]
# The second line is worth a pause. The keys of a prefix meet the queries *after* rotation. A query's rotation depends on its absolute position, so under RoPE a prefix sees absolute positions, although the text among itself does not. The package leaves the text at $0, 1, 2, \dots$ and, when it starts from words, puts these at $-P, \dots, -1$, just before it.

# %% [markdown]
# ## Experiment 1: from four examples to a code
#
# **Question.** The prefix starts as the four examples, which solve nothing. Do 120 steps on 256 rows make a context that solves the code?
#
# **Hypothesis.** At step 0 the loss is exactly that of the four examples as words. After training most codes are right.

# %%
from dataclasses import replace

words = tokenizer(context, return_tensors="pt", add_special_tokens=False)["input_ids"][0]
tuned = copy.deepcopy(model)
tuned.set_attn_implementation("eager")  # it can show its weights
_ = prefix_tuning.attach(tuned, words=words)
start, as_words = score(tuned, task.test[:100])[0], score(model, task.test[:100], context)[0]
print(f"loss at step 0 {start:.3f}, four examples as words {as_words:.3f}, {len(words)} tokens")
assert abs(start - as_words) < 1e-3


# %%
def gate(model, rows):
    """c for every layer and head, mean over the tokens that write the answer."""
    inputs = loop.collate([loop.encode(r, tokenizer) for r in rows], tokenizer)
    with torch.no_grad():
        weights = model(**inputs, output_attentions=True).attentions  # each (N, heads, T, P + T)
    writes = (inputs["labels"] != -100).roll(-1, 1)
    P = weights[0].shape[-1] - weights[0].shape[-2]
    return torch.stack([w[..., :P].sum(-1).transpose(1, 2)[writes].mean(0) for w in weights])


before = gate(tuned, task.test[:64])
saved_start = prefix_tuning.state(tuned)

# %%
from minipeft.lab import results

stored = results.read("low_data")
rate = next(r["lr"] for r in stored["rows"] if r["arm"] == "prefix")
ledger = loop.train(tuned, tokenizer, replace(task, train=few), steps=120, lr=rate, seed=0)
loss, exact = score(tuned, task.test)
after = gate(tuned, task.test[:64])
print(f"rate {rate}: test loss {loss:.2f}, all letters right in {exact:.0%} of {len(task.test)} rows")
same = next(r for r in stored["rows"] if (r["arm"], r["size"], r["seed"]) == ("prefix", 256, 0))
assert abs(exact - same["exact test"]) < 0.1, "the stored run and this one differ"
assert exact > 0.5

# %%
written = loop.generate(tuned, tokenizer, [r["prompt"] for r in task.test[:4]], max_new_tokens=10)
for r, text in zip(task.test, written):
    print(f"{r['prompt'].splitlines()[0]:18} -> {text:12} {'right' if text == r['target'].strip() else 'wrong'}")

# %% [markdown]
# The hypothesis holds. Over five seeds and three sizes the stored runs of `data/low_data.py` give:

# %%
for size in (16, 64, 256):
    part = [r["exact test"] for r in stored["rows"] if (r["arm"], r["size"]) == ("prefix", size)]
    mean, half = figures.interval(part)
    print(f"{size:4} rows: all letters right {mean:.2f} +- {half:.2f} (5 seeds)")

# %% [markdown]
# **Where does the prefix act?** The gate $c$ can be read off: it is the attention that falls on the slots. Below is its mean for each head, at the tokens that write the answer, at step 0 and after training.

# %%
import matplotlib.pyplot as plt

fig, axes = plt.subplots(1, 3, figsize=(8.2, 3.4), sharey=True)
for ax, (name, values) in zip(axes, (("four examples", before), ("trained", after), ("change", after - before))):
    limits = dict(cmap="RdBu_r", vmin=-0.6, vmax=0.6) if name == "change" else dict(cmap="Oranges", vmin=0, vmax=1)
    ax.imshow(values, aspect="auto", **limits)
    for (i, j), v in [((i, j), values[i, j].item()) for i in range(5) for j in range(6)]:
        dark = abs(v) > (0.4 if name == "change" else 0.6)
        ax.text(j, i, f"{v:.2f}", ha="center", va="center", fontsize=8, color="white" if dark else "black")
    ax.set(title=name, xlabel="head", xticks=range(6), yticks=range(5))
    ax.grid(visible=False)
axes[0].set_ylabel("layer")
fig.suptitle("How much of each head's attention the prefix takes", x=0.02, ha="left", fontweight="bold")
figures.describe("three maps of 5 layers by 6 heads: the gate c of the four examples, of the trained prefix, and "
                 "the change.")

# %%
moved = (after - before).abs()
print(f"mean gate {before.mean():.2f} before, {after.mean():.2f} after; "
      f"the largest change {moved.max():.2f}, in layer {moved.max(1).values.argmax().item()}")
print("heads with c above one half, layer by layer:", (after > 0.5).sum(1).tolist())

# %% [markdown]
# **What the figure says.** The gate differs from head to head by far more than from before to after: which heads listen to a context was decided in pretraining. Training changes *what* the slots say, and for some heads how loudly.
#
# **What it does not say.** A large gate is not importance. A head may look at slots whose values are nearly zero: attention that goes nowhere. The test of importance is to take a layer's prefix out and measure, which is exercise 4.

# %% [markdown]
# ## Experiment 2: the MLP, and two kinds of file
#
# Training through the MLP adds numbers for a while. `state` holds the flattened prefix, which is what one deploys. `resumable` holds everything, which is what one needs to go on training. HF peft keeps the first only, and a run that stops cannot be resumed.

# %%
reparam = copy.deepcopy(model)
prefix_tuning.attach(reparam, words=words, mlp=96)
small = sum(t.numel() for t in prefix_tuning.state(reparam).values())
large = sum(t.numel() for t in prefix_tuning.resumable(reparam).values())
print(f"deployed {small:,} numbers, to resume {large:,}")
assert small == 2 * 5 * len(words) * 2 * 32 and large == loop.count(reparam)[0]
for a, b in zip(prefix_tuning.state(reparam).values(), saved_start.values()):
    torch.testing.assert_close(a, b, rtol=0, atol=1e-3)  # the MLP starts at the words as well

# %% [markdown]
# The authors fit the MLP to the words' activations with 500 steps of Adam. The file solves for the last layer instead: $\tanh(\cdot)$ of $P \le m$ slots is a full-rank matrix, and least squares is exact. `load` of a flattened file drops the MLP.

# %%
with torch.no_grad():
    y = reparam(**batch).logits
    prefix_tuning.load(reparam, prefix_tuning.state(reparam))
    assert torch.equal(reparam(**batch).logits, y)
print("after the MLP is dropped the function is the same, and", f"{loop.count(reparam)[0]:,} numbers train")

# %% [markdown]
# ## Encoders and encoder-decoders
#
# An encoder takes a prefix just as well; nothing is causal about it. An encoder-decoder has three kinds of attention, and the paper gives each its own: the encoder's, the decoder's, and the cross-attention between them. HF peft 0.21.2 serves only the decoder's, and with an even number of layers half of its slots never get a gradient.

# %%
import transformers as tf

sizes = dict(vocab_size=64, d_model=24, d_kv=6, d_ff=40, num_layers=2, num_heads=4, decoder_start_token_id=0)
t5 = tf.T5ForConditionalGeneration(tf.T5Config(**sizes)).eval()
bert = models.load("minilm", labels=2)[0]
for name, net in (("T5", t5), ("MiniLM", bert)):
    kinds = {"".join(ch for ch in p if not ch.isdigit()) for p in prefix_tuning.attach(net, length=4)}
    print(name, f"{loop.count(net)[0]:,} numbers train, kinds of place:", *sorted(kinds), sep="\n  ")
text = torch.randint(3, 64, (2, 7))
t5(input_ids=text, labels=text).loss.backward()
assert all(p.grad.abs().sum() > 0 for p in t5.parameters() if p.requires_grad)

# %% [markdown]
# ## It breaks
#
# **`is_causal=True` behind a prefix.** The flag draws its triangle from the top left. With $P$ extra keys, query $t$ then sees keys $0..t$: mostly slots, and not itself. No error is raised.

# %%
attend = torch.nn.functional.scaled_dot_product_attention
Q, KK, VV = (t[None] for t in (q, torch.cat([P_K, K]), torch.cat([P_V, V])))
right = attend(Q, KK, VV, attn_mask=mask[None])
wrong = attend(Q, KK, VV, is_causal=True)
torch.testing.assert_close(right[0], o)
print(f"the flag is off by up to {(wrong - right).abs().max():.1f}; query 0 sees slot 0 alone:",
      torch.equal(wrong[0, 0], P_V[0]))
assert (wrong - right).abs().max() > 0.5

# %% [markdown]
# **A prefix does not like to be shifted.** Left padding moves a row to other positions. Without a prefix, RoPE does not mind. With one it does, so the file counts a decoder's positions from the mask.

# %%
text = tokenizer(few[7]["prompt"], return_tensors="pt", add_special_tokens=False)["input_ids"]
place = torch.arange(text.shape[1])[None]
with torch.no_grad():
    for name, net in (("base", model), ("prefix", tuned)):
        gap = (net(text, position_ids=place + 20).logits - net(text, position_ids=place).logits).abs().max()
        print(f"{name:6} 20 positions later: the logits move by {gap:.2f}")
assert gap > 0.3

# %% [markdown]
# **Attention that forgets the prefix.** Whoever sets another attention function after `attach` would get the base model back without a word. The file refuses.

# %%
lost = copy.deepcopy(tuned)
lost.set_attn_implementation("sdpa")
try:
    lost(text)
except RuntimeError as error:
    print("RuntimeError:", error)

# %% [markdown]
# ## Save, switch, take out
#
# A prefix is a small file. Two tasks are two files for one base. There is no `merge`, by step 6.

# %%
import pathlib
import tempfile

from minipeft.lab import store

folder = pathlib.Path(tempfile.mkdtemp())
size = store.save(folder / "letters.safetensors", tuned, prefix_tuning)
other = copy.deepcopy(model)
prefix_tuning.attach(other, length=len(words), mlp=8)  # other settings: the file overrules them
store.load(folder / "letters.safetensors", other, prefix_tuning)
with torch.no_grad():
    torch.testing.assert_close(other(**batch).logits, tuned(**batch).logits, rtol=1e-4, atol=1e-4)
prefix_tuning.detach(other)
assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), model.state_dict().values()))
print(f"{size / 1e3:.0f} kB; taken out, the base is back bit for bit")

# %% [markdown]
# ## The row in the ledger

# %%
row = {"trained numbers": ledger.trained, "share of the model, %": 100 * ledger.trained / total,
       "gradients, MB": ledger.gradient_bytes / 1e6, "AdamW's state, MB": ledger.optimizer_bytes / 1e6,
       "to store per task, MB": size / 1e6, "more keys per layer": len(words)}
for name, value in row.items():
    print(f"{name:22} {value:,.3f}" if isinstance(value, float) else f"{name:22} {value:,}")
assert ledger.optimizer_bytes == 2 * 4 * ledger.trained

# %% [markdown]
# ## Recall
#
# 1. Why is it enough, in a decoder, to keep a context's keys and values?
# 2. What is the gate $c$, and why does it forbid merging?
# 3. Which of these has a prefix slot: a key, a query, a value, an MLP, a position?
# 4. Why is a zero prefix not the base model? Which prefix would be?
# 5. What does the MLP buy, and why is it not stored?
#
# ## Exercises
#
# Solutions are in [solutions/11_prefix_tuning.ipynb](solutions/11_prefix_tuning.ipynb).
#
# **1. Derive (easy, 5 minutes).** How many numbers does a prefix of 20 slots store for LLaMA-2 70B: 80 layers, 64 heads of queries over 8 of keys and values, 128 numbers each?

# %% tags=["exercise-1"]
answer_1 = None  # a number

# %%
from minipeft.lab import exercises

exercises.check(answer_1, 2 * 80 * 20 * 8 * 128, "keys and values, per layer, and the heads of keys, not of queries")

# %% [markdown]
# **2. Code (easy, 10 minutes).** Write `gate_of(q, K, P_K)` for one head and full attention (no mask): the number $c$ for each query.

# %% tags=["exercise-2"]
def gate_of(q, K, P_K):
    return None

# %%
expected = (q @ torch.cat([P_K, K]).T / d_h**0.5).softmax(-1)[:, :P].sum(-1)
exercises.check(gate_of(q, K, P_K), expected, "did you scale by the square root of d_h?")

# %% [markdown]
# **3. Derive (medium, 15 minutes).** Slots have no order. Two prefixes with the same slots in another order are one function. Write `same_function(A, B)` that decides it for one layer, with `A = (P_K, P_V)`: it must not be fooled by keys and values that are permuted differently.

# %% tags=["exercise-3"]
def same_function(A, B):
    return None

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
# **4. Experiment (medium, 20 minutes).** Which layer's prefix matters most? Take one layer's prefix out at a time and measure the test loss of the trained model. `layer.prefix` can be set aside and put back. Give the number of the layer.

# %% tags=["exercise-4"]
answer_4 = None  # the number of a layer, 0 to 4

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
# **5. Derive (hard, 20 minutes).** HF peft starts the text at position $P$. Under RoPE with angle $\theta$ per position and pair, by which angle must each pair of a peft key be turned so that the text may start at 0? Give the factor of $\theta$ for $P = 10$.

# %% tags=["exercise-5"]
answer_5 = None  # a number, with its sign

# %%
exercises.check(answer_5, -10, "the query at position t + P becomes the query at t: turn the key by the same amount")

# %% [markdown]
# ## To remember
#
# - A context acts through its keys and values. Prefix-tuning trains those: $2LPkd_h$ numbers, every layer, no query, no longer sequence.
# - In each head the output is a convex combination with gate $c = Z_P/(Z_P+Z)$. It is never 0, depends on the input, and cannot be merged.
# - Explicit mask, keys after rotation, positions from the mask. Start from real words, and keep two files if an MLP is used.
#
# **Further reading.** The paper's sections 4.3 and 7.2 to 7.4; He et al. 2022, sections 3.1 and 4.2, where the gate makes prefix-tuning a parallel adapter.
#
# **Next.** Chapter 12 trains the *input* of the same slots and lets the model compute their keys and values: prompt-tuning.
