"""The small decoder: its generators, its training script, and the model that is shipped."""

import hashlib
import importlib.util
import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

DATA = Path(__file__).resolve().parent.parent / "data"


def _module(name):
    """A script of data/, found by its path: data/ is not a package."""
    if str(DATA) not in sys.path:
        sys.path.insert(0, str(DATA))
    spec = importlib.util.spec_from_file_location(name, DATA / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


generators = _module("generators")
pretrain = _module("pretrain")


def _files():
    return {n: [json.loads(line) for line in open(DATA / "tasks" / f"{n}.jsonl", encoding="utf-8")]
            for n in generators.TASKS}


@pytest.fixture(scope="module")
def scribe():
    folder = DATA / "scribe"
    model = AutoModelForCausalLM.from_pretrained(folder)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def test_generators_are_functions_of_the_seed():
    text = "".join(t for _, t in generators.documents(0, 500))
    assert text == "".join(t for _, t in generators.documents(0, 500))
    assert text != "".join(t for _, t in generators.documents(1, 500))
    # The same bytes on every machine and in every process.
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "c857a62272bfd16b"


def test_task_files_are_what_the_generators_write():
    for name, rows in _files().items():
        assert rows == generators.task_rows(name)
        prompts = [r["prompt"] for r in rows]
        assert len(set(prompts)) == len(prompts) == sum(generators.SIZES.values())
        assert all(r["target"].startswith(" ") and not r["prompt"].endswith(" ") for r in rows)


def test_pretraining_never_shows_a_task():
    texts = [d for p in range(len(generators.PHASES)) for d in generators.documents("leak", 2000, p)]
    text = "\n".join(t for _, t in texts)
    for rows in _files().values():
        assert not [r for r in rows if r["prompt"].split("\n")[0] in text]
    assert not [n for n in generators.TASK_NAMES if n in text]
    assert [n for n in generators.NAMES if n in text]
    # What is said twice is prose or a table, never both.
    twice = [t for skill, t in texts if skill == "twice"]
    assert len(twice) > 1000
    for t in twice:
        first, second = t.split("\n")
        assert ("[" in first) == ("[" in second) and ("." in first) == ("." in second)
    for marker in ("Problem:", "Solve:", "Code", "Secret", "Say:", "Table:"):
        assert marker not in text


def test_held_out_families_are_not_in_pretraining():
    """A document is explained by a held-out family only where a trained one explains it too."""
    def explains(places, up, pairs):
        return all((("".join(a[i] for i in places(len(a)))).upper() if up else
                    "".join(a[i] for i in places(len(a)))) == b for a, b in pairs)

    seen = 0
    for skill, text in generators.documents("families", 4000):
        if skill != "in_context":
            continue
        pairs = [tuple(s.replace(" ", "") for s in line[2:].split(" = "))
                 for line in text.splitlines()]
        seen += 1
        assert not [n for n, f in generators.HELD_OUT.items() if explains(*f, pairs)], text
    assert seen > 1500


def test_only_the_second_telling_carries_loss(scribe):
    _, tokenizer = scribe
    ids, labels = pretrain.row(tokenizer, "row", "twice")
    kept = tokenizer.decode([i for i, y in zip(ids, labels) if y != -100])
    parts = [d.partition("\n")[2] for d in tokenizer.decode(ids).split(pretrain.END)]
    assert kept == pretrain.END.join(parts) and len(kept) > 50


def test_a_mixed_restaurant_keeps_its_attributes():
    import random
    r = generators.restaurant(random.Random(0))
    other = generators.mixed(random.Random(0), r)
    assert list(other) == list(r) and other != r
    assert all(w in ["The", *generators.MIXED] for v in other.values() for w in v.split())
    # No adjective of a name is among them, so no name of the tasks comes out.
    assert not set(generators.MIXED) & set(generators.ADJECTIVES)


def test_letter_families_by_hand():
    import random
    rng = random.Random(0)
    wanted = {"reverse": lambda w: w[::-1], "sort": lambda w: "".join(sorted(w)),
              "swap_ends": lambda w: w[-1] + w[1:-1] + w[0], "double": lambda w: "".join(
                  c + c for c in w), "rotate_right_upper": lambda w: (w[-1] + w[:-1]).upper(),
              "second": lambda w: w[1], "middle": lambda w: w[1:-1],
              "next_letter": lambda w: w.translate(str.maketrans(
                  "abcdefghijklmnopqrstuvwxyz", "bcdefghijklmnopqrstuvwxyza"))}
    for name, f in wanted.items():
        for n in (3, 4, 5):
            assert all(f(a) == b and len(a) == n
                       for a, b in generators.family_pairs(rng, name, n, 5))
    for a, b in generators.family_pairs(rng, "unscramble", 4, 5):
        assert sorted(a) == sorted(b) and b in generators.WORDS


def test_arithmetic_is_right():
    checked = 0
    words = {w: i for i, w in enumerate(generators.NUMBER_WORDS)}
    for skill, text in generators.documents("sums", 8000):
        if skill != "arithmetic":
            continue
        if m := re.fullmatch(r" (\d+) ([+-]) (\d+) = (\d+)", text):
            a, sign, b, c = m.groups()
        elif m := re.fullmatch(r"(\w+) (plus|minus) (\w+) is (\w+)", text):
            a, sign, b, c = m.groups()
            a, b, c = words[a], words[b], words[c]
        else:
            a, b, c = re.findall(r"\d+", text)
            sign = "plus" if "more" in text else "minus"
        assert int(a) + (int(b) if sign in ("+", "plus") else -int(b)) == int(c), text
        checked += 1
    assert checked > 1000


def test_word_problems_are_right():
    for r in _files()["word_problems"]:
        total, *changes = re.findall(r"had (\d+) \w+, then (.*), then (.*)\.", r["prompt"])[0]
        total = int(total)
        for change, equation in zip(changes, r["target"].split(", "), strict=True):
            n = int(re.search(r"\d+", change)[0])
            after = total + n if change.endswith("more") else total - n
            assert equation.strip() == f"{total} {'+' if after > total else '-'} {n} = {after}"
            total = after


def test_slots_and_sentences_say_the_same():
    for r in _files()["slots"]:
        for value in re.findall(r"\[(.*?)\]", r["target"]):
            assert value in r["prompt"]
    for r in _files()["table_to_text"]:
        for value in re.findall(r"\[(.*?)\]", r["prompt"]):
            assert value in r["target"]


def test_tokenizer_round_trips_and_keeps_letters_apart(scribe):
    _, tokenizer = scribe
    for _, text in generators.documents("round trip", 300):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    odd = "Grüße, 你好 \t🙂\n\n  x"
    assert tokenizer.decode(tokenizer.encode(odd)) == odd
    for c in generators.ALPHABET + generators.ALPHABET.upper():
        assert len(tokenizer.encode(f" {c}")) == 1
    for name, rows in _files().items():
        longest = max(len(tokenizer.encode(r["prompt"] + r["target"])) for r in rows)
        assert longest <= 72, (name, longest)
    assert tokenizer.pad_token_id is not None and tokenizer.eos_token_id is not None
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer.padding_side == "left"


def test_the_shipped_model(scribe):
    model, tokenizer = scribe
    folder = DATA / "scribe"
    assert sum(f.stat().st_size for f in folder.iterdir()) < 10e6
    assert (folder / "README.md").read_text().startswith("# scribe")
    assert model.dtype == torch.float32
    assert 2e6 < sum(p.numel() for p in model.parameters()) < 4e6
    assert not [n for n, _ in model.named_parameters() if n.endswith("bias")]
    assert model.config.vocab_size == len(tokenizer)
    losses = pretrain.held_out_loss(model, tokenizer, "test", rows=4)
    assert max(losses.values()) < 0.35 * math.log(len(tokenizer)), losses
    # Left padding changes nothing.
    prompts = ["> c a t = t a c\n> s u n =", "Tom had 7 figs. He found 5 more."]
    batch = tokenizer(prompts, padding=True, return_tensors="pt")
    together = model(**batch).logits[:, -1]
    for prompt, logits in zip(prompts, together):
        alone = model(**tokenizer(prompt, return_tensors="pt")).logits[0, -1]
        torch.testing.assert_close(alone, logits, atol=2e-3, rtol=1e-3)
    made = model.generate(**batch, max_new_tokens=4)
    assert made.shape[1] <= batch["input_ids"].shape[1] + 4


def test_a_killed_run_ends_with_the_same_weights(tmp_path, monkeypatch):
    fast = pretrain.train_tokenizer(0, vocab_size=400, documents=300)
    monkeypatch.setattr(pretrain, "train_tokenizer", lambda seed: fast)
    tiny = ("--steps 6 --turns 2 4 5 --warmup 1 --rows 2 --hidden 16 --layers 1 --heads 2 --kv-heads 1 "
            "--ff 24 --every 2")

    def run(folder, *more):
        args = pretrain.arguments([*tiny.split(), "--cpu", "--runs", str(tmp_path / folder), *more])
        model, _, log, _, _ = pretrain.pretrain(args)
        return model.state_dict(), log

    whole, log = run("whole")
    run("killed", "--stop-after", "5")  # one step past its last checkpoint
    again, log_again = run("killed")
    assert log == log_again
    for name, tensor in whole.items():
        assert torch.equal(tensor, again[name]), name
    first = pretrain.build(fast, 0, 16, 1, 2, 1, 24).state_dict()
    assert not torch.equal(whole["model.norm.weight"], first["model.norm.weight"])
    with pytest.raises(SystemExit, match="was made with"):
        run("whole", "--lr", "0.1")
