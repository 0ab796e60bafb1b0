"""MonteCLoRA against torch.distributions, closed forms and Hugging Face's variant."""

import copy
import math

import pytest
import torch
from tiny import batch, build, fit, logits, perturb
from torch import nn
from torch.distributions import Dirichlet, MultivariateNormal, Wishart, kl_divergence
from torch.nn import functional as F

from minipeft.reparam import lora, monteclora
from minipeft.reparam.monteclora import MonteCLoRALinear, _bartlett

TARGETS = ("q_proj", "v_proj", "down_proj")


def layer(d_in=12, d_out=7, r=4, dtype=torch.float64, seed=0, **kw):
    """One attached layer in train mode, moved off its initial values."""
    torch.manual_seed(seed)
    m = MonteCLoRALinear(nn.Linear(d_in, d_out, dtype=dtype), r=r, alpha=6.0, **{"eps": 0.1, **kw})
    m.base.requires_grad_(False)
    perturb(m)
    return m.train()


def draws(m, n=1000, seed=1):
    torch.manual_seed(seed)
    with torch.no_grad():
        return torch.stack([m.noise() for _ in range(n)])  # (n, r, d_in)


def square(a):
    """E||pi||^2 of a Dirichlet, from torch's own moments."""
    d = Dirichlet(a)
    return (d.variance + d.mean**2).sum()


# The layer


def test_train_mode_starts_at_the_base():
    base, inputs = build("llama"), batch("llama")
    model = copy.deepcopy(base)
    monteclora.attach(model, *TARGETS, r=3, alpha=6.0, eps=10.0)
    assert torch.equal(logits(model.train(), inputs), logits(base, inputs))
    perturb(model)
    assert not torch.equal(logits(model, inputs), logits(model, inputs))
    assert torch.equal(logits(model.eval(), inputs), logits(model, inputs))


@pytest.mark.parametrize("train", (True, False))
def test_without_noise_it_is_lora_bit_for_bit(train):
    m, x = layer(eps=0.0).train(train), torch.randn(5, 12).double()
    plain = lora.LoRALinear(m.base, r=4, alpha=6.0)
    plain.A, plain.B = m.A, m.B
    assert torch.equal(m(x), plain(x))


@pytest.mark.parametrize("kw", ({}, {"full": True}, {"logistic": True}, {"samples": 1}, {"r": 1}))
def test_the_loss_alone_trains_all_four_and_they_stay_the_same_objects(kw):
    m, x = layer(**kw), torch.randn(5, 12).double()
    ids = {n: id(p) for n, p in m.named_parameters()}
    for _ in range(10):
        y = m(x)
    y.square().sum().backward()
    assert {n: id(p) for n, p in m.named_parameters()} == ids
    for name in ("A", "B", "log_sigma", "log_alpha"):
        g = getattr(m, name).grad
        dead = name == "log_alpha" and kw.get("samples") == 1  # one weight is always 1
        assert g.isfinite().all() and bool(g.any()) != dead
    assert m.base.weight.grad is None


def test_it_adds_r_plus_n_numbers_to_lora():
    m, plain = layer(samples=5), lora.LoRALinear(nn.Linear(12, 7), r=4, alpha=6.0)
    count = [sum(p.numel() for p in x.parameters()) for x in (m, plain)]
    assert count[0] - count[1] == 4 + 5


def test_the_mean_output_is_loras():
    m, x = layer(r=3, samples=3), torch.randn(5, 12).double()
    torch.manual_seed(1)
    with torch.no_grad():
        y = torch.stack([m(x) for _ in range(1500)])
        z = (y.mean(0) - m.eval()(x)) / (y.std(0) / len(y) ** 0.5)
    assert z.abs().max() < 5


def test_a_squared_loss_grows_by_exactly_the_variance():
    m, x, t = layer(), torch.randn(5, 12).double(), torch.randn(5, 7).double()
    with torch.no_grad():
        y = torch.stack([m.base(x) + x @ (m.A + n).T @ m.B.T * m.s for n in draws(m)])
        gain = (y - t).square().mean(0) - (y.mean(0) - t).square()
    torch.testing.assert_close(gain, y.var(0, unbiased=False))
    assert gain.min() > 0


