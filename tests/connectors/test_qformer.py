"""The Q-Former against BERT written out, against transformers' whole models, and the published counts."""

import math
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from sparsevlm.connectors.base import connector_guide, parse_block
from sparsevlm.vision.tokens import Grid, Guides, MediaKind, VisualTokens

SMALL = {"type": "qformer", "queries": 3, "dim": 8, "layers": 3, "heads": 2, "ff_dim": 12, "dropout": 0.0}
ASKED = SMALL | {"instruction": True, "vocab_size": 20}
GRIDS = (Grid(1, 1, 5), Grid(3, 2, 2), Grid(1, 1, 5))


def build(raw, input_dim=6, seed=0):
    torch.manual_seed(seed)
    block = parse_block(raw).build(input_dim, 16).eval()
    for parameter in block.parameters():  # norms and biases that would hide a mistake at 1 and 0
        torch.nn.init.normal_(parameter, std=0.5)
    return block


def items(grids=GRIDS, guides=None):
    torch.manual_seed(1)
    kinds = tuple(MediaKind.IMAGE if grid.t == 1 else MediaKind.VIDEO for grid in grids)
    features = torch.randn(sum(grid.num_tokens for grid in grids), 6)
    return VisualTokens(features, tuple(grids), kinds, tuple(range(len(grids))), guides=guides)


def texts(*texts):
    longest = max(map(len, texts))
    ids = torch.tensor([[*text, *[0] * (longest - len(text))] for text in texts])
    mask = torch.tensor([[1] * len(text) + [0] * (longest - len(text)) for text in texts])
    return Guides(ids, mask, tuple(range(len(texts))))


def close(got, expected):
    """Sums of a few dozen float32 products in another order: measured up to 4e-6."""
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-5)


def attend(attention, x, context, heads):
    own = attention.attention
    rows = []
    for q, k, v in zip(
        own.query(x).chunk(heads, -1), own.key(context).chunk(heads, -1), own.value(context).chunk(heads, -1)
    ):
        rows.append((q @ k.T / math.sqrt(q.shape[-1])).softmax(-1) @ v)
    return attention.output.LayerNorm(attention.output.dense(torch.cat(rows, -1)) + x)


def bert(block, frame, text):
    """One frame ``(n, D)`` and the ids of one text, without padding: the queries' output ``(m, C)``."""
    spec, model = block.spec, block.qformer
    x, m = block.qformer_queries(), spec.queries
    norm = model.embeddings.layernorm if spec.instruction else model.layernorm
    if spec.instruction:
        words = model.embeddings.word_embeddings.weight[text] + model.embeddings.position_embeddings.weight[: len(text)]
        x = torch.cat([x, words])
    x = norm(x)
    features = block.qformer_norm(frame)
    for number, layer in enumerate(model.encoder.layer):
        x = attend(layer.attention, x, x, spec.heads)
        queries, words = x[:m], x[m:]
        if number % spec.cross_every == 0:
            queries = attend(layer.crossattention, queries, features, spec.heads)
        rows = [(queries, layer.intermediate_query, layer.output_query)]
        if number < spec.layers - 1 and len(words):
            rows.append((words, layer.intermediate, layer.output))
        x = torch.cat([o.LayerNorm(o.dense(F.gelu(i.dense(rows_))) + rows_) for rows_, i, o in rows])
    return x[:m]


@pytest.mark.parametrize(
    "raw", [SMALL, SMALL | {"norm": False, "cross_every": 1}, ASKED], ids=["blip2", "plain", "asked"]
)
def test_every_frame_is_read_as_bert_reads_it(raw):
    block = build(raw)
    asked = ([4, 7, 2], [5], [9, 9, 1, 3, 8])
    tokens = items(guides=texts(*asked) if raw is ASKED else None)
    result = block(tokens)
    assert result.grids == (Grid(1, 1, 3), Grid(3, 1, 3), Grid(1, 1, 3))
    for x, grid, text, got in zip(tokens.split(), tokens.grids, asked, result.split()):
        expected = torch.cat([bert(block, frame, text) for frame in x.view(grid.t, -1, 6)])
        close(got, expected)


def test_item_mode_reads_all_frames_at_once():
    block, tokens = build(SMALL | {"per": "item"}), items()
    result = block(tokens)
    assert set(result.grids) == {Grid(1, 1, 3)}
    for x, got in zip(tokens.split(), result.split()):
        close(got, bert(block, x, ()))


def test_a_text_changes_its_own_media_only():
    block = build(ASKED)
    first = block(items(guides=texts([4, 7], [5], [9, 9, 1])))
    other = block(items(guides=texts([4, 7], [6, 6, 6, 6, 6, 6], [9, 9, 1])))
    changed = [not torch.allclose(a, b, rtol=1e-5, atol=2e-5) for a, b in zip(first.split(), other.split())]
    assert changed == [False, True, False]


def test_an_empty_text_is_no_text():
    block = build(ASKED)
    empty = Guides(torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, 1, dtype=torch.long), (0, 0, 0))
    for x, grid, got in zip(items().split(), GRIDS, block(items(guides=empty)).split()):
        close(got, torch.cat([bert(block, frame, []) for frame in x.view(grid.t, -1, 6)]))


def test_media_without_texts_are_refused():
    with pytest.raises(ValueError, match="without texts"):
        build(ASKED)(items())


def parameters(raw, input_dim):
    with torch.device("meta"):
        module: Any = parse_block({"type": "qformer"} | raw).build(input_dim, 4096)
    return sum(p.numel() for p in module.qformer.parameters()), module.qformer_queries.weight.numel()


