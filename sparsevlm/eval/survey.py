"""Look at the routing of a model on questions or training samples; keep it as files, show it as a table."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sparsevlm.data.sample import BadSampleError, Encoded, Message, Sample
from sparsevlm.eval.base import Example, without_media
from sparsevlm.eval.run import build_task, progress_bar
from sparsevlm.moe.metrics import effective_share, mean_cosine
from sparsevlm.rundir import choose_device, resolve_model

if TYPE_CHECKING:
    from PIL import Image
    from rich.console import Console

    from sparsevlm.recipe.schema import Eval

ROUTING = "routing.json"
PICTURES = "routing"
"""Folder of the pictures, beside the document."""
WRITTEN_OUT = 8
"""Experts whose loads a table gives as numbers; more are drawn."""
WIDEST = 1000
"""Columns of a terminal that a table takes at most."""


def questions(specs: Mapping[str, Eval], count: int | None = None, base_dir: Path | str | None = None) -> list[Sample]:
    """Return the questions of evaluations with their first accepted answer, as the model is trained on them.

    Those that cannot be asked, or have no known answer, are left out.

    Args:
        specs: Evaluations by name.
        count: So many of them at most, spread evenly over all; None for all.
        base_dir: Folder that relative paths start from; default: the working directory.
    """
    found: list[Sample] = []
    for spec in specs.values():
        task = build_task(spec)
        examples = task.examples(spec, Path(base_dir or "."))[: spec.limit]
        usable = (example for example in examples if not example.fault and any(example.reference.answers))
        found += [_answered(example, task.blind) for example in usable]
    if count is None or count >= len(found):
        return found
    return [found[i * len(found) // count] for i in range(count)]


def _answered(example: Example, blind: bool) -> Sample:
    sample = without_media(example.sample) if blind else example.sample
    answer = next(answer for answer in example.reference.answers if answer)
    return replace(sample, messages=(*sample.messages, Message("assistant", (answer,))))


def encoded_questions(
    processor: Any, samples: Sequence[Sample], max_length: int | None = None
) -> Iterator[tuple[Encoded, str]]:
    """Yield samples as the model takes them, each with its last question; those that cannot be read are left out."""
    for sample in samples:
        try:
            encoded = processor.encode(sample, max_length)
        except BadSampleError:
            continue
        yield (
            encoded,
            next((message.text.strip() for message in reversed(sample.messages) if message.role == "user"), ""),
        )


def survey_saved(
    target: str, specs: Mapping[str, Eval], *, device: str | None = None, dtype: str = "auto", progress: bool = True
) -> tuple[dict[str, Any], list[Image.Image]]:
    """Load a saved sparse model and look at its routing on the questions of evaluations.

    Args:
        target: Run or model directory, or Hub id.
        specs: Evaluations by name.
        device: Where to run; default: a GPU where there is one.
        dtype: Type of the weights; ``"auto"`` as saved.
        progress: Show a progress bar.

    Returns:
        See `routing.survey_routing`.

    Raises:
        ValueError: The model is dense, a task's options or data are wrong, or no question can be asked.
    """
    samples = questions(specs)
    device = choose_device(device)
    path = resolve_model(target)
    from sparsevlm.eval.routing import survey_routing
    from sparsevlm.model.build import load_model

    model: Any
    model, processor = load_model(path, dtype=dtype)
    model.to(device)
    batch_size = min(spec.batch_size for spec in specs.values())
    with progress_bar(len(samples), progress, "reading the routing") as advance:
        items = encoded_questions(processor, samples)
        return survey_routing(model, processor, items, batch_size=batch_size, advance=advance)


def write_survey(document: Mapping[str, Any], images: Sequence[Image.Image], path: Path) -> Path:
    """Write `routing.json` and its pictures.

    Args:
        document: From `survey_routing`.
        images: From there.
        path: A file ending in ``.json``, or the folder for one of the usual name.

    Returns:
        The file.
    """
    file = path if path.suffix == ".json" else path / ROUTING
    folder = file.parent / PICTURES
    file.parent.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("picture_*.png"):
        old.unlink()
    for i, image in enumerate(images):
        folder.mkdir(exist_ok=True)
        image.save(folder / f"picture_{i}.png")
    written = _with_files(document)
    if "others" in document:
        written["others"] = [_with_files(other) for other in document["others"]]
    # A line a key: a person finds the numbers, and a matrix does not fill a screen.
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in written.items()]
    file.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    return file


def _with_files(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return a document whose pictures name their files."""
    entries = [{"file": f"{PICTURES}/picture_{i}.png", **entry} for i, entry in enumerate(document["pictures"])]
    return {**document, "pictures": entries}


