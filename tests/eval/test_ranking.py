"""Options ranked by likelihood, against one token after the other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsevlm.data.sample import Media, Message, Sample
from sparsevlm.eval.base import Example
from sparsevlm.eval.metrics import Reference
from sparsevlm.eval.ranking import choose, likelihoods, options_of
from sparsevlm.eval.run import evaluate
from sparsevlm.recipe.schema import Eval
from sparsevlm.vision.tokens import MediaKind
from tests import tiny

CHOICES = ("red", "a big yellow circle", "no", "two three four")


def question() -> Example:
    content = (Media(MediaKind.IMAGE, tiny.picture()), "what is this ?")
    return Example(Sample((Message("user", content),), "q"), reference=Reference(("A",), CHOICES), metric="choice")


def naive(model: Any, processor: Any, sample: Sample) -> tuple[float, int]:
    """Log-likelihood of the answer and its number of tokens: a pass for each token, on what stands before it."""
    prompt = processor.encode_prompts([Sample(sample.messages[:-1])])
    whole = processor.encode(sample).input_ids
    start, total = prompt["input_ids"].shape[1], 0.0
    said = [i for i, label in enumerate(processor.encode(sample).labels.tolist()) if label != -100]
    assert said[0] == start
    for at in said:
        before = prompt | {"input_ids": whole[None, :at], "attention_mask": torch.ones(1, at, dtype=torch.long)}
        with torch.no_grad():
            total += float(model(**before).logits[0, -1].log_softmax(-1)[whole[at]])
    return total, len(said)


def test_likelihoods(tiny_model: Any) -> None:
    model, processor = tiny_model
    model.eval()
    expected = [naive(model, processor, sample) for sample in options_of(question())]
    rows = [processor.encode(sample) for sample in options_of(question())]
    with torch.no_grad():
        sums, means = (likelihoods(model, processor, rows, rank) for rank in ("sum", "mean"))
    assert sums == pytest.approx([total for total, _ in expected], abs=1e-4)
    assert means == pytest.approx([total / number for total, number in expected], abs=1e-4)
    best = "ABCD"[max(range(4), key=sums.__getitem__)]
    with torch.no_grad():
        assert {choose(model, processor, question(), "sum", size, None)[0] for size in (1, 3, 8)} == {best}


def test_task(tiny_model: Any, tmp_path: Path) -> None:
    model, processor = tiny_model
    for color in ("red", "blue"):
        tiny.picture(color).save(tmp_path / f"{color}.png")
    rows = [
        {"image": "red.png", "question": "what color is this ?", "choices": ["red", "a blue dog"], "answer": 0},
        {"image": "gone.png", "question": "what ?", "choices": ["red", "blue"], "answer": 0},
        {"image": "blue.png", "question": "what color is this ?", "answer": "blue", "metric": "exact"},
    ]
    (tmp_path / "q.json").write_text(json.dumps(rows))
    spec = Eval(task="multiple_choice", path=str(tmp_path / "q.json"), options={"rank": "sum"})
    result = evaluate(model.train(), processor, spec, progress=False)
    assert model.training
    replies = result.replies
    assert replies[0].example.sample.messages[0].text == "what color is this ?"  # no letters in the prompt
    with torch.no_grad():
        assert replies[0].text == choose(model.eval(), processor, replies[0].example, "sum", 8, None)[0]
    assert replies[1].text is None and "gone.png" in replies[1].fault
    assert replies[2].text is None and "no choices to rank" in replies[2].fault
    assert all(reply.score == 0 for reply in replies[1:])
