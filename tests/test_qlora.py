"""QLoRA against bitsandbytes, the published levels, and dense LoRA on the rounded weight."""

import copy

import pytest
import torch
from tiny import batch, build, fit, logits, perturb
from torch import nn
from torch.nn import functional as F

from minipeft.reparam import lora, qlora
from minipeft.reparam.qlora import NF4Linear, QLoRALinear, dequantise, quantise, squeeze, unsqueeze

TARGETS = ("q_proj", "v_proj", "down_proj")
LEVELS = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0])
EDGES = torch.tensor([
    -0.8480964, -0.6106329, -0.4599953, -0.3396794, -0.2346074, -0.1379117, -0.0455250, 0.0397901,
    0.1202552, 0.2035213, 0.2920138, 0.3893125, 0.5016634, 0.6427869, 0.8614784])
SHAPES = ((64,), (128, 64), (96, 128), (30, 50), (7, 9), (3, 3), (1, 1), (33, 65), (512, 640))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def weight(shape, dtype=torch.float32, seed=0):
    """Blocks of very different sizes, a block of zeros, a few exact ties."""
    torch.manual_seed(seed)
    W = torch.randn(shape) * torch.logspace(-3, 1, shape[0]).view(-1, *[1] * (len(shape) - 1))
    if W.numel() >= 192:
        W.view(-1)[64:128] = 0
        W.view(-1)[128:144] = LEVELS
        W.view(-1)[144:159] = (LEVELS[1:] + LEVELS[:-1]) / 2
    return W.to(dtype)


def back(W):
    return dequantise(*quantise(W), W.shape, W.dtype)


def codes(packed):
    return torch.stack((packed >> 4, packed & 15), 1).flatten()


def layer(d_in=128, d_out=96, double=True, dtype=torch.float32, bias=True, **kw):
    torch.manual_seed(0)
    base = nn.Linear(d_in, d_out, dtype=dtype, bias=bias)
    m = QLoRALinear(base, r=4, alpha=6.0, double=double, **kw)
    m.base.requires_grad_(False)
    perturb(m)
    return m


# NF4


def test_the_levels_are_the_published_ones_bit_for_bit():
    N = qlora.nf4()
    assert torch.equal(N, LEVELS) and N[7] == 0 and len(N.unique()) == 16
    torch.testing.assert_close((N[1:] + N[:-1]) / 2, EDGES, rtol=0, atol=6e-8)
    assert (N + N.flip(0)).abs().max() > 0.079  # not symmetric


def test_the_quantiles_are_a_normals():
    normal = torch.distributions.Normal(0.0, 1.0)
    p = normal.cdf(LEVELS.double() * 1.848131)
    torch.testing.assert_close(p[8:], torch.linspace(0.5, 0.9677083, 9).double()[1:], rtol=0, atol=1e-6)
    torch.testing.assert_close(1 - p[:7].flip(0), torch.linspace(0.5, 0.9677083, 8).double()[1:], rtol=0, atol=1e-6)


def test_two_codes_in_a_byte_the_first_one_high():
    packed, absmax = quantise(torch.tensor([1.0, -1.0, 0.0, 0.5]))
    assert packed.tolist() == [0xF0, 0x7C] and absmax.tolist() == [1.0]
    packed, _ = quantise(torch.tensor([1.0, -1.0, 0.5]))
    assert packed.tolist() == [0xF0, 0xC7]  # what is missing counts as zero


def test_a_value_between_two_levels_takes_the_lower_one():
    block = torch.cat([(LEVELS[1:] + LEVELS[:-1]) / 2, torch.ones(49)])
    assert codes(quantise(block)[0])[:15].tolist() == list(range(15))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_codes_maxima_and_values_are_bitsandbytes(shape, dtype):
    bnb = pytest.importorskip("bitsandbytes").functional
    W = weight(shape, dtype)
    packed, absmax = quantise(W)
    theirs, state = bnb.quantize_4bit(W, blocksize=64, quant_type="nf4")
    assert torch.equal(packed, theirs.flatten()) and torch.equal(absmax, state.absmax)
    mine, values = back(W), bnb.dequantize_4bit(theirs, state).view(shape)
    assert mine.dtype == dtype and torch.equal(mine, values)


