"""What every method file promises, checked the same way for each of them on four architectures."""

import ast
import copy
import functools
import importlib
import pathlib
import runpy
import sys
from dataclasses import dataclass, field

import pytest
import torch
from tiny import ARCHS, CLASS, LINEAR, batch, build, fit, logits, perturb

from minipeft.selective import pafi

ROOT = pathlib.Path(__file__).parents[1] / "minipeft"
VERBS = ("attach", "sites", "state", "load", "merge", "detach", "penalty", "advance", "choose", "resumable")


@dataclass
class Case:
    keywords: dict = field(default_factory=dict)  # or a function of (model, inputs), for data
    other: dict = field(default_factory=dict)  # settings a second copy may have: state overrules them
    targets: dict = field(default_factory=lambda: LINEAR)  # per architecture
    merges: bool = True
    identity: bool = True  # step 0 is the base model, bit for bit
    refuses: tuple = ()  # architectures the method has nothing to train on
    shrinks: bool = False  # the state leaves out what is off: the same function up to rounding
    prepare: object = None  # (method, model, targets): what is a base to a method that rounds it
    lines: int = 250  # a file longer than LoRA's says so here


KV = dict(llama=("k_proj", "v_proj"), gpt2=("c_attn",), bert=("key", "value"), t5=("k", "v"))
SECOND = dict(llama=("down_proj",), gpt2=("mlp.c_proj",), t5=("wo",),
              bert=("layer.0.output.dense", "layer.1.output.dense"))
METHODS = {
    "reparam.lora": Case(dict(r=2, alpha=6.0), other=dict(alpha=1.0)),
    "reparam.lora_batch": Case(dict(tasks=2, r=2, alpha=6.0, choice=1), other=dict(alpha=1.0, choice=1),
                               merges=False),
    "reparam.dora": Case(dict(r=2, alpha=6.0), other=dict(alpha=1.0, detached=False)),
    "reparam.adalora": Case(dict(r=3, target=1, alpha=6.0, total=4), other=dict(r=2, alpha=1.0, total=9),
                            shrinks=True, lines=340),  # an adapter and the allocator of its budget
    "additive.adapter": Case(dict(bottleneck=5, sigma=0.05), other=dict(sigma=1.0), targets={},
                             merges=False, identity=False),
    "additive.parallel_adapter": Case(dict(bottleneck=5, s=3.0), other=dict(s=1.0), targets={},
                                      merges=False),
    "additive.ia3": Case(lambda model, _: dict(ffn=SECOND[model.config.model_type]), targets=KV),
    "additive.prefix_tuning": Case(dict(length=3), other=dict(mlp=4), targets={}, merges=False, identity=False),
    "additive.prompt_tuning": Case(dict(length=3), other=dict(init="random"), targets={}, merges=False, identity=False),
    "reparam.qlora": Case(dict(r=2, alpha=6.0, double=False), other=dict(alpha=1.0), lines=360,
                          prepare=lambda *place: round_to_nf4(*place)),
    "reparam.monteclora": Case(dict(r=2, alpha=6.0, samples=3), other=dict(alpha=1.0, eps=1.0), lines=290),
    "selective.bitfit": Case(refuses=("llama", "t5")),
    "selective.pafi": Case(dict(budget=60), other=dict(keep="smallest")),
    "selective.fish_mask": Case(lambda model, inputs: dict(budget=60, batches=[inputs])),
    "selective.id3": Case(dict(budget=60, steps=4), other=dict(steps=9, eps=1.0), lines=350),
}


@torch.no_grad()
def round_to_nf4(qlora, model, targets):
    """Weights that NF4 holds exactly: QLoRA throws the others away, and promises these."""
    for name, p in model.named_parameters():
        if any(name.endswith(f"{t}.weight") for t in targets):
            p.copy_(qlora.dequantise(*qlora.quantise(p), p.shape, p.dtype))


@pytest.fixture(params=ARCHS)
def arch(request):
    return request.param


class Bench:
    """One method on one architecture."""

    def __init__(self, name, arch):
        self.case, self.arch = METHODS[name], arch
        if arch in self.case.refuses:
            pytest.skip(f"{name} has nothing to train on {arch}")
        self.method = importlib.import_module(f"minipeft.{name}")
        self.base, self.inputs = build(arch), batch(arch)
        self.targets = self.case.targets.get(arch, ())
        if self.case.prepare:
            self.case.prepare(self.method, self.base, self.targets)

    def attach(self, model=None, **more):
        model = copy.deepcopy(self.base) if model is None else model
        torch.manual_seed(3)
        kw = self.case.keywords
        kw = kw(model, self.inputs) if callable(kw) else kw
        self.places = self.method.attach(model, *self.targets, **{**kw, **more})
        return model

    def fitted(self):
        model = self.attach()
        fit(self.method, model, self.inputs)
        return model


