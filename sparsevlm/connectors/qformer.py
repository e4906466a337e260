"""Q-Former: BERT layers whose queries read an image by cross-attention (BLIP-2, InstructBLIP, InternLM-XComposer).

Legend: B frames (or items) read at once, n features of each, m queries, L tokens of a guide, D width of the features,
C width of the Q-Former.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from sparsevlm.connectors.base import BlockSpec, GuideText, map_items
from sparsevlm.connectors.learned import Learned
from sparsevlm.connectors.pretrained import fill, read_tensors
from sparsevlm.registry import CONNECTOR_BLOCKS
from sparsevlm.vision.tokens import Grid, Guides, MediaKind, VisualTokens


@CONNECTOR_BLOCKS.register("qformer")
class QFormerSpec(BlockSpec):
    """Learned queries in a small BERT: they attend to each other and, every second layer, to the image.

    The defaults are BLIP-2's second stage (arXiv:2301.12597): BERT-base, 32 queries, 105,137,664 parameters behind
    the queries. ``instruction: true`` is InstructBLIP's (arXiv:2305.06500): the question about a picture joins the
    self-attention. InternLM-XComposer's sampler has 64 queries. Follow it with a `linear` block, and give it the class
    token with `model.vision.select: full`, as all three do.
    """

    type: Literal["qformer"] = "qformer"
    """Registered name of the block."""
    queries: int = Field(default=32, ge=1)
    """Learned queries: the tokens that a frame (or an item, see `per`) leaves."""
    instruction: bool = False
    """Let the queries see the text of the user's turn that the medium stands in."""
    tokenizer: str = "language"
    """Tokenizer of that text: `language` for the language model's, or a Hub id or directory; it is saved with the
    processor."""
    vocab_size: int = Field(default=30523, ge=1)
    """Words that the block knows, with `instruction`; the tokenizer must not have more. 30523: BERT's and [DEC]."""
    max_text: int = Field(default=128, ge=1, le=512)
    """Tokens of the text, with `instruction`; a longer one loses its beginning."""
    dim: int = Field(default=768, ge=1)
    """Width."""
    layers: int = Field(default=12, ge=1)
    """Layers."""
    heads: int = Field(default=12, ge=1)
    """Attention heads."""
    ff_dim: int = Field(default=3072, ge=1)
    """Width of the feed-forward networks."""
    cross_every: int = Field(default=2, ge=1)
    """Layers 0, n, 2n, ... attend to the image."""
    dropout: float = Field(default=0.1, ge=0, lt=1)
    """Dropout of attention and feed-forward networks in training."""
    norm: bool = True
    """Layer norm of the features before they are read (the `ln_vision` of all three systems)."""
    per: Literal["frame", "item"] = "frame"
    """`frame`: every frame of a video is read by itself; `item`: all frames at once."""
    weights: str | None = None
    """Hub id or directory of a BLIP-2 or InstructBLIP model of transformers: queries, Q-Former and `norm` begin with
    its weights. With `instruction` an InstructBLIP model, or BLIP-2's for image-text retrieval, which also reads text.
    Read once, when the model is made of its parts."""

    @model_validator(mode="after")
    def _consistent(self) -> QFormerSpec:
        if self.dim % self.heads:
            raise ValueError(f"qformer: {self.heads} heads do not divide the width {self.dim}")
        return self

    @property
    def guide(self) -> GuideText | None:
        """Return the instruction's tokenizer and length, where there is one."""
        return GuideText(self.tokenizer, self.max_text, self.vocab_size) if self.instruction else None

    def output_grid(self, grid: Grid, kind: MediaKind) -> Grid:
        """Return ``(t, 1, queries)``, or ``(1, 1, queries)`` where frames are read together."""
        return Grid(grid.t if self.per == "frame" else 1, 1, self.queries)

    def output_dim(self, input_dim: int, text_dim: int) -> int:
        """Return the Q-Former's width."""
        return self.dim

    def build(self, input_dim: int, text_dim: int) -> QFormerBlock:
        """Return the module."""
        return QFormerBlock(self, input_dim)

    def load_pretrained(self, module: nn.Module) -> None:
        """Read `weights`; see `BlockSpec`."""
        if self.weights is not None:
            assert isinstance(module, QFormerBlock)
            tensors = read_tensors(self.weights, _block_name)
            if _QUERIES in tensors:
                tensors[_QUERIES] = tensors[_QUERIES].flatten(0, -2)  # (1, m, C) -> (m, C)
            for name in ("weight", "bias"):  # BLIP-2 has the norm of its embeddings beside them
                if self.instruction and f"qformer.layernorm.{name}" in tensors:
                    tensors[f"qformer.embeddings.layernorm.{name}"] = tensors.pop(f"qformer.layernorm.{name}")
            fill(module, tensors, self.weights)


