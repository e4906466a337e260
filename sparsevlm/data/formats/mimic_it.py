"""`mimic_it`: MIMIC-IT's instructions, each with related ones before it as examples in context (Otter)."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from sparsevlm.data.columns import check_text
from sparsevlm.data.formats import DataFormat, RowContext
from sparsevlm.data.rows import Rows, shown
from sparsevlm.data.sample import BadSampleError, Media, Message, Sample
from sparsevlm.data.sources import open_rows
from sparsevlm.recipe.schema import Source
from sparsevlm.registry import DATA_FORMATS
from sparsevlm.vision.tokens import MediaKind

GROUPS = ("image_text", "in_context", "video_text")


@DATA_FORMATS.register("mimic_it")
class MimicItFormat(DataFormat):
    """``{"data": {ID: {"instruction", "answer", "image_ids", "rel_ins_ids"}}}``, the files of MIMIC-IT (Li et al.,
    arXiv:2306.05425).

    A row is an instruction and, before it, those that it is related to: turns of one conversation. Pictures are found
    by their ids: in a file of base64 texts, or as files named by them. The instructions of a file are held in memory.

    Options:
        images: Files of the pictures below the folder of the run: parquet with the column ``base64`` and one of ids,
            or a JSON object of them; default: files ``ID`` + ``extension`` below the media root.
        extension: Of the pictures' files.
        group: How MIMIC-IT's training groups a data set: ``image_text`` (all turns are about the first one's
            pictures), ``in_context`` (every turn has its own) or ``video_text`` (the pictures of the first turn are the
            frames of a video).
        related: JSON file ``{ID: [related IDs]}``; default: each instruction's ``rel_ins_ids``.
        max_related: At most so many related instructions, the first ones; default: all.
    """

    defaults: ClassVar[dict[str, Any]] = {
        "images": None,
        "extension": ".jpg",
        "group": "image_text",
        "related": None,
        "max_related": None,
    }

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        most = self.options["max_related"]
        if self.options["group"] not in GROUPS:
            raise ValueError(f"mimic_it: group is one of {', '.join(GROUPS)}, got {self.options['group']!r}")
        if most is not None and (isinstance(most, bool) or not isinstance(most, int) or most < 0):
            raise ValueError(f"mimic_it: max_related is a number from 0 on, got {most!r}")

    def rows(self, source: Source, base_dir: Path | None = None) -> MimicItRows:
        """Read the instructions; pictures are read with their row.

        Raises:
            ValueError: A file is not there, or holds something else.
        """
        base = base_dir or Path()
        if not isinstance(source.path, str):
            raise ValueError("mimic_it: a source is one file of instructions; name a source for each")
        data = _read_object(base / source.path).get("data")
        if not isinstance(data, dict):
            raise ValueError(f"{source.path}: no object 'data' of instructions; is it an X_instructions.json?")
        related = self.options["related"]
        pictures = self.options["images"]
        return MimicItRows(
            base / source.path,
            data,
            {} if related is None else _read_object(base / related),
            self.options["max_related"],
            None if pictures is None else Pictures(pictures, base),
        )

    def sample(self, row: Any, context: RowContext) -> Sample:
        """Return related instructions and the row's own as turns."""
        group, messages = self.options["group"], []
        turns = row.get("turns") if isinstance(row, dict) else None
        if not isinstance(turns, list) or not turns:
            raise BadSampleError(f"malformed row: {shown(row)} has no turns")
        for turn, record in enumerate(turns):
            if not isinstance(record, dict) or not isinstance(record.get("pictures"), list):
                raise BadSampleError(f"malformed row: turn {turn} is {shown(record)}")
            media: list[Media] = []
            if turn == 0 or group == "in_context":
                for value in record["pictures"]:
                    value = value + self.options["extension"] if isinstance(value, str) else value
                    media.append(context.media(MediaKind.IMAGE, value))
                if media and group == "video_text":
                    media = [Media(MediaKind.VIDEO, tuple(frame.source for frame in media))]
            words = [check_text(record.get(name), name).strip() for name in ("instruction", "answer")]
            if not words[1]:
                raise BadSampleError("'answer' is empty")
            messages += [Message("user", (*media, words[0])), Message("assistant", (words[1],))]
        return context.make(messages)