@pytest.fixture(params=METHODS)
def bench(request, arch):
    return Bench(request.param, arch)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_step_zero_is_the_base_model(bench):
    model = bench.attach()
    equal = torch.equal(logits(model, bench.inputs), logits(bench.base, bench.inputs))
    assert equal == bench.case.identity


def test_only_the_state_trains(bench):
    model = bench.attach()
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained and trained <= bench.method.state(model).keys()
    frozen = {n: p.clone() for n, p in model.named_parameters()
              if not p.requires_grad and not n.endswith(".original")}  # those: test_selected.py
    start = bench.method.state(model)
    fit(bench.method, model, bench.inputs)
    end, now = bench.method.state(model), dict(model.named_parameters())
    assert all(torch.equal(p, now[n]) for n, p in frozen.items() if n in now)
    assert any(not torch.equal(start[n], end[n]) for n in trained)
    assert not torch.equal(logits(model, bench.inputs), logits(bench.base, bench.inputs))


def test_training_gives_every_trained_tensor_a_gradient(bench):
    model = bench.attach()
    perturb(model, 0.05)
    loss = model(**bench.inputs).loss
    if hasattr(bench.method, "penalty"):
        loss = loss + bench.method.penalty(model)
    loss.backward()
    dead = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not dead


def test_state_round_trip(bench):
    model = bench.fitted()
    saved = bench.method.state(model)
    other = copy.deepcopy(bench.base)
    bench.attach(other, **bench.case.other)
    bench.method.load(other, saved)
    rounding = 1e-12 if bench.case.shrinks else 0
    torch.testing.assert_close(
        logits(other, bench.inputs), logits(model, bench.inputs), rtol=rounding, atol=rounding)
    assert same(bench.method.state(other), saved)


def test_a_refused_file_changes_nothing(bench):
    model = bench.fitted()
    before, saved = bench.method.state(model), bench.method.state(model)
    first = next(iter(saved))
    with pytest.raises(KeyError):
        bench.method.load(model, {k: v + 1 for k, v in saved.items() if k != first})
    with pytest.raises(KeyError):
        bench.method.load(model, {**{k: v + 1 for k, v in saved.items()}, "stranger": torch.ones(1)})
    bad = {k: v + 1 for k, v in saved.items()}
    last = [k for k in bad if bad[k].dim() and bad[k].numel()][-1]
    bad[last] = torch.cat([bad[last], bad[last]])
    with pytest.raises(ValueError):
        bench.method.load(model, bad)
    assert same(bench.method.state(model), before)


def test_state_is_a_copy(bench):
    model = bench.attach()
    saved = bench.method.state(model)
    before = {k: v.clone() for k, v in saved.items()}
    fit(bench.method, model, bench.inputs)
    assert same(saved, before)


def test_merge_keeps_the_function_and_removes_the_method(bench):
    assert hasattr(bench.method, "merge") == bench.case.merges
    if not bench.case.merges:
        return
    model = bench.fitted()
    y = logits(model, bench.inputs)
    bench.method.merge(model)
    torch.testing.assert_close(logits(model, bench.inputs), y, rtol=1e-9, atol=1e-9)
    assert not bench.method.sites(model)
    assert model.state_dict().keys() == bench.base.state_dict().keys()
    assert not torch.allclose(y, logits(bench.base, bench.inputs))


def test_detach_restores_the_base_bit_for_bit(bench):
    model = bench.fitted()
    bench.method.detach(model)
    assert same(model.state_dict(), bench.base.state_dict())
    assert torch.equal(logits(model, bench.inputs), logits(bench.base, bench.inputs))
    assert not bench.method.sites(model)


def test_it_returns_the_places_it_touched(bench):
    model = bench.attach()
    assert bench.places == list(bench.method.sites(model)) and bench.places


def test_a_second_attach_after_detach_works(bench):
    model = bench.fitted()
    bench.method.detach(model)
    again, fresh = bench.attach(model), bench.attach()
    assert same(bench.method.state(again), bench.method.state(fresh))


def test_an_unknown_target_is_refused_and_nothing_changes(bench):
    if not bench.targets:
        pytest.skip("takes no targets")
    model = copy.deepcopy(bench.base)
    kw = bench.case.keywords
    kw = kw(model, bench.inputs) if callable(kw) else kw
    for targets in (("nope",), (*bench.targets, "nope")):
        with pytest.raises(ValueError, match="nope"):
            bench.method.attach(model, *targets, **kw)
    assert not bench.method.sites(model) and all(p.requires_grad for p in model.parameters())
    assert same(model.state_dict(), bench.base.state_dict())


def test_a_second_method_can_join(bench):
    model = copy.deepcopy(bench.base).requires_grad_(False)
    kept = [p for n, p in model.named_parameters() if "embed" in n or "wte" in n or n.startswith("shared")][:1]
    kept[0].requires_grad_(True)  # what another method left trainable
    bench.attach(model, freeze=False)
    assert kept[0].requires_grad
    bench.method.detach(model)
    bench.attach(model)
    assert not kept[0].requires_grad


