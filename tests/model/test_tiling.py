"""Pictures that are cut: what is counted is what the model is given, and rows may be packed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image

from sparsevlm.data.collate import Collator
from sparsevlm.data.sample import Media, Message, Sample
from sparsevlm.model.build import build_model
from sparsevlm.vision.tokens import MediaKind
from tests import tiny
from tests.train.toy import toy_sample


@pytest.fixture
def cut(tiny_parts: dict[str, str]) -> Any:
    """A model whose pictures are cut into two rows of three, and its processor."""
    torch.manual_seed(0)
    recipe = tiny.recipe_model(tiny_parts)
    vision = recipe.vision.model_dump() | {"tiling": {"type": "monkey", "rows": 2, "columns": 3}}
    return build_model(type(recipe).model_validate(recipe.model_dump() | {"vision": vision}))


def test_every_slice_and_the_whole_picture_reach_the_language_model(cut: Any) -> None:
    model, processor = cut
    assert processor.count_visual(MediaKind.IMAGE, size=(40, 30)) == 7 * 16
    encoded = processor.encode(toy_sample(1))
    assert [item.place[:2] for item in encoded.items] == [(r, c) for r in range(2) for c in range(3)] + [(-1, -1)]
    assert encoded.pixel_values.shape == (7, 3, 32, 32)
    assert int((encoded.input_ids == processor.image_token_id).sum()) == 7 * 16
    batch = Collator(0, packed=False)([[encoded]])
    assert batch["media_places"].shape == (7, 7)
    assert model(**batch).logits.shape[1] == encoded.length


def test_slices_show_their_part_of_the_picture(cut: Any) -> None:
    _, processor = cut
    picture = Image.new("RGB", (96, 64), "red")
    picture.paste("blue", (32, 0, 64, 32))  # first row, second column
    question = (Media(MediaKind.IMAGE, picture), "what color is this ?")
    sample = Sample((Message("user", question), Message("assistant", ("blue",))))
    encoded = processor.encode(sample)
    red, blue = (encoded.pixel_values[:, channel].mean((1, 2)) for channel in (0, 2))
    assert [bool(b > r) for r, b in zip(red, blue)] == [False, True] + [False] * 5


def test_videos_are_not_cut_and_packed_rows_give_the_padded_loss(cut: Any) -> None:
    model, processor = cut
    assert processor.count_visual(MediaKind.VIDEO, 3) == 3 * 16
    samples = [processor.encode(toy_sample(i)) for i in range(4)]
    losses = [
        model(
            **{k: v for k, v in Collator(0, packed=packed)([samples]).items() if k not in ("sample_ids", "rows")}
        ).loss
        for packed in (False, True)
    ]
    torch.testing.assert_close(losses[0], losses[1], atol=1e-5, rtol=0)  # float32, sums in another order


def test_several_answers_get_their_own_media(cut: Any) -> None:
    model, processor = cut
    rows = [Sample((Message("user", (Media(MediaKind.IMAGE, tiny.picture(c)), "what color is this ?")),)) for c in
            ("red", "blue")]  # fmt: skip
    inputs = processor.encode_prompts(rows)
    one = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    two = model.generate(**inputs, max_new_tokens=3, do_sample=False, num_beams=1, num_return_sequences=1)
    assert torch.equal(one, two)
    beams = model.generate(**inputs, max_new_tokens=3, do_sample=False, num_beams=2)
    assert beams.shape[0] == 2
