"""The model card: what a model is, where it comes from, how it was trained and how well it does, in one README.md."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsevlm import __version__
from sparsevlm.export.card_adapter import adapter_summary, adapter_usage, is_ours, is_pefts_own, method_of
from sparsevlm.export.hub_files import Source, safetensors_header
from sparsevlm.export.hub_scan import text_without_paths
from sparsevlm.recipe.load import recipe_text

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

    from sparsevlm.export.hub_adapter import Base

TEMPLATE = "card.md.jinja"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FILE = re.compile(r"\.(?:jsonl?|csv|tsv|parquet|arrow|ya?ml|txt|tar|zip|gz|zst)$")
_TASK = "image-text-to-text"
_SHOWN_VERSIONS = ("torch", "transformers", "trl", "deepspeed", "peft")
_ASK = """messages = [
    {"role": "user", "content": [{"type": "image", "path": "picture.jpg"}, {"type": "text", "text": "What is this?"}]}
]
inputs = processor.apply_chat_template(
    messages, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
)
output = model.generate(**inputs, max_new_tokens=64)
print(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))"""
_CONTINUE = """inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0], skip_special_tokens=True))"""


def hub_id(path: object, *, local: bool = True) -> str | None:
    """Return a recipe's path if it names something on the Hub.

    Args:
        path: `model.*.path` or `data.*.path` of a recipe.
        local: Something of that name in the working directory means that it does not.
    """
    if not isinstance(path, str) or not _HUB_ID.fullmatch(path) or _FILE.search(path):
        return None
    return None if local and (Path(path).exists() or Path(path).parent.is_dir()) else path


def make_card(
    source: Source, repo: str, license: str | None = None, *, revision: str | None = None, base: Base | None = None
) -> str:
    """Write the card.

    Args:
        source: The model or adapter.
        repo: ``OWNER/NAME`` of the repository.
        license: Licence of the model, as the Hub spells it; None leaves it out: it is the owner's to give.
        revision: Branch that it goes to; None for `main`.
        base: Where the model of an adapter is; None for a whole model.
    """
    import jinja2

    recipe = source.recipe or {}
    native = source.config.get("model_type") not in ("sparsevlm", "sparsevlm_text")
    text_only = bool(source.config) and "vision_config" not in source.config
    evals, eval_stages = _evaluations(source.stages)
    yaml = text_without_paths(recipe_text(recipe)).rstrip("\n") if recipe else ""
    versions = source.record.get("versions", {})
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    summary = _summary(source, text_only) if source.config else ""
    usage = _usage(repo, revision, native, text_only)
    install = "" if native else "`import sparsevlm` makes the class known to transformers; install the package first."
    if base is not None:
        summary = adapter_summary(source, base, summary)
        usage, install = adapter_usage(source, repo, revision, base, _CONTINUE if text_only else _ASK)
    if "step" in source.record:
        summary += f"\n\nThis is a checkpoint, at step {source.record['step']} of stage {source.record.get('stage')}."
    return environment.get_template(TEMPLATE).render(
        metadata=metadata(source, repo, license, native=native, text_only=text_only, base=base),
        title=repo.split("/")[-1],
        summary=summary,
        verb="Made" if base is None or is_ours(source) else "Uploaded",
        version=__version__,
        versions=", ".join(f"{name} {versions[name]}" for name in _SHOWN_VERSIONS if name in versions),
        usage=usage,
        install=install,
        parameters=_parameters(source),
        parents=_parents(recipe),
        stages=_stages(source),
        data=_data(source),
        evals=evals,
        eval_stages=eval_stages,
        recipe=yaml,
        fence="`" * max(3, 1 + max((len(run) for run in re.findall("`+", yaml)), default=0)),
    )


def metadata(
    source: Source, repo: str, license: str | None, *, native: bool, text_only: bool, base: Base | None = None
) -> str:
    """Return the YAML header of the card."""
    from huggingface_hub import ModelCardData

    recipe = source.recipe or {}
    parts = recipe.get("model", {})
    bases = [found for part in ("vision", "language") if (found := hub_id(parts.get(part, {}).get("path")))]
    trained = _trained_on(source)
    sets = {name: hub_id(cell.get("path")) for name, cell in recipe.get("data", {}).items() if name in trained}
    results = _results(source)
    tags = ["sparsevlm"] if base is None or is_ours(source) else []
    tags += [] if text_only or not source.config else ["vision-language"]
    tags += ["mixture-of-experts", "moe"] if _experts(source.config) else []
    library, task = "transformers" if native else "sparsevlm", "text-generation" if text_only else _TASK
    if base is not None:
        bases = bases if base.beside else [base.repo]
        tags.append(method_of(source).replace("_", "-").lower())
        library, task = "peft" if is_pefts_own(source) else "sparsevlm", task if source.config else None
    extra = {"base_model_relation": "finetune" if base is None else "adapter"} if bases else {}
    data = ModelCardData(
        base_model=list(dict.fromkeys(bases)) or None,
        datasets=list(dict.fromkeys(name for name in sets.values() if name)) or None,
        license=license,
        library_name=library,
        pipeline_tag=task,
        tags=tags,
        metrics=["accuracy"] if results else None,
        eval_results=results or None,
        model_name=repo.split("/")[-1] if results else None,
        **extra,  # type: ignore[arg-type]
    )
    return data.to_yaml()


def _results(source: Source) -> list[EvalResult]:
    """Return the last stage's accuracies as results of a model index; a question kind is a configuration."""
    from huggingface_hub import EvalResult

    found = []
    for kind, cell in (source.stages[-1].get("eval", {}) if source.stages else {}).items():
        name, path = _evaluation_of(source, kind)
        if not math.isfinite(cell["accuracy"]):
            continue
        found.append(
            EvalResult(
                task_type=_TASK,
                dataset_type=hub_id(path) or name,
                dataset_name=name,
                dataset_config=kind.split("/")[-1],
                metric_type="accuracy",
                metric_value=round(cell["accuracy"], 4),
                metric_name=f"accuracy (n = {cell['n']}, chance {cell['chance']:.4f})",
            )
        )
    return found


