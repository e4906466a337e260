"""Which experts the tokens of a data set go to: the content of a `routing.json` (see `docs/routing.md`).

Legend: S tokens of a batch, E experts, k experts a token, L MoE layers, M modalities, N visual tokens of a picture.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby, islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from sparsevlm.connectors.base import connector_items
from sparsevlm.data.collate import Collator
from sparsevlm.data.sample import Encoded
from sparsevlm.eval.run import inference_mode_of
from sparsevlm.moe.groups import Settings, by_group, router_groups
from sparsevlm.moe.metrics import (
    MODALITIES,
    RoutingSums,
    count_modalities,
    expert_similarity,
    measure_routing,
    summarise_routing,
    token_modality,
)
from sparsevlm.vision.patches import unpatchify
from sparsevlm.vision.tokens import Grid, MediaKind

if TYPE_CHECKING:
    from PIL import Image

FORMAT = 1
PATHWAYS = 10
"""Commonest pathways kept of each modality."""
DIGITS = 6
"""Digits after the point of the shares and cosines in the document."""


class Tally:
    """Adds up the routing of batches, token by token where the live metrics keep sums only.

    Args:
        settings: Of a group of routers, see `sparsevlm.moe.groups`.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.experts: int = settings["num_experts"]
        pairs = len(MODALITIES), len(settings["layers"]) - 1, self.experts, self.experts
        self.sums: RoutingSums | None = None
        self.transitions = np.zeros(pairs, dtype=np.int64)  # (M, L - 1, E, E)
        self.pathways: list[Counter[bytes]] = [Counter() for _ in MODALITIES]
        self._path_type = np.min_scalar_type(self.experts)

    def add(self, modality: Tensor, logits: Sequence[Tensor], indices: Sequence[Tensor]) -> np.ndarray:
        """Add a padded batch; return each token's first choice of every layer, ``(L, S)``, -1 for none.

        Args:
            modality: ``(S,)``, see `token_modality`.
            logits: ``(S, E)`` a layer.
            indices: ``(S, k)`` a layer.
        """
        sums = measure_routing(logits, indices, modality, self.settings.get("scoring_func", "softmax"))
        self.sums = sums if self.sums is None else self.sums + sums
        first = torch.stack([index[:, 0].cpu() for index in indices]).numpy()  # (L, S)
        self.add_first_choices(first, modality.cpu().numpy())
        return first

    def add_first_choices(self, first: np.ndarray, modality: np.ndarray) -> None:
        """Count pairs of consecutive layers, and whole pathways of tokens that have a choice in every layer.

        Args:
            first: ``(L, S)``.
            modality: ``(S,)``, see `token_modality`.
        """
        for m, (counts, pathways) in enumerate(zip(self.transitions, self.pathways, strict=True)):
            chosen = first[:, modality == m]  # (L, s)
            for count, before, after in zip(counts, chosen, chosen[1:]):
                both = (before >= 0) & (after >= 0)
                np.add.at(count, (before[both], after[both]), 1)
            whole = np.ascontiguousarray(chosen[:, (chosen >= 0).all(0)].T.astype(self._path_type))  # (s, L)
            pathways.update(row.tobytes() for row in whole)

    def document(self, samples: int, similarity: Sequence[Tensor]) -> dict[str, Any]:
        """Return the content of `routing.json` without its pictures.

        Args:
            samples: How many were added.
            similarity: Of the model's experts, a matrix a layer.
        """
        assert self.sums is not None
        layers = summarise_routing(self.sums)
        present = list(layers[0]["load"])
        result = {
            "format": FORMAT,
            "layers": list(self.settings["layers"]),
            "num_experts": self.experts,
            "num_experts_per_tok": self.settings["num_experts_per_tok"],
            "scoring": self.settings.get("scoring_func", "softmax"),
            "samples": samples,
            "tokens": count_modalities(self.sums),
            "load": {name: [layer["load"][name] for layer in layers] for name in present},
            "balance": [layer["balance"] for layer in layers],
            "max_violation": [layer["max_violation"] for layer in layers],
            "dead_experts": [layer["dead_experts"] for layer in layers],
            "entropy": {name: [layer["entropy"][name] for layer in layers] for name in present},
            "dropped_share": [layer["dropped_share"] for layer in layers],
            "logit_rms": [layer["logit_rms"] for layer in layers],
            "similarity": [cosines.tolist() for cosines in similarity],
            "transitions": {name: self.transitions[m].tolist() for m, name in enumerate(MODALITIES) if name in present},
            "pathways": {name: self._commonest(m) for m, name in enumerate(MODALITIES) if name in present},
        }
        return _rounded(result)

    def _commonest(self, m: int) -> list[dict[str, Any]]:
        """Return a modality's commonest pathways, ties in the order of the experts' numbers."""
        pathways, total = self.pathways[m], self.pathways[m].total()
        read = ((count, np.frombuffer(path, dtype=self._path_type).tolist()) for path, count in pathways.items())
        best = sorted(read, key=lambda entry: (-entry[0], entry[1]))[:PATHWAYS]
        return [{"experts": path, "share": count / total} for count, path in best]


