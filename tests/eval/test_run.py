"""The loop around a model: batches, order, faults, and a model left as it was found."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsevlm.data.sample import BadSampleError, Media, Message, Sample
from sparsevlm.eval.base import EvalTask, Example, as_question
from sparsevlm.eval.metrics import Reference
from sparsevlm.eval.run import build_task, evaluate, plan_batches
from sparsevlm.recipe.schema import Eval
from sparsevlm.registry import EVAL_TASKS
from sparsevlm.vision.tokens import MediaKind
from tests import tiny

COLORS = ("red", "green", "blue")


class FakeTokenizer:
    """A token a character."""

    pad_token_id = 0
    eos_token_id = 1

    def batch_decode(self, ids: Any, skip_special_tokens: bool) -> list[str]:
        assert skip_special_tokens
        return ["".join(chr(token) for token in row.tolist() if token > 1) for row in ids]


class FakeProcessor:
    """Encodes characters; a picture is its source's repr; the source "broken" cannot be read."""

    def __init__(self, broken_at: str = "encode") -> None:
        self.tokenizer = FakeTokenizer()
        self.broken_at = broken_at
        self.batches: list[list[str]] = []

    def _text(self, sample: Sample, stage: str) -> str:
        for media in sample.media():
            if media.source == "broken" and stage == self.broken_at:
                raise BadSampleError("truncated JPEG")
        return "".join(p if isinstance(p, str) else f"[{p.source}]" for m in sample.messages for p in m.content)

    def measure(self, sample: Sample, max_length: int | None = None) -> tuple[int, int]:
        assert sample.messages[-1].role == "assistant"  # a processor finds no target without one
        return len(self._text(sample, "measure")), 4 * len(list(sample.media()))

    def encode_prompts(self, samples: list[Sample]) -> dict[str, torch.Tensor]:
        texts = [self._text(sample, "encode") for sample in samples]
        self.batches.append([sample.id for sample in samples])
        width = max(map(len, texts))
        return {"input_ids": torch.tensor([[0] * (width - len(t)) + [ord(c) for c in t] for t in texts])}


