"""Ask a model the questions of a task in batches and score what it says. Greedy, hence deterministic."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsevlm.data.sample import BadSampleError, Message, Sample
from sparsevlm.eval.base import EvalTask, Example, Kinds, Reply, without_media
from sparsevlm.eval.ranking import Rank, choose_all
from sparsevlm.registry import EVAL_TASKS

if TYPE_CHECKING:
    from sparsevlm.recipe.schema import Eval


class EvalResult(dict[str, dict[str, Any]]):
    """Question kind -> ``{"accuracy", "chance", "n", "core"}``, with the rest beside it.

    Attributes:
        report: Figures over all kinds: ``n``, ``accuracy``, ``chance``, ``core_accuracy``, ``yes_no``, ``faults``,
            ``seconds``, … (see `docs/evaluation.md`).
        replies: Every reply, in the order of the task's examples.
    """

    def __init__(self, kinds: Kinds, report: dict[str, Any], replies: list[Reply]) -> None:
        super().__init__(kinds)
        self.report = report
        self.replies = replies


def build_task(spec: Eval) -> EvalTask:
    """Return the task of an evaluation with its options.

    Raises:
        ValueError: No task of that name, or an option is unknown or wrong (pydantic's ValidationError is one).
    """
    return EVAL_TASKS.get(spec.task).model_validate(spec.options)


def evaluate(
    model: Any,
    processor: Any,
    spec: Eval,
    *,
    device: Any = None,
    base_dir: Path | str | None = None,
    progress: bool = True,
    predictions_path: Path | str | None = None,
) -> EvalResult:
    """Evaluate a model on one task.

    A question that cannot be asked (unreadable picture, malformed row) counts as answered wrongly and is named in
    ``report["faults"]``. The model is left as it was found: mode of every module, cache settings.

    Args:
        model: A `SparseVLMForConditionalGeneration`, or anything whose `generate` takes what the processor encodes.
        processor: Its processor (`measure`, `encode_prompts`, `tokenizer`).
        spec: What to evaluate.
        device: Where the batches go; default: where the model is.
        base_dir: Folder that relative paths in `spec` start from; default: the working directory.
        progress: Show a progress bar on a terminal.
        predictions_path: JSONL file to write every reply to.

    Raises:
        ValueError: The task's options or its data as a whole are wrong, or there is nothing to ask.
    """
    started = time.monotonic()
    task = build_task(spec)
    examples = task.examples(spec, Path(base_dir or "."))[: spec.limit]
    if not examples:
        raise ValueError(f"evaluation task {spec.task!r}: {spec.path} holds no questions")
    if task.blind:
        examples = [replace(example, sample=without_media(example.sample)) for example in examples]
    ask = _generate_all if task.ranks is None else partial(_rank_all, rank=task.ranks)
    texts, faults = ask(model, processor, examples, spec, device, progress)
    replies = [
        Reply(example, text, 0.0 if fault else task.score(text or "", example), fault)
        for example, text, fault in zip(examples, texts, faults, strict=True)
    ]
    kinds, report = task.summarise(replies)
    report = {"task": spec.task, "path": spec.path, "options": spec.options, **report}
    report["seconds"] = round(time.monotonic() - started, 3)
    if predictions_path is not None:
        write_predictions(replies, Path(predictions_path))
    return EvalResult(kinds, report, replies)


def write_predictions(replies: Sequence[Reply], path: Path) -> None:
    """Write replies as JSON lines, in the order of the examples."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(reply.record(), ensure_ascii=False) + "\n" for reply in replies]
    path.write_text("".join(lines), encoding="utf-8")


def _generate_all(
    model: Any, processor: Any, examples: Sequence[Example], spec: Eval, device: Any, progress: bool
) -> tuple[list[str | None], list[str]]:
    """Return the reply (None without one) and the fault ("" without one) of every example, in order."""
    texts: list[str | None] = [None] * len(examples)
    faults = [example.fault for example in examples]
    sizes: dict[int, tuple[int, int]] = {}
    for i, example in enumerate(examples):
        if faults[i]:
            continue
        try:
            sizes[i] = _size(processor, example)
        except BadSampleError as error:
            faults[i] = str(error)
    with inference_mode_of(model), progress_bar(len(examples), progress) as advance:
        advance(len(examples) - len(sizes))
        for batch in plan_batches(sizes, spec.batch_size):
            readable, inputs = _encode(processor, batch, examples, faults)
            if readable:
                for i, text in zip(readable, _generate(model, processor, inputs, spec, device), strict=True):
                    texts[i] = text
            advance(len(batch))
    return texts, faults


def _rank_all(
    model: Any, processor: Any, examples: Sequence[Example], spec: Eval, device: Any, progress: bool, rank: Rank
) -> tuple[list[str | None], list[str]]:
    """Return the same where the model ranks options instead of writing an answer."""
    texts: list[str | None] = []
    faults: list[str] = []
    with inference_mode_of(model), progress_bar(len(examples), progress) as advance:
        for text, fault in choose_all(model, processor, examples, rank, spec.batch_size, device):
            texts.append(text)
            faults.append(fault)
            advance(1)
    return texts, faults


def _size(processor: Any, example: Example) -> tuple[int, int]:
    """Return ``(visual tokens, tokens)`` of a question with an answer to it (a processor measures whole turns)."""
    answer = example.reference.answers[0] if example.reference.answers else "?"
    whole = replace(example.sample, messages=(*example.sample.messages, Message("assistant", (answer or "?",))))
    tokens, visual = processor.measure(whole)
    return visual, tokens


def plan_batches(sizes: dict[int, tuple[int, int]], batch_size: int) -> list[list[int]]:
    """Put questions of like size together: text-only ones apart, then by visual tokens and length, ties by index.

    Args:
        sizes: Index of a question -> ``(visual tokens, tokens)``.
        batch_size: Questions a batch.

    Returns:
        Batches of indices, the largest first, so that running out of memory shows at once.
    """
    order = sorted(sizes, key=lambda i: (sizes[i][0] > 0, *sizes[i], -i), reverse=True)
    with_media = [i for i in order if sizes[i][0]]
    text_only = [i for i in order if not sizes[i][0]]
    return [group[at : at + batch_size] for group in (with_media, text_only) for at in range(0, len(group), batch_size)]


def _encode(
    processor: Any, batch: Sequence[int], examples: Sequence[Example], faults: list[str]
) -> tuple[list[int], dict[str, Any]]:
    """Encode a batch; where a sample cannot be read, note its fault and encode the others."""
    samples: dict[int, Sample] = {i: examples[i].sample for i in batch}
    try:
        return list(samples), processor.encode_prompts(list(samples.values()))
    except BadSampleError:
        pass  # one of them; found below
    readable = []
    for i, sample in samples.items():
        try:
            processor.encode_prompts([sample])
            readable.append(i)
        except BadSampleError as error:
            faults[i] = str(error)
    return readable, processor.encode_prompts([samples[i] for i in readable]) if readable else {}


def _generate(model: Any, processor: Any, inputs: dict[str, Any], spec: Eval, device: Any) -> list[str]:
    """Return the greedy continuations of a left-padded batch."""
    device = model.device if device is None else device
    inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
    tokenizer = processor.tokenizer
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    # Sampling options that a checkpoint carries are cleared, or transformers warns that greedy search ignores them.
    output = model.generate(
        **inputs,
        max_new_tokens=spec.max_new_tokens,
        do_sample=False,
        num_beams=1,
        temperature=None,
        top_p=None,
        top_k=None,
        use_cache=True,
        pad_token_id=pad,
    )
    width = inputs["input_ids"].shape[1]
    return [text.strip() for text in tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)]


@contextmanager
def inference_mode_of(model: Any) -> Iterator[None]:
    """Put a model into evaluation mode without gradients; restore every module's own mode afterwards.

    A frozen tower in evaluation mode inside a model in training mode stays so. Tensors made inside are ordinary ones
    (`no_grad`, not `inference_mode`), since caches such as rotary tables outlive the block.
    """
    import torch

    modes = {module: module.training for module in model.modules()}
    config = getattr(model, "config", None)
    parts: list[Any] = [part for part in (config, getattr(config, "text_config", None)) if hasattr(part, "use_cache")]
    caches: list[tuple[Any, bool]] = [(part, part.use_cache) for part in parts]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training
        for part, use_cache in caches:
            part.use_cache = use_cache


@contextmanager
def progress_bar(total: int, show: bool, text: str = "evaluating") -> Iterator[Any]:
    """Yield a function that advances a bar by so many questions; the bar vanishes at the end."""
    if not show:
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(text), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        job = bar.add_task("", total=total)
        yield lambda count: bar.advance(job, count)
