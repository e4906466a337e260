"""The page: stands by itself, shows what is there and nothing else, says the numbers of the files, trusts no text."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from sparsevlm.cli import main
from sparsevlm.report.page import make_sections, write_report
from sparsevlm.report.read import read_run
from sparsevlm.report.sections import accuracy_table, count, duration, training_time
from tests.report.fixtures import write_routing, write_run

PNG = b"\x89PNG\r\n\x1a\n"


class Page(HTMLParser):
    """Collects what a page links to, its headings and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.tags: set[str] = set()
        self.headings: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self._open.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action", "data")]
        assert not any(name.startswith("on") for name, _ in attrs)

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if "style" in self._open:
            assert "url(" not in data and "@import" not in data
            return
        if self._open and self._open[-1] in ("h2", "h3"):
            self.headings.append(data)
        self.text += f"{data}\n"


def page_of(root: Path) -> Page:
    return Page(write_report(root).page.read_text(encoding="utf-8"))


def titles(root: Path) -> tuple[list[str], list[str], str]:
    """Return the titles of sections, the names of plots, and all notes."""
    sections = make_sections(read_run(root))
    names = [plot.name for section in sections for plot in section.plots]
    return [section.title for section in sections], names, " ".join(note for s in sections for note in s.notes)


def test_a_page_stands_by_itself(tmp_path: Path) -> None:
    root = write_run(tmp_path / "run", steps=20, layers=2)
    written = write_report(root, png=tmp_path / "png")
    assert written.page == root / "report.html" and not list(root.glob(".*"))
    page = Page(written.page.read_text(encoding="utf-8"))
    assert page.tags.isdisjoint({"script", "link", "iframe", "object", "embed", "form", "base"})
    images = [link for link in page.links if link.startswith("data:image/png;base64,")]
    assert len(images) == written.plots == 12
    assert all(link in images or re.fullmatch(r"#[\w.-]+", link) for link in page.links)
    drawn = {base64.b64decode(image.partition(",")[2]) for image in images}
    assert drawn == {file.read_bytes() for file in (tmp_path / "png").iterdir()}
    assert all(data.startswith(PNG) for data in drawn)
    for word in ("Stages", "Loss", "Accuracy", "Throughput", "Learning rates", "Routing in moe", "Token pathways"):
        assert word in page.headings
    assert '"name": "made-up"' in page.text  # the recipe


def test_a_complete_sparse_run_has_everything(tmp_path: Path) -> None:
    sections, names, notes = titles(write_run(tmp_path / "run", steps=20, layers=2))
    assert sections == [
        *("Stages", "Loss", "Accuracy", "Throughput", "Learning rates"),
        *("Routing in moe", "Versions"),
    ]
    routing = ["balance", "load_over_time", "health", "load", "by_layer", "similarity", "pathways", "picture_0"]
    assert [name.removeprefix("moe_") for name in names if name.startswith("moe_")] == routing
    assert "2 MoE layers of 4 experts, 2 for each token; the fair share of an expert is 25.0 %." in notes
    assert "appear" not in notes


def test_a_dense_run_has_no_routing(tmp_path: Path) -> None:
    sections, names, _ = titles(write_run(tmp_path / "run", stages=("align", "instruct"), sparse=(), steps=20))
    assert not any("Routing" in title for title in sections)
    assert names == ["loss", "accuracy", "throughput", "learning_rates"]


def test_a_run_in_progress_says_what_will_appear(tmp_path: Path) -> None:
    root = write_run(tmp_path / "run", stages=("align", "instruct", "moe"), running=True, steps=40)
    sections, names, notes = titles(root)
    assert "Routing in moe" in sections and {"moe_balance", "moe_load"} <= set(names)
    assert not {"moe_pathways", "moe_similarity", "moe_picture_0"} & set(names)
    assert "appear when the stage is complete" in notes and "moe is not complete: step 20 of 40" in notes
    page = page_of(root)
    assert "run in progress" in page.text
    (root / "moe" / "metrics.jsonl").write_text('{"step": 1, "lo')  # nothing whole yet
    assert "No log line holds routing numbers yet" in titles(root)[2]
    (root / "moe" / "metrics.jsonl").unlink()
    sections, names, notes = titles(root)
    assert "Not started: moe." in notes and not any("moe" in name for name in [*sections, *names])


