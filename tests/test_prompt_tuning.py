"""Prompt-tuning: words are a prompt, places and positions, mixed tasks, generate(), peft."""

import copy
import warnings

import pytest
import torch
from tiny import ARCHS, batch, build, fit, logits, perturb

from minipeft.additive import prompt_tuning

DECODERS = ("llama", "gpt2")
P = 3


def attached(arch, dtype=torch.float64, seed=3, **keywords):
    model = build(arch, dtype)
    torch.manual_seed(seed)
    prompt_tuning.attach(model, **{"length": P, **keywords})
    perturb(model)
    return model


def prompt(model):
    (soft,) = prompt_tuning.sites(model).values()
    return soft.prompt


def padded(ids, side, extra=2):
    gap = torch.zeros(len(ids), extra, dtype=torch.long)
    order = (gap, ids) if side == "left" else (ids, gap)
    return torch.cat(order, 1), torch.cat([torch.full_like(t, t is ids) for t in order], 1)


# A prompt in words


@pytest.mark.parametrize("after", (0, 1, 2))
@pytest.mark.parametrize("arch", ARCHS)
def test_the_embeddings_of_real_tokens_are_those_tokens_bit_for_bit(arch, after):
    base, model, inputs = build(arch), build(arch), batch(arch)
    words = torch.tensor([9, 30, 5])
    prompt_tuning.attach(model, length=P, init=words[:, None].tolist(), after=after)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    ids = torch.cat([ids[:, :after], words.expand(3, P), ids[:, after:]], 1)
    mask = torch.cat([torch.ones(3, P, dtype=torch.long), mask], 1)
    extra = {"labels": inputs["labels"]} if arch in ("t5", "bert") else {}
    with torch.no_grad():
        whole = base(input_ids=ids, attention_mask=mask, **extra).logits
        out = model(**inputs).logits
    if arch in DECODERS:
        whole = torch.cat([whole[:, :after], whole[:, after + P :]], 1)[inputs["labels"] != -100]
        out = out[inputs["labels"] != -100]
    assert torch.equal(out, whole)


def test_the_loss_ignores_the_slots_and_predicts_the_first_token():
    model, inputs = attached("llama"), batch("llama")
    out, labels = model(**inputs), inputs["labels"]
    whole = build("llama")
    soft = prompt(model)[0].expand(3, -1, -1)
    x = torch.cat([soft, whole.model.embed_tokens(inputs["input_ids"])], 1)
    mask = torch.cat([torch.ones(3, P, dtype=torch.long), inputs["attention_mask"]], 1)
    full = whole(inputs_embeds=x, attention_mask=mask).logits
    scores, wanted = full[:, P - 1 : -1].reshape(-1, 64), labels.reshape(-1)
    loss = torch.nn.functional.cross_entropy(scores, wanted, ignore_index=-100)
    torch.testing.assert_close(out.loss.double(), loss, rtol=0, atol=1e-6)  # transformers' is float32
    assert out.logits.shape == (*labels.shape, 64)


def test_slots_have_an_order():
    model, inputs = attached("llama"), batch("llama")
    y = logits(model, inputs)
    with torch.no_grad():
        prompt(model).copy_(prompt(model).flip(1))
    assert (logits(model, inputs) - y).abs().max() > 1e-2


def test_slots_attend_to_the_text_in_an_encoder_and_not_in_a_decoder():
    for arch, alike in (("bert", False), ("llama", True)):
        model, ids = attached(arch, after=0), batch(arch)["input_ids"][:2]
        with torch.no_grad():
            hidden = model(ids, output_hidden_states=True).hidden_states[-1][:, :P]
        assert torch.equal(hidden[0], hidden[1]) == alike


# Where a prompt starts


def test_random_is_uniform_in_half_a_unit():
    model = build("gpt2", torch.float32)
    prompt_tuning.attach(model, length=500, init="random", tasks=2)
    rows = prompt(model).detach()
    assert rows.shape == (2, 500, 24) and rows.abs().max() <= 0.5 and rows.abs().max() > 0.49
    assert abs(rows.mean()) < 0.01 and abs(rows.var() - 1 / 12) < 0.003
    assert not torch.equal(rows[0], rows[1])


