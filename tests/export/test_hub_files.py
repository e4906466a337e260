"""What is uploaded of a model, what never is, and what is cut out."""

import json
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from sparsevlm.export import hub
from sparsevlm.export.hub_files import collect, read_source, safetensors_header, stale
from sparsevlm.export.hub_scan import is_local, last_part, mask, secrets_in, text_without_paths
from tests.export.hub_run import MACHINE, MODEL_FILES, STAYS, make_run

SECRETS = {
    "hf_" + "aB3" * 11: "a Hugging Face token",
    "sk-proj-" + "x1" * 12: "an API key",
    "AKIA" + "ABCD1234" * 2: "an AWS access key",
    "aws_secret_access_key = " + "a/b+" * 10: "an AWS secret key",
    "-----BEGIN RSA PRIVATE KEY-----": "a private key",
    "-----BEGIN PRIVATE KEY-----": "a private key",
    "Authorization: Bearer abc.def-123": "an authorization header",
    '"authorization": "Basic dXNlcjpwYXNz"': "an authorization header",
    "https://me:pass@example.org/data": "a password in an address",
    "export WANDB_API_KEY=0123456789abcdef": "a secret variable",
    "ghp_" + "a1" * 18: "a GitHub token",
}
HARMLESS = (
    "hf_hub, hf_xet and hf_transfer",
    "risk-assessment-of-models-2024",
    "a task-oriented-dialogue-dataset-v1 sample",
    "data:image/png;base64,iVBORw0KGgoAKIAABCD1234ABCD1234abcAIzaSyAAAAAAAAAAAAAAAAAAAAAAAAAAA",
    '"eos_token": "<|im_end|>", "image_token": "<image>"',
    "authorization is needed",
    "https://example.org:8080/path@2",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("hub") / "run")


def copy(run: Path, to: Path) -> Path:
    """Copy a run; its weights may be shared, they are never written."""
    import shutil

    return Path(shutil.copytree(run, to / "run"))


def test_the_list_is_positive(run):
    ready = hub.prepare(run, "me/tiny")
    assert {item.name for item in ready.items} == MODEL_FILES | {"README.md", "model.safetensors"}
    assert ready.stage == "moe"
    assert set(ready.left) == {name.split("/")[0] + ("/" if "/" in name else "") for name in STAYS}
    for item in ready.items:
        assert item.size == (item.content.stat().st_size if isinstance(item.content, Path) else len(item.content))


def test_weights_are_not_copied(run):
    weights = next(item for item in hub.prepare(run, "me/tiny").items if item.name == "model.safetensors")
    assert weights.content == run / "moe" / "model.safetensors"


def test_no_path_of_the_machine_leaves_it(run):
    ready = hub.prepare(run, "me/tiny")
    for item in ready.items:
        data = item.content if isinstance(item.content, bytes) else item.content.read_bytes()
        for place in (MACHINE, "somebody", str(run), str(Path.home()) + "/"):
            assert place.encode() not in data, (item.name, place)


def test_the_recipe_stays_a_recipe(run):
    items = {item.name: item for item in hub.prepare(run, "me/tiny").items}
    uploaded = YAML(typ="safe").load(items["recipe.yaml"].content)
    assert list(uploaded["stages"]) == ["align", "moe"]
    assert uploaded["output"] == "tiny"
    assert uploaded["model"]["vision"]["path"] == "google/siglip-tiny"
    assert uploaded["model"]["language"] == {"path": "my-llama", "chat_template": "mine.jinja"}
    assert uploaded["data"]["mine"]["media_root"] == "images"
    before = YAML(typ="safe").load((run / "moe" / "recipe.yaml").read_text())
    assert before["output"].startswith(MACHINE)  # the file itself is not touched


def test_a_stage_in_the_middle_takes_no_later_rows(run, tmp_path):
    folder = copy(run, tmp_path)
    (folder / "late").mkdir()
    (folder / "late" / "COMPLETE").write_text("{}")
    rows = json.loads((folder / "summary.json").read_text())["stages"]
    (folder / "summary.json").write_text(json.dumps({"stages": [*rows, {**rows[1], "name": "late"}]}))
    items, _ = collect(read_source(folder / "moe"))
    names = {item.name: item for item in items}
    uploaded = json.loads(names["summary.json"].content)  # type: ignore[arg-type]
    assert [stage["name"] for stage in uploaded["stages"]] == ["align", "moe"]
    assert "report.html" not in names  # it tells of the later stage


@pytest.mark.parametrize(("text", "kind"), SECRETS.items())
@pytest.mark.parametrize("name", ["tokenizer_config.json", "metrics.jsonl", "recipe.yaml", "chat_template.jinja"])
def test_a_secret_stops_it(run, tmp_path, text, kind, name):
    folder = copy(run, tmp_path)
    file = folder / "moe" / name
    lines = file.read_text().splitlines()
    comment = {"recipe.yaml": f"# {text}", "chat_template.jinja": f"{{# {text} #}}"}
    if name == "tokenizer_config.json":
        file.write_text(json.dumps(json.loads(file.read_text()) | {"note": text.replace('"', "'")}, indent=2))
        line = next(i for i, found in enumerate(file.read_text().splitlines(), 1) if '"note"' in found)
    else:
        file.write_text("\n".join([*lines, comment.get(name, json.dumps({"note": text.replace('"', "'")}))]))
        line = len(lines) + 1
    with pytest.raises(ValueError, match="nothing was sent") as caught:
        hub.prepare(folder, "me/tiny")
    assert f"{name}:{line}: {kind}" in str(caught.value)
    assert text not in str(caught.value)
    assert text[-12:] not in str(caught.value)


