"""Every usable sample is trained on exactly once an epoch, every other is named; the order hangs on the seed alone."""

from __future__ import annotations

import json
import multiprocessing
from collections import Counter
from pathlib import Path

import pytest
from torch.utils.data import DataLoader

from sparsevlm.data import dataset as dataset_module
from sparsevlm.data import measuring
from sparsevlm.data.collate import Collator
from sparsevlm.data.dataset import StageData
from sparsevlm.data.skips import Row, TooManySkippedError
from sparsevlm.recipe.schema import Source
from tests.data.fakes import encode, measure, stage, text_row, write_texts
from tests.data.media_files import encoded, picture, write_video
from tests.data.test_media import hollow_png


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    monkeypatch.setattr(dataset_module, "WINDOW", 32)


def plan(sources, given, packed=True, seed=0, **options) -> StageData:
    return StageData(sources, given, measure, encode, packed=packed, seed=seed, **options)


def ids(rows) -> list[list[str]]:
    return [[sample.sample_id for sample in row] for row in rows]


def counts(rows) -> Counter[str]:
    return Counter(name for row in ids(rows) for name in row)


@pytest.fixture
def texts(tmp_path):
    return {"a": write_texts(tmp_path / "a.jsonl", 100), "b": write_texts(tmp_path / "b.jsonl", 10)}


# --- what is in the rows --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("epochs", [1, 2])
def test_an_epoch_is_every_sample_once(packed, epochs, texts):
    data = plan(texts, stage(("a", "b"), epochs=epochs), packed)
    rows = list(data)
    assert len(rows) == len(data) == data.num_steps * 4
    expected = {f"a/{i}": epochs for i in range(100)} | {f"b/{i}": epochs for i in range(10)}
    assert counts(rows) == expected
    assert data.num_samples == 110 * epochs
    for row in rows:
        assert sum(sample.length for sample in row) <= 32
        assert packed or len(row) <= 1


def test_half_an_epoch(texts):
    seen = counts(plan(texts, stage(epochs=0.5)))
    assert len(seen) == seen.total() == 50
    seen = counts(plan(texts, stage(epochs=1.5)))
    assert seen.total() == 150 and set(seen.values()) == {1, 2}


@pytest.mark.parametrize("packed", [True, False])
def test_steps_are_filled_from_as_many_samples_as_it_takes(packed, texts):
    data = plan(texts, stage(steps=50), packed)
    assert (data.num_steps, len(data)) == (50, 200)
    rows = list(data)
    assert all(rows)
    seen = counts(rows)
    assert max(seen.values()) - min(seen.values()) <= 2  # as whole passes are; one more where the last window is cut


def test_packing_fills_rows(texts):
    data = plan(texts, stage(("a",), batch={"max_length": 64}))
    lengths = [sum(sample.length for sample in row) for row in data if row]
    assert sum(lengths) / (64 * len(lengths)) > 0.8
    singles = plan(texts, stage(("a",), batch={"max_length": 64}), packed=False)
    assert len(singles) > 3 * len(data)


def test_the_visual_budget(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(picture()))
    rows = [{"id": i, "image": "a.png", "text": "x"} for i in range(12)]
    rows[3]["image"] = ["a.png", "a.png", "a.png"]  # 24 visual tokens
    (tmp_path / "a.json").write_text(json.dumps(rows))
    source = {"a": Source(path=str(tmp_path / "a.json"), format="caption")}
    given = stage(batch={"max_length": 60, "max_visual_tokens": 16, "max_skipped_share": 1.0})
    data = plan(source, given)
    for row in data:
        assert sum(sample.num_visual_tokens for sample in row) <= 16
    assert [skip.id for skip in data.skips.skipped.values()] == ["3"]
    assert "24 visual tokens, a row takes 16" in next(iter(data.skips.skipped.values())).reason
    assert counts(data).total() == 11
    assert counts(plan(source, given, packed=False)).total() == 12  # a second budget is one of packs


