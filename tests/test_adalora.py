"""AdaLoRA's own mathematics, its schedule, and what goes wrong in other implementations."""

import copy
import warnings

import pytest
import torch
from tiny import ARCHS, LINEAR, batch, build, logits, perturb
from torch import nn

from minipeft.reparam import adalora

R, S = 3, 2.0  # rank and scale of the layer below


@pytest.fixture
def layer():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5).double())
    adalora.attach(model, "0", total=9, r=R, target=1, alpha=S * R)
    perturb(model, 1.0)
    return model[0]


def train(model, inputs, steps, opt=None, penalty=True):
    opt = opt or torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for step in steps:
        opt.zero_grad()
        loss = model(**inputs).loss
        (loss + adalora.penalty(model) if penalty else loss).backward()
        opt.step()
        adalora.advance(model, step)
    return opt


def ranks(model):
    return {path: int(m.lam.count_nonzero()) for path, m in adalora.sites(model).items()}


def rank(model):
    return sum(ranks(model).values())


# The layer


def test_forward_is_equation_3(layer):
    x = torch.randn(2, 4, 6).double()
    W = layer.base.weight + S * layer.P @ torch.diag(layer.lam) @ layer.Q
    torch.testing.assert_close(layer(x), x @ W.T + layer.base.bias)


def test_gradients_are_the_written_ones(layer):
    x, G = torch.randn(4, 6).double(), torch.randn(4, 5).double()
    layer(x).backward(G)
    z = x @ layer.Q.T
    torch.testing.assert_close(layer.P.grad, S * G.T @ (z * layer.lam))
    torch.testing.assert_close(layer.lam.grad, S * ((G @ layer.P) * z).sum(0))
    torch.testing.assert_close(layer.Q.grad, S * layer.lam[:, None] * (layer.P.T @ G.T @ x))


def test_only_lam_moves_first():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5))
    adalora.attach(model, "0", total=9, r=R, target=1)
    model(torch.randn(3, 6)).square().sum().backward()
    m = model[0]
    assert m.P.grad.abs().max() == m.Q.grad.abs().max() == 0 < m.lam.grad.abs().max()


def test_p_and_q_start_small():
    torch.manual_seed(0)
    plan = {}
    m = adalora.AdaLoRALinear(nn.Linear(512, 256), 64, 16.0, 0.0, plan)
    for t in (m.P, m.Q):
        assert abs(t.std() / 0.02 - 1) < 0.03 and abs(t.mean()) < 1e-3
    assert not m.lam.any()


def test_dropout_is_on_the_branch_only(layer):
    layer.dropout.p = 1.0
    x = torch.randn(4, 6).double()
    assert torch.equal(layer.train()(x), layer.base(x))
    assert not torch.equal(layer.eval()(x), layer.base(x))


def test_orthonormal_factors_make_lam_the_singular_values(layer):
    with torch.no_grad():
        layer.P.copy_(torch.linalg.qr(layer.P).Q)
        layer.Q.copy_(torch.linalg.qr(layer.Q.T).Q.T)
    dW = S * layer.P @ torch.diag(layer.lam) @ layer.Q
    found = torch.linalg.svdvals(dW)[:R]
    torch.testing.assert_close(found, (S * layer.lam).abs().sort(descending=True).values)
    assert adalora.penalty(nn.Sequential(layer)) < 1e-25


def test_bfloat16_weights_get_float32_factors():
    model = nn.Sequential(nn.Linear(8, 6).bfloat16())
    before, x = copy.deepcopy(model), torch.randn(3, 8).bfloat16()
    adalora.attach(model, "0", total=9, r=2, target=1)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert torch.equal(model(x), before(x)) and model(x).dtype == torch.bfloat16


# The penalty


def test_the_penalty_is_equation_4_and_its_gradient_4pm():
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(6, 5), "b": nn.Linear(5, 6), "c": nn.Linear(7, 6)}).double()
    adalora.attach(model, "a", "b", "c", total=9, r=2, target=1, gamma=0.7)
    perturb(model)
    got, want = adalora.penalty(model), 0.0
    for m in adalora.sites(model).values():
        for G in (m.P.T @ m.P, m.Q @ m.Q.T):
            want += 0.7 * (G - torch.eye(2)).square().sum()
    torch.testing.assert_close(got, want)
    got.backward()
    P = model["a"].P
    torch.testing.assert_close(P.grad, 0.7 * 4 * P @ (P.T @ P - torch.eye(2)))


