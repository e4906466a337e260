"""`hub:` in a recipe: runs that upload to a Hub on loopback while they train, whatever that does."""

from __future__ import annotations

import io
import json
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from rich.console import Console
from safetensors.torch import load_file

from sparsevlm.model.build import load_model
from sparsevlm.recipe.load import RecipeError, load_recipe
from sparsevlm.train import hub_push
from sparsevlm.train import hub_snapshots as snapshots
from sparsevlm.train.checkpoints import mark_complete
from sparsevlm.train.fingerprint import stage_inputs
from sparsevlm.train.hub_push import HubPusher, check_hub
from sparsevlm.train.launch import train
from sparsevlm.train.plan import plan, print_plan
from tests.export.hub_server import GOOD, READER, Hub, environment_of
from tests.train.runs import metrics, write_recipe
from tests.train.test_launch import COMPARED, killed, on_step

REPO = "me/run"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub that this process and those it starts know; failed uploads are tried again at once."""
    with Hub() as server:
        for name, value in (environment_of(server, tmp_path) | {"HF_HUB_OFFLINE": "0"}).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        monkeypatch.setattr(hub_push, "FIRST_PAUSE", 0.1)
        monkeypatch.setattr(hub_push, "POLL", 0.05)
        yield server


def recipe_file(directory: Path, parts: dict[str, str], hub: dict[str, Any] | None = None, **changes: Any) -> Path:
    return write_recipe(directory, parts, hub={"repo": REPO, "wait": 200, **(hub or {})}, **changes)


def of_stage(server: Hub, branch: str) -> dict[str, bytes]:
    return server.files(REPO, branch)


def messages(server: Hub) -> list[str]:
    return server.repos[REPO].messages[1:] if REPO in server.repos else []


# ---- whole runs ------------------------------------------------------------------------------------------------------


def test_a_run_through_a_bad_hour_of_the_hub(
    tiny_parts: dict[str, str], server: Hub, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Two stages, checkpoints on the way; 401, 429, 503 and broken connections meanwhile. Training is what it was."""
    recipe = recipe_file(tmp_path, tiny_parts, {"every": 2, "license": "mit"})
    server.fail("POST", "/commit/", 401, times=1)
    server.fail("POST", "/commit/", 429, times=1, headers={"Retry-After": "1"})
    server.fail("POST", "/commit/", 503, times=1)
    server.fail("PUT", "/objects/", 0, times=2)
    train(recipe)
    told = capfd.readouterr().err
    assert "was not uploaded: the Hub does not know the token (401)" in told
    assert "NOT on the Hub" not in told
    assert GOOD not in told
    assert all(fault.times == 0 for fault in server.faults)
    run = tmp_path / "run"
    assert server.repos[REPO].private
    for branch, stage in (("align", "align"), ("moe", "moe"), ("main", "moe")):
        files = of_stage(server, branch)
        assert files["model.safetensors"] == (run / stage / "model.safetensors").read_bytes()
        assert {"README.md", "config.json", "processor_config.json", "recipe.yaml", "metrics.jsonl"} <= set(files)
        assert not [name for name in files if "optimizer" in name or "checkpoint" in name or "stage.json" in name]
        at = "" if branch == "main" else f', revision="{branch}"'
        assert f'from_pretrained("me/run"{at}, dtype="auto")' in files["README.md"].decode()
    assert messages(server)[-2:] == ["Stage moe", "Stage moe"]
    assert not list(run.glob("*/hub"))

    plain = write_recipe(tmp_path / "plain", tiny_parts)
    train(plain)
    for stage in ("align", "moe"):
        assert metrics(run, stage, *COMPARED) == metrics(tmp_path / "plain" / "run", stage, *COMPARED)
        one, two = (load_file(base / stage / "model.safetensors") for base in (run, tmp_path / "plain" / "run"))
        assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())

    before = len(server.requests)
    train(recipe)  # nothing is missing: beside the look at the start nothing is asked
    assert not [row for row in server.requests[before:] if "/commit/" in row[1] or "/tree/" in row[1]]


