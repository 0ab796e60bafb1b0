"""What nbval does not see: cells never run, stderr, markers that hide rot, figures nobody described, bloat."""

import json
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOKS = sorted(ROOT.glob("notebooks/**/[0-9]*.ipynb"))
CHAPTERS = [p for p in NOTEBOOKS if p.parent.name == "notebooks"]
VERDICTS = ("proved", "reproduced", "partly", "not at this scale", "quoted only", "corrected")


def cells(path):
    book = json.loads(path.read_text())
    return [(c["cell_type"], "".join(c["source"]), c) for c in book["cells"]]


def code(path):
    return [(source, c) for kind, source, c in cells(path) if kind == "code"]


def printed(cell):
    return "".join("".join(o.get("text", "")) for o in cell["outputs"])


def by_name(path):
    return f"{path.parent.name}/{path.stem}"


@pytest.fixture(params=NOTEBOOKS, ids=by_name)
def path(request):
    return request.param


def test_it_ran_once_from_top_to_bottom(path):
    counts = [c["execution_count"] for _, c in code(path)]
    assert counts == list(range(1, len(counts) + 1)), f"run: make refresh ONLY={path}"


def test_outputs_are_clean(path):
    for i, (_, c) in enumerate(code(path), 1):
        for o in c["outputs"]:
            assert o["output_type"] != "error" and o.get("name") != "stderr", f"cell {i}: {o}"
            assert not re.search(r"0x[0-9a-f]{6,}|/home/|/work/|/tmp/", json.dumps(o.get("text", "")))


def test_every_figure_is_described(path):
    for i, (_, c) in enumerate(code(path), 1):
        if any("image/png" in o.get("data", {}) for o in c["outputs"]):
            assert "Figure:" in printed(c), f"cell {i}: a figure without a description"


def test_nothing_hides_rot(path):
    for i, (source, c) in enumerate(code(path), 1):
        tags = c["metadata"].get("tags", [])
        assert not source.rstrip().endswith(";"), f"cell {i}: assign to _ instead of a final ;"
        assert "NBVAL" not in source and not any(t.startswith("nbval") for t in tags), f"cell {i}"
        assert "import *" not in source and "pip install" not in source, f"cell {i}"


def test_the_file_is_small(path):
    assert path.stat().st_size < 1_500_000 and "widgets" not in json.loads(path.read_text())["metadata"]


@pytest.mark.parametrize("path", CHAPTERS, ids=by_name)
def test_the_first_cell_is_the_same_everywhere(path):
    assert code(path)[0][0] == code(CHAPTERS[0])[0][0]


@pytest.mark.parametrize("path", CHAPTERS, ids=by_name)
def test_claims_print_a_verdict(path):
    for source, c in code(path):
        for tag in c["metadata"].get("tags", []):
            if tag.startswith("claim-"):
                number = int(tag.removeprefix("claim-"))
                assert 1 <= number <= 75 and "assert" in source, f"{tag}: no check"
                said = re.search(rf"Claim {number}\b.*: ({'|'.join(VERDICTS)})", printed(c))
                assert said, f"{tag}: prints no verdict"


@pytest.mark.parametrize("path", CHAPTERS, ids=by_name)
def test_every_exercise_has_its_solution(path):
    asked = {t for _, _, c in cells(path) for t in c["metadata"].get("tags", []) if t.startswith("exercise-")}
    if not asked:
        return
    solutions = path.parent / "solutions" / path.name
    solved = {t for _, _, c in cells(solutions) for t in c["metadata"].get("tags", [])}
    assert asked <= solved
    said = "".join(printed(c) for _, c in code(solutions))
    assert "not attempted yet" not in said and "not yet:" not in said
    assert said.count("correct") >= len(asked)


def test_links_between_chapters_lead_somewhere():
    for path in NOTEBOOKS:
        for kind, source, _ in cells(path):
            if kind == "markdown":
                for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", source):
                    assert (path.parent / target).exists(), f"{path.name}: {target}"
