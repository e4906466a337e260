"""An adapter on its way to the Hub: which model it belongs to there, and the files that say so.

A stranger has no use for the path of a base on this machine, so the base goes up beside the adapter, in the folder
`base`, or is named by its place on the Hub, pinned to a commit.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsevlm.adapters.saved import ADAPTER_CONFIG, PARENT, QUANTISATION, read_parent, weights_hash
from sparsevlm.export.card import hub_id
from sparsevlm.export.hub_files import BASE, Source, weight_files
from sparsevlm.export.hub_record import read_pushes

_ABOUT_BASE = ("base_model_name_or_path", "revision")


@dataclass(frozen=True)
class Base:
    """Where the model of an adapter is on the Hub.

    Attributes:
        repo: ``OWNER/NAME``.
        revision: Commit or branch; None for the newest of `main`, until it has been looked up.
        folder: Folder of the repository; None for its root.
        beside: It goes up in the same commit as the adapter.
    """

    repo: str
    revision: str | None
    folder: str | None = None
    beside: bool = False

    def __str__(self) -> str:
        """Return ``OWNER/NAME/FOLDER at REVISION``."""
        return "/".join(filter(None, (self.repo, self.folder))) + (f" at {self.revision}" if self.revision else "")


def choose_base(
    source: Source, repo: str, revision: str | None, *, adapter_only: bool, base: str | None, endpoint: str
) -> Base | None:
    """Return where the model of an adapter will be found; None for what is a whole model.

    Args:
        source: What is uploaded.
        repo: Where to.
        revision: Branch.
        adapter_only: Leave the base out of the upload.
        base: ``OWNER/NAME`` or ``OWNER/NAME@REVISION`` of the base; default: where it was pushed to from here.
        endpoint: Address of the Hub.

    Raises:
        ValueError: Options that do not go together, or nothing says where the base is on the Hub.
    """
    if source.adapter is None:
        if adapter_only or base is not None:
            option = "--adapter-only" if adapter_only else "--base"
            raise ValueError(f"{option}: {source.model} holds a whole model, no adapter; leave the option out")
        return None
    if base is not None and not adapter_only:
        raise ValueError("--base names the base of an adapter that is pushed without it; add --adapter-only")
    if not adapter_only and source.base is not None:
        return Base(repo, revision, BASE, beside=True)
    if base is not None:
        name, at, commit = base.partition("@")
        if hub_id(name, local=False) is None or (at and not commit):
            raise ValueError(f"--base {base!r} is no model of the Hub; give OWNER/NAME or OWNER/NAME@REVISION")
        return Base(name, commit or None)
    if source.base is None:
        named = hub_id(source.adapter.get("base_model_name_or_path"))
        if named is None:
            raise ValueError(
                f"{source.model} does not say which model of the Hub its adapter belongs to "
                f"(base_model_name_or_path: {source.adapter.get('base_model_name_or_path')!r}); push that model, then "
                "the adapter with --adapter-only --base OWNER/NAME"
            )
        return Base(named, source.adapter.get("revision"))
    pushed = [row for row in read_pushes(source.base) if row.endpoint == endpoint]
    if not pushed:
        base_dir = source.base.resolve()  # parent.json says it from the adapter's place: RUN/lora/../align
        shown = base_dir.relative_to(Path.cwd()) if base_dir.is_relative_to(Path.cwd()) else base_dir
        raise ValueError(
            f"--adapter-only: the base of this adapter, {shown}, was not pushed from here. Push it first "
            f"(sparsevlm push {shown} {repo}-base), or name it with --base OWNER/NAME where it is there already, "
            "or leave --adapter-only out: the base then goes up beside the adapter"
        )
    place = ([row for row in pushed if row.folder is None] or pushed)[
        -1
    ]  # its own repository or branch before a folder
    return Base(place.repo, place.commit, place.folder)


def adapter_files(source: Source, base: Base) -> dict[str, bytes]:
    """Return the files of an adapter that are written anew: those that name its base by a path of this machine."""
    assert source.adapter is not None
    config = {key: value for key, value in source.adapter.items() if key not in _ABOUT_BASE}
    config |= {"base_model_name_or_path": base.repo, "revision": None if base.beside else base.revision}
    files = {ADAPTER_CONFIG: _dumped(dict(sorted(config.items())))}
    if source.base is not None:
        parent: dict[str, Any] = {"sha256": weights_hash(source.base)}
        parent["hub"] = {"repo": base.repo, "revision": base.revision, "folder": base.folder}
        if base.beside:
            parent["relative"] = BASE
        parent |= {key: value for key, value in read_parent(source.model).items() if key == QUANTISATION}
        files[PARENT] = _dumped(parent)
    return files


def _dumped(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def base_weights(source: Source) -> dict[str, Path]:
    """Return the weight files of an adapter's base, by name; none where it is not here."""
    return {} if source.base is None else weight_files(source.base)
