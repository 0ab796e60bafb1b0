"""ID3: the exact choice of each step, the schedule, the clock, and the authors' package as an oracle."""

import copy

import pytest
import torch
import torch.distributed as dist
from tiny import batch, build, logits
from torch import nn

from minipeft.additive import adapter, parallel_adapter
from minipeft.reparam import lora
from minipeft.selective import id3


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def chosen(model):
    return {n: set(m.idx.tolist()) for n, m in id3.sites(model).items() if m.idx.numel()}


def one_step(model, opt, inputs, t):
    opt.zero_grad()
    model(**inputs).loss.backward()
    opt.step()
    id3.advance(model, t)


class Toy(nn.Module):
    """Loss <theta, g>: a gradient of one's choice."""

    def __init__(self, theta, g):
        super().__init__()
        self.theta, self.g = nn.Parameter(theta.clone()), g

    def forward(self):
        return type("Output", (), dict(loss=(self.theta * self.g).sum()))


def toy(n=400, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(n, generator=g, dtype=torch.float64), torch.randn(n, generator=g, dtype=torch.float64))


def first_choice(theta, g, u=40, **more):
    model = Toy(theta, g)
    id3.attach(model, budget=u, steps=1, **more)
    one_step(model, torch.optim.SGD(trained(model), lr=0.1), {}, 0)
    return chosen(model)["theta"]


def top(score, u=40):
    return set(score.topk(u).indices.tolist())


def test_the_limits_of_the_score():
    theta, g = toy()
    g[::3] = 0
    assert first_choice(theta, g, exp=0.0) == top(g.abs())
    assert first_choice(theta, g, exp=1.0, eps=0.1) == top(g.abs() / (theta.abs() + 0.1))
    assert first_choice(theta, g, exp=2000.0, eps=1e-3) == top((-theta.abs()).masked_fill(g == 0, -9))
    assert first_choice(theta, g, exp=-1.0, eps=0.0) == top((g * theta).abs())
    assert first_choice(theta, g, eps=1e9) == top(g.abs())


@pytest.mark.parametrize("p", (0.5, 1.0, 2.0))
def test_the_square_with_twice_the_exponent_is_the_same_ranking(p):
    theta, g = toy()
    assert first_choice(theta, g, exp=2 * p, square=True) == first_choice(theta, g, exp=p)
    assert first_choice(theta, g, exp=p, square=True) != first_choice(theta, g, exp=p)


@pytest.mark.parametrize("B, T", ((20, 5), (23, 5), (3, 7), (40, 40), (1, 1), (400, 9), (400, 1)))
@pytest.mark.parametrize("zeros", (False, True))
def test_it_ends_at_exactly_b_and_never_closes_one(B, T, zeros):
    theta, g = toy()
    if zeros:
        g[::2] = 0
    model, old = Toy(theta, g), set()
    id3.attach(model, budget=B, steps=T)
    opt = torch.optim.AdamW(trained(model), lr=0.1, weight_decay=0.1)
    updates = 0
    for t in range(T):
        one_step(model, opt, {}, t)
        now = chosen(model).get("theta", set())
        assert len(now) == B * (t + 1) // T and old <= now
        old, updates = now, updates + len(now)
    if B % T == 0:
        assert updates == B * (T + 1) // 2
    one_step(model, opt, {}, T)  # beyond T nothing opens
    assert chosen(model)["theta"] == old


def test_static_opens_all_at_once_and_one_step_is_the_same_thing():
    theta, g = toy()
    model = Toy(theta, g)
    id3.attach(model, budget=40, steps=10, schedule="static")
    opt = torch.optim.SGD(trained(model), lr=0.1)
    one_step(model, opt, {}, 0)
    assert chosen(model)["theta"] == first_choice(theta, g)
    one_step(model, opt, {}, 1)
    assert len(chosen(model)["theta"]) == 40


def test_the_score_uses_the_weights_of_now():
    theta, g = toy()
    model = Toy(theta, g)
    id3.attach(model, budget=40, steps=2)
    opt = torch.optim.SGD(trained(model), lr=0.0)
    one_step(model, opt, {}, 0)
    theta2 = theta.clone()
    theta2[:100] *= 100
    model.parametrizations.theta.original.data.copy_(theta2)
    one_step(model, opt, {}, 1)
    before = top(g.abs() / (theta.abs() + 0.1), 20)
    rest = (g.abs() / (theta2.abs() + 0.1)).index_fill(0, torch.tensor(sorted(before)), -1)
    assert chosen(model)["theta"] == before | top(rest, 20)


