"""Modules that commands begin with can be the first of the package that a process imports.

Importing a class of transformers brings in our own that are registered beside it, and these import much of the rest: a
module that does so while it is being imported itself can find another one half made.
"""

import subprocess
import sys

import pytest


@pytest.mark.parametrize("module", ["adapters.attach", "train.plan", "train.stage", "eval.run", "export.native"])
def test_can_be_first(module: str) -> None:
    done = subprocess.run([sys.executable, "-c", f"import sparsevlm.{module}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
