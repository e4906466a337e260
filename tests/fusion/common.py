"""Tiny models with a fusion, and batches for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sparsevlm.model.configuration_sparsevlm import SparseVLMConfig
from sparsevlm.model.modeling_sparsevlm import SparseVLMForConditionalGeneration
from tests import tiny

IMAGE, VIDEO = 6, 7
SIDE = 32


def build(fusion: dict[str, Any] | None, seed: int = 0, layers: int = 4, **config: Any) -> Any:
    """A model with random weights; 16 patches of a picture become 4 visual tokens, 24 wide where they stay apart."""
    apart = fusion is not None and fusion["type"] == "gated_cross_attention"
    torch.manual_seed(seed)
    made = SparseVLMConfig(
        vision_config=tiny.vision_config(),
        text_config=tiny.text_config(config.pop("kind", "llama"), num_hidden_layers=layers),
        connector=[
            {"type": "pixel_shuffle", "factor": 2},
            {"type": "mlp", "dim": 24 if apart else 32},
            *config.pop("blocks", []),
        ],
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        fusion=fusion,
        **config,
    )
    return SparseVLMForConditionalGeneration(made).eval()


def pictures(count: int, seed: int = 1) -> dict[str, Tensor]:
    """Pixels of so many pictures and their grids."""
    pixels = torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))
    return {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 4, 4]] * count)}


def disturb(model: nn.Module, name: str, scale: float = 0.5, seed: int = 2) -> None:
    """Add noise to the parameters whose name holds `name`, so that they no longer compute nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if name in key:
                parameter += scale * torch.randn(parameter.shape, generator=generator)


def packed(documents: list[list[int]]) -> dict[str, Any]:
    """One packed row of documents."""
    lengths = [len(document) for document in documents]
    boundaries = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    return {
        "input_ids": torch.tensor([[token for document in documents for token in document]]),
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "cu_seq_lens_q": boundaries,
        "cu_seq_lens_k": boundaries,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }


def padded(documents: list[list[int]], left: bool = False) -> dict[str, Tensor]:
    """Padded rows."""
    width = max(map(len, documents))
    ids, mask = torch.zeros(len(documents), width, dtype=torch.long), torch.zeros(len(documents), width).long()
    for row, document in enumerate(documents):
        where = slice(width - len(document), None) if left else slice(0, len(document))
        ids[row, where], mask[row, where] = torch.tensor(document), 1
    return {"input_ids": ids, "attention_mask": mask}
