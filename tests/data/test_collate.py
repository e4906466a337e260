"""Packed and padded batches hold the same documents, and each its own."""

from __future__ import annotations

import itertools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsevlm.data.collate import Collator
from sparsevlm.data.sample import IGNORE_INDEX, Encoded
from sparsevlm.vision.tokens import MEDIA_KINDS, Grid, ItemShape, MediaKind

PAD = 99


def document(length: int, frames: tuple[int, ...] = (), seed: int = 0) -> Encoded:
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 50, (length,), generator=random)
    return Encoded(
        input_ids=torch.randint(0, 50, (length,), generator=random),
        labels=labels.where(torch.rand(length, generator=random) < 0.5, IGNORE_INDEX),
        pixel_values=torch.rand(sum(frames), 3, 2, 2, generator=random) if frames else None,
        items=tuple(
            ItemShape(Grid(t, 1, 1), MediaKind.IMAGE if t == 1 else MediaKind.VIDEO, i) for i, t in enumerate(frames)
        ),
        visual_lengths=tuple(frames),
    )


documents = st.lists(
    st.builds(document, st.integers(1, 9), st.lists(st.integers(1, 3), max_size=2).map(tuple), st.integers(0, 99)),
    min_size=1,
    max_size=6,
)


def taken_apart(batch: dict, packed: bool) -> list[tuple]:
    """Return (ids, labels, positions, pixels, grids, kinds) of each document, from the batch alone."""
    if packed:
        cuts = batch["cu_seq_lens_q"].tolist()
        spans = [(0, slice(a, b)) for a, b in itertools.pairwise(cuts)]
    else:
        spans = [(row, slice(0, int(n))) for row, n in enumerate(batch["attention_mask"].sum(1))]
    found = []
    frame = item = 0
    for index, (row, span) in enumerate(spans):
        pixels, grids, kinds = [], [], []
        while item < len(batch.get("media_owners", ())) and batch["media_owners"][item] == index:
            t = int(batch["image_grid_thw"][item, 0])
            pixels.append(batch["pixel_values"][frame : frame + t])
            grids.append(Grid(*batch["image_grid_thw"][item].tolist()))
            kinds.append(MEDIA_KINDS[batch["media_kinds"][item]])
            frame, item = frame + t, item + 1
        ids, labels = batch["input_ids"][row, span], batch["labels"][row, span]
        found.append((ids.tolist(), labels.tolist(), pixels, tuple(grids), tuple(kinds)))
    assert frame == len(batch.get("pixel_values", ()))
    return found


@settings(deadline=None)
@given(documents, st.booleans())
def test_every_document_is_in_the_batch_as_it_was(samples, packed):
    batch = Collator(PAD, packed)([samples[:1], samples[1:]] if packed else [[sample] for sample in samples])
    for sample, (ids, labels, pixels, grids, kinds) in zip(samples, taken_apart(batch, packed), strict=True):
        assert ids == sample.input_ids.tolist()
        assert labels == [IGNORE_INDEX, *sample.labels[1:].tolist()]
        assert (grids, kinds) == (sample.grids, sample.kinds)
        if sample.pixel_values is None:
            assert not pixels
        else:
            torch.testing.assert_close(torch.cat(pixels), sample.pixel_values, rtol=0, atol=0)


@settings(deadline=None)
@given(documents)
def test_packed_batches_have_no_padding_and_positions_that_restart(samples):
    batch = Collator(PAD, packed=True)([samples])
    assert "attention_mask" not in batch
    lengths = [sample.length for sample in samples]
    assert batch["input_ids"].shape == batch["labels"].shape == batch["position_ids"].shape == (1, sum(lengths))
    assert batch["position_ids"][0].tolist() == [p for n in lengths for p in range(n)]
    assert batch["cu_seq_lens_q"].dtype == batch["cu_seq_lens_k"].dtype == torch.int32
    assert batch["max_length_q"] == batch["max_length_k"] == max(lengths)


def test_padding_is_masked_and_no_target():
    batch = Collator(PAD, packed=False)([[document(2)], [document(5)]])
    assert batch["input_ids"][0, 2:].tolist() == [PAD] * 3
    assert batch["labels"][0, 2:].tolist() == [IGNORE_INDEX] * 3
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0, 0], [1] * 5]
    assert "position_ids" not in batch


def test_without_media_there_are_no_media_tensors():
    for packed in (True, False):
        assert not {"pixel_values", "image_grid_thw", "media_kinds", "media_owners"} & set(
            Collator(PAD, packed)([[document(3)]])
        )


def test_a_batch_of_nothing_is_one_token_without_target():
    for packed in (True, False):
        batch = Collator(PAD, packed)([[], []])
        assert batch["input_ids"].tolist() == [[PAD]]
        assert batch["labels"].tolist() == [[IGNORE_INDEX]]


def test_collating_leaves_the_samples_alone():
    sample = document(4, seed=3)
    labels = sample.labels.clone()
    Collator(PAD, packed=True)([[sample]])
    torch.testing.assert_close(sample.labels, labels)
