"""The mechanism that the selective files share: k entries of a model train and nothing else can move."""

import ast
import copy
import datetime
import importlib
import json
import os
import pathlib
import sys

import pytest
import torch
import torch.distributed as dist
from tiny import batch, build, logits
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

from minipeft.lab import results
from minipeft.reparam import lora
from minipeft.selective import bitfit, fish_mask, pafi

FILES = (bitfit, fish_mask, pafi)
OPTIMISERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
}


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def step(model, opt, *inputs):
    opt.zero_grad()
    for one in inputs:
        (model(**one).loss / len(inputs)).backward()
    opt.step()


@pytest.mark.parametrize("name", OPTIMISERS)
@pytest.mark.parametrize("arch", ("gpt2", "t5"))
def test_only_the_chosen_entries_move(name, arch):
    model, inputs = build(arch), batch(arch)
    base = copy.deepcopy(model)
    pafi.attach(model, budget=300, keep="random")
    idx = {n: m.idx.long() for n, m in pafi.sites(model).items()}
    opt = OPTIMISERS[name](trained(model))
    for _ in range(4):
        step(model, opt, inputs)
    pafi.merge(model)
    moved = {n: (p != base.get_parameter(n)).view(-1).nonzero().view(-1) for n, p in model.named_parameters()}
    assert all(torch.isin(moved[n], idx.get(n, moved[n][:0])).all() for n in moved)
    assert sum(len(m) for m in moved.values()) > 150
    assert sum(len(i) for i in idx.values()) == 300


def test_it_is_masked_dense_training():
    """The same steps as dense AdamW without decay whose gradient is masked."""
    model, inputs = build("bert"), batch("bert")
    dense = copy.deepcopy(model)
    pafi.attach(model, budget=500)
    mask = {n: torch.zeros(p.numel(), dtype=torch.bool) for n, p in dense.named_parameters()}
    for n, m in pafi.sites(model).items():
        mask[n][m.idx.long()] = True
    # eps: the key bias has a zero gradient but for rounding, which a tiny eps would blow up
    one = torch.optim.AdamW(trained(model), lr=0.01, weight_decay=0, eps=1e-6)
    two = torch.optim.AdamW(dense.parameters(), lr=0.01, weight_decay=0, eps=1e-6)
    for _ in range(5):
        step(model, one, inputs)
        two.zero_grad()
        dense(**inputs).loss.backward()
        for n, p in dense.named_parameters():
            p.grad.view(-1)[~mask[n]] = 0
        two.step()
    pafi.merge(model)
    for (n, p), q in zip(model.named_parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12, msg=n)


@pytest.mark.parametrize("arch", ("gpt2", "t5"))
def test_a_tied_tensor_is_one_tensor(arch):
    model = build(arch, tie_word_embeddings=True)
    name = {"gpt2": "transformer.wte.weight", "t5": "shared.weight"}[arch]
    dense, inputs = copy.deepcopy(model), batch(arch)
    holders = [n for n, p in model.named_parameters(remove_duplicate=False) if p is model.get_parameter(name)]
    assert len(holders) > 1
    assert pafi.attach(model, holders[-1], budget=40) == [name]
    model(**inputs).loss.backward()
    dense(**inputs).loss.backward()
    m = pafi.sites(model)[name]
    torch.testing.assert_close(m.values.grad, dense.get_parameter(name).grad.view(-1)[m.idx], rtol=1e-9, atol=1e-12)
    with torch.no_grad():
        m.values.add_(1.0)
    y = logits(model, inputs)
    pafi.merge(model)
    assert torch.equal(logits(model, inputs), y)
    again = [n for n, p in model.named_parameters(remove_duplicate=False) if p is model.get_parameter(name)]
    assert again == holders


