"""Which files of a model directory are uploaded, and what is cut out of them on the way."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsevlm.adapters.saved import ADAPTER_CONFIG, ADAPTER_WEIGHTS, PARENT, find_parent, is_adapter
from sparsevlm.export.hub_scan import Secret, secrets_in, text_without_paths, without_paths
from sparsevlm.recipe.load import recipe_text
from sparsevlm.rundir import SUMMARY, complete_stages, resolve_model

CARD = "README.md"
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_CONFIGS = (
    "config.json",
    "generation_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "tokenizer_config.json",
)
_TOKENIZER = (
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "chat_template.json",
)
_RECORDS = ("recipe.yaml", "metrics.jsonl", "routing.json", SUMMARY, "report.html")
_LEGAL = ("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE")
_PLAIN = (*_CONFIGS, *_TOKENIZER, *_RECORDS, *_LEGAL)
_BINARY = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
_ADAPTER = (ADAPTER_CONFIG, ADAPTER_WEIGHTS, PARENT)
_TEMPLATES = "additional_chat_templates"
BASE = "base"
"""Folder of an upload that holds the model which the adapter beside it belongs to."""
_UNSAFE = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack")


@dataclass(frozen=True)
class Item:
    """One file of an upload.

    Attributes:
        name: Its path in the repository.
        content: The file, or its bytes where something was cut out or written anew.
        size: Bytes.
    """

    name: str
    content: Path | bytes
    size: int


@dataclass(frozen=True)
class Source:
    """A model or adapter directory and the run that it is part of.

    Attributes:
        model: The directory.
        run: The run directory, or None.
        recipe: The recipe without paths of this machine, or None.
        stages: Rows of `summary.json` up to this stage.
        record: `stage.json`; empty where there is none.
        config: `config.json` without paths of this machine; of an adapter, that of its base where that is here.
        adapter: `adapter_config.json` without paths of this machine; None for a whole model.
        base: The directory of the model that an adapter was trained on; None where only the adapter's own
            configuration names it, as those of other tools do.
    """

    model: Path
    run: Path | None
    recipe: dict[str, Any] | None
    stages: list[dict[str, Any]]
    record: dict[str, Any]
    config: dict[str, Any]
    adapter: dict[str, Any] | None = None
    base: Path | None = None


def read_source(path: str | Path) -> Source:
    """Open what the `push` command was given.

    Raises:
        ValueError: It is no run, model or adapter on this machine, or a file of it cannot be read; an adapter's base is
            not here or not the one that it was trained on.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    model = Path(resolve_model(path))
    if not model.is_dir():
        raise ValueError(f"{path}: is on the Hub already, or nowhere: no such directory here. Give a run or a model")
    adapter = base = None
    if is_adapter(model):
        if (model / "config.json").is_file():
            raise ValueError(f"{model}: holds a model (config.json) and an adapter ({ADAPTER_CONFIG}); keep them apart")
        adapter = without_paths(_json(model / ADAPTER_CONFIG), parts=2)
        base = find_parent(model) if (model / PARENT).is_file() else None
    elif not (model / "config.json").is_file():
        raise ValueError(f"{model}: has neither config.json nor {ADAPTER_CONFIG}; give a run, a model or an adapter")
    described = base if adapter is not None else model
    recipe = None
    if (model / "recipe.yaml").is_file():
        try:
            recipe = YAML(typ="safe", pure=True).load((model / "recipe.yaml").read_text(encoding="utf-8"))
        except YAMLError as error:
            raise ValueError(f"{model / 'recipe.yaml'}: not YAML ({str(error).splitlines()[0]})") from None
        if not isinstance(recipe, dict):
            raise ValueError(f"{model / 'recipe.yaml'}: not a recipe: expected a mapping of options")
    record = _json(model / "stage.json") if (model / "stage.json").is_file() else {}
    run = model.resolve().parent if record and (model.resolve().parent / SUMMARY).is_file() else None
    return Source(
        model,
        run,
        without_paths(recipe),
        _stages_until(run, model.name if run is None else model.resolve().name, record),
        without_paths(record),
        without_paths(_json(described / "config.json"), parts=2) if described is not None else {},
        adapter,
        base,
    )


