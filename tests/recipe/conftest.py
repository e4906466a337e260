"""A small recipe, written below the working directory."""

from pathlib import Path
from textwrap import dedent

import pytest


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write a recipe below the working directory and return its relative path."""
    monkeypatch.chdir(tmp_path)

    def write(text: str, name: str = "x.yaml") -> Path:
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dedent(text), encoding="utf-8")
        return path

    return write