@pytest.mark.parametrize("name", [n for n in METHODS if not n.startswith("selective")])
def test_loading_below_a_selection_is_refused_and_nothing_changes(name):
    """A copy into what a selection stands on would go to a tensor that is made anew at every read."""
    bench = Bench(name, "llama")
    model = bench.attach()
    saved = {k: v + 1 if v.is_floating_point() else v for k, v in bench.method.state(model).items()}
    pafi.attach(model, budget=20, among="trainable")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises((KeyError, ValueError), match="selection"):
        bench.method.load(model, saved)
    assert same(model.state_dict(), before)
    pafi.detach(model)
    bench.method.load(model, saved)
    assert same(bench.method.state(model), saved)


@pytest.mark.parametrize("name", [n for n in METHODS if "t5" not in METHODS[n].refuses])
def test_t5_in_float16_keeps_wo_in_float32(name, tmp_path):
    """The hub's way to load: from_pretrained leaves `wo` in float32 and T5 casts what it reads."""
    bench = Bench(name, "t5")
    bench.base.float().save_pretrained(tmp_path)
    half = CLASS["t5"].from_pretrained(tmp_path, dtype=torch.float16).eval()
    kept = {n: p.dtype for n, p in half.named_parameters()}
    assert {n for n, d in kept.items() if d == torch.float32} == {n for n in kept if n.endswith("wo.weight")}
    if bench.case.prepare:
        bench.case.prepare(bench.method, half, bench.targets)
        bench.base.load_state_dict(half.state_dict())
    before = logits(half, bench.inputs)
    bench.attach(half)
    assert torch.equal(logits(half, bench.inputs), before) == bench.case.identity
    torch.manual_seed(3)
    fit(bench.method, half, bench.inputs)
    assert all(v.isfinite().all() for v in bench.method.state(half).values() if v.is_floating_point())
    tuned, wide = logits(half, bench.inputs), bench.attach()
    bench.method.load(wide, bench.method.state(half))
    want = logits(wide, bench.inputs)
    assert tuned.dtype == torch.float16 and not torch.equal(tuned, before)
    assert (tuned - want).norm() / want.norm() < 5e-3 < (before - want).norm() / want.norm()
    if bench.case.merges:
        bench.method.merge(half)
        assert {n: p.dtype for n, p in half.named_parameters()} == kept
        assert (logits(half, bench.inputs) - want).norm() / want.norm() < 5e-3


@functools.cache
def helpers(source):
    """{text: lines} of a file's functions and classes."""
    nodes = [n for n in ast.parse(source).body if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
    return {ast.unparse(n): n.end_lineno - n.lineno + 1 for n in nodes}


@pytest.mark.parametrize("name", METHODS)
def test_the_file_stands_alone(name, tmp_path, monkeypatch, capsys):
    path = ROOT.joinpath(*name.split(".")).with_suffix(".py")
    source = path.read_text()
    imported = {n.module or "" for n in ast.walk(ast.parse(source)) if isinstance(n, ast.ImportFrom)}
    imported |= {a.name for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Import) for a in n.names}
    assert not any(m.startswith("minipeft") or m == "" for m in imported)
    copies = sum(n for text, n in helpers(source).items() if sum(text in helpers(p.read_text())
                 for p in ROOT.rglob("*.py")) > 1)  # what another file holds too is read once
    assert len(source.splitlines()) - copies <= METHODS[name].lines
    (tmp_path / "copied.py").write_text(source)
    monkeypatch.setitem(sys.modules, "minipeft", None)  # importing it raises
    monkeypatch.chdir(tmp_path)
    runpy.run_path("copied.py", run_name="__main__")
    assert capsys.readouterr().out.strip().endswith(": ok")


@pytest.mark.parametrize("name", METHODS)
def test_the_docstring_has_its_parts(name):
    doc = importlib.import_module(f"minipeft.{name}").__doc__
    places = [doc.find(f"\n{part}") for part in
              ("Paper", "Idea", "Math", "Steps", "Cost", "Differs", "Pitfalls")]
    assert all(i > 0 for i in places) and places == sorted(places) and "\\" not in doc


def test_every_file_on_the_shelves_keeps_the_contract():
    files = {f"{p.parent.name}.{p.stem}" for shelf in ("additive", "selective", "reparam")
             for p in (ROOT / shelf).glob("[a-z]*.py")}
    assert files - ELSEWHERE == set(METHODS)


# Files whose promises differ in kind, each with a test file of its own.
ELSEWHERE = {"reparam.lora_plus", "reparam.nf4", "reparam.paged"}


def test_a_private_helper_is_the_same_text_in_every_file():
    seen = {}
    for path in sorted(ROOT.rglob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name not in VERBS:
                seen.setdefault(node.name, {}).setdefault(ast.unparse(node), []).append(path.stem)
    differ = {name: list(texts.values()) for name, texts in seen.items() if len(texts) > 1}
    assert not differ