def test_a_secret_in_the_header_of_weights_stops_it(run, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = copy(run, tmp_path)
    file = folder / "moe" / "model.safetensors"
    save_file(load_file(file), file, metadata={"format": "pt", "token": "hf_" + "aB3" * 11})
    with pytest.raises(ValueError, match=r"model\.safetensors:1: a Hugging Face token"):
        hub.prepare(folder, "me/tiny")


@pytest.mark.parametrize("text", HARMLESS)
def test_words_and_pictures_are_no_secrets(text):
    assert not list(secrets_in([text], "x"))


def test_mask():
    for text in SECRETS:
        assert "***" in mask(f"the token {text} is wrong")
        assert text not in mask(f"the token {text} is wrong")


@pytest.mark.parametrize(
    ("path", "rest"),
    [
        ("/a/b/c.json", "c.json"),
        ("/data", "data"),
        ("~/x/y", "y"),
        ("file:///a/b", "b"),
        ("C:\\Users\\me\\x", "x"),
        ("C:/Users/me/x", "x"),
        ("/a/my data/b", "b"),
        ("/a/b/", "b"),
    ],
)
def test_local_paths(path, rest):
    assert is_local(path)
    assert last_part(path) == rest


@pytest.mark.parametrize("path", ["org/name", "data/x.json", "../x", "sparsevlm:scenes", "", "/", "<image>", "a: b"])
def test_other_strings_are_kept(path):
    assert not is_local(path)


def test_a_token_that_looks_like_a_path_is_kept():
    assert not is_local("/no_think", parts=2)


def test_paths_in_running_text():
    text = "wrote /home/me/runs/a.txt, see https://x.org/home/page and 3/4 of C:\\Users\\me\\b.txt"
    assert text_without_paths(text) == "wrote a.txt, see https://x.org/home/page and 3/4 of b.txt"
    assert text_without_paths("in /weird/place/x!", [Path("/weird/place")]) == "in x!"
    assert text_without_paths("in /weird/placebo", [Path("/weird/place")]) == "in /weird/placebo"


def test_shards_go_as_they_are(tmp_path):
    folder = make_run(tmp_path / "run", shard="100kB")
    names = {item.name for item in hub.prepare(folder, "me/tiny").items}
    shards = {file.name for file in (folder / "moe").glob("model-*.safetensors")}
    assert len(shards) > 1
    assert names == MODEL_FILES | shards | {"README.md", "model.safetensors.index.json"}
    (folder / "moe" / min(shards)).unlink()
    with pytest.raises(ValueError, match=r"names files that are not there \(model-00001-of"):
        hub.prepare(folder, "me/tiny")


def test_a_model_that_is_not_whole_is_refused(run, tmp_path):
    folder = copy(run, tmp_path)
    file = folder / "moe" / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-5])
    with pytest.raises(ValueError, match="it is cut off"):
        hub.prepare(folder, "me/tiny")
    file.write_bytes(data[:40])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        safetensors_header(file)
    file.unlink()
    (folder / "moe" / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"found training_args\.bin|found pytorch_model\.bin"):
        hub.prepare(folder, "me/tiny")
    (folder / "moe" / "COMPLETE").unlink()
    with pytest.raises(ValueError, match="not complete"):
        hub.prepare(folder / "moe", "me/tiny")


def test_a_model_and_an_adapter_in_one_folder_are_refused(run, tmp_path):
    folder = copy(run, tmp_path)
    (folder / "moe" / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="keep them apart"):
        hub.prepare(folder, "me/tiny")


def test_a_hub_id_is_refused():
    with pytest.raises(ValueError, match="on the Hub already"):
        hub.prepare("org/name", "me/tiny")


@pytest.mark.parametrize("repo", ["tiny", "me/a/b", "me/", "/tiny", "me/-x", "me/a--b", "me/x.git", "me/a b", "me/ü"])
def test_invalid_repositories(run, repo):
    with pytest.raises(ValueError, match="OWNER/NAME"):
        hub.prepare(run, repo)


@pytest.mark.parametrize("revision", ["0" * 40, "a b", "-x", "a..b", "", "a/"])
def test_invalid_revisions(run, revision):
    with pytest.raises(ValueError, match="--revision"):
        hub.prepare(run, "me/tiny", revision=revision)


def test_stale_files_are_those_that_decide_what_is_loaded(run):
    items = hub.prepare(run, "me/tiny").items
    kept = ["README.md", ".gitattributes", "picture.png", "config.json", "LICENSE", "other.safetensors"]
    old = ["model-00001-of-00002.safetensors", "model.safetensors.index.json", "preprocessor_config.json", "vocab.json"]
    assert stale([*kept, *old], items) == sorted(old)
