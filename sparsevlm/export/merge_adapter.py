"""The adapter that `sparsevlm merge` is given, and the directory of its base; refuses what has no merged form."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsevlm.adapters.saved import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    PARENT,
    find_parent,
    is_adapter,
    parent_name,
    read_parent,
)
from sparsevlm.rundir import COMPLETE, complete_stages, resolve_model

_LORA = "LORA"

_NO_MERGED_FORM = {
    "MMA": "its router weighs two paths by what each token or sample is, so that no single weight computes the same",
    "PARTIAL": "only image tokens pass it, and merged weights would change the text tokens too",
    "SLICE": "each slice of a picture passes a set of its own, and a weight can hold one of them only",
    "EXPERT": "a router chooses its experts token by token, so that no single weight computes the same",
    "MOE": "a router chooses its experts token by token, so that no single weight computes the same",
    "PROMPT": "it adds virtual tokens to the input and changes no weight",
    "PREFIX": "it adds keys and values to the attention and changes no weight",
    "P_TUNING": "it adds virtual tokens to the input and changes no weight",
    "XLORA": "it weighs its adapters by the input, so that no single weight computes the same",
}
"""Part of PEFT's name of a method -> why it cannot be merged."""

_REFUSED_OPTIONS = {
    "alora_invocation_tokens": "it is active after its invocation tokens only, so that no single weight does the same",
    "arrow_config": "it routes each token to some of its adapters, so that no single weight does the same",
    "layer_replication": "it makes a model of more layers than the base has",
    "use_qalora": "it pools its inputs for quantised weights",
    "use_bdlora": "its factors are block-diagonal shards",
    "kasa_config": "it truncates the base's weights when it is attached",
    "monteclora_config": "its weights are sampled",
    "megatron_config": "its layers are Megatron's",
}
"""Option of a LoRA adapter -> why its weights are not W + scaling * B A."""

_CHANGES_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")
"""Values of `init_lora_weights` that subtract the start from the base's weights, anew at each loading."""

_FETCHED = ["adapter_*", "*.json", "*.jinja", "*.model", "*.txt"]


@dataclass(frozen=True)
class AdapterFolder:
    """An adapter that may be merged.

    Attributes:
        name: What the user called it.
        directory: Where it is.
        config: Its ``adapter_config.json``.
    """

    name: str
    directory: Path
    config: dict[str, Any]