class MimicItRows(Rows):
    """Instructions with those that they are related to.

    Args:
        file: Where they were read.
        data: ID -> instruction.
        related: ID -> IDs, before what an instruction says itself.
        most: Related instructions of one, at most.
        pictures: Pictures by ID; None: they are files.
    """

    def __init__(
        self, file: Path, data: dict[str, Any], related: dict[str, Any], most: int | None, pictures: Pictures | None
    ) -> None:
        self.file, self.data, self.related, self.most, self.pictures = file, data, related, most, pictures
        self.ids = list(data)

    def __len__(self) -> int:
        """Number of instructions."""
        return len(self.ids)

    def __getitem__(self, index: Any) -> dict[str, Any]:
        """Return an instruction's turns; each has its ``pictures``: bytes, or the IDs that files are named by."""
        own = self.ids[int(index)]
        record = self._record(own)
        before = self.related.get(own, [] if self.related else record.get("rel_ins_ids", []))
        if not isinstance(before, list):
            raise BadSampleError(f"related instructions are {shown(before)}, not a list")
        turns = [self._record(other) for other in before[: self.most]] + [record]
        return {"id": own, "turns": [record | {"pictures": self._pictures(record)} for record in turns]}

    def _record(self, name: Any) -> dict[str, Any]:
        record = self.data.get(name) if isinstance(name, str) else None
        if not isinstance(record, dict):
            raise BadSampleError(f"no instruction {shown(name)}")
        return record

    def _pictures(self, record: dict[str, Any]) -> list[bytes | str]:
        names = record.get("image_ids", [])
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise BadSampleError(f"'image_ids' is {shown(names)}, not a list of names")
        return [name if self.pictures is None else self.pictures.read(name) for name in names]

    def where(self, index: int) -> str:
        """Return ``file:ID``."""
        return f"{self.file.name}:{self.ids[index]}"

    def folder(self, index: int) -> Path | None:
        """Return the folder of the file."""
        return self.file.parent


class Pictures:
    """Encoded pictures by ID, in files of base64 texts.

    Args:
        path: File or pattern, or several.
        base: Folder that they start from.

    Raises:
        ValueError: They are not there, or have no column ``base64`` beside one of ids.
    """

    def __init__(self, path: str | list[str], base: Path) -> None:
        from sparsevlm.data.hub import TableRows

        self._texts: dict[str, Any] = {}
        self._places: dict[str, tuple[Any, int]] = {}
        files = [path] if isinstance(path, str) else path
        for file in files:
            if Path(file).suffix == ".json":
                self._texts |= _read_object(base / file)
                continue
            rows = open_rows(Source(path=file, format="mimic_it"), base)
            parts: Sequence[Any] = getattr(rows, "parts", [rows])
            for part in parts:
                names = part.columns if isinstance(part, TableRows) else []
                ids = [name for name in names if name != "base64"]
                if "base64" not in names or len(ids) != 1:
                    raise ValueError(f"{file}: expected a column 'base64' and one of ids, got {names}")
                self._places |= {name: (part, place) for place, name in enumerate(part.column(ids[0]))}

    def read(self, name: str) -> bytes:
        """Return a picture as it is encoded.

        Raises:
            BadSampleError: There is none of that name, or its text is no base64.
        """
        text = self._texts.get(name)
        if name in self._places:
            part, place = self._places[name]
            text = part[place]["base64"]
        if not isinstance(text, str):
            raise BadSampleError(f"no picture {name!r}")
        try:
            return base64.urlsafe_b64decode(text)
        except (binascii.Error, ValueError):
            raise BadSampleError(f"picture {name!r} is no base64") from None


def _read_object(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {file}: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file} is no JSON object")
    return value
