"""LoRA+ is a list of parameter groups: who is in them, at which rate, with which decay."""

import copy
import pathlib
import runpy
import sys
import warnings

import pytest
import torch
from tiny import ARCHS, LINEAR, batch, build, fit
from torch import nn

from minipeft.reparam import adalora, dora, lora, lora_plus

FILE = pathlib.Path(lora_plus.__file__)


def ready(arch, method=lora, **more):
    torch.manual_seed(3)
    model = build(arch)
    method.attach(model, *LINEAR[arch], r=2, alpha=6.0, **more)
    return model, batch(arch)


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def step(model, inputs, opt, n=1):
    for _ in range(n):
        opt.zero_grad()
        model(**inputs).loss.backward()
        opt.step()


@pytest.mark.parametrize("arch", ARCHS)
def test_ratio_one_is_lora_step_for_step(arch):
    (plus, inputs), (plain, _) = ready(arch), ready(arch)
    step(plus, inputs, torch.optim.AdamW(lora_plus.groups(plus, 0.02, 1), weight_decay=0.1), 4)
    fit(lora, plain, inputs, steps=4, lr=0.02)
    assert all(torch.equal(a, b) for a, b in zip(plus.parameters(), plain.parameters(), strict=True))


@pytest.mark.parametrize("arch", ARCHS)
def test_at_first_only_b_moves_and_ratio_times_as_far(arch):
    moved = []
    for ratio in (1, 7):
        model, inputs = ready(arch)
        before = lora.state(model)
        step(model, inputs, torch.optim.Adam(lora_plus.groups(model, 1e-3, ratio)))
        after = lora.state(model)
        assert all(torch.equal(after[k], v) for k, v in before.items() if not k.endswith(".B"))
        moved.append({k: v - before[k] for k, v in after.items() if k.endswith(".B")})
    assert all(v.any() for v in moved[0].values())
    for k, v in moved[0].items():
        torch.testing.assert_close(7 * v, moved[1][k])


@pytest.mark.parametrize("method", [lora, dora])
def test_the_groups_partition_what_trains_and_only_b_is_fast(method):
    model, _ = ready("bert", method)
    model.classifier.requires_grad_(True)  # a head and its bias
    slow, fast = lora_plus.groups(model, 0.5, 4)
    assert (slow["lr"], fast["lr"]) == (0.5, 2.0)
    assert sorted(map(id, slow["params"] + fast["params"])) == sorted(map(id, trained(model)))
    assert set(fast["params"]) == {m.B for m in method.sites(model).values()}
    if method is dora:  # the authors' code puts every vector into the fast group
        assert {m.m for m in dora.sites(model).values()} <= set(slow["params"])


def test_names_are_own_names_and_never_substrings():
    model = nn.ModuleDict({"Big": nn.Linear(3, 2), "lora_Base": nn.Linear(3, 2)})
    with pytest.raises(ValueError, match="named B or lora_B"):
        lora_plus.groups(model, 0.1)
    groups = lora_plus.groups(model, 0.1, 2, fast=("Big",))
    assert [len(g["params"]) for g in groups] == [2, 2]


def test_weight_decay_is_the_optimisers():
    """HF peft's helper overrides a plain weight_decay with 0."""
    model, _ = ready("llama")
    opt = torch.optim.AdamW(lora_plus.groups(model, 0.1), weight_decay=0.3)
    assert [g["weight_decay"] for g in opt.param_groups] == [0.3, 0.3]


def test_given_groups_keep_their_settings():
    model, _ = ready("bert", dora)
    vectors = [p for p in trained(model) if p.dim() == 1]
    rest = [p for p in trained(model) if p.dim() > 1]
    given = [{"params": iter(rest), "weight_decay": 0.3}, {"params": vectors, "weight_decay": 0.0, "lr": 5.0}]
    groups = lora_plus.groups(model, 0.1, 4, given=given)
    assert [(g["lr"], g["weight_decay"]) for g in groups] == [(0.1, 0.3), (0.4, 0.3), (5.0, 0.0)]
    assert sum(len(g["params"]) for g in groups) == len(trained(model))
    assert "lr" not in given[0]
    torch.optim.AdamW(groups)


def test_given_groups_that_are_no_partition_are_refused():
    model, _ = ready("llama")
    p, frozen = trained(model), next(q for q in model.parameters() if not q.requires_grad)
    for given in (p[1:], [*p, p[0]], [*p, frozen]):
        with pytest.raises(ValueError, match="each once"):
            lora_plus.groups(model, 0.1, given=[{"params": given}])
    assert len(lora_plus.groups(model, 0.1, given=[{"params": p[1:]}, {"params": p[0]}])) == 3


@pytest.mark.parametrize("bad", [{"lr": 0.0}, {"lr": 0.1, "ratio": 0.5}])
def test_rates_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match="expected"):
        lora_plus.groups(ready("llama")[0], **bad)


def test_a_method_without_b_is_refused():
    model, _ = ready("llama", adalora, total=9, target=1)
    with pytest.raises(ValueError, match="named B"):
        lora_plus.groups(model, 0.1)


def test_a_scheduler_multiplies_all_groups():
    model, inputs = ready("llama")
    opt = torch.optim.AdamW(lora_plus.groups(model, 0.1, 8))
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda t: 0.5**t)
    for t in range(1, 4):
        step(model, inputs, opt)
        scheduler.step()
        assert [g["lr"] for g in opt.param_groups] == [0.1 * 0.5**t, 0.8 * 0.5**t]


def test_the_same_sets_as_hf_peft():
    peft, optimizers = pytest.importorskip("peft"), pytest.importorskip("peft.optimizers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"])
        model = peft.get_peft_model(build("llama"), config)
        theirs = optimizers.create_loraplus_optimizer(
            model, torch.optim.AdamW, lr=0.1, loraplus_lr_ratio=8)
    want = {rate: {id(p) for g in theirs.param_groups if g["lr"] == rate for p in g["params"]}
            for rate in (0.1, 0.8)}
    assert want == {g["lr"]: set(map(id, g["params"])) for g in lora_plus.groups(model, 0.1, 8)}


def test_the_file_stands_alone(tmp_path, monkeypatch, capsys):
    (tmp_path / "copied.py").write_text(FILE.read_text())
    monkeypatch.setitem(sys.modules, "minipeft", None)
    monkeypatch.chdir(tmp_path)
    runpy.run_path("copied.py", run_name="__main__")
    assert capsys.readouterr().out.strip() == "lora_plus: ok"


def test_the_docstring_has_its_parts():
    doc = lora_plus.__doc__
    at = [doc.find(f"\n{p}") for p in ("Paper", "Idea", "Math", "Steps", "Cost", "Differs", "Pitfalls")]
    assert all(i > 0 for i in at) and at == sorted(at) and "\\" not in doc


def test_a_copy_of_the_model_has_groups_of_its_own():
    model, _ = ready("llama")
    other = copy.deepcopy(model)
    mine = {id(p) for g in lora_plus.groups(model, 0.1) for p in g["params"]}
    assert mine.isdisjoint(id(p) for g in lora_plus.groups(other, 0.1) for p in g["params"])
