"""Fixtures over the tiny parts; nothing here needs a GPU or a network."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile

# DeepSpeed compiles a small extension on first use, behind a lock file that a killed process leaves for ever, and tests
# kill processes on purpose: each run compiles into a folder of its own, which pytest's workers inherit.
if "TORCH_EXTENSIONS_DIR" not in os.environ:
    os.environ["TORCH_EXTENSIONS_DIR"] = tempfile.mkdtemp(prefix="sparsevlm-extensions-")
    atexit.register(shutil.rmtree, os.environ["TORCH_EXTENSIONS_DIR"], ignore_errors=True)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests import tiny


@pytest.fixture(autouse=True)
def _one_thread_and_seed() -> Iterator[None]:
    """Tiny tensors are slower on many threads, and every test starts from the same seed."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield


@pytest.fixture(scope="session")
def tiny_parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Saved CLIP tower and Llama: ``{"vision": path, "language": path}``."""
    return tiny.save_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture
def tiny_model(tiny_parts: dict[str, str]) -> Any:
    """A fresh ``(model, processor)`` from the tiny parts, in float32."""
    from sparsevlm.model.build import build_model

    torch.manual_seed(0)
    return build_model(tiny.recipe_model(tiny_parts))
