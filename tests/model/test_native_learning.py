"""A tower at native resolution learns: trained whole or through LoRA, everything behind it frozen."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModel
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig

from sparsevlm.adapters.attach import attach
from sparsevlm.data.collate import Collator
from sparsevlm.data.sample import Media, Message, Sample
from sparsevlm.model.build import build_model, load_model
from sparsevlm.recipe.adapter.lora import Lora
from sparsevlm.train.parts import select_trainable
from sparsevlm.vision.native import encode_native
from sparsevlm.vision.tokens import MediaKind
from tests import tiny

SMART = {"image": {"type": "smart", "multiple": 16, "min_pixels": 16**2, "max_pixels": 48**2}}
COLOURS = ("red", "green", "blue", "yellow")
TOWERS = ("siglip", "dinov2", "qwen2.5")


def qwen_config() -> Qwen2_5_VLVisionConfig:
    return Qwen2_5_VLVisionConfig(
        depth=2,
        hidden_size=32,
        intermediate_size=48,
        out_hidden_size=32,
        num_heads=2,
        patch_size=8,
        window_size=32,
        fullatt_block_indexes=[1],
    )


def build(tower: str, directory: Path) -> Any:
    torch.manual_seed(0)
    paths = tiny.save_parts(directory, vision="clip" if tower == "qwen2.5" else tower)
    if tower == "qwen2.5":
        paths["vision"] = str(directory / "qwen")
        AutoModel.from_config(qwen_config()).save_pretrained(paths["vision"])
    vision = {"resize": "native", "native": SMART, "layer": -1}
    return build_model(tiny.recipe_model(paths, vision=vision, connector=[{"type": "mlp"}]))


def samples(number: int) -> list[Sample]:
    """Pictures of one colour, of many shapes, and videos of it."""
    generator = random.Random(0)
    made = []
    for i in range(number):
        colour = COLOURS[i % 4]
        frames = [Image.new("RGB", (generator.randint(9, 90), generator.randint(9, 90)), colour)]
        medium = Media(MediaKind.VIDEO, frames * 2) if i % 5 == 4 else Media(MediaKind.IMAGE, frames[0])
        made.append(Sample((Message("user", (medium, "what color ?")), Message("assistant", (colour,)))))
    return made


def adapt(model: Any, way: str) -> dict[str, torch.nn.Parameter]:
    """Let the tower train alone, whole or through LoRA; return what trains."""
    if way == "lora":
        report = attach(model, Lora(type="lora", r=8, alpha=32, targets=["vision"]))
        assert all(name.startswith("model.vision_tower.") for name in report.modules)
    select_trainable(model, ["vision"] if way == "tower" else ["adapter"])
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all(name.startswith("model.vision_tower.") for name in trained)
    return trained


@pytest.mark.parametrize("way", ["tower", "lora"])
@pytest.mark.parametrize("tower", TOWERS)
def test_the_tower_learns_from_packed_pictures(tower: str, way: str, tmp_path: Path) -> None:
    """Everything behind it is frozen, so what is learned is in the tower; a packed loss is the mean of those alone."""
    model, processor = build(tower, tmp_path)
    for name, p in model.named_parameters():  # matrices of fresh models are too small to say anything with certainty
        if name.startswith(("model.language_model", "model.connector", "lm_head")) and p.ndim == 2:
            torch.nn.init.normal_(p, std=0.5 if "lm_head" in name else 0.2)
    trained = adapt(model, way)
    encoded = [processor.encode(sample) for sample in samples(12)]
    batch = Collator(0, packed=True)([encoded])  # one row of 12 documents
    optimizer = torch.optim.AdamW(trained.values(), lr=5e-3, weight_decay=0)
    losses = []
    for _ in range(20):
        loss = model.train()(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 6 and losses[-1] < 4, losses  # 3.4 at most was seen
    with torch.no_grad():
        packed = model.eval()(**batch).loss
        alone = [model(**Collator(0, packed=False)([[each]])).loss for each in encoded]
    # Each sample has as many targets: the packed loss is the mean of the losses alone, to float32's rounding.
    assert float(packed) == pytest.approx(float(torch.stack(alone).mean()), rel=1e-4)


@pytest.mark.parametrize("way", ["tower", "lora"])
@pytest.mark.parametrize("tower", TOWERS)
def test_what_is_learned_holds_for_shapes_never_seen(tower: str, way: str, tmp_path: Path) -> None:
    """Four colours told apart by a fixed random direction each: only the tower can make them so."""
    model, processor = build(tower, tmp_path)
    trained = adapt(model, way)
    head = torch.randn(32, 4)
    encoded = [processor.encode(sample) for sample in samples(40)]
    optimizer = torch.optim.AdamW(trained.values(), lr=3e-3, weight_decay=0)

    def scores(part: Any) -> torch.Tensor:
        patches = torch.cat([each.pixel_values for each in part])
        grids = [item.grid for each in part for item in each.items]
        features = encode_native(model.model.vision_tower, patches, grids)
        return torch.stack([item.mean(dim=0) for item in features.split([g.num_tokens for g in grids])]) @ head

    colours = torch.arange(40) % 4
    for _ in range(40):
        loss = torch.nn.functional.cross_entropy(scores(encoded[:20]), colours[:20])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        right = (scores(encoded[20:]).argmax(dim=1) == colours[20:]).float().mean()
    assert loss.item() < 0.2 and right > 0.9, (loss.item(), right)  # a guess: 1.4 and 0.25


def test_a_model_with_qwens_tower_is_saved_and_loaded(tmp_path: Path) -> None:
    model, processor = build("qwen2.5", tmp_path)
    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    again, reader = load_model(tmp_path / "saved")
    batch = Collator(0, packed=True)([[processor.encode(sample) for sample in samples(5)]])
    batch_again = Collator(0, packed=True)([[reader.encode(sample) for sample in samples(5)]])
    with torch.no_grad():
        assert torch.equal(model.eval()(**batch).logits, again.eval()(**batch_again).logits)
    text = Sample((Message("user", ("what color ?",)), Message("assistant", ("red",))))
    again.train()(**Collator(0, packed=True)([[reader.encode(text)]])).loss.backward()
    tower: Any = again.model.vision_tower
    assert tower.patch_embed.proj.weight.grad is not None
