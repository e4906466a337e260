"""The unified model: parity with its parts, batches of mixed media, packing, generation, saving."""

from __future__ import annotations

import base64
import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sparsevlm.data.collate import Collator
from sparsevlm.data.sample import IGNORE_INDEX, BadSampleError, Media, Message, Sample
from sparsevlm.model.build import build_model, load_model, set_attention
from sparsevlm.moe.upcycle import upcycle_model
from sparsevlm.recipe.schema import Upcycle
from sparsevlm.vision.tokens import MediaKind
from tests import tiny

TOKENS = 16  # 32 px in patches of 8


def image(color: str = "red") -> Media:
    return Media(MediaKind.IMAGE, tiny.picture(color))


def video(frames: int = 3) -> Media:
    return Media(MediaKind.VIDEO, [tiny.picture(c) for c in ("red", "green", "blue", "yellow")[:frames]], fps=1.0)


def sample(*user: str | Media, answer: str | None = "red") -> Sample:
    messages = [Message("user", user)]
    if answer is not None:
        messages.append(Message("assistant", (answer,)))
    return Sample(tuple(messages), id="x")


SAMPLES = [
    sample(image(), "what is the color ?"),
    sample("how many ?", answer="one two three"),
    sample(image("blue"), "and", image("green"), "?", answer="yes"),
    sample(video(), "what moves ?", answer="a cat"),
]


def collate(processor: Any, samples: list[Sample], packed: bool) -> dict[str, torch.Tensor]:
    pad = processor.tokenizer.pad_token_id
    return Collator(pad_token_id=pad, packed=packed)([[processor.encode(s)] for s in samples])


def test_labels_are_the_assistants_tokens(tiny_model: Any) -> None:
    _, processor = tiny_model
    two_turns = Sample(
        (
            Message("user", (image(), "what is it ?")),
            Message("assistant", ("a cat",)),
            Message("user", ("how many ?",)),
            Message("assistant", ("two",)),
        )
    )
    encoded = processor.encode(two_turns)
    targets = encoded.labels[encoded.labels != IGNORE_INDEX]
    assert processor.tokenizer.convert_ids_to_tokens(targets.tolist()) == [
        "a",
        "cat",
        "<|im_end|>",
        "two",
        "<|im_end|>",
    ]
    assert (encoded.input_ids == processor.image_token_id).sum() == TOKENS == encoded.num_visual_tokens
    assert torch.equal(encoded.input_ids[encoded.labels != IGNORE_INDEX], targets)


@pytest.mark.parametrize("index", range(len(SAMPLES)))
def test_measure_agrees_with_encode(tiny_model: Any, index: int) -> None:
    _, processor = tiny_model
    for limit in (None, 40, 24):
        try:
            encoded = processor.encode(SAMPLES[index], limit)
        except BadSampleError:
            with pytest.raises(BadSampleError):
                processor.measure(SAMPLES[index], limit)
        else:
            assert processor.measure(SAMPLES[index], limit) == (encoded.length, encoded.num_visual_tokens)
            assert limit is None or encoded.length <= limit


def test_a_sample_without_target_is_bad(tiny_model: Any) -> None:
    with pytest.raises(BadSampleError, match="no target token"):
        tiny_model[1].encode(sample(image(), "what ?", answer=None))


def test_literal_placeholder_in_text_is_bad(tiny_model: Any) -> None:
    with pytest.raises(BadSampleError, match="2 visual placeholders"):
        tiny_model[1].encode(sample(image(), "<image> what ?"))


def test_text_logits_equal_the_source_language_model(tiny_model: Any, tiny_parts: dict[str, str]) -> None:
    from transformers import AutoModelForCausalLM

    source = AutoModelForCausalLM.from_pretrained(tiny_parts["language"]).eval()
    ids = torch.randint(10, 50, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(tiny_model[0].eval()(input_ids=ids).logits, source(input_ids=ids).logits)


def test_training_loss_over_targets_equals_loss_over_all_logits(tiny_model: Any) -> None:
    model, processor = tiny_model
    batch = collate(processor, SAMPLES, packed=False)
    full = model.eval()(**batch)
    lean = model.train()(**batch)
    assert lean.logits is None
    torch.testing.assert_close(lean.loss, full.loss)
    targets = int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())
    torch.testing.assert_close(model(**batch, num_items_in_batch=2 * targets).loss, full.loss / 2)


