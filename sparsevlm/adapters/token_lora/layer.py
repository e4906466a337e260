"""LoRA sets on a linear layer, of which each token passes one or none.

Legend: B rows, T tokens a row, F frames, U units (B * T tokens or F frames), n units that pass a set.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sparsevlm.adapters.token_lora.config import Part, TokenLoraConfig
from sparsevlm.adapters.token_lora.context import current_sets

MERGE_REFUSED = (
    "LoRA that is chosen per token cannot be merged: what is added depends on the token, and some see the base weights "
    "alone, so no single weight matrix does what it does. Keep it beside the base model: save_pretrained writes it, "
    "PeftModel.from_pretrained loads it, unload() gives the base model back"
)


class TokenLoraLayer(nn.Module, BaseTunerLayer):
    """A linear layer with LoRA sets: ``y = W x + (alpha / r) B_i A_i dropout(x)``, i the set of the token.

    A token without a set gets ``W x``, to the bit. Only tokens that pass a set are multiplied by its A and B. B starts
    at zero. The weights are float32; the addition is computed in it and rounded to the layer's type.

    Source: Dong et al. 2024 (InternLM-XComposer2, arXiv:2401.16420), section 3.2 and its code (one set); Li et al. 2023
    (Monkey, arXiv:2311.06607), section 3.1 and its code (a set a slice).
    *Deviations*: a matrix that a model keeps in parts (q, k, v) has an A for each, where both systems' fused ones have
    one. Monkey learns a factor on the addition, 1 at the start, in place of ``alpha / r``, and in FFNs its addition
    goes around the whole FFN instead of each matrix.

    Args:
        base_layer: `nn.Linear` or transformers' `Conv1D`.
        adapter_name: Name of the adapter.
        config: Its settings.
        path: Name of the layer in the model, for messages.

    Raises:
        ValueError: The layer is of another kind.
    """

    adapter_layer_names = ("loras_A", "loras_B")
    other_param_names = ("loras_settings",)

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: TokenLoraConfig, *, path: str) -> None:
        super().__init__()
        self.base_layer, self.path = base_layer, path
        self.in_features, self.out_features = _sizes(base_layer, path)
        self.loras_A, self.loras_B = nn.ModuleDict(), nn.ModuleDict()
        self.loras_settings: dict[str, TokenLoraConfig] = {}
        self._disable_adapters = False
        self.merged_adapters = []
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: TokenLoraConfig) -> None:
        """Add an adapter, freshly initialised, and make it the active one."""
        downs = [nn.Linear(self.in_features, config.r, bias=False) for _ in range(config.total_sets)]
        ups = [nn.Linear(config.r, self.out_features, bias=False) for _ in range(config.total_sets)]
        for down, up in zip(downs, ups):
            nn.init.kaiming_uniform_(down.weight, a=math.sqrt(5))
            nn.init.zeros_(up.weight)
        self.loras_A[adapter_name], self.loras_B[adapter_name] = nn.ModuleList(downs), nn.ModuleList(ups)
        self.loras_settings[adapter_name] = config
        self.set_adapter(adapter_name, inference_mode=config.inference_mode)

    def running(self) -> list[str]:
        """Return the names of the adapters that run."""
        return [] if self.disable_adapters else [name for name in self.active_adapters if name in self.loras_A]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Apply the layer to ``(…, inputs)``."""
        result = self.base_layer(x, *args, **kwargs)
        for name in self.running():
            result = self._add(result, x, name)
        return result

    def _add(self, result: Tensor, x: Tensor, name: str) -> Tensor:
        """Add what an adapter adds to its tokens."""
        config = self.loras_settings[name]
        downs: Any = self.loras_A[name]
        ups: Any = self.loras_B[name]
        sets = current_sets(config.part, self.path)
        units = self._units(x, sets.shape, config.part)
        index, sizes = sets.pick(config, x.device)
        if not (index.numel() or torch.is_grad_enabled()):
            return result
        picked = x.reshape(units, -1, self.in_features).index_select(0, index)  # (n, k, inputs), k tokens a unit
        picked = nn.functional.dropout(picked.to(downs[0].weight.dtype), config.dropout, self.training)
        # An empty set is run too: every parameter is in the graph then, on every rank of a sharded run.
        added = [up(down(part)) for part, down, up in zip(picked.split(sizes), downs, ups)]
        added = (config.alpha / config.r * torch.cat(added)).to(result.dtype)  # (n, k, outputs)
        return result.reshape(units, -1, self.out_features).index_add(0, index, added).view(result.shape)

    def _units(self, x: Tensor, shape: tuple[int, ...], part: Part) -> int:
        """Return U, having checked that the sets are those of x's tokens or frames."""
        units, leading = math.prod(shape), list(x.shape[:-1])
        if part == "language":
            fits = leading in (list(shape), [units])
        else:
            fits = leading[0] == units if len(leading) > 1 else leading[0] % units == 0
        if not fits:
            raise ValueError(
                f"token_lora: {self.path} runs on {tuple(leading)} tokens, but the sets were given for {shape} "
                f"{'tokens' if part == 'language' else 'frames'}; leave this layer out of the targets"
            )
        return units

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse: see `MERGE_REFUSED`."""
        raise ValueError(MERGE_REFUSED)

    def unmerge(self) -> None:
        """Refuse, as nothing was merged."""
        raise ValueError(MERGE_REFUSED)


def _sizes(layer: nn.Module, path: str) -> tuple[int, int]:
    """Return the widths before and after a layer."""
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    if isinstance(layer, Conv1D):
        inputs, outputs = getattr(layer.weight, "ds_shape", layer.weight.shape)
        return inputs, outputs
    raise ValueError(
        f"token_lora: {path} is a {type(layer).__name__}, and only linear layers (nn.Linear, Conv1D) can be adapted"
    )
