"""DoRA's own mathematics: the lines of the docstring, one test each."""

import copy
import warnings

import pytest
import torch
from tiny import ARCHS, LINEAR, batch, build, logits, perturb
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from minipeft.reparam import dora, lora

S = 3.0  # alpha / r below


@pytest.fixture(params=[True, False], ids=["detached", "full"])
def layer(request):
    torch.manual_seed(0)
    m = dora.DoRALinear(nn.Linear(6, 5).double(), r=2, alpha=2 * S, detached=request.param)
    nn.init.normal_(m.B)
    nn.init.normal_(m.m)
    return m


def direction(m):
    V = m.base.weight + m.s * m.B @ m.A
    return V, V.norm(dim=1, keepdim=True)


def test_forward_is_equation_5(layer):
    x = torch.randn(2, 4, 6).double()
    V, c = direction(layer)
    want = F.linear(x, layer.m[:, None] / c * V, layer.base.bias)
    torch.testing.assert_close(layer(x), want, rtol=1e-12, atol=1e-12)


def test_m_is_the_length_of_the_new_rows(layer):
    model = nn.Sequential(layer)
    length = layer.m.abs().detach().clone()
    dora.merge(model)
    torch.testing.assert_close(model[0].weight.norm(dim=1), length, rtol=1e-12, atol=1e-12)


def test_the_norm_without_the_product(layer):
    V, c = direction(layer)
    torch.testing.assert_close(layer.m / layer.ratio(), c[:, 0], rtol=1e-13, atol=1e-13)


def test_one_magnitude_per_row_even_when_square():
    torch.manual_seed(0)
    m = dora.DoRALinear(nn.Linear(5, 5), r=2, alpha=4.0)
    assert torch.equal(m.m, torch.linalg.vector_norm(m.base.weight, dim=1))
    assert dora.DoRALinear(nn.Linear(7, 3), r=2, alpha=4.0).m.shape == (3,)


def test_gradients_are_the_written_ones(layer):
    x, G = torch.randn(4, 6).double(), torch.randn(4, 5).double()
    layer(x).backward(G)
    with torch.no_grad():
        V, c = direction(layer)
        k, u, D = layer.m[:, None] / c, V / c, G.T @ x
        along = (D * u).sum(1, keepdim=True)
        dV = k * D if layer.detached else k * (D - along * u)
        if not layer.detached:
            assert (dV * V).sum(1).abs().max() < 1e-12  # the full gradient only turns a row
        torch.testing.assert_close(layer.m.grad, along[:, 0])
        torch.testing.assert_close(layer.B.grad, S * dV @ layer.A.T)
        torch.testing.assert_close(layer.A.grad, S * layer.B.T @ dV)


def test_finite_differences_tell_detached_from_full(layer):
    x = torch.randn(4, 6).double()
    layer(x).square().sum().backward()
    for name, agrees in (("m", True), ("B", not layer.detached), ("A", not layer.detached)):
        p = getattr(layer, name)
        at, eps = (1,) * p.dim(), 1e-6
        with torch.no_grad():
            p[at] += eps
            up = layer(x).square().sum()
            p[at] -= 2 * eps
            slope = (up - layer(x).square().sum()) / (2 * eps)
            p[at] += eps
        assert (abs(slope - p.grad[at]) < 1e-5 * abs(slope)) == agrees, name


def test_the_first_gradient_of_b_is_loras_when_detached():
    torch.manual_seed(0)
    base, x = nn.Linear(6, 5).double(), torch.randn(4, 6).double()
    grads = []
    for make in (dora.DoRALinear, lora.LoRALinear):
        torch.manual_seed(1)
        m = make(base, r=2, alpha=2 * S)
        m(x).square().sum().backward()
        assert m.A.grad.abs().max() == 0
        grads.append(m.B.grad)
    assert torch.equal(*grads)


