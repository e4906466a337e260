"""Fixtures of the training tests."""

from __future__ import annotations

import pytest


@pytest.fixture
def parts(tiny_parts: dict[str, str]) -> dict[str, str]:
    """Saved tiny parts."""
    return tiny_parts