def _evaluation_of(source: Source, kind: str) -> tuple[str, str]:
    """Return name and path of the evaluation that asks questions of a kind."""
    evals = source.record.get("evals", {})
    specs = source.record.get("eval_specs", {})
    if "/" in kind and kind.split("/")[0] in specs:
        name = kind.split("/")[0]
    else:
        asked = [name for name, report in evals.items() if kind in json.dumps(report)]
        name = asked[0] if asked else next(iter(specs), "held-out questions")
    return name, specs.get(name, {}).get("path", "")


def _experts(config: dict[str, Any]) -> dict[str, Any] | None:
    """Return the numbers of a sparse model: layers, experts, experts a token."""
    moe, text = config.get("moe"), config.get("text_config", config)
    if moe:
        return {"layers": len(moe["layers"]), "of": moe["num_experts"], "top": moe["num_experts_per_tok"]}
    if config.get("model_type", "").startswith("sparsevlm"):
        return None
    count = text.get("num_experts") or text.get("num_local_experts")
    return {"layers": None, "of": count, "top": text.get("num_experts_per_tok")} if count else None


def _summary(source: Source, text_only: bool) -> str:
    """Say what the model is, in words."""
    config = source.config
    text = config.get("text_config", config)
    kind = text.get("model_type", "").replace("sparsevlm_text", "decoder")
    layers = text.get("num_hidden_layers")
    language = f"{kind} language model" + (f" of {layers} layers" if layers else "")
    if text_only:
        words = f"A {language}."
    else:
        blocks = " → ".join(block["type"] for block in config.get("connector") or []) or "projector"
        tower = config.get("vision_config", {}).get("model_type", "")
        words = f"A vision-language model: a {tower} tower, a connector ({blocks}) and a {language}."
        if config.get("fusion"):
            words += f" Its layers reach visual tokens by {config['fusion']['type'].replace('_', ' ')}."
    experts = _experts(config)
    if experts is None:
        return words
    number = experts["layers"]
    which = (
        "Its sparse layers have" if number is None else f"{number} of these layers {'has' if number == 1 else 'have'}"
    )
    return f"{words} {which} {experts['of']} experts in place of the FFN; a token takes {experts['top']} of them."


def _usage(repo: str, revision: str | None, native: bool, text_only: bool) -> str:
    """Return code that loads the model and asks it something."""
    lines = [] if native else ["import sparsevlm  # before the Auto classes are used", ""]
    auto, reader = ("CausalLM", "Tokenizer") if text_only else ("ImageTextToText", "Processor")
    at = f', revision="{revision}"' if revision else ""
    lines += [
        f"from transformers import AutoModelFor{auto}, Auto{reader}",
        "",
        f'model = AutoModelFor{auto}.from_pretrained("{repo}"{at}, dtype="auto")',
        f'{reader.lower()} = Auto{reader}.from_pretrained("{repo}"{at})',
    ]
    return "\n".join([*lines, _CONTINUE if text_only else _ASK])


def _parameters(source: Source) -> list[list[str]]:
    """Return the rows of the table of parameters; only the total where no training recorded more."""
    if not source.stages or "parameters" not in source.stages[-1]:
        what = "model" if source.adapter is None else "adapter"
        return [[what, f"{_stored(source.model):,}", "not recorded"]]
    counts = source.stages[-1]["parameters"]
    inner = counts.get("language_model")
    rows = [["model", f"{counts['total']:,}", f"{counts['activated']:,}"]]
    return rows + ([["language model", f"{inner['total']:,}", f"{inner['activated']:,}"]] if inner else [])


def _stored(folder: Path) -> int:
    """Count the numbers in the weight files."""
    headers = [safetensors_header(file) for file in folder.glob("*model*.safetensors")]
    return sum(math.prod(cell["shape"]) for header in headers for key, cell in header.items() if key != "__metadata__")


