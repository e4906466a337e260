"""A stage of every type of adapter through `train(recipe)`: packed, recomputed, text-only rows among the others.

On a dense and on an upcycled parent: what the stage leaves, what opens it, and how a killed one goes on.
"""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sparsevlm.adapters.attach import detach
from sparsevlm.adapters.names import is_adapter_parameter
from sparsevlm.adapters.saved import find_parent, read_parent
from sparsevlm.chat import ChatOptions, open_chat
from sparsevlm.eval.run import evaluate
from sparsevlm.model.build import load_model
from sparsevlm.recipe.load import load_recipe
from sparsevlm.rundir import COMPLETE, resolve_model
from sparsevlm.train import stage as stages
from sparsevlm.train.checkpoints import read_marker
from sparsevlm.train.launch import train
from sparsevlm.train.plan import plan
from tests import tiny
from tests.adapters.specs import SPECS, Case
from tests.train.runs import metrics, write_recipe
from tests.train.test_launch import COMPARED, killed, on_step
from tests.train.toy import toy_sample

STAGE = "adapted"
STEPS = 8


def _cases(default: Callable[[Case, bool], bool]) -> Iterator[Any]:
    """Yield every case on both parents, those that the default suite leaves out marked slow."""
    for case in SPECS:
        for upcycled in (False, True):
            marks = () if default(case, upcycled) else pytest.mark.slow
            yield pytest.param(case, upcycled, id=f"{case.name}-{'sparse' if upcycled else 'dense'}", marks=marks)


EVERY = pytest.mark.parametrize(("case", "upcycled"), list(_cases(lambda case, _: case.name == case.type)))


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        directory: Holds `recipe.json` and `run`.
        losses: Of the batch that `probe` gives, at the end of training: with the adapter, and with it taken off.
        logits: Of that batch, from the model that was trained.
    """

    directory: Path
    losses: tuple[float, float]
    logits: Tensor

    @property
    def stage(self) -> Path:
        return self.directory / "run" / STAGE


def probe(model: Any, processor: Any) -> tuple[float, Tensor]:
    """Loss and logits of three samples of the training data, one of them text only."""
    from sparsevlm.data.collate import Collator

    rows = [[processor.encode(toy_sample(i))] for i in range(3)]
    batch = Collator(processor.tokenizer.pad_token_id, packed=False)(rows)
    with torch.no_grad():
        output = model.eval()(**{key: value for key, value in batch.items() if key not in ("sample_ids", "rows")})
    return float(output.loss), output.logits


def adapter_recipe(directory: Path, parts: dict[str, str], case: Case, upcycled: bool) -> Path:
    """Write a recipe of the parents and, after them, the case's stage; with an evaluation."""
    only = ["align", "moe"] if upcycled else ["align"]
    recipe = json.loads(write_recipe(directory, parts, only=only, stage={"steps": 2, "evals": []}).read_text())
    stage = {key: value for key, value in recipe["stages"]["align"].items() if key not in ("trains", "evals")}
    section = case.on(upcycled).model_dump(mode="json", exclude_unset=True)
    recipe["stages"][STAGE] = stage | {"steps": STEPS, "gradient_checkpointing": True, "adapter": section}
    questions = directory / "data" / "questions.json"
    rows = [
        {"id": "0", "question": "what color is this ?", "answer": "red", "kind": "color", "image": "red.png"},
        {"id": "1", "question": "what is a cat ?", "answer": "cat", "kind": "animal"},
    ]
    questions.write_text(json.dumps(rows))
    recipe["evals"] = {"asked": {"task": "vqa", "path": str(questions), "max_new_tokens": 4}}
    file = directory / "recipe.json"
    file.write_text(json.dumps(recipe))
    return file


