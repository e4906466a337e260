"""Answers chosen by likelihood: each option is put into the model's mouth, and the likeliest counts as its reply.

InstructBLIP (Dai et al., arXiv:2305.06500, section 2.4) evaluates sets with few possible answers this way.

Legend: B rows of a batch, T their tokens, V words.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from string import ascii_uppercase
from typing import TYPE_CHECKING, Any, Literal

from sparsevlm.data.sample import IGNORE_INDEX, BadSampleError, Encoded, Message, Sample
from sparsevlm.eval.base import Example

if TYPE_CHECKING:
    from torch import Tensor

Rank = Literal["sum", "mean"]
"""What an option's likelihood is: of all its tokens together, or of one of them in the mean."""


def options_of(example: Example) -> list[Sample]:
    """Return the conversations that end with each option of a question."""
    return [
        replace(example.sample, messages=(*example.sample.messages, Message("assistant", (choice,))))
        for choice in example.reference.choices
    ]


def choose(
    model: Any, processor: Any, example: Example, rank: Rank, batch_size: int, device: Any
) -> tuple[str | None, str]:
    """Return the letter of the likeliest option (the first of equals), and why there is none.

    Args:
        model: A `SparseVLMForConditionalGeneration` in evaluation mode.
        processor: Its processor.
        example: A question with options.
        rank: How options of different lengths are compared.
        batch_size: Options that go through the model at once.
        device: Where the batches go; None: where the model is.
    """
    if not example.reference.choices:
        return None, "the row has no choices to rank"
    try:
        encoded = [processor.encode(sample) for sample in options_of(example)]
    except BadSampleError as error:
        return None, str(error)
    scores: list[float] = []
    for at in range(0, len(encoded), batch_size):
        scores += likelihoods(model, processor, encoded[at : at + batch_size], rank, device)
    return ascii_uppercase[max(range(len(scores)), key=lambda i: (scores[i], -i))], ""


def likelihoods(model: Any, processor: Any, rows: Sequence[Encoded], rank: Rank, device: Any = None) -> list[float]:
    """Return the log-likelihood of what the assistant says in each row, the end of its turn included."""
    import torch

    from sparsevlm.data.collate import Collator

    tokenizer = processor.tokenizer
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    batch = Collator(pad, packed=False)([list(rows)])
    device = model.device if device is None else device
    inputs = {name: value.to(device) for name, value in batch.items() if torch.is_tensor(value) and name != "labels"}
    logits: Tensor = model(**inputs).logits[:, :-1].float()  # (B, T - 1, V)
    said = batch["labels"][:, 1:].to(logits.device)  # (B, T - 1)
    mask = said != IGNORE_INDEX
    each = logits.log_softmax(-1).gather(2, said.clamp(min=0)[..., None])[..., 0]  # (B, T - 1)
    total = (each * mask).sum(1)
    return (total / mask.sum(1) if rank == "mean" else total).tolist()


def choose_all(
    model: Any, processor: Any, examples: Sequence[Example], rank: Rank, batch_size: int, device: Any
) -> Iterator[tuple[str | None, str]]:
    """Yield the reply and the fault of each example, in order; see `choose`."""
    for example in examples:
        yield (None, example.fault) if example.fault else choose(model, processor, example, rank, batch_size, device)
