"""Pictures that are cut: what is counted is what the model is given, and rows may be packed."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from PIL import Image

from sparsevlm.connectors.base import connector_dims, parse_connector
from sparsevlm.data.collate import Collator
from sparsevlm.data.sample import Media, Message, Sample
from sparsevlm.model.build import build_model, load_model
from sparsevlm.model.slice_text import SliceText, token_ids
from sparsevlm.recipe.tiling import UhdTiling
from sparsevlm.train.plan import plan
from sparsevlm.vision.tokens import Grid, ItemShape, MediaKind, Place, VisualTokens
from tests import tiny
from tests.train.planned import recipe_of, stage_of
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


# -- every tiling -----------------------------------------------------------------------------------------------------

LAYOUT = {"type": "layout"}
TILINGS = [
    ({"type": "monkey"}, []),
    ({"type": "monkey"}, [{"type": "multi_scale"}, {"type": "linear"}]),
    ({"type": "anyres"}, [LAYOUT]),
    ({"type": "onevision"}, [LAYOUT | {"max_squares": 9}]),
    ({"type": "uhd"}, []),
    ({"type": "uhd", "max_slices": 4}, [LAYOUT | {"join": False, "slice_end": True, "start": True}]),
]
every_tiling = pytest.mark.parametrize(("tiling", "layout"), TILINGS, ids=lambda value: str(value))


def build(parts: dict[str, str], tiling: dict[str, Any], layout: list[dict[str, Any]]) -> Any:
    torch.manual_seed(0)
    recipe = tiny.recipe_model(parts, vision={"tiling": tiling}, connector=[{"type": "mlp"}, *layout])
    return build_model(recipe)


def random_size(generator: random.Random, most: float = 3000) -> tuple[int, int]:
    width, height = (round(math.exp(generator.uniform(0, math.log(most)))) for _ in range(2))
    return width, height


@every_tiling
def test_placeholders_are_the_tokens_of_the_modules_for_any_size(
    tiny_parts: dict[str, str], tiling: dict[str, Any], layout: list[dict[str, Any]]
) -> None:
    """Tokenizer, tiling and specs on one side, the connector's modules (without the mlp) on the other."""
    _, processor = build(tiny_parts, tiling, layout)
    specs = parse_connector(layout)
    blocks = [spec.build(dim, 2) for spec, dim in zip(specs, connector_dims(specs, 2, 2))]
    generator = random.Random(4)
    for _ in range(100):
        media = [processor.medium(MediaKind.IMAGE, size=random_size(generator)) for _ in range(8)]
        shapes = [shape._replace(medium=i) for i, medium in enumerate(media) for shape in medium.shapes]
        grids, kinds, index, places = zip(*shapes, strict=True)
        features = torch.zeros(sum(grid.num_tokens for grid in grids), 2)
        tokens = VisualTokens(features, grids, kinds, (0,) * len(grids), index, places)
        for block in blocks:
            tokens = block(tokens)
        assert len(tokens.features) == sum(medium.num_tokens for medium in media)
        found = [sum(g.num_tokens for g, m in zip(tokens.grids, tokens.media) if m == i) for i in range(8)]
        assert found == [medium.num_tokens for medium in media]


@every_tiling
def test_model_reads_pictures_of_any_size_and_learns_its_ends_of_rows(
    tiny_parts: dict[str, str], tiling: dict[str, Any], layout: list[dict[str, Any]], tmp_path: Any
) -> None:
    """The model refuses a prompt whose placeholders are not its visual tokens; saved and loaded it gives the same."""
    model, processor = build(tiny_parts, tiling, layout)
    generator = random.Random(5)
    samples = []
    for color in ("red", "blue", "green"):
        picture = tiny.picture(color, random_size(generator, 300))
        question = (Media(MediaKind.IMAGE, picture), "what color is this ?")
        samples.append(processor.encode(Sample((Message("user", question), Message("assistant", (color,))))))
    batch = Collator(0, packed=True)([samples])
    inputs = {name: value for name, value in batch.items() if name not in ("sample_ids", "rows")}
    output = model(**inputs)
    output.loss.backward()
    for name, parameter in model.model.connector.named_parameters():
        assert parameter.grad is not None, name
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, its_processor = load_model(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(**inputs).logits, model.eval()(**inputs).logits, rtol=0, atol=0)
    for _ in range(20):
        size = random_size(generator)
        assert its_processor.medium(MediaKind.IMAGE, size=size) == processor.medium(MediaKind.IMAGE, size=size)