def test_vocabulary_rows_are_distinct_copies():
    model = build("llama")
    table = model.model.embed_tokens.weight
    prompt_tuning.attach(model, length=64)
    found = (prompt(model)[0][:, None] == table[None]).all(-1)
    assert found.any(0).all() and found.any(1).all()  # all 64 rows of it, each once
    before = table.clone()
    fit(prompt_tuning, model, batch("llama"))
    assert torch.equal(table, before) and not torch.equal(prompt(model)[0][found.nonzero()[:, 0]], before)


def test_more_slots_than_words_repeat_them():
    model = build("llama")
    prompt_tuning.attach(model, length=100)
    assert len(prompt(model)[0].unique(dim=0)) == 64


def test_class_words_are_the_means_of_their_tokens():
    model = build("t5")
    table = model.shared.weight
    prompt_tuning.attach(model, length=5, init=[[7], [8, 9, 10]], tasks=2)
    for rows in prompt(model):
        assert torch.equal(rows[0], table[7])
        torch.testing.assert_close(rows[1], table[8:11].mean(0))
        assert all((row == table).all(-1).any() for row in rows[2:])


# Places and positions


@pytest.mark.parametrize("arch, side", (("llama", "left"), ("llama", "right"), ("gpt2", "left"), ("gpt2", "right"),
                                        ("bert", "right"), ("t5", "left"), ("t5", "right")))
def test_a_padded_row_is_the_row_alone(arch, side):
    model, ids = attached(arch), batch(arch)["input_ids"][:2]
    extra = {"decoder_input_ids": torch.tensor([[0, 7, 8], [0, 9, 4]])} if arch == "t5" else {}
    more, mask = padded(ids, side)
    with torch.no_grad():
        alone, out = model(ids, **extra).logits, model(more, attention_mask=mask, **extra).logits
    if arch in DECODERS:
        out = out[mask.bool()].view(2, ids.shape[1], -1)
    torch.testing.assert_close(out, alone, rtol=0, atol=1e-12)


def placed(model, **inputs):
    """What the model's forward is given."""
    seen = {}
    model.register_forward_pre_hook(lambda m, args, kwargs: seen.update(kwargs), with_kwargs=True)
    model(**inputs)
    return seen


def test_slots_stand_next_to_the_text_under_both_paddings():
    model = attached("gpt2", after=1)
    ids = torch.tensor([[0, 0, 5, 6, 7], [5, 6, 7, 0, 0]])
    mask = (ids > 0).long()
    seen = placed(model, input_ids=ids, attention_mask=mask, labels=ids.masked_fill(ids == 0, -100))
    assert seen["input_ids"].tolist() == [[0, 0, 5, 64, 65, 66, 6, 7], [5, 64, 65, 66, 6, 7, 0, 0]]
    assert seen["attention_mask"].tolist() == [[0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 0, 0]]
    assert seen["labels"].tolist() == [[-100, -100, 5, -100, -100, -100, 6, 7],
                                       [5, -100, -100, -100, 6, 7, -100, -100]]
    assert seen["position_ids"].tolist() == [[0, 0, 0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5, 5, 5]]


def test_positions_that_the_caller_gives_are_kept():
    model = attached("gpt2")
    ids, place = torch.tensor([[5, 6, 7], [8, 9, 4]]), torch.tensor([[4, 5, 6]])
    assert placed(model, input_ids=ids, position_ids=place)["position_ids"].tolist() == [[4, 5, 6, 7, 8, 9]] * 2


def test_the_first_token_of_an_encoder_stays_first():
    model, inputs = attached("bert"), batch("bert")
    types = torch.zeros_like(inputs["input_ids"])
    types[:, 4:] = 1
    seen = placed(model, **inputs, token_type_ids=types)
    assert seen["input_ids"][:, :5].tolist() == [[int(r), 64, 65, 66, int(s)] for r, s in inputs["input_ids"][:, :2]]
    assert seen["token_type_ids"].tolist() == [[0] * 7 + [1] * 3] * 3
    assert "position_ids" not in seen and torch.equal(seen["labels"], inputs["labels"])
    with torch.no_grad():
        pooled = model.bert(seen["input_ids"], seen["attention_mask"], types.new_tensor([0] * 7 + [1] * 3).expand(3, -1))
        expected = model.bert.pooler(pooled.last_hidden_state)
        first = torch.tanh(model.bert.pooler.dense(pooled.last_hidden_state[:, 0]))
    assert torch.equal(expected, first)


