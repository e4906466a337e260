"""Training with features that are kept: which stage uses them, and who writes down what the tower gives."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparsevlm.recipe.schema import Recipe
from sparsevlm.train.trainer import VLMTrainer
from sparsevlm.vision.feature_store import FeatureStore, taking_features

if TYPE_CHECKING:
    from rich.console import Console

Wanted = list[tuple[str, int]]
"""Keys and tokens of the media of a batch that went through the tower; an empty key is not to be kept."""


def open_store(recipe: Recipe, name: str, model: Any, console: Console | None = None) -> FeatureStore | None:
    """Return where a stage keeps features; None without the option, or where the tower trains.

    Args:
        recipe: The resolved recipe.
        name: The stage.
        model: Its model, with what trains chosen.
        console: Where to say what is there; None says nothing.
    """
    cache = recipe.feature_cache
    if cache is None:
        return None
    if any(parameter.requires_grad for parameter in model.model.vision_tower.parameters()):
        if console is not None:
            console.print(f"{name}: the tower trains, so its features are not kept", highlight=False)
        return None
    arithmetic = f"{recipe.stages[name].precision} {next(model.parameters()).dtype}"
    store = FeatureStore(cache.path, model.model.tower_identity(), arithmetic, round(cache.max_gb * 1e9))
    if console is not None:
        console.print(
            f"{name}: features of {len(store)} media are in {store.folder} ({store.num_bytes / 1e6:.1f} MB)",
            highlight=False,
            soft_wrap=True,
        )
    return store


class CachingTrainer(VLMTrainer):
    """Trains a stage whose tower is frozen, and keeps its features.

    Args:
        *args: As `VLMTrainer`.
        store: Where to.
        **kwargs: As `VLMTrainer`.
    """

    def __init__(self, *args: Any, store: FeatureStore, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.store = store
        self.read = self.computed = 0
        self._wanted: Iterator[Wanted] = iter(())

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """Return the micro-batches of a step as `VLMTrainer`, without what is said of their features."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        wanted = [batch.pop("feature_keys", []) for batch in batches]
        self._wanted = iter(wanted)
        self.computed += sum(map(len, wanted))
        self.read += sum(batch.pop("features_read", 0) for batch in batches)
        return batches, items

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """Return the loss as `VLMTrainer`; what the tower gives on the way is kept."""
        wanted = next(self._wanted, [])
        with taking_features(partial(self._keep, wanted) if wanted else None):
            return super().compute_loss(*args, **kwargs)

    def _keep(self, wanted: Wanted, features: Tensor) -> None:
        sizes = [tokens for _, tokens in wanted]
        assert sum(sizes) == features.shape[0], "media and features disagree"
        for (key, _), part in zip(wanted, features.split(sizes), strict=True):
            if key:
                self.store.put(key, part)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; features that wait are written at the end, also where training was interrupted."""
        try:
            return super().train(*args, **kwargs)
        finally:
            self.store.flush()

    def describe(self) -> str:
        """Return how many media were read and computed by this process."""
        return f"features of {self.read} media were read, of {self.computed} computed"