def test_an_incomplete_block_is_divided_and_a_full_one_multiplied():
    """On an edge the two round apart: bitsandbytes does one in the last block and one elsewhere."""
    bnb = pytest.importorskip("bitsandbytes").functional
    torch.manual_seed(0)
    edges, differ = (LEVELS[1:] + LEVELS[:-1]) / 2, 0
    for top in torch.rand(200) + 0.5:
        W = torch.cat([top[None], top * edges])  # 16 weights, one incomplete block
        differ += (torch.bucketize(W / top, edges) != torch.bucketize(W * (1 / top), edges)).sum()
        for V in (W, W.repeat(4)):
            assert torch.equal(quantise(V)[0], bnb.quantize_4bit(V, blocksize=64, quant_type="nf4")[0].flatten())
    assert differ > 20


@pytest.mark.parametrize("shape", (*SHAPES, (640, 1000)))
def test_the_second_quantisation_is_bitsandbytes(shape):
    bnb = pytest.importorskip("bitsandbytes").functional
    W = weight(shape)
    packed, absmax = quantise(W)
    small, top, mean = squeeze(absmax)
    theirs, state = bnb.quantize_4bit(W, blocksize=64, quant_type="nf4", compress_statistics=True)
    assert torch.equal(packed, theirs.flatten())
    assert torch.equal(small, state.absmax) and torch.equal(top, state.state2.absmax)
    assert torch.equal(mean, state.offset)
    mine = dequantise(packed, unsqueeze(small, top, mean), W.shape, W.dtype)
    assert torch.equal(mine, bnb.dequantize_4bit(theirs, state).view(shape))


def test_the_dynamic_map_is_bitsandbytes_and_is_not_the_nearest_level_everywhere():
    bnb = pytest.importorskip("bitsandbytes").functional
    D = qlora.dynamic()
    assert torch.equal(D, bnb.create_dynamic_map()) and len(D.unique()) == 256
    assert D[0] > -1 and D[-1] == 1 and 0 in D
    torch.manual_seed(0)
    absmax = torch.rand(8192)
    small, top, mean = squeeze(absmax)
    scaled = (absmax - mean).view(-1, 256) / top[:, None]
    nearest = torch.bucketize(scaled.flatten(), (D[1:] + D[:-1]) / 2)
    off = (nearest - small.int()).abs()
    assert 0 < (off > 0).sum() < 30 and off.max() < 10  # the table is coarser than the levels at zero
    assert ((unsqueeze(small, top, mean) - absmax).abs().view(-1, 256) < 0.01 * top[:, None]).all()


def test_the_error_is_at_most_half_the_widest_gap():
    W = torch.randn(512, 640).double().float()
    _, absmax = quantise(W)
    error = ((back(W) - W).view(-1, 64).abs() / absmax[:, None])
    assert 0.145 < error.max() <= 0.15191 and abs(LEVELS.diff().max() / 2 - 0.1519) < 1e-4
    assert error.view(-1)[(W > 0).view(-1)].max() <= 0.13853


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantising_again_changes_nothing(dtype):
    W = back(weight((96, 128), dtype))
    assert torch.equal(back(W), W)


def test_what_is_exact_and_what_is_not():
    W = weight((96, 128))
    for scale in (2.0, 0.5):
        assert torch.equal(back(scale * W), scale * back(W))
    assert (back(-W) + back(W)).abs().max() > 0.1  # the levels are not symmetric
    assert torch.equal(back(W)[W == 0], W[W == 0])
    blocks, again = W.view(-1, 64), back(W).view(-1, 64)
    rows, at = torch.arange(len(blocks)), blocks.abs().argmax(1)
    assert torch.equal(again[rows, at], blocks[rows, at])
    assert all(len(b.unique()) <= 16 for b in again)
    order = torch.randperm(len(blocks))
    assert torch.equal(back(blocks[order]), again[order])


def test_blocks_run_over_the_flat_weight_and_not_along_rows():
    W = weight((30, 50))
    rows = torch.cat([back(w[None]) for w in W])
    assert not torch.equal(back(W), rows) and len(quantise(W)[1]) == 24
    assert torch.equal(back(W.T.contiguous().T), back(W))


@pytest.mark.parametrize("double, want", ((True, 4.126953125), (False, 4.5)))
def test_bits_per_weight_measured(double, want):
    m = NF4Linear(nn.Linear(4096, 1024, bias=False), double)
    m.shell[0].weight = None
    tensors = [*m.parameters(), *m.buffers()]
    bits = sum(t.nbytes for t in tensors) * 8 / (4096 * 1024)
    assert abs(bits - want) < 1e-4
    assert not any(t.numel() > 4096 * 1024 / 2 for t in tensors)