def test_accumulation_is_the_sum():
    model, inputs = build("llama"), batch("llama")
    pafi.attach(model, budget=200)
    rows = [{k: v[i : i + 1] for k, v in inputs.items()} for i in range(3)]
    for row in rows:
        model(**row).loss.backward()
    summed = [p.grad.clone() for p in trained(model)]
    model.zero_grad()
    sum(model(**row).loss for row in rows).backward()  # three forwards, then one backward
    for a, p in zip(summed, trained(model), strict=True):
        torch.testing.assert_close(p.grad, a, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("reentrant", (True, False))
def test_gradient_checkpointing(reentrant):
    model, inputs = build("bert"), batch("bert")
    pafi.attach(model, "query", "output.dense", budget=100)
    model.train()  # dropout of the tiny models is off only in eval
    for m in model.modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.0
    model(**inputs).loss.backward()
    plain = [p.grad.clone() for p in trained(model)]
    model.zero_grad()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model(**inputs).loss.backward()
    for a, p in zip(plain, trained(model), strict=True):
        torch.testing.assert_close(p.grad, a, rtol=1e-9, atol=1e-12)


def test_compile():
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x = torch.randn(4, 6, dtype=torch.float64)
    pafi.attach(model, budget=9)
    fast = torch.compile(model, backend="aot_eager", fullgraph=True)
    opt = torch.optim.SGD(trained(model), lr=0.1)
    for _ in range(3):
        fast(x).square().sum().backward()
        got = [p.grad.clone() for p in trained(model)]
        opt.zero_grad()
        model(x).square().sum().backward()
        for a, p in zip(got, trained(model), strict=True):
            torch.testing.assert_close(p.grad, a)
        opt.step()
        opt.zero_grad()
        torch.testing.assert_close(fast(x), model(x))


def test_half_precision_weights_train_in_float32():
    model, inputs = build("llama", dtype=torch.bfloat16), batch("llama")
    base = copy.deepcopy(model)
    pafi.attach(model, budget=100)
    assert all(p.dtype == torch.float32 for p in trained(model))
    assert torch.equal(logits(model, inputs), logits(base, inputs))
    opt = torch.optim.SGD(trained(model), lr=1e-6)
    start = [p.detach().clone() for p in trained(model)]
    for _ in range(3):
        step(model, opt, inputs)
    assert any(not torch.equal(a, p) for a, p in zip(start, trained(model), strict=True))
    worst = pafi.merge(model)
    assert 0 < max(worst.values()) < 1e-2
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())


def test_autocast():
    model, inputs = build("bert", dtype=torch.float32), batch("bert")
    pafi.attach(model, budget=100)
    exact = model(**inputs).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**inputs).loss
    loss.backward()
    assert abs(loss - exact) < 0.05
    assert all(p.grad.dtype == torch.float32 for p in trained(model))


def test_a_step_between_forward_and_backward_is_an_error():
    model, inputs = build("bert"), batch("bert")
    pafi.attach(model, budget=50)
    loss = model(**inputs).loss
    with torch.no_grad():
        trained(model)[0].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_dtype_and_copies_follow_the_model():
    model, inputs = build("bert"), batch("bert")
    pafi.attach(model, budget=50)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in trained(other):
            p.add_(1.0)
    assert not torch.allclose(logits(other, inputs), logits(model, inputs))
    pafi.detach(other)
    pafi.detach(model)
    assert torch.equal(logits(other, inputs), logits(model, inputs))
    pafi.attach(model, budget=50)
    model.float()
    assert all(m.before.dtype == torch.float32 and m.idx.dtype == torch.int32 for m in pafi.sites(model).values())