def _origin(path: object) -> str:
    """Show where a part or a source comes from: a link to the Hub, what the package ships, or a local name."""
    text = str(path)
    found = hub_id(text)
    if found is not None:
        return _cell(found)
    return f"{_cell(text)} (ships with the package)" if text.startswith("sparsevlm:") else f"{_cell(text)} (local)"


def _parents(recipe: dict[str, Any]) -> list[list[str]]:
    """Return part and origin of what the run started from."""
    parts = recipe.get("model", {})
    rows = []
    for part, name in (("vision", "vision tower"), ("language", "language model")):
        path = parts.get(part, {}).get("path")
        if path is not None:
            found = hub_id(path)
            rows.append([name, f"[{found}](https://huggingface.co/{found})" if found else _origin(path)])
    return rows


def _trained_on(source: Source) -> dict[str, list[str]]:
    """Return source of data -> stages of this model that used it."""
    stages = (source.recipe or {}).get("stages", {})
    names = [row["name"] for row in source.stages] or list(stages)
    used: dict[str, list[str]] = {}
    for name in names:
        for data in stages.get(name, {}).get("data", []):
            used.setdefault(data, []).append(name)
    return used


def _data(source: Source) -> list[list[str]]:
    """Return the rows of the table of data, those of this model's stages."""
    recipe = source.recipe or {}
    rows = []
    for name, stages in _trained_on(source).items():
        cell = recipe.get("data", {}).get(name, {})
        path = cell.get("path", "")
        found = hub_id(path)
        origin = f"[{found}](https://huggingface.co/datasets/{found})" if found else _origin(path)
        limit = cell.get("limit")
        named = [_weight(recipe["stages"][stage], name, stage) for stage in stages]
        rows.append(
            [
                _cell(name),
                origin,
                _cell(cell.get("split") or ""),
                "all" if limit is None else f"{limit:,}",
                ", ".join(named),
                _cell(cell.get("license") or "not stated"),
            ]
        )
    return rows


def _weight(stage: dict[str, Any], name: str, stage_name: str) -> str:
    """Name a stage, with the weight that the source has in it."""
    data = stage.get("data")
    return f"{_cell(stage_name)} (weight {data[name]:g})" if isinstance(data, dict) else _cell(stage_name)


def _stages(source: Source) -> list[list[str]]:
    """Return the rows of the table of stages."""
    recipe = (source.recipe or {}).get("stages", {})
    rows = []
    for row in source.stages:
        spec = recipe.get(row["name"], {})
        steps = spec.get("steps") or (f"{spec['epochs']:g} epochs" if spec.get("epochs") else "")
        rows.append(
            [
                _cell(row["name"]),
                _cell(", ".join(row.get("trains", []))),
                _cell(", ".join(spec.get("data", []))),
                str(steps),
                f"{row['parameters']['trainable']:,}",
                f"{_number(row['loss_first'])} → {_number(row['loss_last'])}",
                f"{row['tokens_per_second']:,.0f}",
                f"{row['seconds']:,.0f}",
            ]
        )
    return rows


def _evaluations(stages: Sequence[dict[str, Any]]) -> tuple[list[list[str]], list[str]]:
    """Return the rows of the table of accuracies, and the stages that are its columns."""
    kinds = {kind: cell for row in stages for kind, cell in row.get("eval", {}).items()}
    asked = [row for row in stages if row.get("eval")]
    rows = []
    for kind, cell in sorted(kinds.items(), key=lambda item: (not item[1]["core"], item[0])):
        name = _cell(kind) if cell["core"] else f"{_cell(kind)} (not core)"
        scores = [_percent(row["eval"].get(kind, {}).get("accuracy")) for row in asked]
        rows.append([name, f"{cell['n']:,}", _percent(cell["chance"]), *scores])
    return rows, [_cell(row["name"]) for row in asked]


def _percent(share: float | None) -> str:
    return "-" if share is None or not math.isfinite(share) else f"{100 * share:.1f} %"


def _number(value: float | None) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.3f}"


def _cell(text: object) -> str:
    """Make a text safe inside a table."""
    return re.sub(r"\s+", " ", str(text)).replace("|", "\\|").replace("<", "&lt;")


def check_round_trip(card: str) -> None:
    """Read the card's header back the way the Hub's library does.

    Raises:
        AssertionError: It is not what was written; a fault of this module.
    """
    from huggingface_hub import ModelCard

    read = ModelCard(card)
    header = _lines_between_dashes(card.splitlines())
    assert read.data.to_yaml().strip() == "\n".join(header).strip(), "the card's header does not read back as written"


def _lines_between_dashes(lines: Iterable[str]) -> list[str]:
    found: list[str] = []
    for number, line in enumerate(lines):
        if number and line == "---":
            return found
        if number:
            found.append(line)
    return found
