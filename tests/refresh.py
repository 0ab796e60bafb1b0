"""Run notebooks from top to bottom and store their outputs: python tests/refresh.py notebooks/*.ipynb"""

import os
import pathlib
import sys
import time

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import nbformat
from nbclient import NotebookClient

for path in map(pathlib.Path, sys.argv[1:]):
    started = time.perf_counter()
    book = nbformat.read(path, 4)
    for cell in book.cells:
        cell.pop("execution_count", None)
    NotebookClient(
        book, timeout=600, record_timing=False, coalesce_streams=True, kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
    ).execute()
    book.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in book.cells:  # ids and execution metadata that would change on every run
        cell.metadata = {k: v for k, v in cell.metadata.items() if k in ("tags", "slideshow")}
    for number, cell in enumerate(book.cells):
        cell["id"] = f"c{number:03d}"
    nbformat.write(book, path)
    print(f"{path}: {time.perf_counter() - started:.0f} s")
