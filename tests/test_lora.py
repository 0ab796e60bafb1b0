"""LoRA: its mathematics, bit parity with HF peft, every way a model is run, and its refusals."""

import copy
import math

import pytest
import torch
import transformers as tf
from tiny import ARCHS, LINEAR, batch, build, logits, perturb
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from minipeft.reparam import lora
from minipeft.reparam.lora import LoRALinear

DECODERS = ("llama", "gpt2", "t5")


def layer(d_in=7, d_out=5, r=3, alpha=6.0, dtype=torch.float64, moved=True, **more):
    torch.manual_seed(0)
    made = LoRALinear(nn.Linear(d_in, d_out).to(dtype).requires_grad_(False), r, alpha, **more)
    if moved:
        perturb(made)
    return made


def rows(n=11, d=7, dtype=torch.float64, seed=5):
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def attached(arch, dtype=torch.float64, moved=True, **more):
    model = build(arch, dtype)
    torch.manual_seed(3)
    lora.attach(model, *LINEAR[arch], **{**dict(r=2, alpha=6.0), **more})
    if moved:
        perturb(model)
    return model


def gradients(model, inputs):
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


# The mathematics


def test_the_forward_is_the_formula():
    m, x = layer(), rows()
    W, b = m.base.weight, m.base.bias
    y = torch.stack([W @ v + b + (6.0 / 3) * (m.B @ (m.A @ v)) for v in x])
    torch.testing.assert_close(m(x), y, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(m.delta(), (6.0 / 3) * m.B @ m.A, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(m(x.view(1, 11, 7)), y.view(1, 11, 5), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("train", [False, True])
def test_the_start_is_the_base_with_dropout_too(train):
    m, x = layer(moved=False, dropout=0.5).train(train), rows()
    assert torch.equal(m(x), m.base(x))


def test_how_the_factors_start():
    m = layer(400, 300, 64, dtype=torch.float32, moved=False)
    bound = 400**-0.5
    assert not m.B.any() and m.A.shape == (64, 400) and m.B.shape == (300, 64)
    assert m.A.abs().max() <= bound and m.A.abs().max() > 0.999 * bound
    assert abs(m.A.std().item() / (bound / math.sqrt(3)) - 1) < 0.01 and abs(m.A.mean()) < 0.01 * bound


def test_a_seed_gives_the_start_and_two_sites_differ():
    a, b, other = (build("bert") for _ in range(3))
    for model, seed in ((a, 1), (b, 1), (other, 2)):
        torch.manual_seed(seed)
        lora.attach(model, "query", r=2)
    a, b, other = (list(lora.sites(m).values()) for m in (a, b, other))
    assert torch.equal(a[0].A, b[0].A) and torch.equal(a[1].A, b[1].A)
    assert not torch.equal(a[0].A, other[0].A) and not torch.equal(a[0].A, a[1].A)


def test_B_moves_first_then_both():
    m, x = layer(moved=False), rows()
    A, B = m.A.detach().clone(), m.B.detach().clone()
    opt = torch.optim.SGD([m.A, m.B], lr=0.1)
    m(x).square().sum().backward()
    assert not m.A.grad.any() and m.B.grad.all()
    opt.step()
    assert torch.equal(m.A, A) and not torch.equal(m.B, B)
    opt.zero_grad()
    m(x).square().sum().backward()
    opt.step()
    assert not torch.equal(m.A, A)


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_gradients_are_the_closed_forms(p):
    m, x = layer(dropout=p).train(), rows().requires_grad_()
    G = rows(11, 5, seed=6)
    torch.manual_seed(1)
    m(x).backward(G)
    torch.manual_seed(1)
    mask = F.dropout(torch.ones_like(x), p)
    kept, s = (x * mask).detach(), 6.0 / 3
    assert p == 0 or 0 < (mask == 0).sum() < mask.numel()
    with torch.no_grad():
        close = dict(rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(m.B.grad, s * G.T @ (kept @ m.A.T), **close)
        torch.testing.assert_close(m.A.grad, s * (G @ m.B).T @ kept, **close)
        torch.testing.assert_close(x.grad, G @ m.base.weight + s * (G @ m.B @ m.A) * mask, **close)
    assert m.base.weight.grad is None and m.base.bias.grad is None


def test_gradcheck():
    m, x = layer(), rows(4).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, A, B: torch.func.functional_call(m, {"A": A, "B": B}, (x,)), (x, m.A, m.B)
    )


def test_dropout_is_on_the_branch_alone_and_keeps_its_mean():
    m, x = layer(dropout=0.5).train(), rows(1).expand(20000, 7)
    y = m(x)
    torch.testing.assert_close(y.mean(0), m.eval()(x[0]), rtol=0, atol=0.05)
    m.A.data.zero_()
    assert torch.equal(m.train()(x), m.base(x))


def test_the_rank_of_the_update_is_at_most_r():
    sigma = torch.linalg.svdvals(layer(20, 30, 4).delta())
    assert sigma[3] > 1e-3 * sigma[0] and sigma[4] < 1e-12 * sigma[0]


def test_only_the_product_matters():
    m, x = layer(), rows()
    C = torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y = m(x)
    with torch.no_grad():
        m.A.copy_(C @ m.A)
        m.B.copy_(m.B @ C.inverse())
    torch.testing.assert_close(m(x), y, rtol=1e-9, atol=1e-9)


def test_scale():
    one, two, rs = layer(alpha=6.0), layer(alpha=12.0), layer(alpha=6.0, rslora=True)
    torch.testing.assert_close(two.delta(), 2 * one.delta())
    torch.testing.assert_close(rs.delta(), math.sqrt(3) * one.delta())
    torch.testing.assert_close(rs(rows()) - rs.base(rows()), rows() @ rs.delta().T)
    assert (one.s, rs.s) == (2.0, 6.0 / math.sqrt(3))


def test_the_defaults_are_r_8_and_alpha_16():
    model = nn.Sequential(nn.Linear(9, 12))
    lora.attach(model, "0")
    assert model[0].A.shape == (8, 9) and model[0].s == 2.0 and model[0].dropout.p == 0.0


def test_two_updates_side_by_side_are_their_sum():
    one, two = layer(r=2, alpha=6.0), layer(r=3, alpha=1.0)
    with torch.no_grad():
        both = layer(r=5, alpha=5.0)  # s = 1
        both.A.copy_(torch.cat([one.A, two.A]))
        both.B.copy_(torch.cat([one.s * one.B, two.s * two.B], 1))
    torch.testing.assert_close(both.delta(), one.delta() + two.delta(), rtol=1e-12, atol=1e-12)


def test_full_rank_reaches_any_target():
    m, x = layer(4, 3, 3), rows(20, 4)
    goal = x @ rows(4, 3, seed=9)
    opt = torch.optim.LBFGS([m.A, m.B], max_iter=300, tolerance_grad=1e-14, tolerance_change=0,
                            line_search_fn="strong_wolfe")

    def loss():
        opt.zero_grad()
        value = (m(x) - m.base.bias - goal).square().mean()
        value.backward()
        return value

    opt.step(loss)
    assert loss() < 1e-12


def test_conv1d_is_linear_with_the_weight_transposed():
    torch.manual_seed(0)
    conv, linear = Conv1D(5, 7).double(), nn.Linear(7, 5).double()
    with torch.no_grad():
        linear.weight.copy_(conv.weight.T)
        linear.bias.copy_(conv.bias)
    models = [nn.Sequential(conv), nn.Sequential(linear)]
    for model in models:
        torch.manual_seed(1)
        lora.attach(model, "0", r=3, alpha=6.0)
        perturb(model)
    a, b = models
    torch.testing.assert_close(a(rows()), b(rows()), rtol=1e-12, atol=1e-12)
    for model in models:
        lora.merge(model)
    torch.testing.assert_close(a[0].weight, b[0].weight.T, rtol=1e-12, atol=1e-12)


def test_a_targets_are_names_or_ends_of_paths_never_substrings():
    model = build("bert")
    assert len(lora.attach(model, "attention.output.dense", r=2)) == 2
    model = build("t5")
    paths = lora.attach(model, "v", r=2)  # not "wv", not "relative_attention_bias"
    assert len(paths) == 6 and all(p.endswith(".v") for p in paths)
    model = build("bert")
    whole = "bert.encoder.layer.1.attention.self.query"
    assert lora.attach(model, whole, r=2) == [whole] == list(lora.sites(model))


def test_a_place_named_twice_is_wrapped_once():
    model = build("bert")
    paths = lora.attach(model, "query", "self.query", "value", r=2)
    assert len(paths) == len(set(paths)) == 4
    assert paths == [p for p in dict(model.named_modules()) if p.endswith((".query", ".value"))]


# HF peft, bit for bit


def twins(arch, rslora=False, dropout=0.0):
    """Ours and peft's on the same weights, with the same factors."""
    peft = pytest.importorskip("peft")
    ours = attached(arch, torch.float32, rslora=rslora, dropout=dropout)
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=list(LINEAR[arch]), use_rslora=rslora,
                             lora_dropout=dropout)
    theirs = peft.get_peft_model(build(arch, torch.float32), config)
    pairs = {}
    for path, m in lora.sites(ours).items():
        other = theirs.get_submodule(f"base_model.model.{path}")
        pairs[f"{path}.A"] = (m.A, other.lora_A["default"].weight)
        pairs[f"{path}.B"] = (m.B, other.lora_B["default"].weight)
    trained = sum(p.requires_grad for p in theirs.parameters())
    assert len(pairs) == trained == sum(p.requires_grad for p in ours.parameters())
    with torch.no_grad():
        for a, b in pairs.values():
            b.copy_(a)
    return ours, theirs, pairs


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("arch", ARCHS)
def test_peft_has_the_same_logits_loss_and_gradients(arch, rslora):
    ours, theirs, pairs = twins(arch, rslora)
    inputs = batch(arch)
    a, b = ours.eval()(**inputs), theirs.eval()(**inputs)
    assert torch.equal(a.logits, b.logits) and torch.equal(a.loss, b.loss)
    a.loss.backward()
    b.loss.backward()
    for name, (p, q) in pairs.items():
        assert torch.equal(p.grad, q.grad) and p.grad.any(), name


@pytest.mark.parametrize("arch", ARCHS)
def test_peft_has_the_same_weights_after_ten_steps_with_dropout(arch):
    ours, theirs, pairs = twins(arch, dropout=0.2)
    inputs = batch(arch)
    start = {name: p.detach().clone() for name, (p, _) in pairs.items()}
    for model in (ours, theirs):
        model.train()
        opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
        torch.manual_seed(4)
        for _ in range(10):
            opt.zero_grad()
            model(**inputs).loss.backward()
            opt.step()
    for name, (p, q) in pairs.items():
        assert torch.equal(p, q) and not torch.equal(p, start[name]), name


@pytest.mark.parametrize("arch", ARCHS)
def test_peft_merges_to_the_same_weights(arch):
    ours, theirs, _ = twins(arch)
    lora.merge(ours)
    theirs = theirs.merge_and_unload().state_dict()
    assert theirs.keys() == ours.state_dict().keys()
    for name, w in ours.state_dict().items():
        torch.testing.assert_close(w, theirs[name], rtol=1e-6, atol=1e-6)


# Precision


class Wide(TorchDispatchMode):
    """Notes every float32 result with as many elements as an activation."""

    def __init__(self, size):
        super().__init__()
        self.size, self.seen = size, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if torch.is_tensor(t) and t.dtype == torch.float32 and t.numel() >= self.size:
                self.seen.append(str(func))
        return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_bases_keep_activations_thin(dtype):
    m, x = layer(7, 5, 3, dtype=dtype), rows(64, 7, dtype).requires_grad_()
    assert m.A.dtype == m.B.dtype == torch.float32
    with Wide(64 * 3) as wide:
        y = m(x)
        y.square().mean().backward()
    assert y.dtype == dtype and x.grad.dtype == dtype and not wide.seen
    assert m.A.grad.dtype == torch.float32 and m.A.grad.any() and m.B.grad.any()
    exact = copy.deepcopy(m).double()
    torch.testing.assert_close(y.double(), exact(x.detach().double()), rtol=0.03, atol=0.03)


def test_a_small_step_survives_on_a_half_precision_base():
    m = layer(dtype=torch.bfloat16)
    before = m.A.detach().clone()
    m.A.grad = torch.full_like(m.A, 1e-5)
    torch.optim.SGD([m.A], lr=1.0).step()
    assert (m.A != before).all()
    assert torch.equal((m.A.detach() - 1e-5).bfloat16().double().round(), before.bfloat16().double().round())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("arch", ARCHS)
def test_whole_models_in_half_precision(arch, dtype):
    model, inputs = attached(arch, dtype), batch(arch)
    out = model(**inputs)
    out.loss.backward()
    assert out.logits.dtype == dtype
    for n, p in model.named_parameters():
        if p.requires_grad:
            assert p.dtype == torch.float32 and p.grad is not None and p.grad.isfinite().all(), n
    exact = copy.deepcopy(model).double()
    scale = logits(exact, inputs).std()
    assert (logits(model, inputs).double() - logits(exact, inputs)).abs().mean() < 0.1 * scale


@pytest.mark.parametrize("arch", ARCHS)
def test_autocast(arch):
    model, inputs = attached(arch, torch.float32), batch(arch)
    exact, want = gradients(copy.deepcopy(model), inputs)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**inputs).loss
        last = list(lora.sites(model).values())[-1]
        y = last(torch.randn(3, last.A.shape[1]))
    loss.backward()
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(loss.detach().float(), exact, rtol=0.05, atol=0.05)
    got = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
    want = torch.cat([want[n].flatten() for n, p in model.named_parameters() if p.requires_grad])
    assert got.dtype == torch.float32 and F.cosine_similarity(got, want, 0) > 0.97


# Every way a model is run


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("arch", ARCHS)
def test_gradient_checkpointing_gives_the_same_gradients(arch, reentrant):
    model, inputs = attached(arch, dropout=0.3).train(), batch(arch)
    torch.manual_seed(7)
    loss, plain = gradients(model, inputs)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=reentrant))
    if reentrant:
        model.enable_input_require_grads()
    torch.manual_seed(7)
    again, kept = gradients(model, inputs)
    assert torch.equal(loss, again) and plain.keys() == kept.keys() and plain
    for n in plain:  # the order in which paths meet may differ, and so the last bits
        torch.testing.assert_close(plain[n], kept[n], rtol=1e-10, atol=1e-12)
        assert plain[n].any()