@pytest.mark.parametrize("rows", [1, 4, 5])
def test_unpacked_steps_hold_samples_of_like_length(rows, texts):
    grouped = plan(texts, stage(batch={"rows": rows}), packed=False)
    apart = plan(texts, stage(batch={"rows": rows, "group_by_length": False}), packed=False)

    def padding(data) -> int:
        lengths = [[sample.length for row in step for sample in row] for step in steps(data, rows)]
        return sum(max(step) * len(step) - sum(step) for step in lengths)

    def steps(data, size):
        read = list(data)
        return [read[i : i + size] for i in range(0, len(read), size)]

    assert counts(grouped) == counts(apart)
    assert padding(grouped) <= padding(apart) / (1 if rows == 1 else 2)


def test_mixtures_by_weight(texts):
    data = plan(texts, stage({"a": 1.0, "b": 3.0}, mixture={"sampling": "weight"}, steps=16), packed=False)
    sources = Counter(name.split("/")[0] for row in ids(data) for name in row)
    assert sources.total() == 64  # two whole windows
    assert abs(sources["b"] - 48) <= 2
    by_epoch = plan(texts, stage(("a", "b"), mixture={"sampling": "sqrt_size"}, epochs=1), packed=False)
    sources = Counter(name.split("/")[0] for row in ids(by_epoch) for name in row)
    assert sources.total() == 110
    assert abs(sources["a"] - 110 * 10 / (10 + 10**0.5)) <= 2


