"""Prefix-tuning: a prefix is a context, the gate, peft, caches, the MLP, no state outside the model."""

import copy
import warnings

import pytest
import torch
from tiny import ARCHS, batch, build, logits, perturb
from transformers import DynamicCache, EncoderDecoderCache

from minipeft.additive import prefix_tuning

DECODERS = ("llama", "gpt2")
P = 3


def attached(arch, dtype=torch.float64, seed=3, **keywords):
    model = build(arch, dtype)
    torch.manual_seed(seed)
    prefix_tuning.attach(model, **{"length": P, **keywords})
    return model


def trained(model):
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def gradients(model, inputs):
    model.zero_grad()
    model(**inputs).loss.backward()
    return {n: p.grad.clone() for n, p in trained(model).items()}


def keys_and_values(base, ids, **more):
    """What real tokens leave in the cache, under the names that `load` wants."""
    cache = base(ids, use_cache=True, **more).past_key_values
    block = "model.layers.{}.self_attn" if hasattr(base, "model") else "transformer.h.{}.attn"
    return {
        f"{block.format(i)}.prefix.{n}": t[0]
        for i, layer in enumerate(cache.layers)
        for n, t in (("K", layer.keys), ("V", layer.values))
    }


# A prefix is a context


@pytest.mark.parametrize("arch", DECODERS)
def test_the_keys_and_values_of_real_tokens_are_that_context(arch):
    base, ids = build(arch), batch(arch)["input_ids"][:1]
    whole = base(ids).logits[:, P:]
    model = attached(arch)
    prefix_tuning.load(model, keys_and_values(base, ids[:, :P]))
    place = torch.arange(P, ids.shape[1])[None]
    tail = model(ids[:, P:], position_ids=place).logits
    torch.testing.assert_close(tail, whole, rtol=0, atol=1e-12)
    assert (model(ids[:, P:]).logits - whole).abs().max() > 1e-2  # at positions from 0 on it is not


