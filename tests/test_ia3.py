"""IA3: the lines of the docstring, parity with HF peft, and batches of several tasks."""

import copy

import pytest
import torch
import transformers as tf
from minipeft.additive import ia3
from tiny import ARCHS, CLASS, SIZE, batch, build, fit, logits, perturb
from torch import nn


@pytest.fixture(params=ARCHS)
def arch(request):
    return request.param


def trained(model):
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


# ------------------------------------------------------------------ one layer


def make(kind, side, d_in=6, d_out=5):
    torch.manual_seed(0)
    base = nn.Linear(d_in, d_out) if kind == "Linear" else ia3.Conv1D(d_out, d_in)
    nn.init.normal_(base.bias)
    layer = ia3.Scaled(base.double(), side)
    perturb(layer.requires_grad_(False).requires_grad_(True))
    base.requires_grad_(False)
    return layer


@pytest.mark.parametrize("kind", ["Linear", "Conv1D"])
@pytest.mark.parametrize("side", ["out", "in"])
def test_forward_and_gradient_are_the_written_ones(kind, side):
    m = make(kind, side)
    W = m.base.weight if kind == "Linear" else m.base.weight.T
    x, G = torch.randn(7, 6).double(), torch.randn(7, 5).double()
    y = m(x)
    if side == "out":
        want = m.l[0] * (x @ W.T + m.base.bias)  # the bias is scaled too
        slope = (G * (x @ W.T + m.base.bias)).sum(0)
    else:
        want = (m.l[0] * x) @ W.T + m.base.bias  # and here it is not
        slope = ((G @ W) * x).sum(0)
    torch.testing.assert_close(y, want)
    y.backward(G)
    torch.testing.assert_close(m.l.grad[0], slope)


@pytest.mark.parametrize("kind", ["Linear", "Conv1D"])
@pytest.mark.parametrize("side", ["out", "in"])
def test_merged_weights_are_the_written_ones(kind, side):
    m = make(kind, side)
    net, x = nn.Sequential(m), torch.randn(7, 6).double()
    l, y = m.l[0].detach(), net(x)
    W, b = m.base.weight.clone(), m.base.bias.clone()
    ia3.merge(net)
    scale = torch.diag(l)
    W = W if kind == "Linear" else W.T
    W, b = (scale @ W, l * b) if side == "out" else (W @ scale, b)
    got = net[0].weight if kind == "Linear" else net[0].weight.T
    torch.testing.assert_close(got, W)
    torch.testing.assert_close(net[0].bias, b)
    torch.testing.assert_close(net(x), y, rtol=1e-14, atol=1e-14)


def test_merging_reports_the_rounding():
    net = nn.Sequential(nn.Linear(64, 32).bfloat16())
    ia3.attach(net, "0")
    perturb(net)
    rounding = ia3.merge(net)["0"]
    assert 0 < rounding <= net[0].weight.abs().max().item() * 2**-8


# ------------------------------------------------------------------ where it sits


def test_sites_without_targets_and_their_widths():
    want = dict(
        llama={"self_attn.k_proj": 12, "self_attn.v_proj": 12, "mlp.down_proj": 40},  # 2 of 4 heads
        gpt2={"attn.c_attn": 48, "mlp.c_proj": 96},
        bert={"attention.self.key": 24, "attention.self.value": 24, "0.output.dense": 40},
        t5={
            "0.layer.0.SelfAttention.k": 24,
            "0.layer.0.SelfAttention.v": 24,
            "0.layer.1.DenseReluDense.wo": 40,
        },
    )
    for arch in ARCHS:
        model = build(arch)
        places = ia3.attach(model)
        first = [p for p in places if ".0." in p and ".1.self" not in p][: len(want[arch])]
        for path, (end, width) in zip(first, want[arch].items()):
            assert path.endswith(end) and ia3.sites(model)[path].l.shape == (1, width)
        assert len(places) == {"llama": 6, "gpt2": 4, "bert": 6, "t5": 2 * 3 + 2 * 5}[arch]