def test_a_file_opens_a_plain_model_and_a_bad_one_changes_nothing():
    model, inputs = build("gpt2"), batch("gpt2")
    base = copy.deepcopy(model)
    pafi.attach(model, budget=120, keep="random", seed=4)
    step(model, torch.optim.SGD(trained(model), lr=0.1), inputs)
    saved = pafi.state(model)
    first = next(iter(saved)).removesuffix(".values")
    for change in ({f"{first}.idx": saved[f"{first}.idx"] * 0}, {f"{first}.idx": saved[f"{first}.idx"] + 10**6},
                   {f"{first}.values": torch.zeros(1)}):
        with pytest.raises(ValueError):
            pafi.load(base, saved | change)
        assert not pafi.sites(base)
    with pytest.raises(KeyError):
        pafi.load(base, saved | {"nowhere.parametrizations.weight.0.idx": torch.zeros(1)})
    assert not pafi.sites(base)
    pafi.load(base, saved)
    assert torch.equal(logits(base, inputs), logits(model, inputs))
    pafi.detach(base)
    assert all(torch.equal(p, q) for p, q in zip(base.parameters(), build("gpt2").parameters(), strict=True))


def test_loading_other_positions_restores_the_old_ones():
    a, b = build("bert"), build("bert")
    for model, seed in ((a, 1), (b, 2)):
        pafi.attach(model, "0.attention.self.query.weight", budget=30, keep="random", seed=seed)
    logits(a, batch("bert"))
    with torch.no_grad():
        for p in (*trained(a), *trained(b)):
            p.add_(0.5)
    logits(a, batch("bert"))
    pafi.load(a, pafi.state(b))
    assert torch.equal(logits(a, batch("bert")), logits(b, batch("bert")))
    pafi.detach(a)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), build("bert").parameters(), strict=True))


def test_unfreezing_a_partly_trained_tensor_is_an_error():
    model, inputs = build("bert"), batch("bert")
    pafi.attach(model, "classifier", budget=5)
    model.classifier.requires_grad_(True)
    with pytest.raises(RuntimeError, match="exclude"):
        model(**inputs)
    model = build("bert")
    assert not any("classifier" in n for n in pafi.attach(model, budget=500, exclude=("classifier",)))
    model.classifier.requires_grad_(True)
    model(**inputs).loss.backward()
    assert model.classifier.weight.grad is not None


def test_a_second_selection_of_the_same_tensor_is_refused():
    model = build("bert")
    bitfit.attach(model, "query")
    with pytest.raises(ValueError, match="already"):
        pafi.attach(model, "query", budget=5)
    pafi.attach(model, "value", budget=5, freeze=False)
    assert len(pafi.sites(model)) > 2


@pytest.mark.parametrize("budget", (0, 0.5, True, 10**9))
def test_the_budget_is_a_count(budget):
    model = build("bert")
    with pytest.raises(ValueError, match="budget"):
        pafi.attach(model, budget=budget)
    with pytest.raises(ValueError, match="budget"):
        fish_mask.attach(model, budget=budget, batches=[batch("bert")])
    assert all(p.requires_grad for p in model.parameters())


def test_inside_lora_the_budget_is_exact_and_the_base_stays():
    model, inputs = build("llama"), batch("llama")
    base = copy.deepcopy(model)
    lora.attach(model, "q_proj", "v_proj", r=4)
    with torch.no_grad():
        for m in lora.sites(model).values():
            m.B.normal_()
    before = logits(model, inputs)
    names = pafi.attach(model, budget=77, among="trainable")
    assert all(n.endswith((".A", ".B")) for n in names)
    assert sum(p.numel() for p in trained(model)) == 77
    assert torch.equal(logits(model, inputs), before)
    step(model, torch.optim.AdamW(trained(model), lr=0.1, weight_decay=0.1), inputs)
    y = logits(model, inputs)
    pafi.merge(model)
    assert torch.equal(logits(model, inputs), y)
    lora.merge(model)
    torch.testing.assert_close(logits(model, inputs), y, rtol=1e-9, atol=1e-9)
    assert model.state_dict().keys() == base.state_dict().keys()


def test_the_verbs_are_the_same_text_in_the_files_that_share_them():
    def verbs(module):
        nodes = ast.parse(pathlib.Path(module.__file__).read_text()).body
        return {n.name: ast.unparse(n) for n in nodes if isinstance(n, ast.FunctionDef)
                and n.name in ("sites", "state", "load", "merge", "detach")}

    assert verbs(bitfit) == verbs(fish_mask) == verbs(pafi)