@pytest.mark.parametrize("arch", ("gpt2", "t5"))
@pytest.mark.parametrize("name", ("sgd", "adamw"))
def test_it_is_masked_dense_training(arch, name):
    """Choose, mask, step, on dense tensors, tied ones among them, with the mask of the paper."""
    make = {"sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
            "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0, eps=1e-5)}[name]
    model, inputs, B, T = build(arch, tie_word_embeddings=True), batch(arch), 300, 6
    dense = copy.deepcopy(model)
    id3.attach(model, budget=B, steps=T)
    opt, two = make(trained(model)), make(dense.parameters())
    params = dict(dense.named_parameters())
    mask = torch.zeros(sum(p.numel() for p in params.values()), dtype=torch.bool)
    for t in range(T):
        one_step(model, opt, inputs, t)
        two.zero_grad()
        dense(**inputs).loss.backward()
        g = torch.cat([p.grad.view(-1) for p in params.values()])
        theta = torch.cat([p.detach().view(-1) for p in params.values()])
        H = (g.abs() / (theta.abs() + 0.1)).masked_fill(mask, -1)
        mask[H.topk(B // T).indices] = True
        for part, p in zip(mask.split([p.numel() for p in params.values()]), params.values(), strict=True):
            p.grad.view(-1)[~part] = 0
        two.step()
        for part, n in zip(mask.split([p.numel() for p in params.values()]), params, strict=True):
            assert set(part.nonzero().view(-1).tolist()) == chosen(model).get(n, set())
    y = logits(model, inputs)
    torch.testing.assert_close(y, logits(dense, inputs), rtol=1e-8, atol=1e-8)
    id3.merge(model)
    for n, p in dense.named_parameters():
        torch.testing.assert_close(model.get_parameter(n), p, rtol=1e-8, atol=1e-8, msg=n)


OPTIMISERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
}


@pytest.mark.parametrize("name", OPTIMISERS)
def test_only_the_chosen_entries_move(name):
    model, inputs = build("bert"), batch("bert")
    base = copy.deepcopy(model)
    id3.attach(model, budget=90, steps=4)
    opt = OPTIMISERS[name](trained(model))
    for t in range(4):
        one_step(model, opt, inputs, t)
    inside = chosen(model)
    id3.merge(model)
    for n, p in model.named_parameters():
        moved = (p != base.get_parameter(n)).view(-1).nonzero().view(-1).tolist()
        assert set(moved) <= inside.get(n, set())
    assert sum(map(len, inside.values())) == 90


def test_the_optimiser_holds_b_numbers():
    model, inputs = build("bert"), batch("bert")
    id3.attach(model, budget=90, steps=4)
    opt = torch.optim.AdamW(trained(model))
    one_step(model, opt, inputs, 0)
    assert [p.numel() for p in trained(model)] == [90]
    assert max(v.numel() for s in opt.state.values() for v in s.values()) == 90
    assert all(m.alias is None or m.alias.grad is None for m in id3.sites(model).values())
    assert sum(v.numel() for v in id3.state(model).values()) == 4 * 90 + 2


@pytest.mark.parametrize("late", (0, 5, 100, 1000))
def test_the_clock_of_an_entry(late):
    """A unit gradient: with its own clock an entry's first step is lr, with the optimiser's it is not."""
    first = {}
    for clock in ("global", "per_entry"):
        theta = torch.full((2,), 5.0, dtype=torch.float64)
        model = Toy(theta, torch.tensor([1.0, 0.5], dtype=torch.float64))
        id3.attach(model, budget=2, steps=2, clock=clock)
        opt = torch.optim.Adam(trained(model), lr=0.01)
        one_step(model, opt, {}, 0)
        for t in range(1, late + 1):  # the second entry stays closed
            pool = id3._pool(model)[1]
            pool.T = 10**9
            one_step(model, opt, {}, t)
        id3._pool(model)[1].T = 1
        one_step(model, opt, {}, late + 1)
        model()
        W = model.parametrizations.theta.original
        first[clock] = (5.0 - W[1].item()) / 0.01
        if clock == "per_entry":
            assert (5.0 - W[0].item()) / 0.01 == pytest.approx(late + 2, rel=1e-4)
    assert first["per_entry"] == pytest.approx(1.0, abs=1e-4)
    s = late + 2
    assert first["global"] == pytest.approx(
        0.1 / (1 - 0.9**s) / (0.001 / (1 - 0.999**s)) ** 0.5, rel=1e-4)


def test_accumulation_adds_up_and_the_first_backward_chooses():
    model, inputs = build("bert"), batch("bert")
    dense = copy.deepcopy(model)
    rows = [{k: v[i : i + 1] for k, v in inputs.items()} for i in range(3)]
    id3.attach(model, budget=60, steps=2)
    opt = torch.optim.SGD(trained(model), lr=0.01)
    for t in range(2):
        opt.zero_grad()
        for row in rows:
            model(**row).loss.backward()
        grad = trained(model)[0].grad
        dense.zero_grad()
        copy_of = {n: m.parametrizations for n, m in model.named_modules() if hasattr(m, "parametrizations")}
        for n, stacks in copy_of.items():
            for name, stack in stacks.items():
                dense.get_parameter(f"{n}.{name}").data.copy_(stack.original)
        for row in rows:
            dense(**row).loss.backward()
        pool = id3._pool(model)[1]
        names = list(id3.sites(model))
        by_number = {m.number: n for n, m in id3.sites(model).items()}
        assert len(names) == len(by_number) and pool.live + pool.fresh == 30 * (t + 1)
        for i in range(pool.live + pool.fresh):
            want = dense.get_parameter(by_number[pool.owner[i].item()]).grad.view(-1)[pool.place[i]]
            torch.testing.assert_close(grad[i], want, rtol=1e-8, atol=1e-12)
        opt.step()
        id3.advance(model, t)


@pytest.mark.parametrize("reentrant", (True, False))
def test_gradient_checkpointing(reentrant):
    inputs, masks = batch("bert"), []
    for checkpoint in (False, True):
        model = build("bert").train()
        for m in model.modules():
            if isinstance(m, nn.Dropout):
                m.p = 0.0
        id3.attach(model, "query", "output.dense", budget=60, steps=3)
        if checkpoint:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        opt = torch.optim.SGD(trained(model), lr=0.1)
        for t in range(3):
            one_step(model, opt, inputs, t)
        masks.append(chosen(model))
    assert masks[0] == masks[1]


def test_half_precision_weights_and_autocast():
    model, inputs = build("llama", dtype=torch.bfloat16), batch("llama")
    base = copy.deepcopy(model)
    id3.attach(model, budget=100, steps=2)
    assert trained(model)[0].dtype == torch.float32
    opt = torch.optim.SGD(trained(model), lr=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for t in range(2):
            one_step(model, opt, inputs, t)
    assert 0 < max(id3.merge(copy.deepcopy(model)).values()) < 1e-2
    id3.detach(model)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), base.parameters(), strict=True))