def _stages_until(run: Path | None, name: str, record: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of the stages that lead to this one."""
    rows = _json(run / SUMMARY).get("stages", []) if run is not None else []
    names = [row.get("name") for row in rows]
    if name in names:
        return rows[: names.index(name) + 1]
    return [record["summary"]] if "summary" in record else []


def _json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file}: expected a JSON object, got {type(value).__name__}")
    return value


def collect(source: Source, written: Mapping[str, bytes] | None = None) -> tuple[list[Item], list[str]]:
    """Return the files to upload in order of name, and the names of what stays here.

    Only names on a list are taken: weights in safetensors, configuration, tokenizer, the records of the training.

    Args:
        source: The model or adapter.
        written: Files of an adapter that are written anew (`hub_adapter.adapter_files`).

    Raises:
        ValueError: Weights are missing or not safetensors, or a file holds something secret.
    """
    folder, written = source.model, written or {}
    here = {file.name: file for file in sorted(folder.iterdir()) if file.is_file()}
    weights = _weights(folder, here) if source.adapter is None else _adapter_weights(folder, here)
    chosen = {name: here[name] for name in (*weights, *_PLAIN) if name in here}
    templates = folder / _TEMPLATES
    chosen |= {f"{templates.name}/{file.name}": file for file in sorted(templates.glob("*.jinja"))}
    left = [name for name in here if name not in chosen and name not in written]
    left += [f"{child.name}/" for child in sorted(folder.iterdir()) if child.is_dir() and child != templates]
    chosen |= _of_run(source)
    found = [secret for name, file in chosen.items() for secret in _secrets(name, file)]
    found += [secret for name, data in written.items() for secret in secrets_in(data.decode().splitlines(), name)]
    refuse_secrets(found)
    places = [Path.home(), Path.cwd(), folder.resolve(), *([source.run] if source.run else [])]
    items = [Item(name, data, len(data)) for name, data in written.items()]
    items += [_item(name, file, _content(name, file, source, places)) for name, file in sorted(chosen.items())]
    return sorted(items, key=lambda item: item.name), left


def base_items(source: Source) -> list[Item]:
    """Return the files of an adapter's base, in the folder `BASE`: what loads it, without records.

    Raises:
        ValueError: Weights are missing, or a file holds something secret.
    """
    folder = source.base
    assert folder is not None
    here = {file.name: file for file in sorted(folder.iterdir()) if file.is_file()}
    chosen = {name: here[name] for name in (*_weights(folder, here), *_CONFIGS, *_TOKENIZER, *_LEGAL) if name in here}
    chosen |= {f"{_TEMPLATES}/{file.name}": file for file in sorted((folder / _TEMPLATES).glob("*.jinja"))}
    refuse_secrets([secret for name, file in chosen.items() for secret in _secrets(f"{BASE}/{name}", file)])
    places = [Path.home(), Path.cwd(), folder.resolve()]
    return [_item(f"{BASE}/{name}", file, _content(name, file, source, places)) for name, file in chosen.items()]


def weight_files(folder: Path) -> dict[str, Path]:
    """Return the files that hold a model's weights, by name.

    Raises:
        ValueError: They are not all there.
    """
    names = _weights(folder, {file.name: file for file in folder.iterdir() if file.is_file()})
    return {name: folder / name for name in names if name != _INDEX}


def refuse_secrets(found: list[Secret]) -> None:
    """Refuse an upload that holds what looks like a secret.

    Raises:
        ValueError: It does.
    """
    if found:
        where = "\n".join(f"  {secret}" for secret in found)
        raise ValueError(f"nothing was sent: these files hold what looks like a secret\n{where}\nremove it there first")


def _item(name: str, file: Path, content: Path | bytes) -> Item:
    return Item(name, content, file.stat().st_size if isinstance(content, Path) else len(content))


def stale(present: Iterable[str], items: Iterable[Item]) -> list[str]:
    """Return the files of a repository that belong to another model and would be read together with this one.

    An old `model.safetensors` beside new shards would be loaded in their place; files of another's tokenizer or image
    processor would take part.
    """
    kept = {item.name for item in items}
    return sorted(name for name in present if name not in kept and _decides(name))


def _decides(name: str) -> bool:
    """Tell whether a file of that name takes part in what is loaded, or tells how it was made."""
    name = name.removeprefix(f"{BASE}/")
    known = name in (_SINGLE, _INDEX, *_ADAPTER, *_CONFIGS, *_TOKENIZER, *_RECORDS)
    return known or bool(_SHARD.fullmatch(name)) or name.startswith(f"{_TEMPLATES}/")


def _adapter_weights(folder: Path, here: Mapping[str, Path]) -> list[str]:
    """Return the name of an adapter's weight file."""
    if ADAPTER_WEIGHTS in here:
        return [ADAPTER_WEIGHTS]
    others = [name for name in here if name.startswith("adapter_model")]
    told = f" (found {', '.join(others)}: load it with PEFT and save it again)" if others else ""
    raise ValueError(f"{folder}: holds {ADAPTER_CONFIG} but no {ADAPTER_WEIGHTS}{told}")


def _weights(folder: Path, here: Mapping[str, Path]) -> list[str]:
    """Return the names of the weight files."""
    if _INDEX in here and _SINGLE in here:
        raise ValueError(f"{folder}: holds both {_SINGLE} and {_INDEX}; remove the one that is not this model's")
    if _SINGLE in here:
        return [_SINGLE]
    if _INDEX in here:
        shards = sorted(set(_json(here[_INDEX]).get("weight_map", {}).values()))
        missing = [name for name in shards if name not in here]
        if missing or not shards:
            what = ", ".join(missing) or "any weights"
            raise ValueError(f"{folder}: {_INDEX} names files that are not there ({what}); the model is not whole")
        strange = [name for name in shards if not _SHARD.fullmatch(name)]
        if strange:
            raise ValueError(f"{here[_INDEX]}: names weight files of an unknown form: {', '.join(strange)}")
        return [_INDEX, *shards]
    unsafe = [name for name in here if name.endswith(_UNSAFE)]
    told = f" (found {', '.join(unsafe)}: save the model as safetensors first)" if unsafe else ""
    raise ValueError(f"{folder}: no weights in safetensors{told}")


def _of_run(source: Source) -> dict[str, Path]:
    """Return the files of the run that tell of this model: the report only where it is the run's last stage."""
    if source.run is None:
        return {}
    found = {SUMMARY: source.run / SUMMARY}
    report = source.run / "report.html"
    if report.is_file() and complete_stages(source.run)[-1].name == source.model.resolve().name:
        found[report.name] = report
    return found


def _content(name: str, file: Path, source: Source, places: list[Path]) -> Path | bytes:
    """Return what is uploaded of a file: itself, or its text without paths of this machine."""
    if name == SUMMARY:
        return _dumped(without_paths({"stages": source.stages})).encode()
    if name == "recipe.yaml":
        return text_without_paths(recipe_text(source.recipe or {}), places).encode()
    if name in _CONFIGS:
        text = _dumped(without_paths(_json(file), parts=2))
    elif name in ("metrics.jsonl", "routing.json", "report.html"):
        text = file.read_text(encoding="utf-8")
    else:
        return file
    return text_without_paths(text, places).encode()


def _dumped(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _secrets(name: str, file: Path) -> Iterator[Secret]:
    """Look for secrets in a file; of weights only the header is text."""
    if name.endswith(".safetensors"):
        yield from secrets_in([json.dumps(safetensors_header(file).get("__metadata__", {}))], name)
    elif name not in _BINARY:
        with file.open(encoding="utf-8", errors="replace") as lines:
            yield from secrets_in(lines, name)


def safetensors_header(file: Path) -> dict[str, Any]:
    """Read the header of a weight file: tensor -> dtype, shape, place.

    Raises:
        ValueError: It is no safetensors file.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(f"{file}: not a whole safetensors file; save the model again")
        try:
            header = json.loads(stream.read(length))
        except ValueError:
            raise ValueError(f"{file}: not a safetensors file (its header is not JSON)") from None
    end = max((cell["data_offsets"][1] for key, cell in header.items() if key != "__metadata__"), default=0)
    if 8 + length + end != size:
        raise ValueError(f"{file}: holds {size} bytes, its header tells of {8 + length + end}; it is cut off")
    return header