@pytest.mark.parametrize("whole", (False, True))
def test_it_trains_in_bfloat16(whole):
    model, inputs = build("llama", dtype=torch.bfloat16), batch("llama")
    monteclora.attach(model, *TARGETS, r=3, eps=0.1)
    if whole:
        model.to(torch.bfloat16)  # the factors too
    before = monteclora.state(model)
    fit(monteclora, model.train(), inputs, lr=0.1)
    after = monteclora.state(model)
    moved = [k for k in after if not k.endswith(".s")]
    assert all(after[k].isfinite().all() and not torch.equal(before[k], after[k]) for k in moved)
    before = logits(model.eval(), inputs)
    monteclora.merge(model)
    assert (logits(model, inputs) - before).abs().max() < 0.1 * before.abs().max()


def test_checkpointing_draws_the_same_noise_again():
    grads = []
    for on in (False, True):
        model, inputs = build("llama"), batch("llama")
        monteclora.attach(model, *TARGETS, r=3, eps=0.5)
        perturb(model)
        if on:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(7)
        model.train()(**inputs, use_cache=False).loss.backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("kw", ({"r": 0}, {"r": 99}, {"samples": 0}, {"eps": -1.0}))
def test_bad_settings_are_refused_before_anything_changes(kw):
    model = build("llama")
    with pytest.raises(ValueError, match=next(iter(kw))):
        monteclora.attach(model, *TARGETS, **kw)
    assert not monteclora.sites(model) and all(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="attach"):
        monteclora.penalty(model)


# Three identities


@pytest.mark.parametrize("n", (1, 2, 4, 16))
def test_identity_1_an_average_of_n_draws_is_one_scaled_draw(n):
    torch.manual_seed(n)
    pi = Dirichlet(torch.ones(n).double()).sample()
    L = torch.randn(3, 3).double().tril(-1) + torch.eye(3)
    Z = MultivariateNormal(torch.zeros(3).double(), scale_tril=L).sample((20000, n))
    slow = torch.einsum("n,knr->kr", pi, Z)
    torch.testing.assert_close(slow.T.cov(), pi.square().sum() * (L @ L.T), rtol=0.05, atol=0.05)
    kurtosis = ((slow - slow.mean(0)) / slow.std(0)).pow(4).mean(0)
    assert (kurtosis - 3).abs().max() < 0.2  # Gaussian: nothing is picked, so it is no mixture


def test_identity_1_holds_for_the_layer():
    m = layer(samples=3, r=2)
    a, sigma = m.log_alpha.detach().exp(), m.log_sigma.detach().exp()
    torch.manual_seed(2)
    var = Wishart(2.0, torch.eye(2).double()).sample((20000,)).diagonal(dim1=1, dim2=2) * sigma**2
    Z = var.sqrt()[:, None] * torch.randn(20000, 3, 2).double()
    slow = 0.1 * torch.einsum("kn,knr->kr", Dirichlet(a).sample((20000,)), Z)
    fast = draws(m, 6000)[:, :, 0]
    for moment in (2, 4):
        torch.testing.assert_close(fast.abs().pow(moment / 2).mean(0), slow.abs().pow(moment / 2).mean(0),
                                   rtol=0.12, atol=0)
    for q in (0.1, 0.3, 0.6, 0.9, 0.99):
        torch.testing.assert_close(fast.quantile(q, 0), slow.quantile(q, 0), rtol=0.12, atol=0.02)


