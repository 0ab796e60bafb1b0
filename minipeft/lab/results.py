"""Long measurements: run once by a script, resumable, stored with their provenance, read by chapters."""

import datetime
import json
import os
import pathlib
import platform
import sys

import torch
import transformers
from tqdm import tqdm

ROOT = pathlib.Path(__file__).parents[2]
RESULTS = ROOT / "data" / "results"
LADDER = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)  # of learning rates


def sweep(name: str, jobs: list[dict], run) -> list[dict]:
    """[{**job, **run(**job)}], each finished job kept in runs/<name>.jsonl and not run again."""
    log = ROOT / "runs" / f"{name}.jsonl"
    log.parent.mkdir(exist_ok=True)
    done = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    out = []
    for job in tqdm(jobs, desc=name):
        known = [d["out"] for d in done if d["job"] == job]
        if known:
            out.append({**job, **known[0]})
            continue
        result = run(**job)
        with log.open("a") as file:
            file.write(json.dumps({"job": job, "out": result}) + "\n")
        out.append({**job, **result})
    return out


def walk(name: str, job: dict, run, middle: float, badness) -> list[dict]:
    """`job` at every learning rate that was tried, as rows of `sweep`, the best one first.

    `middle` and two rungs of LADDER on each side, and on while the best stands at an end of those
    tried: a rate is never the edge of its grid unless it is the ladder's own. Five to begin with,
    because a run that learns nothing looks no worse than one that learns too little.
    `badness` of a row is a number.
    """
    i = LADDER.index(middle)
    low, high = max(0, i - 2), min(len(LADDER) - 1, i + 2)
    while True:
        jobs = [{**job, "lr": lr} for lr in LADDER[low : high + 1]]
        tried = sorted(sweep(name, jobs, run), key=badness)
        best = LADDER.index(tried[0]["lr"])
        if low < best < high or best in (0, len(LADDER) - 1):
            return tried
        low, high = min(low, best - 1), max(high, best + 1)


def write(name: str, rows, **more) -> pathlib.Path:
    """data/results/<name>.json: the rows, and what made them."""
    gpu = torch.cuda.is_available()
    machine = torch.cuda.get_device_name() if gpu else f"CPU, {platform.machine()}, {os.cpu_count()} cores"
    script = pathlib.Path(sys.argv[0]).resolve()
    stored = {
        "command": f"python {script.relative_to(ROOT)}" if ROOT in script.parents else "",
        "date": datetime.date.today().isoformat(),
        "machine": machine,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        **more,
        "rows": rows,
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(stored, indent=1) + "\n")
    return path


def read(name: str) -> dict:
    """What `write` stored. FileNotFoundError names the script that makes it."""
    path = RESULTS / f"{name}.json"
    if not path.exists():
        raise FileNotFoundError(f"no stored result {name!r} in data/results; run: python data/{name}.py")
    return json.loads(path.read_text())
