"""FISH Mask: the Fisher information against closed forms, and the mask that follows from it."""

import copy
from types import SimpleNamespace

import pytest
import torch
from tiny import batch, build
from torch import nn
from torch.nn import functional as F

from minipeft.selective import fish_mask


class Softmax(nn.Module):
    """Linear softmax, whose Fisher information is known."""

    def __init__(self, d=6, classes=4):
        super().__init__()
        torch.manual_seed(0)
        self.out = nn.Linear(d, classes, bias=False).double()

    def forward(self, x, labels):
        logits = self.out(x)
        return SimpleNamespace(logits=logits, loss=F.cross_entropy(logits, labels))


def data(n=12, d=6, classes=4):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(n, d, generator=g, dtype=torch.float64)
    return dict(x=x, labels=torch.randint(0, classes, (n,), generator=g))


def fisher(model, batches, **more):
    return fish_mask.fisher(model, {"out.weight": model.out.weight}, batches, **more)["out.weight"]


def test_empirical_closed_form():
    model, b = Softmax(), data()
    p = model.out(b["x"]).softmax(-1)
    exact = (F.one_hot(b["labels"], 4) - p).square().T @ b["x"].square() / 12
    torch.testing.assert_close(fisher(model, [b], kind="empirical"), exact.detach(), rtol=1e-9, atol=1e-14)


def test_true_closed_form_and_its_error_shrinks_as_one_over_root_n():
    model, b = Softmax(), data()
    p = model.out(b["x"]).softmax(-1).detach()
    exact = (p * (1 - p)).T @ b["x"].square() / 12

    def error(n):  # relative to the exact value, over ten seeds
        gaps = [(fisher(model, [b], samples=n, seed=s) / exact - 1).square().mean() for s in range(10)]
        return torch.stack(gaps).mean().sqrt().item()

    few, many = error(24), error(24 * 16)
    assert many < 0.2
    assert few / many == pytest.approx(4, rel=0.35)


def test_per_example_and_not_per_batch():
    model, b = Softmax(), data()
    singles = [{k: v[i : i + 1] for k, v in b.items()} for i in range(12)]
    whole = fisher(model, [b], kind="empirical")
    torch.testing.assert_close(fisher(model, singles, kind="empirical"), whole)
    torch.testing.assert_close(fisher(model, singles[::-1], kind="empirical"), whole)
    (g,) = torch.autograd.grad(model(**b).loss, model.out.weight)
    assert not torch.allclose(g.square(), whole, rtol=0.5)


def test_wrong_labels_show_the_difference_of_the_two():
    model, b = Softmax(), data()
    with torch.no_grad():
        model.out.weight.mul_(200)
    sure = model.out(b["x"]).argmax(-1)
    right, wrong = {**b, "labels": sure}, {**b, "labels": (sure + 1) % 4}
    assert fisher(model, [right], kind="empirical").max() < 1e-3 * fisher(model, [wrong], kind="empirical").max()
    assert torch.equal(fisher(model, [wrong], kind="true"), fisher(model, [right], kind="true"))


