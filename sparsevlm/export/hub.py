"""`push`: a trained model, its card and the records of its training, to the Hugging Face Hub."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from sparsevlm.export.card import check_round_trip, make_card
from sparsevlm.export.hub_adapter import Base, adapter_files, base_weights, choose_base
from sparsevlm.export.hub_client import Pushed, check_repo, find_commit, upload
from sparsevlm.export.hub_files import BASE, CARD, Item, Source, base_items, collect, read_source, refuse_secrets
from sparsevlm.export.hub_record import Push, note_push, state_of
from sparsevlm.export.hub_scan import secrets_in

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Prepared", "Pushed", "prepare", "print_prepared", "print_pushed", "push"]


@dataclass(frozen=True)
class Prepared:
    """An upload that is ready to go.

    Attributes:
        repo: ``OWNER/NAME``.
        revision: Branch, or None for `main`.
        model: The directory that it is made from.
        stage: Its stage, or None.
        items: The files, the card among them, in order of name.
        left: Names of what stays on this machine.
        card: The card.
        source: What it is made from.
        license: For the card.
        base: Where the model of an adapter is; None for a whole model.
    """

    repo: str
    revision: str | None
    model: Path
    stage: str | None
    items: tuple[Item, ...]
    left: tuple[str, ...]
    card: str
    source: Source
    license: str | None = None
    base: Base | None = None


def prepare(
    path: str | Path,
    repo: str,
    *,
    revision: str | None = None,
    license: str | None = None,
    adapter_only: bool = False,
    base: str | None = None,
    endpoint: str | None = None,
) -> Prepared:
    """Choose and check the files and write the card; touches no network and writes nothing.

    Args:
        path: A run (its last complete stage), a model or an adapter directory.
        repo: ``OWNER/NAME``.
        revision: Branch; default `main`.
        license: Licence of the model for the card, as the Hub spells it.
        adapter_only: Leave out the model that an adapter belongs to; else it goes to the folder `base`.
        base: That model's ``OWNER/NAME`` or ``OWNER/NAME@REVISION``; default: where it was pushed to from here.
        endpoint: Address of the Hub; default huggingface_hub's.

    Raises:
        ValueError: There is no whole model, a name is wrong, an adapter's base is not here or has no place on the Hub,
            or a file holds something secret.
    """
    from huggingface_hub import constants

    check_repo(repo, revision)
    if license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", license):
        raise ValueError(f"--license {license!r}: give it as the Hub spells it, e.g. apache-2.0, mit, cc-by-4.0, other")
    source = read_source(path)
    place = choose_base(
        source, repo, revision, adapter_only=adapter_only, base=base, endpoint=endpoint or constants.ENDPOINT
    )
    return _made(source, repo, revision, license, place)


def _made(source: Source, repo: str, revision: str | None, license: str | None, base: Base | None) -> Prepared:
    """Choose the files and write the card, where it is settled where the base of an adapter is."""
    items, left = collect(source, None if base is None else adapter_files(source, base))
    if base is not None and base.beside:
        items += base_items(source)
        left = [name for name in left if name != f"{BASE}/"]
    card = make_card(source, repo, license, revision=revision, base=base)
    check_round_trip(card)
    refuse_secrets(list(secrets_in(card.splitlines(), f"the model card ({CARD})")))
    written = Item(CARD, card.encode(), len(card.encode()))
    everything = tuple(sorted([*items, written], key=lambda item: item.name))
    stage = source.record.get("stage")
    return Prepared(repo, revision, source.model, stage, everything, tuple(left), card, source, license, base)


def push(
    path: str | Path,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    license: str | None = None,
    adapter_only: bool = False,
    base: str | None = None,
    token: str | None = None,
    endpoint: str | None = None,
    pause: Callable[[float], None] = time.sleep,
    tell: Callable[[str], None] = lambda line: None,
) -> Pushed:
    """Upload a model with its card.

    Takes the arguments of `prepare` and `hub_client.upload`.

    Args:
        path: A run (its last complete stage), a model or an adapter directory.
        repo: ``OWNER/NAME``; made where there is none.
        private: Make it private.
        revision: Branch; made where there is none.
        message: Of the commit; default names the stage.
        license: Licence of the model for the card.
        adapter_only: As for `prepare`.
        base: As for `prepare`.
        token: Default: the one that huggingface_hub finds.
        endpoint: Address of the Hub; default huggingface_hub's.
        pause: Waits between attempts.
        tell: Told what goes wrong meanwhile.

    Raises:
        ValueError: The model, a name or the token is wrong, or a file holds something secret; nothing was committed.
        OSError: The Hub could not be reached.
    """
    about = {"revision": revision, "license": license, "endpoint": endpoint}
    ready = prepare(path, repo, adapter_only=adapter_only, base=base, **about)
    return send(ready, private=private, message=message, token=token, endpoint=endpoint, pause=pause, tell=tell)


def send(
    ready: Prepared,
    *,
    private: bool = False,
    message: str | None = None,
    token: str | None = None,
    endpoint: str | None = None,
    pause: Callable[[float], None] = time.sleep,
    tell: Callable[[str], None] = lambda line: None,
) -> Pushed:
    """Upload what `prepare` made ready; arguments and errors are those of `push`.

    Notes the upload in the directory (`hub_record`), so that an adapter on this model can name it later.
    """
    how = {"token": token, "endpoint": endpoint, "pause": pause, "tell": tell}
    base = ready.base
    if base is not None and not base.beside:
        commit = find_commit(base.repo, base.revision, base.folder, base_weights(ready.source), **how)
        if commit != base.revision:  # a branch moves on; the adapter belongs to what it holds now
            ready = _made(ready.source, ready.repo, ready.revision, ready.license, replace(base, revision=commit))
    message = message or _message(ready)
    pushed = upload(ready.items, ready.repo, message=message, private=private, revision=ready.revision, **how)
    noted: list[tuple[Path, str | None]] = [(ready.model, None)]
    if base is not None and base.beside and ready.source.base is not None:
        noted.append((ready.source.base, BASE))
    for directory, folder in noted:
        push = Push(pushed.endpoint, ready.repo, ready.revision or "main", pushed.commit, folder, state_of(directory))
        try:
            note_push(directory, push)
        except OSError as error:
            tell(f"the upload could not be noted in {directory} ({error.strerror})")
    return pushed


def _message(ready: Prepared) -> str:
    """Return the commit's message where none is given."""
    stage, step = ready.stage, ready.source.record.get("step")
    if stage is None:
        return "Model" if ready.base is None else "Adapter"
    return f"Stage {stage}" + (f", step {step}" if step is not None else "")


