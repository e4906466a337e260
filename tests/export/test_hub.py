"""`push` against a Hub on loopback, through the real huggingface_hub client."""

import hashlib
import json
import shutil
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from sparsevlm.cli import app
from sparsevlm.export import hub
from tests.export.hub_run import MODEL_FILES, make_run
from tests.export.hub_server import GOOD, READER, Hub, environment_of
from tests.tiny import picture

EVERYTHING = MODEL_FILES | {"README.md", "model.safetensors"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("hub") / "run")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("hub") / "run", shard="50kB")


def push(server, path, repo="me/tiny", token: str | None = GOOD, **options):
    return hub.push(path, repo, token=token, endpoint=server.endpoint, **options)


def weights(files):
    return {name for name in files if name.endswith(".safetensors")}


@pytest.mark.parametrize("private", [False, True])
def test_create_and_upload(server, run, private):
    pushed = push(server, run, private=private, message="first")
    repo = server.repos["me/tiny"]
    assert repo.private == private
    assert repo.messages == ["initial commit", "first"]  # everything in one commit
    files = server.files("me/tiny")
    assert set(files) == EVERYTHING | {".gitattributes"}
    assert set(pushed.sent) == EVERYTHING
    assert pushed.unchanged == pushed.removed == ()
    assert pushed.url == f"{server.endpoint}/me/tiny/commit/{repo.branches['main']}"
    for item in hub.prepare(run, "me/tiny").items:
        assert files[item.name] == (item.content if isinstance(item.content, bytes) else item.content.read_bytes())


def test_what_is_there_is_not_sent_again(server, run, tmp_path):
    push(server, run)
    before = len(server.requests)
    again = push(server, run)
    assert again.sent == ()
    assert set(again.unchanged) == EVERYTHING
    later = server.requests[before:]
    assert not any("preupload" in path or "/commit/" in path or method == "PUT" for method, path, _ in later)
    changed = shutil.copytree(run, tmp_path / "run")
    (changed / "moe" / "metrics.jsonl").write_text('{"step": 1, "loss": 9.0}\n')
    third = push(server, changed)
    assert third.sent == ("metrics.jsonl",)
    assert server.files("me/tiny")["metrics.jsonl"] == b'{"step": 1, "loss": 9.0}\n'
    assert len(server.sent("PUT", "/objects/")) == 1


def test_resume_after_a_killed_upload(server, sharded):
    """The connection breaks in the third shard, for good; the next push sends that one and those after it only."""
    shards = sorted(sharded.glob("moe/*.safetensors"))
    assert len(shards) > 3
    server.fail("PUT", "/objects/", 0, skip=2, times=10**6)
    with pytest.raises(OSError, match=r"the connection broke .* nothing is visible in me/tiny yet"):
        push(server, sharded, pause=lambda seconds: None)
    assert set(server.files("me/tiny")) == {".gitattributes"}
    arrived = set(server.objects)
    assert arrived == {hashlib.sha256(shard.read_bytes()).hexdigest() for shard in shards[:2]}
    server.faults.clear()
    server.requests.clear()
    push(server, sharded)
    assert sorted(server.sent("PUT", "/objects/")) == sorted(shard.stat().st_size for shard in shards[2:])
    assert weights(server.files("me/tiny")) == {shard.name for shard in shards}


REQUESTS = (
    ("POST", "/api/repos/create"),
    ("GET", "^/api/models/me/tiny$"),
    ("GET", "/tree/"),
    ("POST", "/preupload/"),
    ("POST", "/objects/batch"),
    ("PUT", "/objects/"),
    ("POST", "/verify/"),
    ("POST", "/api/validate-yaml"),
    ("POST", "/commit/"),
)
"""Every kind of request that a push makes."""


