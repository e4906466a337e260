"""The visual expert: against loops over tokens, the start, shared positions, documents apart, cached steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from sparsevlm.adapters.attach import attach
from sparsevlm.connectors.base import connector_marks, parse_connector
from sparsevlm.export.stream import upcycle_checkpoint
from sparsevlm.fusion.positions import position_shift, tell_visual
from sparsevlm.fusion.visual_expert import ByModality, install_experts
from sparsevlm.model.build import build_model, load_model
from sparsevlm.model.configuration_text import SparseVLMTextConfig
from sparsevlm.model.modeling_text import SparseVLMTextForCausalLM
from sparsevlm.model.positions import stretch_positions
from sparsevlm.moe.block import MoeConfig, SparseMoeBlock
from sparsevlm.moe.metrics import measure_routing, summarise_routing, token_modality
from sparsevlm.moe.modality import ModalityRouter, telling_apart
from sparsevlm.moe.upcycle import upcycle_model
from sparsevlm.recipe.adapter import Adapter
from sparsevlm.recipe.fusion import VisualExpertFusion
from sparsevlm.recipe.load import RecipeError
from sparsevlm.recipe.moe import Upcycle
from sparsevlm.report.read import Stage
from sparsevlm.report.routing import live_routing
from sparsevlm.report.routing_sections import routing_section
from sparsevlm.surgery import decoder_layers
from sparsevlm.train.plan import plan
from sparsevlm.vision.tokens import Grid, MediaKind, VisualTokens
from tests import tiny
from tests.fusion.common import IMAGE, build, disturb, packed, padded, pictures
from tests.moe.common import CONFIGS
from tests.moe.common import build as build_decoder
from tests.train.planned import recipe_of

EXPERT: dict[str, Any] = {"type": "visual_expert"}
PLACES = {**EXPERT, "attention": False, "ffn": False}  # positions alone
ATTENTION = {**EXPERT, "ffn": False}
SPARSE = Upcycle.model_validate(
    {"layers": "all", "experts": 2, "top_k": 1, "router": {"scoring": "modality"}, "aux_loss_coef": 0}
)
FIRST = [2, 11, *[IMAGE] * 4, 12, 13, *[IMAGE] * 4, 14, 15]
SECOND = [2, 16, 17, 18]
THIRD = [*[IMAGE] * 8, 20, 21, 22]  # two pictures, one behind the other
DOCUMENTS = [FIRST, SECOND, THIRD]
MARKED = [[2, 11, *[IMAGE] * 6, 12, 13], [*[IMAGE] * 12, 20]]  # with a mark before and one after each picture
MARKS = {"type": "layout", "row_end": "none", "start": True, "end": True}


def grown(fusion: dict[str, Any] | None = EXPERT, **config: Any) -> Any:
    """A model whose twins have parted."""
    model = build(fusion, **config)
    disturb(model, "visual_expert", 0.1)
    disturb(model, "connector", 0.1)  # marks start at nothing, or nearly so
    return model


def run(model: Any, **batch: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(**batch).logits


def plain_of(model: Any) -> Any:
    """A model without experts of the same weights."""
    plain = build(None)
    state = {k.replace(".text_expert", ""): v for k, v in model.state_dict().items() if "visual_expert" not in k}
    plain.load_state_dict(state)
    return plain


def positions_of_cogvlm(ids: list[int], medium: list[int]) -> list[int]:
    """The loop of `build_position_ids`: up at every token but within the patches of one picture."""
    positions = [0]
    for t in range(1, len(ids)):
        within = ids[t] == ids[t - 1] == IMAGE and medium[t] == medium[t - 1]
        positions.append(positions[-1] + (not within))
    return positions


def numbered(ids: list[int], size: int = 4) -> list[int]:
    """Number of the picture of each token, -1 for text."""
    seen, out = 0, []
    for token in ids:
        out.append(seen // size if token == IMAGE else -1)
        seen += token == IMAGE
    return out


def naive(module: ByModality, x: Tensor, visual: Tensor) -> Tensor:
    """Token by token."""
    rows = [
        (module.visual_expert if is_visual else module.text_expert)(token)
        for token, is_visual in zip(x.flatten(0, 1), visual.flatten().tolist(), strict=True)
    ]
    return torch.stack(rows).view(*x.shape[:2], -1)


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_module_is_the_loop_over_tokens(share: float) -> None:
    torch.manual_seed(0)
    layer: Any = decoder_layers(build_decoder("llama"))[0]
    x, visual = torch.randn(2, 9, 32), torch.rand(2, 9) < share
    for text in (layer.mlp, layer.self_attn.q_proj, nn.Linear(32, 5)):
        module = ByModality(text)
        disturb(module, "visual_expert", 0.1)
        with telling_apart(module, visual):
            # float32: products of several rows at once
            torch.testing.assert_close(module(x), naive(module, x, visual), atol=1e-5, rtol=1e-4)


def test_the_start_is_the_language_model() -> None:
    model = build({**EXPERT, "shared_position": False})
    plain = plain_of(model)
    text = padded([SECOND, [2, 20, 21]])
    assert torch.equal(run(model, **text), run(plain, **text))
    batch = {**padded(DOCUMENTS), **pictures(4)}
    # 0 here; products of fewer rows may be rounded otherwise elsewhere
    torch.testing.assert_close(run(model, **batch), run(plain, **batch), atol=1e-6, rtol=1e-5)
    twins = [m for m in model.modules() if isinstance(m, ByModality)]
    assert len(twins) == 4 * 5
    for twin in twins:
        for (_, ours), (_, theirs) in zip(twin.visual_expert.named_parameters(), twin.text_expert.named_parameters()):
            assert torch.equal(ours, theirs) and ours.data_ptr() != theirs.data_ptr()


@pytest.mark.parametrize("where", ["self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"])
def test_visual_tokens_alone_pass_the_twin(where: str) -> None:
    model, before = build(EXPERT), padded(DOCUMENTS)
    was = run(model, **before, **pictures(4))
    words = run(model, **padded([SECOND]))
    module, _, rest = where.partition(".")
    disturb(model, f"{where}.visual_expert" if module == "self_attn" else f"{module}.visual_expert.{rest}", 0.3)
    now = run(model, **before, **pictures(4))
    assert torch.equal(run(model, **padded([SECOND])), words)
    torch.testing.assert_close(now[0, :2], was[0, :2], atol=1e-6, rtol=1e-5)  # before the first picture
    assert (now[0, 2:6] - was[0, 2:6]).abs().amax(-1).min() > 1e-3


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in ("gpt2", "opt")])
def test_decoders_of_many_families(name: str) -> None:
    torch.manual_seed(0)
    decoder = build_decoder(name)
    ids = torch.randint(3, 50, (2, 7))
    with torch.no_grad():
        before = decoder.eval()(ids).last_hidden_state
        install_experts(decoder, VisualExpertFusion(type="visual_expert"))
        with telling_apart(decoder, torch.rand(2, 7) < 0.5):
            after = decoder(ids).last_hidden_state
    torch.testing.assert_close(after, before, atol=2e-5, rtol=1e-4)
    assert sum(isinstance(m, ByModality) for m in decoder.modules()) >= 3 * 3


def test_layers_without_linear_layers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"no attention with linear layers.*'attn'.*attention: false"):
        install_experts(build_decoder("gpt2"), VisualExpertFusion(type="visual_expert", shared_position=False))
    with pytest.raises(ValueError, match=r"no rotary embedding.*shared_position: false"):
        install_experts(build_decoder("gpt2"), VisualExpertFusion(type="visual_expert", attention=False))


def test_positions_are_those_of_cogvlm() -> None:
    model = build(PLACES)
    plain = plain_of(model)
    batch, media = padded(DOCUMENTS), pictures(4)
    positions = torch.zeros_like(batch["input_ids"])
    for row, ids in enumerate(DOCUMENTS):
        positions[row, : len(ids)] = torch.tensor(positions_of_cogvlm(ids, numbered(ids)))
    got, want = run(model, **batch, **media), run(plain, **batch, **media, position_ids=positions)
    for row, ids in enumerate(DOCUMENTS):
        assert torch.equal(got[row, : len(ids)], want[row, : len(ids)])
    assert (got - run(plain, **batch, **media)).abs().max() > 1e-3
    for each in (model, plain):
        stretch_positions(each, 2.0)
    got, want = run(model, **batch, **media), run(plain, **batch, **media, position_ids=positions)
    assert torch.equal(got[0], want[0])


def test_a_projector_leaves_the_marks_where_they_are() -> None:
    """The same patches with a projector that changes nothing behind the layout."""
    before, behind = grown(blocks=[MARKS]), grown(blocks=[MARKS, {"type": "linear"}])
    behind.load_state_dict(before.state_dict(), strict=False)
    with torch.no_grad():
        behind.model.connector[-1].linear.weight.copy_(torch.eye(32))
        behind.model.connector[-1].linear.bias.zero_()
    batch = packed([[2, *[IMAGE] * 6, 11, 12], [13, 14, *[IMAGE] * 6, 15]])
    torch.testing.assert_close(run(behind, **batch, **pictures(2)), run(before, **batch, **pictures(2)))
    marks = [MARKS, {"type": "linear"}, {"type": "perceiver_resampler"}]
    assert [connector_marks(parse_connector(marks[:n])) for n in (1, 2, 3)] == [
        (True, True),
        (True, True),
        (False, False),
    ]


def test_marks_have_positions_and_the_last_one_is_text() -> None:
    """What CogVLM's code says of BOI, patches and EOI, written out."""
    features = torch.zeros(12, 4)
    items = [Grid(1, 1, 1), Grid(1, 2, 2), Grid(1, 1, 1)] * 2
    tokens = VisualTokens(features, tuple(items), (MediaKind.IMAGE,) * 6, (0,) * 6, media=(0, 0, 0, 1, 1, 1))
    ids = torch.tensor([[2, 11, *[IMAGE] * 6, 12, *[IMAGE] * 6, 13]])
    visual, shares = tell_visual(ids == IMAGE, tokens, (True, True))
    assert visual[0].int().tolist() == [0, 0, 1, 1, 1, 1, 1, 0, 0, 1, 1, 1, 1, 1, 0, 0]
    positions = torch.arange(16) - position_shift(shares, None, None)[0]
    assert positions.tolist() == [0, 1, 2, 3, 3, 3, 3, 4, 5, 6, 7, 7, 7, 7, 8, 9]


