"""The paged optimiser. What needs CUDA is skipped without it."""

import copy
import runpy

import pytest
import torch
from torch import nn

from minipeft.reparam import paged

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def run(make, paging, steps=4):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2)).to(DEVICE)
    opt, x = make(model.parameters()), torch.randn(6, 5).to(DEVICE)
    hooks = paged.attach(opt, pretend=True) if paging else []
    for _ in range(steps):
        opt.zero_grad()
        model(x).square().sum().backward()
        opt.step()
    return model, opt, hooks


@pytest.mark.parametrize("make", (
    lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
    lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True, amsgrad=True),
    lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    lambda p: torch.optim.SGD(p, lr=0.1),  # no state at all
))
def test_every_number_is_the_same(make):
    (one, a, _), (two, b, hooks) = run(make, False), run(make, True)
    assert len(hooks) == 2
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(p, q)
        for name, t in a.state[p].items():
            assert t is None or torch.equal(t.cpu(), b.state[q][name].cpu())


def test_the_state_is_used_only_during_the_step():
    _, opt, _ = run(torch.optim.AdamW, True)
    outside = {t.data_ptr() for s in opt.state.values() for t in s.values() if t.dim()}
    seen = []
    before = opt.register_step_pre_hook(
        lambda o, a, k: seen.extend(t for s in o.state.values() for t in s.values() if t.dim()))
    opt.step()
    before.remove()
    assert seen and not outside & {t.data_ptr() for t in seen}  # a copy works; the page waits
    assert outside == {t.data_ptr() for s in opt.state.values() for t in s.values() if t.dim()}


def test_a_state_that_exists_is_paged_and_given_back():
    _, opt, _ = run(torch.optim.AdamW, False)
    saved = copy.deepcopy(opt.state_dict())
    hooks = paged.attach(opt, pretend=True)
    now = opt.state_dict()["state"]
    assert all(torch.equal(t, now[i][n].to(t.device)) for i, s in saved["state"].items() for n, t in s.items())
    opt.load_state_dict(saved)
    opt.step()
    paged.detach(opt, hooks)
    assert not opt._optimizer_step_pre_hooks and not opt._optimizer_step_post_hooks
    assert all(t.device.type == DEVICE for s in opt.state.values() for t in s.values() if t.dim())


@pytest.mark.skipif(DEVICE == "cuda", reason="says so only without CUDA")
def test_without_cuda_it_says_what_it_does_instead():
    _, opt, _ = run(torch.optim.AdamW, False)
    before = paged.held(opt)
    with pytest.warns(UserWarning, match="not paged"):
        assert paged.attach(opt) == []
    assert paged.held(opt) == before == {"cpu": 8 * 34 + 4 * 4}


@pytest.mark.skipif(DEVICE == "cpu", reason="needs CUDA")
def test_on_cuda_the_state_waits_in_pinned_memory():
    _, opt, _ = run(torch.optim.AdamW, True)
    assert paged.held(opt) == {"pinned": 8 * 34, "cpu": 4 * 4}


def test_the_file_stands_alone(capsys):
    runpy.run_path(paged.__file__, run_name="__main__")
    assert capsys.readouterr().out == "paged: ok\n"