def test_a_hub_that_hangs_holds_up_no_step(
    tiny_parts: dict[str, str], server: Hub, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The Hub answers no upload before the run has ended, and the run ends with every step, and says what to do."""
    server.fail("PUT", "/objects/", 200, times=10**6, hang=True)
    train(recipe_file(tmp_path, tiny_parts, {"every": 2, "wait": 0.5}))
    run = tmp_path / "run"
    assert [row for (row,) in metrics(run, "moe", "step")] == [1, 2, 3, 4, 5, 6]
    assert not server.answer.is_set()
    assert not server.objects
    told = capfd.readouterr().err
    assert "waiting for the upload of stage align, stage moe, 0.5 s at most" in told
    assert f"sparsevlm push {run / 'align'} me/run --revision align --private" in told
    assert f"sparsevlm push {run / 'moe'} me/run --revision moe --private" in told
    assert f"sparsevlm push {run / 'moe'} me/run --private" in told
    assert not [thread for thread in threading.enumerate() if thread.name == "hub"]


def test_a_killed_run_uploads_what_was_missing_when_it_is_started_again(
    tiny_parts: dict[str, str], server: Hub, tmp_path: Path
) -> None:
    recipe = recipe_file(tmp_path, tiny_parts, {"every": 2})
    server.fail("POST", "/commit/", 403, times=10**6)
    assert killed(recipe, on_step(5, "moe")) == signal.SIGKILL
    run = tmp_path / "run"
    assert messages(server) == []
    assert (run / "align" / "COMPLETE").is_file()
    assert not (run / "moe" / "COMPLETE").is_file()
    left = [path for kind in ("pushing", "step") for _, path in snapshots.found(run / "moe", kind)]
    load_model(left[-1])  # a whole model, whatever became of its upload
    server.faults.clear()
    train(recipe, ["hub.license=mit"])  # other settings of the Hub are no other stage
    for branch, stage in (("align", "align"), ("moe", "moe"), ("main", "moe")):
        assert of_stage(server, branch)["model.safetensors"] == (run / stage / "model.safetensors").read_bytes()
    assert b"license: mit" in of_stage(server, "align")["README.md"]


@pytest.mark.slow
def test_adapter_stages_name_the_stage_before(tiny_parts: dict[str, str], server: Hub, tmp_path: Path) -> None:
    """`adapter_only` after a full stage; and, where the adapter has no stage before it, its base on a branch."""
    from tests.train.test_adapter_stage import recipe_of

    file = recipe_of(tmp_path, tiny_parts, only=["align"])
    document = json.loads(file.read_text()) | {"hub": {"repo": REPO, "adapter_only": True, "wait": 200}}
    file.write_text(json.dumps(document))
    train(file)
    parent = json.loads(of_stage(server, "lora")["parent.json"])
    assert parent["hub"]["repo"] == REPO
    commit = server.repos[REPO].commits[parent["hub"]["revision"]]
    assert "model.safetensors" in commit
    assert "model.safetensors" not in of_stage(server, "lora")

    alone = tmp_path / "alone"
    alone.mkdir()
    document["stages"].pop("align")
    document |= {"output": str(alone / "run"), "hub": {"repo": "me/alone", "adapter_only": True, "wait": 200}}
    (alone / "recipe.json").write_text(json.dumps(document))
    train(alone / "recipe.json")
    parent = json.loads(server.files("me/alone", "lora")["parent.json"])
    assert parent["hub"]["revision"] == server.repos["me/alone"].branches["lora-base"]


@pytest.mark.slow
def test_two_processes_write_one_snapshot(
    tiny_parts: dict[str, str], server: Hub, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The launching process uploads what rank 0 writes; no snapshot fails for the other rank."""
    server.fail("POST", "/commit/", 403, times=10**6)
    train(recipe_file(tmp_path, tiny_parts, {"every": 2, "wait": 30}, only=["align"]), nproc=2)
    told = capfd.readouterr().err
    assert "was not written" not in told
    assert "stage align is NOT on the Hub" in told
    server.faults.clear()
    train(tmp_path / "recipe.json", nproc=2)
    written = (tmp_path / "run" / "align" / "model.safetensors").read_bytes()
    assert of_stage(server, "main")["model.safetensors"] == of_stage(server, "align")["model.safetensors"] == written


# ---- the uploader ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tiny_parts: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a run of two short stages."""
    directory = tmp_path_factory.mktemp("finished")
    torch.set_num_threads(1)
    train(write_recipe(directory, tiny_parts, stage={"steps": 1}))
    return directory


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished / "run", tmp_path / "run"))