def print_prepared(ready: Prepared, console: Console, *, card: bool) -> None:
    """Print the files with their sizes, what stays here, and the card."""
    where = ready.repo + (f" at {ready.revision}" if ready.revision else "")
    lines = [f"{ready.model} -> {where}"]
    width = max(len(item.name) for item in ready.items)
    lines += [f"  {item.name:<{width}}  {_size(item.size):>9}" for item in ready.items]
    lines.append(f"  {f'{len(ready.items)} files':<{width}}  {_size(sum(item.size for item in ready.items)):>9}")
    if ready.base is not None and not ready.base.beside:
        lines.append(f"base, on the Hub: {ready.base}")
    if ready.left:
        lines.append(f"not uploaded: {', '.join(ready.left)}")
    if card:
        lines += ["", ready.card.rstrip("\n")]
    _print(lines, console)


def print_pushed(pushed: Pushed, console: Console) -> None:
    """Print what an upload did."""
    if not pushed.sent and not pushed.removed:
        _print([f"nothing to do: all {len(pushed.unchanged)} files are at {pushed.url} already"], console)
        return
    lines = [f"committed {len(pushed.sent)} files, {len(pushed.unchanged)} were there already: {pushed.url}"]
    if pushed.removed:
        lines.append(f"removed, of the model that was there before: {', '.join(pushed.removed)}")
    _print(lines, console)


def _print(lines: list[str], console: Console) -> None:
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _size(number: int) -> str:
    """Write a size: 950 B, 12.3 kB, 4.97 GB."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= unit:
            return f"{number / unit:.3g} {name}" if number < 999.5 * unit else f"{number / unit:.0f} {name}"
    return f"{number} B"