def test_a_copy_goes_its_own_way_and_a_file_resumes():
    model, inputs = build("bert"), batch("bert")
    id3.attach(model, budget=60, steps=4)
    opt = torch.optim.SGD(trained(model), lr=0.1)
    for t in range(2):
        one_step(model, opt, inputs, t)
    other, fresh = copy.deepcopy(model), build("bert")
    id3.attach(fresh, budget=60, steps=4)
    id3.load(fresh, id3.state(model))
    for m in (model, other, fresh):
        again = torch.optim.SGD(trained(m), lr=0.1)
        for t in (2, 3):
            one_step(m, again, inputs, t)
    assert chosen(model) == chosen(other) == chosen(fresh)
    assert torch.equal(logits(model, inputs), logits(other, inputs))
    assert torch.equal(logits(model, inputs), logits(fresh, inputs))
    for m in (model, other, fresh):
        id3.detach(m)
        assert all(torch.equal(p, q) for p, q in zip(m.parameters(), build("bert").parameters(), strict=True))


def test_over_fresh_lora_the_first_choice_is_all_in_b():
    model, inputs = build("llama"), batch("llama")
    lora.attach(model, "q_proj", "v_proj", r=4)
    names = id3.attach(model, budget=64, steps=4, among="trainable")
    assert {n[-2:] for n in names} == {".A", ".B"}
    opt = torch.optim.AdamW(trained(model), lr=0.05)
    one_step(model, opt, inputs, 0)
    assert all(n.endswith(".B") for n in chosen(model))
    for t in range(1, 4):
        one_step(model, opt, inputs, t)
    assert sum(map(len, chosen(model).values())) == 64
    y = logits(model, inputs)
    id3.merge(model)
    assert torch.equal(logits(model, inputs), y)
    lora.merge(model)
    torch.testing.assert_close(logits(model, inputs), y, rtol=1e-9, atol=1e-9)