@pytest.fixture(scope="module")
def parents(tiny_parts: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a run that ends before any adapter: `align`, `moe`."""
    directory = tmp_path_factory.mktemp("parents")
    torch.set_num_threads(1)
    train(write_recipe(directory, tiny_parts, stage={"steps": 2, "evals": []}))
    return directory


def continued(parents: Path, directory: Path, parts: dict[str, str], case: Case, upcycled: bool) -> Path:
    """Copy the parents' run and return a recipe that has only the case's stage left to train."""
    shutil.copytree(parents, directory, dirs_exist_ok=True)
    for file in (directory / "run").glob("*/stage.json"):
        file.write_text(file.read_text().replace(str(parents), str(directory)))
    if not upcycled:
        shutil.rmtree(directory / "run" / "moe")
    return adapter_recipe(directory, parts, case, upcycled)


@pytest.fixture(scope="module")
def finished(
    parents: Path, tiny_parts: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[Case, bool], Run]]:
    """Return a case's finished run, trained when it is first asked for."""
    done: dict[tuple[str, bool], Run] = {}

    def run(case: Case, upcycled: bool) -> Run:
        if (case.name, upcycled) not in done:
            done[case.name, upcycled] = train_case(case, upcycled)
        return done[case.name, upcycled]

    def train_case(case: Case, upcycled: bool) -> Run:
        directory = tmp_path_factory.mktemp(case.name)
        recipe = continued(parents, directory, tiny_parts, case, upcycled)
        seen: list[Any] = []
        save = stages.save_output

        def save_and_probe(trainer: Any, *args: Any) -> None:
            save(trainer, *args)
            seen.append((trainer.vlm, *probe(trainer.vlm, trainer.processing_class)))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(stages, "save_output", save_and_probe)
            train(recipe)
        ((model, loss, logits),) = seen  # the parents are finished: only one stage was saved
        _, processor = load_model(directory / "run" / STAGE)
        detach(model, merge=False)
        return Run(directory, (loss, probe(model, processor)[0]), logits)

    yield run


@EVERY
def test_it_learns(finished: Callable[[Case, bool], Run], case: Case, upcycled: bool) -> None:
    run = finished(case, upcycled)
    losses = [loss for (loss,) in metrics(run.directory / "run", STAGE, "loss")]
    assert len(losses) == STEPS
    assert sum(losses[-2:]) < sum(losses[:2])
    with_adapter, without = run.losses  # the connector, trained beside it, is there both times
    assert with_adapter < without


@EVERY
def test_the_stage_leaves_a_whole_folder_of_peft(
    finished: Callable[[Case, bool], Run], case: Case, upcycled: bool
) -> None:
    from peft import PeftConfig

    stage = finished(case, upcycled).stage
    there = {file.name for file in stage.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "parent.json", COMPLETE, "stage.json"} <= there
    assert {"processor_config.json", "tokenizer.json", "chat_template.jinja", "recipe.yaml"} <= there
    assert not there & {"config.json", "model.safetensors", "checkpoints", "base", "start"}
    assert not [file for file in stage.rglob("*") if file.suffix in (".bin", ".pt", ".pth")]
    parent = stage.parent / ("moe" if upcycled else "align")
    assert find_parent(stage).resolve() == parent.resolve()
    assert read_parent(stage)["relative"] == f"../{parent.name}"
    config: Any = PeftConfig.from_pretrained(str(stage))
    assert config.modules_to_save == ["model.connector.0"]
    saved = load_file(stage / "adapter_model.safetensors")
    model, _ = load_model(stage)
    held = {name for name, _ in model.named_parameters() if is_adapter_parameter(name)}
    assert len(saved) == len(held) + len(list(model.model.connector.parameters()))
    assert any(key.startswith("base_model.model.model.connector.0.") for key in saved)
    recorded = json.loads((stage / "stage.json").read_text())["summary"]["parameters"]
    assert recorded["trainable"] == sum(tensor.numel() for tensor in saved.values())


@EVERY
def test_load_model_gives_the_logits_of_the_end_of_training(
    finished: Callable[[Case, bool], Run], case: Case, upcycled: bool
) -> None:
    run = finished(case, upcycled)
    model, processor = load_model(resolve_model(run.directory / "run"))
    loss, logits = probe(model, processor)
    assert torch.equal(logits, run.logits)
    assert loss == run.losses[0]


@EVERY
def test_eval_and_chat_open_it(finished: Callable[[Case, bool], Run], case: Case, upcycled: bool) -> None:
    run = finished(case, upcycled)
    written = [json.loads(line) for line in (run.stage / "eval" / "asked.jsonl").read_text().splitlines()]
    assert {row["kind"] for row in written} == {"color", "animal"}
    report = json.loads((run.stage / "stage.json").read_text())["evals"]["asked"]
    assert report["n"] == 2 and not report["faults"]
    recipe = load_recipe(run.stage / "recipe.yaml")
    model, processor = load_model(run.stage)
    result = evaluate(model.eval(), processor, recipe.evals["asked"], progress=False)
    assert [reply.record() for reply in result.replies] == written
    picture = run.directory / "red.png"
    tiny.picture("red").save(picture)
    chat = open_chat(str(run.directory / "run"), ChatOptions(max_new_tokens=4), images=[str(picture)])
    assert isinstance(chat.ask("what color is this ?"), str)
    assert len(chat.messages) == 2
    chat.ask("what is a cat ?")  # the picture stays in the conversation
    assert len(chat.messages) == 4


@EVERY
def test_the_plan_counts_what_was_trained(finished: Callable[[Case, bool], Run], case: Case, upcycled: bool) -> None:
    run = finished(case, upcycled)
    planned = plan(load_recipe(run.directory / "recipe.json"))["stages"][-1]
    assert planned["parameters"] == json.loads((run.stage / "stage.json").read_text())["summary"]["parameters"]
    assert planned["lr"].keys() == {"connector", "adapter"}


# mma on the upcycled parent has the most to restore: routers, balance and modalities
KILLED = {("lora", False), ("mma", True)}


@pytest.mark.parametrize(("case", "upcycled"), list(_cases(lambda case, upcycled: (case.name, upcycled) in KILLED)))
def test_a_killed_stage_continues_exactly(
    finished: Callable[[Case, bool], Run],
    parents: Path,
    tiny_parts: dict[str, str],
    tmp_path: Path,
    case: Case,
    upcycled: bool,
) -> None:
    whole = finished(case, upcycled)
    recipe = continued(parents, tmp_path, tiny_parts, case, upcycled)
    assert killed(recipe, on_step(5, STAGE)) == signal.SIGKILL
    (checkpoint,) = (tmp_path / "run" / STAGE / "checkpoints").glob(f"checkpoint-4/{COMPLETE}")
    marker = read_marker(checkpoint.parent)
    assert marker is not None and marker["parent"] == read_parent(whole.stage)["sha256"]
    held = set(load_file(checkpoint.parent / "trainables.safetensors"))
    assert any(is_adapter_parameter(name) for name in held)
    assert any(name.startswith("model.connector.") for name in held)
    train(recipe)
    assert metrics(tmp_path / "run", STAGE, *COMPARED) == metrics(whole.directory / "run", STAGE, *COMPARED)
    one, two = (load_file(d / "adapter_model.safetensors") for d in (tmp_path / "run" / STAGE, whole.stage))
    assert one.keys() == two.keys()
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())
