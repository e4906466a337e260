"""The shapes that the package carries are those of the published checkpoints."""

import json

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

from sparsevlm.model.backbones import DIRECTORY, backbone_config, known_backbones, published_parameters

ENTRIES = {file.stem: json.loads(file.read_text()) for file in sorted(DIRECTORY.glob("*.json"))}


@pytest.mark.parametrize("name", ENTRIES)
def test_parameters_are_those_of_the_checkpoint(name):
    first = ENTRIES[name]["ids"][0]
    config = backbone_config(first)
    tower = not hasattr(config, "vocab_size")
    with torch.device("meta"):
        model = (AutoModel if tower else AutoModelForCausalLM).from_config(config)
    assert sum(weight.numel() for weight in model.parameters()) == published_parameters(first)


def test_every_id_is_known_once_and_in_any_case():
    ids = [name for entry in ENTRIES.values() for name in entry["ids"]]
    assert sorted(ids) == known_backbones() and len({name.lower() for name in ids}) == len(ids)
    assert backbone_config("LMSYS/Vicuna-7B-v1.5").to_dict() == backbone_config("meta-llama/Llama-2-7b-hf").to_dict()


def test_unknown_ids_list_the_known_ones():
    with pytest.raises(ValueError, match=r"did you mean 'lmsys/vicuna-7b-v1\.5'") as caught:
        backbone_config("lmsys/vicuna-7b-v1.6")
    assert all(name in str(caught.value) for name in known_backbones())


@pytest.mark.parametrize("path", ["data/absent/vision", "./tower", "../tower", "/models/tower", "~/tower"])
def test_what_can_only_be_a_directory_is_told_as_one(path):
    with pytest.raises(ValueError, match=r"no directory .* OWNER/NAME") as caught:
        backbone_config(path)
    assert not any(name in str(caught.value) for name in known_backbones())