def test_words_under_rope_stand_just_before_the_text():
    base, ids = build("llama"), batch("llama")["input_ids"][:1]
    model = attached("llama", words=ids[0, :P])
    # transformers computes cos and sin in float32, so R(-3)' R(0) = R(0)' R(3) holds to that
    torch.testing.assert_close(model(ids[:, P:]).logits, base(ids).logits[:, P:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("arch", ARCHS)
def test_words_are_the_keys_and_values_of_one_pass(arch):
    words = torch.tensor([5, 9, 11])
    base, model = build(arch), attached(arch, words=words)
    saved = prefix_tuning.state(model)
    first = next(iter(saved.values()))
    assert first.shape[1] == P
    with torch.no_grad():
        if arch == "bert":
            x = base.bert.embeddings(words[None])
            K = base.bert.encoder.layer[0].attention.self.key(x)
        elif arch == "t5":
            x = base.encoder.block[0].layer[0].layer_norm(base.shared(words[None]))
            K = base.encoder.block[0].layer[0].SelfAttention.k(x)
        elif arch == "gpt2":
            x = base.transformer.h[0].ln_1(base.transformer.wte(words) + base.transformer.wpe.weight[:P])
            K = base.transformer.h[0].attn.c_attn(x)[:, 24:48][None]
        else:
            x = base.model.layers[0].input_layernorm(base.model.embed_tokens(words))
            K = base.model.layers[0].self_attn.k_proj(x)[None]
            half = torch.arange(0, 6, 2) / 6  # the rotation written out, for d_h = 6
            angle = torch.arange(-P, 0)[:, None] * 10000.0**-half
            k = K.view(P, 2, 2, 3)  # (P, heads, halves, 3)
            cos, sin = angle.cos()[:, None], angle.sin()[:, None]
            K = torch.stack([k[:, :, 0] * cos - k[:, :, 1] * sin,
                             k[:, :, 1] * cos + k[:, :, 0] * sin], 2).reshape(1, P, 12)
    heads, _, d_h = first.shape
    expected = K.view(P, heads, d_h).transpose(0, 1)
    torch.testing.assert_close(first, expected, rtol=0, atol=1e-6 if arch == "llama" else 1e-12)


def test_slots_have_no_order():
    inputs = batch("llama")
    model, other = attached("llama"), attached("llama")
    flipped = {k: v.flip(1) for k, v in prefix_tuning.state(model).items()}
    prefix_tuning.load(other, flipped)
    torch.testing.assert_close(logits(other, inputs), logits(model, inputs), rtol=0, atol=1e-13)


# The mathematics of one layer


def layer_with_prefix(K, V):
    layer = torch.nn.Module()
    layer.__class__ = type("Layer", (torch.nn.Module,), {"__module__": "transformers.models.llama.modeling_llama"})
    layer.prefix, layer.is_causal, layer.num_key_value_groups = prefix_tuning.Prefix(), True, 2
    layer.prefix.start(K, V)
    return layer


@pytest.mark.parametrize("inner", prefix_tuning.INNER)
def test_attention_is_a_convex_combination(inner):
    g = torch.Generator().manual_seed(0)
    q, K, V, pk, pv = (torch.randn(2, h, t, 6, generator=g, dtype=torch.float64)
                       for h, t in ((4, 5), (2, 5), (2, 5), (2, P), (2, P)))
    mask = torch.ones(5, 5).tril().bool().expand(2, 1, 5, 5).clone()
    mask[1, :, :, 0] = False  # a padded token, but for row 0 of it, which then sees the prefix only
    additive = torch.zeros(2, 1, 5, 5, dtype=torch.float64).masked_fill(~mask, torch.finfo(torch.float64).min)
    layer = layer_with_prefix(pk[0], pv[0]).eval()
    o, _ = prefix_tuning._attention(layer, q, K, V, mask if inner == "sdpa" else additive,
                                    inner=inner, scaling=6**-0.5, dropout=0.0)
    double = lambda t: t.repeat_interleave(2, dim=1)  # each key head serves two query heads
    e = (q @ double(K).mT * 6**-0.5).exp() * mask
    e_p = (q @ double(pk[:1]).mT * 6**-0.5).exp()
    Z, Z_p = e.sum(-1, keepdim=True), e_p.sum(-1, keepdim=True)
    c = Z_p / (Z_p + Z)
    alone = torch.where(Z > 0, e / Z, 0.0) @ double(V)
    mixed = (1 - c) * alone + c * (e_p / Z_p) @ double(pv[:1])
    # the eager function takes its softmax in float32
    torch.testing.assert_close(o.transpose(1, 2), mixed, rtol=0, atol=1e-13 if inner == "sdpa" else 1e-6)
    assert c[1, :, 0].eq(1).all() and 0.05 < c[0].mean() < 0.95


def test_a_causal_layer_without_a_mask_is_refused():
    layer = layer_with_prefix(torch.zeros(2, P, 6), torch.zeros(2, P, 6))
    q = torch.zeros(1, 4, 5, 6)
    with pytest.raises(ValueError, match="mask"):
        prefix_tuning._attention(layer, q, q[:, :2], q[:, :2], None, inner="sdpa", scaling=1.0)


@pytest.mark.parametrize("arch", ARCHS)
def test_a_zero_prefix_is_not_the_base(arch):
    inputs, model = batch(arch), attached(arch)
    prefix_tuning.load(model, {k: torch.zeros_like(v) for k, v in prefix_tuning.state(model).items()})
    assert (logits(model, inputs) - logits(build(arch), inputs)).abs().max() > 1e-3


@pytest.mark.parametrize("arch", ARCHS)
def test_every_slot_of_every_layer_gets_a_gradient(arch):
    model = attached(arch)
    grads = gradients(model, batch(arch))
    assert len(grads) == (12 if arch == "t5" else 4)  # T5: encoder, decoder and cross, 2 layers each
    for g in grads.values():
        assert (g.abs().amax(dim=(0, 2)) > 1e-12).all()


# Hugging Face's peft, where it is right


def peft_prefix(model, arch, length=P):
    """peft's model and its (P, 2 L, k, d_h) view of what trains."""
    peft = pytest.importorskip("peft")
    task = dict(llama="CAUSAL_LM", gpt2="CAUSAL_LM", bert="SEQ_CLS", t5="SEQ_2_SEQ_LM")[arch]
    theirs = peft.get_peft_model(model, peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=length))
    for n, p in theirs.named_parameters():
        p.requires_grad_("prompt_encoder" in n)
    perturb(theirs)
    (weight,) = trained(theirs).values()
    heads = 2 if arch == "llama" else 4
    return theirs.eval(), weight, lambda w: w.view(length, -1, heads, 6)


@pytest.mark.parametrize("arch", ("llama", "gpt2", "bert"))
def test_equal_to_peft_bit_for_bit_with_positions_from_P_on(arch):
    theirs, weight, view = peft_prefix(build(arch, torch.float32), arch)
    model, inputs = attached(arch, torch.float32), batch(arch)
    inputs["position_ids"] = torch.arange(P, P + inputs["input_ids"].shape[1]).expand(3, -1)
    slots = view(weight.detach()).permute(1, 2, 0, 3)  # (2 L, k, P, d_h), K and V of one layer adjacent
    prefix_tuning.load(model, dict(zip(prefix_tuning.state(model), slots)))
    real = {k: v for k, v in inputs.items() if k != "position_ids"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        a, b = model(**inputs), theirs(**real)
    real = inputs["attention_mask"].bool() if a.logits.dim() == 3 else slice(None)
    assert torch.equal(a.logits[real], b.logits[real]) and torch.equal(a.loss, b.loss)
    a.loss.backward()
    b.loss.backward()
    mine = torch.stack([p.grad for p in trained(model).values()])  # (2 L, k, P, d_h)
    assert torch.equal(mine, view(weight.grad).permute(1, 2, 0, 3)) and mine.abs().max() > 1e-4


def test_peft_on_t5_serves_half_of_its_slots_and_no_encoder_or_cross_attention():
    """With 2 layers both of peft's read slots 0 and 1 of 4: 4 i and 4 i + 1 modulo 2 L."""
    theirs, weight, view = peft_prefix(build("t5", torch.float32), "t5")
    base, inputs = build("t5", torch.float32), batch("t5")
    K, V = (view(weight.detach())[:, i].transpose(0, 1).expand(3, -1, -1, -1) for i in (0, 1))
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    for i in range(2):
        cache.self_attention_cache.update(K, V, i)
    theirs(**inputs).loss.backward()
    with torch.no_grad():
        ours = base(**inputs, past_key_values=cache).logits
        torch.testing.assert_close(ours, theirs(**inputs).logits, rtol=0, atol=1e-5)
    used = view(weight.grad).abs().amax(dim=(0, 2, 3)) > 0
    assert used.tolist() == [True, True, False, False]


# The ways in which a model is run


@pytest.mark.parametrize("reentrant", (False, True))
@pytest.mark.parametrize("arch", ARCHS)
def test_gradient_checkpointing_changes_nothing(arch, reentrant):
    model, inputs = attached(arch), batch(arch)
    for m in model.modules():  # train mode without its dropout
        if hasattr(m, "p"):
            m.p = 0.0
        for name in ("dropout", "attention_dropout"):
            if isinstance(getattr(m, name, None), float):
                setattr(m, name, 0.0)
    model.train()
    plain = gradients(model, inputs)
    if reentrant:
        model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    kept = gradients(model, inputs)
    assert plain.keys() == kept.keys()
    for n in plain:
        torch.testing.assert_close(kept[n], plain[n], rtol=0, atol=1e-12)


def greedy(model, ids, mask, n):
    """Token by token, each time from the start, without a cache."""
    for _ in range(n):
        place = (mask.cumsum(1) - 1).clamp(min=0)
        last = model(ids, attention_mask=mask, position_ids=place).logits[:, -1]
        ids = torch.cat([ids, last.argmax(-1, keepdim=True)], 1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    return ids


@pytest.mark.parametrize("how", ({}, {"use_cache": False}, {"cache_implementation": "static"}))
@pytest.mark.parametrize("arch", DECODERS)
def test_generation_is_the_same_under_every_cache_and_left_padding(arch, how):
    model, ids = attached(arch), batch(arch)["input_ids"]
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    ids = ids.masked_fill(mask == 0, 0)
    ways = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    out = model.generate(input_ids=ids, attention_mask=mask, **ways, **how)
    with torch.no_grad():
        assert torch.equal(out, greedy(model, ids, mask, 6))
        assert torch.equal(out[1, 2:], greedy(model, ids[1:2, 2:], mask[1:2, 2:], 6)[0])
    plain = build(arch).generate(input_ids=ids, attention_mask=mask, **ways)
    assert not torch.equal(out, plain)


@pytest.mark.parametrize("how", ({}, {"use_cache": False}, {"cache_implementation": "static"}))
def test_generation_on_t5(how):
    model, inputs = attached("t5"), batch("t5")
    del inputs["labels"]
    out = model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False, **how)
    ids = torch.zeros(3, 1, dtype=torch.long)
    with torch.no_grad():
        for _ in range(6):
            last = model(**inputs, decoder_input_ids=ids).logits[:, -1]
            last[:, model.config.eos_token_id] = -torch.inf  # min_new_tokens
            ids = torch.cat([ids, last.argmax(-1, keepdim=True)], 1)
    assert torch.equal(out, ids)


@pytest.mark.parametrize("arch, side", (("llama", "left"), ("llama", "right"), ("gpt2", "left"),
                                        ("bert", "right"), ("t5", "left"), ("t5", "right")))
def test_padding_does_not_change_a_row(arch, side):
    model, ids = attached(arch), batch(arch)["input_ids"][:1]
    extra = {"decoder_input_ids": torch.tensor([[0, 7, 8]])} if arch == "t5" else {}
    gap = torch.zeros(1, 2, dtype=torch.long)
    order = (gap, ids) if side == "left" else (ids, gap)
    padded, mask = torch.cat(order, 1), torch.cat([(t > 0).long() for t in order], 1)
    with torch.no_grad():
        alone = model(ids, **extra).logits
        out = model(padded, attention_mask=mask, **extra).logits
        if arch in DECODERS:  # a prefix sees absolute positions, even under RoPE
            place = torch.arange(mask.shape[1])[None]
            shifted = model(padded, attention_mask=mask, position_ids=place).logits
            out, shifted = out[mask.bool()][None], shifted[mask.bool()][None]
            assert ((shifted - alone).abs().max() > 1e-2) == (side == "left")
    torch.testing.assert_close(out, alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("arch", DECODERS)
def test_a_cache_kept_by_hand(arch):
    model, ids = attached(arch), batch(arch)["input_ids"]
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    with torch.no_grad():
        whole = model(ids, attention_mask=mask).logits
        first = model(ids[:, :-1], attention_mask=mask[:, :-1], use_cache=True)
        then = model(ids[:, -1:], attention_mask=mask, past_key_values=first.past_key_values)
    torch.testing.assert_close(then.logits[:, 0], whole[:, -1], rtol=0, atol=1e-12)
    assert first.past_key_values.get_seq_length() == 7  # the prefix is in no cache


@pytest.mark.parametrize("arch", ARCHS)
def test_bfloat16_by_autocast_and_by_weights(arch):
    inputs = batch(arch)
    wide, half = attached(arch, torch.float32), build(arch, torch.float32).bfloat16()
    torch.manual_seed(3)
    prefix_tuning.attach(half, length=P)
    assert {p.dtype for p in trained(half).values()} == {torch.float32}
    exact = wide(**inputs).logits
    with torch.autocast("cpu", torch.bfloat16):
        out = wide(**inputs)
    out.loss.backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in trained(wide).values())
    scale = exact.abs().max()
    assert (out.logits.float() - exact).abs().max() < 0.05 * scale
    assert (half(**inputs).logits.float() - exact).abs().max() < 0.1 * scale
    half(**inputs).loss.backward()


@pytest.mark.parametrize("arch", ARCHS)
def test_eager_attention_agrees_and_shows_the_slots(arch):
    inputs = batch(arch)
    eager = build(arch)
    eager.set_attn_implementation("eager")
    torch.manual_seed(3)
    prefix_tuning.attach(eager, length=P)
    # Llama's eager function takes its softmax in float32
    torch.testing.assert_close(logits(eager, inputs), logits(attached(arch), inputs), rtol=0, atol=1e-6)
    if arch != "t5":
        seen = eager(**inputs, output_attentions=True).attentions
        assert [tuple(a.shape[2:]) for a in seen] == [(7, P + 7)] * 2
    prefix_tuning.detach(eager)
    assert eager.config._attn_implementation == "eager"


# Nothing outside the model


@pytest.mark.parametrize("arch", ARCHS)
def test_two_models_and_a_copy_do_not_meet(arch):
    inputs = batch(arch)
    one, two, base = attached(arch), attached(arch, seed=4, length=5), build(arch)
    a, b, c = (logits(m, inputs) for m in (one, two, base))
    copied = copy.deepcopy(one)
    perturb(one)
    prefix_tuning.detach(two)
    assert torch.equal(logits(copied, inputs), a) and not torch.equal(logits(one, inputs), a)
    assert torch.equal(logits(two, inputs), c) and torch.equal(logits(base, inputs), c)
    assert not torch.equal(a, b)
    prefix_tuning.detach(copied)
    assert torch.equal(logits(copied, inputs), c)
    copied.set_attn_implementation("eager")  # the guard went with the prefix
    copied(**inputs)


def test_a_model_whose_attention_was_changed_refuses_to_run():
    model = attached("llama")
    model.set_attn_implementation("sdpa")
    with pytest.raises(RuntimeError, match="ignores the prefix"):
        model(**batch("llama"))
    model.set_attn_implementation("prefix_sdpa")
    model(**batch("llama"))


@pytest.mark.parametrize("arch", ARCHS)
def test_attach_leaves_modes_and_randomness_alone(arch):
    model = build(arch).train()
    first = next(m for m in model.modules() if isinstance(m, torch.nn.Dropout | torch.nn.Linear)).eval()
    torch.manual_seed(0)
    before = torch.rand(1)
    torch.manual_seed(0)
    prefix_tuning.attach(model, words=torch.tensor([4, 5]))
    assert torch.equal(torch.rand(1), before) and model.training and not first.training


@pytest.mark.parametrize("keywords", ({"length": 0}, {"mlp": 0}, {"words": torch.tensor([], dtype=torch.long)}))
def test_lengths_below_one_are_refused(keywords):
    model = build("llama")
    with pytest.raises(ValueError, match="from 1 on"):
        prefix_tuning.attach(model, **keywords)
    assert not prefix_tuning.sites(model) and all(p.requires_grad for p in model.parameters())


def test_a_second_prefix_and_another_attention_are_refused():
    model = attached("llama")
    with pytest.raises(ValueError, match="no prefix yet"):
        prefix_tuning.attach(model)
    prefix_tuning.detach(model)
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="flex_attention"):
        prefix_tuning.attach(model)


def test_a_failing_pass_leaves_the_model_as_it_was():
    model = build("llama")
    with pytest.raises(IndexError):
        prefix_tuning.attach(model, words=torch.tensor([999]))
    assert not prefix_tuning.sites(model) and model.config._attn_implementation == "sdpa"
    assert torch.equal(logits(model, batch("llama")), logits(build("llama"), batch("llama")))


# The MLP


@pytest.mark.parametrize("arch", ARCHS)
def test_parameters_with_and_without_the_mlp(arch):
    heads, kinds, layers = (2 if arch == "llama" else 4), (3 if arch == "t5" else 1), 2
    d, m, width = 24, 5, heads * 6
    count = lambda model: sum(p.numel() for p in trained(model).values())
    assert count(attached(arch)) == kinds * layers * 2 * P * width
    with_mlp = attached(arch, mlp=m)
    assert count(with_mlp) == kinds * (P * d + d * m + m + layers * (m + 1) * 2 * width)
    stored = sum(t.numel() for t in prefix_tuning.state(with_mlp).values())
    assert stored == kinds * layers * 2 * P * width


@pytest.mark.parametrize("arch", ARCHS)
def test_the_mlp_can_be_thrown_away_or_kept_for_later(arch):
    inputs, model = batch(arch), attached(arch, mlp=5)
    perturb(model)
    y, grads = logits(model, inputs), gradients(model, inputs)
    fresh = attached(arch, mlp=5, seed=8)
    prefix_tuning.load(fresh, prefix_tuning.resumable(model))
    assert torch.equal(logits(fresh, inputs), y)
    for n, g in gradients(fresh, inputs).items():
        assert torch.equal(g, grads[n])
    prefix_tuning.load(fresh, prefix_tuning.state(model))
    assert torch.equal(logits(fresh, inputs), y)
    assert trained(fresh).keys() == prefix_tuning.state(model).keys()
    assert prefix_tuning.resumable(fresh).keys() == prefix_tuning.state(fresh).keys()
    copied = copy.deepcopy(model)
    trunks = {id(m.trunk) for m in prefix_tuning.sites(copied).values()}
    assert len(trunks) == (3 if arch == "t5" else 1)


def test_a_resumable_file_needs_the_same_mlp():
    saved, model = prefix_tuning.resumable(attached("llama", mlp=5)), attached("llama", mlp=4)
    before = prefix_tuning.resumable(model)
    with pytest.raises(ValueError, match="shape"):
        prefix_tuning.load(model, saved)
    with pytest.raises(KeyError):
        prefix_tuning.load(attached("llama"), saved)
    assert all(torch.equal(v, before[k]) for k, v in prefix_tuning.resumable(model).items())


@pytest.mark.parametrize("arch", ARCHS)
def test_the_mlp_can_start_from_words(arch):
    words = torch.tensor([5, 9, 11])
    made, copied = attached(arch, words=words, mlp=8), attached(arch, words=words)
    for a, b in zip(prefix_tuning.state(made).values(), prefix_tuning.state(copied).values()):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_the_counts_of_the_paper():
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.device("meta"):
        medium = GPT2LMHeadModel(GPT2Config(n_embd=1024, n_layer=24, n_head=16))
    layers, d, m = medium.config.n_layer, medium.config.n_embd, 512
    assert 2 * layers * 5 * d == 245_760
    assert 5 * d + d * m + m + m * 2 * layers * d + 2 * layers * d == 25_744_896
