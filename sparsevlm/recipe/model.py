"""The model sections of a recipe: the parts and what joins them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError
from pydantic_core import PydanticCustomError

from sparsevlm.recipe.fusion import Fusion
from sparsevlm.recipe.native import Native
from sparsevlm.recipe.section import CrossFault, Positive, Strict, nested_error, view
from sparsevlm.recipe.tiling import STRETCHED, Tiling
from sparsevlm.recipe.video import Video
from sparsevlm.registry import CONNECTOR_BLOCKS, UnknownNameError


def _parse_connector_block(raw: Any) -> Any:
    """Validate a block through its registered spec; its faults keep their option (see `recipe.faults`)."""
    if not isinstance(raw, dict) or not isinstance(raw.get("type"), str):
        raise PydanticCustomError("connector_block", "a connector block is a mapping with a 'type', e.g. {{type: mlp}}")
    try:
        CONNECTOR_BLOCKS.get(raw["type"]).model_validate(raw)
    except UnknownNameError as error:
        raise nested_error([{"loc": ("type",), "msg": str(error), "type": "cross"}]) from None
    except ValidationError as error:
        raise nested_error(error.errors()) from None
    return raw


ConnectorBlock = Annotated[dict[str, Any], BeforeValidator(_parse_connector_block)]

RAW_PATCHES = "sparsevlm:patches"
"""Path that stands for no tower: pixels go to the connector as they are."""


class BesideTower(Strict):
    """A tower beside the first: it sees the same picture, and its features are put behind the first's."""

    path: str
    """As `model.vision.path`."""
    layer: int | list[int] = -1
    """As `model.vision.layer`."""
    image_size: int | None = Field(default=None, ge=1)
    """Side in pixels at which the tower sees a picture; default: what it was trained at. All towers must have one grid
    of patches."""
    mean: tuple[float, float, float] | None = None
    """As `model.vision.mean`."""
    std: tuple[Positive, Positive, Positive] | None = None
    """As `model.vision.std`."""


class Vision(Strict):
    """The vision tower and how pictures are brought to its size."""

    path: str
    """Hub id, local directory, or `sparsevlm:NAME` for a part that the package ships. Any transformers vision model:
    ViT with or without CLS token, or a timm network as `TimmWrapper`."""
    layer: int | list[int] = -1
    """Hidden layer whose features are taken (negative counts from the end; a list concatenates their features)."""
    select: Literal["auto", "patch", "full"] = "auto"
    """`patch` drops the tokens before the grid (CLS, registers), `full` keeps them (not possible with blocks that need
    a grid), `auto` drops them where the tower has any."""
    image_size: int | None = Field(default=None, ge=1)
    """Side in pixels that pictures are brought to; default: what the tower was trained at."""
    resize: Literal["stretch", "crop", "pad", "native"] = "pad"
    """`stretch` ignores the aspect ratio, `crop` resizes the short side and cuts the centre, `pad` resizes the long
    side and fills to a square with the mean colour. `native` gives the tower pictures in their own shape, in the sides
    that `native` says: SigLIP, SigLIP 2, CLIP, DINOv2, ViT, Qwen2-VL, Qwen2.5-VL or `sparsevlm:patches`."""
    native: Native | None = None
    """Sides for `resize: native`."""
    beside: list[BesideTower] = []
    """More towers, whose features are concatenated with this one's, token by token. Pictures come in the largest
    tower's size."""
    tiling: Tiling | None = None
    """Cut pictures into several frames; default: one frame a picture."""
    mean: tuple[float, float, float] | None = None
    """Channel means; default: the tower's preprocessor file, else its config, else 0.5."""
    std: tuple[Positive, Positive, Positive] | None = None
    """Channel standard deviations; default as for `mean`."""

    @classmethod
    def cross_faults(cls, raw: dict[str, Any]) -> Iterator[CrossFault]:
        """See `Strict`."""
        native = raw.get("resize") == "native"
        if raw.get("beside") and raw.get("select") == "full":
            yield ("select",), "tokens before the grid have no counterpart in another tower; leave 'select' out"
        if native and raw.get("beside"):
            yield ("beside",), "towers side by side see squares; leave 'beside' out or choose another 'resize'"
        others = raw.get("beside")
        for i, other in enumerate(others if isinstance(others, list) else ()):
            if view(other).get("path") == RAW_PATCHES:
                yield ("beside", i, "path"), f"{RAW_PATCHES!r} is no tower, and stands alone"
        if raw.get("path") == RAW_PATCHES and not native:
            yield ("path",), f"{RAW_PATCHES!r} is no tower: pictures come in their own shape, with resize: native"
        if native and raw.get("native") is None:
            yield ("resize",), "'native' needs the section 'native', which says what sides pictures are brought to"
        if not native and raw.get("native") is not None:
            yield ("native",), "needs resize: native"
        if native:
            for name in ("image_size", "tiling"):
                if raw.get(name) is not None:
                    yield (name,), f"has no meaning with resize: native; leave '{name}' out"
            if raw.get("select") == "full":
                yield ("select",), "'full' gives up the grid, which pictures of any shape need; leave 'select' out"


