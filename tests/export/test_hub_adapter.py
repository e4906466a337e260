"""`push` of adapters against a Hub on loopback: with their base beside them, and with a base that is on the Hub."""

import functools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from sparsevlm.adapters.saved import find_parent, weights_hash
from sparsevlm.export import hub
from sparsevlm.export.hub_record import read_pushes
from sparsevlm.export.native import export
from sparsevlm.model.build import load_model
from sparsevlm.recipe.adapter import Mma
from tests.export import lora
from tests.export.hub_run import MACHINE, add_adapter, make_run
from tests.export.hub_server import GOOD, READER, environment_of

RECORDS = {"metrics.jsonl", "recipe.yaml", "summary.json"}
PROCESSOR = {"chat_template.jinja", "processor_config.json", "tokenizer.json", "tokenizer_config.json"}
ADAPTER = {"README.md", "adapter_config.json", "adapter_model.safetensors", "parent.json"} | PROCESSOR | RECORDS
BASE = {f"base/{name}" for name in {"config.json", "generation_config.json", "model.safetensors"} | PROCESSOR}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    run = make_run(tmp_path_factory.mktemp("hub") / "run")
    add_adapter(run)
    add_adapter(run, "mma", Mma(type="mma", dropout=0.0))
    return run


@pytest.fixture
def run(made, tmp_path):
    """A copy: `push` notes in a directory where it went."""
    return shutil.copytree(made, tmp_path / "run")


def push(server, path, repo="me/tiny-lora", **options):
    return hub.push(path, repo, token=GOOD, endpoint=server.endpoint, **options)


def own(files):
    return set(files) - {".gitattributes"}


def read(files, name):
    return json.loads(files[name])


def test_the_base_goes_beside_the_adapter(server, run):
    pushed = push(server, run / "lora")
    files = server.files("me/tiny-lora")
    assert own(files) == ADAPTER | BASE
    assert len(server.repos["me/tiny-lora"].messages) == 2  # adapter and base in one commit
    assert files["base/model.safetensors"] == (run / "moe" / "model.safetensors").read_bytes()
    parent = read(files, "parent.json")
    assert parent["relative"] == "base"
    assert parent["sha256"] == weights_hash(run / "moe")
    assert parent["hub"] == {"repo": "me/tiny-lora", "revision": None, "folder": "base"}
    assert pushed.commit == server.repos["me/tiny-lora"].branches["main"]


@pytest.mark.parametrize("options", [{}, {"adapter_only": True, "base": "me/elsewhere"}])
def test_no_path_of_this_machine_leaves_it(run, options):
    before = {file.name: file.read_bytes() for file in (run / "lora").iterdir()}
    for item in hub.prepare(run / "lora", "me/tiny-lora", **options).items:
        data = item.content if isinstance(item.content, bytes) else item.content.read_bytes()
        for place in (MACHINE, "somebody", str(run), str(Path.home()) + "/"):
            assert place.encode() not in data, (item.name, place)
    assert before == {file.name: file.read_bytes() for file in (run / "lora").iterdir()}
    assert str(run.parent.parent) in before["parent.json"].decode()  # which is why it is written anew


def test_the_last_stage_of_a_run_may_be_an_adapter(run):
    shutil.rmtree(run / "mma")
    (run / "summary.json").write_text(
        json.dumps({"stages": json.loads((run / "summary.json").read_text())["stages"][:3]})
    )
    assert hub.prepare(run, "me/tiny").stage == "lora"


def test_adapter_alone_on_a_base_that_was_pushed(server, run):
    """The base is found by what its own push noted, and pinned to that commit though the branch moves on."""
    base = push(server, run / "moe", "me/tiny", revision="sparse")
    server.repos["me/tiny"].commit("sparse", {}, "later")
    push(server, run / "lora", adapter_only=True)
    files = server.files("me/tiny-lora")
    assert own(files) == ADAPTER
    place = {"repo": "me/tiny", "revision": base.commit, "folder": None}
    assert read(files, "parent.json") == {"sha256": weights_hash(run / "moe"), "hub": place}
    config = read(files, "adapter_config.json")
    assert (config["base_model_name_or_path"], config["revision"]) == ("me/tiny", base.commit)


