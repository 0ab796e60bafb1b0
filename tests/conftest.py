"""One thread: reproducible, and far faster than two on a busy machine."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fresh_compiler(request):
    """Each test that compiles starts with an empty cache: torch counts recompilations per process."""
    if "compile" in request.node.name:
        torch._dynamo.reset()
