"""Text for the small decoder: what it is pretrained on, and the tasks it is fine-tuned on.

Pretraining shows six skills, each in documents of its own:

    in_context   '> c a t = t a c' lines: k examples of one letter function, then more of the same
    prose        two or three sentences about a restaurant
    table        the attributes of a restaurant: name[..] eatType[..] food[..] ...
    arithmetic   '7 + 5 = 12' and stories such as 'Tom had 7 figs. He found 5 more. ...'
    story        six short sentences about an animal
    twice        words and the same words; a restaurant in prose and again in prose; a table and
                 again the table

The four fine-tuning tasks recombine skills in a way that no pretraining document does:

    table_to_text   a table, then one sentence in a fixed style        (BLEU, ROUGE-L)
    slots           two or three sentences, then the table             (exact match)
    word_problems   a two-step problem, then its two equations         (exact match of the answer)
    letters         letters, then a letter function held out of pretraining (exact match)

A row is {"split", "prompt", "target"}; the text is prompt + target, and the target starts with
its own space. Restaurants of the tasks have names that pretraining never shows, problems start
with 'Problem:', letters with 'Code', and neither occurs in pretraining.

Letters are written with spaces between them, so that the tokenizer keeps each one a token.

`python data/generators.py` writes data/tasks/*.jsonl. Same seed, same bytes.
"""

import json
import random
from pathlib import Path

# letters, in context


def _words(text):
    return text.split()


WORDS = _words("""
cat dog sun map pen cup hat box key fox owl bee ant cow pig hen jam pie egg tea oak elm fig sea sky
ice net bat bus car van jet toy ball bird boat book bell cake coin corn desk door drum duck farm
fish flag frog game gate gift goat gold hand harp hill home horn king kite lake lamp leaf lion milk
moon nest nose park pear pond rain ring road rock roof rope rose sail salt sand seed shoe snow soap
sofa star tent tree wall wind wolf wood apple beach bread brick chair cloud clock crown dance eagle
earth field flame fruit glass grape green heart honey horse house juice knife lemon light money
mouse music night ocean olive onion paint panda paper peach piano plant plate queen river robin
sheep smile snake spoon stone storm sugar table tiger toast torch tower train truck water whale
wheat zebra
""")
BY_LENGTH = {n: [w for w in WORDS if len(w) == n] for n in (3, 4, 5)}
ALPHABET = "abcdefghijklmnopqrstuvwxyz"

# A positional family maps n letters to the letters at `places(n)`, perhaps in upper case.
# In pretraining by name:
TRAINED = {
    "copy": (lambda n: range(n), False),
    "upper": (lambda n: range(n), True),
    "reverse": (lambda n: range(n - 1, -1, -1), False),
    "first": (lambda n: [0], False),
    "last": (lambda n: [n - 1], False),
    "drop_first": (lambda n: range(1, n), False),
    "drop_last": (lambda n: range(n - 1), False),
    "swap_ends": (lambda n: [n - 1, *range(1, n - 1), 0], False),
    "rotate_left": (lambda n: [*range(1, n), 0], False),
    "double": (lambda n: [i for i in range(n) for _ in "12"], False),
    "first_upper": (lambda n: [0], True),
}
# Never in pretraining, neither by name nor among the random positional families:
HELD_OUT = {
    "second": (lambda n: [1], False),
    "middle": (lambda n: range(1, n - 1), False),
    "rotate_right": (lambda n: [n - 1, *range(n - 1)], False),
    "swap_first": (lambda n: [1, 0, *range(2, n)], False),
    "reverse_upper": (lambda n: range(n - 1, -1, -1), True),
    "rotate_right_upper": (lambda n: [n - 1, *range(n - 1)], True),
}
EXCLUDED = {(n, tuple(places(n)), up) for n in (3, 4, 5) for places, up in HELD_OUT.values()}
OTHERS = ("sort", "unscramble", "next_letter")


def spaced(letters):
    return " ".join(letters)


def _letters(rng, n):
    """Half the time a word, else n different letters."""
    return rng.choice(BY_LENGTH[n]) if rng.random() < 0.5 else "".join(rng.sample(ALPHABET, n))


def _positional(places, up):
    def f(word):
        out = "".join(word[i] for i in places(len(word)))
        return out.upper() if up else out

    return f


def random_places(rng, n):
    """A positional family drawn at random that is not one of those held out."""
    while True:
        m = rng.randint(1, n)
        places = tuple(rng.sample(range(n), m))
        up = rng.random() < 0.25
        if (n, places, up) not in EXCLUDED:
            return places, up


