"""Gated cross-attention: against a loop over tokens, closed gates, documents apart, cached steps, what trains."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsevlm.data.collate import Collator
from sparsevlm.data.sample import Media, Message, Sample
from sparsevlm.fusion.cross_attention import GatedCrossAttention
from sparsevlm.fusion.media import SEEN, see_media
from sparsevlm.model.build import build_model, load_model
from sparsevlm.model.modeling_sparsevlm import SparseVLMForConditionalGeneration
from sparsevlm.recipe.load import load_recipe
from sparsevlm.recompute import setting
from sparsevlm.train.plan import plan
from sparsevlm.vision.tokens import Grid, MediaKind, VisualTokens
from tests import tiny
from tests.fusion.common import IMAGE, build, disturb, packed, padded, pictures

FUSION = {"type": "gated_cross_attention", "every": 2, "heads": 2, "head_dim": 8}
ALL = {**FUSION, "sees": "all"}
FIRST = [2, 11, IMAGE, 12, 13, IMAGE, 14, 15]  # text before the first picture, two pictures
SECOND = [2, 16, 17, 18]  # no picture
THIRD = [IMAGE, 19, 20, 21, 22]
DOCUMENTS = [FIRST, SECOND, THIRD]
CLOSE: Any = {"atol": 2e-6, "rtol": 0}
"""float32, the same sums in another order: measured 2e-7 at the most, of values up to 3."""


def opened(fusion: dict[str, Any] = FUSION, **config: Any) -> Any:
    """A model whose gates are open."""
    model = build(fusion, **config)
    disturb(model, "_gate")
    return model


def naive(block: GatedCrossAttention, x: Tensor, ids: list[int], media: list[Tensor], sees: str) -> Tensor:
    """One document ``(T, H)``, token by token, head by head, as OpenFlamingo's formulas say."""
    out, current = [], 0
    heads = block.attn.heads
    for token, state in zip(ids, x, strict=True):
        current += token == IMAGE
        visible = media[:current] if sees == "all" else media[max(current - 1, 0) : current]
        added = torch.zeros_like(state)
        if visible:
            query = block.attn.to_q(block.attn.norm(state))
            key, value = block.attn.to_kv(torch.cat(visible)).chunk(2, dim=-1)
            width = query.shape[0] // heads
            found = []
            for head in range(heads):
                part = slice(head * width, (head + 1) * width)
                scores = torch.stack([query[part] @ k[part] for k in key]) / math.sqrt(width)
                found.append((scores.softmax(0)[:, None] * value[:, part]).sum(0))
            added = block.attn.to_out(torch.cat(found))
        state = state + torch.tanh(block.attn_gate) * added
        norm, up, _, down = block.ff
        out.append(state + torch.tanh(block.ff_gate) * down(torch.nn.functional.gelu(up(norm(state)))))
    return torch.stack(out)


@pytest.mark.parametrize("sees", ["last", "all"])
def test_block_is_the_loop_over_tokens(sees: Any) -> None:
    torch.manual_seed(0)
    block = GatedCrossAttention(16, 12, index=0, heads=2, head_dim=4)
    torch.nn.init.constant_(block.attn_gate, 0.7)
    torch.nn.init.constant_(block.ff_gate, -0.4)
    sizes = [4, 2, 6]  # media of several sizes
    features = torch.randn(sum(sizes), 12)
    tokens = VisualTokens(features, tuple(Grid(1, 1, n) for n in sizes), (MediaKind.IMAGE,) * 3, (0, 0, 2))
    batch = padded(DOCUMENTS)
    x = torch.randn(*batch["input_ids"].shape, 16)
    seen, count = see_media(batch["input_ids"] == IMAGE, tokens, sees)
    assert count.tolist() == [2, 0, 1]
    with setting(SEEN, seen):
        got = block(x)
    media = list(features.split(sizes))
    for row, (ids, own) in enumerate(zip(DOCUMENTS, [media[:2], [], media[2:]])):
        want = naive(block, x[row, : len(ids)], ids, own, sees)
        torch.testing.assert_close(got[row, : len(ids)], want, **CLOSE)


def test_the_start_is_the_language_model_to_the_bit() -> None:
    model, plain = build(FUSION), build(None)
    plain.load_state_dict(
        {k: v for k, v in model.state_dict().items() if "gated_cross_attn" not in k and "connector" not in k},
        strict=False,
    )
    batch = padded(DOCUMENTS)
    with torch.no_grad():
        got = model(**batch, **pictures(3)).logits
        want = plain(
            inputs_embeds=plain.get_input_embeddings()(batch["input_ids"]), attention_mask=batch["attention_mask"]
        )
    assert torch.equal(got, want.logits)