def test_only_m_sets_the_length(layer):
    x = torch.randn(4, 6).double()
    y = layer(x)
    with torch.no_grad():  # V -> 3 V
        layer.base.weight.mul_(3)
        layer.A.mul_(3)
    torch.testing.assert_close(layer(x), y)


def test_with_m_at_the_norm_it_is_lora(layer):
    x = torch.randn(4, 6).double()
    V, c = direction(layer)
    with torch.no_grad():
        layer.m.copy_(c[:, 0])
    torch.testing.assert_close(layer(x), F.linear(x, V, layer.base.bias))


@pytest.mark.parametrize("bias", [True, False])
def test_dropout_takes_the_authors_form(bias):
    torch.manual_seed(0)
    m = dora.DoRALinear(nn.Linear(6, 5, bias=bias).double(), r=2, alpha=2 * S, dropout=0.5)
    x = torch.randn(4, 6).double()
    assert torch.equal(m(x), m.base(x))  # bit for bit at the start, in train mode too
    nn.init.normal_(m.B)
    nn.init.normal_(m.m)
    torch.manual_seed(7)
    y = m(x)
    torch.manual_seed(7)
    z = m.dropout(x)
    V, c = direction(m)
    k = m.m / c[:, 0]
    want = m.base(x) + (k - 1) * (z @ m.base.weight.T) + k * S * (z @ m.A.T @ m.B.T)
    torch.testing.assert_close(y, want)
    assert not torch.equal(z, x) and not torch.allclose(m.eval()(x), y)


def test_rows_of_zeros_start_like_lora_and_get_a_length_later():
    torch.manual_seed(0)
    base = nn.Linear(6, 5).double()
    with torch.no_grad():
        base.weight[2] = 0
    for detached in (True, False):
        model = nn.Sequential(copy.deepcopy(base))
        x, before = torch.randn(4, 6).double(), copy.deepcopy(base)
        dora.attach(model, "0", r=2, alpha=2 * S, detached=detached)
        assert torch.equal(model(x), before(x))
        opt = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
        for _ in range(3):
            opt.zero_grad()
            model(x).square().sum().backward()
            assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
            opt.step()
        m = dora.sites(model)["0"]
        assert m.B[2].abs().min() > 0 and m.m[2].abs() > 0 or not detached
        y = model(x)
        dora.merge(model)
        torch.testing.assert_close(model(x), y)
        assert model[0].weight.isfinite().all()


def test_the_bias_is_not_scaled(layer):
    with torch.no_grad():
        layer.m.zero_()
    torch.testing.assert_close(layer(torch.randn(4, 6).double()), layer.base.bias.expand(4, 5))