def family_pairs(rng, name, n, count):
    """`count` (input, output) pairs of one family, all inputs different, n letters each."""
    if name == "random":
        places, up = random_places(rng, n)
        f = _positional(lambda _: places, up)
    elif name in TRAINED:
        f = _positional(*TRAINED[name])
    elif name in HELD_OUT:
        f = _positional(*HELD_OUT[name])
    elif name == "sort":
        def f(w):
            return "".join(sorted(w))
    elif name == "next_letter":
        def f(w):
            return "".join(ALPHABET[(ALPHABET.index(c) + 1) % 26] for c in w)
    elif name != "unscramble":
        raise ValueError(f"no letter family {name!r}")
    if name == "unscramble":
        words = rng.sample(BY_LENGTH[n], count)
        return [("".join(rng.sample(w, n)), w) for w in words]
    inputs = []
    while len(inputs) < count:
        w = _letters(rng, n)
        if w not in inputs:
            inputs.append(w)
    return [(w, f(w)) for w in inputs]


def in_context_lines(pairs):
    return "".join(f"> {spaced(a)} = {spaced(b)}\n" for a, b in pairs)


def in_context_query(pairs):
    """(prompt, target): every pair but the last is an example, the last is asked."""
    (asked, answer), shots = pairs[-1], pairs[:-1]
    return in_context_lines(shots) + f"> {spaced(asked)} =", f" {spaced(answer)}"


def in_context(rng):
    u = rng.random()
    name = "random" if u < 0.5 else rng.choice(list(TRAINED)) if u < 0.85 else rng.choice(OTHERS)
    return in_context_lines(family_pairs(rng, name, rng.choice((3, 4, 4, 5)), rng.randint(8, 13)))


# restaurants

ADJECTIVES = _words("Blue Golden Green Red Silver White Old Happy Quiet Lucky Hungry Royal")
NOUNS = _words("Fox Swan Lion Anchor Crown Kettle Spoon Garden Lantern Barrel Rose Bear Mill Star")
PLACES = [f"{a} {b}" for a in ("Rose", "Mill", "King", "River", "Church", "Station")
          for b in ("Park", "Bridge", "Street", "Hall")]
VALUES = {
    "eatType": ["pub", "bar", "cafe", "diner", "bistro", "restaurant"],
    "food": ["French", "Thai", "Greek", "Chinese", "Spanish", "Turkish", "Mexican", "Japanese"],
    "customerrating": ["low", "fair", "good", "high"],
    "area": ["riverside", "city centre", "old town", "harbour", "market square"],
    "near": PLACES,
}
_PAIRS = [(i, j) for i in range(len(ADJECTIVES)) for j in range(len(NOUNS))]
# A quarter of the names is kept for the tasks.
TASK_NAMES = [f"The {ADJECTIVES[i]} {NOUNS[j]}" for i, j in _PAIRS if (i + j) % 4 == 0]
NAMES = [f"The {ADJECTIVES[i]} {NOUNS[j]}" for i, j in _PAIRS if (i + j) % 4]


def restaurant(rng, names=NAMES, least=2):
    """A dict of attributes in a fixed order: name, eatType, and `least` or more of the others."""
    rest = ["food", "customerrating", "area", "near"]
    kept = set(rng.sample(rest, rng.randint(least, len(rest))))
    keys = ["eatType"] + [k for k in rest if k in kept]
    return {"name": rng.choice(names), **{k: rng.choice(VALUES[k]) for k in keys}}


def table(r):
    return " ".join(f"{k}[{v}]" for k, v in r.items())


def prose(rng, r):
    """Every attribute is said once."""
    name, kind = r["name"], r["eatType"]
    left = [k for k in r if k not in ("name", "eatType")]
    first = rng.choice(left)
    opening = {
        "food": [f"{name} is a {kind} with {r.get('food')} food.",
                 f"{name} is a {kind} that serves {r.get('food')} food."],
        "customerrating": [f"{name} is a {kind} with a {r.get('customerrating')} rating."],
        "area": [f"{name} is a {kind} in the {r.get('area')}.",
                 f"In the {r.get('area')} there is a {kind} called {name}."],
        "near": [f"{name} is a {kind} near {r.get('near')}.",
                 f"Near {r.get('near')} there is a {kind} called {name}."],
    }
    after = {
        "food": [f"It serves {r.get('food')} food.", f"You can eat {r.get('food')} food there."],
        "customerrating": [f"Guests give it a {r.get('customerrating')} rating.",
                           f"Its rating is {r.get('customerrating')}."],
        "area": [f"It is in the {r.get('area')}.", f"You find it in the {r.get('area')}."],
        "near": [f"It is near {r.get('near')}.", f"{r.get('near')} is close to it."],
    }
    left.remove(first)
    rng.shuffle(left)
    return " ".join([rng.choice(opening[first])] + [rng.choice(after[k]) for k in left])