def test_adapter_alone_on_the_base_beside_another(server, run):
    push(server, run / "lora")
    push(server, run / "mma", "me/tiny-mma", adapter_only=True)
    place = read(server.files("me/tiny-mma"), "parent.json")["hub"]
    commit = server.repos["me/tiny-lora"].branches["main"]
    assert place == {"repo": "me/tiny-lora", "revision": commit, "folder": "base"}
    base = push(server, run / "moe", "me/tiny")  # a place of its own is preferred, whatever came last
    push(server, run / "lora")
    push(server, run / "mma", "me/tiny-mma", adapter_only=True)
    place = read(server.files("me/tiny-mma"), "parent.json")["hub"]
    assert place == {"repo": "me/tiny", "revision": base.commit, "folder": None}


def test_a_named_base_is_compared_and_pinned(server, run):
    base = push(server, run / "moe", "me/tiny")
    (run / "moe" / "pushed.json").unlink()
    push(server, run / "lora", adapter_only=True, base="me/tiny")
    assert read(server.files("me/tiny-lora"), "parent.json")["hub"]["revision"] == base.commit
    assert f'revision="{base.commit}"' in server.files("me/tiny-lora")["README.md"].decode()


def test_another_base_is_refused(server, run, tmp_path):
    from safetensors.torch import load_file, save_file

    other = shutil.copytree(run / "moe", tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    tensors[min(tensors)] = tensors[min(tensors)] + 1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    push(server, other, "me/other")
    sent = len(server.requests)
    with pytest.raises(ValueError, match=r"me/other at main is not the model .* its model\.safetensors is another"):
        push(server, run / "lora", adapter_only=True, base="me/other")
    with pytest.raises(ValueError, match=r"me/nothing at main is not there"):
        push(server, run / "lora", adapter_only=True, base="me/nothing")
    assert {method for method, _, _ in server.requests[sent:]} == {"GET"}
    assert "me/tiny-lora" not in server.repos


def test_the_record_is_of_this_hub_only(server, run):
    push(server, run / "moe", "me/tiny")
    (row,) = read_pushes(run / "moe")
    assert (row.endpoint, row.repo, row.revision, row.folder) == (server.endpoint, "me/tiny", "main", None)
    assert row.commit == server.repos["me/tiny"].branches["main"]
    with pytest.raises(ValueError, match="was not pushed from here"):
        hub.prepare(run / "lora", "me/tiny-lora", adapter_only=True, endpoint="http://127.0.0.1:9")


@pytest.mark.parametrize(
    ("stage", "options", "message"),
    [
        ("lora", {"adapter_only": True}, r"Push it first \(sparsevlm push .*/moe me/tiny-lora-base\)"),
        ("lora", {"base": "me/tiny"}, "add --adapter-only"),
        ("lora", {"adapter_only": True, "base": "tiny"}, "no model of the Hub"),
        ("lora", {"adapter_only": True, "base": "me/tiny@"}, "no model of the Hub"),
        ("moe", {"adapter_only": True}, "--adapter-only: .* holds a whole model"),
        ("moe", {"base": "me/tiny"}, "--base: .* holds a whole model"),
    ],
)
def test_options_that_do_not_fit(run, stage, options, message):
    with pytest.raises(ValueError, match=message):
        hub.prepare(run / stage, "me/tiny-lora", **options)


def test_a_base_that_changed_or_is_gone_is_refused(run):
    file = run / "moe" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    data[-4000:] = bytes(4000)
    file.write_bytes(data)
    with pytest.raises(ValueError, match="trained on other weights"):
        hub.prepare(run / "lora", "me/tiny-lora")


def test_weights_of_another_form_are_refused(run):
    (run / "lora" / "adapter_model.safetensors").rename(run / "lora" / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"found adapter_model\.bin"):
        hub.prepare(run / "lora", "me/tiny-lora")


@pytest.mark.parametrize("name", ["adapter_config.json", "parent.json"])
def test_secrets_of_an_adapter_stop_it(run, name):
    token = "hf_" + "aB3" * 11
    file = run / "lora" / name
    file.write_text(json.dumps(json.loads(file.read_text()) | {"note": token}))
    if name == "parent.json":  # written anew: what else stands there stays here
        ready = hub.prepare(run / "lora", "me/tiny-lora")
        assert all(token.encode() not in item.content for item in ready.items if isinstance(item.content, bytes))
        return
    with pytest.raises(ValueError, match=r"adapter_config\.json:\d+: a Hugging Face token"):
        hub.prepare(run / "lora", "me/tiny-lora")


def test_a_whole_model_takes_an_adapters_place_and_the_other_way_round(server, run):
    push(server, run / "lora", "me/tiny")
    pushed = push(server, run / "moe", "me/tiny")
    assert set(pushed.removed) == BASE | {"adapter_config.json", "adapter_model.safetensors", "parent.json"}
    pushed = push(server, run / "lora", "me/tiny")
    assert {"config.json", "model.safetensors"} <= set(pushed.removed)
    assert own(server.files("me/tiny")) == ADAPTER | BASE
    assert len(server.sent("PUT", "/objects/")) == 2  # base and adapter, each once


@pytest.mark.parametrize(
    ("stage", "library", "tag", "words"),
    [
        ("lora", "peft", "lora", "A LoRA adapter of rank 4 for the model in the folder `base` here"),
        ("mma", "sparsevlm", "mma", "A mixture-of-modality adapter for the model in the folder `base` here"),
    ],
)
def test_the_card(run, stage, library, tag, words):
    card = hub.prepare(run / stage, "me/tiny-lora").card
    data = ModelCard(card).data
    assert data.library_name == library
    assert data.base_model == ["google/siglip-tiny"]  # the parts of the base that are on the Hub
    assert data.base_model_relation == "adapter"
    assert data.pipeline_tag == "image-text-to-text"
    assert tag in data.tags
    assert words in card
    assert "4 experts in place of the FFN" in card
    assert 'load_model("me/tiny-lora")' in card
    named = ModelCard(hub.prepare(run / stage, "me/x", adapter_only=True, base="me/tiny").card).data
    assert (named.base_model, named.base_model_relation) == (["me/tiny"], "adapter")


ANSWER = """
import sys, torch
torch.set_num_threads(1)
if {alone}:
    sys.modules["sparsevlm"] = None  # not importable
exec(open({code!r}).read(), globals())
inputs = torch.load({inputs!r}, weights_only=True)
with torch.no_grad():
    torch.save(model.eval()(**inputs).logits, {out!r})
print(processor is not None)
"""


def answer(server, folder, code, inputs, alone=False):
    """Return the logits that code, after which there are `model` and `processor`, gives in a process of its own."""
    folder.mkdir(exist_ok=True)
    torch.save(inputs, folder / "inputs.pt")
    (folder / "code.py").write_text(code)
    names = {"code": str(folder / "code.py"), "inputs": str(folder / "inputs.pt"), "out": str(folder / "out.pt")}
    words = [sys.executable, "-c", ANSWER.format(alone=alone, **names)]
    environment = environment_of(server, folder, READER)
    done = subprocess.run(words, env=environment, capture_output=True, text=True, cwd=folder, timeout=100)
    assert done.stdout.strip().endswith("True"), done.stderr
    return torch.load(folder / "out.pt", weights_only=True)


def with_picture(processor):
    from sparsevlm.data.collate import Collator
    from tests.train.toy import toy_sample

    batch = Collator(processor.tokenizer.pad_token_id, packed=False)([[processor.encode(toy_sample(1))]])
    return {key: value for key, value in batch.items() if key not in ("labels", "sample_ids", "rows")}


def blocks(server, repo="me/tiny-lora"):
    """Return the code blocks of a card, without the question that they end with."""
    card = server.files(repo)["README.md"].decode()
    return [part.split("```")[0].split("messages = ")[0] for part in card.split("```python\n")[1:]]


@pytest.mark.parametrize("stage", ["lora", pytest.param("mma", marks=pytest.mark.slow)])
def test_a_cold_cache_gives_the_same_logits(server, run, tmp_path, stage):
    """The card's own code, in fresh processes that know the Hub alone: base beside the adapter, then on the Hub."""
    model, processor = load_model(run / stage)
    inputs = with_picture(processor)
    with torch.no_grad():
        expected = model(**inputs).logits
    push(server, run / stage)
    (code,) = blocks(server)
    assert torch.equal(answer(server, tmp_path / "beside", code, inputs), expected)
    push(server, run / "moe", "me/tiny")
    push(server, run / stage, adapter_only=True)
    ours, through_peft = blocks(server)
    assert torch.equal(answer(server, tmp_path / "ours", ours, inputs), expected)
    assert torch.equal(answer(server, tmp_path / "peft", through_peft, inputs), expected)


def test_another_tools_adapter_on_a_native_model_without_us(server, tmp_path):
    """PEFT's own folder on a class of transformers: uploaded by us, loaded where this package is not there."""
    from transformers import AutoModelForImageTextToText

    dense = make_run(tmp_path / "dense") / "moe"
    native = tmp_path / "native"
    export(dense, native, check=False)
    load = AutoModelForImageTextToText.from_pretrained
    adapter = lora.train(native, tmp_path / "adapter", load, target_modules=["q_proj", "v_proj"])
    with pytest.raises(ValueError, match=r"push that model, then the adapter with --adapter-only --base OWNER/NAME"):
        hub.prepare(adapter, "me/native-lora", adapter_only=True)
    push(server, native, "me/native")
    push(server, adapter, "me/native-lora", adapter_only=True, base="me/native")
    card = server.files("me/native-lora")["README.md"].decode()
    assert "sparsevlm" not in card.lower().replace("uploaded with sparsevlm", "")
    assert ModelCard(card).data.base_model == ["me/native"]
    from peft import PeftModel

    ids = {"input_ids": torch.tensor([[2, 4, 8, 11, 13, 5]])}
    with torch.no_grad():
        expected = PeftModel.from_pretrained(load(native), str(adapter)).eval()(**ids).logits
    assert torch.equal(answer(server, tmp_path / "alone", blocks(server, "me/native-lora")[0], ids, True), expected)


def test_a_parent_on_the_hub_is_found_from_the_uploaded_file(server, run, tmp_path, monkeypatch):
    import huggingface_hub

    here = functools.partial(
        huggingface_hub.snapshot_download, endpoint=server.endpoint, cache_dir=tmp_path / "cache", token=READER
    )
    monkeypatch.setattr(huggingface_hub, "snapshot_download", here)
    base = push(server, run / "lora")
    push(server, run / "mma", "me/tiny-mma", adapter_only=True)
    alone = tmp_path / "alone"
    alone.mkdir()
    for name in ("parent.json", "adapter_config.json"):
        (alone / name).write_bytes(server.files("me/tiny-mma")[name])
    found = find_parent(alone)
    assert found.name == "base"
    assert found.parent.name == base.commit
    assert weights_hash(found) == weights_hash(run / "moe")
    (alone / "parent.json").write_text(json.dumps({"sha256": "0" * 64}))
    with pytest.raises(ValueError, match="was it edited"):
        find_parent(alone)