def test_the_penalty_does_not_see_a_rotation(layer):
    model, before = nn.Sequential(layer), adalora.penalty(nn.Sequential(layer))
    with torch.no_grad():
        layer.P.copy_(layer.P @ torch.linalg.qr(torch.randn(R, R).double()).Q)
    torch.testing.assert_close(adalora.penalty(model), before)


def test_the_models_own_loss_never_contains_the_penalty():
    """HF peft adds it to outputs.loss, in eval mode too."""
    model, inputs = build("llama"), batch("llama")
    adalora.attach(model, *LINEAR["llama"], total=9, r=2, target=1)
    out = model(**inputs)
    flat, labels = out.logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten()
    torch.testing.assert_close(out.loss, nn.functional.cross_entropy(flat, labels), check_dtype=False)
    assert adalora.penalty(model) > 0.1


def test_the_penalty_makes_the_factors_orthonormal():
    model, inputs = build("bert"), batch("bert")
    adalora.attach(model, *LINEAR["bert"], total=90, r=2, target=1, gamma=1.0)
    start = adalora.penalty(model)
    train(model, inputs, range(60))
    assert adalora.penalty(model) < 0.01 * start


# The schedule

GOLDEN = [24] * 6 + [21, 18, 16, 14, 12, 11, 10, 9, 9] + [8] * 15


def test_the_budget_is_the_golden_vector():
    plan = dict(b0=24, bT=8, total=30, warmup=5, final=10)
    assert [adalora.budget(t, **plan) for t in range(30)] == GOLDEN


def test_the_printed_equation_12_is_not_the_schedule():
    def printed(t):
        return int(8 + 16 * (1 - (t - 5 - 10) / (30 - 10 - 5)) ** 3)

    assert printed(5) == 82 and printed(19) == 14  # above b0 = 24; a jump from 14 to 8


@pytest.mark.parametrize("every", [1, 4])
def test_after_each_cut_the_budget_is_met_exactly(every):
    model, inputs = build("gpt2"), batch("gpt2")
    adalora.attach(model, *LINEAR["gpt2"], total=30, r=6, target=2, warmup=5, final=10, every=every)
    opt, patterns = None, []
    for t in range(30):
        opt = train(model, inputs, [t], opt)
        cut = t >= 20 or (t > 5 and t % every == 0)
        assert rank(model) == (GOLDEN[t] if cut else 24), t
        patterns.append([m.lam != 0 for m in adalora.sites(model).values()])
    for later in patterns[20:]:
        assert all(torch.equal(a, b) for a, b in zip(later, patterns[20], strict=True))


def test_a_triplet_may_return_before_the_last_phase():
    model, inputs = build("gpt2"), batch("gpt2")
    adalora.attach(model, *LINEAR["gpt2"], total=60, r=6, target=2, warmup=2, final=10, every=2)
    opt, seen = None, []
    for t in range(60):
        opt = train(model, inputs, [t], opt)
        if t > 2 and t % 2 == 0:
            seen.append(torch.cat([m.lam != 0 for m in adalora.sites(model).values()]))
    assert any((b & ~a).any() for a, b in zip(seen, seen[1:], strict=False))


def test_ties_do_not_cost_triplets():
    """A threshold keeps none of eight equal scores; top-b keeps five."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    adalora.attach(model, "0", "1", total=10, r=4, target=2, warmup=0, final=5)
    perturb(model)
    for step in (3, 5):
        for p in model.parameters():
            p.grad = torch.zeros_like(p) if p.requires_grad else None
        adalora.advance(model, step)
        assert rank(model) == adalora.budget(step, **model[0].plan)


def test_equal_ranks_prune_nothing():
    """HF peft crashes in kthvalue here."""
    model, inputs = build("llama"), batch("llama")
    adalora.attach(model, *LINEAR["llama"], total=8, r=2, target=2)
    train(model, inputs, range(8))
    assert set(ranks(model).values()) == {2}


def test_skipping_the_step_where_the_last_phase_starts_is_harmless():
    """HF peft compares step == total - tfinal, and crashes or keeps an older pattern."""
    model, inputs = build("llama"), batch("llama")
    adalora.attach(model, *LINEAR["llama"], total=10, r=3, target=1, final=4)
    train(model, inputs, [t for t in range(10) if t != 6])
    assert rank(model) == 1 * len(adalora.sites(model))


def test_the_last_phase_starts_with_a_cut_and_its_scores_stand():
    model, inputs = build("llama"), batch("llama")
    adalora.attach(model, *LINEAR["llama"], total=20, r=3, target=1, warmup=2, final=5, every=4)
    opt = train(model, inputs, range(15))
    assert rank(model) == 3 * len(adalora.sites(model))  # step 14 is no cut
    before = [m.score() for m in adalora.sites(model).values()]
    train(model, inputs, [15], opt)  # nor would 15 be one, were it not the first of the last five
    assert rank(model) == len(adalora.sites(model))
    train(model, inputs, range(16, 20), opt)
    assert all(torch.equal(a, m.score()) for a, m in zip(before, adalora.sites(model).values(), strict=True))


def test_the_last_step_is_always_a_cut():
    """With tfinal = 0 HF peft's live model ends with all triplets, its file with few."""
    model, inputs = build("llama"), batch("llama")
    with pytest.raises(ValueError, match="final"):
        adalora.attach(model, *LINEAR["llama"], total=10, r=3, target=1, final=0)
    adalora.attach(model, *LINEAR["llama"], total=10, r=3, target=1, final=1, every=7)
    train(model, inputs, range(10))
    y, saved = logits(model, inputs), adalora.state(model)
    assert rank(model) == sum(v.numel() for k, v in saved.items() if k.endswith("lam"))
    adalora.load(model, saved)
    torch.testing.assert_close(logits(model, inputs), y)