# The layer


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64))
@pytest.mark.parametrize("bias", (True, False))
def test_it_is_dense_lora_on_the_rounded_weight(dtype, bias):
    m = layer(dtype=dtype, bias=bias)
    dense = nn.Linear(128, 96, dtype=dtype, bias=bias).requires_grad_(False)
    dense.weight.copy_(m.base.W())
    if bias:
        dense.bias.copy_(m.base.bias)
    plain = lora.LoRALinear(dense, r=4, alpha=6.0)
    plain.A, plain.B = (nn.Parameter(p.detach().clone()) for p in (m.A, m.B))
    x = [torch.randn(2, 5, 128, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
         for _ in range(2)]
    y = [m(x[0]), plain(x[1])]
    for out in y:
        out.float().square().sum().backward()
    assert torch.equal(*y) and torch.equal(x[0].grad, x[1].grad)
    assert torch.equal(m.A.grad, plain.A.grad) and torch.equal(m.B.grad, plain.B.grad)


@pytest.mark.parametrize("double", (True, False))
def test_the_layer_is_bitsandbytes_layer(double):
    bnb = pytest.importorskip("bitsandbytes")
    m = layer(double=double).base
    torch.manual_seed(0)
    base = nn.Linear(128, 96)
    theirs = bnb.nn.Linear4bit(128, 96, quant_type="nf4", compress_statistics=double)
    theirs.load_state_dict(base.state_dict())
    theirs.to("cpu")  # this quantises
    x = [torch.randn(5, 128, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2)]
    y = [m(x[0]), theirs(x[1])]
    for out in y:
        out.square().sum().backward()
    assert torch.equal(*y) and torch.equal(x[0].grad, x[1].grad)


def test_backward_is_the_derivative_of_forward():
    m = layer(d_in=16, d_out=9, dtype=torch.float64)
    m.base.bias.requires_grad_(True)  # another method may train it
    x = torch.randn(3, 16).double().requires_grad_()
    torch.autograd.gradcheck(lambda x, b, A, B: m(x), (x, m.base.bias, m.A, m.B))
    with pytest.raises(RuntimeError):  # once: no silent second derivative
        g, = torch.autograd.grad(m(x).pow(3).sum(), x, create_graph=True)
        g.sum().backward()


def kept_for_backward(module, x):
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        module(x)
    return sizes


def test_the_dequantised_weight_is_not_kept_for_backward():
    m, x = layer(), torch.randn(2, 128).requires_grad_()
    assert kept_for_backward(m.base, x) == []  # x itself is not needed: W~ never trains
    assert max(kept_for_backward(m, x)) < 96 * 128
    dense = nn.Linear(128, 96).requires_grad_(False)
    assert max(kept_for_backward(dense, x)) == 96 * 128


@pytest.mark.parametrize("arch", ("llama", "gpt2"))
def test_step_zero_is_the_rounded_model_and_not_the_original(arch):
    base, inputs = build(arch, dtype=torch.float32), batch(arch)
    names = TARGETS if arch == "llama" else ("c_attn", "mlp.c_proj")
    model, rounded = copy.deepcopy(base), copy.deepcopy(base)
    paths = qlora.attach(model, *names, r=2)
    with torch.no_grad():
        for p in paths:
            W = rounded.get_submodule(p).weight
            packed, absmax = quantise(W)
            W.copy_(dequantise(packed, unsqueeze(*squeeze(absmax)), W.shape, W.dtype))
    assert torch.equal(logits(model, inputs), logits(rounded, inputs))
    assert not torch.allclose(logits(model, inputs), logits(base, inputs), atol=1e-3)
    qlora.detach(model)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), rounded.parameters(), strict=True))


def test_training_leaves_the_codes_and_the_scales_alone():
    model, inputs = build("llama", dtype=torch.bfloat16), batch("llama")
    qlora.attach(model, *TARGETS, r=2)
    before = {n: b.clone() for n, b in model.named_buffers()}
    start = qlora.state(model)
    fit(qlora, model, inputs, lr=0.1)
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())
    assert sum(n.endswith(".packed") for n in before) == 6
    end = qlora.state(model)
    assert all(v.dtype == torch.float32 for k, v in end.items() if not k.endswith(".s"))
    assert any(not torch.equal(start[k], end[k]) for k in end)