def test_t5_has_its_prompt_in_the_encoder_only():
    model, inputs = attached("t5"), batch("t5")
    out = model(**inputs, output_hidden_states=True)
    assert out.encoder_last_hidden_state.shape[1] == 7 + P and out.decoder_hidden_states[0].shape[1] == 5
    assert out.logits.shape == (3, 5, 64) and prompt_tuning.attach(build("t5")) == ["encoder.embed_tokens"]
    square = {**inputs, "labels": torch.full((3, 7), 5)}  # as long as the text, and still the decoder's
    assert model(**square).logits.shape == (3, 7, 64)


# Several tasks in one batch


@pytest.mark.parametrize("arch", ARCHS)
def test_a_mixed_batch_is_its_rows_alone(arch):
    model, inputs, tasks = attached(arch, tasks=3), batch(arch), [2, 0, 2]
    out = model(**inputs, task_ids=torch.tensor(tasks)).logits
    for i, task in enumerate(tasks):
        row = {k: v[i : i + 1] for k, v in inputs.items()}
        alone = model(**row, task_ids=[task]).logits
        real = slice(None) if arch in ("bert", "t5") else inputs["attention_mask"][i].bool()
        torch.testing.assert_close(out[i][real], alone[0][real], rtol=0, atol=1e-12)
    assert (model(**inputs, task_ids=[0, 0, 0]).logits[0] - out[0]).abs().max() > 1e-3


def test_gradients_of_a_mixed_batch_add_up_and_absent_tasks_get_zero():
    model, inputs = attached("llama", tasks=3), batch("llama")
    total = lambda **more: model(**inputs, **more).logits.log_softmax(-1)[..., 5].sum(1)  # per row
    grad = lambda loss: torch.autograd.grad(loss, prompt(model))[0]
    mixed = grad(total(task_ids=[2, 0, 2]).sum())
    rows = [grad(total(task_ids=[t] * 3)[i]) for i, t in enumerate((2, 0, 2))]
    torch.testing.assert_close(mixed, sum(rows), rtol=0, atol=1e-12)
    assert mixed[1].eq(0).all() and mixed[0].abs().max() > 1e-4 and mixed[2].abs().max() > 1e-4


@pytest.mark.parametrize("bad", (None, [0, 1], [0, 1, 3], [-1, 0, 0], [[0, 1, 2]]))
def test_task_ids_are_checked(bad):
    with pytest.raises(ValueError, match="3 numbers from 0 to 2"):
        attached("llama", tasks=3)(**batch("llama"), task_ids=bad)


# generate()


@pytest.mark.parametrize("how", ({}, {"use_cache": False}, {"cache_implementation": "static"}, {"num_beams": 2}))
@pytest.mark.parametrize("arch", ("llama", "gpt2", "t5"))
def test_a_mixed_batch_generates_what_each_row_generates_alone(arch, how):
    if arch == "t5":  # rows of this toy all end in the same token unless it is pushed
        how = {**how, "min_new_tokens": 5}
    model = attached(arch, tasks=2, init="random")
    with torch.no_grad():
        prompt(model).mul_(4)
    ids, ways = batch(arch)["input_ids"], {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, **how}
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    out = model.generate(ids.masked_fill(mask == 0, 0), attention_mask=mask, task_ids=[1, 0, 1], **ways)
    for i, task in enumerate((1, 0, 1)):
        text = ids[i : i + 1, 2 * (i == 1) :]
        alone = model.generate(input_ids=text, task_ids=[task], **ways)
        start = 2 * (i == 1) if arch != "t5" else 0
        assert torch.equal(out[i, start:], alone[0])
    if arch == "llama":  # the toy GPT-2 says the same under any prompt
        assert not torch.equal(out[:1], model.generate(ids[:1], task_ids=[0], **ways))
    assert out.max() < 64 and (arch == "t5" or torch.equal(out[:, :7], ids.masked_fill(mask == 0, 0)))


@pytest.mark.parametrize("arch", DECODERS)
def test_generation_is_greedy_choice_by_full_passes(arch):
    model, ids = attached(arch), batch(arch)["input_ids"]
    more, mask = padded(ids, "left")
    out = model.generate(more, attention_mask=mask, max_new_tokens=5, do_sample=False, eos_token_id=None)
    with torch.no_grad():
        for _ in range(5):
            last = model(ids).logits[:, -1]
            ids = torch.cat([ids, last.argmax(-1, keepdim=True)], 1)
    assert torch.equal(out[:, 2:], ids)