PARALLEL = {"bitfit": (bitfit, {}), "pafi": (pafi, dict(budget=200)),
            "fish_mask": (fish_mask, dict(budget=200, batches=[batch("gpt2")]))}


def worker(rank, folder):
    """One of two DDP processes: writes {method: numbers sent, trained values, names of buffers}."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", rank=rank, world_size=2, init_method=f"file://{folder}/meeting",
                            timeout=datetime.timedelta(seconds=60))
    out, alive = {}, []
    for name, (method, more) in PARALLEL.items():
        model, inputs, sent = build("gpt2"), batch("gpt2"), []
        method.attach(model, **more)

        def count(sent, bucket):
            sent.append(bucket.buffer().numel())
            return default_hooks.allreduce_hook(None, bucket)

        parallel = nn.parallel.DistributedDataParallel(model)
        parallel.register_comm_hook(sent, count)
        opt = torch.optim.AdamW(trained(model), lr=0.05, weight_decay=0.1)
        rows = {k: v[rank : rank + 1] for k, v in inputs.items()}
        for _ in range(3):
            step(parallel, opt, rows)
        values = torch.cat([p.detach().view(-1) for p in trained(model)])
        out[name] = sum(sent), values.tolist(), [n for n, _ in model.named_buffers()]
        alive.append(parallel)
    dist.barrier()
    (folder / f"{rank}.json").write_text(json.dumps(out))
    # Taking DDP apart can wait for ever: a thread of gloo holds a callback in Python.
    os._exit(0)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    context = torch.multiprocessing.get_context("spawn")
    workers = [context.Process(target=worker, args=(rank, folder), daemon=True) for rank in (0, 1)]
    for w in workers:
        w.start()
    for w in workers:
        w.join(120)
        w.kill()
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("name", PARALLEL)
def test_two_processes_exchange_k_values_a_step_and_stay_identical(name, ranks):
    (sent, values, buffers), other = (one[name] for one in ranks)
    assert values == other[1] and sent == other[0]
    assert sent == 3 * len(values)
    assert buffers == [n for n, _ in build("gpt2").named_buffers()]  # DDP sends those at every forward

    model, inputs = build("gpt2"), batch("gpt2")  # one process over both rows
    method, more = PARALLEL[name]
    method.attach(model, **more)
    opt = torch.optim.AdamW(trained(model), lr=0.05, weight_decay=0.1)
    for _ in range(3):
        step(model, opt, *({k: v[i : i + 1] for k, v in inputs.items()} for i in (0, 1)))
    alone = torch.cat([p.detach().view(-1) for p in trained(model)])
    gap = (alone - torch.tensor(values, dtype=torch.float64)).abs()
    assert gap.median() < 1e-9  # a key bias follows rounding under Adam


def test_what_is_kept_grows_with_the_budget_and_not_with_the_model():
    sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "data"))
    memory = importlib.import_module("memory_selective")
    parts = ("optimizer_bytes", "gradient_bytes", "checkpoint_bytes")
    for method in ("pafi", "id3"):
        narrow, wide = memory.measure(method, 64, 500), memory.measure(method, 128, 500)
        many = memory.measure(method, 128, 5000)
        assert wide["numbers"] > 2.5 * narrow["numbers"] and wide["numbers"] > 20 * 5000
        for part in parts:
            assert wide[part] < 1.1 * narrow[part] + 4000  # names and headers
            assert many[part] > 4 * (wide[part] - 12_000)


def test_the_stored_table_says_the_same():
    rows = results.read("memory_selective")["rows"]
    for part in ("optimizer_bytes", "gradient_bytes", "checkpoint_bytes"):
        for row in rows:
            if row["k"]:
                assert row[part] < 32 * row["k"] + 30_000, row
                assert row["trained"] == row["k"]
    large = [r for r in rows if r["k"] and r["numbers"] >= 20 * r["k"]]
    assert {r["method"] for r in large} == {"fish_mask", "pafi", "id3"} and len(large) >= 18