ADAPTERS = (adapter, "bert"), (adapter, "llama"), (adapter, "t5"), (parallel_adapter, "bert"), (parallel_adapter, "gpt2")


@pytest.mark.parametrize("method, arch", ADAPTERS, ids=lambda v: getattr(v, "__name__", v).rpartition(".")[2])
def test_inside_adapters_the_budget_is_exact_and_the_base_stays(method, arch):
    model, inputs = build(arch), batch(arch)
    base = copy.deepcopy(model)
    method.attach(model, bottleneck=4)
    start, y = method.state(model), logits(model, inputs)
    names = id3.attach(model, budget=70, steps=4, among="trainable")
    assert torch.equal(logits(model, inputs), y)
    assert set(names) == {n for n in start if not n.endswith(".s")}
    opt = torch.optim.AdamW(trained(model), lr=0.05, weight_decay=0.1)
    for t in range(4):
        one_step(model, opt, inputs, t)
        assert sum(map(len, chosen(model).values())) == 70 * (t + 1) // 4
    inside, y = chosen(model), logits(model, inputs)
    id3.merge(model)
    assert torch.equal(logits(model, inputs), y)
    end = method.state(model)
    moved = {n: set((end[n] != v).view(-1).nonzero().view(-1).tolist()) for n, v in start.items()}
    assert {n: m for n, m in moved.items() if m} == inside
    other = copy.deepcopy(base)
    method.attach(other, bottleneck=4)
    method.load(other, end)
    assert torch.equal(logits(other, inputs), y)
    method.detach(model)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), base.parameters(), strict=True))


@pytest.mark.parametrize("arch", ("bert", "llama"))
def test_compile(arch):
    model, inputs = build(arch), batch(arch)
    plain = copy.deepcopy(model)
    for m in (model, plain):
        id3.attach(m, budget=60, steps=3)
    fast = torch.compile(model, backend="aot_eager")
    for run, m in ((fast, model), (plain, plain)):
        opt = torch.optim.SGD(trained(m), lr=0.1, momentum=0.9)
        for t in range(4):
            opt.zero_grad()
            run(**inputs).loss.backward()
            opt.step()
            id3.advance(m, t)
    assert chosen(model) == chosen(plain) and sum(map(len, chosen(model).values())) == 60
    torch.testing.assert_close(logits(fast, inputs), logits(plain, inputs), rtol=1e-9, atol=1e-9)


def test_compile_into_one_graph_is_refused_in_a_sentence():
    model = nn.Sequential(nn.Linear(6, 5))
    id3.attach(model, budget=9, steps=3)
    with pytest.raises(Exception, match="id3 chooses in a hook of the backward: compile without fullgraph=True"):
        torch.compile(model, backend="eager", fullgraph=True)(torch.randn(4, 6))


def test_settings_outside_the_list_are_refused():
    for bad in (dict(steps=0), dict(steps=2.5), dict(eps=-1.0), dict(schedule="repeat"), dict(clock="wall"),
                dict(budget=0.1), dict(budget=10**9)):
        model = build("bert")
        with pytest.raises(ValueError):
            id3.attach(model, **{**dict(budget=5, steps=2), **bad})
        assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="not attached"):
        id3.advance(build("bert"), 0)
    model = build("bert")
    id3.attach(model, "query", budget=5, steps=2)
    with pytest.raises(ValueError, match="not attached yet"):
        id3.attach(model, "value", budget=5, steps=2)


def test_several_processes_are_refused(monkeypatch):
    model, inputs = build("bert"), batch("bert")
    id3.attach(model, budget=5, steps=2)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    with pytest.raises(RuntimeError, match="several"):
        model(**inputs)