def prompts(arch, left=0):
    """Two prompts, the second one shorter and padded on the left."""
    ids = torch.randint(3, 64, (2, 6), generator=torch.Generator().manual_seed(8))
    mask = torch.ones_like(ids)
    mask[1, :left] = 0
    return dict(input_ids=ids.masked_fill(mask == 0, 0), attention_mask=mask)


def greedy(model, inputs, **more):
    return model.generate(**inputs, max_new_tokens=8, do_sample=False, eos_token_id=None,
                          pad_token_id=0, **more)


@pytest.mark.parametrize("arch", DECODERS)
def test_generate_is_the_merged_model_with_and_without_a_cache(arch):
    model, inputs = attached(arch), prompts(arch)
    ids, slow = greedy(model, inputs), greedy(model, inputs, use_cache=False)
    base = build(arch)
    lora.merge(merged := copy.deepcopy(model))
    assert torch.equal(ids, slow) and torch.equal(ids, greedy(merged, inputs))
    assert not torch.equal(ids, greedy(base, inputs))


@pytest.mark.parametrize("arch", DECODERS)
def test_a_row_padded_on_the_left_generates_what_it_does_alone(arch):
    model, inputs = attached(arch), prompts(arch, left=2)
    both = greedy(model, inputs)
    alone = greedy(model, {k: v[1:, 2:] for k, v in inputs.items()})
    new = alone.shape[1] if arch == "t5" else 8
    assert torch.equal(both[1, -new:], alone[0, -new:])


