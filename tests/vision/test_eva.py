"""EVA-CLIP-g out of whole checkpoints of BLIP-2 and InstructBLIP, through the Auto classes."""

import subprocess
import sys

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    Blip2Config,
    Blip2ForConditionalGeneration,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
)

from sparsevlm.vision.encoder import encode_frames, output_grid, vision_subconfig
from tests import tiny

TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2} | {
    "image_size": 32,
    "patch_size": 8,
    "initializer_range": 0.3,
}
READER = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24} | {
    "encoder_hidden_size": 32,
    "vocab_size": 30,
}


@pytest.mark.parametrize(
    ("configuration", "whole"),
    [(Blip2Config, Blip2ForConditionalGeneration), (InstructBlipConfig, InstructBlipForConditionalGeneration)],
)
def test_reads_the_tower_of_a_whole_model(configuration, whole, tmp_path):
    text = tiny.text_config("llama").to_dict()
    config = configuration(vision_config=TOWER, qformer_config=READER, text_config=text, num_query_tokens=3)
    model = whole(config).eval()
    model.save_pretrained(tmp_path / "whole")
    vision = vision_subconfig(AutoConfig.from_pretrained(tmp_path / "whole"))
    tower, info = AutoModel.from_pretrained(tmp_path / "whole", config=vision, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    frames = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        features = encode_frames(tower, frames, -1, "full")
        # ln_vision, which Q-Formers begin with, is not part of the features
        assert torch.equal(tower.post_layernorm(features), model.vision_model(frames).last_hidden_state)
        tower.save_pretrained(tmp_path / "alone")
        again = AutoModel.from_pretrained(tmp_path / "alone")
        assert torch.equal(encode_frames(again, frames, -1, "full"), features)
    assert output_grid(vision, 32, -1, "full") == (1, 17)
    assert output_grid(vision, 48, -1, "patch") == (6, 6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "first",
    [
        "from transformers import Blip2Config, Blip2VisionConfig as Config",
        "from transformers import InstructBlipForConditionalGeneration, InstructBlipVisionConfig as Config",
        "from transformers import Blip2ForConditionalGeneration, Blip2VisionConfig as Config",
        "from transformers import AutoModel, InstructBlipVisionConfig as Config",
    ],
)
def test_is_registered_whatever_is_imported_first(first):
    sizes = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
    then = f"from transformers import AutoModel; print(type(AutoModel.from_config(Config(**{sizes}))).__module__)"
    result = subprocess.run(
        [sys.executable, "-c", f"import sparsevlm; {first}; {then}"], capture_output=True, text=True
    )
    assert result.stdout.strip() == "sparsevlm.vision.eva", result.stderr
