"""BitFit: which biases, how many, and what the key bias does."""

import copy

import pytest
import torch
import transformers as tf
from tiny import SIZE, batch, build, logits

from minipeft.selective import bitfit


def trained(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def fit(model, inputs, steps=5):
    opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, weight_decay=0.1)
    for _ in range(steps):
        opt.zero_grad()
        model(**inputs).loss.backward()
        opt.step()


@pytest.mark.parametrize("config, all_of_them, q_and_m2", (
    (tf.BertConfig(vocab_size=28996), 102_912, 46_080),
    (tf.BertConfig(vocab_size=28996, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16,
                   intermediate_size=4096), 272_384, 122_880),
), ids=("base", "large"))
def test_the_counts_of_the_paper(config, all_of_them, q_and_m2):
    with torch.device("meta"):
        model = tf.BertModel(config)
    d, f, L = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    biases = {n: p.numel() for n, p in model.named_parameters() if n.endswith("bias")}
    assert sum(biases.values()) == all_of_them == L * (7 * d + f) + 2 * d
    assert sum(v for n, v in biases.items() if "query" in n or "intermediate.dense" in n) == q_and_m2


def test_all_biases_and_nothing_else_move():
    model, inputs = build("bert"), batch("bert")
    base, c = copy.deepcopy(model), model.config
    names = bitfit.attach(model)
    assert names == [n for n, _ in base.named_parameters() if n.endswith(".bias")]
    assert trained(model) == 2 * (7 * c.hidden_size + c.intermediate_size) + 2 * c.hidden_size + 3
    fit(model, inputs)
    bitfit.merge(model)
    for n, p in model.named_parameters():
        assert torch.equal(p, base.get_parameter(n)) == (not n.endswith(".bias")), n


def test_a_named_subset():
    model, c = build("bert"), SIZE["bert"]
    names = bitfit.attach(model, "query", "intermediate.dense")
    assert len(names) == 4 and all("query" in n or "intermediate.dense" in n for n in names)
    assert trained(model) == 2 * (c.hidden_size + c.intermediate_size)
    bitfit.detach(model)
    assert not any("LayerNorm" in n or "classifier" in n
                   for n in bitfit.attach(model, exclude=("LayerNorm", "classifier")))


def test_a_fused_bias_is_cut_in_three():
    model, inputs, d = build("gpt2"), batch("gpt2"), SIZE["gpt2"].n_embd
    base = copy.deepcopy(model)
    bitfit.attach(model, "c_attn:q", "c_attn:v")
    assert trained(model) == 2 * 2 * d
    fit(model, inputs)
    bitfit.merge(model)
    for old, new in zip(base.transformer.h, model.transformer.h, strict=True):
        same = (old.attn.c_attn.bias == new.attn.c_attn.bias).view(3, d)
        assert same[1].all() and not same[0].any() and not same[2].any()
    model = build("gpt2")
    for bad in ("c_fc:q", "c_attn:z"):
        with pytest.raises(ValueError, match="fuses"):
            bitfit.attach(model, bad)
    assert trained(model) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("arch", ("llama", "t5"))
def test_a_model_without_biases_is_refused(arch):
    with pytest.raises(ValueError, match="no biases"):
        bitfit.attach(build(arch))  # T5's relative_attention_bias.weight is a weight


def test_a_name_without_a_bias_is_refused():
    model = build("bert")
    with pytest.raises(ValueError, match="word_embeddings"):
        bitfit.attach(model, "query", "word_embeddings")
    assert not bitfit.sites(model) and all(p.requires_grad for p in model.parameters())


def other(name):
    """A small model with key biases, its weights three times the usual, in float64."""
    torch.manual_seed(0)
    small = dict(vocab_size=64, hidden_size=24, num_hidden_layers=2, num_attention_heads=4)
    model = {
        "bert": lambda: tf.BertModel(tf.BertConfig(**small, intermediate_size=40)),
        "opt": lambda: tf.OPTModel(tf.OPTConfig(**small, ffn_dim=40, word_embed_proj_dim=24)),
        "gpt2": lambda: tf.GPT2Model(tf.GPT2Config(vocab_size=64, n_embd=24, n_layer=2, n_head=4)),
        "qwen2": lambda: tf.Qwen2Model(tf.Qwen2Config(**small, intermediate_size=40, num_key_value_heads=2)),
        "deberta": lambda: tf.DebertaV2Model(tf.DebertaV2Config(
            **small, intermediate_size=40, relative_attention=True, pos_att_type=["p2c", "c2p"],
            share_att_key=True, position_biased_input=False, type_vocab_size=0, norm_rel_ebd="layer_norm")),
    }[name]().double().eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(3)
    return model


KEY = dict(bert="key", opt="k_proj", gpt2="c_attn:k", qwen2="k_proj", deberta="key_proj")


@pytest.mark.parametrize("name, matters", (
    ("bert", False), ("opt", False), ("gpt2", False), ("qwen2", True), ("deberta", True)))
def test_the_key_bias_cancels_unless_positions_meet_it(name, matters):
    model, ids = other(name), torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(1))
    names = bitfit.attach(model, KEY[name])
    assert len(names) == 2
    y = model(input_ids=ids).last_hidden_state
    y.square().mul(torch.linspace(0, 1, 24, dtype=torch.float64)).sum().backward()
    gradient = max(m.values.grad.abs().max().item() for m in bitfit.sites(model).values())
    with torch.no_grad():
        for m in bitfit.sites(model).values():
            m.values.add_(torch.randn(m.values.shape, generator=torch.Generator().manual_seed(2)))
        change = (model(input_ids=ids).last_hidden_state - y).abs().max().item()
    if matters:
        assert change > 1e-2 and gradient > 1e-5
    else:
        assert change < 1e-12 and gradient < 1e-12


def test_the_value_bias_repeats_the_output_bias():
    """Rows of a softmax sum to one: the gradient of b_v is W_o' times that of b_o."""
    model, inputs = build("bert"), batch("bert")
    model(**inputs).loss.backward()
    for layer in model.bert.encoder.layer:
        b_v, out = layer.attention.self.value.bias.grad, layer.attention.output.dense
        torch.testing.assert_close(b_v, out.weight.T @ out.bias.grad, rtol=1e-9, atol=1e-14)


def test_putting_the_key_bias_back_changes_nothing_and_the_query_bias_does():
    model, inputs = build("bert"), batch("bert")
    bitfit.attach(model, "query", "key")
    fit(model, inputs, steps=10)
    y = logits(model, inputs)
    for name, cancels in (("key", True), ("query", False)):
        other = copy.deepcopy(model)
        with torch.no_grad():
            for n, m in bitfit.sites(other).items():
                if name in n:
                    m.values.copy_(m.before)
        gap = (logits(other, inputs) - y).abs().max()
        assert (gap < 1e-12) == cancels


def test_the_saved_values_are_the_tuned_model():
    model, inputs = build("bert"), batch("bert")
    bitfit.attach(model)
    fit(model, inputs)
    y, saved = logits(model, inputs), bitfit.state(model)
    fresh = build("bert")
    bitfit.load(fresh, saved)
    assert torch.equal(logits(fresh, inputs), y)
