"""Features of a frozen tower, kept on disk: what was encoded once is read the next time, without decoding anything.

An entry is found by what its medium holds and how it is brought to the tower (`data.digest`, `picture_rules`), in a
folder named by the tower: its weights, its configuration, what is taken from it, the arithmetic and the versions of the
libraries that decode and compute. Whatever changes among these has another name, so that nothing stale can be found.

Shards are safetensors files with a checksum for each entry, written beside their place and moved there whole: several
processes may fill one folder, and one that is killed loses what it had not written yet, nothing else. A shard that
cannot be read is left alone with a warning, and its entries are computed again.

Legend: n tokens of a medium, D tower width.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import uuid
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from sparsevlm.data.kept import SUFFIX, Entry, Kept, open_file, raw_bytes, read_header, read_tensor, tower_number

if TYPE_CHECKING:
    from sparsevlm.vision.preprocess import ImageSpec

_PACKAGES = ("sparsevlm", "torch", "transformers", "timm", "pillow", "av")
"""Whose versions may change what a medium's features are."""
_LEAST, _MOST = 1 << 20, 64 << 20
"""Bytes of a shard: a quarter of what is there, so that the first epochs see them soon and shards stay few."""
_HEADER = 256
"""Bytes that an entry takes beside its numbers, at most."""
_LEFT = 3600.0
"""Seconds after which an unfinished file is one that nobody writes any more."""

Take = Callable[[Tensor], None]
_TAKE: ContextVar[Take | None] = ContextVar("sparsevlm_take_features", default=None)