def test_half_of_the_fisher_form_is_the_limit_of_the_divergence():
    model, b = Softmax(), data()
    W = model.out.weight.detach()
    p = model.out(b["x"]).softmax(-1).detach()
    d = torch.randn(W.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    along = b["x"] @ d.T  # change of the logits, (n, classes)
    form = ((p * along.square()).sum(-1) - (p * along).sum(-1).square()).mean()  # d' F d, F in full
    ratio = []
    for scale in (1e-1, 1e-2, 1e-3):
        q = F.log_softmax(b["x"] @ (W + scale * d).T, -1)
        ratio.append(((p * (p.log() - q)).sum(-1).mean() / (scale**2 * form)).item())
    assert ratio[-1] == pytest.approx(0.5, abs=1e-3)
    assert abs(ratio[1] - 0.5) < abs(ratio[0] - 0.5)


@pytest.mark.parametrize("arch", ("gpt2", "bert", "t5", "llama"))
def test_the_empirical_scores_of_a_transformer(arch):
    model, inputs = build(arch), batch(arch)
    tensors = dict(model.named_parameters())
    got = fish_mask.fisher(model, tensors, [inputs], kind="empirical")
    want = {n: torch.zeros_like(p) for n, p in tensors.items()}
    for i in range(3):
        grads = torch.autograd.grad(model(**{k: v[i : i + 1] for k, v in inputs.items()}).loss,
                                    list(tensors.values()), allow_unused=True)
        for (n, w), g in zip(want.items(), grads, strict=True):
            w += 0 if g is None else g.square() / 3
    for n in want:
        torch.testing.assert_close(got[n], want[n], rtol=1e-8, atol=1e-14, msg=n)


@pytest.mark.parametrize("arch", ("gpt2", "t5", "bert"))
def test_the_drawn_labels_stand_where_the_model_puts_them(arch, monkeypatch):
    """Where every draw is the most likely label, the true Fisher is the empirical one of those labels."""
    monkeypatch.setattr(torch, "multinomial", lambda p, n, generator: p.argmax(-1, keepdim=True))
    model, inputs = build(arch), batch(arch)
    if arch == "t5":  # its decoder reads the labels: both must read the same ones
        inputs["decoder_input_ids"] = model._shift_right(inputs["labels"])
    sure, labels = model(**inputs).logits.argmax(-1), inputs["labels"].clone()
    if arch == "gpt2":
        labels[:, 1:] = sure[:, :-1].where(labels[:, 1:] != -100, labels[:, 1:])
    else:
        labels = sure
    assert not torch.equal(labels, inputs["labels"])
    tensors = dict(model.named_parameters())
    true = fish_mask.fisher(model, tensors, [inputs])
    given = fish_mask.fisher(model, tensors, [dict(inputs, labels=labels)], kind="empirical")
    for n in true:  # transformers' language models take their loss in float32
        torch.testing.assert_close(true[n], given[n], rtol=1e-4, atol=1e-9, msg=n)


def test_one_top_k_for_the_whole_model():
    model, inputs = build("bert"), batch("bert")
    scores = fish_mask.fisher(model, dict(model.named_parameters()), [inputs], seed=5)
    fish_mask.attach(model, budget=333, batches=[inputs], seed=5)
    sites = fish_mask.sites(model)
    inside = torch.cat([scores[n].view(-1)[m.idx.long()] for n, m in sites.items()])
    for n, m in sites.items():
        scores[n].view(-1)[m.idx.long()] = -1
    assert inside.numel() == 333
    assert inside.min() >= max(v.max() for v in scores.values())


def test_scaling_the_loss_keeps_the_mask_and_squares_into_the_score():
    model, b = Softmax(), data()
    one = fisher(model, [b], loss=F.cross_entropy)
    two = fisher(model, [b], loss=lambda z, y: 3 * F.cross_entropy(z, y))
    torch.testing.assert_close(two, 9 * one)
    torch.testing.assert_close(one, fisher(model, [b]))


def test_samples_count_examples_and_go_round():
    model, b = Softmax(), data()
    first = {k: v[:5] for k, v in b.items()}
    torch.testing.assert_close(fisher(model, [b], samples=5, kind="empirical"),
                               fisher(model, [first], kind="empirical"))
    torch.testing.assert_close(fisher(model, [b], samples=24, kind="empirical"),
                               fisher(model, [b], kind="empirical"))


def test_measuring_leaves_no_trace():
    model, inputs = build("gpt2").train(), batch("gpt2")
    model.transformer.h[0].requires_grad_(False)
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    before, flags = copy.deepcopy(model.state_dict()), [p.requires_grad for p in model.parameters()]
    fish_mask.fisher(model, {"ln": model.transformer.ln_f.weight}, [inputs])
    with pytest.raises(ValueError):  # in the middle of it
        fish_mask.fisher(model, {"ln": model.transformer.ln_f.weight}, [inputs],
                         loss=lambda z, y: (_ for _ in ()).throw(ValueError("stop")))
    assert flags == [p.requires_grad for p in model.parameters()] and model.training
    assert (model.lm_head.weight.grad == 1).all() and model.transformer.ln_f.weight.grad is None
    assert not model.transformer.ln_f.weight._post_accumulate_grad_hooks
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_half_precision_is_summed_in_float32():
    model, inputs = build("bert", dtype=torch.bfloat16), batch("bert")
    scores = fish_mask.fisher(model, dict(model.named_parameters()), [inputs])
    assert all(v.dtype == torch.float32 for v in scores.values())


def test_a_regression_cannot_draw_and_says_so():
    model = build("bert", num_labels=1)
    inputs = dict(batch("bert"), labels=torch.randn(3, dtype=torch.float64))
    with pytest.raises(ValueError, match="cross-entropy"):
        fish_mask.attach(model, budget=5, batches=[inputs])
    fish_mask.attach(model, budget=5, batches=[inputs], kind="empirical")


def test_settings_outside_the_list_are_refused():
    model, inputs = build("bert"), batch("bert")
    for bad in (dict(kind="both"), dict(samples=0), dict(batches=[])):
        with pytest.raises(ValueError):
            fish_mask.attach(model, **{**dict(budget=5, batches=[inputs]), **bad})
    assert all(p.requires_grad for p in model.parameters())


def test_dropout_is_off_while_measuring():
    model, inputs = build("bert"), batch("bert")
    assert any(m.p > 0 for m in model.modules() if isinstance(m, nn.Dropout))
    tensors = dict(model.named_parameters())
    still = fish_mask.fisher(model.eval(), tensors, [inputs], kind="empirical")
    again = fish_mask.fisher(model.train(), tensors, [inputs], kind="empirical")
    assert all(torch.equal(still[n], again[n]) for n in tensors)
