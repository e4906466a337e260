"""Pictures in their own shape, from the recipe to the loss: counts, packing, saving, generation."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sparsevlm.adapters.attach import attach
from sparsevlm.data.collate import Collator
from sparsevlm.data.media import VideoPolicy
from sparsevlm.data.sample import Media, Message, Sample
from sparsevlm.model.build import build_model, load_model
from sparsevlm.model.media_input import MediaReader
from sparsevlm.recipe.adapter.mma import Mma
from sparsevlm.recipe.adapter.selective import SliceLora
from sparsevlm.recipe.schema import Model
from sparsevlm.vision.tokens import MediaKind
from tests import tiny

NATIVE: dict[str, Any] = {  # Oryx's rules on a tower with patches of 8
    "image": {"type": "area", "multiple": 16, "max_pixels": 64**2, "min_side": 8},
    "overview": {"type": "area", "multiple": 16, "min_pixels": 32**2, "max_pixels": 32**2},
    "video": {"type": "area", "multiple": 16, "max_pixels": 48**2},
    "long_video": {"type": "area", "multiple": 32, "max_pixels": 48**2},
    "positions": "bilinear",
}
ORYX = [
    {"type": "dynamic_compressor", "dim": 8},
    {"type": "mlp", "depth": 2},
    {"type": "layout", "join": False, "row_end": "all", "frame_end": True, "start": True, "end": True},
]


def recipe(paths: dict[str, str], **vision: Any) -> Model:
    return tiny.recipe_model(
        paths,
        vision={"resize": "native", "native": NATIVE, **vision},
        connector=ORYX,
        video={"max_frames": 8, "long_frames": 5},
    )


@pytest.fixture
def native(tmp_path: Path) -> Any:
    torch.manual_seed(0)
    return build_model(recipe(tiny.save_parts(tmp_path, vision="siglip")))


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def sample(*media: Media) -> Sample:
    return Sample((Message("user", (*media, "what is it ?")), Message("assistant", ("a red cat",))))


def samples() -> list[Sample]:
    video = Media(MediaKind.VIDEO, [noise(40, 24, i) for i in range(3)])
    film = Media(MediaKind.VIDEO, [noise(50, 40, i) for i in range(7)])
    return [
        sample(Media(MediaKind.IMAGE, noise(70, 30))),
        sample(video, Media(MediaKind.IMAGE, noise(5, 9))),
        sample(),
        sample(film),
        sample(Media(MediaKind.MULTI_VIEW, [noise(33, 33, 1), noise(20, 60, 2)])),
    ]


def test_what_is_counted_is_what_is_given(native: Any) -> None:
    _, processor = native
    generator = random.Random(0)
    for case in range(60):
        size = (generator.randint(1, 150), generator.randint(1, 150))
        frames = generator.randint(2, 12)
        if case % 2:
            medium, kind = Media(MediaKind.IMAGE, noise(*size)), MediaKind.IMAGE
        else:
            medium, kind = Media(MediaKind.VIDEO, [noise(*size)] * frames), MediaKind.VIDEO
        encoded = processor.encode(sample(medium))
        if kind is MediaKind.VIDEO:
            assert encoded.items[0].kind is (MediaKind.LONG_VIDEO if frames >= 5 else kind)
        ids = encoded.input_ids
        placeholders = int(((ids == processor.image_token_id) | (ids == processor.video_token_id)).sum())
        assert placeholders == processor.count_visual(kind, frames, size) == sum(encoded.visual_lengths)
        assert encoded.pixel_values.shape == (sum(item.grid.num_tokens for item in encoded.items), 3 * 8 * 8)
        assert processor.measure(sample(medium)) == (encoded.length, placeholders)


def test_a_clip_is_measured_by_the_first_frame_that_is_drawn(native: Any) -> None:
    _, processor = native
    frames = [noise(64, 32), noise(24, 80, 1), noise(64, 32, 2)]
    clip, middle = Media(MediaKind.VIDEO, frames, fps=1.0, start=1.0), Media(MediaKind.VIDEO, frames, fps=1.0)
    assert processor.reader.measure(clip) == processor.reader.read(clip).extent == (2, (24, 80))
    one = MediaReader(processor.image_spec, VideoPolicy(fps=None, max_frames=1))
    assert one.measure(middle) == one.read(middle).extent == (1, (24, 80))


def test_patches_show_the_picture(native: Any) -> None:
    _, processor = native
    picture = Image.new("RGB", (48, 32), "red")
    picture.paste("blue", (16, 8, 24, 16))  # the patch in row 1, column 2 of 4 x 6
    encoded = processor.encode(sample(Media(MediaKind.IMAGE, picture)))
    overview, whole = encoded.items
    assert overview.grid.num_tokens + 4 * 6 == len(encoded.pixel_values)
    patches = encoded.pixel_values[overview.grid.num_tokens :].view(4, 6, 3, 64)
    assert whole.grid == (1, 4, 6)
    blue = (patches[:, :, 2] > patches[:, :, 0]).all(-1)
    assert blue.nonzero().tolist() == [[1, 2]]


def test_packed_rows_give_the_padded_loss_and_train_everything(native: Any) -> None:
    model, processor = native
    encoded = [processor.encode(each) for each in samples()]
    losses = []
    for packed in (False, True):
        model.zero_grad()
        loss = model.train()(**Collator(0, packed=packed)([encoded])).loss
        loss.backward()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for name, parameter in model.named_parameters():
        # Beyond the layer that is used; and biases of keys, which softmax does not see.
        if not any(part in name for part in (".head.", "post_layernorm", "layers.1.", "k_proj.bias", "key.bias")):
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_text_alone_touches_tower_and_connector(native: Any) -> None:
    model, processor = native
    model.train()(**Collator(0, packed=True)([[processor.encode(sample())]])).loss.backward()
    touched = [name for name, p in model.model.connector.named_parameters() if p.grad is not None]
    assert len(touched) == len(list(model.model.connector.parameters()))
    assert model.model.vision_tower.embeddings.patch_embedding.weight.grad is not None


def test_saved_and_loaded_is_the_same_model(native: Any, tmp_path: Path) -> None:
    model, processor = native
    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    again, reader = load_model(tmp_path / "saved")
    batch = Collator(0, packed=False)([[processor.encode(each) for each in samples()]])
    batch_again = Collator(0, packed=False)([[reader.encode(each) for each in samples()]])
    assert all(torch.equal(batch[key], batch_again[key]) for key in batch)
    with torch.no_grad():
        assert torch.equal(model.eval()(**batch).logits, again.eval()(**batch).logits)


def test_generation_repeats_the_media_of_its_beams(native: Any) -> None:
    model, processor = native
    prompts = [Sample(each.messages[:1]) for each in samples()[:2]]
    batch = processor.encode_prompts(prompts)
    options = {"max_new_tokens": 4, "num_beams": 3, "do_sample": False}
    end = processor.tokenizer.eos_token_id  # which also fills up rows that end early

    def said(batch: Any) -> list[list[int]]:
        new = model.generate(**batch, **options)[:, batch["input_ids"].shape[1] :]
        return [row[: row.index(end)] if end in row else row for row in new.tolist()]

    assert said(batch) == [said(processor.encode_prompts([prompt]))[0] for prompt in prompts]


def test_raw_patches_reach_the_language_model_row_by_row(tmp_path: Path) -> None:
    paths = tiny.save_parts(tmp_path) | {"vision": "sparsevlm:patches"}
    connector = [{"type": "linear"}, {"type": "layout", "join": False, "row_end": "all"}]
    native = {"image": {"type": "fit", "max_width": 120, "max_height": 90}}
    model, processor = build_model(
        tiny.recipe_model(paths, vision={"resize": "native", "native": native, "layer": -1}, connector=connector)
    )
    encoded: Any = processor.encode(sample(Media(MediaKind.IMAGE, noise(100, 40))))
    assert encoded.visual_lengths == (2 * (4 + 1),)
    # 20 pixels below and 20 to the right are filled with Fuyu's 1 of 255
    filled = encoded.pixel_values.view(2, 4, 3, 30, 30)[1, 3, :, 10:, 10:]
    assert filled.unique().tolist() == pytest.approx([2 / 255 - 1])
    batch = Collator(0, packed=True)([[encoded, processor.encode(sample())]])
    model.train()(**batch).loss.backward()
    linear: Any = model.model.connector[0]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.model.connector.parameters())
    features = model.model.encode_media(encoded.pixel_values, encoded.items, [0]).features.view(2, 5, -1)
    expected = torch.nn.functional.linear(encoded.pixel_values, *linear.parameters()).view(2, 4, -1)
    torch.testing.assert_close(features[:, :4], expected)
    assert torch.equal(features[0, 4], features[1, 4])
    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    again, _ = load_model(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, model.eval()(**batch).logits)
    assert model.bfloat16()(**batch).logits.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("vision", "message"),
    [
        ({"native": None}, "needs the section 'native'"),
        ({"resize": "pad"}, "needs resize: native"),
        ({"image_size": 64}, "no meaning with resize: native"),
        ({"select": "full"}, "gives up the grid"),
    ],
)
def test_sections_that_contradict_each_other_are_refused(vision: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipe({"vision": "a", "language": "b"}, **vision)


@pytest.mark.parametrize(
    ("video", "message"),
    [
        ({}, r"from how many frames on a video is long: model\.video\.long_frames"),
        ({"long_frames": 9, "max_frames": 8}, "no video is long"),
        ({"long_frames": 9, "max_tokens": 99}, "a frame has tokens by its size"),
    ],
)
def test_videos_that_contradict_the_sides_are_refused(video: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny.recipe_model(
            {"vision": "a", "language": "b"}, vision={"resize": "native", "native": NATIVE}, connector=ORYX, video=video
        )


def test_sides_that_hold_no_whole_patches_are_refused(tmp_path: Path) -> None:
    paths = tiny.save_parts(tmp_path)
    native = {"image": {"type": "smart"}}
    with pytest.raises(ValueError, match="multiples of 28 pixels do not hold whole patches of 8"):
        build_model(recipe(paths, native=native))


def test_native_export_is_refused_with_the_reason(native: Any) -> None:
    from sparsevlm.export.families import NoHomeError
    from sparsevlm.export.vlm import llava_config

    with pytest.raises(NoHomeError, match="in their own shape"):
        llava_config(native[0].config)


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (SliceLora(type="slice_lora", targets=["vision"]), "slice_lora: at native resolution pictures are packed"),
        (Mma(type="mma"), "mma: at native resolution pictures are packed"),
        (Mma(type="mma", vision_layers=None), None),
        (Mma(type="mma", routing="token"), None),
    ],
)
def test_adapters_that_go_by_rows_of_the_tower_are_refused(native: Any, adapter: Any, message: str | None) -> None:
    model, processor = native
    if message is not None:
        with pytest.raises(ValueError, match=message):
            attach(model, adapter)
        return
    attach(model, adapter)
    for name, p in model.named_parameters():  # the adapter starts as nothing
        if "mma_" in name:
            torch.nn.init.normal_(p, std=0.3)
    pictures = [processor.encode(each) for each in samples()[:2]]
    with torch.no_grad():
        items, pixels = [each.items for each in pictures], [each.pixel_values for each in pictures]
        packed = model.eval().model.encode_media(torch.cat(pixels), [*items[0], *_from(items[1], 1)], [0] * 2 + [1] * 3)
        alone = torch.cat([model.model.encode_media(p, i, [0] * len(i)).features for p, i in zip(pixels, items)])
    torch.testing.assert_close(packed.features, alone, rtol=1e-4, atol=1e-5)


def _from(items: Any, first: int) -> list[Any]:
    return [item._replace(medium=item.medium + first) for item in items]
