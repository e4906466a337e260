"""The packing benchmark runs all three ways and counts what they trained on."""

from __future__ import annotations

import json
import sys

import pytest

from tools import bench_packing


def test_the_mixes_are_what_they_say() -> None:
    even, varied, skewed = (bench_packing.lengths(mix, 500, seed=0) for mix in bench_packing.MIXES)
    assert min(even) >= 180 and max(even) <= 220
    assert min(varied) >= 16 and max(varied) <= 900
    short = sum(n <= 64 for n in skewed)
    assert 420 <= short <= 480 and sum(n >= 600 for n in skewed) == 500 - short


@pytest.mark.slow
def test_all_ways_run(tmp_path, monkeypatch, capsys) -> None:
    path = tmp_path / "packing.json"
    given = f"--records 60 --width 64 --layers 1 --tokens 1200 --repeats 1 --mixes skewed --json {path}"
    monkeypatch.setattr(sys, "argv", ["bench_packing.py", *given.split()])
    bench_packing.main()
    results = json.loads(path.read_text())["skewed"]
    assert set(results) == set(bench_packing.WAYS)
    assert results["packed"]["padding"] == 0 < results["padded"]["padding"]
    assert "packed" in capsys.readouterr().out
