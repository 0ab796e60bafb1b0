"""Prefix-tuning: give every attention layer a few trained keys and values to look at.

Paper      Li and Liang, "Prefix-Tuning: Optimizing Continuous Prompts for
           Generation", ACL 2021, arXiv:2101.00190. Sections 4.2, 4.3 and 7.4.
           The gate c: He et al. 2022, arXiv:2110.04366, section 3.1.

Idea       A context steers a language model only through the keys and values
           it leaves in each layer. So train these directly, without any words.

Math       One layer, k heads of keys and values with d_h numbers each.
           q (h, T, d_h)   K, V (k, S, d_h)   P_K, P_V (k, P, d_h) trained

               o = softmax(q [P_K; K]' / sqrt(d_h) + mask) [P_V; V]
                 = (1 - c) Attn(q, K, V) + c Attn(q, P_K, P_V)
               c = Z_P / (Z_P + Z)    Z_P = sum exp(q P_K' / sqrt(d_h)), Z of K

           T queries in, T outputs out; each sees all slots of the prefix. No
           query, no W_k, no MLP at a slot. With mlp=m the layers of one kind
           share E (P, d) and W_1 (m, d), each has its W_2 (2 k d_h, m), and
               P_K, P_V = tanh(E W_1' + b_1) W_2' + b_2

Steps      1. Freeze the model. One pass shows the shapes of its layers.
           2. Give each attention layer P_K and P_V, random or from words.
           3. Train. Keep P_K and P_V (`state`); throw the MLP away.

Cost       Trained    2 P k d_h per layer; far more while there is an MLP.
           Inference  P more keys and values per layer. No merge: the gate c
                      depends on the input, and no weight does.

Differs    The text keeps its positions 0, 1, 2, ...; the authors' code and
           HF peft start it at P. Pass position_ids from P on to have theirs.
           E has d columns, as in the authors' code; the paper says m.
           With mlp= and words=, W_2 is solved for; the authors take 500 steps.
           T5 has encoder, decoder and cross prefixes, as the paper's BART. HF
           peft 0.21.2 has the decoder's only, and its layer i reads slots 4i,
           4i + 1 (mod 2 L): half of them are dead when L is even.

Pitfalls   - P_K = P_V = 0 is not the base model: then c = P / (P + Z).
           - RoPE: P_K meets q after rotation and is never rotated, so absolute
             positions matter: a decoder's are counted from the mask. Words are
             put at -P .. -1, or at 0 .. P - 1 where positions are learned.
           - T5's bias is 0 at the slots. Slots have no order.
           - is_causal=True (a mask from the top left) is wrong behind a prefix.
           - set_attn_implementation after attach: the layers refuse to run.
"""

import inspect
import sys
from functools import partial

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

INNER = ("sdpa", "eager")


class Prefix(nn.Module):
    """P keys and values of one attention layer: parameters, or what the MLP makes of E."""

    def __init__(self):
        super().__init__()
        self.shown = self.shape = self.trunk = self.W_2 = None

    @torch.no_grad()
    def start(self, K: Tensor, V: Tensor, trunk=None, fit=False) -> None:  # (k, P, d_h) each
        self.shown, self.shape, self.trunk, self.W_2 = None, K.shape, trunk, None
        if trunk is None:
            self.K, self.V = nn.Parameter(K), nn.Parameter(V)
            return
        self.W_2 = nn.Linear(trunk[1].out_features, 2 * K.shape[0] * K.shape[2]).to(K)
        if fit:  # W_2 such that the MLP yields K and V, exactly if P <= m
            rows = torch.stack([K, V]).permute(2, 0, 1, 3).flatten(1) - self.W_2.bias
            h = self.hidden().double().cpu()
            self.W_2.weight.copy_(torch.linalg.lstsq(h, rows.double().cpu()).solution.T)

    def hidden(self) -> Tensor:  # (P, m)
        return self.trunk(torch.arange(self.shape[1], device=self.W_2.weight.device))

    def slots(self) -> tuple[Tensor, Tensor]:
        if self.trunk is None:
            return self.K, self.V
        k, P, d_h = self.shape
        return self.W_2(self.hidden()).view(P, 2, k, d_h).permute(1, 2, 0, 3).unbind()

    def forward(self, key: Tensor, value: Tensor):  # (N, k, S, d_h) -> (N, k, P + S, d_h)
        if self.shape is None:  # the first pass: only look
            self.shown = key[0].clone(), value[0].clone()
            return key, value
        K, V = (t.to(key.dtype).expand(len(key), -1, -1, -1) for t in self.slots())
        return torch.cat([K, key], dim=2), torch.cat([V, value], dim=2)