def test_generate_returns_its_dictionary_without_slots():
    model, ids = attached("llama"), batch("llama")["input_ids"]
    out = model.generate(ids, max_new_tokens=2, return_dict_in_generate=True, output_scores=True)
    assert torch.equal(out.sequences, model.generate(ids, max_new_tokens=2)) and len(out.scores) == 2


@pytest.mark.parametrize("arch", DECODERS)
def test_a_cache_kept_by_hand(arch):
    model, ids = attached(arch), batch(arch)["input_ids"]
    more, mask = padded(ids, "left")
    with torch.no_grad():
        whole = model(more, attention_mask=mask).logits
        first = model(more[:, :-1], attention_mask=mask[:, :-1], use_cache=True)
        then = model(more[:, -1:], attention_mask=mask, past_key_values=first.past_key_values)
    torch.testing.assert_close(then.logits[:, 0], whole[:, -1], rtol=0, atol=1e-12)
    assert first.past_key_values.get_seq_length() == 9 + P


def test_an_error_in_generate_leaves_the_model_usable():
    model, inputs = attached("llama"), batch("llama")
    y = logits(model, inputs)
    with pytest.raises(ValueError, match="nonsense"):
        model.generate(inputs["input_ids"], nonsense=1)
    assert torch.equal(logits(model, inputs), y)


# Hugging Face's peft, where it is right and where it is not


