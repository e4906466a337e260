"""Streams: every record once a pass over all ranks, whatever the workers; going on by leaving rows out."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from torch.utils.data import DataLoader

from sparsevlm.data import stream as stream_module
from sparsevlm.data.dataset import StageData
from sparsevlm.data.skips import TooManySkippedError
from sparsevlm.data.stream import StageStream, plan_rows
from sparsevlm.recipe.schema import Source
from sparsevlm.train.loader import StepSampler
from tests.data.fakes import encode, measure, stage, text_row, write_texts


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    monkeypatch.setattr(stream_module, "WINDOW", 16)


@pytest.fixture(params=["jsonl", "parquet"])
def sources(request, tmp_path) -> dict[str, Source]:
    """Two streamed sources of 40 and 12 records in two files each."""
    from datasets import Dataset

    made = {}
    for name, count in (("a", 40), ("b", 12)):
        paths = [tmp_path / f"{name}{part}.{request.param}" for part in range(2)]
        for part, path in enumerate(paths):
            rows = [text_row(i, 3 + i % 5) for i in range(part * count // 2, (part + 1) * count // 2)]
            if request.param == "jsonl":
                path.write_text("\n".join(map(json.dumps, rows)))
            else:
                Dataset.from_list(rows).to_parquet(path)
        made[name] = Source(path=[str(path) for path in paths], format="llava", streaming=True)
    return made


def rows_of(sources, given, *, packed=False, seed=0, rank=0, world=1, workers=0, skip=0, **options):
    """What a rank trains on, read as the trainer reads it."""
    data = plan_rows(sources, given, measure, encode, packed=packed, seed=seed, rank=rank, world=world, **options)
    assert isinstance(data, StageStream)
    batches = list(StepSampler(len(data), given.batch.rows_per_rank, rank, world))[skip:]
    loader = DataLoader(data, batch_sampler=batches, num_workers=workers, collate_fn=list)
    rows = [row for batch in loader for row in batch]
    data.skips.note_rows(rows)
    return rows


def ids(rows):
    return [[sample.sample_id for sample in row] for row in rows]


def counts(rows):
    return Counter(name for row in ids(rows) for name in row)


@pytest.mark.parametrize("world", [1, 2])
def test_a_pass_is_every_record_once_over_all_ranks(world, sources, monkeypatch):
    monkeypatch.setattr(stream_module, "WINDOW", 4)  # divides a pass, else its last window reaches into the next
    given = stage(("a",), steps=10, batch={"rows": 4, "group_by_length": False})
    rows = [row for rank in range(world) for row in rows_of(sources, given, rank=rank, world=world)]
    assert counts(rows) == {f"a/{i}": 1 for i in range(40)}


def test_concat_mixes_sources_and_starts_again(sources, monkeypatch):
    monkeypatch.setattr(stream_module, "WINDOW", 4)
    given = stage(("a", "b"), steps=26, batch={"rows": 4, "group_by_length": False})
    rows = rows_of(sources, given)
    assert counts(rows) == {f"a/{i}": 2 for i in range(40)} | {f"b/{i}": 2 for i in range(12)}
    assert 4 <= sum(name[0].startswith("b") for name in ids(rows[:16])) <= 12  # in turn, not one after the other


def test_weights(sources):
    given = stage({"a": 1.0, "b": 3.0}, steps=16, mixture={"sampling": "weight"})
    drawn = Counter(name[0] for row in ids(rows_of(sources, given)) for name in row)
    assert drawn.total() == 64 and abs(drawn["b"] - 48) <= 2


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("world", [1, 2])
def test_workers_do_not_change_what_a_rank_trains_on(packed, world, sources):
    given = stage(("a", "b"), steps=6, batch={"rows": 4, "rows_per_rank": 2})
    for rank in range(world):
        rows = [
            ids(rows_of(sources, given, packed=packed, rank=rank, world=world, workers=workers)) for workers in (0, 2)
        ]
        assert rows[0] == rows[1]
        assert len(rows[0]) == 24 // world and all(rows[0])


@pytest.mark.parametrize("workers", [0, 2])
def test_leaving_rows_out_goes_on_where_a_run_stopped(workers, sources):
    given = stage(("a", "b"), steps=12)
    whole = ids(rows_of(sources, given, packed=True))
    assert ids(rows_of(sources, given, packed=True, workers=workers, skip=17)) == whole[17:]


def test_packs_keep_the_budget_and_lose_nothing(sources):
    given = stage(("a",), steps=30, batch={"rows": 1, "max_length": 20})
    rows = rows_of(sources, given, packed=True)
    assert all(sum(sample.length for sample in row) <= 20 for row in rows)
    assert max(counts(rows).values()) - 1 <= min(counts(rows)[f"a/{i}"] for i in range(40))


def test_the_order_hangs_on_the_seed(sources):
    given = stage(("a",), steps=4)
    first, again, other = (ids(rows_of(sources, given, seed=seed)) for seed in (0, 0, 1))
    assert first == again != other
    assert first[0] != [["a/0"]] or first[1] != [["a/1"]]


def test_reading_an_earlier_row_starts_again(sources):
    data = plan_rows(sources, stage(("a",), steps=5), measure, encode, packed=True, seed=0)
    rows = ids(data)
    assert ids([data[3], data[1], data[2]]) == [rows[3], rows[1], rows[2]]


def test_caps_and_limits_hold_over_ranks(sources):
    limited = {"a": sources["a"].model_copy(update={"limit": 9})}
    for given_sources, mixture in ((limited, {}), (sources, {"caps": {"a": 9}})):
        given = stage(("a",), steps=8, mixture=mixture, batch={"rows": 4, "group_by_length": False})
        rows = [row for rank in (0, 1) for row in rows_of(given_sources, given, rank=rank, world=2)]
        assert set(counts(rows)) == {f"a/{i}" for i in range(9)}


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_records_are_named_once_and_the_others_are_all_there(workers, tmp_path):
    good = [json.dumps(text_row(i)) for i in range(40)]
    bad = ['{"id": "torn"', json.dumps({"id": "none"}), json.dumps({"id": "gone", "image": "x.png", **text_row(0)})]
    long = {"id": "deep", "conversations": [{"from": "human", "value": "w " * 50}, {"from": "gpt", "value": "a"}]}
    lines = good[:10] + bad + good[10:] + [json.dumps(long)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    sources = {"a": Source(path=str(tmp_path / "a.jsonl"), format="llava", streaming=True)}
    given = stage(steps=20, batch={"rows": 4, "group_by_length": False, "max_skipped_share": 0.2})
    path = tmp_path / "skipped.jsonl"
    seen = counts(rows_of(sources, given, workers=workers, skipped_path=path))
    assert set(seen) == {f"a/{i}" for i in range(40)}
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert sorted(record["where"] for record in records) == [f"a.jsonl:line {n}" for n in (11, 12, 13, 44)]
    with pytest.raises(TooManySkippedError):
        rows_of(sources, stage(steps=20, batch={"max_skipped_share": 0.01}), workers=workers)


def test_a_stream_of_nothing_usable_ends(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"id": 1}\n{"id": 2}')
    sources = {"a": Source(path=str(tmp_path / "a.jsonl"), format="llava", streaming=True)}
    with pytest.raises(ValueError, match=r"none of the last 64 records of a can be used; the last: a\.jsonl:line"):
        rows_of(sources, stage(steps=2))
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"data\.a has no record for rank 0 of 1"):
        rows_of(sources, stage(steps=2))


def test_what_needs_a_size_is_refused(sources):
    for fields, reason in (({"epochs": 1}, "give 'steps'"), ({"mixture": {"sampling": "sqrt_size"}}, "sqrt_size")):
        with pytest.raises(ValueError, match=reason):
            rows_of(sources, stage(**{"steps": None if "epochs" in fields else 2, **fields}))


def test_planned_and_streamed_sources_mix(sources, tmp_path):
    both = {"a": sources["a"], "c": write_texts(tmp_path / "c.jsonl", 40)}
    given = stage(("a", "c"), steps=20, batch={"rows": 4, "group_by_length": False})
    assert counts(rows_of(both, given)) == {f"{name}/{i}": 1 for name in "ac" for i in range(40)}
    planned = plan_rows({"c": both["c"]}, stage(("c",)), measure, encode, packed=True, seed=0)
    assert isinstance(planned, StageData)