def _attention(module, query, key, value, attention_mask, inner: str, **kw):
    """What transformers calls in place of its own function; every key but the prefix is its own."""
    if attention_mask is None and query.shape[2] > 1 and getattr(module, "is_causal", False):
        raise ValueError("a causal layer came without a mask, expected one: is_causal is no use here")
    if (prefix := getattr(module, "prefix", None)) is not None:
        key, value = prefix(key, value)
        P = prefix.shape[1] if prefix.shape else 0
        if attention_mask is not None:  # (N, 1, T, S), bool or additive -> (N, 1, T, P + S)
            yes = attention_mask.dtype == torch.bool  # True lets a token look, so does + 0.0
            attention_mask = nn.functional.pad(attention_mask, (P, 0), value=yes)
        if kw.get("position_bias") is not None:
            kw["position_bias"] = nn.functional.pad(kw["position_bias"], (P, 0))
    own = sys.modules[type(module).__module__].eager_attention_forward  # each model file has one
    attend = own if inner == "eager" else AttentionInterface()[inner]
    return attend(module, query, key, value, attention_mask, **{**kw, "is_causal": False})


def _mask(*args, inner: str, **kw):
    return AttentionMaskInterface()[inner](*args, **{**kw, "allow_is_causal_skip": False})


for _name in INNER:
    AttentionInterface.register(f"prefix_{_name}", partial(_attention, inner=_name))
    AttentionMaskInterface.register(f"prefix_{_name}", partial(_mask, inner=_name))


def attach(
    model: nn.Module, *, length=10, mlp: int | None = None, words: Tensor | None = None, freeze=True
) -> list[str]:
    """Freeze `model`; give a prefix to every attention layer; return the paths of the prefixes.

    mlp: the width m of the MLP that makes the prefix while it trains.
    words: token ids (P,) whose keys and values are the start; else N(0, 1), or what the MLP makes.
    ValueError: a length below 1, attention that cannot be served, a prefix in place already.
    """
    inner, P = model.config._attn_implementation, length if words is None else len(words)
    if inner not in INNER or min(P, 1 if mlp is None else mlp) < 1:
        was = f"attention {inner!r}, length {P}, mlp {mlp}"
        raise ValueError(f"{was}: expected {' or '.join(INNER)}, no prefix yet, sizes from 1 on")
    found, trunks, d = _look(model, words), {}, model.config.hidden_size
    counts = "position_ids" in inspect.signature(model.forward).parameters
    counts &= all(model.get_submodule(p).is_causal for p in found)
    hook = model.register_forward_pre_hook(partial(_prepare, counts), with_kwargs=True)
    if freeze:
        model.requires_grad_(False)
    for path, prefix in found.items():
        K, V = prefix.shown  # (k, S, d_h) each
        # Half-precision models get a float32 prefix: a small step must not round away.
        dtype = K.dtype if K.dtype in (torch.float32, torch.float64) else torch.float32
        if words is None:  # drawn on the CPU: a seed gives the same prefix on every device
            K, V = (torch.randn(len(t), P, t.shape[2], dtype=dtype).to(t.device) for t in (K, V))
        K, V, kind = K.to(dtype), V.to(dtype), path.translate(dict.fromkeys(b"0123456789"))
        if mlp is not None and kind not in trunks:
            trunks[kind] = nn.Sequential(nn.Embedding(P, d), nn.Linear(d, mlp), nn.Tanh()).to(K)
        prefix.start(K, V, trunks.get(kind), fit=words is not None)
        layer = model.get_submodule(path)
        layer.prefix, prefix.hook = prefix.train(layer.training), hook
    _use(model, f"prefix_{inner}")
    return list(sites(model))


def sites(model: nn.Module) -> dict[str, Prefix]:
    """{path: prefix}, found by type."""
    return {p: m for p, m in model.named_modules() if isinstance(m, Prefix)}


def state(model: nn.Module) -> dict[str, Tensor]:
    """What is deployed: a copy of P_K and P_V of every layer, without the MLP."""
    every = ((f"{p}.{n}", t) for p, m in sites(model).items() for n, t in zip("KV", m.slots()))
    return {name: t.detach().clone() for name, t in every}


def resumable(model: nn.Module) -> dict[str, Tensor]:
    """What training goes on from: a copy of every parameter, the MLP's included."""
    ours = {f"{path}.{n}" for path, m in sites(model).items() for n, _ in m.named_parameters()}
    return {n: p.detach().clone() for n, p in model.named_parameters() if n in ours}