class Told(Console):
    """A console that keeps what it is told."""

    def __init__(self) -> None:
        super().__init__(file=io.StringIO(), width=1000)

    @property
    def text(self) -> str:
        """All of it."""
        assert isinstance(self.file, io.StringIO)
        return self.file.getvalue()


def pusher(finished: Path, run: Path, server: Hub, *overrides: str) -> HubPusher:
    recipe = load_recipe(finished / "recipe.json", [f"hub.repo={REPO}", *overrides])
    return HubPusher(recipe, run, Told(), endpoint=server.endpoint)


def snapshot(run: Path, step: int, name: str = "step") -> Path:
    """Make a snapshot of stage `moe` as a run would, and the stage one that goes on."""
    (run / "moe" / "COMPLETE").unlink(missing_ok=True)
    folder = run / "moe" / "hub" / f"{name}-{step}"
    shutil.copytree(run / "moe", folder, ignore=shutil.ignore_patterns("hub", "eval*"))
    (folder / "stage.json").write_text(json.dumps({"stage": "moe", "step": step}))
    mark_complete(folder, {"step": step})
    return folder


def text_of(console: Any) -> str:
    assert isinstance(console, Told)
    return console.text


def test_stages_that_were_not_chosen_stay(finished: Path, run: Path, server: Hub) -> None:
    with pusher(finished, run, server, "hub.stages=[align]") as hub:
        hub.stage_done("align")
        hub.stage_done("moe")
    assert set(server.repos[REPO].branches) == {"main", "align"}
    assert of_stage(server, "main")["model.safetensors"] == (run / "align" / "model.safetensors").read_bytes()


def test_an_older_stage_does_not_take_the_place_of_a_newer_one(finished: Path, run: Path, server: Hub) -> None:
    with pusher(finished, run, server) as hub:
        hub.stage_done("align")
    assert set(of_stage(server, "main")) == {".gitattributes"}
    assert "model.safetensors" in of_stage(server, "align")


def test_the_newest_snapshot_goes_up_and_all_are_gone_in_the_end(finished: Path, run: Path, server: Hub) -> None:
    for step in (2, 4, 6):
        snapshot(run, step)
    hub = pusher(finished, run, server)
    with hub:
        until(lambda: not (run / "moe" / "hub" / "pushing-6").exists() and "Stage moe, step 6" in messages(server))
    assert messages(server) == ["Stage moe, step 6"]
    assert "step 2 is left out: step 6 is there now" in text_of(hub.console)
    assert not list((run / "moe" / "hub").iterdir())
    card = of_stage(server, "moe")["README.md"].decode()
    assert "This is a checkpoint, at step 6 of stage moe." in card


def test_what_a_killed_run_left_going_up_goes_up(finished: Path, run: Path, server: Hub) -> None:
    snapshot(run, 4, "pushing")
    unfinished = run / "moe" / "hub" / "step-8"
    unfinished.mkdir()
    with pusher(finished, run, server):
        until(lambda: messages(server) == ["Stage moe, step 4"])
    assert unfinished.is_dir()  # without its marker it is not looked at


def test_a_finished_stage_puts_an_end_to_its_snapshots(finished: Path, run: Path, server: Hub) -> None:
    server.fail("POST", "/commit/", 403, times=1)
    snapshot(run, 4)
    hub = pusher(finished, run, server)
    with hub:
        until(lambda: "step 4 was not uploaded" in text_of(hub.console))
        (run / "moe" / "COMPLETE").write_text("{}")
        hub.stage_done("moe")
    assert messages(server)[-2:] == ["Stage moe"] * 2
    assert not (run / "moe" / "hub").exists()


def test_a_refusal_at_the_end_is_told_once_and_named(finished: Path, run: Path, server: Hub) -> None:
    (run / "align" / "metrics.jsonl").write_text(json.dumps({"note": "hf_" + "aB3" * 11}))
    server.make(REPO, private=True)
    hub = pusher(finished, run, server)
    with hub:
        hub.stage_done("align")
        hub.stage_done("moe")
    told = text_of(hub.console)
    assert "metrics.jsonl:1: a Hugging Face token" in told
    assert "hf_aB3" not in told
    assert "stage align is NOT on the Hub" in told
    assert messages(server) == ["Stage moe", "Stage moe"]  # one that is refused holds up no other