def test_gpt2_keeps_its_queries():
    model = build("gpt2")
    ia3.attach(model, "c_attn")
    perturb(model)
    m = model.transformer.h[0].attn.c_attn
    x = torch.randn(2, 3, 24).double()
    q, k, v = m(x).split(24, dim=2)
    q0, k0, v0 = m.base(x).split(24, dim=2)
    assert torch.equal(q, q0)
    torch.testing.assert_close(k, k0 * m.l[0, :24])
    torch.testing.assert_close(v, v0 * m.l[0, 24:])


def test_gpt2_cross_attention_has_no_queries_to_spare():
    config = copy.deepcopy(SIZE["gpt2"])
    config.add_cross_attention = True
    model = tf.GPT2LMHeadModel(config)
    ia3.attach(model, "crossattention.c_attn")
    assert all(m.l.shape == (1, 48) and m.skip == 0 for m in ia3.sites(model).values())


def meta(name, config):
    with torch.device("meta"):
        model = getattr(tf, name)(config)
    ia3.attach(model)
    return sum(p.numel() for p in trained(model).values())


T5 = dict(vocab_size=32128, d_kv=64, num_layers=24, feed_forward_proj="gated-gelu")
COUNTS = [
    (
        "T5ForConditionalGeneration",
        tf.T5Config(d_model=2048, d_ff=5120, num_heads=32, **T5),
        540_672,
    ),  # T0-3B
    (
        "T5ForConditionalGeneration",
        tf.T5Config(d_model=4096, d_ff=10240, num_heads=64, **T5),
        1_081_344,
    ),
    (
        "LlamaModel",
        tf.LlamaConfig(
            hidden_size=3072,
            num_hidden_layers=28,
            num_attention_heads=24,
            head_dim=128,
            num_key_value_heads=8,
            intermediate_size=8192,
        ),
        286_720,
    ),  # Llama-3.2-3B
    ("LlamaModel", tf.LlamaConfig(), 614_400),  # LLaMA-7B
    ("GPT2Model", tf.GPT2Config(), 55_296),
    ("BertModel", tf.BertConfig(), 55_296),
]


@pytest.mark.parametrize("name, config, count", COUNTS)
def test_golden_counts(name, config, count):
    assert meta(name, copy.deepcopy(config)) == count


def test_in_a_gated_ffn_the_input_of_wo_is_the_output_of_wi_1():
    inputs = batch("t5")
    ours, theirs = (build("t5", is_gated_act=True, dense_act_fn="gelu_new") for _ in range(2))
    ia3.attach(ours, ffn=("wo",))
    ia3.attach(theirs, "wi_1")
    perturb(ours)
    ia3.load(theirs, {k.replace(".wo.", ".wi_1."): v for k, v in ia3.state(ours).items()})
    torch.testing.assert_close(logits(ours, inputs), logits(theirs, inputs), rtol=1e-10, atol=1e-10)


def test_before_the_nonlinearity_it_is_another_method():
    inputs = batch("bert")
    ours, theirs = build("bert"), build("bert")
    ia3.attach(ours, ffn=("layer.0.output.dense",))
    ia3.attach(theirs, "layer.0.intermediate.dense")
    perturb(ours)
    (l,) = ia3.state(ours).values()
    ia3.load(theirs, {k: l for k in ia3.state(theirs)})
    assert not torch.allclose(logits(ours, inputs), logits(theirs, inputs), rtol=1e-3)


def scaled_on(arch, name, l):
    model = build(arch)
    ia3.attach(model, name)
    ia3.load(model, {k: l for k in ia3.state(model)})
    return logits(model, batch(arch))


