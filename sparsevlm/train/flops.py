"""Closed formulas for what a stage costs: arithmetic of an optimizer step and memory of a rank. See `docs/plan.md`.

Everything is read off a model on the meta device: which matrices a token meets, and how often.

Legend: T tokens a step, S tokens a row, N visual tokens a step, F frames a step, W ranks.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sparsevlm.adapters.logical import logical_shape
from sparsevlm.adapters.names import is_adapter_parameter, routed_adapter
from sparsevlm.recipe.schema import Recipe, Stage
from sparsevlm.surgery import FUSION_MODULES, TEXT_TWIN, in_fusion
from sparsevlm.train.connector_cost import BlockCost
from sparsevlm.train.parts import numel
from sparsevlm.train.quantised_memory import quantised_memory
from sparsevlm.train.sharding import deepspeed_config, uses_deepspeed
from sparsevlm.vision.encoder import encode_frames
from sparsevlm.vision.frames import encoding
from sparsevlm.vision.native import encode_native, patch_side
from sparsevlm.vision.tokens import ItemShape

CROSS_ATTENTION = FUSION_MODULES[0]
_LAYER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class Matrix:
    """A weight matrix that a token is multiplied with.

    Attributes:
        index: Decoder layer that it belongs to; None for the head.
        inputs: Width before it.
        outputs: Width after it.
        uses: Matrices of this kind that one token meets: 1, or top_k for stacked experts.
        trainable: It trains in this stage.
        meets: Tokens that it is multiplied with: `all` of a row, its `text` or its `visual` tokens, where they have
            weights of their own, or the visual tokens `beside` the row.
        looks: It makes queries that look at the visual tokens of the row.
    """

    index: int | None
    inputs: int
    outputs: int
    uses: int
    trainable: bool
    meets: Literal["all", "text", "visual", "beside"] = "all"
    looks: bool = False

    @property
    def flops(self) -> int:
        """Operations of one token in the forward pass: a multiplication and an addition a weight."""
        return 2 * self.inputs * self.outputs * self.uses

    @property
    def activations(self) -> int:
        """Numbers of one token that the backward pass needs: what goes in, and what comes out."""
        return (self.inputs + self.outputs) * self.uses


@dataclass(frozen=True)
class Tower:
    """What one frame costs in the vision tower.

    Attributes:
        flops: Operations of the forward pass.
        activations: Numbers that a backward pass needs, as for `Matrix`.
        checkpointed: The same when every layer is recomputed: what enters the layers, and one layer's own.
    """

    flops: int
    activations: int
    checkpointed: int


@dataclass(frozen=True)
class Shape:
    """Size of a step.

    Attributes:
        rows: Rows an optimizer step.
        rows_per_rank: Rows that a rank holds at once.
        row_tokens: S.
        row_frames: Frames of a row; at native resolution its media.
        row_media: Media of a row.
        row_visual: Visual tokens of a row, as they leave the connector.
    """

    rows: int
    rows_per_rank: int
    row_tokens: int
    row_frames: int
    row_media: int
    row_visual: int


def matrices(model: Any) -> list[Matrix]:
    """Return the matrices of the language model (head included, the embedding look-up not).

    Args:
        model: A `SparseVLMForConditionalGeneration` with `requires_grad` as the stage sets it; the meta device will do.
    """
    language: list[Matrix] = []
    before: dict[int | None, int] = {}
    top_k = getattr(model.config.text_config, "num_experts_per_tok", 1)
    routed_by_token = any(getattr(c, "routing", "") == "token" for c in getattr(model, "peft_config", {}).values())
    for prefix, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            continue
        for name, weight in module.named_parameters(recurse=False):
            path = f"{prefix}.{name}"
            if (
                "bias" in name
                or weight.ndim not in (2, 3)
                or path.startswith(("model.vision_tower.", "model.connector."))
                or path == "lm_head.weight"
            ):
                continue
            found = _LAYER.search(path)
            index = int(found[1]) if found else None
            if ".mma_" in path:
                if ".mma_router." in path and not routed_by_token:
                    continue
                # Named after the attention that they stand before.
                first = next(i for i, matrix in enumerate(language) if matrix.index == index)
                language.insert(first + before.get(index, 0), _mma_matrix(index, path, weight))
                before[index] = before.get(index, 0) + 1
                continue
            if routed_adapter(path):
                # LoRA experts: all of them are multiplied, (E r) x I or O, whichever a token uses.
                rank, width = weight.shape[0] * weight.shape[1], weight.shape[2]
                inputs, outputs = (width, rank) if ".mole_A." in path else (rank, width)
                language.append(Matrix(int(found[1]) if found else None, inputs, outputs, 1, weight.requires_grad))
                continue
            if in_fusion(path) and CROSS_ATTENTION in path:  # a block stands before its layer
                first = next((i for i, matrix in enumerate(language) if matrix.index == index), len(language))
                language.insert(first + before.get(index, 0), _fusion_matrix(index, path, weight))
                before[index] = before.get(index, 0) + 1
                continue
            stacked = weight.ndim == 3
            matrix = Matrix(
                index=index,
                inputs=logical_shape(weight)[-1],
                outputs=logical_shape(weight)[-2],
                uses=top_k if stacked else 1,
                trainable=weight.requires_grad,
                meets="visual" if in_fusion(path) else "text" if TEXT_TWIN in path.split(".") else "all",
            )
            language.append(matrix)
    head = model.get_output_embeddings().weight  # by the module, since a tied head is no parameter of its own
    language.append(Matrix(None, head.shape[1], head.shape[0], 1, head.requires_grad))
    return language


def _fusion_matrix(index: int | None, path: str, weight: Any) -> Matrix:
    """Return what a token meets of a weight of a cross-attention block: keys and values are of visual tokens."""
    outputs, inputs = logical_shape(weight)
    meets = "beside" if ".to_kv." in path else "all"
    return Matrix(
        index,
        inputs,
        outputs,
        1,
        weight.requires_grad,
        meets,
        looks=path.endswith((".to_q.weight", ".to_q.base_layer.weight")),
    )


def _mma_matrix(index: int | None, path: str, weight: Any) -> Matrix:
    """Return what a token meets of a weight of a mixture-of-modality adapter.

    The P projections ``h -> d`` in g groups are one product of all paths, ``P (h / g + 1) -> d`` with their biases.
    Routers of samples read one token a modality, which also runs through the decoder once a forward pass: two or three
    tokens beside the thousands of a step, which are left out.
    """
    if ".mma_up." in path:
        paths, outputs, size = weight.shape
        return Matrix(index, paths * (size + 1), outputs, 1, weight.requires_grad)
    return Matrix(index, weight.shape[1], weight.shape[0], 1, weight.requires_grad)


def measure_tower(model: Any, image_size: int, items: Sequence[ItemShape] | None = None) -> Tower:
    """Count a frame's operations and activations by sending one through the tower on the meta device.

    Args:
        model: On the meta device.
        image_size: Side of a frame.
        items: At native resolution the items of a medium, which are counted instead of a frame.
    """
    tower = model.model.vision_tower
    numbers = 0

    def count(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        nonlocal numbers
        numbers += inputs[0].numel() + output.numel()

    weighted = (nn.Linear, nn.Conv1d, nn.Conv2d)
    handles = [module.register_forward_hook(count) for module in tower.modules() if isinstance(module, weighted)]
    try:
        # As a slice, not a whole picture: adapters that tell them apart may leave whole pictures alone.
        with FlopCounterMode(display=False) as counter, torch.no_grad(), encoding([0]):
            layer, select = model.config.vision_feature_layer, model.config.vision_feature_select
            if items is None:
                frame = torch.empty(1, 3, image_size, image_size, device="meta")
                features = encode_frames(tower, frame, layer=layer, select=select)
            else:
                tokens, patch = sum(item.grid.num_tokens for item in items), patch_side(tower.config)
                patches = torch.empty(tokens, 3 * patch**2, device="meta")
                features = encode_native(tower, patches, [item.grid for item in items], layer)
    finally:
        for handle in handles:
            handle.remove()
    layers = getattr(model.config.vision_config, "num_hidden_layers", None)
    kept = numbers if layers is None else features.numel() * layers + numbers // layers
    return Tower(counter.get_total_flops(), numbers, min(kept, numbers))


def _attention_flops(text_config: Any, tokens: int, row_tokens: int) -> int:
    """Operations of one layer's causal attention scores and their use in the forward pass: ``2 T S d``.

    Each of the two products costs ``2 T S d``, d being heads times head width; the causal half is saved. Packed
    documents see less than the whole row, so this is a bound.
    """
    heads = text_config.num_attention_heads
    width = heads * (getattr(text_config, "head_dim", None) or text_config.hidden_size // heads)
    return 2 * tokens * row_tokens * width


def flops_per_step(model: Any, tower: Tower, connector: Sequence[BlockCost], stage: Stage, shape: Shape) -> int:
    """Return the operations of one optimizer step over all ranks; `connector` is what one medium costs there.

    A matrix of m weights costs ``2 m`` a token in the forward pass, ``2 m`` for the gradient of its input where
    something before it trains, and ``2 m`` for its own gradient where it trains: ``6 m`` in full training, ``4 m`` in a
    frozen language model over a trained connector. Experts count top_k times. Attention costs ``2 T S d`` a layer
    forward and twice that backward. Gradient checkpointing repeats the forward pass of the layers.
    """
    again = int(stage.gradient_checkpointing)
    trained = [name for name, weight in model.model.vision_tower.named_parameters() if weight.requires_grad]
    trains_below = bool(trained)
    own = any(not is_adapter_parameter(name) for name in trained)  # an adapter's tower has no gradients of its own
    passes = 1 + trains_below * (1 + again) + own
    total = passes * tower.flops * shape.rows * shape.row_frames

    for block in connector:
        for matrix in block.matrices:
            total += (1 + trains_below + matrix.trainable) * matrix.flops * shape.rows * shape.row_media
            trains_below = trains_below or matrix.trainable
        total += (1 + 2 * trains_below) * block.products * shape.rows * shape.row_media

    tokens = shape.rows * shape.row_tokens
    attention = _attention_flops(model.config.text_config, tokens, shape.row_tokens)
    trains_below = trains_below or model.get_input_embeddings().weight.requires_grad
    layer = None
    visual = shape.row_visual
    inside = shape.rows * min(visual, shape.row_tokens)
    met = {"all": tokens, "text": tokens - inside, "visual": inside, "beside": shape.rows * visual}
    media_train = any(matrix.trainable for block in connector for matrix in block.matrices) or bool(trained)
    for matrix in matrices(model):
        repeated = again * (matrix.index is not None)
        below = media_train if matrix.meets == "beside" else trains_below
        total += (1 + repeated + below + matrix.trainable) * matrix.flops * met[matrix.meets]
        trains_below = trains_below or below or matrix.trainable
        if matrix.looks:  # two products of queries and visual tokens
            total += (1 + again + 2 * trains_below) * 4 * tokens * visual * matrix.outputs
        if matrix.index not in (None, layer):  # the layer's first matrix: its attention comes with it
            layer = matrix.index
            total += (1 + again + 2 * trains_below) * attention
    return total


def memory_per_rank(
    model: Any,
    tower: Tower,
    connector: Sequence[BlockCost],
    recipe: Recipe,
    stage: Stage,
    shape: Shape,
    world: int = 1,
    expert_ranks: int = 1,
) -> dict[str, int]:
    """Return the bytes that a rank needs on its device, by what they hold.

    - ``weights``: 4 bytes a parameter (2 where `model.dtype` is bfloat16), plus 2 a trained one for autocast's copies;
      a share of ``1 / W`` under ZeRO-3.
      Adapters are float32 in any case.
    - ``quantised``: what is in 4 or 8 bits, with its constants (`quantise.packed_bytes`); ``dequantised``: what of it
      is there in full precision at the same time (`quantised_memory`).
    - ``gradients``: as the weights, of what trains; ``1 / W`` from ZeRO-2 on.
    - ``optimizer``: two moments of the weights' type; under DeepSpeed 12 bytes (float32 master and moments), ``1 / W``.
    - ``activations``: `Matrix.activations` of all layers for the tokens of a micro-batch; with gradient checkpointing
      the layers' inputs and one layer's own. 2 bytes each in bf16, else 4. The tower's only where it trains. Attention
      that keeps no score matrix is assumed (SDPA, flash).
    - ``logits``: micro-batch tokens x vocabulary, in the arithmetic's type, once more in float32, and their gradient.

    Expert parallelism leaves a rank ``1 / expert_ranks`` of the stacked experts where their weights or gradients are
    not sharded anyway; ``expert_ranks`` is `expert_parallel.ranks_of_experts`, 1 where the experts are not spread.
    Offloaded parts count under ``host`` (not on the device).
    """
    sharded = uses_deepspeed(recipe, stage, world)
    sharding = recipe.sharding_of(stage)
    config = deepspeed_config(sharding, stage, recipe.model.dtype) if sharded else None
    zero = sharding.zero if config is not None else 0
    weight_bytes = 2 if recipe.model.dtype == "bfloat16" else 4
    number_bytes = 2 if stage.precision == "bf16" or weight_bytes == 2 else 4

    quantised = quantised_memory(
        model, checkpointing=stage.gradient_checkpointing, number_bytes=number_bytes, weight_bytes=weight_bytes
    )
    everything = sum(numel(weight) for weight in model.parameters()) - quantised.numbers
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    spread = [weight for name, weight in model.named_parameters() if ".experts." in name]
    elsewhere = [weight.numel() - weight.numel() // expert_ranks for weight in spread]
    elsewhere_trained = sum(numel for numel, weight in zip(elsewhere, spread) if weight.requires_grad)
    casts = 2 * trained if stage.precision == "bf16" and weight_bytes == 4 else 0
    weights = weight_bytes * (everything // world if zero == 3 else everything - sum(elsewhere))
    gradients = weight_bytes * (trained // world if zero >= 2 else trained - elsewhere_trained)
    states = (12 if config is not None else 2 * weight_bytes) * trained // (world if zero >= 1 else 1)
    if config is None:  # an adapter's weights are float32, whatever the model's are
        wider = [w for n, w in model.named_parameters() if is_adapter_parameter(n)]
        weights += (4 - weight_bytes) * sum(weight.numel() for weight in wider)
        more = (4 - weight_bytes) * sum(weight.numel() for weight in wider if weight.requires_grad)
        gradients, states = gradients + more, states + 2 * more
    host = 0
    if sharded and sharding.offload != "none":
        host, states = host + states, 0
    if sharded and sharding.offload == "all":
        host, weights = host + weights, 0

    language = matrices(model)
    tokens = shape.rows_per_rank * shape.row_tokens
    numbers = tokens * _layer_activations(
        (matrix for matrix in language if matrix.meets in ("all", "text")),  # twins are of one size
        stage.gradient_checkpointing,
        model.config.text_config.hidden_size,
    )
    beside = (matrix for matrix in language if matrix.meets == "beside")
    numbers += shape.rows_per_rank * shape.row_visual * _layer_activations(beside, stage.gradient_checkpointing, 0)
    if any(weight.requires_grad for weight in model.model.vision_tower.parameters()):
        frame = tower.checkpointed if stage.gradient_checkpointing else tower.activations
        numbers += shape.rows_per_rank * shape.row_frames * frame
    met = [matrix for block in connector for matrix in block.matrices]
    if any(matrix.trainable for matrix in met):
        numbers += shape.rows_per_rank * shape.row_media * sum(matrix.activations for matrix in met)
    vocabulary = model.get_output_embeddings().weight.shape[0]
    return {
        "weights": weights + casts,
        "quantised": quantised.stored,
        "dequantised": quantised.dequantised,
        "gradients": gradients,
        "optimizer": states,
        "activations": numbers * number_bytes,
        "logits": tokens * vocabulary * (number_bytes + 8),
        "host": host,
    }


def _layer_activations(language: Iterable[Matrix], checkpointing: bool, hidden: int) -> int:
    """Numbers that the decoder layers keep of one token."""
    layers: dict[int, int] = {}
    for matrix in language:
        if matrix.index is not None:
            layers[matrix.index] = layers.get(matrix.index, 0) + matrix.activations
    kept = sum(layers.values())
    return min(kept, hidden * len(layers) + max(layers.values(), default=0)) if checkpointing else kept
