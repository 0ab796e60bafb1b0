"""Prompt-tuning: train a few embeddings that stand before the text.

Paper      Lester, Al-Rfou and Constant, "The Power of Scale for Parameter-
           Efficient Prompt Tuning", EMNLP 2021, arXiv:2104.08691. Sections 2,
           3.2 (initialisation) and figure 2 (several tasks in one batch).

Idea       A prompt in words can only use rows of the embedding table. Let it
           be any vectors, and let gradient descent write it. The model stays
           as it is; a task is P vectors.

Math       X (T, d) the text's embeddings   P (P, d) trained, P slots
               input = [P; X]   (P + T, d), through the model as usual
           Slots are tokens: they have positions and an order, and in an
           encoder they attend to the text. No loss is taken at a slot.

Steps      1. Freeze the model. Put SoftEmbedding in place of its embedding:
              ids from V on, beyond the vocabulary, are slots; those of task t
              begin at V + t P.
           2. Before a forward or generate(), write the slots' ids into each
              row next to its text; widen mask, labels and positions.
           3. Train P. Logits come back cut to the text (hidden states do not).

Cost       Trained    P d per task.
           Inference  P more tokens. No merge: what slots do depends on the
                      input, and no weight of the model does.

Differs    "random" is uniform in +-0.5, as the paper says; its code has 0 to
           0.5. "vocabulary" draws from the first 5000 ids, as its code does:
           frequent words only where ids are so sorted. In an encoder alone,
           [CLS] stays before the prompt, for the pooler reads the first token.
           HF peft 0.21.2 puts slots before padding and [CLS], drops
           position_ids, fails with a static cache, and on T5 trains 2 P rows
           of which P are dead.

Pitfalls   - With a mask, a decoder's positions are counted from it, so that a
             padded row is the row alone. max_length counts slots as well.
           - A task that is not in the batch has a gradient of zero, not none:
             weight decay and momentum still move it.
           - What looks ids up in the scores, as repetition_penalty does in
             generate(), finds no entry for a slot and raises.
"""

import inspect
from functools import partial
from types import MethodType

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class SoftEmbedding(nn.Module):
    """The base's embedding, with tasks * P more rows after its last one."""

    weight = None  # who reads the table behind our back fails loudly

    def __init__(self, base: nn.Module, rows: Tensor, after: int, single: bool, counts: bool):
        super().__init__()
        self.base, self.prompt = base, nn.Parameter(rows)  # (tasks, P, d)
        self.first = base.num_embeddings  # the id of task 0's first slot
        self.after, self.single, self.counts, self.placed = after, single, counts, False

    def forward(self, ids: Tensor) -> Tensor:  # (N, T) -> (N, T, d)
        slot = ids - self.first
        x = self.base(ids.masked_fill(slot >= 0, 0))
        soft = F.embedding(slot.clamp(min=0), self.prompt.flatten(0, 1))
        return torch.where((slot >= 0)[..., None], soft.to(x.dtype), x)


def attach(
    model: nn.Module,
    *,
    length: int = 20,
    init: str | list[list[int]] = "vocabulary",
    tasks: int = 1,
    after: int | None = None,
    freeze: bool = True,
) -> list[str]:
    """Freeze `model`; give it a soft prompt; return the path of the embedding that holds it.

    init: "random", "vocabulary", or the token ids of words, such as the names of the classes:
    slot i starts at the mean embedding of word i, and the slots left over as in "vocabulary".
    tasks: how many prompts. model(..., task_ids=) and model.generate(..., task_ids=) choose one
    per row. after: how many tokens stay before it; by default 1 if no layer is causal, else 0.
    ValueError: a size below 1, an unknown init, words that do not fit, a prompt in place already.
    """
    words = [] if init in ("random", "vocabulary") else init
    if isinstance(words, str) or len(words) > length or not all(words) or min(length, tasks) < 1:
        known = "'random', 'vocabulary' or at most `length` lists of ids, and sizes from 1 on"
        raise ValueError(f"init {init!r}, length {length}, tasks {tasks}: expected {known}")
    single = not model.config.is_encoder_decoder
    base = (model if single else model.get_encoder()).get_input_embeddings()
    if sites(model) or not isinstance(base, nn.Embedding):
        raise ValueError(f"the embedding is a {type(base).__name__}, expected a plain nn.Embedding")
    path = next(p for p, m in model.named_modules() if m is base)
    rows = torch.stack([_rows(base, length, init, words) for _ in range(tasks)])
    causal = any(getattr(m, "is_causal", False) for m in model.modules())
    after = int(single and not causal) if after is None else after
    counts = single and causal and "position_ids" in inspect.signature(model.forward).parameters
    if freeze:
        model.requires_grad_(False)
    soft = SoftEmbedding(base, rows, after, single, counts).train(model.training)
    before = model.register_forward_pre_hook(partial(_before, path), with_kwargs=True)
    soft.hooks = before, model.register_forward_hook(partial(_after, path), with_kwargs=True)
    _put(model, path, soft)
    if model.can_generate():
        model.generate = MethodType(_generate, model)
    return [path]


