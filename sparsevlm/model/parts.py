"""The parts that a recipe names: where they are, their configurations, the tower's weights and pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig

from sparsevlm.model.configuration_sparsevlm import SparseVLMConfig
from sparsevlm.recipe import schema
from sparsevlm.recipe.model import BesideTower, Vision
from sparsevlm.vision.encoder import Select, default_image_size, let_resize, num_prefix_tokens, vision_subconfig
from sparsevlm.vision.native import check_native, make_native, rule_faults
from sparsevlm.vision.preprocess import ImageSpec, image_spec_from_config
from sparsevlm.vision.raw_config import RawPatchesConfig
from sparsevlm.vision.side_by_side import SideBySideModel, side_by_side
from sparsevlm.vision.side_by_side_config import SideBySideConfig

ASSETS = Path(__file__).resolve().parent.parent / "assets"
PACKAGED = "sparsevlm:"


def resolve_part(path: str) -> str:
    """Turn ``sparsevlm:NAME`` into the directory that the package ships; leave ids and paths alone.

    Raises:
        ValueError: The package ships no such part.
    """
    if not path.startswith(PACKAGED):
        return path
    directory = ASSETS / path.removeprefix(PACKAGED)
    if not (directory / "config.json").is_file():
        shipped = sorted(str(p.parent.relative_to(ASSETS)) for p in ASSETS.rglob("config.json"))
        raise ValueError(f"the package ships no part {path!r}; it has {', '.join(PACKAGED + s for s in shipped)}")
    return str(directory)


def part_config(path: str, trust_remote_code: bool = False, offline_shapes: bool = False) -> PreTrainedConfig:
    """Load the configuration of a part; a tower that can take pictures of other sizes than its own will.

    Args:
        path: Hub id, directory or packaged part.
        trust_remote_code: Allow code from the Hub.
        offline_shapes: Prefer the shapes of well-known backbones that the package carries; nothing is downloaded.

    Raises:
        ValueError: `path` is no directory and cannot be reached.
    """
    resolved = resolve_part(path)
    if offline_shapes and not Path(resolved).is_dir():
        from sparsevlm.model.backbones import backbone_config

        config = backbone_config(path)
    else:
        try:
            config = AutoConfig.from_pretrained(resolved, trust_remote_code=trust_remote_code)
        except OSError as error:
            raise ValueError(f"no configuration for part {path!r}: {str(error).splitlines()[0]}") from error
    let_resize(config)
    return config


def tower_config(model: schema.Model, offline_shapes: bool = False) -> tuple[PreTrainedConfig, int | list[int], Select]:
    """Return the configuration of the vision tower, the layer that is read of it and whether prefix tokens stay.

    Args:
        model: The recipe's `model` section.
        offline_shapes: See `part_config`. Colours of towers side by side are made up then.

    Raises:
        ValueError: It cannot be loaded, or cannot do what the section asks of it.
    """
    first = model.vision
    vision = vision_subconfig(part_config(first.path, model.trust_remote_code, offline_shapes))
    if first.native is not None:
        check_native(vision)
        for name, reason in rule_faults(first.native, vision):
            raise ValueError(f"model.vision.native.{name}: {reason}")
        return vision, first.layer, "patch"
    if not first.beside:
        if first.select == "auto":
            return vision, first.layer, "patch" if num_prefix_tokens(vision) else "full"
        return vision, first.layer, first.select
    towers = [first, *first.beside]
    configs = [
        vision,
        *(vision_subconfig(part_config(each.path, model.trust_remote_code, offline_shapes)) for each in first.beside),
    ]
    sides = [each.image_size or default_image_size(config) for each, config in zip(towers, configs, strict=True)]
    made_up = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    colours = [made_up if offline_shapes else _colours(*each) for each in zip(towers, configs, strict=True)]
    means, stds = zip(*colours, strict=True)
    return side_by_side(configs, [each.layer for each in towers], sides, means, stds), -1, "full"


def _colours(tower: Vision | BesideTower, config: PreTrainedConfig) -> tuple[tuple[float, ...], tuple[float, ...]]:
    spec = image_spec_from_config(
        config, _preprocessor(tower.path), image_size=tower.image_size, mean=tower.mean, std=tower.std
    )
    return spec.mean, spec.std


def load_tower(model: schema.Model, config: SparseVLMConfig, options: dict[str, Any]) -> nn.Module:
    """Load the vision tower; one without weights is built.

    Args:
        model: The recipe's `model` section.
        config: What `tower_config` gave is in it.
        options: For `from_pretrained`.
    """
    vision: Any = config.vision_config
    if isinstance(vision, SideBySideConfig):
        with torch.device("meta"):
            towers = SideBySideModel(vision)
        paths = [model.vision.path, *(each.path for each in model.vision.beside)]
        for i, (path, its_config) in enumerate(zip(paths, vision.configs, strict=True)):
            towers.towers[i] = AutoModel.from_pretrained(resolve_part(path), config=its_config, **options)
        return towers
    if isinstance(vision, RawPatchesConfig):
        tower = AutoModel.from_config(vision)
    else:
        tower = AutoModel.from_pretrained(resolve_part(model.vision.path), config=vision, **options)
    if config.vision_native is not None:
        make_native(tower, config.vision_native["positions"])
    return tower


def image_spec(model: schema.Model, config: SparseVLMConfig) -> ImageSpec:
    """Return how pictures are brought to the tower, from the recipe, the tower's preprocessor file and its config."""
    vision: Any = config.vision_config
    return image_spec_from_config(
        vision,
        _preprocessor(model.vision.path),
        image_size=config.image_size,
        resize=model.vision.resize,
        mean=vision.means[0] if model.vision.beside else model.vision.mean,
        std=vision.stds[0] if model.vision.beside else model.vision.std,
        layer=config.vision_feature_layer,
        select=config.vision_feature_select,
        tiling=model.vision.tiling,
        native=model.vision.native,
        long_frames=model.video.long_frames,
    )


def _preprocessor(path: str) -> dict[str, Any] | None:
    """Return a tower's preprocessor file, of the Hub's from the cache or the Hub; None where there is none."""
    directory = Path(resolve_part(path))
    file = directory / "preprocessor_config.json"
    if file.is_file():
        return json.loads(file.read_text())
    if directory.is_dir():
        return None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return json.loads(Path(hf_hub_download(path, "preprocessor_config.json")).read_text())
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled):
        return None