@torch.no_grad()
def load(model: nn.Module, saved: dict[str, Tensor]) -> None:
    """Inverse of `state`, which drops an MLP, and of `resumable`; all or nothing.
    KeyError: other names. ValueError: another shape (length, MLP), a selection on it.
    """
    whole = saved.keys() == resumable(model).keys()
    _check(sites(model), resumable(model) if whole else state(model), saved)
    for m in sites(model).values():
        if m.trunk is not None and not whole:
            m.start(*(t.clone() for t in m.slots()))
    for name, t in saved.items():
        model.get_parameter(name).copy_(t)


def detach(model: nn.Module) -> None:
    """Take the prefixes out. No weight was ever touched: the base, bit for bit."""
    for path, m in sites(model).items():
        m.hook.remove()
        del model.get_submodule(path.rpartition(".")[0]).prefix
    _use(model, model.config._attn_implementation.removeprefix("prefix_"))


def _use(model: nn.Module, attention: str) -> None:
    for m in model.modules():  # T5's halves have a config each, which older versions forget
        if hasattr(m, "set_attn_implementation"):
            m.set_attn_implementation(attention)


@torch.no_grad()
def _look(model: nn.Module, words: Tensor | None) -> dict[str, Prefix]:
    """{path of an attention layer: a prefix that has seen its keys and values}."""
    ids = (torch.zeros(1, dtype=torch.long) if words is None else words)[None].to(model.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    if any(type(m).__name__.endswith("RotaryEmbedding") for m in model.modules()):
        inputs["position_ids"] = torch.arange(-ids.shape[1], 0, device=ids.device)[None]
    layers = {p: m for p, m in model.named_modules() if hasattr(m, "is_causal")}
    modes, inner = {m: m.training for m in model.modules()}, model.config._attn_implementation
    try:
        for m in layers.values():
            m.prefix = Prefix()
        _use(model.eval(), f"prefix_{inner}")
        model(**inputs)
        found = {p: m.prefix for p, m in layers.items() if m.prefix.shown is not None}
    finally:
        for m in layers.values():
            del m.prefix
        for m, mode in modes.items():
            m.training = mode
        _use(model, inner)
    if not found:
        raise ValueError("no layer calls transformers' attention registry, expected one at least")
    return found


def _prepare(counts: bool, model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    if not (now := model.config._attn_implementation).startswith("prefix_"):
        raise RuntimeError(f"attention is {now!r}, which ignores the prefix; expected 'prefix_{now}'")
    inputs = {**dict(zip(inspect.signature(model.forward).parameters, args)), **kwargs}
    mask, x = inputs.get("attention_mask"), inputs.get("input_ids", inputs.get("inputs_embeds"))
    if counts and inputs.get("position_ids") is None and mask is not None and mask.dim() == 2:
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, -x.shape[1] :]
    return (), inputs


def _check(places: dict, mine: dict[str, Tensor], saved: dict[str, Tensor]) -> None:
    if held := [p for p, m in places.items() if hasattr(m, "parametrizations")]:
        raise ValueError(f"{held[0]} holds a selection, expected plain tensors: detach that first")
    if odd := sorted(mine.keys() ^ saved.keys()):
        raise KeyError(f"only in one of model and file: {odd}")
    if bad := [k for k in mine if mine[k].shape != saved[k].shape]:
        k = bad[0]
        raise ValueError(f"{k} has shape {tuple(saved[k].shape)}, expected {tuple(mine[k].shape)}")


if __name__ == "__main__":  # python prefix_tuning.py: the claims above, checked on a toy
    from transformers import LlamaConfig, LlamaForCausalLM
    sizes = {"hidden_size": 128, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 32}
    model, x = LlamaForCausalLM(LlamaConfig(**sizes)).double().eval(), torch.randint(32, (1, 9))
    whole = model(x).logits[:, 3:]
    own = [t[0] for c in model(x[:, :3]).past_key_values.layers for t in (c.keys, c.values)]
    paths = attach(model, length=3, mlp=5)
    load(model, dict(zip([f"{p}.{n}" for p in paths for n in "KV"], own)))  # drops the MLP
    y = model(x[:, 3:], position_ids=torch.arange(3, 9)[None]).logits
    assert torch.allclose(y, whole, rtol=0, atol=1e-12), "keys and values are the whole context"
    print("prefix_tuning: ok")