def one_sentence(r):
    """The fixed style of table_to_text; no pretraining sentence has it."""
    rated = f"{r['customerrating']} rated " if "customerrating" in r else ""
    food = f"{r['food']} " if "food" in r else ""
    area = f" in the {r['area']}" if "area" in r else ""
    near = f", just by {r['near']}" if "near" in r else ""
    return f"{r['name']} is a {rated}{food}{r['eatType']}{area}{near}."


# arithmetic

PEOPLE = [("Tom", "He"), ("Anna", "She"), ("Ben", "He"), ("Mia", "She"), ("Sam", "He"),
          ("Lily", "She"), ("Max", "He"), ("Nora", "She")]
THINGS = _words("figs pens eggs coins shells cards stones apples books cakes balls stars")
NUMBER_WORDS = _words("""zero one two three four five six seven eight nine ten eleven twelve
thirteen fourteen fifteen sixteen seventeen eighteen nineteen twenty""")
MORE = ("found", "got", "bought", "made")
LESS = ("lost", "ate", "sold", "gave away")


def _sum(rng, a=None):
    """(a, sign, b, result), everything between 0 and 20 and b at least 1."""
    a = rng.randint(0, 20) if a is None else a
    plus = rng.random() < 0.5
    if a < 1:
        plus = True
    if a > 19:
        plus = False
    b = rng.randint(1, 20 - a) if plus else rng.randint(1, a)
    return a, "+" if plus else "-", b, a + b if plus else a - b


def arithmetic(rng):
    a, sign, b, c = _sum(rng)
    u = rng.random()
    if u < 0.5:
        return f" {a} {sign} {b} = {c}"
    if u < 0.6:
        said = "plus" if sign == "+" else "minus"
        return f"{NUMBER_WORDS[a]} {said} {NUMBER_WORDS[b]} is {NUMBER_WORDS[c]}"
    (who, pron), thing = rng.choice(PEOPLE), rng.choice(THINGS)
    done = f"{rng.choice(MORE)} {b} more" if sign == "+" else f"{rng.choice(LESS)} {b}"
    end = rng.choice([f"Now {who} has {c} {thing}.", f"That leaves {who} with {c} {thing}."])
    return f"{who} had {a} {thing}. {pron} {done}. {end}"


# stories

ANIMALS = [("Pip", "mouse", "He"), ("Luna", "owl", "She"), ("Bruno", "bear", "He"),
           ("Daisy", "duck", "She"), ("Felix", "fox", "He"), ("Holly", "hen", "She"),
           ("Oscar", "frog", "He"), ("Ruby", "rabbit", "She")]
HOMES = ["under a big tree", "by the river", "in a small house", "near the farm", "on a green hill"]
FINDS = [("lamp", "the cave", "read"), ("kite", "the hill", "fly"), ("boat", "the river", "sail"),
         ("drum", "the field", "sing"), ("rope", "the cliff", "climb"),
         ("spade", "the garden", "dig")]
LOOKS = ["big", "red", "shiny", "small", "strange", "broken"]
MOODS = ["sad", "afraid", "tired", "lonely"]


def story(rng):
    (a, kind, pron), (b, kind2, _) = rng.sample(ANIMALS, 2)
    thing, where, act = rng.choice(FINDS)
    look = rng.choice(LOOKS)
    lines = [
        f"{a} the {kind} lived {rng.choice(HOMES)}.",
        f"One day {pron.lower()} found a {look} {thing}.",
        rng.choice([f"{pron} was {rng.choice(MOODS)}, but with a {thing} one can {act}.",
                    f"{pron} took the {thing} and ran to {where}."]),
        f"There {a} met {b} the {kind2}.",
        rng.choice([f"{b} wanted the {thing} too, so {a} let {b} have it.",
                    f"{a} and {b} learned to {act} with the {thing}.",
                    f"{b} said that the {look} {thing} was lovely."]),
        rng.choice([f"{a} and {b} were friends from then on.",
                    f"In the evening {a} went home with the {thing}.",
                    f"And that is how the {kind} and the {kind2} became friends."]),
    ]
    return " ".join(lines)


# pretraining

# Values of any attribute, so that only copying tells them. No adjective: no name of the tasks.
MIXED = [*NOUNS, *THINGS, *NUMBER_WORDS, *VALUES["food"], *VALUES["eatType"],
         *_words("Rose Mill King River Church Station Park Bridge Street Hall harbour riverside"),
         *[w for w, _ in PEOPLE], *[w for animal in ANIMALS for w in animal[:2]]]