def sites(model: nn.Module) -> dict[str, SoftEmbedding]:
    """{path: embedding}, found by type."""
    return {p: m for p, m in model.named_modules() if isinstance(m, SoftEmbedding)}


def state(model: nn.Module) -> dict[str, Tensor]:
    """What was learned and nothing else: a copy of the prompts, (tasks, P, d)."""
    return {f"{path}.prompt": m.prompt.detach().clone() for path, m in sites(model).items()}


@torch.no_grad()
def load(model: nn.Module, saved: dict[str, Tensor]) -> None:
    """Inverse of `state`; all or nothing. KeyError: names. ValueError: shapes, a selection on it."""
    _check(sites(model), state(model), saved)
    for path, m in sites(model).items():
        m.prompt.copy_(saved[f"{path}.prompt"])


def detach(model: nn.Module) -> None:
    """Put the plain embedding back. It was never touched: the base, bit for bit."""
    for path, m in sites(model).items():
        for hook in m.hooks:
            hook.remove()
        vars(model).pop("generate", None)
        _put(model, path, m.base)


@torch.no_grad()
def _rows(base: nn.Embedding, P: int, init, words: list) -> Tensor:
    """Where one prompt starts, (P, d). Drawn on the CPU: the same on every device."""
    W = base.weight
    dtype = W.dtype if W.dtype in (torch.float32, torch.float64) else torch.float32
    if init == "random":
        return (torch.rand(P, W.shape[1], dtype=dtype) - 0.5).to(W.device)
    common = torch.randperm(min(5000, len(W)))
    rows = base(common[torch.arange(P) % len(common)].to(W.device)).to(dtype)  # scaled as tokens are
    for i, ids in enumerate(words):
        rows[i] = base(torch.tensor(ids, device=W.device)).to(dtype).mean(0)
    return rows


def _place(soft: SoftEmbedding, inputs: dict, task_ids, past: int = 0) -> dict:
    """The same inputs with slots in every row; once they are in a cache only the mask has them."""
    ids, mask, (tasks, P, _) = inputs.get("input_ids"), inputs.get("attention_mask"), soft.prompt.shape
    if ids is None or (mask is not None and mask.dim() != 2):
        raise ValueError("a soft prompt is placed by ids, expected input_ids and a mask of two axes")
    default = [0] * len(ids) if tasks == 1 else []
    task = torch.as_tensor(default if task_ids is None else task_ids, device=ids.device).long()
    if task.shape != ids.shape[:1] or task.min() < 0 or task.max() >= tasks:
        raise ValueError(f"task_ids {task_ids}: expected {len(ids)} numbers from 0 to {tasks - 1}")
    T = ids.shape[1] if mask is None else mask.shape[1]
    start = soft.after + (torch.zeros_like(task) if mask is None else mask.long().argmax(1))
    column = torch.arange(T + P, device=ids.device)
    at = column - start[:, None]  # (N, T + P), 0 to P - 1 at the slots
    slot, later = (at >= 0) & (at < P), P * (at >= P)

    def widen(x: Tensor, fill: Tensor | int) -> Tensor:  # (N, T) -> (N, T + P)
        text = x.expand(len(ids), -1).gather(1, (column - later).clamp(max=T - 1))
        return torch.where(slot, fill, text).to(x.dtype)

    new, place = dict(inputs), inputs.get("position_ids")
    if mask is not None:
        new["attention_mask"] = widen(mask, 1)
    if place is not None:
        begin = 0 if past else place.expand(len(ids), -1).gather(1, start[:, None])
        new["position_ids"] = place + P if past else widen(place, begin + at) + later
    elif mask is not None and soft.counts:
        counted = (new["attention_mask"].cumsum(1) - 1).clamp(min=0)
        new["position_ids"] = counted[:, -ids.shape[1] :] if past else counted
    fills = {"input_ids": soft.first + P * task[:, None] + at, "token_type_ids": 0, "labels": -100}
    for name in [] if past else fills.keys() & new.keys():
        if getattr(new[name], "shape", 0) == ids.shape and (name != "labels" or soft.single):
            new[name] = widen(new[name], fills[name])
    return new


