"""What every connector block must do. A new block is covered as soon as it is registered.

A block whose options have no defaults needs a row in EXAMPLES; a block with modes may have more rows.
"""

import json
import pickle
import random
from dataclasses import replace

import pytest
import torch

from sparsevlm.connectors.base import parse_block
from sparsevlm.registry import CONNECTOR_BLOCKS
from sparsevlm.vision.tokens import MEDIA_KINDS, Grid, Guides, VisualTokens

SMALL_QFORMER = {"queries": 3, "dim": 8, "layers": 2, "heads": 2, "ff_dim": 12, "dropout": 0.0, "vocab_size": 20}
EXAMPLES = {
    "linear": [{}, {"bias": False, "dim": 5}],
    "mlp": [{}, {"depth": 3, "norm": "pre", "hidden_dim": 9}, {"norm": "post", "activation": "silu", "dim": 5}],
    "swiglu_mlp": [{"hidden_dim": 9}, {"hidden_dim": 3, "dim": 5, "bias": True}],
    "pixel_shuffle": [{}, {"factor": 3}],
    "concat": [{}, {"number": 3}],
    "adaptive_pool": [{"size": 3}, {"size": [5, 2]}],
    "class_token": [{}, {"levels": 3}],
    "perceiver_resampler": [
        {"latents": 3, "depth": 2, "heads": 2, "head_dim": 4, "time_frames": 3},
        {"latents": 9, "depth": 1, "heads": 2, "head_dim": 4, "dim": "language", "ff_mult": 0, "attend_latents": False}
        | {"residual": False, "positions": "sincos", "bias": True, "project": True, "latent_std": 0.02},
        {"latents": 2, "depth": 1, "heads": 2, "head_dim": 4, "dim": 20, "per": "frame"},
    ],
    "layout": [{}, {"row_end": "all", "frame_end": True, "end": True}, {"row_end": "none", "start": True}],
    "qformer": [
        {**SMALL_QFORMER, "per": "item"},
        {**SMALL_QFORMER, "instruction": True, "norm": False},
    ],
    "multi_scale": [{}],
    "context_token": [{"qformer": SMALL_QFORMER}],
    "dynamic_compressor": [{"image": 2}, {"image": 1, "video": 1, "long_video": 2, "dim": 5, "double": False}],
    "dpc_knn": [{}, {"clusters": [6, 3], "neighbours": [2, 2], "frames_per_event": 4, "min_temporal_neighbours": 2}],
}
INPUT_DIM, TEXT_DIM = 12, 8

SPECS = [{"type": name, **options} for name in CONNECTOR_BLOCKS.names() for options in EXAMPLES.get(name, [{}])]
every_block = pytest.mark.parametrize("raw", SPECS, ids=lambda raw: json.dumps(raw))


def random_grids(spec, kind, number, seed):
    """Random grids that the block takes; it must take some."""
    generator = random.Random(seed)
    taken = []
    for _ in range(400):
        square = generator.randint(1, 10)
        grid = generator.choice(
            [Grid(1, square, square), Grid(generator.randint(1, 40), square, generator.randint(1, 8)), Grid(1, 8, 8)]
        )
        try:
            spec.output_grid(grid, kind)
        except ValueError as refusal:
            assert str(grid.h) in str(refusal) or str(grid) in str(refusal), "a refusal says which grid it got"
        else:
            taken.append(grid)
        if len(taken) == number:
            return taken
    raise AssertionError(f"{spec!r} refused nearly all of 400 random grids of kind {kind}")


def random_tokens(spec, number=9, seed=0, dtype=torch.float32):
    """Items of all kinds and of grids that the block takes, several of them of one size, owners out of order."""
    generator = random.Random(seed)
    items = []
    for position in range(number):
        kind = MEDIA_KINDS[position % len(MEDIA_KINDS)]
        grids = random_grids(spec, kind, 1, seed + position)
        items += [(grid, kind) for grid in grids * generator.randint(1, 3)]
    generator.shuffle(items)
    grids, kinds = zip(*items)
    owners = tuple(sorted(generator.randrange(4) for _ in items))
    torch.manual_seed(seed)
    features = torch.randn(sum(grid.num_tokens for grid in grids), INPUT_DIM).to(dtype)
    return VisualTokens(features, grids, kinds, owners, guides=random_guides(len(items)))


def random_guides(number):
    """Three texts of different lengths, for blocks that look at them."""
    ids = torch.tensor([[1, 5, 3, 0], [2, 0, 0, 0], [7, 8, 9, 4]])
    return Guides(ids, (ids > 0).long(), tuple(item % 3 for item in range(number)))


def build(raw, seed=0):
    torch.manual_seed(seed)
    return parse_block(raw).build(INPUT_DIM, TEXT_DIM)


def item(tokens, index):
    start, end = tokens.offsets[index : index + 2]
    guides = replace(tokens.guides, index=tokens.guides.index[index : index + 1])
    own = ((each[index],) for each in (tokens.grids, tokens.kinds, tokens.owners))
    return VisualTokens(tokens.features[start:end], *own, guides=guides)


