"""The survey of a sparse model's routing: counts against loops over tokens, files, and the command end to end."""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from sparsevlm.cli import main
from sparsevlm.data.sample import Encoded, Media, Message, Sample
from sparsevlm.eval import survey
from sparsevlm.eval.routing import Tally, _pictures, survey_routing
from sparsevlm.model.build import build_model
from sparsevlm.moe.metrics import MODALITIES, effective_share, expert_similarity, mean_cosine
from sparsevlm.moe.upcycle import upcycle_model
from sparsevlm.recipe.schema import Eval, Upcycle
from sparsevlm.vision.tokens import MediaKind
from tests import tiny

EXPERTS, LAYERS = 4, [0, 1, 2]


def test_transitions_and_pathways_equal_a_loop() -> None:
    rng = np.random.default_rng(0)
    first = rng.integers(-1, EXPERTS, (len(LAYERS), 300))  # a fifth has no choice
    modality = rng.integers(-1, 2, 300)  # no video
    moe = {"layers": LAYERS, "num_experts": EXPERTS, "num_experts_per_tok": 2}
    tally = Tally(moe)
    for part in (slice(None, 111), slice(111, None)):
        tally.add_first_choices(first[:, part], modality[part])
    transitions = np.zeros((3, len(LAYERS) - 1, EXPERTS, EXPERTS), dtype=int)
    pathways: list[Counter] = [Counter() for _ in MODALITIES]
    for token in range(300):
        kind, path = modality[token], first[:, token].tolist()
        if kind < 0:
            continue
        for layer in range(len(LAYERS) - 1):
            if path[layer] >= 0 and path[layer + 1] >= 0:
                transitions[kind, layer, path[layer], path[layer + 1]] += 1
        if min(path) >= 0:
            pathways[kind][tuple(path)] += 1
    assert (tally.transitions == transitions).all()
    for m in (0, 1):
        best = sorted(pathways[m].items(), key=lambda entry: (-entry[1], entry[0]))[:10]
        expected = [{"experts": list(path), "share": n / pathways[m].total()} for path, n in best]
        assert tally._commonest(m) == expected
    assert tally._commonest(2) == []


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A model of three MoE layers whose experts and routers differ."""
    parts = tiny.save_parts(tmp_path_factory.mktemp("deep"), num_hidden_layers=3)
    torch.manual_seed(0)
    model, processor = build_model(tiny.recipe_model(parts))
    spec: Any = Upcycle.model_validate({"layers": "all", "router": {"init_std": 1.0}})
    upcycle_model(model, spec)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".experts." in name:
                parameter.add_(0.02 * torch.randn_like(parameter))
    return model.eval(), processor


def sample(i: int) -> Sample:
    color = ("red", "green", "blue")[i % 3]
    media = {0: (), 1: (Media(MediaKind.IMAGE, tiny.picture(color)),), 2: (video(color),)}[i % 3]
    question = "what color is this ?" if i % 3 else "how many ?"
    return Sample((Message("user", (*media, question)), Message("assistant", (f"a {color} cat",))), id=str(i))


def video(color: str) -> Media:
    return Media(MediaKind.VIDEO, [tiny.picture(color)] * 2, fps=1.0)


def encoded(processor: Any, count: int) -> list[tuple[Encoded, str]]:
    return [(processor.encode(sample(i)), f"question {i}") for i in range(count)]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_survey_equals_a_loop_over_samples(sparse: tuple[Any, Any], batch_size: int) -> None:
    """Samples one by one without padding; float32 may round another way, so a near tie could differ: none does."""
    model, processor = sparse
    items = encoded(processor, 7)
    document, images = survey_routing(model, processor, iter(items), batch_size=batch_size, pictures=2)
    counts = {name: torch.zeros(3, EXPERTS) for name in ("all", *MODALITIES)}
    tokens: Counter[str] = Counter()
    transitions = {name: torch.zeros(2, EXPERTS, EXPERTS) for name in MODALITIES}
    shown = []
    for one, _ in items:
        media = {}
        if one.pixel_values is not None:
            media = {"pixel_values": one.pixel_values, "image_grid_thw": torch.tensor([list(g) for g in one.grids])}
        with torch.no_grad():
            outputs = model(input_ids=one.input_ids[None], **media, output_router_logits=True)
        order = [torch.argsort(x, dim=-1, descending=True, stable=True)[:, :2] for x in outputs.router_logits]
        for t, token in enumerate(one.input_ids.tolist()):
            kind = {processor.image_token_id: "image", processor.video_token_id: "video"}.get(token, "text")
            tokens[kind] += 1
            for layer in range(3):
                for expert in order[layer][t].tolist():
                    counts[kind][layer, expert] += 1
                    counts["all"][layer, expert] += 1
            for layer in range(2):
                transitions[kind][layer, order[layer][t, 0], order[layer + 1][t, 0]] += 1
        where = (one.input_ids == processor.image_token_id).nonzero()[:, 0]
        if len(where):
            shown.append([index[where, 0].tolist() for index in order])
    assert document["tokens"] == {name: tokens[name] for name in MODALITIES}
    assert document["samples"] == 7 and document["layers"] == [0, 1, 2]
    for name, count in counts.items():
        share = count / count.sum(-1, keepdim=True)
        torch.testing.assert_close(torch.tensor(document["load"][name]), share, rtol=0, atol=1e-6)
    for name, count in transitions.items():
        assert document["transitions"][name] == count.tolist()
        assert sum(entry["share"] for entry in document["pathways"][name]) <= 1 + 1e-5
    assert [entry["experts"] for entry in document["pictures"]] == shown[:2]
    assert [entry["grid"] for entry in document["pictures"]] == [[4, 4]] * 2
    assert [entry["text"] for entry in document["pictures"]] == ["question 1", "question 4"]
    similarity = torch.stack(expert_similarity(model))
    torch.testing.assert_close(torch.tensor(document["similarity"]).double(), similarity, rtol=0, atol=1e-6)
    assert [image.size for image in images] == [(32, 32)] * 2
    pixel = images[0].getpixel((16, 16))
    assert isinstance(pixel, tuple) and np.abs(np.array(pixel) - [0, 128, 0]).max() <= 1  # sample 1 is green


def test_a_dense_model_and_an_empty_set_are_refused(tiny_model: Any, sparse: tuple[Any, Any]) -> None:
    dense, processor = tiny_model
    with pytest.raises(ValueError, match="this model is dense"):
        survey_routing(dense, processor, [])
    with pytest.raises(ValueError, match="no sample"):
        survey_routing(sparse[0], processor, [])


def test_merged_tokens_have_no_place_in_a_picture(tiny_parts: dict[str, str]) -> None:
    connector = [{"type": "dpc_knn", "clusters": [4, 2]}, {"type": "mlp"}]
    _, processor = build_model(tiny.recipe_model(tiny_parts, connector=connector))
    assert list(_pictures(processor, processor.encode(sample(1)))) == []


def test_the_picture_after_a_video_is_found(sparse: tuple[Any, Any]) -> None:
    _, processor = sparse
    content = (video("red"), Media(MediaKind.IMAGE, tiny.picture("blue")), "what ?")
    both = processor.encode(Sample((Message("user", content), Message("assistant", ("a cat",)))))
    ((grid, where, pixels),) = _pictures(processor, both)
    assert (grid.h, grid.w) == (4, 4)
    assert (both.input_ids[where] == processor.image_token_id).all() and len(where) == 16
    assert torch.equal(pixels, both.pixel_values[2])


@pytest.fixture(scope="module")
def saved(sparse: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model and a question file on disk."""
    folder = tmp_path_factory.mktemp("saved")
    for part in sparse:
        part.save_pretrained(folder / "model")
    tiny.picture("red").save(folder / "red.png")
    rows = [
        {"image": "red.png", "question": "what color is it ?", "answer": "red"},
        {"question": "is it red ?", "answer": "yes"},
        {"image": "gone.png", "question": "what color is it ?", "answer": "red"},
    ]
    (folder / "q.json").write_text(json.dumps(rows))
    return folder


