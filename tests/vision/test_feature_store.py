"""Kept features: the ones that were put, never stale, never half."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModel

from sparsevlm.data.kept import tower_number
from sparsevlm.recipe.tiling import MonkeyTiling
from sparsevlm.vision import feature_store
from sparsevlm.vision.feature_store import FeatureStore, picture_rules, tower_identity, weights_state
from sparsevlm.vision.preprocess import ImageSpec
from tests import tiny

TOWER = "0123456789abcdef0123"


def features(seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(seed)).to(dtype)


def read(store: FeatureStore, key: str) -> Tensor:
    kept = store.get(key)
    assert kept is not None and kept.tower == tower_number(TOWER)
    return kept.features


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_was_put_is_there_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    store = FeatureStore(tmp_path, TOWER)
    assert store.get("a") is None
    for i, key in enumerate("abca"):
        store.put(key, features(i, dtype))
    assert len(store) == 3 and store.get("a") is None  # waits for its shard
    store.flush()
    again = FeatureStore(tmp_path, TOWER)
    for one in (store, again, pickle.loads(pickle.dumps(again))):
        for i, key in enumerate("abc"):
            assert read(one, key).dtype == dtype and torch.equal(read(one, key), features(i, dtype))
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1


def test_an_open_store_sees_what_another_writes(tmp_path: Path) -> None:
    reader, writer = FeatureStore(tmp_path, TOWER), FeatureStore(tmp_path, TOWER)
    for key in "ab":
        assert reader.get(key) is None
        writer.put(key, features(0))
        writer.flush()
        os.utime(writer.folder, ns=(0, ord(key)))  # clocks of file systems are coarse
        assert torch.equal(read(reader, key), features(0))
    reader.put("a", features(1))
    reader.flush()
    assert torch.equal(read(FeatureStore(tmp_path, TOWER), "a"), features(0))


def test_shards_grow_with_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_store, "_LEAST", 100)  # two entries of 48 bytes are less, three more
    store = FeatureStore(tmp_path, TOWER)
    for i in range(200):
        store.put(str(i), features(i))
    store.flush()
    sizes = sorted(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))
    assert len(sizes) < 40 and sizes[-1] > 3 * sizes[0]
    assert all(torch.equal(read(store, str(i)), features(i)) for i in range(200))


def test_a_full_folder_is_read_but_not_added_to(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path, TOWER, max_bytes=2000)
    with pytest.warns(UserWarning, match=r"is full .* feature_cache\.max_gb"):
        for i in range(20):
            store.put(str(i), features(i))
            store.flush()
    written = sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))
    assert 0 < written <= 2000 and torch.equal(read(store, "0"), features(0))
    other = FeatureStore(tmp_path, "f" * 20, max_bytes=2000)  # counts the folders of all towers
    with pytest.warns(UserWarning, match="is full"):
        other.put("a", torch.zeros(500, 4))
        other.flush()


def torn(data: bytes) -> bytes:
    return data[:-9]


def flipped(data: bytes) -> bytes:
    return data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]


@pytest.mark.parametrize("fault", [torn, flipped, lambda data: b"", lambda data: b"\xff" * 100, lambda data: data[:20]])
def test_a_shard_that_cannot_be_read_is_left_alone(fault: Any, tmp_path: Path) -> None:
    store = FeatureStore(tmp_path, TOWER)
    store.put("a", features(0))
    store.flush()
    (shard,) = tmp_path.rglob("*.safetensors")
    shard.write_bytes(fault(shard.read_bytes()))
    with pytest.warns(UserWarning, match="cannot be read .* computed again"):
        again = FeatureStore(tmp_path, TOWER)
        assert again.get("a") is None
    again.put("a", features(0))
    again.flush()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(read(again, "a"), features(0))
    shard.unlink()
    assert torch.equal(read(FeatureStore(tmp_path, TOWER), "a"), features(0))
    for path in tmp_path.rglob("*.safetensors"):
        path.unlink()
    with pytest.warns(UserWarning, match="cannot be read"):
        assert again.get("a") is None  # deleted under it


def test_a_killed_write_leaves_nothing_that_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = FeatureStore(tmp_path, TOWER)
    store.put("a", features(0))

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            store.flush()
    (left,) = store.folder.iterdir()
    assert left.suffix == ".part" and len(FeatureStore(tmp_path, TOWER)) == 0
    os.utime(left, (0, 0))
    again = FeatureStore(tmp_path, TOWER)
    again.put("a", features(0))
    again.flush()
    assert not left.exists()  # nobody writes it any more


def _fill(directory: str, first: int) -> None:
    store = FeatureStore(directory, TOWER)
    for i in range(first, first + 30):
        store.put(str(i), features(i))
        if i % 7 == 0:
            store.flush()
    store.flush()


def test_several_processes_fill_one_folder(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_fill, args=(str(tmp_path), first)) for first in (0, 20, 40)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    store = FeatureStore(tmp_path, TOWER)
    assert len(store) == 70 and all(torch.equal(read(store, str(i)), features(i)) for i in range(70))


def test_folders_are_named_by_tower_arithmetic_and_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = ((TOWER, ""), (TOWER, "bf16"), ("f" * 20, ""))
    folders = [FeatureStore(tmp_path, *names).folder for names in said]
    monkeypatch.setattr(feature_store, "version", lambda package: "99")
    folders.append(FeatureStore(tmp_path, TOWER).folder)
    assert len(set(folders)) == 4


def test_another_weight_buffer_layer_or_shape_is_another_tower() -> None:
    torch.manual_seed(0)
    tower = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    linear, norm = tower[0], tower[1]
    assert isinstance(linear, nn.Linear) and isinstance(norm, nn.BatchNorm1d) and norm.running_mean is not None
    first, state = tower_identity(tower, layer=-1), weights_state(tower)
    assert tower_identity(tower, layer=-1) == first and weights_state(tower) == state
    names = [first, tower_identity(tower, layer=-2), tower_identity(tower, layer=[-1])]
    with torch.no_grad():
        linear.weight[0, 0] += 1e-6
    names.append(tower_identity(tower, layer=-1))
    assert weights_state(tower) != state
    norm.running_mean += 1
    names.append(tower_identity(tower, layer=-1))
    assert len(set(names)) == 5
    half = tower.to(torch.bfloat16)
    assert tower_identity(half) == tower_identity(half.float())  # values count, not their type


def test_the_same_tower_is_the_same_once_it_was_saved(tmp_path: Path) -> None:
    tower = AutoModel.from_config(tiny.vision_config("siglip"))
    tower.save_pretrained(tmp_path)
    assert tower_identity(AutoModel.from_pretrained(tmp_path)) == tower_identity(tower)
    tower.config.layer_norm_eps = 1e-3
    assert tower_identity(AutoModel.from_pretrained(tmp_path)) != tower_identity(tower)


def test_everything_that_tells_pictures_apart_is_in_their_rules() -> None:
    spec = ImageSpec(32, "pad", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), (4, 4))
    changes: list[dict[str, Any]] = [
        {"image_size": 48, "patch_grid": (6, 6)},
        {"resize": "stretch"},
        {"mean": (0.4, 0.5, 0.5)},
        {"std": (0.4, 0.5, 0.5)},
        {"interpolation": "bilinear"},
        {"tiling": MonkeyTiling(type="monkey")},
    ]
    for video in (False, True):
        rules = {picture_rules(replace(spec, **change), video=video) for change in [{}, *changes]}
        assert len(rules) == len(changes) + (not video)  # videos are never cut