@pytest.mark.parametrize(
    ("method", "place", "status"),
    [(*asked, status) for asked in REQUESTS for status in (0, 503)]
    + [(*asked, status) for asked in REQUESTS[-1:] for status in (429, 500, 502, 504)],
)
def test_passing_failures_are_tried_again(server, run, method, place, status):
    server.fail(method, place, status, times=2, body="<html>not well</html>")
    told, waited = [], []
    pushed = push(server, run, tell=told.append, pause=waited.append)
    assert set(pushed.sent) == EVERYTHING
    assert len(server.repos["me/tiny"].messages) == 2
    assert all(fault.times == 0 for fault in server.faults)
    assert len(told) == len(waited)  # where huggingface_hub does not try again by itself, we do, and say so
    assert waited == [1.0, 2.0, 4.0][: len(waited)]
    if place == "/commit/":
        assert len(told) == 2


def test_waits_as_long_as_it_is_asked_to(server, run):
    server.fail("POST", "/commit/", 429, headers={"Retry-After": "7"})
    waited = []
    push(server, run, pause=waited.append)
    assert waited == [7.0]


def test_a_lost_answer_to_the_commit_is_no_second_commit(server, run):
    server.fail("POST", "/commit/", 0, late=True)
    pushed = push(server, run, pause=lambda seconds: None)
    assert set(pushed.unchanged) == EVERYTHING
    assert len(server.repos["me/tiny"].messages) == 2


def test_gives_up_with_what_to_do(server, run):
    server.fail("POST", "/commit/", 503, times=100)
    waited = []
    with pytest.raises(OSError, match=r"answered 503, 6 times in a row.*Run the same command again"):
        push(server, run, pause=waited.append)
    assert waited == [1.0, 2.0, 4.0, 8.0, 16.0]


@pytest.mark.parametrize(
    ("options", "status", "told"),
    [
        ({"token": "hf_wrongWRONGwrongWRONGwrong12"}, 401, "does not know the token"),
        ({"token": "a-token-of-another-form"}, 401, "does not know the token"),
        ({"token": READER}, 403, "may not write to me/tiny"),
        ({"repo": "them/tiny"}, 403, "may not write to them/tiny"),
        ({"revision": "refs/pr/7"}, 404, "me/tiny at refs/pr/7 is not there"),
    ],
)
def test_refusals_say_what_to_do(server, run, options, status, told):
    server.make("them/tiny")
    with pytest.raises(ValueError, match=rf"{told}.*\({status}\)") as caught:
        push(server, run, **options)
    assert options.get("token", GOOD) not in str(caught.value)
    assert not server.objects


@pytest.mark.parametrize("status", [409, 412])
def test_a_conflict(server, run, status):
    server.fail("POST", "/commit/", status)
    with pytest.raises(ValueError, match=rf"\({status}\); run the same command again"):
        push(server, run)


def test_somebody_else_commits_meanwhile(server, run, monkeypatch):
    from huggingface_hub import HfApi

    commit = HfApi.create_commit

    def late(self, *args, **options):
        server.repos["me/tiny"].commit("main", {}, "theirs")
        return commit(self, *args, **options)

    monkeypatch.setattr(HfApi, "create_commit", late)
    with pytest.raises(ValueError, match=r"\(412\)"):
        push(server, run)
    assert server.repos["me/tiny"].messages[-1] == "theirs"


def test_private_does_not_go_to_a_public_repository(server, run):
    server.make("me/tiny")
    with pytest.raises(ValueError, match="exists and is public; nothing was sent"):
        push(server, run, private=True)
    assert not server.objects


def test_a_branch(server, run):
    server.make("me/tiny")
    push(server, run, revision="v2/beta")
    assert set(server.files("me/tiny", "v2/beta")) == EVERYTHING | {".gitattributes"}
    assert set(server.files("me/tiny")) == {".gitattributes"}
    push(server, run, revision="v2/beta")