def test_text_between_slices_or_frames_ends_the_sharing() -> None:
    """Two slices with a comma between them and an overview, then two frames with a time before each."""
    grids = (Grid(1, 1, 2), Grid(1, 1, 2), Grid(1, 1, 1), Grid(2, 1, 2))
    kinds = (MediaKind.SLICE, MediaKind.SLICE, MediaKind.IMAGE, MediaKind.VIDEO)
    tokens = VisualTokens(torch.zeros(9, 4), grids, kinds, (0,) * 4, media=(0, 0, 0, 1))
    ids = torch.tensor([[2, IMAGE, IMAGE, 40, IMAGE, IMAGE, IMAGE, 41, IMAGE, IMAGE, 42, IMAGE, IMAGE, 43]])
    visual, shares = tell_visual(ids == IMAGE, tokens, (False, False))
    assert torch.equal(visual, ids == IMAGE)
    positions = torch.arange(14) - position_shift(shares, None, None)[0]
    assert positions.tolist() == [0, 1, 1, 2, 3, 3, 3, 4, 5, 5, 6, 7, 7, 8]


@pytest.mark.parametrize("blocks", [[], [MARKS]], ids=["bare", "marked"])
@pytest.mark.parametrize("sparse", [False, True])
def test_packed_is_padded_is_alone(blocks: list[dict[str, Any]], sparse: bool) -> None:
    model = grown(ATTENTION if sparse else EXPERT, blocks=blocks)
    if sparse:
        upcycle_model(model, SPARSE)
        disturb(model, "experts.", 0.1)
    documents = MARKED if blocks else DOCUMENTS
    size = 6 if blocks else 4
    count = [document.count(IMAGE) // size for document in documents]
    media = pictures(sum(count))
    rows, used = run(model, **padded(documents), **media), 0
    left = run(model, **padded(documents, left=True), **media)
    together = run(model, **packed(documents), **media)[0].split([len(document) for document in documents])
    for row, document in enumerate(documents):
        own = {key: value[used : used + count[row]] for key, value in media.items()} if count[row] else {}
        used += count[row]
        alone = run(model, input_ids=torch.tensor([document]), **own)[0]
        # float32: products and attention over other numbers of rows
        for other in (rows[row, : len(document)], left[row, -len(document) :], together[row]):
            torch.testing.assert_close(other, alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("fusion", [EXPERT, ATTENTION], ids=["dense", "sparse"])
@pytest.mark.parametrize("beams", [1, 3])
def test_generated_with_a_cache_as_without(fusion: dict[str, Any], beams: int) -> None:
    model = grown(fusion)
    if fusion is ATTENTION:
        upcycle_model(model, SPARSE)
        disturb(model, "experts.", 0.1)
    batch = {**padded(DOCUMENTS, left=True), **pictures(4), "media_owners": torch.tensor([0, 0, 2, 2])}
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams, "eos_token_id": None}
    options["suppress_tokens"] = [IMAGE, IMAGE + 1]  # without a cache they would be placeholders without media
    cached = model.generate(**batch, **options)
    assert torch.equal(cached, model.generate(**batch, **options, use_cache=False))
    assert cached.shape == (3, len(FIRST) + 6)


def test_a_conversation_continues_its_cache() -> None:
    model = grown()
    with torch.no_grad():
        first = model(input_ids=torch.tensor([FIRST]), **pictures(2), use_cache=True)
        cache, more = first.past_key_values, [[23, *[IMAGE] * 4, 24]]
        second = model(input_ids=torch.tensor(more), **pictures(1, seed=5), past_key_values=cache)
        both = {key: torch.cat([value, pictures(1, seed=5)[key]]) for key, value in pictures(2).items()}
        whole = model(input_ids=torch.tensor([FIRST + more[0]]), **both)
    torch.testing.assert_close(second.logits, whole.logits[:, len(FIRST) :], atol=1e-5, rtol=1e-4)
    cache.sparsevlm_shift = None
    with pytest.raises(ValueError, match="filled outside this model"):
        model(input_ids=torch.tensor([[5]]), past_key_values=cache)


def gradients(model: Any, batch: dict[str, Any], **options: Any) -> dict[str, Tensor]:
    model.zero_grad()
    model.train()
    model(**batch, labels=batch["input_ids"], **options).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("sparse", [False, True])
def test_recomputed_layers_know_what_is_visual(sparse: bool) -> None:
    model = grown(ATTENTION if sparse else EXPERT)
    if sparse:
        upcycle_model(model, SPARSE)
        disturb(model, "experts.", 0.1)
    batch = {**padded(DOCUMENTS), **pictures(4)}
    want = gradients(model, batch)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    got = gradients(model, batch)
    assert want.keys() == got.keys()
    for name, gradient in want.items():
        torch.testing.assert_close(got[name], gradient, atol=1e-6, rtol=1e-5, msg=name)


def test_text_alone_touches_the_twins_in_training() -> None:
    model = grown()
    found = gradients(model, padded([SECOND]))
    twins = [name for name, _ in model.named_parameters() if "visual_expert" in name]
    assert twins and all(name in found and not found[name].any() for name in twins)


def test_save_and_load(tmp_path: Path) -> None:
    model = grown({**EXPERT, "layers": [1, 2]})
    batch = {**padded(DOCUMENTS), **pictures(4)}
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert again.config.fusion == model.config.fusion
    assert torch.equal(run(again, **batch), run(model, **batch))
    found = {i for i, layer in enumerate(decoder_layers(again.model.language_model)) if "ByModality" in str(layer)}
    assert found == {1, 2}


def test_upcycled_where_it_leaves_ffns_alone(tmp_path: Path) -> None:
    model = grown({**EXPERT, "layers": [0, 2]})
    batch = {**padded(DOCUMENTS), **pictures(4)}
    before = run(model, **batch)
    with pytest.raises(ValueError, match=r"visual expert.*upcycle.layers.*ffn: false"):
        upcycle_model(model, Upcycle(layers="all"))
    upcycle_model(model, Upcycle(layers=[1, 3]))
    real = batch["attention_mask"].bool()  # padding is not routed
    torch.testing.assert_close(run(model, **batch)[real], before[real], atol=1e-5, rtol=1e-4)
    model.save_pretrained(tmp_path)
    assert torch.equal(run(type(model).from_pretrained(tmp_path), **batch), run(model, **batch))


def test_experts_by_modality_are_the_experts_ffn(tmp_path: Path) -> None:
    """The MoE block routed by modality against the visual expert of the same weights."""
    dense, sparse = grown(EXPERT), build(ATTENTION)
    batch = {**padded(DOCUMENTS), **pictures(4)}
    real, start = batch["attention_mask"].bool(), run(sparse, **batch)
    report = upcycle_model(sparse, SPARSE)
    assert report.preserves_function and report.max_ffn_difference is not None and report.max_ffn_difference < 1e-5
    torch.testing.assert_close(run(sparse, **batch)[real], start[real], atol=1e-5, rtol=1e-4)  # padding is not routed
    state = dense.state_dict()
    for name in list(sparse.state_dict()):
        prefix, _, stack = name.partition(".experts.")
        if stack == "gate_up_proj":
            parts = [[state.pop(f"{prefix}.{twin}.{half}_proj.weight") for half in ("gate", "up")] for twin in TWINS]
            state[name] = torch.stack([torch.cat(part) for part in parts])
        elif stack == "down_proj":
            state[name] = torch.stack([state.pop(f"{prefix}.{twin}.down_proj.weight") for twin in TWINS])
    sparse.load_state_dict(state)
    want = run(dense, **batch)
    for kernel in ("eager", "auto", "batched_mm"):
        sparse.set_experts_implementation(kernel)
        torch.testing.assert_close(run(sparse, **batch)[real], want[real], atol=1e-5, rtol=1e-4)
    assert (want - start).abs().max() > 1e-2
    sparse.save_pretrained(tmp_path)
    again = type(sparse).from_pretrained(tmp_path)
    assert torch.equal(run(again, **batch), run(sparse, **batch))
    assert not [name for name, _ in again.named_parameters() if ".gate." in name]


TWINS = ("text_expert", "visual_expert")


def test_routing_by_modality_is_told_as_it_is() -> None:
    model = build(ATTENTION)
    upcycle_model(model, SPARSE)
    batch = {**padded(DOCUMENTS), **pictures(4)}
    with torch.no_grad():
        outputs = model(**batch, output_router_logits=True)
    modality = token_modality(batch["input_ids"], IMAGE, 7, batch["attention_mask"])
    sums = measure_routing(outputs.router_logits, outputs.router_indices, modality, "modality")
    for layer in summarise_routing(sums):
        assert layer["load"]["text"] == [1, 0] and layer["load"]["image"] == [0, 1]
        assert layer["load"]["all"] == [13 / 29, 16 / 29]
        assert layer["entropy"]["all"] == layer["dropped_share"] == layer["logit_rms"] == 0
    assert model(**batch, labels=batch["input_ids"]).aux_loss is None


def test_what_is_visual_must_be_known() -> None:
    model = build(EXPERT)
    with pytest.raises(ValueError, match="outside a forward pass"):
        model.model.language_model(torch.tensor([SECOND]))
    with pytest.raises(ValueError, match="give input_ids"):
        model(inputs_embeds=torch.zeros(1, 3, 32))
    with (
        telling_apart(model, torch.zeros(1, 3, dtype=torch.bool)),
        pytest.raises(ValueError, match=r"4 tokens.*among 3"),
    ):
        model.model.language_model(torch.tensor([SECOND]))
    with pytest.raises(ValueError, match=r"5 visual placeholders.*4 visual tokens"):
        tell_visual(
            torch.ones(1, 5, dtype=torch.bool),
            VisualTokens(torch.zeros(4, 2), (Grid(1, 2, 2),), (MediaKind.IMAGE,), (0,)),
            (False, False),
        )
    with pytest.raises(ValueError, match="takes 2"):
        SparseMoeBlock(MoeConfig(8, 16, 4, 1, scoring_func="modality"))
    moe = {"layers": [0], "num_experts": 2, "num_experts_per_tok": 1, "scoring_func": "modality"}
    with pytest.raises(ValueError, match="need visual tokens"):
        SparseVLMTextForCausalLM(SparseVLMTextConfig(text_config=tiny.text_config(), moe=moe))
    with pytest.raises(ValueError, match="keeps them beside it"):
        upcycle_model(build({"type": "gated_cross_attention", "heads": 2, "head_dim": 8}), SPARSE)


def test_router_sends_padding_nowhere() -> None:
    router, mask = ModalityRouter(), torch.tensor([True, True, False])
    with telling_apart(router, torch.tensor([[False, True, True]])):
        _, weights, index = router(torch.zeros(3, 8), mask)
    assert weights.flatten().tolist() == [1, 1, 0] and index.flatten().tolist() == [0, 1, 1]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"experts": 4, "top_k": 1, "aux_loss_coef": 0}, "set experts: 2"),
        ({"experts": 2, "aux_loss_coef": 0}, "set top_k: 1"),
        ({"experts": 2, "top_k": 1}, "set aux_loss_coef: 0"),
        ({"experts": 2, "top_k": 1, "aux_loss_coef": 0, "granularity": 2}, "set granularity: 1"),
        (
            {"experts": 2, "top_k": 1, "aux_loss_coef": 0, "router": {"jitter": 0.1}},
            "'jitter' is about a learned router",
        ),
    ],
)
def test_recipe_faults(options: dict[str, Any], match: str) -> None:
    router = {"scoring": "modality", **options.pop("router", {})}
    with pytest.raises(ValueError, match=match):
        Upcycle.model_validate({**options, "router": router})