@pytest.mark.parametrize("output", ["out", "out/other.json"])
def test_the_command(saved: Path, tmp_path: Path, output: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out" / "routing").mkdir(parents=True)
    (tmp_path / "out" / "routing" / "picture_3.png").touch()  # of an earlier survey
    arguments = ["eval", str(saved / "model"), str(saved / "q.json"), "--task", "vqa", "--routing", "--device", "cpu"]
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "-o", str(tmp_path / output)])
    assert not ended.value.code
    file = tmp_path / "out" / ("routing.json" if output == "out" else "other.json")
    document = json.loads(file.read_text())
    assert document["format"] == 1 and document["samples"] == 2  # the third has no picture to read
    assert set(document["load"]) == {"all", "text", "image"}
    (picture,) = document["pictures"]
    assert picture["text"] == "what color is it ?" and picture["file"] == "routing/picture_0.png"
    assert len(picture["experts"]) == 3 and len(picture["experts"][0]) == 16
    assert Image.open(file.parent / picture["file"]).size == (32, 32)
    assert [path.name for path in (tmp_path / "out" / "routing").iterdir()] == ["picture_0.png"]
    said = capsys.readouterr().out
    assert "2 samples" in said and "commonest pathway of image tokens" in said


def test_the_command_refuses_what_it_does_not_do(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["eval", str(saved / "model"), str(saved / "q.json"), "--task", "vqa", "--routing"]
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--predictions", "p"])
    assert ended.value.code == 2
    assert "--routing generates no answers" in capsys.readouterr().err


def test_questions_are_spread_over_all_and_come_with_answers() -> None:
    spec = Eval.model_validate({"task": "scenes", "path": "sparsevlm:scenes", "options": {"n": 12}})
    every = survey.questions({"a": spec, "b": spec})
    some = survey.questions({"a": spec, "b": spec}, 6)
    assert len(every) == 24 and [sample.id for sample in some] == [sample.id for sample in every[::4]]
    assert all(sample.messages[-1].role == "assistant" and sample.messages[-1].text for sample in every)
    blind = spec.model_copy(update={"options": {"n": 12, "blind": True}})
    assert not any(list(sample.media()) for sample in survey.questions({"a": blind}))


def test_the_table_shows_the_numbers(sparse: tuple[Any, Any]) -> None:
    model, processor = sparse
    document, _ = survey_routing(model, processor, encoded(processor, 3))
    lines = printed(document)
    rows = [line.split() for line in lines if "%" in line and "cosine" not in line]
    for i, row in enumerate(rows[:3]):
        load = " ".join(f"{100 * share:2.0f}" for share in document["load"]["all"][i])
        balance = f"{effective_share(document['load']['all'][i]):.2f}"
        assert " ".join(row).startswith(" ".join([str(i), "all", *load.split(), balance]) + " ")
        assert row[-1] == f"{mean_cosine(torch.tensor(document['similarity'][i])):.4f}"
    assert sum(line.split()[:1] == ["video"] for line in lines) == 3
    assert any(line.startswith("commonest pathway of image tokens: ") for line in lines)


def test_many_experts_are_drawn() -> None:
    """Ten experts: fair is 0.1, half a block."""
    assert survey._load([0.3, 0.2, 0.15, 0.1, 0.1, 0.1, 0.04, 0.009, 0.001, 0.0]) == "██▆▄▄▄▂▁▁ "


def test_copies_are_named(sparse: tuple[Any, Any]) -> None:
    model, processor = sparse
    document, _ = survey_routing(model, processor, encoded(processor, 1))
    assert not any("copies" in line for line in printed(document))
    cosines = document["similarity"][1]
    for a, b in ((0, 2), (1, 3)):
        cosines[a][b] = cosines[b][a] = 1.0
    assert survey.copies(cosines) == [[0, 2], [1, 3]]
    found = [line for line in printed(document) if "copies" in line]
    assert found == [f"layer 1: experts {pair} are still copies of one another" for pair in ("0, 2", "1, 3")]


def test_a_narrow_terminal_cuts_no_number(sparse: tuple[Any, Any]) -> None:
    document, _ = survey_routing(*sparse, encoded(sparse[1], 2))
    wide = [line.rstrip() for line in printed(document)]
    assert [line.rstrip() for line in printed(document, width=80)] == wide, "four experts fit into a usual terminal"
    rows = [line.split() for line in wide if " all " in line]
    assert rows
    assert [line.split() for line in printed(document, width=40) if " all " in line] == rows


def printed(document: dict[str, Any], width: int = 100) -> list[str]:
    out = io.StringIO()
    survey.print_survey(document, Console(file=out, width=width))
    return out.getvalue().splitlines()