class Language(Strict):
    """The language model."""

    path: str
    """Hub id, local directory, or `sparsevlm:NAME` for a part that the package ships. Any causal language model."""
    chat_template: str = "auto"
    """`auto` takes the tokenizer's template if it marks the assistant's tokens, else refuses. Or one that the package
    ships (`chatml`, `vicuna_v1`, `minigpt`, `yi_vl`, `qwen_vl`, `internlm_xcomposer`, `cogvlm`, `otter`, `plain`), or a
    path to a Jinja file with `{% generation %}` markers."""
    extra_tokens: list[str] = []
    """Tokens added to the tokenizer, in this order, each one word of the vocabulary that stays in decoded answers; for
    example `["<box>", "</box>"]`."""
    attention: Literal["auto", "packed_sdpa", "sdpa", "flash_attention_2", "flash_attention_3", "eager"] = "auto"
    """Attention implementation. `auto`: flash_attention_2 where it is installed and a GPU is there, else packed_sdpa
    (causal SDPA per document of a packed row)."""


class Model(Strict):
    """The parts and what joins them."""

    vision: Vision
    """The vision tower."""
    language: Language
    """The language model."""
    connector: list[ConnectorBlock] = Field(default=[{"type": "mlp"}], min_length=1)
    """Blocks that map visual features to the language model, in order. The last must end at the language model's
    width, unless a `fusion` keeps media beside the text."""
    fusion: Fusion | None = None
    """How visual tokens reach the language model; default: as soft tokens in the text."""
    video: Video = Video()
    """Frame sampling."""
    image_token: str = "<image>"
    """Placeholder of an image in the prompt; added to the tokenizer when it is not there."""
    video_token: str = "<video>"
    """Placeholder of a video."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type in which stage outputs are kept. Master weights are trained in float32 unless `bfloat16` is chosen here."""
    trust_remote_code: bool = False
    """Allow parts whose code comes from the Hub."""

    @classmethod
    def cross_faults(cls, raw: dict[str, Any]) -> Iterator[CrossFault]:
        """See `Strict`."""
        image, clip = raw.get("image_token", "<image>"), raw.get("video_token", "<video>")
        if image == clip:
            at = "video_token" if "video_token" in raw else "image_token"
            yield (at,), f"images and videos need different placeholders, both are {image!r}"
        found = view(raw.get("language")).get("extra_tokens")
        extra = found if isinstance(found, list) else []
        for i, token in enumerate(extra):
            if token in (image, clip):
                yield ("language", "extra_tokens", i), f"{token!r} is a placeholder already; leave it out"
            elif token in extra[:i]:
                yield ("language", "extra_tokens", i), f"{token!r} is there twice"
        vision, video = view(raw.get("vision")), view(raw.get("video"))
        for place in (("frame_text",), ("subtitles", "text")):
            text = view(video.get(place[0])).get("text") if len(place) > 1 else video.get(place[0])
            for token in (image, clip):
                if isinstance(text, str) and isinstance(token, str) and token in text:
                    yield ("video", *place), f"{token!r} is a placeholder of media; write something else between frames"
        if vision.get("resize") == "native" and video.get("max_tokens") is not None:
            yield ("video", "max_tokens"), "with resize: native a frame has tokens by its size; set max_frames instead"
        if view(vision.get("native")).get("long_video") is not None and video.get("long_frames") is None:
            yield (
                ("vision", "native", "long_video"),
                "say from how many frames on a video is long: model.video.long_frames",
            )
        tiling = view(vision.get("tiling")).get("type")
        blocks = raw.get("connector")
        for i, block in enumerate(blocks if isinstance(blocks, list) else ()):
            options = view(block)
            if options.get("type") == "multi_scale" and tiling != "monkey":
                yield (
                    ("connector", i),
                    "multi_scale needs slices that together show what the overview shows: set model.vision.tiling to "
                    "{type: monkey} (2 x 2 slices by default)",
                )
            joins = options.get("type") == "layout" and options.get("join", True) and options.get("unpad", True)
            if joins and tiling in STRETCHED:
                yield (
                    ("connector", i),
                    f"tiling {tiling!r} stretches pictures, so there is no padding to cut off: set unpad: false",
                )
        if view(raw.get("fusion")).get("type") == "gated_cross_attention":
            why = "the fusion keeps visual tokens beside the text, so no text can stand between them"
            for name in ("frame_text", "subtitles"):
                if view(raw.get("video")).get(name):
                    yield ("video", name), why
            if view(view(raw.get("vision")).get("tiling")).get("type") == "uhd":
                yield ("vision", "tiling"), f"{why}, and this tiling puts separators between slices"