def test_fusion_faults() -> None:
    for raw, match in (({"layers": [1, 1]}, "named twice"), ({"layers": []}, "names no layer")):
        with pytest.raises(ValueError, match=match):
            VisualExpertFusion.model_validate({**EXPERT, **raw})
    nothing = {"attention": False, "ffn": False, "shared_position": False}
    with pytest.raises(ValueError, match="nothing is left"):
        VisualExpertFusion.model_validate({**EXPERT, **nothing})


@pytest.mark.parametrize(
    ("adapter", "match"),
    [
        ({"type": "mma"}, "neither these nor text"),
        ({"type": "lora_experts"}, r"layer 0 .* has no FFN"),
        ({"type": "partial_lora"}, "does not see visual tokens"),
    ],
)
def test_adapters_that_need_all_tokens_are_refused(adapter: dict[str, Any], match: str) -> None:
    section = TypeAdapter(Adapter).validate_python(adapter)
    with torch.device("meta"):
        model = build(EXPERT)
    with pytest.raises(ValueError, match=match):
        attach(model, section)


def test_layers_that_are_not_there_are_a_fault_of_the_plan(tiny_parts: dict[str, str]) -> None:
    with pytest.raises(RecipeError, match=r"between 0 and 1") as caught:
        plan(recipe_of(tiny_parts, model={"fusion": {**EXPERT, "layers": [0, 2]}}))
    assert [fault.path for fault in caught.value.faults] == ["model.fusion.layers"]