def test_identity_2_the_diagonal_of_a_wishart_is_independent_chi2():
    torch.manual_seed(0)
    r = 5
    L = torch.stack([_bartlett(torch.ones(r).double()) for _ in range(5000)])
    W, ours = L @ L.mT, Wishart(float(r), torch.eye(r).double())
    assert torch.equal(L, L.tril()) and (L.diagonal(dim1=1, dim2=2) > 0).all()
    torch.testing.assert_close(W.mean(0), ours.mean, rtol=0.03, atol=0.1)
    torch.testing.assert_close(W.var(0), ours.variance, rtol=0.1, atol=0)
    d = W.diagonal(dim1=1, dim2=2)
    assert (d.T.corrcoef() - torch.eye(r)).abs().max() < 0.06
    chi2 = torch.distributions.Chi2(torch.tensor(float(r)).double()).sample((20000,))
    for q in (0.1, 0.5, 0.9):
        torch.testing.assert_close(d.quantile(q, 0), chi2.quantile(q).expand(r), rtol=0.12, atol=0)


@pytest.mark.parametrize("n", (1, 4, 16))
def test_identity_3_the_variance_of_the_noise(n):
    m = layer(d_out=9, r=8, samples=n)
    want = 0.1**2 * 8 * m.log_sigma.exp().square() * square(m.log_alpha.exp())
    got = draws(m, 2500).square().mean((0, 2))
    torch.testing.assert_close(got, want, rtol=0.12, atol=0)
    scaled = copy.deepcopy(m)
    scaled.eps = 0.2
    torch.testing.assert_close(draws(scaled, 9), 2 * draws(m, 9))


def test_identity_3_noise_is_a_scale_mixture_correlated_within_a_row():
    noise = draws(layer(r=2), 4000)[:, 0]  # (n, d_in), one row of A
    kurtosis = (noise / noise.std()).pow(4).mean()
    assert kurtosis > 4
    size = noise.square()
    assert size.T.corrcoef().fill_diagonal_(1).min() > 0.1 and noise.T.corrcoef().triu(1).abs().max() < 0.1


@pytest.mark.parametrize("full", (False, True))
def test_full_keeps_the_covariance_between_rows(full):
    m = layer(d_in=4000, d_out=5, r=3, full=full)
    torch.manual_seed(3)
    rows = m.noise().detach()
    off = (rows.corrcoef() - torch.eye(3)).abs().max()
    assert off > 0.2 if full else off < 0.06


def test_the_gradient_of_a_draw_is_the_gradient_of_the_moment():
    m = layer(r=3, samples=3, d_in=64)
    torch.manual_seed(4)
    for _ in range(1500):
        (m.noise().square().sum() / 1500).backward()
    a, log_sigma = (p.detach().clone().requires_grad_() for p in (m.log_alpha, m.log_sigma))
    (0.1**2 * 3 * log_sigma.exp().square().sum() * 64 * square(a.exp())).backward()
    torch.testing.assert_close(m.log_sigma.grad, log_sigma.grad, rtol=0.1, atol=0)
    torch.testing.assert_close(m.log_alpha.grad, a.grad, rtol=0.1, atol=0.05 * a.grad.abs().max().item())
    assert m.A.grad is None


# The penalty


@pytest.mark.parametrize("n", (1, 2, 4, 7, 256))
@pytest.mark.parametrize("prior", (0.1, 1.0, 3.0))
def test_the_divergences_are_torchs(n, prior):
    m = layer(r=3, samples=n, dtype=torch.float64 if n < 256 else torch.float32)
    m.log_sigma.data -= 1
    kl_d, kl_w, kl_g, coop = m.divergences(prior)
    a, sigma = m.log_alpha.exp(), m.log_sigma.exp()
    want = kl_divergence(Dirichlet(a), Dirichlet(torch.full_like(a, prior))) if n > 1 else kl_d * 0
    torch.testing.assert_close(kl_d, want)
    V = Wishart(3.0, (sigma**2).diag()), Wishart(3.0, torch.eye(3).to(sigma))
    torch.testing.assert_close(kl_w, kl_divergence(*V))
    torch.testing.assert_close(coop, square(a) if n > 1 else torch.ones_like(coop))
    assert kl_d > -1e-9 and kl_w > 0 and kl_g > 0


