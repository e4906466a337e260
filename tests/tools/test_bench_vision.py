"""The vision benchmark runs every part on small shapes; each part refuses results that are not the reference's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tools import bench_vision


def test_every_part_gives_what_its_reference_gives(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "vision.json"
    bench_vision.main(["--quick", "--repeats", "1", "--json", str(path)])
    found = json.loads(path.read_text())
    assert found.keys() == bench_vision.PARTS.keys()
    assert found["native"]["difference"] < 1e-4 and found["native"]["padding"] > 0.5
    assert found["clusters"]["difference"] < 1e-4
    assert len(found["preprocess"]["ways"]) == 7
    assert all(row["difference"] < 0.02 for row in found["preprocess"]["ways"].values())
    assert all(result["ratio"] > 0 for result in found.values())
    printed = capsys.readouterr().out
    assert "native: " in printed and "preprocess, native: smart: " in printed


def test_results_that_differ_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    merged, plain_pad, padded = bench_vision.merged, bench_vision.plain_pad, bench_vision.padded
    monkeypatch.setattr(bench_vision, "merged", lambda x: merged(x) + 0.01)
    with pytest.raises(ValueError, match="clusters: the two ways differ"):
        bench_vision.clusters(1, True)
    monkeypatch.setattr(bench_vision, "plain_pad", lambda picture, side: plain_pad(picture, side)[..., ::-1].copy())
    with pytest.raises(ValueError, match="preprocess, pad: the two ways differ"):
        bench_vision.preprocess(1, True)
    monkeypatch.setattr(bench_vision, "padded", lambda *args: padded(*args).roll(1, 0))
    with pytest.raises(ValueError, match="native: the two ways differ"):
        bench_vision.native(1, True)


def test_the_loop_over_pictures_is_the_published_example() -> None:
    points = [[(0, 0), (0, 1), (1, 0.2), (5, 5), (5.5, 5.2), (9, 0), (9.3, 0.4), (8.6, 0.1)]]
    assert bench_vision.clustered(torch.tensor(points), 3, 3).tolist() == [[1, 1, 2, 2, 0, 0, 0, 0]]