def test_report_leaves_out_what_says_nothing() -> None:
    load = {"all": [0.25, 0.75], "text": [1.0, 0.0], "image": [0.0, 1.0]}
    numbers = {"load": load, "similarity": 0.9, "entropy": {"all": 0.0}, "max_violation": 0.5, "logit_rms": 0.0}
    rows = [{"step": i, "moe": {"balance": 0.87, "layer_0": numbers, "layer_1": numbers}} for i in (1, 2)]
    for scoring, titles in (
        (
            "modality",
            {"Expert load over time", "Routing health by layer, over time", "Expert load by layer and modality"},
        ),
        ("softmax", {"Balance over time"}),
    ):
        planned = {"upcycle": {"top_k": 1, "router": {"scoring": scoring}}}
        section = routing_section(Stage("moe", False, rows, planned=planned, live=live_routing(rows)))
        assert section is not None
        found = {plot.title for plot in section.plots}
        assert (found == titles) if scoring == "modality" else titles < found
        assert ("text to expert 0" in " ".join(section.notes)) == (scoring == "modality")


@pytest.mark.parametrize("fusion", [ATTENTION, None], ids=["with_attention", "alone"])
def test_upcycled_by_modality_on_disk_as_in_memory(
    fusion: dict[str, Any] | None, tiny_parts: dict[str, str], tmp_path: Path
) -> None:
    model, processor = build_model(tiny.recipe_model(tiny_parts, **({"fusion": fusion} if fusion else {})))
    model.save_pretrained(tmp_path / "dense")
    processor.save_pretrained(tmp_path / "dense")
    report = upcycle_checkpoint(str(tmp_path / "dense"), tmp_path / "sparse", SPARSE, seed=3)
    assert report.difference is not None and report.difference < 1e-5  # 5e-8 here
    upcycle_model(model, SPARSE, seed=3)
    left, right = load_model(tmp_path / "sparse")[0].state_dict(), model.state_dict()
    assert left.keys() == right.keys() and all(torch.equal(left[name], weight) for name, weight in right.items())
    with pytest.raises(ValueError, match="need visual tokens"):
        upcycle_checkpoint(tiny_parts["language"], tmp_path / "text", SPARSE, check=False)
