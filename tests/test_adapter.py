"""Houlsby adapters: the lines of the docstring, one test each."""

import copy
import math
import re

import pytest
import torch
import transformers as tf
from minipeft.additive import adapter
from tiny import ARCHS, SIZE, batch, build, fit, logits, perturb
from torch import nn
from torch.nn import functional as F


@pytest.fixture
def one():
    """A single adapter behind nothing, away from its start."""
    torch.manual_seed(0)
    m = adapter.Adapter(nn.Identity(), d=6, m=4, dtype=torch.float64)
    perturb(m, 0.5)
    return m


@pytest.fixture(params=ARCHS)
def arch(request):
    return request.param


def bottlenecks(model):
    return {p: m for p, m in adapter.sites(model).items() if isinstance(m, adapter.Adapter)}


def gelu_tanh(s):
    return 0.5 * s * (1 + torch.tanh(math.sqrt(2 / math.pi) * (s + 0.044715 * s**3)))


# ------------------------------------------------------------------ one adapter


def test_forward_is_the_written_one(one):
    u = torch.randn(3, 5, 6).double()
    want = u + gelu_tanh(u @ one.W_down.T + one.b_down) @ one.W_up.T + one.b_up
    torch.testing.assert_close(one(u), want, rtol=1e-12, atol=1e-12)