def test_another_models_files_are_removed(server, run, sharded):
    push(server, sharded)
    pushed = push(server, run)
    assert set(pushed.removed) == weights(["model.safetensors.index.json"]) | {
        "model.safetensors.index.json",
        *(shard.name for shard in sharded.glob("moe/*.safetensors")),
    }
    assert set(server.files("me/tiny")) == EVERYTHING | {".gitattributes"}


def test_no_token(server, run, monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(ValueError, match="hf auth login"):
        push(server, run, token=None)
    assert not server.requests


def test_offline(run):
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE"):
        hub.push(run, "me/tiny", token=GOOD)


def command(*arguments, **environment):
    result = CliRunner().invoke(app, ["push", *map(str, arguments)], env=environment)
    return result.exit_code, result.output


def test_dry_run_touches_no_network(run):
    """Offline, without a token: the list of files, what stays, and the card."""
    code, output = command(run, "me/tiny", "--dry-run", HF_TOKEN="")
    assert code == 0
    for name in EVERYTHING:
        assert f"  {name}" in output
    assert f"{len(EVERYTHING)} files" in output
    assert "not uploaded: COMPLETE, data.json, notes.txt" in output
    assert "checkpoints/" in output
    assert "pipeline_tag: image-text-to-text" in output


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["{run}", "tiny"], "OWNER/NAME"),
        (["{run}/nothing", "me/tiny"], "no such run"),
        (["{run}", "me/tiny", "--revision", "a b"], "--revision"),
        (["{run}", "me/tiny", "--license", "My Licence"], "--license"),
    ],
)
def test_mistakes_end_with_2(run, arguments, told):
    code, output = command(*(word.format(run=run) for word in arguments), "--dry-run")
    assert code == 2
    assert told in output


LOAD = """
import json, sys
code, ids = sys.argv[1], json.loads(sys.argv[2])
exec(code, globals())
import torch
with torch.no_grad():
    logits = model(input_ids=torch.tensor([ids])).logits
print("ANSWER", json.dumps([logits.flatten().tolist(), processor.tokenizer.decode(ids)]))
"""


def test_command_line_and_cold_cache(sharded, tmp_path):
    """Three processes that know the Hub by HF_ENDPOINT alone: a wrong token, a push, and the code of the model card."""
    from sparsevlm.model.build import load_model

    picture().save(tmp_path / "picture.jpg")
    with Hub() as server:
        environment = environment_of(server, tmp_path)

        def start(*arguments, token):
            words = [sys.executable, *map(str, arguments)]
            return subprocess.run(
                words, env=environment | {"HF_TOKEN": token}, capture_output=True, text=True, cwd=tmp_path
            )

        line = ["-m", "sparsevlm", "push", sharded, "me/tiny", "--private"]
        wrong = "hf_wrongWRONGwrongWRONGwrong12"
        refused = start(*line, token=wrong)
        assert refused.returncode == 2, refused.stderr
        assert "does not know the token (401)" in refused.stderr
        server.fail("POST", "/commit/", 503)
        done = start(*line, token=GOOD)
        assert done.returncode == 0, done.stderr
        assert "the Hub answered 503; attempt 2 of 6 in 1 s" in done.stderr
        assert f"files, 0 were there already: {server.endpoint}/me/tiny/commit/" in done.stdout
        for text in (refused.stdout, refused.stderr, done.stdout, done.stderr):
            assert wrong not in text
            assert GOOD not in text
            assert "Traceback" not in text
        ids = [2, 4, 8, 11, 13, 5]
        code = server.files("me/tiny")["README.md"].decode().split("```python\n")[1].split("```")[0]
        loaded = start("-c", LOAD, code, json.dumps(ids), token=READER)
    assert "ANSWER" in loaded.stdout, loaded.stderr
    logits, text = json.loads(loaded.stdout.partition("ANSWER ")[2])
    model, processor = load_model(sharded / "moe")
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([ids])).logits
    assert torch.equal(torch.tensor(logits), expected.flatten())
    assert text == processor.tokenizer.decode(ids)