def test_a_conv1d_is_a_linear_layer_stored_the_other_way_round():
    torch.manual_seed(0)
    linear, conv = nn.Linear(6, 5).double(), Conv1D(5, 6).double()
    with torch.no_grad():
        conv.weight.copy_(linear.weight.T)
        conv.bias.copy_(linear.bias)
    x, out = torch.randn(4, 6).double(), []
    for base in (linear, conv):
        model = nn.Sequential(base)
        torch.manual_seed(1)
        dora.attach(model, "0", r=2, alpha=2 * S, dropout=0.3)
        perturb(model)
        torch.manual_seed(2)
        y = [model(x), model.eval()(x)]
        dora.merge(model)
        out.append((*y, model(x)))
    for a, b in zip(*out, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("r", [0, 6])
def test_a_rank_out_of_range_is_refused_and_nothing_changes(r):
    model = nn.Sequential(nn.Linear(6, 5))
    with pytest.raises(ValueError, match="rank"):
        dora.attach(model, "0", r=r)
    assert type(model[0]) is nn.Linear and model[0].weight.requires_grad


def test_bfloat16_weights_get_float32_factors_and_half_precision_stays_half():
    torch.manual_seed(0)
    base = nn.Linear(64, 32).bfloat16()
    m, x = dora.DoRALinear(base, r=4, alpha=8.0), torch.randn(3, 64).bfloat16()
    assert m.A.dtype == m.B.dtype == m.m.dtype == torch.float32
    assert torch.equal(m(x), base(x)) and m(x).dtype == torch.bfloat16
    nn.init.normal_(m.B, std=0.1)
    V, c = direction(copy.deepcopy(m).float())
    assert (m.m / m.ratio() / c[:, 0] - 1).abs().max() < 1e-3
    wide = dora.DoRALinear(nn.Linear(64, 32), r=4, alpha=8.0)
    with torch.autocast("cpu", torch.bfloat16):
        y = wide(x.float())
        assert y.dtype == torch.bfloat16 and torch.equal(y, wide.base(x.float()))


def test_a_tied_weight_is_not_merged():
    model = build("llama", tie_word_embeddings=True)
    dora.attach(model, "lm_head", r=2)
    with pytest.raises(ValueError, match="shared"):
        dora.merge(model)
    assert dora.sites(model)


def test_a_layer_held_twice_is_not_merged():
    layer = nn.Linear(6, 6)
    model = nn.ModuleDict({"a": layer, "b": layer})
    dora.attach(model, "a", r=2)
    with pytest.raises(ValueError, match="shared"):
        dora.merge(model)


def test_the_printed_counts():
    """LLaMA-7B, Q K V Up Down: 876,544 magnitudes; Llama-3.2-3B, q v with grouped heads: 114,688."""
    with torch.device("meta"):
        seven = [(4096, 4096)] * 3 + [(4096, 11008), (11008, 4096)]
        three = [(3072, 3072), (3072, 1024)]
        for shapes, layers, want in ((seven, 32, 876_544), (three, 28, 114_688)):
            model = nn.ModuleList(nn.Linear(*s) for s in shapes)
            dora.attach(model, *map(str, range(len(shapes))), r=2)
            m = sum(s.m.numel() for s in dora.sites(model).values())
            assert layers * m == want


@pytest.fixture(params=ARCHS)
def pair(request):
    """The same perturbed DoRA twice: ours and HF peft's, in float32, alpha != r."""
    peft = pytest.importorskip("peft")
    base = build(request.param, torch.float32)
    ours, inputs = copy.deepcopy(base), batch(request.param)
    dora.attach(ours, *LINEAR[request.param], r=2, alpha=6.0)
    perturb(ours)
    config = peft.LoraConfig(r=2, lora_alpha=6.0, use_dora=True, target_modules=list(dora.sites(ours)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(base, config).eval()
    names = dict(A="lora_A.default.weight", B="lora_B.default.weight",
                 m="lora_magnitude_vector.default.weight")
    peer, match = dict(theirs.named_parameters()), []
    for path, m in dora.sites(ours).items():
        for mine, other in names.items():
            q = peer[f"base_model.model.{path}.{other}"]
            q.data.copy_(getattr(m, mine).data)
            match.append((getattr(m, mine), q))
    return ours, theirs, match, inputs


def close(a, b):
    torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)


def test_same_logits_and_gradients_as_hf_peft(pair):
    ours, theirs, match, inputs = pair
    close(logits(ours, inputs), logits(theirs, inputs))
    for model in (ours, theirs):
        model(**inputs).loss.backward()
    assert sum(p.requires_grad for p in theirs.parameters()) == len(match)
    for p, q in match:
        close(p.grad, q.grad)


def test_same_weights_as_hf_peft_after_ten_steps_and_a_merge(pair):
    ours, theirs, match, inputs = pair
    for model in (ours, theirs):
        opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3, eps=1e-4)
        for _ in range(10):
            opt.zero_grad()
            model(**inputs).loss.backward()
            opt.step()
    for p, q in match:
        close(p, q)
    close(logits(ours, inputs), logits(theirs, inputs))
    dora.merge(ours)
    torch.testing.assert_close(logits(ours, inputs), logits(theirs, inputs), rtol=5e-6, atol=5e-6)