def test_gradients_are_the_written_ones(one):
    u = torch.randn(7, 6).double().requires_grad_()
    D = torch.randn(7, 6).double()
    one(u).backward(D)
    s = (u @ one.W_down.T + one.b_down).detach().requires_grad_()
    z = gelu_tanh(s)
    (slope,) = torch.autograd.grad(z.sum(), s)
    g = (D @ one.W_up) * slope
    want = dict(W_up=D.T @ z, b_up=D.sum(0), W_down=g.T @ u, b_down=g.sum(0))
    for name, expected in want.items():
        torch.testing.assert_close(getattr(one, name).grad, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(u.grad, D + g @ one.W_down, rtol=1e-10, atol=1e-10)


def test_every_token_alone(one):
    u, order = torch.randn(2, 9, 6).double(), torch.randperm(9)
    torch.testing.assert_close(one(u)[:, order], one(u[:, order]))


@pytest.mark.parametrize(
    "d, sigma, ratio", [(768, 1e-3, 8.6e-5), (768, 1e-2, 9.1e-3), (1024, 1e-2, 1.1e-2)]
)
def test_distance_from_the_identity_at_the_start(d, sigma, ratio):
    torch.manual_seed(0)
    u = torch.randn(500, d)
    a = adapter.Adapter(nn.Identity(), d, 64, sigma)
    assert ((a(u) - u).norm() / u.norm()).item() == pytest.approx(ratio, rel=0.1)


def test_start_is_a_truncated_normal():
    torch.manual_seed(0)
    a = adapter.Adapter(nn.Identity(), 768, 64, 1e-2)
    for W in (a.W_down, a.W_up):
        assert W.abs().max() <= 2e-2 and W.std().item() == pytest.approx(0.88e-2, rel=0.02)
    assert not a.b_down.any() and not a.b_up.any()


def test_the_draw_does_not_depend_on_the_model_dtype_only_on_the_seed():
    torch.manual_seed(1)
    first = adapter.Adapter(nn.Identity(), 8, 2).W_down
    torch.manual_seed(1)
    assert torch.equal(first, adapter.Adapter(nn.Identity(), 8, 2).W_down)


def test_up_at_zero_moves_up_first_and_both_at_zero_move_a_bias_alone(one):
    nn.init.zeros_(one.W_up)
    nn.init.zeros_(one.b_up)
    one(torch.randn(5, 6).double()).square().sum().backward()
    assert not one.W_down.grad.any() and not one.b_down.grad.any()
    assert one.W_up.grad.abs().min() > 0
    one.zero_grad()
    for name in ("W_down", "b_down"):
        nn.init.zeros_(getattr(one, name))
    one(torch.randn(5, 6).double()).square().sum().backward()
    moving = {n for n, p in one.named_parameters() if p.grad.any()}
    assert moving == {"b_up"}


@pytest.mark.parametrize("bad", [dict(m=0), dict(m=2, sigma=0.0)])
def test_sizes_out_of_range(bad):
    with pytest.raises(ValueError, match="must be positive"):
        adapter.Adapter(nn.Identity(), d=6, **bad)


# ------------------------------------------------------------------ in a model


def reference(model, adapters):
    """The same placement with hooks on other modules: on what the sub-layers return."""
    ends = dict(
        bert=("output.dense",),
        gpt2=(".attn", ".mlp"),
        llama=(".self_attn", ".mlp"),
        t5=("SelfAttention", "EncDecAttention", "DenseReluDense"),
    )[model.config.model_type]
    spots = [m for p, m in model.named_modules() if p.endswith(ends)]
    assert len(spots) == len(adapters)
    for module, a in zip(spots, adapters):

        def hook(module, args, out, a=a):
            u = out[0] if isinstance(out, tuple) else out
            y = u + F.gelu(u @ a.W_down.T + a.b_down, approximate="tanh") @ a.W_up.T + a.b_up
            return (y, *out[1:]) if isinstance(out, tuple) else y

        module.register_forward_hook(hook)


def test_it_sits_between_the_sub_layer_and_its_residual(arch):
    model, inputs = build(arch), batch(arch)
    other = copy.deepcopy(model)
    adapter.attach(model, bottleneck=5, norms=False)
    perturb(model)
    reference(other, list(bottlenecks(model).values()))
    y = logits(model, inputs)
    torch.testing.assert_close(logits(other, inputs), y, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(y, logits(build(arch), inputs), rtol=1e-2)


def test_it_reads_what_dropout_leaves(arch):
    model = build(arch)
    adapter.attach(model)
    kinds = {type(m.base) for m in bottlenecks(model).values()}
    assert kinds == ({nn.Linear} if arch == "llama" else {nn.Dropout})
    if arch != "llama":
        a = next(iter(bottlenecks(model).values()))
        a.base.train()
        a.base.p = 1.0
        u = torch.randn(2, 24).double()
        torch.testing.assert_close(a(u), (gelu_tanh(a.b_down) @ a.W_up.T + a.b_up).expand(2, -1))


def test_where_it_goes_without_targets():
    places = dict(
        bert=["encoder.layer.0.attention.output.dropout", "encoder.layer.0.output.dropout"],
        gpt2=["h.0.attn.resid_dropout", "h.0.mlp.dropout"],
        llama=["layers.0.self_attn.o_proj", "layers.0.mlp.down_proj"],
        t5=["encoder.block.0.layer.0.dropout", "encoder.block.0.layer.1.dropout"]
        + [f"decoder.block.0.layer.{i}.dropout" for i in range(3)],
    )
    for arch in ARCHS:
        model = build(arch)
        norms = [p for p, m in model.named_modules() if type(m).__name__.endswith("Norm")]
        got = adapter.attach(model)
        first = [p for p in bottlenecks(model) if re.search(r"(layer|layers|h|block)[.]0[.]", p)]
        if arch == "t5":
            first = [p for p in first if "block.0." in p]
        assert len(first) == len(places[arch])
        assert all(p.endswith(q) for p, q in zip(first, places[arch]))
        assert len(bottlenecks(model)) == 2 * len(first)  # two layers each
        assert set(got) == set(bottlenecks(model)) | set(norms) and len(got) == len(set(got))


@pytest.mark.parametrize(
    "name, config, adapters",
    [
        (
            "RobertaModel",
            tf.RobertaConfig(
                num_hidden_layers=3,
                hidden_size=24,
                num_attention_heads=4,
                intermediate_size=40,
                vocab_size=64,
            ),
            6,
        ),
        (
            "DebertaV2Model",
            tf.DebertaV2Config(
                num_hidden_layers=3,
                hidden_size=24,
                num_attention_heads=4,
                intermediate_size=40,
                vocab_size=64,
            ),
            6,
        ),
        ("Qwen2Model", tf.Qwen2Config(**{**SIZE["llama"].to_dict(), "model_type": "qwen2"}), 4),
        (
            "MistralModel",
            tf.MistralConfig(**{**SIZE["llama"].to_dict(), "model_type": "mistral"}),
            4,
        ),
        ("T5EncoderModel", SIZE["t5"], 4),
    ],
)
def test_relatives_are_derived_too(name, config, adapters):
    model = getattr(tf, name)(copy.deepcopy(config)).eval()
    adapter.attach(model, bottleneck=3)
    assert len(bottlenecks(model)) == adapters
    ids = torch.arange(3, 9)[None]
    model(ids).last_hidden_state.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_up_at_zero_is_the_base_model_exactly(arch):
    model, inputs = build(arch), batch(arch)
    before = logits(model, inputs)
    adapter.attach(model, bottleneck=5, sigma=1.0)
    assert not torch.equal(logits(model, inputs), before)
    start = adapter.state(model)
    adapter.load(model, {k: v * 0 if k.endswith("W_up") else v for k, v in start.items()})
    assert torch.equal(logits(model, inputs), before)


def test_distance_from_the_base_grows_with_sigma(arch):
    inputs, base = batch(arch), build(arch)
    before, far = logits(base, inputs), []
    for sigma in (1e-4, 1e-3, 1e-2, 1e-1, 1.0):
        model = copy.deepcopy(base)
        torch.manual_seed(0)
        adapter.attach(model, bottleneck=8, sigma=sigma)
        far.append(((logits(model, inputs) - before).norm() / before.norm()).item())
    assert far == sorted(far) and far[0] > 0 and far[1] < 1e-3


def test_the_code_start_is_close_at_the_size_of_bert_base():
    torch.manual_seed(0)
    config = tf.BertConfig(num_hidden_layers=2, vocab_size=64, num_labels=2)
    model = tf.BertForSequenceClassification(config).eval()
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        before = model(ids).logits
        adapter.attach(model, bottleneck=64)
        after = model(ids).logits
    assert 0 < (after - before).norm() / before.norm() < 1e-2


def test_names_that_train():
    model = build("bert")
    adapter.attach(model)
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    want = {f"bert.embeddings.LayerNorm.own.{n}" for n in ("weight", "bias")}
    for layer in range(2):
        for block in ("attention.output", "output"):
            at = f"bert.encoder.layer.{layer}.{block}"
            want |= {f"{at}.dropout.{n}" for n in ("W_down", "b_down", "W_up", "b_up")}
            want |= {f"{at}.LayerNorm.own.{n}" for n in ("weight", "bias")}
    assert names == want == set(adapter.state(model))  # no pooler, no embedding, no classifier


COUNTS = [
    ("large", 2, 245_856, 100_352),
    ("large", 8, 835_968, 100_352),
    ("large", 64, 6_343_680, 100_352),
    ("large", 256, 25_227_264, 100_352),
    ("base", 64, 2_379_264, 38_400),
]


@pytest.mark.parametrize("size, m, adapters, norms", COUNTS)
def test_golden_counts(size, m, adapters, norms):
    d, layers = dict(large=(1024, 24), base=(768, 12))[size]
    with torch.device("meta"):
        model = tf.BertModel(
            tf.BertConfig(
                hidden_size=d,
                num_hidden_layers=layers,
                num_attention_heads=d // 64,
                intermediate_size=4 * d,
            )
        )
    adapter.attach(model, bottleneck=m)
    split = {adapter.Adapter: 0, adapter.TunedNorm: 0}
    for site in adapter.sites(model).values():
        split[type(site)] += sum(p.numel() for p in site.parameters() if p.requires_grad)
    assert split == {adapter.Adapter: adapters, adapter.TunedNorm: norms}
    assert len(bottlenecks(model)) == 2 * layers
    assert adapters == 2 * layers * (2 * m * d + d + m) and norms == (2 * layers + 1) * 2 * d
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == adapters + norms


def test_norms_can_stay_frozen(arch):
    model = build(arch)
    places = adapter.attach(model, norms=False)
    assert places == list(bottlenecks(model)) == list(adapter.sites(model))


def test_a_pretrained_norm_survives_training(arch):
    model = build(arch)
    adapter.attach(model, sigma=0.1)
    norm = next(m for m in adapter.sites(model).values() if isinstance(m, adapter.TunedNorm))
    before = norm.base.weight.clone()
    fit(adapter, model, batch(arch))
    assert torch.equal(norm.base.weight, before) and not torch.equal(norm.own["weight"], before)


def test_two_halves_make_the_whole():
    whole, halves, inputs = build("gpt2"), build("gpt2"), batch("gpt2")
    adapter.attach(whole, bottleneck=3)
    adapter.attach(halves, "resid_dropout", bottleneck=3)
    places = adapter.attach(halves, "mlp.dropout", bottleneck=3, freeze=False)
    assert len(places) == 2 and adapter.sites(halves).keys() == adapter.sites(whole).keys()
    perturb(whole)
    adapter.load(halves, adapter.state(whole))
    assert torch.equal(logits(whole, inputs), logits(halves, inputs))
    adapter.detach(halves)
    assert torch.equal(logits(halves, inputs), logits(build("gpt2"), inputs))


@pytest.mark.parametrize(
    "targets, word",
    [
        (("nope",), "'nope'"),
        (("dropout", "nope"), "'nope'"),
        (("LayerNorm",), "LayerNorm, expected"),
        (("embeddings.dropout",), "expected a linear layer, or dropout after one"),
    ],
)
def test_a_bad_target_is_refused_and_nothing_changes(targets, word):
    model = build("bert")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=word):
        adapter.attach(model, *targets)
    with pytest.raises(ValueError, match="bottleneck = 0"):
        adapter.attach(model, bottleneck=0)
    assert not adapter.sites(model) and all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())