def test_blocks_stand_before_every_kth_layer() -> None:
    model = build(FUSION, layers=5)
    blocks = [name for name, module in model.named_modules() if isinstance(module, GatedCrossAttention)]
    assert blocks == [f"model.language_model.layers.{i}.gated_cross_attn" for i in (1, 3)]
    with pytest.raises(ValueError, match="every 9th layer, but the language model has 4 layers"):
        build({**FUSION, "every": 9})


@pytest.mark.parametrize("fusion", [FUSION, ALL], ids=["last", "all"])
@pytest.mark.parametrize("order", [DOCUMENTS, DOCUMENTS[::-1], [SECOND, FIRST]], ids=["abc", "cba", "ba"])
def test_packed_is_padded_is_alone(fusion: dict[str, Any], order: list[list[int]]) -> None:
    model = opened(fusion)
    everything = pictures(sum(document.count(IMAGE) for document in order))
    with torch.no_grad():
        together = model(**packed(order), **everything).logits[0].split([len(document) for document in order])
        rows = model(**padded(order), **everything).logits
        left = model(**padded(order, left=True), **everything).logits
        used = 0
        for row, document in enumerate(order):
            count = document.count(IMAGE)
            own = {key: value[used : used + count] for key, value in everything.items()} if count else {}
            used += count
            alone = model(torch.tensor([document]), **own).logits[0]
            torch.testing.assert_close(together[row], alone, **CLOSE)
            torch.testing.assert_close(rows[row, : len(document)], alone, **CLOSE)
            torch.testing.assert_close(left[row, -len(document) :], alone, **CLOSE)


@pytest.mark.parametrize("fusion", [FUSION, ALL], ids=["last", "all"])
def test_no_token_sees_what_it_must_not(fusion: dict[str, Any]) -> None:
    """The gradient of a token's logits says which pictures it depends on, through all layers."""
    model = opened(fusion)
    media = pictures(3)
    media["pixel_values"].requires_grad_()
    for parameter in model.model.vision_tower.parameters():
        parameter.requires_grad_(True)
    row = packed([THIRD, FIRST, SECOND])  # pictures 0 | 1, 2 | none
    logits = model(**row, **media).logits[0]

    def depends(position: int) -> list[int]:
        (grad,) = torch.autograd.grad(logits[position].sum(), media["pixel_values"], retain_graph=True)
        return [i for i in range(3) if float(grad[i].abs().sum()) > 0]

    assert depends(0) == depends(4) == [0]
    assert depends(5) == depends(6) == []  # before the first picture of its document
    assert depends(7) == depends(9) == [1]
    assert 2 in depends(10) and 0 not in depends(10)  # by self-attention, also on what earlier tokens saw
    assert depends(13) == depends(16) == []


def test_last_sees_only_the_last() -> None:
    """In a model of one layer nothing but the block carries pictures to the last token's own state."""
    tokens = VisualTokens(torch.randn(4, 12), (Grid(1, 1, 2),) * 2, (MediaKind.IMAGE,) * 2, (0, 0))
    placeholders = torch.tensor([FIRST]) == IMAGE
    visible = {
        sees: see_media(placeholders, tokens, sees)[0].visible(torch.device("cpu"))[0].long().tolist()  # pyright: ignore
        for sees in ("last", "all")
    }
    none, first, second, both = [0] * 4, [1, 1, 0, 0], [0, 0, 1, 1], [1] * 4
    assert visible["last"] == [none] * 2 + [first] * 3 + [second] * 3
    assert visible["all"] == [none] * 2 + [first] * 3 + [both] * 3


@pytest.mark.parametrize("fusion", [FUSION, ALL], ids=["last", "all"])
def test_cached_steps_are_the_full_pass(fusion: dict[str, Any]) -> None:
    model = opened(fusion)
    batch, media = padded([FIRST, [*SECOND, 23, 24, 25, 26], [*THIRD, 27, 28, 29]]), pictures(3)
    with torch.no_grad():
        full = model(**batch, **media).logits
        for cut in (6, 7):  # all pictures are in the prompt
            out = model(batch["input_ids"][:, :cut], **media, use_cache=True)
            steps = [out.logits]
            for at in range(cut, 8):
                out = model(batch["input_ids"][:, at : at + 1], past_key_values=out.past_key_values)
                steps.append(out.logits)
            torch.testing.assert_close(torch.cat(steps, 1), full, **CLOSE)


@pytest.mark.parametrize("kind", ["gpt2", "mpt", "phi", "gemma2", "qwen3"])
def test_layers_of_other_families(kind: str) -> None:
    """Positional and named hidden states, layers that are no GradientCheckpointingLayer, learned and linear biases."""
    model = opened(kind=kind)
    batch, media = padded([FIRST]), pictures(2)
    with torch.no_grad():
        full = model(**batch, **media).logits
        assert not torch.allclose(model(**batch, **pictures(2, seed=5)).logits[:, 2:], full[:, 2:], atol=1e-3)
        out = model(batch["input_ids"][:, :7], **media, use_cache=True)
        last = model(batch["input_ids"][:, 7:], past_key_values=out.past_key_values)
    torch.testing.assert_close(torch.cat([out.logits, last.logits], 1), full, **CLOSE)