def test_nothing_trained_yet(tmp_path: Path) -> None:
    root = write_run(tmp_path / "run", stages=("align",), sparse=(), running=True)
    (root / "align" / "metrics.jsonl").unlink()
    assert titles(root) == (["Stages"], [], "Not started: align.")
    assert "run in progress" in page_of(root).text


def test_runs_of_older_versions(tmp_path: Path) -> None:
    _, names, notes = titles(write_run(tmp_path / "run", old=True, steps=20, layers=2))
    assert [name for name in names if "moe" in name] == ["moe_balance", "moe_load_over_time", "moe_health", "moe_load"]
    assert "There is no routing.json" in notes


def test_one_layer_and_a_folder_with_routing_alone(tmp_path: Path) -> None:
    write_routing(tmp_path / "survey", layers=1, experts=4, top_k=2, kinds=("text", "image", "video"))
    sections, names, notes = titles(tmp_path / "survey")
    assert sections == ["Stages", "Routing in survey"]
    assert "survey_load" in names and "survey_pathways" not in names
    assert "Pathways need two layers with experts; there is one." in notes


def test_the_tables_say_what_the_files_say(tmp_path: Path) -> None:
    root = write_run(tmp_path / "run", steps=20, layers=2, dropped=True)
    routing = json.loads((root / "moe" / "routing.json").read_text())
    summary = json.loads((root / "summary.json").read_text())["stages"]
    sections = {section.title: section for section in make_sections(read_run(root))}
    for row, said in zip(sections["Stages"].tables[0].rows, summary, strict=True):
        total = said["parameters"]["total"]
        assert row[:4] == [said["name"], "complete", ", ".join(said["trains"]), f"{total / 1e6:.3g}M"]
        assert row[4:] == [
            "65.8k",
            "1.15M",
            "20",
            f"{said['loss_first']:.2f} → 0.62",
            f"{said['seconds']:.0f} s",
            "8.56k",
        ]
    layers, paths = sections["Routing in moe"].tables
    for i, row in enumerate(layers.rows):
        cells = dict(zip(layers.header, row, strict=True))
        assert cells["layer"] == str(routing["layers"][i]) and cells["dropped"] == "3.0 %"
        assert cells["max violation"] == f"{routing['max_violation'][i]:.3f}" and cells["dead experts"] == "0"
        assert cells["entropy (image)"] == f"{routing['entropy']['image'][i]:.3f}"
        pairs = [routing["similarity"][i][a][b] for a in range(4) for b in range(4) if a != b]
        assert cells["similarity"] == f"{sum(pairs) / 12:.3f}"
    said = [
        [kind, " → ".join(map(str, path["experts"])), f"{100 * path['share']:.1f} %"]
        for kind, found in routing["pathways"].items()
        for path in found
    ]
    assert paths.rows == said


def test_accuracy_over_core_questions_is_a_mean_over_questions(tmp_path: Path) -> None:
    root = write_run(tmp_path / "run", stages=("align",), sparse=(), steps=20)
    file = root / "align" / "stage.json"
    record = json.loads(file.read_text())
    record["summary"]["eval"] = {
        "a": {"accuracy": 1.0, "chance": 0.5, "n": 30, "core": True},
        "b": {"accuracy": 0.0, "chance": 0.1, "n": 10, "core": True},
        "c": {"accuracy": 0.0, "chance": 0.0, "n": 99, "core": False},
    }
    file.write_text(json.dumps(record))
    rows = accuracy_table(read_run(root).stages).rows
    assert rows[-1] == ["all core questions", "40", "40.0 %", "75.0 %"]
    assert [row[0] for row in rows] == ["a", "b", "c (not core)", "all core questions"]