@pytest.mark.parametrize("bad", [
    dict(target=4), dict(target=-1), dict(r=0, target=0), dict(r=6), dict(every=0), dict(warmup=-1),
    dict(warmup=5, final=5), dict(final=10), dict(total=0), dict(total=1)])
def test_what_does_not_fit_is_refused_and_nothing_changes(bad):
    model = nn.Sequential(nn.Linear(6, 5))
    with pytest.raises(ValueError):
        adalora.attach(model, "0", **{**dict(total=10, r=3, target=1), **bad})
    assert type(model[0]) is nn.Linear and model[0].weight.requires_grad


def test_a_second_attach_is_refused_for_the_budget_is_one():
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 6))
    adalora.attach(model, "0", total=10, r=3, target=1)
    with pytest.raises(ValueError, match="one budget"):
        adalora.attach(model, "1", total=10, r=3, target=1)


# The scores


def test_the_first_score_is_the_golden_number(layer):
    for p in (layer.P, layer.lam, layer.Q):
        p.grad = torch.randn_like(p)
    model = nn.Sequential(layer)
    squares = [(p * p.grad).square() for p in (layer.P, layer.lam, layer.Q)]
    adalora.advance(model, 0)
    want = 0.019125 * (squares[1] + squares[0].mean(0) + squares[2].mean(1))
    torch.testing.assert_close(layer.score(), want)


def test_scores_over_time_are_the_written_averages(layer):
    model, b = nn.Sequential(layer), 0.85
    mean, dev = torch.zeros(R).double(), torch.zeros(R).double()
    for _ in range(3):
        for p in (layer.P, layer.lam, layer.Q):
            p.grad = torch.randn_like(p)
        now = (layer.lam * layer.lam.grad).abs().detach()
        mean = b * mean + (1 - b) * now
        dev = b * dev + (1 - b) * (now - mean).abs()
        adalora.advance(model, 0)
    torch.testing.assert_close(layer.mean_lam, mean)
    torch.testing.assert_close(layer.dev_lam, dev)


def test_doubled_gradients_give_four_times_the_score(layer):
    double, scores = copy.deepcopy(layer), []
    for m, scale in ((layer, 1), (double, 2)):
        g = torch.Generator().manual_seed(5)
        for _ in range(4):
            for p in (m.P, m.lam, m.Q):
                p.grad = scale * torch.randn(p.shape, generator=g, dtype=p.dtype)
            adalora.advance(nn.Sequential(m), 0)
        scores.append(m.score())
    torch.testing.assert_close(4 * scores[0], scores[1])


def test_scores_follow_a_permutation_of_the_triplets(layer):
    other, order = copy.deepcopy(layer), torch.tensor([2, 0, 1])
    with torch.no_grad():
        other.put(layer.P[:, order].clone(), layer.lam[order].clone(), layer.Q[order].clone())
    x = torch.randn(4, 6).double()
    for m in (layer, other):
        m(x).square().sum().backward()
        adalora.advance(nn.Sequential(m), 0)
    torch.testing.assert_close(other.score(), layer.score()[order])