def _rounded(value: Any) -> Any:
    """Round all numbers inside: sixteen digits of a share would be most of the file."""
    if isinstance(value, float):
        return round(value, DIGITS)
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    return [_rounded(entry) for entry in value] if isinstance(value, list) else value


def survey_routing(
    model: Any,
    processor: Any,
    items: Iterable[tuple[Encoded, str]],
    *,
    batch_size: int = 8,
    pictures: int = 4,
    advance: Callable[[int], Any] = lambda _: None,
) -> tuple[dict[str, Any], list[Image.Image]]:
    """Run a model over samples and collect where their tokens go.

    Args:
        model: A `SparseVLMForConditionalGeneration` with routers; it is left as it was found.
        processor: Its processor.
        items: Samples, each with a line of text to stand beside its picture.
        batch_size: Samples at once.
        pictures: Pictures whose tokens are kept one by one: those of the first samples that have one.
        advance: Called with the size of each batch that is done.

    Returns:
        The document; each entry of its ``pictures`` belongs to a picture of the list, as the tower sees it. Where a
        model has several groups of routers it is that of the adapter's, and ``others`` holds those of the others.

    Raises:
        ValueError: The model is dense, or there is no sample.
    """
    groups = router_groups(model)
    if not groups:
        raise ValueError(
            "this model is dense: it has no routing to look at. Give a stage with 'upcycle' or 'adapter: {type: "
            "lora_experts}', or one after it"
        )
    tallies = {group: Tally(settings) for group, settings in groups.items()}
    collate, count, config = Collator(processor.tokenizer.pad_token_id, packed=False), 0, model.config
    shown: dict[str, list[dict[str, Any]]] = {group: [] for group in groups}
    images: list[Image.Image] = []
    with inference_mode_of(model):
        rest = iter(items)
        while group := list(islice(rest, batch_size)):
            batch = collate([[encoded] for encoded, _ in group])
            del batch["labels"]
            batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
            outputs = model(**batch, output_router_logits=True, logits_to_keep=1, use_cache=False)
            ids = batch["input_ids"]
            modality = token_modality(ids, config.image_token_id, config.video_token_id, batch.get("attention_mask"))
            first = {
                name: tallies[name].add(modality, logits, indices).reshape(-1, *ids.shape)  # (L, B, T)
                for name, (logits, indices) in by_group(
                    outputs.router_groups, outputs.router_logits, outputs.router_indices
                )
            }
            for row, (encoded, text) in enumerate(group):
                if len(images) < pictures and (found := next(_pictures(processor, encoded), None)):
                    grid, where, pixels = found
                    for name, choices in first.items():
                        experts = choices[:, row, where.numpy()].tolist()  # (L, N)
                        shown[name].append({"text": text, "grid": [grid.h, grid.w], "experts": experts})
                    images.append(_image(pixels, processor.image_spec))
            count += len(group)
            advance(len(group))
        if not count:
            raise ValueError("there is no sample to look at the routing of")
        documents = [
            {"group": name, **tally.document(count, expert_similarity(model, name)), "pictures": shown[name]}
            for name, tally in tallies.items()
            if tally.sums is not None  # not the routers of an adapter that is there but does not run
        ]
        if not documents:
            raise ValueError("no router ran: enable the adapter that has them")
    others, document = documents[:-1], documents[-1]  # an adapter's routers come after the model's own
    return document | ({"others": others} if others else {}), images


def _pictures(processor: Any, encoded: Encoded) -> Iterator[tuple[Grid, Tensor, Tensor]]:
    """Yield the pictures whose tokens have places: grid after the connector, positions ``(N,)``, pixels ``(3, S, S)``.

    Tokens that a connector has merged or asked for (`dpc_knn`) have none: their grid is one row.
    """
    if processor.one_token_media:  # visual tokens are not in the text that is routed
        return
    ids = encoded.input_ids
    visual = ((ids == processor.image_token_id) | (ids == processor.video_token_id)).nonzero()[:, 0]
    frame = start = 0
    for _, group in groupby(encoded.items, key=lambda item: item.medium):
        items = list(group)
        after = connector_items(processor.block_specs, items)
        length = sum(item.grid.num_tokens for item in after)
        grid = after[0].grid
        if len(after) == len(items) == 1 and items[0].kind is MediaKind.IMAGE and grid.t == 1 and min(grid[1:]) > 1:
            pixels = encoded.pixel_values
            assert pixels is not None
            tower = items[0].grid
            patches = pixels[frame : frame + tower.num_tokens]  # at native resolution
            shown = pixels[frame] if pixels.ndim == 4 else unpatchify(patches, tower.h, tower.w)
            yield grid, visual[start : start + length], shown
        start += length
        if encoded.kept and encoded.kept[items[0].medium] is not None:  # features, no pixels
            continue
        packed = encoded.pixel_values is not None and encoded.pixel_values.ndim == 2
        frame += sum(item.grid.num_tokens if packed else item.grid.t for item in items)


def _image(pixels: Tensor, spec: Any) -> Image.Image:
    """Return normalised pixels ``(3, S, S)`` as a picture again."""
    from PIL import Image

    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (spec.mean, spec.std))
    values = ((pixels.float().cpu() * std + mean).clamp(0, 1) * 255).round().byte()
    return Image.fromarray(values.permute(1, 2, 0).numpy())
