"""Native export: what our model computes, a class of transformers computes too, and writes as it always does."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from sparsevlm.data.sample import Media, Message, Sample
from sparsevlm.export import check
from sparsevlm.export.families import NoHomeError
from sparsevlm.export.native import build_native, export, place
from sparsevlm.export.processors import llava_processor
from sparsevlm.model.build import load_model
from sparsevlm.vision.tokens import MediaKind
from tests import tiny
from tests.export.models import make_model, save

TOLERANCE = 1e-5
"""Float32 logits of size 5: the weights are equal, sums over experts run in another order (2e-6 measured)."""

ALL, FIRST = {"layers": "all"}, {"layers": [0]}
FAMILIES = {
    "llama-clip": ("clip", "llama", None, {}, "llama"),
    "llama-siglip": ("siglip", "llama", None, {"tie_word_embeddings": True}, "llama"),
    "mistral-dinov2": ("dinov2", "mistral", None, {"sliding_window": 8}, "mistral"),
    "qwen2-vit": ("vit", "qwen2", None, {}, "qwen2"),
    "qwen3-siglip": ("siglip", "qwen3", None, {"head_dim": 16}, "qwen3"),
    "llama-all": ("clip", "llama", ALL, {"head_dim": 16, "rope_theta": 500.0}, "mixtral"),
    "llama-narrow": ("clip", "llama", ALL | {"granularity": 2}, {}, "mixtral"),
    "llama-raw": ("clip", "llama", ALL | {"router": {"norm_topk_prob": False}}, {}, "qwen2_moe"),
    "llama-gated": ("siglip", "llama", ALL | {"shared_expert": "gated"}, {}, "qwen2_moe"),
    "qwen2-gated-narrow": ("clip", "qwen2", FIRST | {"shared_expert": "gated", "granularity": 2}, {}, "qwen2_moe"),
    "qwen3-narrow": (
        "clip",
        "qwen3",
        FIRST | {"granularity": 3, "router": {"scoring": "topk_softmax"}},
        {},
        "qwen3_moe",
    ),
    "llama-top1": ("siglip", "llama", ALL | {"top_k": 1}, {"tie_word_embeddings": True}, "mixtral"),
    "mistral-all": ("clip", "mistral", ALL, {"sliding_window": 8}, "mixtral"),
    "llama-some": ("siglip", "llama", FIRST, {"rms_norm_eps": 1e-2, "rope_theta": 500.0}, "qwen2_moe"),
    "mistral-some": ("clip", "mistral", FIRST, {"sliding_window": None}, "qwen2_moe"),
    "qwen2-some": ("clip", "qwen2", FIRST, {"tie_word_embeddings": True}, "qwen2_moe"),
    "qwen3-some": ("clip", "qwen3", FIRST, {"head_dim": 16, "attention_bias": True}, "qwen3_moe"),
    "qwen3-all": ("siglip", "qwen3", ALL, {"head_dim": 16}, "qwen3_moe"),
}
"""Tower, decoder, upcycling, overrides of the decoder -> native text family."""


def small(name):
    vision, language, upcycle, overrides, _ = FAMILIES[name]
    if upcycle is not None:
        upcycle = {"experts": 3, "top_k": 2, "experts_implementation": "eager"} | upcycle
    return vision, language, upcycle, overrides


def prompt(with_picture=True):
    content = (Media(MediaKind.IMAGE, check.picture()), "what is in this picture ?")
    return Sample((Message("user", content if with_picture else content[1:]),), id="test")


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_native_class_gives_our_logits_and_writes_its_own_keys(name, tmp_path):
    vision, language, upcycle, overrides = small(name)
    ours, processor = make_model(tmp_path, vision, language, upcycle, **overrides)
    placement = place(ours.config)
    assert placement.text_config.model_type == FAMILIES[name][-1]
    inputs = processor.encode_prompts([prompt()])
    want = ours(**inputs).logits
    assert want.abs().max() > 0.3  # else nothing would show

    build_native(ours, placement).save_pretrained(tmp_path / "out")
    native = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").eval()
    assert type(native).__name__ == placement.architecture == "LlavaForConditionalGeneration"
    kept = {key: inputs[key] for key in ("input_ids", "attention_mask", "pixel_values")}
    assert (native(**kept).logits - want).abs().max() < TOLERANCE

    # saved again, the files are the same ...
    native.save_pretrained(tmp_path / "again")
    written, again = (load_file(tmp_path / d / "model.safetensors") for d in ("out", "again"))
    assert written.keys() == again.keys()
    assert all(torch.equal(written[key], again[key]) for key in written)
    assert (tmp_path / "out/config.json").read_text() == (tmp_path / "again/config.json").read_text()
    # ... and hold the keys that transformers writes for a model of that configuration that never was ours
    AutoModelForImageTextToText.from_config(placement.config).save_pretrained(tmp_path / "theirs")
    theirs = load_file(tmp_path / "theirs/model.safetensors")
    assert {k: v.shape for k, v in written.items()} == {k: v.shape for k, v in theirs.items()}


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama-siglip", "llama-all", "llama-some", "qwen2-some", "qwen3-some"])
def test_text_only_is_the_language_models_own_family(name, tmp_path):
    vision, language, upcycle, overrides = small(name)
    ours, processor = make_model(tmp_path, vision, language, upcycle, **overrides)
    placement = place(ours.config, text_only=True)
    inputs = processor.encode_prompts([prompt(with_picture=False)])
    want = ours(**inputs).logits
    build_native(ours, placement).save_pretrained(tmp_path / "out")
    native = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert type(native).__name__ == placement.architecture
    assert native.config.model_type == FAMILIES[name][-1]
    assert (native(**inputs).logits - want).abs().max() < TOLERANCE


def test_narrow_experts_and_shared_expert_fit_where_the_class_has_the_field():
    config = tiny.text_config("qwen2")
    from sparsevlm.export.families import sparse_text_config

    moe = {"layers": [0], "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
    assert sparse_text_config(config, moe).moe_intermediate_size == 12
    gated = sparse_text_config(config, moe | {"shared_expert": "gated"})
    assert gated.shared_expert_intermediate_size == config.intermediate_size


def test_neutral_shared_expert_stays_neutral_when_trained(tmp_path):
    """All three matrices zero: no gradient reaches them or their gate."""
    vision, language, upcycle, overrides = small("llama-some")
    ours, processor = make_model(tmp_path, vision, language, upcycle, **overrides)
    build_native(ours, place(ours.config, text_only=True)).save_pretrained(tmp_path / "out")
    native = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    inputs = processor.encode_prompts([prompt(with_picture=False)])
    native(**inputs, labels=inputs["input_ids"]).loss.backward()
    shared = {n: p for n, p in native.named_parameters() if "shared_expert" in n}
    assert len(shared) == 4
    assert all(p.abs().max() == 0 for p in shared.values())
    assert all(p.grad is not None and p.grad.abs().max() == 0 for p in shared.values())
    assert native.model.layers[0].mlp.experts.down_proj.grad.abs().max() > 0


def test_two_families_in_a_process_that_cannot_import_us(tmp_path):
    """Logits, prompt, pixels and greedy text, end to end; the check raises if any differs."""
    pairs = []
    for name, fields in (
        ("llama-all", {"vision": {"resize": "crop"}}),
        ("llama-some", {"vision": {"resize": "pad"}}),
    ):
        vision, language, upcycle, overrides = small(name)
        path = save(*make_model(tmp_path / name, vision, language, upcycle, fields, **overrides), tmp_path / name / "m")
        report = export(path, tmp_path / name / "out", check=False)
        assert report.refusal is None
        assert not list(tmp_path.glob("*/.out.partial"))
        expected = check.reference(*load_model(path), tmp_path / name / "check")
        pairs.append((report.directory, expected))
    text = export(path, tmp_path / "text", text_only=True, check=False)
    expected = check.reference(*load_model(path), tmp_path / "check", text_only=True)
    results = check.compare_all([*pairs, (text.directory, expected)])
    assert [r.architecture for r in results] == ["LlavaForConditionalGeneration"] * 2 + ["Qwen2MoeForCausalLM"]
    assert all(r.logits < TOLERANCE and r.same_text for r in results)
    assert results[0].pixels == 0
    assert results[1].pixels is not None
    assert results[1].pixels <= 1 / 255 / 0.26  # the padding's colour is a whole number


@pytest.mark.parametrize("break_it", ["weight", "template", "mean"])
def test_the_check_sees_what_is_wrong(break_it, tmp_path):
    path = save(*make_model(tmp_path / "parts"), tmp_path / "m")
    out = export(path, tmp_path / "out", check=False).directory
    expected = check.reference(*load_model(path), tmp_path / "check")
    answer = {
        "class": "X",
        "samples": [
            {"same_prompt": True, "logits": 0.0, "mean_logits": 0.0, "pixels": 0.0, "text": t} for t in expected.texts
        ],
    }
    sample = answer["samples"][0]
    sample |= {
        "weight": {"logits": 0.1},
        "template": {"same_prompt": False, "input_ids": [1]},
        "mean": {"pixels": 0.1},
    }[break_it]
    (tmp_path / "check/answer.json").write_text(json.dumps(answer))
    assert out.is_dir()
    with pytest.raises(ValueError, match={"weight": "logits", "template": "prompt", "mean": "pixels"}[break_it]):
        check._read_answer(expected)


@torch.no_grad()
@pytest.mark.parametrize(
    ("vision", "fields", "tokens"),
    [
        ("clip", {"select": "full"}, 17),
        ("clip", {"layer": [-1, -2]}, 16),
        ("siglip", {"layer": [0, -1], "select": "full"}, 16),
    ],
)
def test_layers_prefix_tokens_and_prompts(vision, fields, tokens, tmp_path):
    """Kept prefix tokens, concatenated layers; the native processor makes our prompt with as many image tokens."""
    connector = [{"type": "mlp", "activation": "gelu_tanh", "bias": False}]
    ours, processor = make_model(tmp_path, vision, model={"vision": fields, "connector": connector})
    placement = place(ours.config)
    build_native(ours, placement).save_pretrained(tmp_path / "out")
    native = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").eval()
    content = [{"type": "image", "image": check.picture()}, {"type": "text", "text": "what is in this picture ?"}]
    inputs = llava_processor(processor, placement.config).apply_chat_template(
        [[{"role": "user", "content": content}]],
        tokenize=True,
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    )
    want = processor.encode_prompts([prompt()])
    assert torch.equal(inputs["input_ids"], want["input_ids"])
    assert (inputs["input_ids"] == ours.config.image_token_id).sum() == tokens
    got = native(**{**inputs, "pixel_values": want["pixel_values"]}).logits
    assert (got - ours(**want).logits).abs().max() < TOLERANCE


@pytest.mark.parametrize("resize", ["stretch", "crop", "pad"])
@pytest.mark.parametrize("size", [(150, 100), (40, 97), (32, 32)])
def test_pixels(resize, size, tmp_path):
    import numpy as np

    ours, processor = make_model(tmp_path, model={"vision": {"resize": resize, "mean": [0.5, 0.4, 0.3]}})
    native = llava_processor(processor, place(ours.config).config)
    native.save_pretrained(tmp_path / "p")
    from transformers import AutoImageProcessor

    pil = AutoImageProcessor.from_pretrained(tmp_path / "p", backend="pil")
    picture = check.picture().resize(size)
    got = torch.as_tensor(np.asarray(pil(picture)["pixel_values"][0]))
    want = processor.encode_prompts([Sample((Message("user", (Media(MediaKind.IMAGE, picture), "?")),), id="t")])
    difference = (got - want["pixel_values"][0]).abs()
    assert difference.max() <= (1 / 255 / min(processor.image_spec.std) if resize == "pad" else 1e-6)
    if resize == "pad":  # only the padding differs
        assert (difference > 1e-6).any(dim=0).float().mean() <= 1 - round(min(size) * 32 / max(size)) / 32


def test_prompt_gets_no_tokens_on_top(tmp_path):
    """A tokenizer that begins every text with <s> must not do so to a rendered conversation."""
    from tokenizers import processors

    ours, processor = make_model(tmp_path, model={"image_token": "<picture>"})
    tokenizer = processor.tokenizer
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    assert tokenizer("cat")["input_ids"][0] == tokenizer.bos_token_id
    native = llava_processor(processor, place(ours.config).config)
    content = [{"type": "image", "image": check.picture()}, {"type": "text", "text": "what is in this picture ?"}]
    got = native.apply_chat_template(
        [[{"role": "user", "content": content}]],
        tokenize=True,
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    )
    assert torch.equal(got["input_ids"], processor.encode_prompts([prompt()])["input_ids"])
    native.save_pretrained(tmp_path / "p")
    assert AutoTokenizer.from_pretrained(tmp_path / "p")("cat")["input_ids"] == tokenizer.encode(
        "cat", add_special_tokens=False
    )
    assert tokenizer("cat")["input_ids"][0] == tokenizer.bos_token_id  # ours is as it was


REFUSED = {
    "blocks": ({"connector": [{"type": "pixel_shuffle", "factor": 2}, {"type": "mlp"}]}, ["pixel_shuffle"]),
    "no mlp": ({"connector": [{"type": "linear"}]}, ["linear", "0 mlp"]),
    "mlp": (
        {"connector": [{"type": "mlp", "depth": 3, "norm": "pre", "hidden_dim": 8}]},
        ["depth 3", "norm", "widths"],
    ),
    "size": ({"vision": {"image_size": 48}}, ["48 pixels"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_everything(name, tmp_path):
    fields, words = REFUSED[name]
    ours, _ = make_model(tmp_path, model=fields)
    ours.config.lm_head_bias = True
    with pytest.raises(NoHomeError) as caught:
        place(ours.config)
    for word in [*words, "lm_head_bias"]:
        assert any(word in reason for reason in caught.value.reasons), word
    assert all("set " in r or "take " in r or "leave " in r for r in caught.value.reasons)  # what to change
    assert all(reason in str(caught.value) for reason in caught.value.reasons)


def test_cut_pictures_have_no_home(tmp_path):
    ours, processor = make_model(tmp_path / "parts", model={"vision": {"tiling": {"type": "monkey"}}})
    with pytest.raises(NoHomeError, match=r"tiling, 'monkey'"):
        export(save(ours, processor, tmp_path / "m"), tmp_path / "out", form="native")


def test_tower_without_a_home():
    from transformers import Dinov2WithRegistersConfig, ResNetConfig

    from sparsevlm.model.configuration_sparsevlm import SparseVLMConfig

    registers = Dinov2WithRegistersConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )
    for vision, word in ((registers, "5 prefix tokens"), (ResNetConfig(), "resnet")):
        config = SparseVLMConfig(vision_config=vision, text_config=tiny.text_config())
        with pytest.raises(NoHomeError, match=word):
            place(config)


def test_auto_falls_back_to_our_class_and_says_why(tmp_path):
    fields = {"connector": [{"type": "pixel_shuffle", "factor": 2}, {"type": "mlp"}]}
    path = save(*make_model(tmp_path / "parts", model=fields), tmp_path / "m")
    report = export(path, tmp_path / "out", check=False)
    assert report.placement.architecture == "SparseVLMForConditionalGeneration"
    assert "pixel_shuffle" in str(report.refusal)
    again, processor = load_model(tmp_path / "out")
    ours, _ = load_model(path)
    inputs = processor.encode_prompts([prompt()])
    with torch.no_grad():
        assert torch.equal(again.eval()(**inputs).logits, ours.eval()(**inputs).logits)
    with pytest.raises(NoHomeError, match="pixel_shuffle"):
        export(path, tmp_path / "native", form="native")
    with pytest.raises(ValueError, match="exists already"):
        export(path, tmp_path / "out")
    assert not (tmp_path / "native").exists()
    # the language model alone has a home all the same
    assert export(path, tmp_path / "text", text_only=True, check=False).placement.architecture == "LlamaForCausalLM"


def test_a_failed_check_leaves_nothing(tmp_path, monkeypatch):
    path = save(*make_model(tmp_path / "parts"), tmp_path / "m")

    def fail(*_, **__):
        raise ValueError("logits differ")

    monkeypatch.setattr(check, "compare", fail)
    with pytest.raises(ValueError, match="logits differ"):
        export(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / ".out.partial").exists()


def test_only_our_models(tmp_path):
    paths = tiny.save_parts(tmp_path)
    with pytest.raises(ValueError, match="'llama' model: there is no tower"):
        export(paths["language"], tmp_path / "out")


@torch.no_grad()
def test_language_model_without_a_home_keeps_our_text_class(tmp_path):
    routing = {"scoring": "sigmoid"}
    path = save(*make_model(tmp_path / "parts", upcycle={"layers": [0], "router": routing}), tmp_path / "m")
    with pytest.raises(NoHomeError, match=r"router\.scoring"):
        export(path, tmp_path / "out", form="native", text_only=True)
    report = export(path, tmp_path / "out", text_only=True, check=False)
    assert "router.scoring" in str(report.refusal)
    native = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert type(native).__name__ == report.placement.architecture == "SparseVLMTextForCausalLM"
    ours, processor = load_model(path)
    inputs = processor.encode_prompts([prompt(with_picture=False)])
    assert (native(**inputs).logits - ours.eval()(**inputs).logits).abs().max() < TOLERANCE
