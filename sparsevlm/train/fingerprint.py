"""What a stage's result depends on, to tell a stage that can be kept from one whose recipe has changed."""

from __future__ import annotations

from typing import Any

from sparsevlm.recipe.schema import Recipe

_NO_EFFECT = {"evals", "log_every", "save_every", "sharding"}
"""Options of a stage that do not change what it learns."""


def stage_inputs(recipe: Recipe, name: str) -> dict[str, Any]:
    """Return every option that a stage's weights depend on, as JSON types.

    The number of processes is not among them, nor is what merely spreads or watches the work.
    """
    return _inputs(recipe, name, exclude_defaults=False)


def _inputs(recipe: Recipe, name: str, *, exclude_defaults: bool) -> dict[str, Any]:
    """Return `stage_inputs`, or of it only the options that differ from their defaults."""

    def dump(section: Any, exclude: set[str] | None = None) -> dict[str, Any]:
        return section.model_dump(mode="json", exclude=exclude, exclude_defaults=exclude_defaults)

    stage = dump(recipe.stages[name], _NO_EFFECT)
    for option in ("workers", "rows_per_rank"):
        stage.get("batch", {}).pop(option, None)
    names = list(recipe.stages)
    return {
        "seed": recipe.seed,
        "model": dump(recipe.model),
        "data": {source: dump(recipe.data[source]) for source in sorted(recipe.stages[name].data)},
        "stage": stage,
        "after": names[: names.index(name)],
    }


def changes(before: Any, now: Any, set_now: Any = None, at: str = "") -> list[str]:
    """Return the differences between two trees of JSON types, one ``path: old -> new`` each.

    Args:
        before: The older tree.
        now: The newer tree.
        set_now: Of `now` only the options that differ from their defaults; an option that `before` does not know, being
            of an earlier version, is no difference while it is at its default. None: all differ.
        at: Path of both trees.
    """
    if isinstance(before, dict) and isinstance(now, dict):
        found = []
        chosen = now if set_now is None else set_now
        for key in [*before, *(key for key in now if key not in before)]:
            path = f"{at}.{key}" if at else str(key)
            if key not in now:
                found.append(f"{path}: {before[key]!r} -> removed")
            elif key in before:
                found += changes(before[key], now[key], None if set_now is None else _below(set_now, key), path)
            elif key in chosen:
                found.append(f"{path}: added {now[key]!r}")
        return found
    sections = [isinstance(entry, dict) for side in (before, now) if isinstance(side, list) for entry in side]
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now) and sections and all(sections):
        rows = set_now if isinstance(set_now, list) else [None] * len(now)
        return [
            line
            for i, (old, new, chosen) in enumerate(zip(before, now, rows, strict=True))
            for line in changes(old, new, chosen, f"{at}.{i}")
        ]
    return [] if before == now else [f"{at}: {before!r} -> {now!r}"]


def _below(tree: Any, key: str) -> Any:
    """Return what is at a key; an empty mapping where all of it is at its defaults."""
    return tree.get(key, {}) if isinstance(tree, dict) else {}


def check_unchanged(before: dict[str, Any], recipe: Recipe, name: str, where: str) -> None:
    """Refuse to go on with a stage that was trained, or begun, from another recipe.

    Args:
        before: `stage_inputs` at that time.
        recipe: The recipe now.
        name: The stage.
        where: Its directory, for the message.

    Raises:
        ValueError: Something changed; the message names it.
    """
    found = changes(before, stage_inputs(recipe, name), _inputs(recipe, name, exclude_defaults=True))
    if found:
        shown = [
            f"stages.{name}.{line.removeprefix('stage.')}" if line.startswith("stage.") else line for line in found
        ]
        raise ValueError(
            f"stage {name!r} in {where} was made with other options:\n  "
            + "\n  ".join(shown)
            + f"\nDelete {where} (and the stages after it) to train it anew, or set another 'output'"
        )