def peft_prompt(model, arch):
    peft = pytest.importorskip("peft")
    task = {"bert": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM"}.get(arch, "CAUSAL_LM")
    theirs = peft.get_peft_model(model, peft.PromptTuningConfig(task_type=task, num_virtual_tokens=P))
    for n, p in theirs.named_parameters():
        p.requires_grad_("prompt_encoder" in n)
    perturb(theirs)
    (weight,) = (p for p in theirs.parameters() if p.requires_grad)
    return theirs.eval(), weight


@pytest.mark.parametrize("arch", ARCHS)
def test_equal_to_peft_bit_for_bit(arch):
    theirs, weight = peft_prompt(build(arch, torch.float32), arch)
    model, inputs = attached(arch, torch.float32, after=0), batch(arch)
    prompt_tuning.load(model, {k: weight.detach()[None, :P] for k in prompt_tuning.state(model)})
    a, b = model(**inputs), theirs(**inputs)
    real, full = (slice(None), b.logits)
    if arch in DECODERS:
        real, full = inputs["attention_mask"].bool(), b.logits[:, P:]
    assert torch.equal(a.logits[real], full[real]) and torch.equal(a.loss, b.loss)
    a.loss.backward()
    b.loss.backward()
    assert torch.equal(prompt(model).grad[0], weight.grad[:P]) and weight.grad.abs().max() > 1e-5
    if arch == "t5":  # twice the rows are trainable there, and the second half is dead
        assert weight.shape[0] == 2 * P and weight.grad[P:].eq(0).all()
    else:
        assert weight.shape[0] == P


def test_peft_drops_positions_and_so_a_left_padded_row_changes():
    theirs, weight = peft_prompt(build("gpt2", torch.float32), "gpt2")
    model, ids = attached("gpt2", torch.float32), batch("gpt2")["input_ids"][:1]
    prompt_tuning.load(model, {k: weight.detach()[None] for k in prompt_tuning.state(model)})
    more, mask = padded(ids, "left")
    place = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        alone = theirs(ids).logits[:, P:]
        wrong = theirs(more, attention_mask=mask, position_ids=place).logits[:, P + 2 :]
        right = model(more, attention_mask=mask, position_ids=place).logits[:, 2:]
    assert (wrong - alone).abs().max() > 0.05
    torch.testing.assert_close(right, alone, rtol=0, atol=1e-5)


def test_peft_has_no_static_cache():
    theirs, _ = peft_prompt(build("llama", torch.float32), "llama")
    with pytest.raises((IndexError, KeyError)):  # one or the other, by the version of transformers
        theirs.generate(input_ids=batch("llama")["input_ids"], max_new_tokens=2, cache_implementation="static")


# The ways in which a model is run


@pytest.mark.parametrize("arch", ARCHS)
def test_gradient_checkpointing_changes_nothing(arch):
    model, inputs = attached(arch), batch(arch)
    for m in model.modules():
        if hasattr(m, "p"):
            m.p = 0.0
        for name in ("dropout", "attention_dropout"):
            if isinstance(getattr(m, name, None), float):
                setattr(m, name, 0.0)
    model.train()
    grads = []
    for on in (False, True):
        if on:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(**inputs).loss.backward()
        grads.append(prompt(model).grad.clone())
    torch.testing.assert_close(*grads, rtol=0, atol=1e-12)


@pytest.mark.parametrize("arch", ARCHS)
def test_bfloat16_by_autocast_and_by_weights(arch):
    inputs, wide = batch(arch), attached(arch, torch.float32)
    half = build(arch, torch.float32).bfloat16()
    prompt_tuning.attach(half, length=P)
    prompt_tuning.load(half, prompt_tuning.state(wide))
    exact = wide(**inputs).logits
    with torch.autocast("cpu", torch.bfloat16):
        out = wide(**inputs)
    out.loss.backward()
    assert prompt(wide).grad.dtype == torch.float32 and prompt(half).dtype == torch.float32
    assert (out.logits.float() - exact).abs().max() < 0.05 * exact.abs().max()
    assert (half(**inputs).logits.float() - exact).abs().max() < 0.1 * exact.abs().max()


@pytest.mark.parametrize("arch", ARCHS)
def test_two_models_and_a_copy_do_not_meet(arch):
    inputs = batch(arch)
    one, two, base = attached(arch), attached(arch, seed=4, length=5), build(arch)
    a, b, c = (logits(m, inputs) for m in (one, two, base))
    copied = copy.deepcopy(one)
    perturb(one)
    prompt_tuning.detach(two)
    assert torch.equal(logits(copied, inputs), a) and not torch.equal(logits(one, inputs), a)
    assert torch.equal(logits(two, inputs), c) and torch.equal(logits(base, inputs), c)
    assert not torch.equal(a, b)
    if arch != "bert":
        ids = inputs["input_ids"]
        assert copied.generate.__self__ is copied and "generate" not in vars(two)
        copied.generate(ids, max_new_tokens=2)
    prompt_tuning.detach(copied)
    assert torch.equal(logits(copied, inputs), c)


def test_a_classifier_that_reads_the_last_token():
    import transformers as tf
    from tiny import SIZE

    torch.manual_seed(0)
    model = tf.LlamaForSequenceClassification(SIZE["llama"]).double().eval()
    ids = batch("llama")["input_ids"]
    words = torch.tensor([9, 30, 5])
    whole = model(torch.cat([words.expand(3, P), ids], 1)).logits
    prompt_tuning.attach(model, length=P, init=words[:, None].tolist())
    more, mask = padded(ids, "right")
    with torch.no_grad():
        torch.testing.assert_close(model(more, attention_mask=mask).logits, whole, rtol=0, atol=1e-12)


# Refusals


@pytest.mark.parametrize("keywords", ({"length": 0}, {"tasks": 0}, {"init": "zero"}, {"init": [[1]] * 4}, {"init": [[1], []]}))
def test_settings_are_checked_first(keywords):
    model = build("llama")
    with pytest.raises(ValueError, match="expected"):
        prompt_tuning.attach(model, **{"length": P, **keywords})
    assert not prompt_tuning.sites(model) and all(p.requires_grad for p in model.parameters())


def test_a_second_prompt_is_refused():
    with pytest.raises(ValueError, match="SoftEmbedding"):
        prompt_tuning.attach(attached("llama"))


def test_embeddings_or_a_square_mask_are_refused():
    model, inputs = attached("llama"), batch("llama")
    with pytest.raises(ValueError, match="input_ids"):
        model(inputs_embeds=torch.zeros(1, 4, 24, dtype=torch.float64))
    with pytest.raises(ValueError, match="two axes"):
        model(inputs["input_ids"], attention_mask=torch.ones(3, 1, 7, 7))


def test_the_counts_of_the_paper():
    widths = {"small": 512, "base": 768, "large": 1024, "xl": 2048, "xxl": 4096}
    assert {k: 100 * d for k, d in widths.items()} == {
        "small": 51_200, "base": 76_800, "large": 102_400, "xl": 204_800, "xxl": 409_600}
    model = attached("t5", length=7)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 7 * 24