def authors(params, B, T, lr=0.01, **more):
    wrap = pytest.importorskip("selective_optimizers.wrap")
    return wrap.get_selective_optimizer(torch.optim.AdamW, "id3")(
        params, lr=lr, budget=B, max_steps=T, eps=0.1, exp=1.0, verify=False, **more)


def test_the_authors_package_chooses_the_same_masks_for_fifty_steps():
    model, inputs, B, T = build("bert"), batch("bert"), 500, 50
    theirs = copy.deepcopy(model)
    id3.attach(model, budget=B, steps=T, exclude=("key",))
    params = {n: p for n, p in theirs.named_parameters() if ".key." not in n}  # b_k: gradient 0 but for rounding
    for n, p in theirs.named_parameters():
        p.requires_grad_(n in params)
    opt, two = torch.optim.AdamW(trained(model), lr=0.01, weight_decay=0), authors(params.values(), B, T)
    for t in range(T):
        one_step(model, opt, inputs, t)
        two.zero_grad()
        theirs(**inputs).loss.backward()
        two.step()
        masks = dict(zip(params, two.param_groups[0]["chosen_masks"], strict=True))
        mine = chosen(model)
        assert all(set(m.view(-1).nonzero().view(-1).tolist()) == mine.get(n, set()) for n, m in masks.items()), t
    assert sum(map(len, mine.values())) == B
    torch.testing.assert_close(logits(model, inputs), logits(theirs, inputs), rtol=1e-8, atol=1e-8)


def their_steps(theta, g, B, T, **more):
    model = Toy(theta, g)
    opt = authors([{"params": list(model.parameters()), **more}], B, T)
    for _ in range(T):
        opt.zero_grad()
        model().loss.backward()
        opt.step()
    return model, opt


def test_their_package_overshoots_a_budget_that_the_steps_do_not_divide():
    _, opt = their_steps(*toy(), B=100, T=30)
    assert opt.get_budget_used() == 120  # its step counter never moves


def test_their_package_refuses_fewer_entries_than_steps_and_fails_when_all_are_open():
    with pytest.raises(AssertionError):
        their_steps(*toy(), B=3, T=7)
    theta, g = toy(100)
    model = Toy(theta, g)
    opt = authors(model.parameters(), 100, 50)
    with pytest.raises((IndexError, RuntimeError)):
        for _ in range(51):
            opt.zero_grad()
            model().loss.backward()
            opt.step()


def test_their_package_decays_closed_entries_when_a_group_asks_for_it_and_keeps_dense_state():
    theta, g = toy()
    model, opt = their_steps(theta, g, B=40, T=4, weight_decay=0.1)
    closed = ~opt.param_groups[0]["chosen_masks"][0]
    assert (model.theta.detach() != theta)[closed].all()
    state = next(iter(opt.state.values()))
    assert state["exp_avg"].numel() == theta.numel() == 10 * 40


def test_ties_go_to_the_earlier_tensor_and_place():
    class Equal(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(5))

        def forward(self):
            return type("Output", (), dict(loss=self.a.sum() + self.b.sum()))

    model = Equal()
    id3.attach(model, budget=7, steps=1)
    one_step(model, torch.optim.SGD(trained(model), lr=0.1), {}, 0)
    assert chosen(model) == {"a": {0, 1, 2, 3, 4}, "b": {0, 1}}


def test_loading_over_a_trained_model_restores_the_old_entries():
    a, b, inputs = build("bert"), build("bert"), batch("bert")
    for model, exp in ((a, 0.0), (b, 2.0)):
        id3.attach(model, budget=60, steps=2, exp=exp)
        opt = torch.optim.SGD(trained(model), lr=0.5)
        for t in range(2):
            one_step(model, opt, inputs, t)
        logits(model, inputs)
    assert chosen(a) != chosen(b)
    id3.load(a, id3.state(b))
    assert torch.equal(logits(a, inputs), logits(b, inputs))
    id3.detach(a)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), build("bert").parameters(), strict=True))


def test_a_copy_of_the_model_carries_no_dense_alias():
    model, inputs = build("bert"), batch("bert")
    id3.attach(model, budget=60, steps=2)
    model(**inputs)
    assert all(m.alias is None for m in id3.sites(copy.deepcopy(model)).values())