def test_a_perfectly_steady_number_scores_zero(layer):
    for _ in range(300):
        for p in (layer.P, layer.lam, layer.Q):
            p.grad = torch.ones_like(p)
        adalora.advance(nn.Sequential(layer), 0)
    assert layer.score().max() < 1e-12 < 1e-3 < layer.mean_lam.max()


# Misuse


def test_advance_after_zero_grad_is_refused():
    """In HF peft: unsupported operand, Parameter * NoneType."""
    model, inputs = build("llama"), batch("llama")
    adalora.attach(model, *LINEAR["llama"], total=8, r=2, target=1)
    opt = train(model, inputs, [0])
    opt.zero_grad()
    with pytest.raises(RuntimeError, match="before zero_grad"):
        adalora.advance(model, 1)


def test_a_run_without_advance_is_not_silent():
    model, inputs = build("llama"), batch("llama")
    adalora.attach(model, *LINEAR["llama"], total=8, r=2, target=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adalora.state(model)  # nothing has trained yet
    with torch.no_grad():
        adalora.sites(model)[next(iter(adalora.sites(model)))].lam.add_(1)
    with pytest.warns(UserWarning, match="without advance"):
        adalora.state(model)


def test_a_layer_that_took_no_part_counts_as_zero():
    model = nn.ModuleDict({"used": nn.Linear(6, 5), "idle": nn.Linear(6, 5)})
    adalora.attach(model, "used", "idle", total=4, r=2, target=1, warmup=0, final=1)
    perturb(model)
    for step in range(4):
        model.zero_grad()
        model["used"](torch.randn(3, 6)).square().sum().backward()
        adalora.advance(model, step)
    assert ranks(model) == {"used": 2, "idle": 0}


# Files


@pytest.fixture
def trained():
    model, inputs = build("llama"), batch("llama")
    adalora.attach(model, *LINEAR["llama"], total=12, r=4, target=1, alpha=6.0)
    train(model, inputs, range(12))
    assert 0 in ranks(model).values() and max(ranks(model).values()) > 1  # ranks 0 included
    return model, inputs


def test_the_file_is_small_and_a_loaded_model_computes_its_loss(trained):
    """HF peft: rank-0 layers broke loading; a reloaded model crashes when labels are given."""
    model, inputs = trained
    saved = adalora.state(model)
    n = {p: r * (sum(m.base.weight.shape) + 1) + 1 for (p, m), r in
         zip(adalora.sites(model).items(), ranks(model).values(), strict=True)}
    assert sum(v.numel() for v in saved.values()) == sum(n.values())
    for frozen in (False, True):
        other = build("llama")
        adalora.attach(other, *LINEAR["llama"], total=7, r=2, target=2)
        for p in other.parameters():
            p.requires_grad_(p.requires_grad and not frozen)
        adalora.load(other, saved)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            torch.testing.assert_close(other(**inputs).loss, model(**inputs).loss)
        assert ranks(other) == ranks(model)
        assert any(p.requires_grad for p in other.parameters()) is not frozen
    adalora.merge(other)
    torch.testing.assert_close(logits(other, inputs), logits(model, inputs))


def test_a_state_from_before_the_first_step_keeps_every_triplet():
    model, inputs = build("llama"), batch("llama")
    adalora.attach(model, *LINEAR["llama"], total=8, r=3, target=1)
    saved = adalora.state(model)
    assert all(v.numel() == 3 for k, v in saved.items() if k.endswith("lam"))
    other = build("llama")
    adalora.attach(other, *LINEAR["llama"], total=8, r=2, target=1)
    adalora.load(other, saved)
    train(other, inputs, range(8))
    assert not torch.equal(logits(other, inputs), logits(model, inputs))


def test_a_loaded_file_can_train_on(trained):
    model, inputs = trained
    adalora.load(model, adalora.state(model))
    loss, kept = model(**inputs).loss, ranks(model)
    train(model, inputs, range(12), penalty=False)
    assert model(**inputs).loss < loss and ranks(model) == kept


def test_a_state_taken_between_two_cuts_is_the_function():
    model, inputs = build("llama"), batch("llama")
    adalora.attach(model, *LINEAR["llama"], total=20, r=3, target=1, warmup=0, final=5, every=4)
    train(model, inputs, range(10))
    y = logits(model, inputs)
    adalora.load(model, adalora.state(model))
    torch.testing.assert_close(logits(model, inputs), y)


def test_a_run_resumed_in_the_middle_ends_on_the_same_bits():
    """In HF peft the averages are not in the checkpoint."""
    inputs, ends = batch("llama"), []
    for stop in (None, 5, 9):
        model = build("llama")
        adalora.attach(model, *LINEAR["llama"], total=12, r=4, target=1, warmup=2, final=4, every=2)
        opt = train(model, inputs, range(stop or 12))
        if stop:
            saved, moments = adalora.resumable(model), copy.deepcopy(opt.state_dict())
            model = build("llama")
            torch.manual_seed(99)
            adalora.attach(model, *LINEAR["llama"], total=12, r=4, target=1, warmup=2, final=4, every=2)
            adalora.resume(model, saved)
            opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
            opt.load_state_dict(moments)
            train(model, inputs, range(stop, 12), opt)
        ends.append(adalora.resumable(model))
    for other in ends[1:]:
        assert all(torch.equal(other[k], v) for k, v in ends[0].items())
    with pytest.raises(KeyError):
        adalora.resume(model, {k: v for k, v in saved.items() if "mean" not in k})
    with pytest.raises(ValueError):
        adalora.resume(model, {k: v[:1] for k, v in saved.items()})


def test_resumable_is_a_copy(trained):
    model, inputs = trained
    saved = adalora.resumable(model)
    before = {k: v.clone() for k, v in saved.items()}
    train(model, inputs, range(2))
    assert all(torch.equal(before[k], saved[k]) for k in saved)


def test_a_tied_weight_or_a_layer_held_twice_is_not_merged():
    layer = nn.Linear(6, 6)
    for model in (nn.ModuleDict({"a": layer, "b": layer}), build("llama", tie_word_embeddings=True)):
        adalora.attach(model, "a" if "a" in model._modules else "lm_head", total=9, r=2, target=1)
        with pytest.raises(ValueError, match="shared"):
            adalora.merge(model)
        assert adalora.sites(model)


# HF peft


@pytest.fixture(params=ARCHS)
def pair(request):
    """The same AdaLoRA twice: ours and HF peft's, in float32, alpha != r, off its start."""
    peft = pytest.importorskip("peft")
    base = build(request.param, torch.float32)
    ours, inputs = copy.deepcopy(base), batch(request.param)
    r, plan = 4, dict(total=22, warmup=3, final=6, every=2)
    alpha = 6.0 * r / (r + 1e-5)  # peft divides by r + 1e-5
    adalora.attach(ours, *LINEAR[request.param], r=r, target=2, alpha=alpha, gamma=0.0, **plan)
    perturb(ours)
    config = peft.AdaLoraConfig(
        init_r=r, target_r=2, lora_alpha=6.0, total_step=22, tinit=3, tfinal=6, deltaT=2,
        orth_reg_weight=0.0, target_modules=list(adalora.sites(ours)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(base, config).eval()
    peer, match = dict(theirs.named_parameters()), []
    for path, m in adalora.sites(ours).items():
        for p, name in ((m.P, "lora_B"), (m.lam, "lora_E"), (m.Q, "lora_A")):
            q = peer[f"base_model.model.{path}.{name}.default"]
            q.data.copy_(p.data.view_as(q))
            match.append((p, q))
    return ours, theirs, match, inputs


def close(a, b):
    torch.testing.assert_close(a, b.view_as(a), rtol=2e-6, atol=1e-6)


def test_same_logits_and_gradients_as_hf_peft(pair):
    ours, theirs, match, inputs = pair
    close(logits(ours, inputs), logits(theirs, inputs))
    for model in (ours, theirs):
        model(**inputs).loss.backward()
    for p, q in match:
        close(p.grad, q.grad)


def test_same_ranks_as_hf_peft_at_every_step(pair):
    ours, theirs, match, inputs = pair
    opts = [torch.optim.AdamW([p for p, _ in match], 0.01, eps=1e-4),
            torch.optim.AdamW([q for _, q in match], 0.01, eps=1e-4)]
    cuts = 0
    for step in range(22):
        for model, opt in zip((ours, theirs), opts, strict=True):
            opt.zero_grad()
            model(**inputs).loss.backward()
            opt.step()
        adalora.advance(ours, step)
        theirs.base_model.update_and_allocate(step)
        lams = [(p, q) for p, q in match if p.dim() == 1]
        assert all(torch.equal(p != 0, q[:, 0] != 0) for p, q in lams), step
        cuts += rank(ours) < 4 * len(lams)
    assert cuts >= 12 and rank(ours) == 2 * len(lams)
    torch.testing.assert_close(logits(ours, inputs), logits(theirs, inputs), rtol=2e-5, atol=2e-5)