def test_an_error_of_the_run_waits_for_nothing(finished: Path, run: Path, server: Hub) -> None:
    server.fail("PUT", "/objects/", 200, times=10**6, hang=True)
    hub = pusher(finished, run, server, "hub.wait=100000")
    with pytest.raises(RuntimeError, match="mine"), hub:
        hub.stage_done("align")
        until(lambda: any(method == "POST" for method, _, _ in server.requests))
        raise RuntimeError("mine")
    assert "stage align: not uploaded yet; started again, the run does that first" in text_of(hub.console)


def test_a_run_without_hub_starts_nothing(finished: Path, run: Path) -> None:
    with HubPusher(load_recipe(finished / "recipe.json"), run, Told()) as hub:
        hub.stage_done("align")
        assert not [thread for thread in threading.enumerate() if thread.name == "hub"]


def until(true: Any, seconds: float = 60.0) -> None:
    """Wait for something that another thread does."""
    import time

    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


# ---- before the run --------------------------------------------------------------------------------------------------


def test_a_claim_and_a_replacement_never_meet(tmp_path: Path) -> None:
    for step in (2, 4):
        (tmp_path / "hub" / f"step-{step}").mkdir(parents=True)
        mark_complete(tmp_path / "hub" / f"step-{step}", {})
    (_, first), (_, second) = snapshots.found(tmp_path, "step")
    snapshots.drop(first)
    assert snapshots.claim(first) is None
    claimed = snapshots.claim(second)
    assert claimed is not None
    snapshots.drop(second)  # the writer's, too late
    assert snapshots.found(tmp_path, "pushing") == [(4, claimed)]


@pytest.mark.parametrize(
    ("token", "repo", "message"),
    [
        ("", REPO, "no token of the Hub"),
        ("hf_wrongWRONGwrongWRONGwrong12", REPO, r"\(401\)"),
        (READER, REPO, r"\(403\)"),
        (GOOD, "them/run", r"\(403\)"),
        (GOOD, "me/public", "exists and is public"),
    ],
)
def test_what_the_hub_will_not_take_is_found_before_training(
    finished: Path, server: Hub, monkeypatch: pytest.MonkeyPatch, token: str, repo: str, message: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    server.make("me/public")
    recipe = load_recipe(finished / "recipe.json", [f"hub.repo={repo}"])
    with pytest.raises(RecipeError, match=message) as caught:
        check_hub(recipe, Told())
    (fault,) = caught.value.faults
    assert fault.path == "hub.repo"
    assert not token or token not in str(caught.value)


def test_a_hub_that_is_away_does_not_keep_a_run_from_starting(
    finished: Path, server: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(finished / "recipe.json", [f"hub.repo={REPO}"])
    server.fail("GET", "/api/models/", 503, times=10**6)
    console = Told()
    check_hub(recipe, console)
    assert "answered 503" in console.text
    assert "Training starts" in console.text
    server.faults.clear()
    server.fail("GET", "/api/models/", 200, times=1, hang=True)
    monkeypatch.setattr(hub_push, "CHECK_LIMIT", 2.0)
    check_hub(recipe, console)
    assert "no end after 2 s" in console.text


def test_the_plan_shows_it_and_misses_a_token(finished: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    recipe = load_recipe(finished / "recipe.json", [f"hub.repo={REPO}", "hub.every=50", "hub.adapter_only=true"])
    document = plan(recipe)
    assert any(note.startswith("hub: no token") for note in document["notes"])
    console = Told()
    print_plan(document, console)
    told = (
        "hub: me/run (private): align, moe, each to a branch of its name and to main when it ends, and every 50 steps"
    )
    assert told in console.text
    assert plan(load_recipe(finished / "recipe.json"))["hub"] is None


def test_it_is_no_part_of_what_a_stage_depends_on(finished: Path) -> None:
    plain, with_hub = (load_recipe(finished / "recipe.json", more) for more in ([], [f"hub.repo={REPO}"]))
    assert stage_inputs(plain, "moe") == stage_inputs(with_hub, "moe")
