"""A base in four bits. Its arithmetic is that of qlora.py, copied and compared: see test_qlora.py."""

import copy
import runpy

import pytest
import torch
from tiny import ARCHS, LINEAR, batch, build, logits
from torch import nn

from minipeft.reparam import lora, nf4, qlora


@pytest.fixture(params=ARCHS)
def arch(request):
    return request.param


def rounded(model, paths):
    model = copy.deepcopy(model)
    with torch.no_grad():
        for p in paths:
            W = model.get_submodule(p).weight
            packed, absmax = qlora.quantise(W)
            W.copy_(qlora.dequantise(packed, qlora.unsqueeze(*qlora.squeeze(absmax)), W.shape, W.dtype))
    return model


def test_attach_rounds_and_detach_keeps_what_was_rounded(arch):
    base, inputs = build(arch), batch(arch)
    model = copy.deepcopy(base)
    paths = nf4.attach(model, *LINEAR[arch])
    assert paths == list(nf4.sites(model)) and not any(p.requires_grad for p in model.parameters())
    want = rounded(base, paths)
    assert torch.equal(logits(model, inputs), logits(want, inputs))
    nf4.detach(model)
    assert not nf4.sites(model) and model.state_dict().keys() == base.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), want.state_dict().values()))


def test_what_trains_above_and_below_it_gets_the_gradient_of_the_rounded_model():
    model, inputs = build("llama"), batch("llama")
    paths = nf4.attach(model, "down_proj")
    plain = rounded(build("llama"), paths)
    for m in (model, plain):
        torch.manual_seed(0)
        lora.attach(m, "q_proj", r=2)
        for site in lora.sites(m).values():
            torch.nn.init.normal_(site.B)
        m(**inputs).loss.backward()
    for a, b in zip(lora.sites(model).values(), lora.sites(plain).values(), strict=True):
        assert torch.equal(a.A.grad, b.A.grad) and a.A.grad.any()


def test_a_refused_call_changes_nothing():
    model = build("gpt2")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for targets, words in ((("c_attn", "nope"), "nope"), (("c_attn", "lm_head"), "untie"), (("ln_1",), "LayerNorm")):
        with pytest.raises(ValueError, match=words):
            nf4.attach(model, *targets)
    assert not nf4.sites(model) and all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_freeze_false_leaves_the_rest_trainable():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    nf4.attach(model, "1", freeze=False)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["0.weight", "0.bias", "1.bias"]
    model(torch.randn(3, 8)).sum().backward()
    assert model[0].weight.grad.any() and model[1].bias.grad.any()


def test_the_file_stands_alone(capsys, tmp_path, monkeypatch):
    source = open(nf4.__file__).read()
    assert "minipeft" not in source and len(source.splitlines()) <= 260
    (tmp_path / "copied.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    runpy.run_path("copied.py", run_name="__main__")
    assert capsys.readouterr().out == "nf4: ok\n"
    parts = [nf4.__doc__.find(f"\n{p}") for p in ("Paper", "Idea", "Math", "Steps", "Cost", "Differs", "Pitfalls")]
    assert parts == sorted(parts) and parts[0] > 0
