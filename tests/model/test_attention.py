"""packed_sdpa: packed = separate documents, cached decode = full, all else = sdpa."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    DynamicCache,
    FalconModel,
    Gemma2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PhiConfig,
    StableLmModel,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from sparsevlm.model import attention

SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}
CONFIGS = {
    "llama_gqa": lambda: LlamaConfig(**SIZES, num_key_value_heads=2),
    "llama_mha": lambda: LlamaConfig(**SIZES),
    "phi": lambda: PhiConfig(**SIZES),
    "gpt_neox": lambda: GPTNeoXConfig(**SIZES),
    "mistral_window": lambda: MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=4),
}
OPT_SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "word_embed_proj_dim": 32,
}
LENGTHS = [5, 1, 9, 9, 3, 1]


@pytest.fixture(autouse=True)
def _registered() -> None:
    attention.register()


def build(name: str, implementation: str = "packed_sdpa") -> Any:
    torch.manual_seed(0)
    return AutoModel.from_config(CONFIGS[name](), attn_implementation=implementation).eval()


def rows(lengths: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Input ids and positions of one packed row, and its boundaries."""
    torch.manual_seed(1)
    ids = torch.randint(0, 50, (1, sum(lengths)))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    return ids, positions, torch.tensor([0, *lengths]).cumsum(0).int()


def separate(model: Any, ids: Tensor, lengths: list[int]) -> Tensor:
    """Each document alone, put together again."""
    parts = [model(part, use_cache=False).last_hidden_state for part in ids.split(lengths, 1)]
    return torch.cat(parts, dim=1)


def gradients(model: nn.Module, output: Tensor) -> list[Tensor]:
    weight = torch.linspace(-1, 1, output.numel()).view_as(output)
    return list(torch.autograd.grad((output * weight).sum(), list(model.parameters())))