def test_published_parameter_counts():
    assert parameters({}, 1408) == (105_137_664, 24_576)  # BLIP-2, second stage, on EVA-CLIP-g
    assert parameters({"queries": 64}, 1408) == (105_137_664, 49_152)  # InternLM-XComposer
    # The text branch: words, positions, and the feed-forward networks of all layers but the last (see QFormerBlock).
    text = (30_523 + 512) * 768 + 11 * (2 * 768 * 3072 + 3072 + 768 + 2 * 768)
    assert parameters({"instruction": True}, 1408)[0] == 105_137_664 + text


def tiny_model(kind):
    """A whole BLIP-2 or InstructBLIP of transformers with random weights."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    sizes = {"hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 12}
    vision = sizes | {"hidden_size": 6, "image_size": 16, "patch_size": 8}
    qformer = sizes | {"encoder_hidden_size": 6, "vocab_size": 20, "hidden_dropout_prob": 0.0}
    text = {"model_type": "opt", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 16}
    text |= {"vocab_size": 30, "word_embed_proj_dim": 16, "max_position_embeddings": 16}
    config = AutoConfig.for_model(
        kind,
        vision_config=vision,
        qformer_config=qformer,
        text_config=text,
        num_query_tokens=3,
        image_text_hidden_size=8,
    )
    torch.manual_seed(3)
    model = AutoModelForImageTextToText.from_config(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("kind", ["blip-2", "instructblip"])
def test_weights_of_transformers_models(kind, tmp_path):
    whole = tiny_model(kind)
    whole.save_pretrained(tmp_path, max_shard_size="20KB")
    spec = parse_block((ASKED if kind == "instructblip" else SMALL) | {"weights": str(tmp_path)})
    block = spec.build(6, 16).eval()
    spec.load_pretrained(block)

    parts = getattr(whole, "model", whole)
    parts = parts if hasattr(parts, "qformer") else whole
    ids = torch.tensor([[4, 7, 2], [5, 0, 0]])
    pixels = torch.randn(2, 3, 16, 16)
    states = parts.vision_model(pixels, output_hidden_states=True)
    read = {"query_embeds": parts.query_tokens.expand(2, -1, -1), "encoder_hidden_states": states.last_hidden_state}
    if kind == "instructblip":
        mask = torch.cat([torch.ones(2, 3, dtype=torch.long), (ids > 0).long()], dim=1)
        read |= {"input_ids": ids, "attention_mask": mask}
    expected = parts.qformer(**read).last_hidden_state[:, :3]

    features = states.hidden_states[-1]  # as the tower gives them: before its own last norm, which is the block's
    tokens = VisualTokens(
        features.flatten(0, 1), (Grid(1, 1, 5),) * 2, (MediaKind.IMAGE,) * 2, (0, 1), guides=texts([4, 7, 2], [5])
    )
    close(block(tokens).features, expected.flatten(0, 1))


def test_weights_of_blip2_with_its_text_branch(tmp_path):
    """BLIP-2 for retrieval: what InstructBLIP's Q-Former begins with."""
    from transformers import Blip2Config, Blip2ForImageTextRetrieval

    sizes = {"hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 12}
    vision = sizes | {"hidden_size": 6, "image_size": 16, "patch_size": 8}
    reader = sizes | {"encoder_hidden_size": 6, "vocab_size": 20, "use_qformer_text_input": True}
    text = {"model_type": "opt", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 16}
    config = Blip2Config(
        vision_config=vision, qformer_config=reader, text_config=text, num_query_tokens=3, image_text_hidden_size=8
    )
    torch.manual_seed(3)
    whole = Blip2ForImageTextRetrieval(config).eval()
    for parameter in whole.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    whole.save_pretrained(tmp_path)
    spec = parse_block(ASKED | {"weights": str(tmp_path)})
    block = spec.build(6, 16).eval()
    spec.load_pretrained(block)

    ids, frames = torch.tensor([[4, 7, 2], [5, 0, 0]]), torch.randn(2, 5, 6)
    mask = torch.cat([torch.ones(2, 3, dtype=torch.long), (ids > 0).long()], dim=1)
    embedded = whole.embeddings(input_ids=ids, query_embeds=whole.query_tokens.expand(2, -1, -1))
    seen = whole.vision_model.post_layernorm(frames)
    expected = whole.qformer(embedded, query_length=3, attention_mask=mask, encoder_hidden_states=seen)
    close(block.read(frames, (ids, mask[:, 3:])), expected.last_hidden_state[:, :3])


def test_weights_that_do_not_fit_are_refused(tmp_path):
    tiny_model("blip-2").save_pretrained(tmp_path)
    wrong = parse_block(SMALL | {"queries": 4, "weights": str(tmp_path)})
    with pytest.raises(ValueError, match=r"queries.weight \(3, 8\) instead of \(4, 8\)"):
        wrong.load_pretrained(wrong.build(6, 16))
    deeper = parse_block(SMALL | {"layers": 4, "weights": str(tmp_path)})
    with pytest.raises(ValueError, match="are missing"):
        deeper.load_pretrained(deeper.build(6, 16))
    nowhere = parse_block(SMALL | {"weights": str(tmp_path / "nowhere")})
    with pytest.raises(ValueError, match="no weights"):
        nowhere.load_pretrained(nowhere.build(6, 16))


def test_blocks_that_want_different_texts_are_refused():
    one, same, other = (parse_block(ASKED | {"max_text": n}) for n in (8, 8, 9))
    assert connector_guide([one, same, parse_block(SMALL)]) == one.guide
    assert connector_guide([parse_block(SMALL)]) is None
    with pytest.raises(ValueError, match="different tokenizers or lengths"):
        connector_guide([one, other])