_QUERIES = "qformer_queries.weight"


class QFormerBlock(nn.Module):
    """Queries, and transformers' Q-Former; the name of each parameter says that it is the part `connector.qformer`.

    *Deviation*: the feed-forward network that the last layer has for text is left out. Nothing reads what it gives, and
    weights that get no gradient stop data-parallel training.
    """

    def __init__(self, spec: QFormerSpec, input_dim: int) -> None:
        super().__init__()
        self.spec = spec
        self.qformer_norm = nn.LayerNorm(input_dim, eps=1e-6) if spec.norm else nn.Identity()
        self.qformer_queries = Learned(torch.randn(spec.queries, spec.dim) * 0.02)
        self.qformer = _make_qformer(spec, input_dim)

    def forward(self, tokens: VisualTokens) -> VisualTokens:
        """Read every frame, or item."""
        grids = [self.spec.output_grid(grid, kind) for grid, kind in zip(tokens.grids, tokens.kinds)]

        def read(features: Tensor, grid: Grid, items: list[int]) -> Tensor:
            sets = grid.t if self.spec.per == "frame" else 1
            frames = features.unflatten(1, (sets, -1)).flatten(0, 1)  # (B, n, D), B = items * sets
            guides = guides_of(tokens.guides, items, sets) if self.spec.instruction else None
            return self.read(frames, guides).unflatten(0, (-1, sets)).flatten(1, 2)

        return tokens.with_features(map_items(tokens, self.spec.dim, read, self), grids)

    def read(self, frames: Tensor, guides: tuple[Tensor, Tensor] | None) -> Tensor:
        """Return what the queries read, ``(B, m, C)``.

        Args:
            frames: ``(B, n, D)``.
            guides: Ids and mask of the text of each, ``(B, L)``, with `instruction`.
        """
        queries = self.qformer_queries().expand(len(frames), -1, -1)
        read: dict[str, Any] = {"query_embeds": queries, "encoder_hidden_states": self.qformer_norm(frames)}
        if guides is not None:
            ids, mask = guides
            places = torch.arange(ids.shape[1], device=ids.device)[None]
            seen = torch.cat([mask.new_ones(queries.shape[:2]), mask], dim=1)  # (B, m + L)
            read |= {"input_ids": ids, "attention_mask": seen, "position_ids": places}
        return self.qformer(**read).last_hidden_state[:, : queries.shape[1]]


def guides_of(guides: Guides | None, items: list[int], copies: int) -> tuple[Tensor, Tensor]:
    """Return ids and mask ``(items * copies, L)`` of the text of each of the items, each text so many times in a row.

    Raises:
        ValueError: There are no texts.
    """
    if guides is None:
        raise ValueError(
            "a text-guided connector block got media without texts: give the model guide_ids, guide_mask and "
            "media_guides, as SparseVLMProcessor makes them"
        )
    rows = torch.tensor([guides.index[item] for item in items], device=guides.input_ids.device)
    rows = rows.repeat_interleave(copies)
    return guides.input_ids[rows], guides.attention_mask[rows]


def _make_qformer(spec: QFormerSpec, input_dim: int) -> nn.Module:
    shape = {
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.dim,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "intermediate_size": spec.ff_dim,
        "cross_attention_frequency": spec.cross_every,
        "encoder_hidden_size": input_dim,
        "hidden_dropout_prob": spec.dropout,
        "attention_probs_dropout_prob": spec.dropout,
    }
    if not spec.instruction:
        from transformers import Blip2QFormerConfig, Blip2QFormerModel

        return Blip2QFormerModel(Blip2QFormerConfig(**shape))
    from transformers import InstructBlipQFormerConfig, InstructBlipQFormerModel

    model = InstructBlipQFormerModel(InstructBlipQFormerConfig(**shape))
    last: Any = model.encoder.layer[-1]
    last.intermediate, last.output = nn.Identity(), _Unchanged()
    return model


class _Unchanged(nn.Module):
    """Stands for the output of a feed-forward network that is left out."""

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        """Return the network's input."""
        return input_tensor


def _block_name(name: str) -> str | None:
    """Return the name that a tensor of a BLIP-2 or InstructBLIP checkpoint has in `QFormerBlock`."""
    for theirs, ours in (("qformer.", "qformer."), ("vision_model.post_layernorm.", "qformer_norm.")):
        if name.startswith(theirs) or f".{theirs}" in name:
            return ours + name.split(theirs, 1)[1]
    if name.startswith("embeddings."):  # of BLIP-2's first stage, whose Q-Former reads text
        return f"qformer.{name}"
    return _QUERIES if name.split(".")[-1] == "query_tokens" else None