class FeatureStore:
    """Features of one tower.

    Workers of a loader read, the process that trains also writes.

    Args:
        directory: Where folders of towers lie; made when there is something to write.
        tower: Identity of the tower, from `tower_identity`.
        arithmetic: What else decides on the numbers, for example their type.
        max_bytes: Once all folders of the directory hold so much, nothing is added.

    Attributes:
        number: Of the tower, as batches say it.
        num_bytes: Of the entries on disk.
    """

    def __init__(self, directory: str | Path, tower: str, arithmetic: str = "", max_bytes: int = 100 << 30) -> None:
        said = repr((tower, arithmetic, [(name, _version(name)) for name in _PACKAGES]))
        self.directory = Path(directory)
        self.folder = self.directory / hashlib.blake2b(said.encode(), digest_size=12).hexdigest()
        self.number = tower_number(tower)
        self.max_bytes = max_bytes
        self.full = False
        self._places: dict[str, tuple[Path, Entry, int]] = {}
        self._shards: set[Path] = set()
        self._state = 0
        self._waiting: dict[str, Tensor] = {}
        self.num_bytes, self._waiting_bytes = 0, 0
        self._look()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_waiting": {}, "_waiting_bytes": 0}

    def __len__(self) -> int:
        """Entries, written or waiting."""
        return len(self._places) + len(self._waiting)

    def get(self, key: str) -> Kept | None:
        """Return an entry, None where there is none (yet)."""
        if key not in self._places:
            self._look()  # others may have written it since
        if key not in self._places:
            return None
        path, entry, checksum = self._places[key]
        try:
            with open_file(path) as file:
                features = read_tensor(file, entry)
            if zlib.crc32(raw_bytes(features)) != checksum:
                raise ValueError("its numbers are not those that were written")
        except (OSError, ValueError) as error:
            self._leave(path, error)
            return None
        return Kept(features, self.number)

    def put(self, key: str, features: Tensor) -> None:
        """Keep an entry ``(n, D)``; it reaches the disk, and other processes, with its shard."""
        if self.full or key in self._places or key in self._waiting:
            return
        self._waiting[key] = kept = features.detach().to("cpu", copy=True).contiguous()
        self._waiting_bytes += kept.numel() * kept.element_size()
        if self._waiting_bytes >= max(_LEAST, min(_MOST, self.num_bytes // 4)):
            self.flush()

    def flush(self) -> None:
        """Write what waits as one shard."""
        waiting, size = self._waiting, self._waiting_bytes
        self._waiting, self._waiting_bytes = {}, 0
        self._look()
        waiting = {key: value for key, value in waiting.items() if key not in self._places}
        if not waiting or self.full:
            return
        there = sum(path.stat().st_size for path in self.directory.glob(f"*/*{SUFFIX}"))
        if there + size + _HEADER * (len(waiting) + 1) > self.max_bytes:
            self.full = True
            warnings.warn(
                f"the feature cache {self.directory} is full ({there / 2**30:.1f} GiB); nothing is added any more. "
                "Raise feature_cache.max_gb, or delete folders of towers that are not used",
                stacklevel=2,
            )
            return
        self._write(waiting)

    def _write(self, waiting: dict[str, Tensor]) -> None:
        from safetensors.torch import save

        self.folder.mkdir(parents=True, exist_ok=True)
        for old in self.folder.glob("*.part"):
            if time.time() - old.stat().st_mtime > _LEFT:
                old.unlink(missing_ok=True)
        path = self.folder / f"{uuid.uuid4().hex}{SUFFIX}"
        part = path.with_suffix(".part")
        checksums = {key: zlib.crc32(raw_bytes(value)) for key, value in waiting.items()}
        with part.open("wb") as file:  # by the user's umask, where safetensors' own files are readable to one user
            file.write(save(waiting, metadata={"crc32": json.dumps(checksums)}))
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        self._add(path)

    def _look(self) -> None:
        """Find the shards that were written since, here or by others."""
        try:
            state = self.folder.stat().st_mtime_ns
        except FileNotFoundError:
            return
        if state != self._state:
            self._state = state
            for path in sorted(self.folder.glob(f"*{SUFFIX}")):
                if path not in self._shards:
                    self._add(path)

    def _add(self, path: Path) -> None:
        self._shards.add(path)
        try:
            entries, metadata = read_header(path)
            checksums = json.loads(metadata["crc32"])
            found = {key: (path, entry, checksums[key]) for key, entry in entries.items()}
        except (OSError, ValueError, KeyError) as error:
            self._leave(path, error)
            return
        for key, place in found.items():
            if self._places.setdefault(key, place) is place:
                self.num_bytes += place[1].end - place[1].begin

    def _leave(self, path: Path, error: Exception) -> None:
        """Forget a shard that cannot be read."""
        self._places = {key: place for key, place in self._places.items() if place[0] != path}
        self.num_bytes = sum(entry.end - entry.begin for _, entry, _ in self._places.values())
        warnings.warn(
            f"{path} cannot be read ({error}); its features are computed again. Delete the file", stacklevel=3
        )


def tower_identity(tower: nn.Module, **reading: Any) -> str:
    """Return the name of a tower: its configuration, every weight and buffer, and what is read of it.

    Values count, not the type that they are held in: a bfloat16 tower is the same when it is loaded in float32.

    Args:
        tower: The tower.
        **reading: What is taken: layers, selection.

    Raises:
        ValueError: The weights are sharded.
    """
    config: Any = getattr(tower, "config", None)
    said = {} if config is None else _lasting(config.to_dict())
    known = json.dumps([said, sorted(reading.items())], sort_keys=True, default=str)
    digest = hashlib.blake2b(known.encode(), digest_size=20)
    for name, tensor in sorted([*tower.named_parameters(), *tower.named_buffers()]):
        if hasattr(tensor, "ds_id"):
            raise ValueError(
                "features that were kept cannot be used with ZeRO-3, which shards the tower's weights, so that they "
                "cannot be compared with those that gave the features; use 'sharding: {zero: 2}' or less"
            )
        value = tensor.detach().to("cpu")
        value = value.float() if value.is_floating_point() else value
        digest.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        digest.update(raw_bytes(value.contiguous()))
    return digest.hexdigest()


_VOLATILE = {"dtype", "torch_dtype", "architectures", "transformers_version", "attn_implementation"}
"""Of a configuration: what does not change features, or only their rounding."""


def _lasting(value: Any) -> Any:
    """Return a configuration without what does not change features, those of its parts included."""
    if isinstance(value, dict):
        return {k: _lasting(v) for k, v in value.items() if k not in _VOLATILE and not str(k).startswith("_")}
    return [_lasting(each) for each in value] if isinstance(value, (list, tuple)) else value


def weights_state(tower: nn.Module) -> tuple[Any, ...]:
    """Return what changes whenever a tower's weights may have."""
    return tuple((id(t), t.data_ptr(), t._version, t.dtype) for t in [*tower.parameters(), *tower.buffers()])


def picture_rules(spec: ImageSpec, *, video: bool) -> str:
    """Return everything that decides on what the tower sees of a medium, as text; tilings leave videos alone."""
    plain = spec.to_dict()
    if video:
        plain.pop("tiling", None)
    return json.dumps(plain, sort_keys=True)


@contextmanager
def taking_features(take: Take | None) -> Iterator[None]:
    """Hand what a tower gives inside for all media of a batch together, ``(N, D)``, to a function."""
    token = _TAKE.set(take)
    try:
        yield
    finally:
        _TAKE.reset(token)


def take_features(features: Tensor) -> None:
    """Hand over what the tower gave, where somebody wants it."""
    take = _TAKE.get()
    if take is not None:
        take(features)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
