"""A stack of adapters: every row gets what it would get alone, in training and in generation."""

import copy

import pytest
import torch
from tiny import LINEAR, batch, build, logits, perturb
from torch import nn
from transformers.pytorch_utils import Conv1D

from minipeft.reparam import lora, lora_batch

CLOSE = dict(rtol=1e-11, atol=1e-12)
DECODERS = ("llama", "gpt2", "t5")
SCALES = (3.0, 0.5, 2.0)  # of tasks 0, 1, 2: three models that were trained apart


def single(arch, task, base=None):
    model = build(arch) if base is None else copy.deepcopy(base)
    torch.manual_seed(task)
    lora.attach(model, *LINEAR[arch], r=2, alpha=2 * SCALES[task])
    perturb(model, seed=10 + task)
    return model


def stack(arch):
    model = build(arch)
    lora_batch.attach(model, *LINEAR[arch], tasks=3, r=2)
    for task in range(3):
        lora_batch.insert(model, task, lora.state(single(arch, task)))
    return model


def row(inputs, i):
    return {k: v[i : i + 1] for k, v in inputs.items()}


def alone(arch, task):
    return build(arch) if task == -1 else single(arch, task)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "bert", "t5"])
def test_training_a_mixed_batch_is_training_each_row_alone(arch):
    model, inputs, ids = stack(arch), batch(arch, rows=5), [2, 0, -1, 2, 1]
    lora_batch.choose(model, ids)
    out = model(**inputs)
    weights = torch.linspace(0.5, 1.5, out.logits[0].numel(), dtype=torch.float64).view_as(out.logits[0])
    (out.logits * weights).sum().backward()
    want = {n: torch.zeros_like(p) for n, p in model.named_parameters() if p.requires_grad}
    for i, task in enumerate(ids):
        other = alone(arch, task)
        y = other(**row(inputs, i)).logits
        torch.testing.assert_close(out.logits[i : i + 1], y, **CLOSE)
        if task >= 0:
            (y * weights).sum().backward()
            for n, p in other.named_parameters():
                if p.requires_grad:
                    want[n][task] += p.grad
    for n, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, want[n], rtol=1e-10, atol=1e-11)
            assert p.grad.flatten(1).any(1).all()


@pytest.mark.parametrize("arch", ["llama", "bert"])
def test_permuting_the_rows_permutes_the_outputs(arch):
    model, inputs, ids = stack(arch), batch(arch, rows=4), torch.tensor([1, 0, -1, 2])
    order = torch.tensor([2, 3, 1, 0])
    lora_batch.choose(model, ids)
    y = model(**inputs).logits
    lora_batch.choose(model, ids[order])
    again = model(**{k: v[order] for k, v in inputs.items()}).logits
    torch.testing.assert_close(again, y[order], **CLOSE)
    lora_batch.choose(model, ids)
    assert not torch.allclose(model(**{k: v[order] for k, v in inputs.items()}).logits, y[order])


def test_minus_one_is_the_base_bit_for_bit_and_learns_nothing():
    model, base, inputs = stack("llama"), build("llama"), batch("llama")
    lora_batch.choose(model, -1)
    assert torch.equal(logits(model, inputs), logits(base, inputs))
    model(**inputs).loss.backward()
    assert not any(p.grad.any() for p in model.parameters() if p.requires_grad)


def prompts():
    """Four prompts, padded on the left."""
    ids = torch.randint(3, 64, (4, 6), generator=torch.Generator().manual_seed(8))
    mask = torch.ones_like(ids)
    mask[1, :2], mask[3, :4] = 0, 0
    return dict(input_ids=ids.masked_fill(mask == 0, 0), attention_mask=mask)


def write(model, inputs, **more):
    return model.generate(**inputs, max_new_tokens=7, eos_token_id=None, pad_token_id=0,
                          **{**dict(do_sample=False), **more})


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("arch", DECODERS)
def test_generation_of_mixed_tasks_with_left_padding(arch, beams):
    model, inputs, ids = stack(arch), prompts(), [1, 2, -1, 0]
    more = dict(num_beams=beams, num_return_sequences=beams)
    lora_batch.choose(model, ids)
    both = write(model, inputs, **more).view(4, beams, -1)
    texts = set()
    for i, task in enumerate(ids):
        left = int((inputs["attention_mask"][i] == 0).sum())
        one = write(alone(arch, task), {k: v[i : i + 1, left:] for k, v in inputs.items()}, **more)
        assert torch.equal(both[i, :, -7:], one[:, -7:])
        lora_batch.choose(model, task)
        texts.add(tuple(write(model, row(inputs, 0))[0, -7:].tolist()))
        lora_batch.choose(model, ids)
    assert len(texts) > 1, "the tasks must write different texts, or nothing is shown"