@pytest.mark.parametrize("full", (False, True))
def test_the_gaussian_divergence_is_the_mean_over_draws(full):
    m = layer(r=3, samples=2, full=full)
    zero, one = torch.zeros(3).double(), torch.eye(3).double()
    torch.manual_seed(5)
    S = Wishart(3.0, m.log_sigma.exp().square().diag()).sample((20000,))
    S = S if full else S * one
    want = 2 * kl_divergence(MultivariateNormal(zero, S), MultivariateNormal(zero, one)).mean()
    torch.testing.assert_close(m.divergences()[2], want, rtol=0.02, atol=0)


def test_each_divergence_is_zero_at_its_reference_and_coop_is_flat_at_uniform_weights():
    m = layer(r=3, samples=5)
    m.log_sigma.data.zero_()
    m.log_alpha.data.fill_(0.4)
    kl_d, kl_w, *_ = m.divergences(prior=m.log_alpha.exp()[0].item())
    assert abs(kl_d) < 1e-12 and abs(kl_w) < 1e-12
    pi = torch.full((5,), 0.2, requires_grad=True)
    pi.square().sum().backward()
    assert (pi.grad - pi.grad.mean()).abs().max() == 0  # along the simplex


@pytest.mark.parametrize("r, n, where", ((8, 4, 0.3), (32, 4, 0.225), (16, 8, 0.1667)))
def test_the_two_covariance_terms_meet_between_their_optima(r, n, where):
    m = layer(d_in=40, d_out=40, r=r, samples=n)
    best = (r + n) / (r * (1 + n))
    assert abs(best - where) < 1e-3
    m.log_sigma.data.fill_(0.5 * math.log(best))
    _, kl_w, kl_g, _ = m.divergences()
    (kl_w + kl_g).backward()
    assert m.log_sigma.grad.abs().max() < 1e-9


def test_the_penalty_is_a_mean_over_sites_and_depends_on_sigma_and_alpha_only():
    model = build("llama")
    monteclora.attach(model, *TARGETS, r=3, samples=4)
    perturb(model)
    got = monteclora.penalty(model, kl=0.1, coop=2.0, prior=0.5)
    each = [m.divergences(0.5) for m in monteclora.sites(model).values()]
    want = sum(0.1 * (d + w + g) + 2.0 * c for d, w, g, c in each) / len(each)
    torch.testing.assert_close(got, want)
    got.backward()
    reached = {n.rpartition(".")[2] for n, p in model.named_parameters() if p.grad is not None}
    assert reached == {"log_sigma", "log_alpha"}
    assert torch.equal(monteclora.penalty(model.train()), monteclora.penalty(model.eval()))


# Hugging Face's variant


def hf(model, r=3, samples=4):
    peft = pytest.importorskip("peft")
    mc = peft.MontecloraConfig(num_samples=samples, sample_scaler=0.1, buffer_size=4)
    config = peft.LoraConfig(r=r, lora_alpha=6, target_modules=list(TARGETS), monteclora_config=mc)
    return peft.get_peft_model(model, config)


def test_evaluation_and_merge_equal_hugging_faces():
    theirs = hf(build("llama", dtype=torch.float32))
    mine, inputs = build("llama", dtype=torch.float32), batch("llama")
    monteclora.attach(mine, *TARGETS, r=3, alpha=6.0, eps=0.1)
    perturb(mine)
    for path, m in monteclora.sites(mine).items():
        other = theirs.base_model.model.get_submodule(path)
        other.lora_A["default"].weight.data.copy_(m.A)
        other.lora_B["default"].weight.data.copy_(m.B)
    assert torch.equal(logits(mine, inputs), logits(theirs.eval(), inputs))
    monteclora.merge(mine)
    merged = theirs.merge_and_unload()
    for (name, p), (other, q) in zip(mine.named_parameters(), merged.named_parameters(), strict=True):
        assert name == other
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


@pytest.fixture
def sampler():
    """Theirs and mine with the same sigma and alpha."""
    theirs = hf(build("llama", dtype=torch.float32))
    s = next(m for n, m in theirs.named_modules() if n.endswith("monteclora_sampler.default"))
    m = layer(d_in=24, r=3, samples=4, dtype=torch.float32, logistic=True)
    m.log_sigma.data.copy_(s.std_prior)
    m.log_alpha.data.copy_(s.expert_weights_prior)
    return s.train(), m


