"""A Hub on loopback for the tests of `push`."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from tests.export.hub_server import Hub


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub; the client may reach it, by git LFS, and does not really wait between its own attempts."""
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.01)))
    close_session()
    with Hub() as server:
        yield server
    close_session()