def _before(path: str, model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    soft, names = model.get_submodule(path), inspect.signature(model.forward).parameters
    inputs = {**dict(zip(names, args)), **kwargs}
    if soft.placed:  # by generate()
        return (), inputs
    cache = inputs.get("past_key_values")
    past = 0 if cache is None else int(cache.get_seq_length())
    return (), _place(soft, inputs, inputs.pop("task_ids", None), past)


def _after(path: str, model: nn.Module, args: tuple, kwargs: dict, output):
    """Cuts the slots out of what has a row per token."""
    soft, ids = model.get_submodule(path), kwargs.get("input_ids")
    if soft.placed or not soft.single:
        return
    text = ids < soft.first
    for name in ("logits", "last_hidden_state"):
        x = output.get(name)
        if x is not None and x.dim() == 3 and x.shape[:2] == ids.shape:
            output[name] = x[text].view(len(ids), -1, x.shape[2])


def _generate(model: nn.Module, inputs: Tensor | None = None, *, task_ids=None, **kwargs):
    """The model's generate(), with the slots placed first and cut out of what it returns."""
    (soft,) = sites(model).values()
    kwargs.setdefault("input_ids", inputs)
    kwargs.setdefault("attention_mask", torch.ones_like(kwargs["input_ids"]))
    placed, soft.placed = _place(soft, kwargs, task_ids), True
    try:
        out = type(model).generate(model, **placed)
    finally:
        soft.placed = False
    ids = getattr(out, "sequences", out)
    text = ids[ids < soft.first].view(len(ids), -1)  # behind an encoder there are no slots
    return text if out is ids else type(out)(**{**out, "sequences": text})


def _check(places: dict, mine: dict[str, Tensor], saved: dict[str, Tensor]) -> None:
    if held := [p for p, m in places.items() if hasattr(m, "parametrizations")]:
        raise ValueError(f"{held[0]} holds a selection, expected plain tensors: detach that first")
    if odd := sorted(mine.keys() ^ saved.keys()):
        raise KeyError(f"only in one of model and file: {odd}")
    if bad := [k for k in mine if mine[k].shape != saved[k].shape]:
        k = bad[0]
        raise ValueError(f"{k} has shape {tuple(saved[k].shape)}, expected {tuple(mine[k].shape)}")


def _put(model: nn.Module, path: str, new: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, new)


if __name__ == "__main__":  # python prompt_tuning.py: the claims above, checked on a toy
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 32}
    model, x = LlamaForCausalLM(LlamaConfig(**sizes)).eval(), torch.randint(3, 32, (2, 9))
    whole = model(x).logits[:, 3:]
    attach(model, length=3, init=[[int(i)] for i in x[0, :3]], tasks=2)
    y = model(x[:, 3:], task_ids=[1, 0]).logits
    assert torch.equal(y[0], whole[0]), "embeddings of words are those words"
    model.get_submodule(*sites(model)).prompt.data[1] += 1
    both = model.generate(x, task_ids=[1, 0], max_new_tokens=4)
    alone = model.generate(x[1:], task_ids=[0], max_new_tokens=4)
    assert torch.equal(both[1], alone[0]), "a row of a mixed batch is that row alone"
    print("prompt_tuning: ok")