@pytest.mark.parametrize("arch, backend", [("llama", "eager"), ("gpt2", "aot_eager")])
def test_compiles_without_a_graph_break(arch, backend):
    torch._dynamo.reset()
    short = dict(n_layer=1) if arch == "gpt2" else dict(num_hidden_layers=1)
    model, inputs = build(arch, torch.float32, **short), batch(arch)
    lora.attach(model, *LINEAR[arch], r=2, alpha=6.0, dropout=0.1)
    perturb(model)
    inputs.pop("labels")  # transformers' own loss logs, which breaks a graph
    results = []
    for run in (model, torch.compile(model, fullgraph=True, backend=backend)):
        model.zero_grad()
        y = run(**inputs, use_cache=False).logits
        y.square().mean().backward()
        results.append([y.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


# Merging


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_merge_tells_the_rounding_it_caused(dtype):
    np = pytest.importorskip("numpy")
    m = layer(16, 12, 3, dtype=dtype)
    model = nn.Sequential(m)
    W, A, B = (t.detach().double().numpy() for t in (m.base.weight, m.A, m.B))
    exact = W + 2.0 * np.einsum("or,ri->oi", B, A)
    rounding = lora.merge(model)
    after = model[0].weight
    error = np.abs(after.detach().double().numpy() - exact)
    assert after.dtype == dtype and rounding == {"0": pytest.approx(error.max(), rel=1e-6)}
    # Nearest: no weight is further off than half the gap to its neighbour.
    gap = torch.finfo(dtype).eps * 2.0 ** np.floor(np.log2(np.abs(exact)))
    assert (error <= 0.5001 * gap).all() and error.max() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_merge_reports_zero_where_nothing_rounds(dtype):
    m = layer(16, 12, 3, dtype=dtype)
    with torch.no_grad():
        m.base.weight.copy_(torch.randint(-3, 4, (12, 16)))
        m.A.copy_(torch.randint(-1, 2, (3, 16)))
        m.B.copy_(torch.randint(-1, 2, (12, 3)))
    want = m.base.weight.double() + m.delta().double()
    model = nn.Sequential(m)
    assert lora.merge(model) == {"0": 0.0} and torch.equal(model[0].weight.double(), want)


def test_merge_tells_of_an_update_that_vanished():
    m = layer(4, 4, 1, alpha=1.0, dtype=torch.bfloat16)
    with torch.no_grad():
        m.base.weight.fill_(1.0)
        m.A.fill_(1.0)
        m.B.fill_(2**-10)
    model = nn.Sequential(m)
    assert lora.merge(model) == {"0": 2**-10} and (model[0].weight == 1).all()


def test_merging_again_does_nothing():
    model = attached("bert")
    assert len(lora.merge(model)) == 8
    weights = copy.deepcopy(model.state_dict())
    assert lora.merge(model) == {} and all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())


def test_a_merged_model_has_no_gradient_history_and_keeps_its_freeze():
    model = attached("bert")
    lora.merge(model)
    weight = model.bert.encoder.layer[0].attention.self.query.weight
    assert weight.is_leaf and not weight.requires_grad and weight.grad_fn is None


def test_tied_weights_are_refused_before_anything_is_merged():
    model = build("gpt2")
    assert model.lm_head.weight is model.transformer.wte.weight
    lora.attach(model, "c_attn", "lm_head", r=2)
    perturb(model)
    weights = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(ValueError, match="lm_head: its weight is shared with another module; untie it first"):
        lora.merge(model)
    assert len(lora.sites(model)) == 3
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())
    model.lm_head.base.weight = nn.Parameter(model.lm_head.base.weight.detach().clone())
    assert len(lora.merge(model)) == 3