class EchoModel(torch.nn.Module):
    """Repeats the last word of the prompt, so that order and padding faults show."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        self.tower = torch.nn.Dropout()
        self.config = type("Config", (), {"use_cache": False})()
        self.calls: list[dict[str, Any]] = []

    def generate(self, input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        assert not self.training and not self.tower.training and not torch.is_grad_enabled()
        self.config.use_cache = True
        self.calls.append(kwargs)
        texts = ["".join(chr(t) for t in row.tolist() if t > 1) for row in input_ids]
        words = [text.split()[-1] for text in texts]
        width = max(map(len, words))
        new = torch.tensor([[ord(c) for c in word] + [1] + [0] * (width - len(word)) for word in words])
        return torch.cat([input_ids, new], dim=1)


def question(i: int, text: str, answer: str, kind: str = "all", media: str | None = None, **fields: Any) -> Example:
    content = (*([Media(MediaKind.IMAGE, media)] if media else []), text)
    sample = Sample((Message("user", content),), id=f"q{i}", where=f"file:row {i}")
    return Example(sample, kind, Reference((answer,)), **fields)


EXAMPLES = [
    question(0, "say red", "red", "color", media="a"),
    question(1, "please say a much longer yes", "yes", "yes_no", metric="yes_no"),
    question(2, "say blue", "red", "color"),
    question(3, "say red", "red", "color", media="broken"),
    question(4, "no", "no", "yes_no", metric="yes_no"),
    Example(Sample((), "q5", where="file:row 5"), "color", fault="the row has no question"),
    question(6, "say yes", "no", "yes_no", metric="yes_no"),
    question(7, "say green", "green", "hard", core=False),
]


class ListTask(EvalTask):
    """Asks `EXAMPLES`."""

    volume: int = 1
    """An option."""

    def examples(self, spec: Eval, base_dir: Path) -> list[Example]:
        return list(EXAMPLES)


@pytest.fixture
def spec(monkeypatch: pytest.MonkeyPatch) -> Eval:
    EVAL_TASKS.names()
    monkeypatch.setitem(EVAL_TASKS._entries, "list", ListTask)
    return Eval(task="list", path="-", batch_size=2, max_new_tokens=8)


@pytest.mark.parametrize("broken_at", ["measure", "encode"])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
def test_every_example_is_counted_and_in_order(spec: Eval, batch_size: int, broken_at: str, tmp_path: Path) -> None:
    path = tmp_path / "sub" / "replies.jsonl"
    result = evaluate(
        EchoModel(),
        FakeProcessor(broken_at),
        spec.model_copy(update={"batch_size": batch_size}),
        progress=False,
        predictions_path=path,
    )
    assert [reply.text for reply in result.replies] == ["red", "yes", "blue", None, "no", None, "yes", "green"]
    assert [reply.score for reply in result.replies] == [1, 1, 0, 0, 1, 0, 0, 1]
    assert dict(result) == {
        "color": {"accuracy": 1 / 4, "chance": 3 / 4, "n": 4, "core": True},
        "yes_no": {"accuracy": 2 / 3, "chance": 2 / 3, "n": 3, "core": True},
        "hard": {"accuracy": 1.0, "chance": 1.0, "n": 1, "core": False},
    }
    report = result.report
    assert report["n"] == 8 and report["accuracy"] == 4 / 8 and report["core_accuracy"] == 3 / 7
    assert report["faults"] == [
        {"id": "q3", "where": "file:row 3", "reason": "truncated JPEG"},
        {"id": "q5", "where": "file:row 5", "reason": "the row has no question"},
    ]
    assert report["yes_no"]["yes_no"] == report["yes_no"]["overall"]
    assert report["yes_no"]["overall"]["yes_share"] == pytest.approx(2 / 3)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["id"] for line in lines] == [f"q{i}" for i in range(8)]
    assert lines[3]["fault"] == "truncated JPEG" and lines[3]["prediction"] is None
    assert lines[2] == {
        "id": "q2", "kind": "color", "question": "say blue", "answers": ["red"], "prediction": "blue", "score": 0.0,
    }  # fmt: skip
    json.dumps({"kinds": result, "report": report})


def test_limit_and_blind(spec: Eval) -> None:
    processor = FakeProcessor()
    blind = spec.model_copy(update={"limit": 4, "options": {"blind": True}})
    result = evaluate(EchoModel(), processor, blind, progress=False)
    assert [reply.text for reply in result.replies] == ["red", "yes", "blue", "red"]  # nothing to be read, so no fault
    assert result.report["faults"] == [] and sorted(chain(*processor.batches)) == ["q0", "q1", "q2", "q3"]


def test_greedy_and_within_the_length(spec: Eval) -> None:
    model = EchoModel()
    evaluate(model, FakeProcessor(), spec, progress=False)
    assert all(call["do_sample"] is False and call["max_new_tokens"] == 8 for call in model.calls)


@pytest.mark.parametrize("crash", [False, True])
def test_model_is_left_as_it_was(spec: Eval, crash: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = EchoModel()
    model.train()
    model.tower.eval()  # a frozen tower
    if crash:
        generate = model.generate

        def fail(**kwargs: Any) -> torch.Tensor:
            generate(**kwargs)
            raise RuntimeError("out of memory")

        monkeypatch.setattr(model, "generate", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            evaluate(model, FakeProcessor(), spec, progress=False)
    else:
        evaluate(model, FakeProcessor(), spec, progress=False)
    assert model.training and not model.tower.training
    assert model.config.use_cache is False and torch.is_grad_enabled()


def test_batches_hold_like_with_like() -> None:
    sizes = {0: (0, 9), 1: (4, 20), 2: (0, 3), 3: (16, 30), 4: (4, 10), 5: (0, 3), 6: (4, 10)}
    batches = plan_batches(sizes, 2)
    assert batches == [[3, 1], [4, 6], [0, 2], [5]]
    assert plan_batches({}, 2) == []


def test_wrong_options_and_nothing_to_ask(spec: Eval, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="unknown evaluation task 'lst', did you mean 'list'"):
        build_task(spec.model_copy(update={"task": "lst"}))
    with pytest.raises(ValueError, match="loudness"):
        build_task(spec.model_copy(update={"options": {"loudness": 3}}))
    monkeypatch.setattr(ListTask, "examples", lambda *_: [])
    with pytest.raises(ValueError, match="no questions"):
        evaluate(EchoModel(), FakeProcessor(), spec, progress=False)


def test_as_question_cuts_after_the_last_user_turn() -> None:
    turns = [Message(role, (role,)) for role in ("system", "user", "assistant", "user", "assistant")]
    sample = Sample(tuple(turns), where="here")
    assert as_question(sample).messages == tuple(turns[:4])
    with pytest.raises(BadSampleError, match="here"):
        as_question(replace(sample, messages=tuple(turns[:1])))


def mixed_examples() -> list[Example]:
    """Pictures, a clip and text alone, prompts of different lengths."""
    clip = Media(MediaKind.VIDEO, [tiny.picture(color) for color in COLORS], fps=1.0)
    contents: list[tuple[Any, ...]] = [
        (Media(MediaKind.IMAGE, tiny.picture("red")), "what color is it ?"),
        (clip, "what moves in the video ?"),
        ("is a cat a dog ?",),
        (Media(MediaKind.IMAGE, tiny.picture("blue")), Media(MediaKind.IMAGE, tiny.picture("green")), "how many ?"),
        ("yes or no : is it red , is it blue or is it green ?",),
    ]
    return [
        Example(Sample((Message("user", content),), id=str(i)), reference=Reference(("red",)))
        for i, content in enumerate(contents)
    ]


def test_tiny_model_says_the_same_in_any_batch(tiny_model: Any, spec: Eval, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = tiny_model
    monkeypatch.setattr(ListTask, "examples", lambda *_: mixed_examples())
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()
    replies = {
        size: [
            reply.text
            for reply in evaluate(
                model, processor, spec.model_copy(update={"batch_size": size}), progress=False
            ).replies
        ]
        for size in (1, 2, 5)
    }
    assert replies[1] == replies[2] == replies[5]
    assert len(set(replies[1])) > 1  # not the same to everything
    assert model.training
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
