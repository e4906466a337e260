"""Every kind of medium, cut or whole or in its own shape, gives the same from kept features as from pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from sparsevlm.data.collate import Collator
from sparsevlm.data.sample import Media, Message, Sample
from sparsevlm.model.build import build_model
from sparsevlm.train.loader import BatchWithIds
from sparsevlm.vision.feature_store import FeatureStore, taking_features
from sparsevlm.vision.tokens import MediaKind
from tests import tiny
from tests.data.media_files import write_video
from tests.model.test_native_model import recipe as native_recipe

MLP = {"type": "mlp", "depth": 2}
WAYS: dict[str, dict[str, Any]] = {
    "whole": {},
    "several layers": {"vision": {"layer": [1, 2]}},
    "anyres": {"vision": {"tiling": {"type": "anyres"}}, "connector": [MLP, {"type": "layout"}]},
    "monkey": {"vision": {"tiling": {"type": "monkey"}}},
    "events": {"connector": [{"type": "dpc_knn", "clusters": [4], "frames_per_event": 2}, MLP]},
    "native": {},
}


def noise(width: int, height: int, seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


@pytest.fixture(params=WAYS)
def built(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    parts = tiny.save_parts(tmp_path / "parts", vision="siglip" if request.param == "native" else "clip")
    torch.manual_seed(0)
    if request.param == "native":
        return build_model(native_recipe(parts))
    return build_model(tiny.recipe_model(parts, video={"max_frames": 3}, **WAYS[request.param]))


def samples(directory: Path) -> list[Sample]:
    noise(90, 40, 0).save(directory / "wide.png")
    film = write_video(directory / "film.mp4", frames=20, fps=4)
    media = [
        [Media(MediaKind.IMAGE, directory / "wide.png"), Media(MediaKind.IMAGE, noise(32, 64, 1))],
        [Media(MediaKind.VIDEO, film), Media(MediaKind.IMAGE, directory / "wide.png")],
        [Media(MediaKind.MULTI_VIEW, (directory / "wide.png", noise(90, 40, 2)))],
        [Media(MediaKind.VIDEO, [noise(40, 40, i) for i in range(3)]), Media(MediaKind.VIDEO, film, start=2.0)],
        [],
    ]
    return [Sample((Message("user", (*m, "what is it ?")), Message("assistant", ("a red cat",)))) for m in media]


@torch.no_grad()
def test_features_stand_for_pixels(built: Any, tmp_path: Path) -> None:
    model, processor = built
    model.eval()
    model.model.vision_tower.requires_grad_(False)
    store = FeatureStore(tmp_path / "features", model.model.tower_identity())
    asked = samples(tmp_path)
    collate = BatchWithIds(Collator(0, packed=True))

    def batch(only: int | None = None) -> dict[str, Any]:
        chosen = asked if only is None else asked[only : only + 1]
        made = collate([[processor.encode(sample, store=store) for sample in chosen]])
        return {key: value for key, value in made.items() if key not in ("sample_ids", "rows", "features_read")}

    def run(inputs: dict[str, Any]) -> Tensor:
        wanted = inputs.pop("feature_keys", [])

        def take(features: Tensor) -> None:
            parts = features.split([tokens for _, tokens in wanted])
            for (key, _), part in zip(wanted, parts, strict=True):
                store.put(key, part)

        with taking_features(take if wanted else None):
            return model(**inputs).logits

    plain = collate([[processor.encode(sample) for sample in asked]])
    whole = run({key: value for key, value in plain.items() if key not in ("sample_ids", "rows")})
    first = batch()
    assert "visual_features" not in first and torch.equal(run(first), whole)
    store.flush()
    assert len(store) == 6  # the wide picture is there once
    second = batch()
    assert "pixel_values" not in second and not second["feature_keys"]
    assert torch.equal(run(second), whole)
    # some known, some new: another store that has seen one sample only
    part = store = FeatureStore(tmp_path / "other", model.model.tower_identity())
    run(batch(0))
    part.flush()
    mixed = batch()
    assert "pixel_values" in mixed and "visual_features" in mixed
    # Other frames go through the tower together: rounding of differently shaped products
    torch.testing.assert_close(run(mixed), whole, rtol=1e-5, atol=1e-5)