def open_adapter(name: str) -> AdapterFolder:
    """Find an adapter and check that it has a merged form.

    Args:
        name: Directory, or Hub id.

    Raises:
        ValueError: It is no adapter, not complete, or has no merged form.
    """
    directory = _find(name)
    if (directory / "stage.json").is_file() and not (directory / COMPLETE).is_file():
        raise ValueError(f"{name}: this stage is not complete; run its training again to continue it")
    try:
        config = json.loads((directory / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{directory / ADAPTER_CONFIG} is not JSON ({error}); fetch the adapter again") from None
    if not isinstance(config, dict):
        raise ValueError(f"{directory / ADAPTER_CONFIG} is not an object with an adapter's options; fetch it again")
    _refuse_method(name, str(config.get("peft_type", "")))
    _refuse_options(name, config)
    if not (directory / ADAPTER_WEIGHTS).is_file():
        others = ", ".join(file.name for file in sorted(directory.glob("adapter_model*"))) or "no weights at all"
        raise ValueError(
            f"{directory} holds no {ADAPTER_WEIGHTS} but {others}; load the adapter with PEFT and save it again with "
            "save_pretrained"
        )
    return AdapterFolder(name, directory, config)


def find_base(adapter: AdapterFolder, base: str | None) -> tuple[str, Path, str]:
    """Return the base's name, its directory, and how it is known to be the right one.

    Args:
        adapter: The adapter.
        base: The user's ``--base``; default: what the adapter names.

    Raises:
        ValueError: It is not there, is no whole model, or not the one that the adapter was trained on.
    """
    directory = adapter.directory
    if (directory / PARENT).is_file():
        record = read_parent(directory)
        if base is not None and _is_quantised(directory / str(record.get("relative"))):
            return (
                base,
                _whole(base),
                f"not verified: the adapter was trained on a quantised copy ({parent_name(record)})",
            )
        found = find_parent(directory, None if base is None else _whole(base)).resolve()
        return base or str(found), found, "the weights that the adapter was trained on (hash)"
    named = base or adapter.config.get("base_model_name_or_path")
    if not named:
        raise ValueError(f"{adapter.name} does not say what it was trained on; name that model with --base")
    try:
        found = _whole(named)
    except ValueError as error:
        if base is not None:
            raise
        raise ValueError(
            f"{adapter.name} was trained on {named!r}, which is not there; name the directory that holds it now with "
            f"--base ({error})"
        ) from error
    return named, found, f"not verified: the adapter has no {PARENT}; names and shapes fit"


def find_common_base(adapters: Sequence[AdapterFolder], base: str | None) -> tuple[str, Path, str]:
    """Return what `find_base` does, for several adapters that have to be of one model.

    Raises:
        ValueError: See `find_base`, or they were trained on different models.
    """
    first = adapters[0]
    records = {a.name: read_parent(a.directory) for a in adapters if (a.directory / PARENT).is_file()}
    for name, record in records.items():
        other, expected = next(iter(records.items()))
        if record["sha256"] != expected["sha256"]:
            raise _different(other, _place(expected), name, _place(record))
    found = [find_base(adapter, base) for adapter in adapters]
    for adapter, (name, directory, _) in zip(adapters, found, strict=True):
        same_weights = {first.name, adapter.name} <= records.keys()  # of a model that may be there twice
        if not same_weights and directory.resolve() != found[0][1].resolve():
            raise _different(first.name, found[0][0], adapter.name, name)
    name, directory, _ = found[0]
    unsure = [identity for *_, identity in found if identity.startswith("not verified")]
    return name, directory, unsure[0] if unsure else found[0][2]


def _place(record: dict[str, Any]) -> str:
    """Return where an adapter says its parent is; an uploaded one says less."""
    hub = record.get("hub") or {}
    return str(record.get("path") or hub.get("repo") or record.get("relative"))


def _different(first: str, its_base: str, second: str, other_base: str) -> ValueError:
    return ValueError(
        f"{first} was trained on {its_base}, but {second} on {other_base}: changes of different models cannot be "
        "combined. Pass adapters of one model, or merge them one by one"
    )


def _find(name: str) -> Path:
    """Return an adapter's directory, fetched if need be, or tell what to pass instead."""
    folder = Path(name)
    if folder.is_file():
        raise ValueError(f"{name} is a file; pass the directory that holds it: {folder.parent}")
    if not folder.exists():
        if name.count("/") == 1 and not name.startswith((".", "/", "~")) and not folder.parent.is_dir():
            return _download(name)
        raise ValueError(f"{name}: no such directory (and no Hub id of the form owner/name)")
    if is_adapter(folder):
        return folder
    if (folder / "config.json").is_file():
        run = folder.resolve().parent if (folder / "stage.json").is_file() else None
        others = [str(stage) for stage in complete_stages(run) if is_adapter(stage)] if run else []
        near = f" (its run has {', '.join(others)})" if others else ""
        raise ValueError(
            f"{name} is a whole model, not an adapter: there is nothing to merge into it. Pass the directory with "
            f"{ADAPTER_CONFIG}{near}, and this one as --base if it is what the adapter was trained on"
        )
    stages = [stage for stage in complete_stages(folder) if is_adapter(stage)]
    nested = stages[::-1] or sorted(file.parent for file in folder.glob(f"*/{ADAPTER_CONFIG}"))
    if nested:
        what = "a run" if stages else "a folder of adapters"
        raise ValueError(f"{name} is {what}; pass one of its adapters: {', '.join(map(str, nested))}")
    whole = complete_stages(folder)
    if whole:
        raise ValueError(
            f"{name} is a run whose complete stages ({', '.join(stage.name for stage in whole)}) are all whole models: "
            "there is nothing to merge. A stage with `adapter` leaves an adapter"
        )
    found = ", ".join(sorted(child.name for child in folder.iterdir())[:6]) or "nothing"
    raise ValueError(f"{name} holds no {ADAPTER_CONFIG} (found: {found}); pass the directory that an adapter is in")


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        directory = Path(snapshot_download(name, allow_patterns=_FETCHED))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise ValueError(f"{name}: no such directory, and not fetched from the Hub: {error}") from error
    if not is_adapter(directory):
        raise ValueError(f"{name} on the Hub holds no {ADAPTER_CONFIG}: it is no adapter; pass one")
    return directory


def _refuse_method(name: str, method: str) -> None:
    """Refuse every method but LoRA, with its reason."""
    if method == _LORA:
        return
    reason = next((why for part, why in _NO_MERGED_FORM.items() if part in method.upper()), None)
    if reason is not None:
        raise ValueError(
            f"{name} is a {method} adapter, which has no merged form: {reason}. Keep it as an adapter beside its base: "
            "load it with sparsevlm or PeftModel.from_pretrained, upload it with its base by sparsevlm push (or, where "
            "the base is on the Hub, by sparsevlm push --adapter-only)"
        )
    raise ValueError(
        f"{name} is a {method or 'nameless'} adapter; only LoRA and its variants are merged on disk. If PEFT can merge "
        "this method: PeftModel.from_pretrained(model, ADAPTER).merge_and_unload()"
    )


def _refuse_options(name: str, config: dict[str, Any]) -> None:
    """Refuse a LoRA adapter whose merged weights are not those of LoRA, rsLoRA or DoRA."""
    for option, reason in _REFUSED_OPTIONS.items():
        if config.get(option):
            raise ValueError(f"{name} sets {option}: {reason}. Keep it as an adapter beside its base")
    start = str(config.get("init_lora_weights", "")).lower()
    if start.startswith(_CHANGES_BASE):
        raise ValueError(
            f"{name} has init_lora_weights {start!r}: PEFT changes the base's weights whenever it loads this adapter. "
            "Save it as a plain one: PeftModel.save_pretrained(…, path_initial_model_for_weight_conversion=…)"
        )
    from peft import LoraConfig

    known = {field.name for field in dataclasses.fields(LoraConfig)}
    strange = sorted(key for key, value in config.items() if key not in known and value)
    if strange:
        raise ValueError(
            f"{name}: its {ADAPTER_CONFIG} sets {', '.join(strange)}, which the installed PEFT does not know, so that "
            "it may mean other weights. Update PEFT (pip install -U peft)"
        )


def _whole(name: str) -> Path:
    """Return the directory of a whole model."""
    if is_adapter(name):
        raise ValueError(
            f"{name} is an adapter itself, not a base; merge that one first, and pass the result as --base"
        )
    if Path(name).is_dir():
        return Path(resolve_model(name))
    from sparsevlm.export.source import fetch  # the parts that the package ships, and the Hub

    return fetch(name)


def _is_quantised(directory: Path) -> bool:
    file = directory / "config.json"
    return file.is_file() and bool(json.loads(file.read_text(encoding="utf-8")).get("quantization_config"))
