"""Checks of a recipe that need its model, but no weights: widths that meet, layers that exist, pictures that fit."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from sparsevlm.adapters.attach import AdapterReport, attach, detach, has_adapter
from sparsevlm.adapters.targets import TargetError
from sparsevlm.connectors.base import connector_items, parse_connector
from sparsevlm.fusion import check_fusion, media_apart
from sparsevlm.model.attention import PACKED_SDPA, supports_packed_sdpa
from sparsevlm.model.build import add_tokens, build_config, chat_template, packs_for_free
from sparsevlm.model.configuration_sparsevlm import SparseVLMConfig
from sparsevlm.model.guides import LANGUAGE, GuideEncoder
from sparsevlm.model.isolation import kind_isolates
from sparsevlm.model.parts import part_config, resolve_part
from sparsevlm.model.positions import rope_fault
from sparsevlm.model.slice_text import SliceText
from sparsevlm.model.video_text import interleave
from sparsevlm.moe.upcycle import upcycle_model
from sparsevlm.recipe.load import Fault, RecipeError, option_fault
from sparsevlm.recipe.schema import Recipe, Stage
from sparsevlm.recipe.section import OptionPath
from sparsevlm.train.flops import Shape
from sparsevlm.train.media import Medium, items_of, keeps_apart, most_frames, parse_medium, visual_tokens
from sparsevlm.train.parts import select_trainable
from sparsevlm.vision.encoder import default_image_size, feature_dim, output_grid, vision_subconfig
from sparsevlm.vision.native import check_native, native_dim, native_side, patch_side, rule_faults
from sparsevlm.vision.preprocess import ImageSpec, tower_items
from sparsevlm.vision.tokens import MediaKind


@dataclass
class ModelCheck:
    """Looks for what only the model can tell, collecting faults."""

    recipe: Recipe
    faults: list[Fault] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    adapters: dict[str, AdapterReport] = field(default_factory=dict)

    def fault(self, path: OptionPath, message: object) -> None:
        """Enter a fault at the line of an option."""
        self.faults.append(option_fault(self.recipe, path, str(message)))

    def config(self) -> SparseVLMConfig:
        """Return the model's configuration with the vocabulary that training will have."""
        model = self.recipe.model
        parts: dict[OptionPath, Any] = {}
        paths: dict[OptionPath, str] = {("vision",): model.vision.path, ("language",): model.language.path}
        paths |= {("vision", "beside", i): each.path for i, each in enumerate(model.vision.beside)}
        for place, path in paths.items():
            try:
                parts[place] = part_config(path, model.trust_remote_code, offline_shapes=True)
            except ValueError as error:
                self.fault(("model", *place, "path"), error)
        if ("vision",) in parts:
            for path, size in self._sizes():
                self._tower(vision_subconfig(parts["vision",]), path, size, model.vision.layer)
        for i, each in enumerate(model.vision.beside):
            place = ("vision", "beside", i)
            if place in parts:
                size_path = ("model", *place, "image_size")
                self._tower(vision_subconfig(parts[place]), size_path, each.image_size, each.layer)
        if ("language",) in parts:
            vocabulary = self._vocabulary()
        if self.faults:
            raise RecipeError(self.faults)
        try:
            config = build_config(model, offline_shapes=True)
        except ValueError as error:  # each tower is one, but they do not go together
            self.fault(("model", "vision", "beside"), error)
            raise RecipeError(self.faults) from error
        text: Any = config.text_config
        text.vocab_size = max(text.vocab_size, vocabulary)
        try:
            check_fusion(config.fusion, text.num_hidden_layers)
        except ValueError as error:
            option = ("layers",) if str(error).startswith("layer") else ()
            self.fault(("model", "fusion", *option), error)
            raise RecipeError(self.faults) from None
        if media_apart(config.fusion) and not any("fusion" in stage.trains for stage in self.recipe.stages.values()):
            self.notes.append(
                "model.fusion: its gates are closed until a stage trains them, and none does, so the text never sees a "
                "picture; name 'fusion' in a stage's 'trains'"
            )
        return config

    def _sizes(self) -> Iterator[tuple[OptionPath, int | None]]:
        """Yield the sizes that pictures have in the course of a run, and where the recipe says it."""
        yield ("model", "vision", "image_size"), self.recipe.model.vision.image_size
        for name, stage in self.recipe.stages.items():
            if stage.image_size is not None:
                yield ("stages", name, "image_size"), stage.image_size

    def _tower(self, vision: Any, path: OptionPath, wanted: int | None, layer: int | list[int]) -> None:
        """Check picture size (of the recipe's option at `path`) and layer."""
        options = self.recipe.model.vision
        if options.native is not None:
            self._native(vision, options)
            return
        try:
            own = default_image_size(vision)
        except ValueError as error:
            if wanted is None:
                self.fault(path, error)
                return
            own = None
        try:
            feature_dim(vision, layer)
        except ValueError as error:
            self.fault((*path[:-1], "layer") if path[0] == "model" else ("model", "vision", "layer"), error)
            return
        size, patch = wanted or own, getattr(vision, "patch_size", None)
        assert size is not None
        if size != own and isinstance(patch, int) and size % patch:
            near = f"{size // patch * patch} or {(size // patch + 1) * patch}"
            self.fault(path, f"{size} pixels are not a multiple of the patch size {patch}: {near}")
            return
        try:
            output_grid(vision, size, layer)
        except ValueError as error:
            self.fault(path, error)

    def _native(self, vision: Any, options: Any) -> None:
        """Check a tower at native resolution: that it is one, its layer, and that sides hold whole patches."""
        at = ("model", "vision")
        try:
            check_native(vision)
        except ValueError as error:
            self.fault((*at, "resize"), error)
            return
        try:
            native_dim(vision, options.layer)
        except ValueError as error:
            self.fault((*at, "layer"), error)
        for name, reason in rule_faults(options.native, vision):
            self.fault((*at, "native", name, "multiple"), reason)

    def _vocabulary(self) -> int:
        """Check the chat template and return the tokens that the tokenizer will have; 0 where none can be read."""
        from transformers import AutoTokenizer

        model = self.recipe.model
        directory = resolve_part(model.language.path)
        tokenizer, size = None, 0
        if Path(directory).is_dir():
            try:
                tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=model.trust_remote_code)
            except (OSError, ValueError) as error:
                self.fault(("model", "language", "path"), f"no tokenizer in {directory}: {error}")
                return 0
            add_tokens(model, tokenizer)
            size = len(tokenizer)
            self._words(tokenizer)
        elif model.language.chat_template == "auto":
            self.notes.append(
                f"the tokenizer of {model.language.path} was not read (no network); 'chat_template: auto' needs one "
                "whose template marks the assistant's tokens"
            )
            return 0
        try:
            chat_template(model.language.chat_template, tokenizer)
        except ValueError as error:
            self.fault(("model", "language", "chat_template"), error)
        return size

    def _words(self, tokenizer: Any) -> None:
        """Check what the prompt needs of the tokenizer: separators of slices, words of blocks that read the text."""
        model = self.recipe.model
        try:
            SliceText(tokenizer, model.vision.tiling)
        except ValueError as error:
            self.fault(("model", "vision", "tiling"), error)
        for i, spec in enumerate(parse_connector(model.connector)):
            if spec.guide is not None and spec.guide.tokenizer == LANGUAGE:  # another one may need the network
                try:
                    GuideEncoder(spec.guide, tokenizer, {})
                except ValueError as error:
                    self.fault(("model", "connector", i), error)

    def image_size(self, config: SparseVLMConfig, stage: str) -> int:
        """Return the side that pictures are brought to in a stage."""
        if config.vision_native is not None:
            return native_side(config.vision_config)  # pyright: ignore
        return self.recipe.image_size_in(stage) or default_image_size(config.vision_config)  # pyright: ignore

    def pictures(self, config: SparseVLMConfig, side: int) -> ImageSpec:
        """Return what pictures become in the tower, having followed its grid and width through the connector.

        Only counts are read off it, so its colours are made up.
        """
        model = self.recipe.model
        tower: Any = config.vision_config
        layer, select = config.vision_feature_layer, config.vision_feature_select
        native = model.vision.native
        if native is None:
            h, w = output_grid(tower, side, layer, select)
            width = feature_dim(tower, layer)
        else:
            h = w = side // patch_side(tower)
            width = native_dim(tower, layer)
        text_width = config.text_config.hidden_size  # pyright: ignore
        vision = model.vision
        pictures = ImageSpec(
            side,
            vision.resize,
            (0.0, 0.0, 0.0),
            (1.0, 1.0, 1.0),
            (h, w),
            tiling=vision.tiling,
            native=native,
            long_frames=model.video.long_frames,
        )
        sizes = [(side, side)]
        if pictures.needs_size:
            sizes += [(4 * side, 3 * side), (side, 3 * side), (1, 1)]
        if native is not None:  # an odd number of patches, where the rules allow it
            sizes.append((side + patch_side(tower), side))
        media = [tower_items(pictures, MediaKind.IMAGE, 1, size) for size in sizes]
        most, long = model.video.max_frames, model.video.long_frames or 1
        for frames in {most, min(most, max(1, long - 1))}:
            media.append(tower_items(pictures, MediaKind.VIDEO, frames, sizes[0]))
        for i, spec in enumerate(parse_connector(model.connector)):
            try:
                media = [spec.output_items(items) for items in media]
                with torch.device("meta"):
                    spec.build(width, text_width)
                width = spec.output_dim(width, text_width)
            except ValueError as error:
                self.fault(("model", "connector", i), error)
                break
        else:
            if width != text_width and not media_apart(config.fusion):
                self.fault(
                    ("model", "connector", len(model.connector) - 1),
                    f"the connector ends at width {width}, the language model is {text_width} wide: end it with "
                    "{type: linear} or {type: mlp}",
                )
            self._between_frames(pictures)
            try:
                most_frames(self.recipe, pictures)
            except ValueError as error:
                self.fault(("model", "video", "max_tokens"), error)
        if self.faults:
            raise RecipeError(self.faults)
        return pictures

    def _between_frames(self, pictures: ImageSpec) -> None:
        """Refuse text between frames that the connector does not keep apart."""
        video = self.recipe.model.video
        options = [name for name in ("frame_text", "subtitles") if getattr(video, name)]
        if not options or keeps_apart(self.recipe):
            return
        frames = 3  # blocks that merge frames take fewer for pictures
        items = tower_items(pictures, MediaKind.VIDEO, frames, (pictures.image_size, pictures.image_size))
        try:
            interleave(connector_items(parse_connector(self.recipe.model.connector), items), [((), ())] * frames)
        except ValueError as error:
            self.fault(("model", "video", options[0]), error)

    def surroundings(self) -> None:
        """Note what is not here: a plan is often made before the data, and on another machine than the run."""
        sources = [(f"data.{name}", source) for name, source in self.recipe.data.items()]
        for name, source in [*sources, *((f"evals.{name}", spec) for name, spec in self.recipe.evals.items())]:
            paths = [source.path] if isinstance(source.path, str) else source.path
            files = [path for path in paths if Path(path).suffix in (".json", ".jsonl", ".parquet")]
            missing = [path for path in files if not Path(path).exists()]
            if missing:
                others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
                self.notes.append(f"{name}: {missing[0]}{others} not there yet")
        needed: dict[str, str] = {tracker: f"report_to: {tracker}" for tracker in self.recipe.report_to}
        if any(self.recipe.sharding_of(stage).zero for stage in self.recipe.stages.values()):
            needed["deepspeed"] = "sharding"
        if self.recipe.model.language.attention.startswith("flash_attention"):
            needed["flash_attn"] = f"attention: {self.recipe.model.language.attention}"
        if self.recipe.hub is not None:
            from huggingface_hub import get_token

            if get_token() is None:
                self.notes.append(
                    "hub: no token of the Hub here; where the run starts it needs one that may write (`hf auth login` "
                    "or HF_TOKEN)"
                )
        if any(getattr(stage.adapter, "type", None) == "qlora" for stage in self.recipe.stages.values()):
            needed["bitsandbytes"] = "adapter: {type: qlora}"
        for package, option in needed.items():
            if find_spec(package) is None:
                self.notes.append(f"'{option}' needs {package}, which is not installed here")

    def edit(self, model: Any, name: str, stage: Stage) -> bool:
        """Apply a stage's edits to the model and choose what trains; tell whether that worked."""
        if has_adapter(model):  # of the stage before: merged, which leaves shapes as they are
            detach(model, merge=False)
        if stage.rope_factor is not None and (fault := rope_fault(model.config.text_config)):
            self.fault(("stages", name, "rope_factor"), fault)
            return False
        if stage.upcycle is not None:
            spec: Any = stage.upcycle
            try:
                upcycle_model(model, spec)
            except ValueError as error:
                option = ("layers",) if re.match(r"layer(s| choice)", str(error)) else ()
                self.fault(("stages", name, "upcycle", *option), error)
                return False
        if stage.adapter is not None:
            try:
                self.adapters[name] = attach(model, stage.adapter)
            except TargetError as error:
                targets = getattr(stage.adapter, "targets", [])
                at = ("targets", targets.index(error.target)) if "targets" in stage.adapter.model_fields_set else ()
                self.fault(("stages", name, "adapter", *at), error)
                return False
            except ValueError as error:
                self.fault(("stages", name, "adapter"), error)
                return False
            self._rank(model, name, stage.adapter)
        try:
            select_trainable(model, stage.trains)
        except ValueError as error:
            self.fault(("stages", name, "trains"), error)
            return False
        return True

    def _rank(self, model: Any, name: str, adapter: Any) -> None:
        """Note a rank that makes additions larger than what they add to."""
        rank = getattr(adapter, "r", 0)
        layers = [model.get_submodule(module) for module in self.adapters[name].modules] if rank else []
        sides = [min(layer.in_features, layer.out_features) for layer in layers if hasattr(layer, "in_features")]
        full = sum(rank >= side for side in sides)
        if full:
            self.notes.append(
                f"stages.{name}.adapter: r: {rank} is no low rank for {full} of {len(layers)} modules, whose smaller "
                f"side is {min(sides)} at the least: their additions have more parameters than they have"
            )

    def packing(self, model: Any) -> bool:
        """Tell whether `packing: auto` packs, and refuse `packing: true` where documents of a row would see each other.

        A small decoder of the same class is probed, so flash attention, which needs a GPU, is taken at its word.
        """
        decoder = model.model.language_model
        attention = self.recipe.model.language.attention
        if attention == "auto":
            attention = PACKED_SDPA if supports_packed_sdpa(decoder) else "sdpa"
        isolates = attention.startswith("flash_attention") or kind_isolates(decoder, attention)
        for name, stage in self.recipe.stages.items():
            if stage.batch.packing is True and not isolates:
                self.fault(
                    ("stages", name, "batch", "packing"),
                    f"{type(decoder).__name__} with attention {attention!r} lets documents of a packed row see each "
                    "other; set packing: false",
                )
        return isolates and packs_for_free(attention)

    def shape(self, name: str, stage: Stage, pictures: ImageSpec, medium: Medium, packable: bool, world: int) -> Shape:
        """Return the size of a step, checking that a picture fits into a row.

        A row is taken to hold as many of `medium` as its visual budget allows when packing, else one: an upper bound
        for the tower's share, unless media stay beside the text and nothing limits them.
        """
        batch = stage.batch
        at = ("stages", name, "batch")
        if batch.rows % (batch.rows_per_rank * world):
            self.fault((*at, "rows"), f"{batch.rows} rows cannot be divided over {world} x {batch.rows_per_rank} rows")
        apart, most = keeps_apart(self.recipe), batch.max_visual_tokens
        budget = most or batch.max_length if apart else min(most or batch.max_length, batch.max_length)
        picture = visual_tokens(self.recipe, pictures, parse_medium("1x1"))
        if picture > budget - (not apart) and (most or not apart):
            option = "max_visual_tokens" if most and (apart or budget < batch.max_length) else "max_length"
            self.fault((*at, option), f"a picture alone takes {picture} tokens; no sample with one fits into {budget}")
        specs, items = parse_connector(self.recipe.model.connector), items_of(self.recipe, pictures, medium)
        visual = sum(item.grid.num_tokens for item in connector_items(specs, items))
        packing = packable if batch.packing == "auto" else batch.packing
        if packing and apart and not most:
            self.notes.append(
                f"stages.{name}.batch: media stay beside the text, one token each, so a packed row may hold very many "
                "of them; set max_visual_tokens"
            )
        held = max(1, budget // visual) if packing else 1
        return Shape(
            rows=batch.rows,
            rows_per_rank=batch.rows_per_rank,
            row_tokens=batch.max_length,
            row_frames=held * (1 if pictures.native else sum(item.grid.t for item in items)),
            row_media=held,
            row_visual=held * visual,
        )