def test_twice_is_refused(arch):
    model = build(arch)
    adapter.attach(model)
    with pytest.raises(ValueError, match="is a Adapter"):
        adapter.attach(model)


def test_an_unknown_architecture_asks_for_targets():
    with pytest.raises(ValueError, match="give targets"):
        adapter.attach(nn.Sequential(nn.Linear(3, 3)))


def test_a_name_is_a_whole_name():
    net = nn.Sequential()
    for name in ("out", "my_out"):
        net.add_module(name, nn.Linear(3, 3))
    assert adapter.attach(net, "out", bottleneck=1) == ["out"]


# ------------------------------------------------------------------ in the user's loop


def test_half_precision_model_trains_float32_parts(arch):
    model, inputs = build(arch, torch.bfloat16), batch(arch)
    before = logits(model, inputs)
    adapter.attach(model, bottleneck=5)
    assert all(v.dtype == torch.float32 for v in adapter.state(model).values())
    start = adapter.state(model)
    adapter.load(model, {k: v * 0 if k.endswith("W_up") else v for k, v in start.items()})
    assert torch.equal(logits(model, inputs), before)  # the tuned norms too, in bfloat16
    adapter.load(model, start)
    fit(adapter, model, inputs)
    moved = [k for k, v in adapter.state(model).items() if not torch.equal(v, start[k])]
    assert len(moved) == len(start) and logits(model, inputs).dtype == torch.bfloat16


