"""Records that could not be used: written down once, counted, and too many of them stop the run."""

from __future__ import annotations

import fcntl
import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from sparsevlm.data.sample import Encoded

Key = tuple[str, str]
"""Source and place of a record."""

CHECK_FROM = 20
"""Records that must have been read before the share of skipped ones is judged."""


class TooManySkippedError(ValueError):
    """More records than allowed could not be used."""


@dataclass(frozen=True)
class Skip:
    """A record that could not be used.

    Attributes:
        source: Name of the source in the recipe.
        id: The record's id within it.
        where: Its place: ``file.json:row 12``.
        reason: What is wrong with it.
    """

    source: str
    id: str
    where: str
    reason: str

    @property
    def key(self) -> Key:
        """What tells the record from all others (ids repeat in many collections, places do not)."""
        return self.source, self.where


class Row(list[Encoded]):
    """The samples of one row that could be read, with what became of all of them.

    It is the list of the samples, so that whoever only wants these takes it as one; it travels from a worker to the
    main process with the rest.

    Attributes:
        read: Records that were read for the row, skipped ones included.
        skipped: Those of them that could not be used.
    """

    def __init__(self, encoded: Iterable[Encoded] = (), read: Iterable[Key] = (), skipped: Iterable[Skip] = ()) -> None:
        super().__init__(encoded)
        self.read = list(read)
        self.skipped = list(skipped)

    def __reduce__(self) -> tuple[type[Row], tuple[list[Encoded], list[Key], list[Skip]]]:
        return Row, (list(self), self.read, self.skipped)


@dataclass
class _Count:
    read: set[Key] = field(default_factory=set)
    skipped: dict[Key, Skip] = field(default_factory=dict)


class SkipLog:
    """Counts the records read and skipped by this process and appends each skipped one to a file once.

    A record that is skipped again (in a later epoch, after a resume, by another process) is neither written nor counted
    a second time. Only main processes write, one line at a time under a lock, so that any number of ranks may share
    the file.

    Args:
        path: ``skipped.jsonl``; None counts only.
        max_share: Share of skipped records above which the run stops.
    """

    def __init__(self, path: Path | None, max_share: float) -> None:
        self.path = path
        self.max_share = max_share
        self._counts: dict[str, _Count] = {"plan": _Count(), "read": _Count()}
        self._known: set[Key] = set()  # in the file
        self._seen = 0  # bytes of the file

    @property
    def skipped(self) -> dict[Key, Skip]:
        """The records skipped so far, by this process and in this run."""
        return {key: skip for count in self._counts.values() for key, skip in count.skipped.items()}

    def note(self, read: Iterable[Key], skipped: Sequence[Skip], when: Literal["plan", "read"] = "read") -> None:
        """Count records, and write down those that were skipped.

        Args:
            read: All records that were looked at.
            skipped: Those that could not be used.
            when: ``plan`` while rows are planned (nothing but headers is read then), ``read`` while they are trained
                on. The share is judged for each by itself: files that nobody has opened yet say nothing.

        Raises:
            TooManySkippedError: Their share is above `max_share`.
        """
        count = self._counts[when]
        count.read.update(read)
        new = {skip.key: skip for skip in skipped if skip.key not in count.skipped}
        count.skipped |= new
        count.read.update(new)
        if new:
            self._write(new)
        self._check(count)

    def note_rows(self, rows: Iterable[Row]) -> None:
        """Count the records of rows that are about to be trained on; their samples are not needed.

        Raises:
            TooManySkippedError: As `note`.
        """
        for row in rows:
            self.note(row.read, row.skipped)

    def summary(self) -> str:
        """Return one line: how many records were skipped and why, the most frequent reasons first."""
        skipped = self.skipped
        if not skipped:
            return "no record skipped"
        reasons = Counter(skip.reason for skip in skipped.values()).most_common(3)
        listed = "; ".join(f"{number} x {reason}" for reason, number in reasons)
        return f"{len(skipped)} records skipped ({listed}{'; …' if len(reasons) < len(skipped) else ''})"

    def _check(self, count: _Count) -> None:
        skipped, read = len(count.skipped), len(count.read)
        if read < CHECK_FROM or skipped <= self.max_share * read:
            return
        first = "\n".join(f"  {s.where}: {s.reason}" for s in list(count.skipped.values())[:5])
        raise TooManySkippedError(
            f"{skipped} of the {read} records read so far could not be used ({skipped / read:.1%}), more than "
            f"batch.max_skipped_share {self.max_share:.1%}:\n{first}\n"
            + (f"All of them are in {self.path}. " if self.path else "")
            + "Repair the data, or raise batch.max_skipped_share."
        )

    def _write(self, skips: dict[Key, Skip]) -> None:
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        with os.fdopen(descriptor, "rb+", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # released when the file is closed
            file.seek(self._seen)
            *whole, torn = file.read().split(b"\n")  # what others have written since
            self._seen += sum(len(line) + 1 for line in whole)
            if torn:  # a writer was killed half-way; nobody else writes now
                file.truncate(self._seen)
            self._known.update((record["source"], record["where"]) for record in map(json.loads, whole))
            new = [
                json.dumps(asdict(skip), ensure_ascii=False) for key, skip in skips.items() if key not in self._known
            ]
            file.write("".join(f"{line}\n" for line in new).encode("utf-8", "replace"))