# --- the order ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [True, False])
def test_the_order_hangs_on_the_seed_alone(packed, texts):
    given = stage(("a", "b"), epochs=2)
    first, again, other = (plan(texts, given, packed, seed) for seed in (0, 0, 1))
    assert ids(first) == ids(again)
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert ids(first) != ids(other)
    epochs = ids(plan(texts, stage(epochs=1), packed)), ids(plan(texts, stage(epochs=2), packed))
    assert epochs[1][: len(epochs[0]) // 2] == epochs[0][: len(epochs[0]) // 2]
    assert epochs[1] != epochs[0] * 2


def test_any_row_can_be_read_by_itself_and_first(texts):
    data = plan(texts, stage(steps=10))
    forwards = ids(data)
    assert ids(data[i] for i in reversed(range(len(data)))) == forwards[::-1]
    with pytest.raises(IndexError):
        data[len(data)]


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_workers_do_not_change_the_batches(workers, texts):
    data = plan(texts, stage(steps=8))
    loader = DataLoader(data, batch_size=2, num_workers=workers, collate_fn=list)
    assert [ids(rows) for rows in loader] == [ids([data[i], data[i + 1]]) for i in range(0, len(data), 2)]


def test_measuring_in_workers_gives_the_same_plan(texts, monkeypatch):
    alone = plan(texts, stage(("a", "b"), batch={"workers": 0}))
    monkeypatch.setattr(measuring, "PARALLEL_FROM", 8)
    monkeypatch.setattr(measuring, "CHUNK", 5)
    together = plan(texts, stage(("a", "b"), batch={"workers": 2}))
    assert alone.fingerprint == together.fingerprint


def _plan_on_rank(rank: int, world: int, sources, given, folder) -> None:
    from torch import distributed

    distributed.init_process_group("gloo", f"file://{folder / 'store'}", rank=rank, world_size=world)
    measured = []

    def counting(sample, max_length):
        measured.append(sample.id)
        return measure(sample, max_length)

    data = StageData(sources, given, counting, encode, packed=True, seed=0, skipped_path=folder / "skipped.jsonl")
    (folder / f"{rank}.json").write_text(json.dumps([data.fingerprint, measured]))
    distributed.destroy_process_group()


def test_ranks_share_the_measuring_and_plan_the_same(texts, tmp_path):
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write('\n{"id": "torn"')
    context = multiprocessing.get_context("fork")
    given = stage(("a", "b"))
    ranks = [context.Process(target=_plan_on_rank, args=(rank, 2, texts, given, tmp_path)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
        assert process.exitcode == 0
    plans = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert plans[0][0] == plans[1][0] == plan(texts, given).fingerprint
    assert len(plans[0][1]) + len(plans[1][1]) == 110
    assert min(len(part) for _, part in plans) >= 50
    assert len((tmp_path / "skipped.jsonl").read_text().splitlines()) == 1


def test_planning_reads_no_pictures_and_measures_once(texts):
    measured = Counter()

    def counting(sample, max_length):
        measured[sample.source, sample.id] += 1
        return measure(sample, max_length)

    def never(sample, max_length):
        raise AssertionError

    data = StageData(texts, stage(("a",), epochs=3), counting, never, packed=True, seed=0)
    assert set(measured.values()) == {1} and len(measured) == 100
    assert data.length(data.draws(0)[0])[0] > 0


def test_the_last_step_is_filled_up_with_empty_rows(texts):
    data = plan(texts, stage(("b",), batch={"rows": 4}), packed=False)
    rows = list(data)
    assert [len(row) for row in rows] == [1] * 10 + [0] * 2
    assert (data.num_steps, rows[-1].read) == (3, [])
    assert Collator(0, packed=False)(rows[-1:])["labels"].tolist() == [[-100]]


# --- broken records -------------------------------------------------------------------------------------------------


def caption(i: int, image: str, **columns) -> dict:
    return {"id": f"r{i}", "image": image, "conversations": text_row(i)["conversations"], **columns}


@pytest.fixture
def broken(tmp_path) -> tuple[dict[str, Source], dict[str, str]]:
    """Sixty good records and one of every fault; returns the source and the reason of each broken one."""
    root = tmp_path / "media"
    root.mkdir()
    (tmp_path / "secret.png").write_bytes(encoded(picture()))
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    jpeg = encoded(picture(1, (64, 64)), "JPEG")
    (root / "good.jpg").write_bytes(jpeg)
    write_video(root / "good.mkv", 20)
    whole = (root / "good.mkv").read_bytes()
    files = {
        "truncated.jpg": (jpeg[: len(jpeg) // 2], "truncated"),
        "empty.jpg": (b"", "empty file"),
        "bomb.png": (hollow_png(20_000, 20_000), "bomb"),
        "text.jpg": (b"<html>", "not a picture"),
        "text.mkv": (b"<html>" * 50, "cannot be decoded as a video"),
        "cut.mkv": (whole[: len(whole) * 3 // 4], "video ends at"),
    }
    rows, reasons = [], {}
    for i in range(60):
        kind = ("image", "video", None)[i % 3]
        row = {"id": f"good{i}", "conversations": text_row(i)["conversations"]}
        if kind:
            row[kind] = {"image": "good.jpg", "video": "good.mkv"}[kind]
            row["conversations"][0]["value"] = f"<{kind}> {row['conversations'][0]['value']}"
        rows.append(row)
    for name, (content, reason) in files.items():
        (root / name).write_bytes(content)
        kind = "video" if name.endswith("mkv") else "image"
        turns = [{"from": "human", "value": f"<{kind}> x"}, {"from": "gpt", "value": "y"}]
        rows.append({"id": name, kind: name, "conversations": turns})
        reasons[name] = reason
    pictured = [{"from": "human", "value": "<image> x"}, {"from": "gpt", "value": "y"}]
    silent = [{"from": "human", "value": "x"}, {"from": "gpt", "value": "answer"}]
    for name, row, reason in [
        ("missing", {"image": "gone.jpg", "conversations": pictured}, "missing file 'gone.jpg'"),
        ("escape", {"image": "../secret.png", "conversations": pictured}, "leaves the media root"),
        ("link", {"image": "link.png", "conversations": pictured}, "leaves the media root"),
        ("absolute", {"image": str(tmp_path / "secret.png"), "conversations": pictured}, "not relative"),
        ("too many", {"image": "good.jpg", "conversations": silent}, "0 <image> placeholders in the text for 1 media"),
        ("too few", {"conversations": pictured}, "1 <image> placeholders in the text for 0 media"),
        ("too long", {"conversations": [{"from": "human", "value": "w " * 40}, silent[1]]}, "no target token"),
        ("mute", {"conversations": silent[:1]}, "no turn of the assistant"),
    ]:
        rows.append({"id": name, **row})
        reasons[name] = reason
    lines = [json.dumps(row) for row in rows]
    lines[30:30] = ['{"id": "torn", "conversations": [']
    reasons["30"] = "malformed row"  # a row that cannot be parsed is known by its number
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    return {"a": Source(path=str(tmp_path / "a.jsonl"), format="llava", media_root=str(root))}, reasons


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("workers", [0, 2])
def test_every_broken_record_is_named_and_all_others_are_trained_on_once(packed, workers, broken, tmp_path):
    sources, reasons = broken
    path = tmp_path / "run" / "skipped.jsonl"
    for epoch in range(2):  # a second run over the same file adds nothing
        given = stage(epochs=2, batch={"max_skipped_share": 0.5})
        data = plan(sources, given, packed, skipped_path=path)
        seen: Counter[str] = Counter()
        for rows in DataLoader(data, batch_size=2, num_workers=workers, collate_fn=list):
            assert all(isinstance(row, Row) for row in rows)
            data.skips.note_rows(rows)
            seen.update(counts(rows))
        assert seen == {f"a/good{i}": 2 for i in range(60)}, epoch
        records = [json.loads(line) for line in path.read_text().splitlines()]
        assert sorted(record["id"] for record in records) == sorted(reasons)
        for record in records:
            assert reasons[record["id"]] in record["reason"]
            assert record["source"] == "a" and record["where"].startswith("a.jsonl:line ")
        assert len(data.skips.skipped) == len(reasons)


def test_a_record_whose_encoding_is_longer_than_measured_does_not_burst_the_row(texts):
    def longer(sample, max_length):
        sample_encoded = encode(sample, max_length)
        if sample.id == "7":
            sample_encoded = encode(sample, None)
            sample_encoded.input_ids = sample_encoded.input_ids.repeat(20)
            sample_encoded.labels = sample_encoded.labels.repeat(20)
        return sample_encoded

    data = StageData(texts, stage(("a",)), measure, longer, packed=True, seed=0)
    rows = list(data)
    assert counts(rows) == {f"a/{i}": 1 for i in range(100) if i != 7}
    (skip,) = (skip for row in rows for skip in row.skipped)
    assert skip.id == "7" and "more than its header promised" in skip.reason


def test_too_many_broken_records_stop_the_run_before_it_starts(tmp_path):
    rows = [text_row(i) if i % 3 else {"id": i} for i in range(60)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    sources = {"a": Source(path=str(tmp_path / "a.json"), format="llava")}
    path = tmp_path / "skipped.jsonl"
    with pytest.raises(TooManySkippedError, match=r"11 of the 32 records .* 5\.0%[^$]*a\.json:row"):
        plan(sources, stage(), skipped_path=path)
    assert len(path.read_text().splitlines()) == 11  # those of the first window
    assert len(counts(plan(sources, stage(batch={"max_skipped_share": 0.5})))) == 40


@pytest.mark.parametrize("given", [{"steps": 5}, {"epochs": 1}])
@pytest.mark.parametrize(("count", "share"), [(10, 0.0), (50, 1.0)])
def test_nothing_usable_at_all(given, count, share, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"id": i} for i in range(count)]))
    sources = {"a": Source(path=str(tmp_path / "a.json"), format="llava")}
    with pytest.raises(ValueError, match=rf"none of the {count} records of a can be used: {count} records skipped"):
        plan(sources, stage(batch={"max_skipped_share": share}, **given))


def test_a_small_source_of_which_nothing_can_be_used_is_refused(texts, tmp_path):
    (tmp_path / "c.json").write_text(json.dumps([{"id": i, "image": "gone.png", "text": "x"} for i in range(25)]))
    sources = {**texts, "c": Source(path=str(tmp_path / "c.json"), format="caption")}
    with pytest.raises(ValueError, match=r"none of the \d+ records of data\.c .* missing file 'gone\.png'"):
        plan(sources, stage(("a", "c"), batch={"max_skipped_share": 0.9}))


def test_a_fault_of_ours_names_the_record_and_is_not_skipped(texts):
    def faulty(sample, max_length):
        raise ZeroDivisionError("ours")

    data = StageData(texts, stage(("a",)), measure, faulty, packed=True, seed=0)
    with pytest.raises(ZeroDivisionError) as error:
        data[0]
    assert any("a.jsonl:line" in note for note in error.value.__notes__)


def test_paths_start_from_the_base_directory(tmp_path, monkeypatch):
    write_texts(tmp_path / "a.jsonl", 5)
    monkeypatch.chdir("/")
    data = plan({"a": Source(path="a.jsonl", format="llava")}, stage(), base_dir=Path(tmp_path))
    assert data.num_samples == 5