def test_autocast(arch):
    model, inputs = build(arch, torch.float32), batch(arch)
    adapter.attach(model, bottleneck=5)
    perturb(model, 0.05)
    exact = logits(model, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(**inputs)
        out.loss.backward()
        rough = logits(model, inputs)
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    assert (rough.float() - exact).norm() / exact.norm() < 0.05


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(arch, reentrant):
    grads = []
    for checkpointing in (False, True):
        model = build(arch).train()
        for m in model.modules():
            if isinstance(m, nn.Dropout):
                m.p = 0.0
        model.config.use_cache = False
        adapter.attach(model, bottleneck=5)
        perturb(model)
        if checkpointing:
            model.gradient_checkpointing_enable(dict(use_reentrant=reentrant))
            model.enable_input_require_grads()
        model(**batch(arch)).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for n, g in grads[0].items():
        torch.testing.assert_close(g, grads[1][n], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "t5"])
def test_generate_with_a_cache_and_left_padding(arch):
    model = build(arch, torch.float32)
    adapter.attach(model, bottleneck=5)
    perturb(model)
    ids = torch.tensor([[0, 0, 5, 6, 7], [8, 9, 10, 11, 12]])
    mask = (ids != 0).long()
    how = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)
    both = model.generate(ids, attention_mask=mask, **how)
    assert torch.equal(both, model.generate(ids, attention_mask=mask, use_cache=False, **how))
    if arch != "t5":  # T5's relative positions see the padding
        alone = model.generate(ids[:1, 2:], attention_mask=mask[:1, 2:], **how)
        assert torch.equal(both[0, 5:], alone[0, 3:])


def test_compiles_in_one_graph(arch):
    small = {"num_layers": 1, "num_decoder_layers": 1} if arch == "t5" else {}  # the slowest to trace
    model, inputs = build(arch, torch.float32, **small), batch(arch)
    model.config.use_cache = False
    adapter.attach(model, bottleneck=5)
    perturb(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    labels = inputs.pop("labels")  # GPT-2's loss warns, and a warning breaks the graph
    if arch == "t5":
        inputs.update(decoder_input_ids=labels, use_cache=False)
    with torch.no_grad():
        torch.testing.assert_close(
            compiled(**inputs).logits, model(**inputs).logits, rtol=1e-5, atol=1e-5
        )


def test_there_is_no_merge_and_no_matrix_could_do_it(one):
    assert not hasattr(adapter, "merge")
    u, v = torch.randn(2, 6).double()
    zero = torch.zeros(6).double()
    bend = one(u + v) - one(u) - one(v) + one(zero)  # 0 for any affine map
    assert bend.abs().max() > 1e-3


def test_it_keeps_the_mode_of_the_model(arch):
    for mode in (True, False):
        model = build(arch).train(mode)
        adapter.attach(model)
        assert all(m.training == mode for m in model.modules())
