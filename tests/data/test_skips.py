"""Skipped records: written once, by any number of processes, and too many of them stop the run."""

from __future__ import annotations

import json
import multiprocessing
import pickle

import pytest
import torch

from sparsevlm.data.sample import Encoded
from sparsevlm.data.skips import CHECK_FROM, Row, Skip, SkipLog, TooManySkippedError


def skip(i: int, reason: str = "truncated") -> Skip:
    return Skip("a", f"id{i}", f"a.json:row {i}", reason)


def keys(n: int) -> list[tuple[str, str]]:
    return [skip(i).key for i in range(n)]


def records(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_record_is_written_with_its_reason_and_only_once(tmp_path):
    path = tmp_path / "stage" / "skipped.jsonl"
    log = SkipLog(path, 1.0)
    log.note(keys(3), [skip(1)])
    log.note(keys(3), [skip(1), skip(2, "größer als “alles”")])  # a later epoch meets the first again
    SkipLog(path, 1.0).note(keys(4), [skip(2), skip(3)])  # and so does a resumed run
    log.note(keys(4), [skip(3)])  # while another process wrote
    assert records(path) == [
        {"source": "a", "id": "id1", "where": "a.json:row 1", "reason": "truncated"},
        {"source": "a", "id": "id2", "where": "a.json:row 2", "reason": "größer als “alles”"},
        {"source": "a", "id": "id3", "where": "a.json:row 3", "reason": "truncated"},
    ]
    assert len(log.skipped) == 3


def test_a_line_torn_by_a_kill_is_removed_and_written_again(tmp_path):
    path = tmp_path / "skipped.jsonl"
    SkipLog(path, 1.0).note([], [skip(0), skip(1)])
    path.write_bytes(path.read_bytes()[:-10])
    SkipLog(path, 1.0).note([], [skip(1), skip(2)])
    assert [record["id"] for record in records(path)] == ["id0", "id1", "id2"]


def _write(path, start):
    log = SkipLog(path, 1.0)
    for i in range(start, start + 40):
        log.note([], [skip(i % 60)])


def test_processes_share_the_file(tmp_path):
    path = tmp_path / "skipped.jsonl"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write, args=(path, start)) for start in (0, 15, 30)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert sorted(record["id"] for record in records(path)) == sorted(f"id{i}" for i in range(60))


def test_above_the_share_the_run_stops_and_says_why(tmp_path):
    path = tmp_path / "skipped.jsonl"
    log = SkipLog(path, 0.05)
    log.note(keys(CHECK_FROM - 1), [skip(0), skip(1)])  # too few to judge
    with pytest.raises(
        TooManySkippedError, match=r"2 of the 20 records .*\(10.0%\)[^$]*5.0%[^$]*row 0: truncated"
    ) as e:
        log.note(keys(CHECK_FROM), [])
    assert str(path) in str(e.value)
    assert len(records(path)) == 2
    assert "2 x truncated" in log.summary()


def test_a_share_is_not_diluted_or_inflated():
    exactly = SkipLog(None, 0.05)
    exactly.note(keys(40), [skip(0), skip(1)])  # 5 % is not above 5 %
    for _ in range(100):
        exactly.note(keys(40), [skip(0), skip(1)])  # nor is it after a hundred epochs
    planned = SkipLog(None, 0.05)
    planned.note(keys(1000), [], when="plan")
    with pytest.raises(TooManySkippedError, match="3 of the 30"):
        planned.note(keys(30), [skip(0), skip(1), skip(2)])
    with pytest.raises(TooManySkippedError):
        SkipLog(None, 0.0).note(keys(20), [skip(3)])
    SkipLog(None, 1.0).note(keys(20), [skip(i) for i in range(20)])


def test_rows_carry_what_was_read_and_skipped_through_pickling():
    sample = Encoded(torch.tensor([1, 2]), torch.tensor([1, 2]))
    row = pickle.loads(pickle.dumps(Row([sample], keys(2), [skip(1)])))
    assert isinstance(row, list) and len(row) == 1
    assert (row.read, row.skipped) == (keys(2), [skip(1)])
    log = SkipLog(None, 1.0)
    log.note_rows([row])
    assert list(log.skipped) == [skip(1).key]