def test_returned_sequences_keep_the_task_of_their_row():
    model, inputs = stack("gpt2"), prompts()
    lora_batch.choose(model, [0, 1, 2, -1])
    torch.manual_seed(0)
    many = write(model, inputs, do_sample=True, num_return_sequences=3)
    lora_batch.choose(model, [0, 0, 0, 1, 1, 1, 2, 2, 2, -1, -1, -1])
    torch.manual_seed(0)
    again = write(model, {k: v.repeat_interleave(3, 0) for k, v in inputs.items()}, do_sample=True)
    assert torch.equal(many, again)


def test_conv1d_is_linear_with_the_weight_transposed():
    torch.manual_seed(0)
    conv, linear = Conv1D(5, 7).double(), nn.Linear(7, 5).double()
    with torch.no_grad():
        linear.weight.copy_(conv.weight.T)
        linear.bias.copy_(conv.bias)
    x, results = torch.randn(4, 3, 7, dtype=torch.float64), []
    for base in (conv, linear):
        model = nn.Sequential(base)
        torch.manual_seed(1)
        lora_batch.attach(model, "0", tasks=2, r=3, alpha=6.0)
        perturb(model)
        lora_batch.choose(model, [0, 1, 1, -1])
        results.append(model(x))
        torch.testing.assert_close(model(x[:, 0]), results[-1][:, 0], **CLOSE)  # no middle dimension
        m, x2 = model[0], x.unflatten(1, (3, 1))
        torch.testing.assert_close(model(x2).flatten(1, 2), results[-1], **CLOSE)
        y = base(x[2]) + 2.0 * (x[2] @ m.A[1].T) @ m.B[1].T
        torch.testing.assert_close(results[-1][2], y, **CLOSE)
    torch.testing.assert_close(*results, **CLOSE)


def test_gradient_checkpointing_sees_the_same_choice():
    model, inputs = stack("llama").train(), batch("llama")
    grads = []
    for on in (False, True):
        if on:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=False))
        model.zero_grad()
        lora_batch.choose(model, [2, -1, 1])
        model(**inputs).loss.backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    torch.testing.assert_close(*grads, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model = nn.Sequential(nn.Linear(7, 5).to(dtype))
    lora_batch.attach(model, "0", tasks=2, r=3, alpha=6.0)
    perturb(model)
    x = torch.randn(4, 6, 7).to(dtype)
    lora_batch.choose(model, [1, 0, -1, 1])
    y = model(x)
    y.square().mean().backward()
    m = model[0]
    assert y.dtype == dtype and m.A.dtype == m.A.grad.dtype == m.B.grad.dtype == torch.float32
    exact = copy.deepcopy(model).double()
    torch.testing.assert_close(y.double(), exact(x.double()), rtol=0.03, atol=0.03)
    with torch.autocast("cpu", torch.bfloat16):
        assert copy.deepcopy(model).float()(x.float()).dtype == torch.bfloat16


def test_compiles_without_a_graph_break_and_follows_the_choice():
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3))
    lora_batch.attach(model, "0", "2", tasks=3, r=2, choice=0)
    perturb(model)
    compiled, x = torch.compile(model, fullgraph=True, backend="aot_eager"), torch.randn(4, 7)
    for ids in ([0, 1, 2, -1], [2, 2, 0, 1]):
        lora_batch.choose(model, ids)
        torch.testing.assert_close(compiled(x), model(x))


def test_dropout_acts_on_the_branch():
    model = nn.Sequential(nn.Linear(7, 5).double()).train()
    lora_batch.attach(model, "0", tasks=2, r=3, dropout=0.5, choice=1)
    perturb(model)
    x = torch.ones(1, 7, dtype=torch.float64).expand(20000, 7)
    y, m = model(x), model[0]
    assert m.training and y.std(0).min() > 0.01
    torch.testing.assert_close(y.mean(0), model.eval()(x[:1])[0], rtol=0, atol=0.1)


def test_how_the_factors_start():
    model = nn.Sequential(nn.Linear(400, 300))
    lora_batch.attach(model, "0", tasks=3, r=8)
    m = model[0]
    assert m.A.shape == (3, 8, 400) and m.B.shape == (3, 300, 8) and m.s.tolist() == [2.0] * 3
    assert not m.B.any() and 0.99 / 20 < m.A.abs().max() <= 1 / 20
    assert not torch.equal(m.A[0], m.A[1])
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 3 * 8 * (400 + 300)


