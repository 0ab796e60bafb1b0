"""Parallel adapters: the lines of the docstring, one test each."""

import copy

import pytest
import torch
import transformers as tf
from minipeft.additive import parallel_adapter
from tiny import ARCHS, batch, build, fit, logits, perturb
from torch import nn
from torch.nn import functional as F


@pytest.fixture(params=ARCHS)
def arch(request):
    return request.param


@pytest.fixture
def one():
    """One adapter beside a small FFN, away from its start."""
    torch.manual_seed(0)
    ffn = nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 6)).double()
    m = parallel_adapter.ParallelAdapter(ffn, d=6, m=4, s=2.5, dtype=torch.float64)
    perturb(m, 0.5)
    return m


def beside(m, x):
    return m.s * (F.relu(x @ m.W_down.T + m.b_down) @ m.W_up.T + m.b_up)


def test_forward_is_the_written_one(one):
    x = torch.randn(3, 5, 6).double()
    torch.testing.assert_close(one(x), one.base(x) + beside(one, x))


def test_start():
    torch.manual_seed(0)
    m = parallel_adapter.ParallelAdapter(nn.Identity(), 256, 64)
    assert m.W_down.abs().max() <= 1 / 16 and m.W_down.std().item() * 16 * 3**0.5 == pytest.approx(
        1, rel=0.02
    )
    assert not m.W_up.any() and not m.b_up.any() and not m.b_down.any()
    m(torch.randn(9, 256)).square().sum().backward()
    assert not m.W_down.grad.any() and m.W_up.grad.any() and m.b_up.grad.any()


def test_it_stands_beside_the_ffn(arch):
    model, inputs = build(arch), batch(arch)
    other = copy.deepcopy(model)
    places = parallel_adapter.attach(model, bottleneck=5, s=3.0)
    perturb(model)
    assert len(places) == (4 if arch == "t5" else 2)
    for path, m in parallel_adapter.sites(model).items():
        at = other.get_submodule(path)
        if (
            arch == "bert"
        ):  # independent: what the intermediate layer reads is kept, and added before the norm
            seen = {}
            layer = other.get_submodule(path.rpartition(".")[0])
            layer.intermediate.register_forward_pre_hook(
                lambda _, args, seen=seen: seen.update(x=args[0])
            )
            at.dropout.register_forward_hook(
                lambda _, args, out, seen=seen, m=m: out + beside(m, seen["x"])
            )
        else:
            at.register_forward_hook(lambda _, args, out, m=m: out + beside(m, args[0]))
    y = logits(model, inputs)
    torch.testing.assert_close(logits(other, inputs), y, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(y, logits(build(arch), inputs), rtol=1e-2)


def test_s_is_w_up_in_the_forward_pass_and_not_after_an_adam_step():
    outs = []
    for s in (4.0, 1.0):
        model = build("bert")
        torch.manual_seed(0)
        parallel_adapter.attach(model, bottleneck=5, s=s)
        perturb(model)
        with torch.no_grad():
            for m in parallel_adapter.sites(model).values():
                m.W_up.mul_(4.0 / s)
                m.b_up.mul_(4.0 / s)
        start = logits(model, batch("bert"))
        fit(parallel_adapter, model, batch("bert"), steps=1)
        outs.append((start, logits(model, batch("bert"))))
    torch.testing.assert_close(outs[0][0], outs[1][0])
    assert not torch.allclose(outs[0][1], outs[1][1], rtol=1e-3)


def test_counts():
    with torch.device("meta"):
        model = tf.BertModel(tf.BertConfig())
    parallel_adapter.attach(model, bottleneck=16)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert count == 12 * (2 * 16 * 768 + 768 + 16)


def test_bad_requests_change_nothing():
    model = build("bert")
    for targets, kw, word in [
        (("nope",), {}, "nope names no FFN"),
        (("LayerNorm",), {}, "LayerNorm names no FFN"),
        ((), dict(bottleneck=0), "bottleneck = 0"),
        ((), dict(s=0.0), "s = 0.0"),
    ]:
        with pytest.raises(ValueError, match=word):
            parallel_adapter.attach(model, *targets, **kw)
    assert not parallel_adapter.sites(model) and all(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="LAYOUTS names no FFN"):
        parallel_adapter.attach(nn.Sequential(nn.Linear(3, 3)))


def test_half_precision_and_autocast(arch):
    model, inputs = build(arch, torch.bfloat16), batch(arch)
    before = logits(model, inputs)
    parallel_adapter.attach(model, bottleneck=5)
    assert torch.equal(logits(model, inputs), before)
    fit(parallel_adapter, model, inputs)
    assert logits(model, inputs).dtype == torch.bfloat16
    single = build(arch, torch.float32)
    parallel_adapter.attach(single, bottleneck=5)
    with torch.autocast("cpu", torch.bfloat16):
        single(**inputs).loss.backward()
    assert all(p.grad.isfinite().all() for p in single.parameters() if p.requires_grad)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "t5"])
def test_generate_with_a_cache(arch):
    model = build(arch, torch.float32)
    parallel_adapter.attach(model, bottleneck=5)
    perturb(model)
    ids = torch.tensor([[0, 0, 5, 6, 7], [8, 9, 10, 11, 12]])
    how = dict(
        attention_mask=(ids != 0).long(),
        max_new_tokens=6,
        min_new_tokens=6,
        do_sample=False,
        pad_token_id=0,
    )
    assert torch.equal(model.generate(ids, **how), model.generate(ids, use_cache=False, **how))


def test_compiles_in_one_graph(arch):
    small = {"num_layers": 1, "num_decoder_layers": 1} if arch == "t5" else {}  # the slowest to trace
    model, inputs = build(arch, torch.float32, **small), batch(arch)
    model.config.use_cache = False
    parallel_adapter.attach(model, bottleneck=5)
    perturb(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    labels = inputs.pop("labels")
    if arch == "t5":
        inputs.update(decoder_input_ids=labels, use_cache=False)
    with torch.no_grad():
        torch.testing.assert_close(
            compiled(**inputs).logits, model(**inputs).logits, rtol=1e-5, atol=1e-5
        )


def test_it_keeps_the_mode_of_the_model(arch):
    for mode in (True, False):
        model = build(arch).train(mode)
        parallel_adapter.attach(model)
        assert all(m.training == mode for m in model.modules())