def test_speed_of_a_run_in_progress_is_that_of_its_lines() -> None:
    rows = [{"tokens": 100, "tokens_per_second": 50.0}, {"tokens": 300, "tokens_per_second": 100.0}, {"tokens": 5}]
    assert training_time(rows) == (5.0, 80.0) and training_time([]) == (None, None)
    assert [count(n) for n in (950, 1234, 2.78e9, None)] == ["950", "1.23k", "2.78B", "–"]
    assert [duration(s) for s in (41.2, 900, 12240, None)] == ["41 s", "15 min", "3.4 h", "–"]


def test_texts_of_files_are_no_html(tmp_path: Path) -> None:
    evil = "</p><script>alert(1)</script><img src=http://example.org/x> $\\frac{"
    root = write_run(tmp_path / "run", stages=("moe",), steps=5, layers=1, question=evil)
    (root / "moe" / "skipped.jsonl").write_text(json.dumps({"reason": evil}) + "\n")
    record = json.loads((root / "moe" / "stage.json").read_text())
    record["versions"][evil] = evil
    record["summary"]["trains"] = [evil]
    record["summary"]["eval"][evil] = {"accuracy": 0.5, "chance": 0.5, "n": 1, "core": True}
    (root / "moe" / "stage.json").write_text(json.dumps(record))
    recipe = json.loads((root / "recipe.yaml").read_text())
    (root / "recipe.yaml").write_text(json.dumps({**recipe, "name": evil}))
    page = page_of(root)
    assert "script" not in page.tags and not any(link.startswith("http") for link in page.links)
    assert page.text.count("<script>alert(1)</script>") == 7  # question, reason, version twice, part, kind, recipe


def test_skipped_records_and_faults_are_told(tmp_path: Path) -> None:
    root = write_run(tmp_path / "run", stages=("align",), sparse=(), steps=5)
    assert "Skipped records" not in titles(root)[0]
    (root / "align" / "skipped.jsonl").write_text('{"reason": "no such file"}\n' * 3)
    (root / "align" / "routing.json").write_text("{")
    page = page_of(root)
    assert "Skipped records" in page.headings and "no such file" in page.text and "align 3." in page.text
    assert "Could not be read" in page.text and "not JSON" in page.text


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_run(tmp_path / "run", stages=("align",), sparse=(), steps=5)
    (root / "align" / "routing.json").write_text("{")

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(["report", *arguments])
        return int(ended.value.code or 0), *capsys.readouterr()

    target = tmp_path / "new" / "page.html"
    code, out, err = run(str(root), "-o", str(target), "--png", str(tmp_path / "png"))
    assert (
        code == 0
        and out == f"wrote {target} (4 plots)\n"
        and target.is_file()
        and len(list((tmp_path / "png").iterdir())) == 4
    )
    assert "could not be read" in err and "routing.json" in err
    code, _, err = run(str(tmp_path / "nowhere"))
    assert code == 2 and "no such run directory" in err
    code, _, err = run(str(root), "-o", str(tmp_path))
    assert code == 2 and "is a directory" in err


def test_help_imports_nothing_heavy() -> None:
    code = """
import sys
from sparsevlm.cli import main
try:
    main(["report", "--help"])
finally:
    print("HEAVY", [name for name in ("torch", "transformers", "numpy", "matplotlib", "jinja2") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "Usage: sparsevlm report" in done.stdout and "HEAVY []" in done.stdout, done.stderr


def test_a_report_needs_no_torch(tmp_path: Path) -> None:
    root = write_run(tmp_path / "run", stages=("align",), sparse=(), steps=5)
    code = f"""
import sys
from sparsevlm.report.page import write_report
write_report({str(root)!r})
print("HEAVY", [name for name in ("torch", "transformers") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "HEAVY []" in done.stdout, done.stdout + done.stderr