@pytest.mark.parametrize("lengths", [LENGTHS, [4, 4, 4], [1, 1, 1], [12], [3, 17]], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_packed_row_equals_separate_documents(name: str, lengths: list[int]) -> None:
    model = build(name)
    ids, positions, _ = rows(lengths)
    packed = model(ids, position_ids=positions, use_cache=False).last_hidden_state
    alone = separate(model, ids, lengths)
    assert (packed - alone).abs().max() <= 1e-6 * max(1.0, float(alone.detach().abs().max()))
    for got, expected in zip(gradients(model, packed), gradients(model, alone), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-5)


def test_packed_row_needs_no_square_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention only ever sees one document: no mask, no query longer than the longest."""
    seen: list[tuple[int, Any]] = []

    def spy(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
        seen.append((query.shape[2], mask))
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)

    monkeypatch.setattr(attention, "sdpa_attention_forward", spy)
    ids, positions, _ = rows(LENGTHS)
    build("llama_gqa")(ids, position_ids=positions, use_cache=False)
    assert [length for length, _ in seen] == LENGTHS * 2
    assert all(mask is None for _, mask in seen)


def test_boundaries_from_cu_seq_lens_where_a_cache_hides_packing() -> None:
    """With a cache transformers does not look for packing; the boundaries in kwargs still keep documents apart."""
    model = build("llama_gqa")
    ids, positions, cu_seq_lens = rows(LENGTHS)
    packed = model(ids, position_ids=positions, use_cache=True, cu_seq_lens_q=cu_seq_lens).last_hidden_state
    torch.testing.assert_close(packed, separate(model, ids, LENGTHS), rtol=1e-5, atol=1e-6)


def test_mask_that_joins_documents_is_refused() -> None:
    """A window shorter than the row makes transformers build a mask, and the cache hides the packing from it."""
    model = build("mistral_window")
    ids, positions, cu_seq_lens = rows(LENGTHS)
    with pytest.raises(ValueError, match="use_cache=False"):
        model(ids, position_ids=positions, use_cache=True, cu_seq_lens_q=cu_seq_lens)
    packed = model(ids, position_ids=positions, use_cache=False, cu_seq_lens_q=cu_seq_lens).last_hidden_state
    torch.testing.assert_close(packed, separate(model, ids, LENGTHS), rtol=1e-5, atol=1e-6)


def test_gradient_checkpointing_recomputes_the_same_documents() -> None:
    model = build("llama_gqa").train()
    ids, positions, _ = rows(LENGTHS)
    plain = gradients(model, model(ids, position_ids=positions, use_cache=False).last_hidden_state)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    again = gradients(model, model(ids, position_ids=positions, use_cache=False).last_hidden_state)
    for got, expected in zip(again, plain, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["llama_gqa", "mistral_window"])
def test_padded_rows_equal_sdpa_exactly(name: str) -> None:
    ours, reference = build(name), build(name, "sdpa")
    ids = torch.randint(0, 50, (3, 11))
    for mask in (None, torch.ones(3, 11), torch.tensor([[0] * n + [1] * (11 - n) for n in (0, 4, 7)])):
        for position_ids in (None, torch.arange(11)[None]):
            got = ours(ids, attention_mask=mask, position_ids=position_ids).last_hidden_state
            expected = reference(ids, attention_mask=mask, position_ids=position_ids).last_hidden_state
            torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", CONFIGS)
def test_cached_decode_equals_full(name: str) -> None:
    """Left-padded prompts, then single tokens, then several at once."""
    model = build(name)
    ids = torch.randint(0, 50, (2, 14))
    mask = torch.tensor([[1] * 14, [0] * 3 + [1] * 11])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    full = model(ids, attention_mask=mask, position_ids=positions).last_hidden_state
    cache = DynamicCache(config=model.config)
    done = []
    for start, end in [(0, 7), (7, 8), (8, 9), (9, 12), (12, 14)]:
        out = model(
            ids[:, start:end],
            attention_mask=mask[:, :end],
            position_ids=positions[:, start:end],
            past_key_values=cache,
        )
        done.append(out.last_hidden_state)
    real = mask.bool()
    torch.testing.assert_close(torch.cat(done, 1)[real], full[real], rtol=1e-5, atol=1e-5)


def test_several_packed_rows_fall_back_to_a_mask() -> None:
    model = build("llama_gqa")
    ids, positions, _ = rows([5, 7])
    batch = torch.cat([ids, ids.flip(1)])
    out = model(batch, position_ids=positions.expand(2, -1), use_cache=False).last_hidden_state
    expected = torch.cat([separate(model, ids, [5, 7]), separate(model, ids.flip(1), [5, 7])])
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)


def test_window_as_long_as_the_longest_document_needs_no_mask() -> None:
    def boundaries(window: int) -> Any:
        positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3]])
        from transformers.masking_utils import create_sliding_window_causal_mask

        config = MistralConfig(**SIZES, sliding_window=window, attn_implementation="packed_sdpa")
        return create_sliding_window_causal_mask(config, torch.zeros(1, 7, 32), None, None, position_ids=positions)

    assert boundaries(4).flatten().tolist() == [0, 3, 7]
    assert boundaries(3).shape == (1, 1, 7, 7)


def test_bidirectional_blocks_keep_their_mask() -> None:
    """A pattern that is more than causal must not be mistaken for documents."""
    from transformers.masking_utils import create_causal_mask

    config = LlamaConfig(**SIZES, attn_implementation="packed_sdpa")
    arguments = {"attention_mask": None, "past_key_values": None, "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]])}
    blocks = torch.tensor([[-1, 0, 0, -1, -1, -1]])
    mask = create_causal_mask(config, torch.zeros(1, 6, 32), **arguments, block_sequence_ids=blocks)
    assert mask is not None
    assert mask.shape == (1, 1, 6, 6)
    assert mask[0, 0, 1, 2]
    assert not mask[0, 0, 3, 2]


@pytest.mark.parametrize("boundaries", [[0, 4], [1, 6], [0, 3, 7]])
def test_boundaries_must_cover_the_row(boundaries: list[int]) -> None:
    x = torch.randn(1, 4, 6, 8)
    with pytest.raises(ValueError, match="from 0 to the end of one row"):
        attention.packed_sdpa_forward(nn.Module(), x, x, x, attention.boundaries_mask(boundaries))


def test_softcapping_models_are_refused_as_by_sdpa() -> None:
    with pytest.raises(ValueError, match="scaled_dot_product_attention"):
        AutoModel.from_config(Gemma2Config(**SIZES, head_dim=8), attn_implementation="packed_sdpa")


def test_supports_packed_sdpa() -> None:
    assert attention.supports_packed_sdpa(build("llama_gqa"))
    assert attention.supports_packed_sdpa(StableLmModel)
    assert not attention.supports_packed_sdpa(FalconModel)  # would raise KeyError in its forward
    assert not attention.supports_packed_sdpa(nn.Linear(1, 1))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("implementation", ["packed_sdpa", "sdpa"])
def test_documents_are_isolated(name: str, implementation: str) -> None:
    model = build(name, implementation).train()
    assert attention.isolates_documents(model)
    assert model.training


def test_documents_that_leak_are_found() -> None:
    """OPT makes its own mask of ones, which hides the packing from `sdpa`; boundaries in kwargs still reach ours."""
    for implementation, isolated in [("sdpa", False), ("packed_sdpa", True)]:
        model = AutoModel.from_config(OPTConfig(**OPT_SIZES), attn_implementation=implementation)
        assert attention.isolates_documents(model) is isolated


@pytest.mark.parametrize("lengths", [[5, 3, 7], [4, 4], [1, 6]], ids=str)
def test_short_documents_together_equal_one_by_one(lengths: list[int]) -> None:
    """The padded path (16 bits on CPUs) in float32, against attention of each document; grouped queries."""
    module = nn.Module()
    module.num_key_value_groups = 2  # pyright: ignore
    tokens = sum(lengths)
    query = torch.randn(1, 4, tokens, 8, requires_grad=True)
    key, value = (torch.randn(1, 2, tokens, 8, requires_grad=True) for _ in range(2))
    boundaries = attention.boundaries_mask([0, *torch.tensor(lengths).cumsum(0).tolist()])
    apart, _ = attention.packed_sdpa_forward(module, query, key, value, boundaries)
    together = attention._attend_padded(module, query, key, value, lengths, is_causal=True)
    torch.testing.assert_close(together, apart, atol=1e-6, rtol=1e-5)
    weight = torch.randn_like(apart)
    for got, expected in zip(
        torch.autograd.grad((together * weight).sum(), (query, key, value)),
        torch.autograd.grad((apart * weight).sum(), (query, key, value)),
        strict=True,
    ):
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)


def test_short_documents_in_16_bits_take_the_padded_path(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[int]] = []
    padded = attention._attend_padded
    monkeypatch.setattr(
        attention,
        "_attend_padded",
        lambda m, q, k, v, lengths, **kw: calls.append(lengths) or padded(m, q, k, v, lengths, **kw),
    )
    states = [torch.randn(1, 2, 12, 8) for _ in range(3)]
    boundaries = attention.boundaries_mask([0, 5, 12])
    exact, _ = attention.packed_sdpa_forward(nn.Module(), *states, boundaries)
    assert not calls
    rounded, _ = attention.packed_sdpa_forward(nn.Module(), *(s.bfloat16() for s in states), boundaries)
    assert calls == [[5, 7]]
    # bfloat16 keeps 8 bits: outputs near 1 are off by up to 2^-8 for the inputs' rounding and as much for the output's
    assert (rounded.float() - exact).abs().max() < 0.04
