"""The model that an adapter was trained on, named by its place on the Hub."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch

from sparsevlm.adapters.attach import attach, save_adapter
from sparsevlm.adapters.saved import find_parent
from sparsevlm.model.build import load_model
from sparsevlm.recipe.adapter import Lora
from tests.export.hub_server import READER, Hub, blob


def put(server: Hub, name: str, directory: Path) -> None:
    files = {file.name: blob(file.read_bytes()) for file in directory.iterdir() if file.is_file()}
    server.make(name).commit("main", files, "a model")


def test_a_hub_id_is_downloaded_compared_and_loaded(
    server: Hub, tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = functools.partial(
        huggingface_hub.snapshot_download, endpoint=server.endpoint, cache_dir=tmp_path / "cache", token=READER
    )
    monkeypatch.setattr(huggingface_hub, "snapshot_download", here)
    model, processor = tiny_model
    model.save_pretrained(tmp_path / "parent")
    processor.save_pretrained(tmp_path / "parent")
    put(server, "me/tiny", tmp_path / "parent")
    attach(model, Lora(type="lora", r=4))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    save_adapter(model, tmp_path / "adapter", tmp_path / "parent")
    processor.save_pretrained(tmp_path / "adapter")
    (tmp_path / "parent").rename(tmp_path / "gone")
    with pytest.raises(ValueError, match="which is not there; pass the directory"):
        find_parent(tmp_path / "adapter")
    again, _ = load_model(tmp_path / "adapter", base="me/tiny")
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())

    other: Any = load_model(tmp_path / "gone")[0]
    other.lm_head.weight.data *= 1.01
    other.save_pretrained(tmp_path / "other")
    put(server, "me/other", tmp_path / "other")
    with pytest.raises(ValueError, match="trained on other weights"):
        load_model(tmp_path / "adapter", base="me/other")