@pytest.mark.parametrize("attention", ["packed_sdpa", "sdpa", "eager"])
def test_packed_loss_and_gradients_equal_padded(tiny_model: Any, attention: str) -> None:
    model, processor = tiny_model
    set_attention(model, attention)
    model.train()
    results = []
    for packed in (False, True):
        model.zero_grad()
        loss = model(**collate(processor, SAMPLES, packed)).loss
        loss.backward()
        results.append((loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    (loss_a, grads_a), (loss_b, grads_b) = results
    torch.testing.assert_close(loss_a, loss_b, atol=1e-5, rtol=1e-5)
    assert grads_a.keys() == grads_b.keys()
    for name in grads_a:  # float32, 16-term sums in another order: 1e-5 was never reached in 100 seeds
        torch.testing.assert_close(grads_a[name], grads_b[name], atol=1e-5, rtol=1e-4, msg=name)


def test_every_trainable_parameter_gets_a_gradient_from_a_text_only_batch(tiny_model: Any) -> None:
    model, processor = tiny_model
    model.train()
    model(**collate(processor, [SAMPLES[1]], packed=True)).loss.backward()
    connector = dict(model.model.connector.named_parameters())
    assert connector
    assert all(p.grad is not None and not p.grad.any() for p in connector.values())


def test_text_only_batch_with_another_picture_size(tiny_parts: dict[str, str]) -> None:
    section = tiny.recipe_model(
        tiny_parts, vision={"image_size": 48}, connector=[{"type": "pixel_shuffle", "factor": 3}, {"type": "mlp"}]
    )
    model, processor = build_model(section)
    assert processor.encode(SAMPLES[0]).visual_lengths == (4,)
    model.train()(**collate(processor, [SAMPLES[1]], packed=True)).loss.backward()
    assert all(p.grad is not None for p in model.model.connector.parameters())


def test_documents_of_a_packed_row_do_not_see_each_other(tiny_model: Any) -> None:
    model, processor = tiny_model
    model.eval()
    alone = model(**collate(processor, [SAMPLES[2]], packed=True)).logits[0]
    batch = collate(processor, [SAMPLES[0], SAMPLES[2], SAMPLES[3]], packed=True)
    row = model(**batch).logits[0]
    by_positions = model(**{k: v for k, v in batch.items() if not k.startswith(("cu_seq", "max_length"))}).logits[0]
    torch.testing.assert_close(by_positions, row, atol=1e-5, rtol=1e-5)
    start = processor.encode(SAMPLES[0]).length
    torch.testing.assert_close(row[start : start + alone.shape[0]], alone, atol=1e-5, rtol=1e-5)


def test_wrong_number_of_placeholders_is_refused(tiny_model: Any) -> None:
    model, processor = tiny_model
    batch = collate(processor, [SAMPLES[0]], packed=False)
    batch["input_ids"][0, -1] = processor.image_token_id
    with pytest.raises(ValueError, match=r"17 visual placeholders .* 16 visual tokens"):
        model(**batch)


def deep_grey() -> Image.Image:
    return Image.fromarray(np.full((30, 40), 3000, np.uint16))  # 16 bits: its upper byte is 11


@pytest.mark.parametrize("picture", [Image.new("RGBA", (40, 30), (10, 200, 30, 0)), deep_grey()], ids=["clear", "deep"])
def test_a_picture_given_by_a_caller_is_read_as_in_training(
    picture: Image.Image, tiny_model: Any, tmp_path: Path
) -> None:
    _, processor = tiny_model
    file = tmp_path / "a.png"
    picture.save(file)
    expected = processor.encode(sample(Media(MediaKind.IMAGE, file), "what")).pixel_values
    coded = base64.b64encode(file.read_bytes()).decode()
    for given in (picture, file, str(file), coded, f"data:image/png;base64,{coded}"):
        assert torch.equal(processor(images=given, text="<image> what")["pixel_values"], expected), str(given)[:40]
    turn = {"role": "user", "content": [{"type": "image", "path": str(file)}, {"type": "text", "text": "what"}]}
    batch = processor.apply_chat_template([turn], tokenize=True, return_dict=True)
    assert torch.equal(batch["pixel_values"], expected)
    with pytest.raises(ValueError, match="neither an address"):
        processor(images="none.png", text="<image> what")


def prompts(*which: int) -> list[Sample]:
    return [Sample(SAMPLES[i].messages[:1]) for i in which]


def generate(model: Any, processor: Any, samples: list[Sample], **options: Any) -> list[list[int]]:
    batch = processor.encode_prompts(samples)
    out = model.generate(**batch, max_new_tokens=8, do_sample=False, eos_token_id=10_000, pad_token_id=0, **options)
    return out[:, batch["input_ids"].shape[1] :].tolist()


def test_batched_generation_equals_one_by_one(tiny_model: Any) -> None:
    model, processor = tiny_model
    model.eval()
    together = generate(model, processor, prompts(0, 1, 2, 3))
    assert together == [generate(model, processor, [p])[0] for p in prompts(0, 1, 2, 3)]


def test_cached_decoding_equals_full(tiny_model: Any) -> None:
    model, processor = tiny_model
    model.eval()
    assert generate(model, processor, prompts(3, 1)) == generate(model, processor, prompts(3, 1), use_cache=False)


def test_beams_and_return_sequences_keep_media_with_their_rows(tiny_model: Any) -> None:
    model, processor = tiny_model
    model.eval()
    together = generate(model, processor, prompts(2, 1, 0), num_beams=2, num_return_sequences=2)
    single = [g for p in prompts(2, 1, 0) for g in generate(model, processor, [p], num_beams=2, num_return_sequences=2)]
    assert together == single


def test_save_and_reload_is_bit_identical(tiny_model: Any, tmp_path: Path) -> None:
    model, processor = tiny_model
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, processor_again = load_model(tmp_path)
    assert again.config.to_dict() | {"_name_or_path": ""} == model.config.to_dict() | {"_name_or_path": ""}
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert processor_again.to_dict() == processor.to_dict()
    assert processor_again.chat_template == processor.chat_template
    batch = collate(processor, SAMPLES, packed=True)
    batch_again = collate(processor_again, SAMPLES, packed=True)
    assert torch.equal(model.eval()(**batch).logits, again.eval()(**batch_again).logits)


@pytest.mark.parametrize("language", ["llama", "phi"])
def test_upcycled_model_keeps_its_function_and_reloads(tmp_path: Path, language: str) -> None:
    model, processor = build_model(tiny.recipe_model(tiny.save_parts(tmp_path / "parts", language=language)))
    batch = collate(processor, SAMPLES, packed=True)
    dense = model.eval()(**batch).logits
    upcycle_model(model, Upcycle(layers="alternate", experts=4, top_k=2), seed=0)
    sparse = model.eval()(**batch).logits
    torch.testing.assert_close(sparse, dense, atol=1e-5, rtol=0)
    model.save_pretrained(tmp_path / "moe")
    processor.save_pretrained(tmp_path / "moe")
    again, _ = load_model(tmp_path / "moe")
    assert torch.equal(again.eval()(**batch).logits, sparse)
    out = again.train()(**batch)
    assert len(again.eval()(**batch, output_router_logits=True).router_logits) == 1
    out.loss.backward()
    assert again.model.language_model.layers[0].mlp.gate.weight.grad.abs().sum() > 0


def test_experts_kernel_can_be_chosen_and_a_live_config_rebuilds(tiny_model: Any, tmp_path: Path) -> None:
    model, processor = tiny_model
    upcycle_model(model, Upcycle(), seed=0)
    batch = collate(processor, SAMPLES, packed=True)
    want = model.eval()(**batch).logits
    model.save_pretrained(tmp_path)
    for name in ("eager", "batched_mm", "grouped_mm"):
        loaded = type(model).from_pretrained(tmp_path, experts_implementation=name)
        assert loaded.model.language_model.config._experts_implementation == name
        torch.testing.assert_close(loaded.eval()(**batch).logits, want, atol=1e-5, rtol=0)
    loaded.set_experts_implementation("eager")
    assert loaded.model.language_model.config._experts_implementation == "eager"
    rebuilt = type(model)(copy.deepcopy(model.config))
    rebuilt.load_state_dict(model.state_dict())
    set_attention(rebuilt, "auto")
    torch.testing.assert_close(rebuilt.eval()(**batch).logits, want, atol=1e-5, rtol=0)


def test_an_incomplete_checkpoint_is_refused(tiny_model: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model, processor = tiny_model
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    lost = [name for name in weights if ".connector." in name]
    save_file({k: v for k, v in weights.items() if k not in lost}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=rf"{len(lost)} weights are missing"):
        load_model(tmp_path)


def test_auto_classes_and_pipeline(tiny_model: Any, tmp_path: Path) -> None:
    model, processor = tiny_model
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    Image.new("RGB", (20, 20), "red").save(tmp_path / "red.png")
    code = f"""
import sparsevlm
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline
path = {str(tmp_path)!r}
model = AutoModelForImageTextToText.from_pretrained(path)
assert type(model).__name__ == "SparseVLMForConditionalGeneration", type(model)
processor = AutoProcessor.from_pretrained(path)
assert type(processor).__name__ == "SparseVLMProcessor"
pipe = pipeline("image-text-to-text", model=path)
content = [{{"type": "image", "path": path + "/red.png"}}, {{"type": "text", "text": "what ?"}}]
chat = [{{"role": "user", "content": content}}]
out = pipe(text=chat, max_new_tokens=3, return_full_text=False)
assert isinstance(out[0]["generated_text"], str), out
inputs = processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_assistant_tokens_mask=True,
    add_generation_prompt=False)
assert len(inputs["assistant_masks"][0]) == inputs["input_ids"].shape[1]
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_import_is_light() -> None:
    code = "import sys, sparsevlm, sparsevlm.registry; print('torch' in sys.modules, 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split() == ["False"] * 2


@pytest.mark.parametrize("vision", ["clip", "siglip", "vit", "dinov2"])
@pytest.mark.parametrize("language", ["llama", "qwen3"])
def test_other_parts(tmp_path: Path, vision: str, language: str) -> None:
    extra = {"head_dim": 8} if language == "qwen3" else {}
    model, processor = build_model(tiny.recipe_model(tiny.save_parts(tmp_path, vision, language, **extra)))
    batch = collate(processor, SAMPLES, packed=True)
    loss = model.train()(**batch).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert len(generate(model.eval(), processor, prompts(0, 3))) == 2


def test_wrong_connector_width_names_both_widths(tiny_parts: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="ends at width 7 but the language model is 32 wide"):
        build_model(tiny.recipe_model(tiny_parts, connector=[{"type": "linear", "dim": 7}]))