def test_extract_is_the_inverse_of_insert():
    model, saved = stack("t5"), lora.state(single("t5", 1))
    taken = lora_batch.extract(model, 1)
    assert taken.keys() == saved.keys() and all(torch.equal(taken[k], v) for k, v in saved.items())
    before = lora_batch.state(model)
    lora_batch.insert(model, 2, taken)
    after = lora_batch.state(model)
    assert all(torch.equal(after[k][2], v) for k, v in taken.items())
    assert all(torch.equal(after[k][:2], before[k][:2]) for k in after)
    taken["decoder.block.0.layer.0.SelfAttention.q.A"].zero_()  # a copy
    assert lora_batch.state(model)["decoder.block.0.layer.0.SelfAttention.q.A"][1].any()


def test_a_task_taken_out_merges_with_lora():
    model, inputs = stack("bert"), batch("bert")
    lora_batch.choose(model, 1)
    y = model(**inputs).logits
    other = single("bert", 0)
    lora.load(other, lora_batch.extract(model, 1))
    lora.merge(other)
    torch.testing.assert_close(other(**inputs).logits, y, rtol=1e-9, atol=1e-9)


def test_refusals_are_one_sentence_and_change_nothing():
    model, x = nn.Sequential(nn.Linear(7, 5)), torch.randn(4, 7)
    for kw, sentence in ((dict(tasks=0), "tasks = 0: expected at least one"),
                         (dict(tasks=2, r=6), "r = 6: the rank must lie in 1..5 here"),
                         (dict(tasks=2, r=2, choice=2), "task_ids = 2: expected 0..1, or -1 for none")):
        with pytest.raises(ValueError, match=sentence):
            lora_batch.attach(model, "0", **kw)
        assert not lora_batch.sites(model) and all(p.requires_grad for p in model.parameters())
    for call in (lambda: lora_batch.choose(model, 0), lambda: lora_batch.extract(model, 0)):
        with pytest.raises(ValueError, match="the model has no stack of adapters: attach one first"):
            call()
    lora_batch.attach(model, "0", tasks=2, r=2)
    with pytest.raises(ValueError, match=r"no task is chosen: call choose\(model, task_ids\) first"):
        model(x)
    lora_batch.choose(model, [0, 1])
    y = model(x)
    for ids in ([0, 2], [-2, 0], 7, [], torch.arange(0), [0.5], torch.tensor([1.0])):
        with pytest.raises(ValueError, match="task_ids = .*: expected"):
            lora_batch.choose(model, ids)
    assert torch.equal(model(x), y)
    lora_batch.choose(model, [0, 1, 0])
    with pytest.raises(ValueError, match="4 rows for 3 task ids: expected a multiple of 3"):
        model(x)
    saved, before = lora_batch.extract(model, 1), lora_batch.state(model)
    for task in (-1, 2):
        with pytest.raises(ValueError, match=f"task = {task}: expected 0..1"):
            lora_batch.insert(model, task, saved)
    with pytest.raises(KeyError, match="0.B"):
        lora_batch.insert(model, 0, {k: v + 1 for k, v in saved.items() if k != "0.B"})
    with pytest.raises(ValueError, match=r"0.B has shape \(5, 4\), expected \(5, 2\)"):
        lora_batch.insert(model, 0, {**{k: v + 1 for k, v in saved.items()}, "0.B": torch.ones(5, 4)})
    assert all(torch.equal(v, before[k]) for k, v in lora_batch.state(model).items())


def test_the_choice_is_a_copy():
    model, x = nn.Sequential(nn.Linear(7, 5)), torch.randn(2, 7)
    lora_batch.attach(model, "0", tasks=2, r=2)
    perturb(model)
    ids = torch.tensor([0, 1])
    lora_batch.choose(model, ids)
    y = model(x)
    ids.fill_(0)
    assert torch.equal(model(x), y) and "0.chosen" not in model.state_dict()


def test_the_scale_is_exact_and_no_part_of_the_model_file():
    model = nn.Sequential(nn.Linear(7, 5))
    lora_batch.attach(model, "0", tasks=2, r=3, alpha=1.0)
    assert set(model.state_dict()) == {"0.base.weight", "0.base.bias", "0.A", "0.B"}
    assert lora_batch.extract(model, 0)["0.s"].item() == 1 / 3
    taken = {**lora_batch.extract(model, 0), "0.s": torch.tensor(3**-0.5, dtype=torch.float64)}
    lora_batch.insert(model, 1, taken)
    assert lora_batch.state(model)["0.s"].tolist() == [1 / 3, 3**-0.5]


def test_there_is_no_merge():
    assert not hasattr(lora_batch, "merge") and "No merge" in lora_batch.__doc__