def test_a_layer_used_at_two_places_is_refused_too():
    shared = nn.Linear(4, 4).double()
    model = nn.Sequential(shared, nn.Tanh(), shared)
    lora.attach(model, "0", r=2)
    perturb(model)
    with pytest.raises(ValueError, match="0: its weight is shared"):
        lora.merge(model)


def test_a_block_used_twice_merges():
    block = nn.Sequential(nn.Linear(4, 4), nn.Tanh()).double()
    model = nn.Sequential(block, block)
    assert lora.attach(model, "0.0", r=2) == ["0.0"]
    perturb(model)
    x = rows(3, 4)
    y = model(x)
    lora.merge(model)
    torch.testing.assert_close(model(x), y)


# Refusals: one sentence each, and the model as it was


REFUSED = [
    (("query",), dict(r=0), "r = 0: the rank must lie in 1..24 here"),
    (("query",), dict(r=-1), "r = -1: the rank must lie in 1..24 here"),
    (("query", "classifier"), dict(r=4), "r = 4: the rank must lie in 1..3 here"),
    (("qerry",), {}, "no linear layer is named 'qerry'; there are: query, key, value, dense, classifier"),
    (("query", "qerry"), {}, "no linear layer is named 'qerry'; there are: query, "),
    (("uery",), {}, "no linear layer is named 'uery'; "),
    (("word_embeddings",), {}, "bert.embeddings.word_embeddings is a Embedding, expected a linear layer"),
    (("query", "LayerNorm"), {}, "is a LayerNorm, expected a linear layer"),
    ((), {}, "no linear layer is named nothing; there are: query, "),
    (("query",), dict(dropout=1.5), "dropout probability"),
]