def test_keys_are_queries_without_rope_and_not_with_it():
    l = 1 + 0.3 * torch.randn(1, 24).double()
    torch.testing.assert_close(scaled_on("bert", "key", l), scaled_on("bert", "query", l))
    rope = dict(num_key_value_heads=4)  # as many keys as queries
    both = []
    for name in ("k_proj", "q_proj"):
        model = build("llama", **rope)
        ia3.attach(model, name)
        ia3.load(model, {k: l for k in ia3.state(model)})
        both.append(logits(model, batch("llama")))
    assert not torch.allclose(*both, rtol=1e-3)


def test_values_are_the_inputs_of_the_output_projection():
    l = 1 + 0.3 * torch.randn(1, 24).double()
    model = build("bert")
    ia3.attach(model, ffn=("attention.output.dense",))
    ia3.load(model, {k: l for k in ia3.state(model)})
    torch.testing.assert_close(scaled_on("bert", "value", l), logits(model, batch("bert")))


# ------------------------------------------------------------------ HF peft


TARGETS = dict(  # the layers, and those among them that are scaled on their inputs
    llama=(["k_proj", "v_proj", "down_proj"], ["down_proj"]),
    gpt2=(["c_attn", "mlp.c_proj"], ["mlp.c_proj"]),
    bert=(
        r".*[.](key|value)|.*layer[.][0-9]+[.]output[.]dense",
        r".*layer[.][0-9]+[.]output[.]dense",
    ),
    t5=(["k", "v", "wo"], ["wo"]),
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bit_for_bit_as_hf_peft(arch, dtype):
    peft = pytest.importorskip("peft")
    ours, inputs = build(arch, dtype), batch(arch)
    layers, ff = TARGETS[arch]
    theirs = peft.get_peft_model(
        build(arch, dtype), peft.IA3Config(target_modules=layers, feedforward_modules=ff)
    ).eval()
    ia3.attach(ours)
    perturb(ours)
    t = {
        n.removeprefix("base_model.model.").removesuffix(".ia3_l.default"): p
        for n, p in trained(theirs).items()
    }
    assert t.keys() == ia3.sites(ours).keys()
    for path, m in ia3.sites(ours).items():
        full = torch.cat([torch.ones(m.skip), m.l[0].detach()])  # ones leave GPT-2's queries alone
        t[path].data = full.view(t[path].shape)
    a, b = ours(**inputs), theirs(**inputs)
    assert torch.equal(a.logits, b.logits) and torch.equal(a.loss, b.loss)
    a.loss.backward()
    b.loss.backward()
    for path, m in ia3.sites(ours).items():
        assert torch.equal(m.l.grad[0], t[path].grad.flatten()[m.skip :])
    base = build(arch, dtype)
    assert not torch.allclose(logits(base, inputs), logits(ours, inputs), rtol=1e-2)


def test_merged_as_hf_peft(arch):
    peft = pytest.importorskip("peft")
    ours, inputs = build(arch), batch(arch)
    layers, ff = TARGETS[arch]
    theirs = peft.get_peft_model(
        build(arch), peft.IA3Config(target_modules=layers, feedforward_modules=ff)
    ).eval()
    ia3.attach(ours)
    perturb(ours)
    t = dict(theirs.named_parameters())
    for path, m in ia3.sites(ours).items():
        p = t[f"base_model.model.{path}.ia3_l.default"]
        p.data = torch.cat([torch.ones(m.skip), m.l[0].detach()]).view(p.shape).double()
    ia3.merge(ours)
    torch.testing.assert_close(
        logits(ours, inputs), logits(theirs.merge_and_unload(), inputs), rtol=1e-12, atol=1e-12
    )


# ------------------------------------------------------------------ several tasks


def two_tasks(arch, dtype=torch.float64):
    """A model for each task, and one that holds both."""
    alone, states = [], []
    for seed in (2, 3):
        model = build(arch, dtype)
        ia3.attach(model)
        perturb(model, seed=seed)
        alone.append(model)
        states.append(ia3.state(model))
    both = build(arch, dtype)
    ia3.attach(both, tasks=2)
    ia3.load(both, {k: torch.cat([s[k] for s in states]) for k in states[0]})
    return alone, both


def test_a_mixed_batch_is_every_row_alone(arch):
    alone, both = two_tasks(arch)
    inputs, ids = batch(arch), [1, 0, 1]
    ia3.choose(both, ids)
    with torch.no_grad():
        got = both(**inputs).logits
        for row, task in enumerate(ids):
            one = {k: v[row : row + 1] for k, v in inputs.items()}
            keep = ... if arch in ("bert", "t5") else one["attention_mask"][0].bool()
            want = alone[task](**one).logits[0]
            torch.testing.assert_close(got[row][keep], want[keep], rtol=1e-9, atol=1e-9)
    assert not torch.allclose(alone[0](**inputs).logits, alone[1](**inputs).logits, rtol=1e-2)


def test_a_mixed_batch_trains_every_task_as_alone(arch):
    alone, both = two_tasks(arch)
    inputs, ids = batch(arch), torch.tensor([1, 0, 1])
    ia3.choose(both, ids)
    weights = torch.randn(3, dtype=torch.float64)

    def loss(model, rows):
        out = model(**{k: v[rows] for k, v in inputs.items()}).logits
        keep = (
            inputs["attention_mask"][rows, : out.shape[1]]
            if arch in ("llama", "gpt2")
            else torch.ones(())
        )
        per_row = (
            (out.square() * keep.view(*keep.shape, *[1] * (out.dim() - keep.dim())))
            .flatten(1)
            .sum(1)
        )
        return (per_row * weights[rows]).sum()

    loss(both, torch.arange(3)).backward()
    for task in (0, 1):
        loss(alone[task], (ids == task).nonzero()[:, 0]).backward()
        for path, m in ia3.sites(alone[task]).items():
            torch.testing.assert_close(
                ia3.sites(both)[path].l.grad[task], m.l.grad[0], rtol=1e-8, atol=1e-10
            )


def test_a_task_that_is_not_in_the_batch_gets_no_gradient(arch):
    _, both = two_tasks(arch)
    ia3.choose(both, [0, 0, 0])
    both(**batch(arch)).loss.backward()
    for m in ia3.sites(both).values():
        assert m.l.grad[0].any() and not m.l.grad[1].any()


@pytest.mark.parametrize("arch", ["llama", "gpt2", "t5"])
def test_mixed_generation_is_every_row_alone(arch):
    alone, both = two_tasks(arch, torch.float32)
    ids = torch.tensor([[0, 0, 5, 6, 7], [8, 9, 10, 11, 12]])  # left padding
    how = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)
    ia3.choose(both, [1, 0])
    out = both.generate(ids, attention_mask=(ids != 0).long(), **how)
    new = slice(0, None) if arch == "t5" else slice(-6, None)
    for row, task in enumerate([1, 0]):
        cut = ids[row : row + 1] if arch == "t5" else ids[row : row + 1, 2 * (1 - row) :]
        want = alone[task].generate(cut, attention_mask=(cut != 0).long(), **how)
        assert torch.equal(out[row, new], want[0, new])
        slow = alone[task].generate(cut, attention_mask=(cut != 0).long(), use_cache=False, **how)
        assert torch.equal(slow, want)