def test_a_change_of_dtype_does_not_touch_codes_or_scales():
    m = layer()
    W = m.base.W()
    m.to(torch.bfloat16)
    assert m.base.W().dtype == torch.bfloat16 and torch.equal(m.base.W(), W.to(torch.bfloat16))
    assert torch.equal(m.float().base.W(), W)


def test_autocast_computes_in_its_dtype():
    m, x = layer(), torch.randn(3, 128, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = m(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32 and m.B.grad.any()
    torch.testing.assert_close(y.float(), m(x), rtol=0.05, atol=0.05)


def test_checkpointing_gives_the_same_gradients():
    grads = []
    for on in (False, True):
        model, inputs = build("llama"), batch("llama")
        qlora.attach(model, *TARGETS, r=3)
        perturb(model)
        if on:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()(**inputs, use_cache=False).loss.backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    torch.testing.assert_close(*grads)


def test_a_four_bit_checkpoint_round_trip():
    model, inputs = build("llama"), batch("llama")
    qlora.attach(model, *TARGETS, r=2)
    perturb(model)
    other = build("llama", seed=5)
    qlora.attach(other, *TARGETS, r=2, alpha=32.0)
    other.load_state_dict(model.state_dict())
    qlora.load(other, qlora.state(model))
    assert torch.equal(logits(other, inputs), logits(model, inputs))


# The two merges


@pytest.mark.parametrize("dtype, error", ((torch.float64, 1e-12), (torch.float32, 1e-4), (torch.bfloat16, 0.4)))
def test_merging_into_the_dequantised_weight(dtype, error):
    model = nn.Sequential(nn.Linear(128, 96, dtype=dtype))
    qlora.attach(model, "0", r=4, alpha=6.0)
    perturb(model, 0.02)
    exact = model[0].base.W().double() + 1.5 * (model[0].B.double() @ model[0].A.double())
    lost, kept = qlora.merge(model)["0"]
    assert type(model[0]) is nn.Linear and model[0].weight.dtype == dtype
    assert torch.equal(model[0].weight, exact.to(dtype))
    assert lost < error and abs(kept - 1) < error


def test_rounding_the_merged_weight_again_loses_most_of_a_small_update():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 96))
    qlora.attach(model, "0", r=4, alpha=4.0, double=False)
    with torch.no_grad():
        model[0].B.copy_(torch.randn(96, 4))
        model[0].B.mul_(0.022 / (model[0].B @ model[0].A).norm())
    W, dW = model[0].base.W(), (model[0].B @ model[0].A).detach()
    two = copy.deepcopy(model)
    error, kept = qlora.merge(model, requantise=True)["0"]
    assert isinstance(model[0], NF4Linear) and not qlora.sites(model)
    assert torch.equal(model[0].W(), back(W + dW))  # an independent way to the same weight
    assert error > 0.9 and kept < 0.2
    error, kept = qlora.merge(two)["0"]
    assert error < 1e-4 and abs(kept - 1) < 1e-4


def test_requantising_keeps_a_large_update():
    model = nn.Sequential(nn.Linear(128, 96))
    qlora.attach(model, "0", r=4)
    perturb(model, 1.0)
    error, kept = qlora.merge(model, requantise=True)["0"]
    assert error < 0.2 and abs(kept - 1) < 0.1
    assert model(torch.randn(3, 128)).shape == (3, 96)


# What is refused


def test_a_shared_or_broken_weight_is_refused_before_anything_changes():
    model = build("gpt2")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match="lm_head.*untie"):
        qlora.attach(model, "c_attn", "lm_head", r=2)
    twice = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    twice.append(twice[0])
    with pytest.raises(ValueError, match="untie"):
        qlora.attach(twice, "0", r=1)
    with pytest.raises(ValueError, match="r = 99"):
        qlora.attach(model, "c_attn", r=99)
    assert not qlora.sites(model) and all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    for bad in (float("nan"), float("inf")):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        nn.init.constant_(model[1].weight, bad)
        with pytest.raises(ValueError, match="finite"):
            qlora.attach(model, "0", "1", r=1)
        assert type(model[0]) is nn.Linear and model[0].weight is not None


def test_nobody_reads_a_weight_that_is_not_there():
    m = layer()
    assert m.weight.numel() == m.base.weight.numel() == 0 and m.weight.dtype == torch.float32
    with pytest.raises(RuntimeError, match="shape|size"):
        F.linear(torch.randn(2, 128), m.base.weight)