@pytest.mark.parametrize("targets, more, sentence", REFUSED)
def test_refusals(targets, more, sentence):
    model = build("bert")
    before, modules = copy.deepcopy(model.state_dict()), list(model.modules())
    with pytest.raises(ValueError) as error:
        lora.attach(model, *targets, **{**dict(r=2), **more})
    text = str(error.value)
    assert sentence in text and "\n" not in text
    assert modules == list(model.modules()) and all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_model_with_nothing_to_adapt_is_refused():
    model = nn.Sequential(nn.Embedding(3, 4), nn.LayerNorm(4))
    with pytest.raises(ValueError, match="^no linear layer is named 'query'; there are: none$"):
        lora.attach(model, "query")
    assert all(p.requires_grad for p in model.parameters())


def test_attaching_twice_at_one_place_is_refused():
    model = attached("bert")
    with pytest.raises(ValueError, match="query is a LoRALinear, expected a linear layer"):
        lora.attach(model, "query")


def test_whoever_reads_the_weight_behind_its_back_fails_loudly():
    x = torch.randn(2, 3, 8)
    for train in (True, False):
        model = nn.MultiheadAttention(8, 2).train(train)
        lora.attach(model, "out_proj", r=2)
        with pytest.raises((TypeError, AttributeError)):
            model(x, x, x)