def test_one_draw_equals_hugging_faces(sampler, monkeypatch):
    theirs, mine = sampler
    z, L = torch.randn(4), _bartlett(torch.ones(3))
    monkeypatch.setattr(torch, "randn_like", lambda t: z)
    logits = theirs.dirichlet_reparameterization(mine.log_alpha.exp(), z)
    torch.testing.assert_close(mine.mixture(), logits.softmax(0), rtol=1e-4, atol=1e-6)
    S = theirs.wishart_reparameterization(mine.log_sigma.exp().diag(), L @ L.T)
    torch.testing.assert_close((mine.log_sigma.exp()[:, None] * L).norm(dim=1) ** 2, S.diag())


def test_their_wishart_term_is_right_and_their_dirichlet_term_is_not(sampler):
    theirs, mine = sampler
    kl_d, kl_w, *_ = mine.divergences(prior=theirs.dirichlet_prior)
    torch.testing.assert_close(theirs.wishart_kl(mine.log_sigma.exp().diag()), kl_w)
    wrong = theirs.dirichlet_kl(mine.log_alpha.exp())
    assert wrong < 0 < kl_d
    torch.testing.assert_close(wrong, released_kl(mine.log_alpha.exp(), 0.1))


# What the released repository does


def released_kl(a, prior):
    """The KL of two Dirichlets with the sign of its middle sum turned, as three public codes have it."""
    b = torch.full_like(a, prior)
    gamma = lambda x: x.lgamma().exp()
    return (gamma(a.sum()) / gamma(b.sum())).log() + (gamma(a) / gamma(b)).log().sum() + (
        (a - b) * (a.digamma() - a.sum().digamma())).sum()


@pytest.mark.parametrize("a, prior, wrong, right", (
    ((0.8, 1.2, 2.0, 2.0, 2.5), 0.1, -16.3, 5.55),
    ((1.2, 1.5, 1.1, 2.0), 0.1, -14.5, 4.02),
    ((0.5,) * 4, 1.0, 5.27, 0.691),
    ((1.5,) * 4, 1.0, -0.827, 0.140),
))
def test_the_released_divergence_is_wrong_and_ours_is_not(a, prior, wrong, right):
    a = torch.tensor(a).double()
    m = layer(samples=len(a))
    m.log_alpha.data.copy_(a.log())
    assert abs(released_kl(a, prior) - wrong) < 0.05
    assert abs(m.divergences(prior)[0] - right) < 0.01


def test_the_released_divergence_overflows():
    a = torch.full((40,), 1.5)
    assert not released_kl(a, 1.0).isfinite()
    m = layer(samples=40, dtype=torch.float32)
    m.log_alpha.data.copy_(a.log())
    assert m.divergences(1.0)[0].isfinite()


def released_forward(m, x):
    """The released layer: the noisy A becomes the parameter."""
    m.A = nn.Parameter((m.A + m.noise()).detach())
    return m.base(x) + F.linear(F.linear(x, m.A), m.B) * m.s


@pytest.mark.parametrize("released", (True, False))
def test_a_parameter_made_in_every_forward_is_never_trained(released):
    m, x = layer(eps=1e-3), torch.randn(5, 12).double()
    first = m.A
    start = first.detach().clone()
    opt = torch.optim.SGD(m.parameters(), lr=0.01)
    for _ in range(20):
        opt.zero_grad()
        y = released_forward(m, x) if released else m(x)
        y.square().mean().backward()
        opt.step()
    assert torch.equal(first, start) == released  # the optimiser holds the first A
    assert (m.A is not first) == released
    assert (m.log_sigma.grad is None) == released  # no task gradient for the sampler either


def test_the_released_noise_accumulates():
    m, x = layer(d_in=400, eps=1e-3), torch.randn(2, 400).double()
    start, one = m.A.detach().clone(), draws(m, 200).std()
    torch.manual_seed(6)
    for _ in range(100):
        released_forward(m, x)
    drift = (m.A - start).std() / one
    assert 7 < drift < 13  # sqrt(100): a random walk