def print_survey(document: Mapping[str, Any], console: Console) -> None:
    """Print a line a layer and modality, and each modality's commonest pathway; of all groups of routers."""
    for other in document.get("others", []):
        print_survey(other, console)
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    tokens, experts = document["tokens"], document["num_experts"]
    counts = ", ".join(f"{count} {name}" for name, count in tokens.items())
    kind = "experts" if document.get("group", "moe") == "moe" else "LoRA experts"
    console.print(
        f"top {document['num_experts_per_tok']} of {experts} {kind}, {document['samples']} samples, {counts} tokens",
        highlight=False,
    )
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=0)  # 80 columns hold the loads of six experts
    table.add_column("layer", justify="right")
    table.add_column("tokens")
    table.add_column("load, %" if experts <= WRITTEN_OUT else "load")
    for column in ("balance", "violation", "dead", "entropy", "logit\nrms", "dropped", "cosine"):
        table.add_column(column, justify="right")
    for i, layer in enumerate(document["layers"]):
        for name in ["all", *tokens] if len(tokens) > 1 else ["all"]:
            load = document["load"][name][i]
            numbers = [
                _load(load),
                f"{effective_share(load):.2f}",
                f"{max(load) * experts - 1:.2f}",
                str(load.count(0)),
                f"{document['entropy'][name][i]:.2f}",
            ]
            if name == "all":
                cosine = mean_cosine(torch.tensor(document["similarity"][i], dtype=torch.float64))
                numbers += [f"{document['logit_rms'][i]:.2f}", f"{100 * document['dropped_share'][i]:.1f} %"]
                numbers += [f"{cosine:.4f}"]
            table.add_row(str(layer) if name == "all" else "", name, *numbers)
        table.add_section()
    for column in table.columns:
        column.no_wrap = True
    # Its own width where the console is narrower: a number without its last digits says nothing.
    table.width = console.measure(table, options=console.options.update(width=WIDEST)).maximum
    console.print(table, crop=False)
    for layer, cosines in zip(document["layers"], document["similarity"], strict=True):
        for group in copies(cosines):
            names = ", ".join(map(str, group))
            console.print(f"layer {layer}: experts {names} are still copies of one another", highlight=False)
    for name, pathways in document["pathways"].items():
        if pathways:
            path = " > ".join(map(str, pathways[0]["experts"]))
            share = 100 * pathways[0]["share"]
            console.print(f"commonest pathway of {name} tokens: {path} ({share:.1f} %)", highlight=False)
    if not document["pictures"]:
        console.print("no pictures: no sample has one whose tokens lie on a grid", highlight=False)


def copies(cosines: Sequence[Sequence[float]]) -> list[list[int]]:
    """Return the groups of experts that cannot be told apart.

    Equal experts with equal router rows get equal gradients and stay equal for ever: they are one expert.
    """
    groups: list[list[int]] = []
    for expert, row in enumerate(cosines):
        same = next((group for group in groups if row[group[0]] >= 1 - 1e-6), None)
        if same is None:
            groups.append([expert])
        else:
            same.append(expert)
    return [group for group in groups if len(group) > 1]


def _load(load: Sequence[float]) -> str:
    """Write loads as per cent, or as bars where there are many: half a block is the fair share, a full one twice."""
    if len(load) <= WRITTEN_OUT:
        return " ".join(f"{100 * share:2.0f}" for share in load)
    heights = (0 if not share else min(8, max(1, round(4 * share * len(load)))) for share in load)
    return "".join(" ▁▂▃▄▅▆▇█"[height] for height in heights)