def test_merging_one_of_two_tasks(arch):
    alone, both = two_tasks(arch)
    want = logits(alone[1], batch(arch))
    for task in (None, 2, -1):
        with pytest.raises(ValueError, match="name one of 2 tasks"):
            ia3.merge(both, task)
    assert len(ia3.sites(both)) == len(ia3.sites(alone[0]))
    ia3.merge(both, task=1)
    torch.testing.assert_close(logits(both, batch(arch)), want, rtol=1e-9, atol=1e-9)


def test_a_batch_without_its_task_ids_is_refused():
    _, both = two_tasks("bert")
    with pytest.raises(ValueError, match="a batch of 3 rows needs as many task ids"):
        both(**batch("bert"))
    ia3.choose(both, [0, 1])
    with pytest.raises(ValueError, match="a batch of 3 rows needs as many task ids"):
        both(**batch("bert"))
    for bad in ([0, 2, 1], [-1, 0, 0], [[0, 1, 0]]):
        with pytest.raises(ValueError, match="expected a list of numbers below 2"):
            ia3.choose(both, bad)


# ------------------------------------------------------------------ refusals


def test_bad_requests_change_nothing():
    model = build("bert")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for kw, word in [
        (dict(ffn=("nope",)), "nope"),
        (dict(tasks=0), "tasks = 0"),
        (dict(ffn=("key",)), "named twice"),
    ]:
        with pytest.raises(ValueError, match=word):
            ia3.attach(model, "key", **kw)
    assert not ia3.sites(model) and all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())