@every_block
@pytest.mark.parametrize("seed", range(3))
def test_module_gives_the_grids_and_width_that_the_spec_names(raw, seed):
    spec, block = parse_block(raw), build(raw)
    tokens = random_tokens(spec, seed=seed)
    result = block(tokens)
    assert result.shapes == spec.output_items(tokens.shapes)
    if len(result) == len(tokens):
        assert result.grids == tuple(spec.output_grid(grid, kind) for grid, kind in zip(tokens.grids, tokens.kinds))
    assert all(grid.num_tokens > 0 for grid in result.grids)
    assert result.dim == spec.output_dim(INPUT_DIM, TEXT_DIM)
    assert result.kinds == tuple(tokens.kinds[medium] for medium in result.media)
    assert result.owners == tuple(tokens.owners[medium] for medium in result.media)
    assert torch.isfinite(result.features).all()


@every_block
def test_count_does_not_depend_on_pixels(raw):
    spec, block = parse_block(raw), build(raw)
    tokens = random_tokens(spec)
    for features in (torch.zeros_like(tokens.features), torch.randn_like(tokens.features) * 100):
        result = block(tokens.with_features(features))
        assert result.grids == block(tokens).grids
        assert torch.isfinite(result.features).all()


@every_block
def test_item_alone_is_the_item_in_a_batch(raw):
    block = build(raw)
    tokens = random_tokens(parse_block(raw), seed=5)
    result = block(tokens)
    for index in range(len(tokens)):
        together = torch.cat([f for f, medium in zip(result.split(), result.media) if medium == index])
        torch.testing.assert_close(block(item(tokens, index)).features, together, rtol=1e-6, atol=1e-6)


@every_block
def test_large_weights_are_held_by_modules_that_are_called_for_them(raw):
    """ZeRO-3 would have let go of the block's own when their gradient comes (see `Learned`)."""
    assert not [name for name, weight in build(raw).named_parameters(recurse=False) if weight.ndim > 1]


@every_block
def test_gradient_reaches_every_parameter_and_the_features(raw):
    block = build(raw)
    tokens = random_tokens(parse_block(raw))
    features = tokens.features.clone().requires_grad_()
    result = block(tokens.with_features(features)).features
    (result * torch.randn_like(result)).sum().backward()
    assert torch.isfinite(features.grad).all() and features.grad.abs().sum() > 0
    for name, parameter in block.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
        assert torch.isfinite(parameter.grad).all(), name


@every_block
def test_empty_batch(raw):
    spec, block = parse_block(raw), build(raw)
    result = block(VisualTokens(torch.zeros(0, INPUT_DIM), (), (), ()))
    assert len(result) == 0
    assert result.features.shape == (0, spec.output_dim(INPUT_DIM, TEXT_DIM))


@every_block
def test_bfloat16(raw):
    tokens = random_tokens(parse_block(raw), dtype=torch.bfloat16)
    result = build(raw).bfloat16()(tokens)
    assert result.features.dtype == torch.bfloat16
    assert torch.isfinite(result.features).all()


@every_block
def test_builds_on_the_meta_device_with_the_same_parameters(raw):
    real = build(raw)
    with torch.device("meta"):
        meta = build(raw)
    assert all(parameter.is_meta for parameter in meta.parameters())
    assert {name: p.shape for name, p in meta.named_parameters()} == {n: p.shape for n, p in real.named_parameters()}


@every_block
def test_parameter_free_says_what_is_true(raw):
    assert parse_block(raw).parameter_free == (not list(build(raw).parameters()))


@every_block
def test_initialises_itself_by_the_seed(raw):
    first, again, other = build(raw, 1).state_dict(), build(raw, 1).state_dict(), build(raw, 2).state_dict()
    for name, value in first.items():
        assert torch.isfinite(value).all(), name
        assert torch.equal(value, again[name]), name
    assert not first or any(not torch.equal(value, other[name]) for name, value in first.items())


@every_block
def test_state_dict_round_trip(raw):
    one, other = build(raw, 1), build(raw, 2)
    other.load_state_dict(one.state_dict())
    tokens = random_tokens(parse_block(raw))
    assert torch.equal(one(tokens).features, other(tokens).features)


@every_block
def test_spec_survives_json_and_pickle(raw):
    spec = parse_block(raw)
    assert parse_block(json.loads(json.dumps(spec.model_dump(mode="json")))) == spec
    assert parse_block(spec.model_dump()) == spec
    assert pickle.loads(pickle.dumps(spec)) == spec
    assert parse_block(spec) is spec


@every_block
def test_unknown_option_is_refused(raw):
    with pytest.raises(ValueError, match="no_such_option"):
        parse_block({**raw, "no_such_option": 1})


@every_block
def test_every_option_is_documented(raw):
    fields = type(parse_block(raw)).model_fields
    assert type(parse_block(raw)).__doc__
    assert all(field.description for field in fields.values())


@every_block
def test_state_is_not_changed_by_a_forward(raw):
    block = build(raw)
    before = {name: value.clone() for name, value in block.state_dict().items()}
    tokens = random_tokens(parse_block(raw))
    features = tokens.features.clone()
    first = block(tokens).features
    assert torch.equal(first, block(tokens).features)
    assert torch.equal(tokens.features, features)
    assert all(torch.equal(value, before[name]) for name, value in block.state_dict().items())


@every_block
def test_calls_that_only_other_processes_need_change_nothing(raw, monkeypatch):
    """Under ZeRO-3 all processes call a block's parts equally often."""
    tokens = random_tokens(parse_block(raw))
    block = build(raw)
    alone = block(tokens).features
    for name in ("sharded", "context_token"):
        monkeypatch.setattr(f"sparsevlm.connectors.{name}.most_calls", lambda calls, *_: calls + 2)
    torch.testing.assert_close(block(tokens).features, alone, rtol=0, atol=0)