def mixed(rng, r):
    """The same attributes with words drawn from all of MIXED."""
    return {k: " ".join(w if w == "The" else rng.choice(MIXED) for w in v.split())
            for k, v in r.items()}


def twice(rng):
    """Words said twice, or a restaurant twice in prose, or its table in two orders: copying."""
    u = rng.random()
    if u < 0.4:
        line = " ".join(rng.sample(MIXED, rng.randint(5, 15)))
        return f"{line}\n{line}"
    r = restaurant(rng)
    if rng.random() < 0.5:
        r = mixed(rng, r)
    if u < 0.7:
        return f"{prose(rng, r)}\n{prose(rng, r)}"
    return f"{table(r)}\n{table(dict(rng.sample(list(r.items()), len(r))))}"


SKILLS = {
    "in_context": in_context,
    "prose": lambda rng: prose(rng, restaurant(rng)),
    "table": lambda rng: table(restaurant(rng)),
    "arithmetic": arithmetic,
    "story": story,
    "twice": twice,
}
# Share of rows in the phases of pretraining. The first learns to write, the second letter functions,
# which take longest, the third to say again what stands before, the fourth keeps all of it.
PHASES = (
    {"in_context": 0.52, "prose": 0.13, "table": 0.07, "arithmetic": 0.18, "story": 0.10},
    {"in_context": 0.72, "prose": 0.06, "table": 0.03, "arithmetic": 0.15, "story": 0.04},
    {"in_context": 0.30, "prose": 0.03, "table": 0.03, "arithmetic": 0.06, "story": 0.03,
     "twice": 0.55},
    {"in_context": 0.60, "prose": 0.05, "table": 0.03, "arithmetic": 0.13, "story": 0.03,
     "twice": 0.16},
)


def pick_skill(rng, phase=0):
    return rng.choices(list(PHASES[phase]), weights=list(PHASES[phase].values()))[0]


def documents(seed, count, phase=0):
    """`count` (skill, text) pairs."""
    rng = random.Random(f"documents/{seed}")
    for _ in range(count):
        skill = pick_skill(rng, phase)
        yield skill, SKILLS[skill](rng)


# fine-tuning tasks


def table_to_text(rng):
    r = restaurant(rng, TASK_NAMES)
    return f"{table(r)}\nSay:", f" {one_sentence(r)}"


def slots(rng):
    r = restaurant(rng, TASK_NAMES)
    return f"{prose(rng, r)}\nTable:", f" {table(r)}"


def word_problems(rng):
    who, thing = rng.choice(PEOPLE)[0], rng.choice(THINGS)
    a, s, b, c = _sum(rng, rng.randint(1, 20))
    c, t, d, e = _sum(rng, c)
    said = [f"{rng.choice(MORE)} {n} more" if sign == "+" else f"{rng.choice(LESS)} {n}"
            for sign, n in ((s, b), (t, d))]
    return (f"Problem: {who} had {a} {thing}, then {said[0]}, then {said[1]}.\nSolve:",
            f" {a} {s} {b} = {c}, {c} {t} {d} = {e}")


def letters(rng):
    (a, b), = family_pairs(rng, "reverse_upper", rng.choice((4, 5)), 1)
    return f"Code {spaced(a)}\nSecret:", f" {spaced(b)}"


TASKS = {"table_to_text": table_to_text, "slots": slots, "word_problems": word_problems,
         "letters": letters}
SIZES = {"train": 800, "validation": 100, "test": 200}


def task_rows(name, seed=0):
    """Rows of one task; no prompt occurs twice, so no test prompt is a training prompt."""
    rng, seen, rows = random.Random(f"task/{name}/{seed}"), set(), []
    for split, size in SIZES.items():
        while size:
            prompt, target = TASKS[name](rng)
            if prompt not in seen:
                seen.add(prompt)
                rows.append({"split": split, "prompt": prompt, "target": target})
                size -= 1
    return rows


if __name__ == "__main__":
    folder = Path(__file__).parent / "tasks"
    folder.mkdir(exist_ok=True)
    for name in TASKS:
        rows = task_rows(name)
        with open(folder / f"{name}.jsonl", "w", encoding="utf-8", newline="\n") as f:
            f.writelines(json.dumps(row) + "\n" for row in rows)
        print(f"{name}: {len(rows)} rows, e.g. {rows[0]['prompt']!r} -> {rows[0]['target']!r}")