def test_media_may_follow_in_a_continued_text() -> None:
    model = opened(ALL)
    media = pictures(3)
    ids = torch.tensor([FIRST, [*THIRD, 23, 24, 25]])
    first = {"pixel_values": media["pixel_values"][[0, 2]], "image_grid_thw": media["image_grid_thw"][:2]}
    later = {"pixel_values": media["pixel_values"][1:2], "image_grid_thw": media["image_grid_thw"][:1]}
    with torch.no_grad():
        full = model(ids, **media).logits
        out = model(ids[:, :4], **first, use_cache=True)
        more = model(ids[:, 4:], **later, past_key_values=out.past_key_values)
    torch.testing.assert_close(torch.cat([out.logits, more.logits], 1), full, **CLOSE)


@pytest.mark.parametrize("beams", [1, 3])
def test_generate_is_the_model_run_again_and_again(beams: int) -> None:
    model = opened()
    batch, media = padded([[2, IMAGE, 13], [IMAGE, 11, 2, IMAGE, 14]], left=True), pictures(3)
    media["media_owners"] = torch.tensor([0, 1, 1])
    options: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(**batch, **media, **options, num_beams=beams)
    assert torch.equal(cached, model.generate(**batch, **media, **options, num_beams=beams, use_cache=False))
    other = {**media, "pixel_values": media["pixel_values"].flip(0)}
    assert not torch.equal(cached, model.generate(**batch, **other, **options, num_beams=beams))


def test_a_cache_of_other_rows_or_another_model_is_refused() -> None:
    model, plain = build(FUSION), build(None)
    out = model(torch.tensor([THIRD]), **pictures(1), use_cache=True)
    with pytest.raises(ValueError, match="the cache holds 1 rows, the input 2"):
        model(torch.tensor([[3], [4]]), past_key_values=out.past_key_values)
    other = plain(torch.tensor([SECOND]), use_cache=True)
    with pytest.raises(ValueError, match="filled outside this model"):
        model(torch.tensor([[3]]), past_key_values=other.past_key_values)


def test_placeholders_and_media_must_agree() -> None:
    model = build(FUSION)
    with pytest.raises(ValueError, match="holds 2 visual placeholders but there are 3 media"):
        model(torch.tensor([FIRST]), **pictures(3))
    with pytest.raises(ValueError, match="holds 2 visual placeholders but there are 0 media"):
        model(torch.tensor([FIRST]))


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "non-reentrant", "reentrant"])
def test_gradients_reach_gates_and_connector(checkpointing: bool | None) -> None:
    model = build(FUSION).train()
    batch, media = packed(DOCUMENTS), pictures(3)
    if checkpointing is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
    model(**batch, **media, labels=batch["input_ids"]).loss.backward()
    gates = {name: p.grad for name, p in model.named_parameters() if name.endswith("_gate")}
    assert len(gates) == 4 and all(grad is not None and float(grad.abs()) > 0 for grad in gates.values())
    # Behind a closed gate nothing else has a gradient yet, but it takes part.
    connector = [p.grad for p in model.model.connector.parameters()]
    assert all(grad is not None and not grad.any() for grad in connector)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_gradients_are_the_plain_ones(reentrant: bool) -> None:
    batch, media = packed(DOCUMENTS), pictures(3)
    grads = []
    for checkpointing in (False, True):
        model = opened().train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model(**batch, **media, labels=batch["input_ids"]).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert any("connector" in name and grad.any() for name, grad in grads[0].items())
    for name, grad in grads[0].items():
        assert torch.equal(grads[1][name], grad), name


def test_a_text_batch_touches_everything_and_changes_nothing() -> None:
    model = opened()
    ids = torch.tensor([SECOND])
    with torch.no_grad():
        want = model(ids).logits
    model.train()
    out = model(ids, labels=ids)
    out.loss.backward()
    untouched = [name for name, p in model.named_parameters() if p.grad is None]
    # What the tower's chosen layer does not lead to has no gradient in any batch.
    assert all("vision_tower" in name for name in untouched)
    for name, p in model.named_parameters():
        if "to_kv" in name or "connector" in name:
            assert p.grad is not None and not p.grad.any()
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(ids).logits, want)


def test_saved_and_loaded(tmp_path: Any) -> None:
    model = opened()
    model.save_pretrained(tmp_path)
    loaded: Any = SparseVLMForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    again, info = loaded
    assert not info["missing_keys"] and not info["unexpected_keys"]
    batch = padded(DOCUMENTS)
    with torch.no_grad():
        assert torch.equal(again.eval()(**batch, **pictures(3)).logits, model(**batch, **pictures(3)).logits)


