"""The mixture of LoRA experts of a recipe as PEFT's configuration."""

from __future__ import annotations

from typing import Any

from sparsevlm.adapters.lora_experts.config import LoraExpertsConfig
from sparsevlm.adapters.lora_experts.model import find_ffns
from sparsevlm.adapters.prepared import Prepared
from sparsevlm.recipe.adapter import LoraExperts


def prepare(model: Any, spec: LoraExperts) -> Prepared:
    """Find the FFNs that a section adapts.

    Raises:
        ValueError: Layers that the model does not have, or without a dense FFN.
    """
    router = spec.router
    assert router.init != "kmeans" and router.scoring != "modality", "refused in the recipe"
    config = LoraExpertsConfig(
        num_experts=spec.experts,
        num_experts_per_tok=spec.top_k,
        r=spec.r,
        lora_alpha=spec.alpha,
        use_rslora=spec.rslora,
        lora_dropout=spec.dropout,
        layers=spec.layers,
        scoring_func=router.scoring,
        norm_topk_prob=router.norm_topk_prob,
        router_init=router.init,
        router_init_std=router.init_std,
        router_jitter_noise=router.jitter,
        bias_update_rate=router.bias_update_rate,
        capacity_factor=router.capacity_factor,
        eval_capacity_factor=router.eval_capacity_factor,
        min_capacity=router.min_capacity,
        drop_policy=router.drop,
        router_aux_loss_coef=spec.aux_loss_coef,
        aux_loss_reduction=spec.aux_loss_reduction,
        aux_loss_count=spec.aux_loss_count,
        aux_loss_scope=spec.aux_loss_scope,
        router_z_loss_coef=spec.z_loss_coef,
    )
    ffns = tuple(find_ffns(model, config))
    return Prepared(config, {"language.ffn": len(ffns)}, ffns)