def test_fused_layers_with_queries_among_the_keys_are_refused():
    model = tf.GPTNeoXForCausalLM(
        tf.GPTNeoXConfig(
            vocab_size=64,
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=1,
            num_attention_heads=4,
        )
    )
    with pytest.raises(ValueError, match="mixes queries into the keys"):
        ia3.attach(model, "query_key_value")
    with pytest.raises(ValueError, match="no row of LAYOUTS"):
        ia3.attach(model)


def test_a_tied_weight_is_not_merged():
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[1].weight = net[0].weight
    ia3.attach(net, "0")
    with pytest.raises(ValueError, match="shared"):
        ia3.merge(net)


# ------------------------------------------------------------------ in the user's loop


def test_half_precision_model_trains_float32_factors(arch):
    model, inputs = build(arch, torch.bfloat16), batch(arch)
    before = logits(model, inputs)
    ia3.attach(model)
    assert torch.equal(logits(model, inputs), before)
    assert all(v.dtype == torch.float32 for v in ia3.state(model).values())
    fit(ia3, model, inputs, lr=1e-3)  # steps that bfloat16 could not hold next to 1
    moved = [(v - 1).abs().max() for v in ia3.state(model).values()]
    assert all(0 < m < 2**-7 for m in moved) and not torch.equal(logits(model, inputs), before)
    assert logits(model, inputs).dtype == torch.bfloat16


def test_autocast(arch):
    model, inputs = build(arch, torch.float32), batch(arch)
    ia3.attach(model)
    perturb(model)
    exact = logits(model, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        model(**inputs).loss.backward()
        rough = logits(model, inputs)
    assert all(p.grad.isfinite().all() for p in trained(model).values())
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
        ia3.attach(model, tasks=2)
        perturb(model)
        ia3.choose(model, [0, 1, 1])
        if checkpointing:
            model.gradient_checkpointing_enable(dict(use_reentrant=reentrant))
            model.enable_input_require_grads()
        model(**batch(arch)).loss.backward()
        grads.append({n: p.grad for n, p in trained(model).items()})
    for n, g in grads[0].items():
        torch.testing.assert_close(g, grads[1][n], rtol=1e-9, atol=1e-12)


def test_compiles_in_one_graph(arch, tasks=2):
    small = {"num_layers": 1, "num_decoder_layers": 1} if arch == "t5" else {}  # the slowest to trace
    model, inputs = build(arch, torch.float32, **small), batch(arch)
    model.config.use_cache = False
    ia3.attach(model, tasks=tasks)
    perturb(model)
    ia3.choose(model, [0, tasks - 1, 0])
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    labels = inputs.pop("labels")  # GPT-2's loss warns, and a warning breaks the graph
    if arch == "t5":
        inputs.update(decoder_input_ids=labels, use_cache=False)
    with torch.no_grad():
        torch.testing.assert_close(
            compiled(**inputs).logits, model(**inputs).logits, rtol=1e-5, atol=1e-5
        )


def test_it_keeps_the_mode_of_the_model(arch):
    for mode in (True, False):
        model = build(arch).train(mode)
        ia3.attach(model)
        assert all(m.training == mode for m in model.modules())