@every_tiling
def test_plan_counts_as_the_processor(
    tiny_parts: dict[str, str], tiling: dict[str, Any], layout: list[dict[str, Any]]
) -> None:
    recipe = recipe_of(tiny_parts, model={"vision": {"tiling": tiling}, "connector": [{"type": "mlp"}, *layout]})
    for stage in recipe.stages.values():
        stage.batch.max_length = 2048
    _, processor = build(tiny_parts, tiling, layout)
    sizes = [(640, 480), (33, 900), (1, 1), (64, 64)]
    counted = stage_of(plan(recipe, [f"{w}x{h}" for w, h in sizes]), "align")["visual_tokens"]
    assert list(counted.values()) == [processor.count_visual(MediaKind.IMAGE, size=size) for size in sizes]


# -- text between slices ----------------------------------------------------------------------------------------------


def test_commas_and_newlines_stand_between_slices(tiny_parts: dict[str, str]) -> None:
    _, processor = build(tiny_parts, {"type": "uhd"}, [])
    medium = processor.medium(MediaKind.IMAGE, size=(96, 64))  # six squares of 32 px
    comma, line = (processor.tokenizer.convert_tokens_to_ids(text) for text in (",", "\n"))
    assert medium.pieces == (16, (comma,), 16, (comma,), 16, (line,)) * 2 + (16,)
    assert medium.length == 6 * 17 + 16
    encoded = processor.encode(
        Sample((Message("user", (Media(MediaKind.IMAGE, tiny.picture(size=(96, 64))), "what ?")),
                Message("assistant", ("red",))))
    )  # fmt: skip
    first = encoded.input_ids.tolist().index(processor.image_token_id)
    slices = encoded.input_ids[first : first + 6 * 17].view(6, 17)
    assert (slices[:, :16] == processor.image_token_id).all()
    assert slices[:, 16].tolist() == [comma, comma, line] * 2
    assert processor.medium(MediaKind.IMAGE, size=(30, 30)).pieces == (16,)


@pytest.mark.parametrize(("slices", "tokens"), [(0, 144), (2, 434), (4, 724), (6, 1014)])
def test_llava_uhd_counts(tiny_parts: dict[str, str], slices: int, tokens: int) -> None:
    """Of n slices of 144 tokens: n * 145 + 144 (docs of the published code)."""
    text = SliceText(tiny.make_tokenizer(), UhdTiling(type="uhd"))
    grid, rows, cols = Grid(1, 12, 12), 2, slices // 2
    items = [
        ItemShape(grid, MediaKind.SLICE, 0, Place(r, c, rows, cols, 9, 9)) for r in range(rows) for c in range(cols)
    ] + [ItemShape(grid, MediaKind.IMAGE, 0, Place(-1, -1, rows, cols, 9, 9))]
    pieces = text.pieces(items)
    assert sum(piece if isinstance(piece, int) else len(piece) for piece in pieces) == tokens


class LlamaLike:
    """Writes a word boundary before the first word, as LLaMA's tokenizer does."""

    unk_token_id = 0

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        ids = {"a": 263, ")": 29897, "\n": 13, ",": 29892}
        first = {"a": 263, ")": 1723, ",": 1919}
        found = [ids.get(letter, 0) for letter in text]
        boundary = first.get(text[0])
        return {"input_ids": [boundary, *found[1:]] if boundary else [29871, *found]}


def test_separators_are_the_ids_behind_a_word() -> None:
    assert [token_ids(LlamaLike(), text) for text in (",", "\n")] == [(29892,), (13,)]
    with pytest.raises(ValueError, match="no token for"):
        token_ids(LlamaLike(), "§")


def test_padding_of_stretched_pictures_is_not_cut_off(tiny_parts: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="unpad: false"):
        tiny.recipe_model(tiny_parts, vision={"tiling": {"type": "monkey"}}, connector=[{"type": "mlp"}, LAYOUT])
