"""PaFI: the smallest numbers, whatever the data."""

import math

import pytest
import torch
import transformers as tf
from tiny import batch, build
from torch import nn

from minipeft.reparam import lora
from minipeft.selective import pafi


def chosen(model, base):
    """One flat mask over all tensors of `base`, in their order."""
    at = {n: m.idx.long() for n, m in pafi.sites(model).items()}
    return {n: torch.isin(torch.arange(p.numel()), at.get(n, torch.empty(0, dtype=torch.long)))
            for n, p in base.named_parameters()}


@pytest.mark.parametrize("keep", ("smallest", "largest", "random"))
@pytest.mark.parametrize("budget", (1, 37, 2000))
def test_one_ranking_for_the_whole_model(keep, budget):
    model, base = build("gpt2"), build("gpt2")
    pafi.attach(model, budget=budget, keep=keep)
    masks = chosen(model, base)
    M = torch.cat(list(masks.values()))
    size = torch.cat([p.detach().abs().view(-1) for p in base.parameters()])
    assert M.sum() == budget
    if keep == "smallest":
        assert size[M].max() <= size[~M].min()
    if keep == "largest":
        assert size[M].min() >= size[~M].max()
    if keep == "random":
        assert abs(size[M].mean() - size.mean()) < 6 * size.std() / math.sqrt(budget)


def test_everything_can_be_chosen():
    model = build("bert")
    N = sum(p.numel() for p in model.parameters())
    pafi.attach(model, budget=N)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == N


def test_ties_go_to_the_earlier_place():
    model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Linear(3, 2, bias=False))
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(0.5)
    pafi.attach(model, budget=14)
    assert {n: m.idx.tolist() for n, m in pafi.sites(model).items()} == {
        "0.weight": list(range(12)), "1.weight": [0, 1]}


def test_gaussian_tensors_give_in_inverse_proportion_to_their_width():
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(500, 400, bias=False) for _ in range(3)])
    sds = (0.02, 0.04, 0.08)
    for layer, s in zip(model, sds, strict=True):
        nn.init.normal_(layer.weight, std=s)
    pafi.attach(model, budget=3000)  # 0.5 %
    share = [m.idx.numel() / 200_000 for m in pafi.sites(model).values()]
    assert share[0] / share[1] == pytest.approx(2, rel=0.1)
    assert share[1] / share[2] == pytest.approx(2, rel=0.15)
    assert share == pytest.approx([0.0087, 0.0043, 0.0021], rel=0.1)


def test_zero_biases_eat_the_budget_unless_zeros_are_excluded():
    torch.manual_seed(0)
    config = tf.BertConfig(vocab_size=64, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
                           num_attention_heads=4, max_position_embeddings=64)
    model = tf.BertForSequenceClassification(config)  # fresh: biases 0, gains 1
    zeros = sum(int((p == 0).sum()) for p in model.parameters())
    base = {n: p.detach().clone() for n, p in model.named_parameters()}
    pafi.attach(model, budget=zeros)
    assert all((m.before == 0).all() for m in pafi.sites(model).values())
    assert not any("LayerNorm.weight" in n for n in pafi.sites(model))
    pafi.detach(model)
    pafi.attach(model, budget=zeros, zeros=False)
    assert all((m.before != 0).all() for m in pafi.sites(model).values())
    assert not any(n.endswith(".bias") for n in pafi.sites(model))
    pafi.detach(model)
    N = sum(p.numel() for p in base.values())
    with pytest.raises(ValueError, match=str(N - zeros)):
        pafi.attach(model, budget=N, zeros=False)


def test_over_fresh_lora_it_takes_only_b_and_only_the_first_layers():
    model = build("llama")
    lora.attach(model, "q_proj", "v_proj", "down_proj", r=2)
    b = {n: p.numel() for n, p in model.named_parameters() if n.endswith(".B")}
    names = pafi.attach(model, budget=sum(b.values()) // 2, among="trainable")
    assert all(n.endswith(".B") and ".layers.0." in n for n in names)
    pafi.detach(model)
    for n, p in model.named_parameters():
        p.requires_grad_(n.endswith((".A", ".B")))
    names = pafi.attach(model, budget=sum(b.values()) // 2, among="trainable", zeros=False)
    assert names and all(n.endswith(".A") for n in names)


BUDGETS = {  # model: (config, r = 32, r = 2), the lecture's table for mathematics
    "LLaMA-7B": (tf.LlamaConfig(hidden_size=4096, num_hidden_layers=32, intermediate_size=11008,
                                num_attention_heads=32, vocab_size=8), 56_098_816, 3_506_176),
    "Qwen2.5-7B": (tf.Qwen2Config(hidden_size=3584, num_hidden_layers=28, intermediate_size=18944,
                                  num_attention_heads=28, num_key_value_heads=4, vocab_size=8), 54_132_736, 3_383_296),
    "Qwen2.5-3B": (tf.Qwen2Config(hidden_size=2048, num_hidden_layers=36, intermediate_size=11008,
                                  num_attention_heads=16, num_key_value_heads=2, vocab_size=8), 40_108_032, 2_506_752),
    "Qwen2.5-1.5B": (tf.Qwen2Config(hidden_size=1536, num_hidden_layers=28, intermediate_size=8960,
                                    num_attention_heads=12, num_key_value_heads=2, vocab_size=8), 24_772_608, 1_548_288),
}
TABLE = {"LLaMA-7B": "56M 3.5M", "Qwen2.5-7B": "54M 3.4M", "Qwen2.5-3B": "40M 2.5M", "Qwen2.5-1.5B": "25M 1.5M"}


@pytest.mark.parametrize("name", BUDGETS)
def test_the_eight_budgets_of_the_lecture(name):
    config, *expected = BUDGETS[name]
    printed = []
    for r, count in zip((32, 2), expected, strict=True):
        with torch.device("meta"):
            model = tf.AutoModelForCausalLM.from_config(config)
            lora.attach(model, "q_proj", "k_proj", "v_proj", "up_proj", "down_proj", r=r)
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count
        printed.append(f"{count / 1e6:.0f}M" if count > 1e7 else f"{count / 1e6:.1f}M")
    assert " ".join(printed) == TABLE[name]


def test_the_mask_is_the_same_for_two_tasks():
    one, two = build("bert"), build("bert", num_labels=3)
    assert pafi.attach(one, budget=90) == pafi.attach(two, budget=90)
    one(**batch("bert")).loss.backward()
    assert all(torch.equal(a.idx, b.idx) for a, b in
               zip(pafi.sites(one).values(), pafi.sites(two).values(), strict=True))


def test_settings_outside_the_list_are_refused():
    for bad in (dict(keep="big"), dict(among="some"), dict(exclude=("nope",))):
        with pytest.raises(ValueError):
            pafi.attach(build("bert"), budget=5, **bad)