def test_from_parts_with_processor(tiny_parts: dict[str, str], tmp_path: Any) -> None:
    section = tiny.recipe_model(tiny_parts, fusion=FUSION, connector=[{"type": "mlp", "dim": 24}])
    model, processor = build_model(section)
    assert model.config.fusion == {**FUSION, "ff_mult": 4, "sees": "last"}
    batch = processor(images=[[tiny.picture()]], text=["what is this ? <image> a"])
    assert int((batch["input_ids"] == processor.image_token_id).sum()) == 1
    assert processor.count_visual(MediaKind.IMAGE) == 1 and processor.medium(MediaKind.IMAGE).num_visual == 16
    disturb(model, "_gate")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, other = load_model(tmp_path)
    assert torch.equal(
        other(images=[[tiny.picture()]], text=["what is this ? <image> a"])["input_ids"], batch["input_ids"]
    )
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, model.eval()(**batch).logits)


@pytest.mark.parametrize("sees", ["last", "all"])
def test_documents_clips_and_text_from_the_processor_packed_and_alone(tiny_parts: dict[str, str], sees: str) -> None:
    """Slices of a cut picture are one medium; a clip's frames too. The loss of a row is that of its documents."""
    resampler = {"type": "perceiver_resampler", "latents": 3, "depth": 1, "heads": 2, "head_dim": 4, "time_frames": 2}
    section = tiny.recipe_model(
        tiny_parts,
        fusion={**FUSION, "every": 1, "sees": sees},
        connector=[resampler],
        vision={"tiling": {"type": "anyres", "grids": [[2, 1], [1, 2]]}},
        language={"chat_template": "plain"},
        video={"fps": None, "max_frames": 3},
    )
    model, processor = build_model(section)
    disturb(model, "_gate")

    def shown(kind: MediaKind, source: Any) -> Message:
        return Message("user", ("how many ?", Media(kind, source)))

    red, blue = (shown(MediaKind.IMAGE, tiny.picture(color, (60, 40))) for color in ("red", "blue"))
    clip = shown(MediaKind.VIDEO, [tiny.picture(color) for color in ("red", "green", "blue")])
    one, two = (Message("assistant", (text,)) for text in ("a red picture", "a blue cat"))
    samples = [(red, one, blue, two), (Message("user", ("what ?",)), one), (clip, one, red, two)]
    encoded = [processor.encode(Sample(messages)) for messages in samples]
    assert [each.visual_lengths for each in encoded] == [(9, 9), (), (3, 9)]  # three slices of a picture
    assert [len(each.items) for each in encoded] == [6, 0, 4]
    with torch.no_grad():
        packed_row = Collator(0, packed=True)([encoded])
        together = model(**{k: v for k, v in packed_row.items() if k != "labels"}).logits[0]
        padded_rows = model(**Collator(0, packed=False)([[each] for each in encoded])).logits
        start = 0
        for row, each in enumerate(encoded):
            batch = Collator(0, packed=False)([[each]])
            alone = model(**{k: v for k, v in batch.items() if k != "labels"}).logits[0]
            torch.testing.assert_close(together[start : start + each.length], alone, **CLOSE)
            torch.testing.assert_close(padded_rows[row, : each.length], alone, **CLOSE)
            start += each.length


@pytest.mark.parametrize(("dim", "parameters"), [(2048, 36_708_354), (4096, 139_476_994)])
def test_published_size(dim: int, parameters: int) -> None:
    """OpenFlamingo's blocks over a resampler of CLIP ViT-L's width."""
    with torch.device("meta"):
        block = GatedCrossAttention(dim, 1024, index=0)
    assert sum(p.numel() for p in block.parameters()) == parameters


def test_published_recipe() -> None:
    """Blocks, resampler and tokens of OpenFlamingo-9B."""
    recipe = load_recipe(Path(__file__).parents[2] / "recipes/flamingo/9b.yaml")
    document = plan(recipe, ["224x224", "640x480", "8f@320x240"])
    (stage,) = document["stages"]
    assert set(stage["visual_tokens"].values()) == {1}
    assert "224x224: 64, 640x480: 64, 8f@320x240: 64" in " ".join(document["notes"])
    embeddings = 8 * 1024  # of time, which OpenFlamingo's resampler has no use for
    assert stage["parameters"]["trainable"] == 1_115_815_952 + 63_019_008 + embeddings
    assert set(stage["lr"]) == {"connector", "fusion"}
    batch, weights = recipe.stages["pretrain"].batch, recipe.stages["pretrain"].data
    assert isinstance(weights, dict)
    drawn = {name: batch.rows * weight / sum(weights.values()) for name, weight in weights.items()}
    assert (drawn["documents"], drawn["pairs"]) == (8 * 32, 8 * 64)