def test_a_load_of_another_rank_says_which_shape():
    saved = lora.state(attached("bert"))
    with pytest.raises(ValueError, match=r"query.A has shape \(2, 24\), expected \(3, 24\)"):
        lora.load(attached("bert", r=3), saved)


def test_a_scale_that_float32_cannot_hold_comes_back_exactly():
    model, other = attached("bert", r=3, rslora=True), attached("bert", r=3)
    lora.load(other, lora.state(model))
    assert {m.s for m in lora.sites(other).values()} == {6.0 / math.sqrt(3)}


def test_mode_and_dropout_follow_the_model():
    model = build("bert").eval()
    lora.attach(model, "query", r=2, dropout=0.5)
    assert not any(m.training for m in model.modules())
    model = build("bert").train()
    lora.attach(model, "query", r=2, dropout=0.5)
    assert all(m.training and m.dropout.p == 0.5 for m in lora.sites(model).values())


# Counts, on the meta device


def meta(config, kind=tf.AutoModel):
    with torch.device("meta"):
        return kind.from_config(config)


def trained(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def llama(d, layers, heads, kv, ff, vocab=32000):
    return meta(tf.LlamaConfig(hidden_size=d, num_hidden_layers=layers, num_attention_heads=heads,
                               num_key_value_heads=kv, intermediate_size=ff, vocab_size=vocab))


def test_golden_counts_of_gpt3():
    for r, count in ((1, 4_718_592), (4, 18_874_368), (8, 37_748_736)):
        layers = [nn.ModuleDict(dict(q=nn.Linear(12288, 12288, device="meta"),
                                     v=nn.Linear(12288, 12288, device="meta"))) for _ in range(96)]
        model = nn.ModuleList(layers)
        lora.attach(model, "q", "v", r=r)
        assert trained(model) == count


def test_golden_counts_of_real_configurations():
    gpt2 = meta(tf.GPT2Config(n_embd=1024, n_layer=24, n_head=16))
    lora.attach(gpt2, "c_attn", r=4)
    assert trained(gpt2) == 393_216
    small = llama(3072, 28, 24, 8, 8192, 128256)
    lora.attach(small, "q_proj", "v_proj", r=32)
    assert trained(small) == 9_175_040
    seven = llama(4096, 32, 32, 32, 11008)
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert len(lora.attach(seven, *names, r=64)) == 224
    assert trained(seven) == 159_907_840
    assert all(p.is_meta for p in seven.parameters())


def test_the_wrapper_tells_a_dtype_and_lends_no_weight_to_compute_with():
    """A meta tensor would not do: on a CPU, F.linear takes one and returns what stands in memory."""
    m = lora.LoRALinear(nn.Linear(8, 6).bfloat16(), r=2, alpha=6.0)
    assert m.weight.dtype == torch.bfloat16 and m.weight.numel() == 0
    x = torch.randn(2, 8).bfloat16()
    for product in (lambda: F.linear(x, m.weight), lambda: x @ m.weight, lambda: F.embedding(torch.tensor([1]), m.weight)):
        with pytest.raises(RuntimeError):
            product()
