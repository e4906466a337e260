"""A sparse language model without vision: any causal language model of transformers, with MoE blocks in its layers.

Legend: B rows, T tokens a row, H width.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationMixin

from sparsevlm.model.configuration_text import SparseVLMTextConfig
from sparsevlm.model.outputs import SparseVLMCausalLMOutput, routing_columns
from sparsevlm.model.sparse import MoePreTrainedModel
from sparsevlm.moe.block import install_moe
from sparsevlm.moe.groups import router_groups
from sparsevlm.moe.losses import add_routing_losses, wants_losses
from sparsevlm.moe.modality import goes_by_modality
from sparsevlm.moe.padding import leave_out_padding, padding_mask
from sparsevlm.moe.router import collect_routing


class SparseVLMTextForCausalLM(MoePreTrainedModel, GenerationMixin):
    """A language model of transformers whose chosen FFNs are routed experts.

    It holds the whole class of the dense model, head included, so that whatever that class does to its embeddings or
    logits (scales, caps, biases) stays as it is.
    """

    config_class = SparseVLMTextConfig
    base_model_prefix = "language_model"

    def __init__(self, config: SparseVLMTextConfig) -> None:
        super().__init__(config)
        text_config = config.text_config
        # Dense classes refuse a config that names an experts kernel; the blocks get it instead.
        kernel = text_config._experts_implementation
        text_config._experts_implementation = None
        self.language_model = AutoModelForCausalLM.from_config(text_config)
        if goes_by_modality(config.moe):
            raise ValueError(
                "experts by modality (router scoring 'modality') need visual tokens, and this is a language model "
                "without vision; take another scoring"
            )
        if config.moe is not None:
            install_moe(self.language_model, text_config, config.moe, experts_implementation=kernel)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embedding."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding."""
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """Return the head."""
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the head."""
        self.language_model.set_output_embeddings(new_embeddings)

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Prepare a step of `generate` as the dense class does."""
        return self.language_model.prepare_inputs_for_generation(*args, **kwargs)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        aux_loss_scale: float = 1.0,
        output_router_logits: bool | None = None,
        **kwargs: Any,
    ) -> SparseVLMCausalLMOutput:
        """Run the language model; with `labels`, also its class's own loss and the routers'.

        Args:
            input_ids: ``(B, T)``.
            attention_mask: ``(B, T)``, or None for packed rows.
            position_ids: ``(B, T)``.
            past_key_values: Cache.
            inputs_embeds: ``(B, T, H)`` instead of `input_ids`.
            labels: ``(B, T)``, -100 where there is no target.
            aux_loss_scale: Factor on the auxiliary losses besides their coefficients.
            output_router_logits: Return the routers' logits and choices.
            **kwargs: Passed to the language model.
        """
        tokens = input_ids if input_ids is not None else inputs_embeds
        if tokens is None:
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        kwargs.pop("return_dict", None)
        groups = router_groups(self)
        need_aux = labels is not None and wants_losses(groups)
        collect = (bool(output_router_logits) or need_aux) and bool(groups)
        mask = padding_mask(attention_mask, groups, self.training, tokens.shape[1])
        padding = leave_out_padding(self.language_model, mask)
        with collect_routing(collect) as collected, padding:
            outputs = self.language_model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                labels=labels,
                **kwargs,
            )
        loss = outputs.loss
        routers = routing_columns(collected) if collect else {}
        aux_loss, z_loss = None, None
        if need_aux:
            loss, aux_loss, z_loss = add_routing_losses(
                loss,
                groups,
                routers["router_groups"],
                routers["router_logits"],
                routers["router_choices"],
                mask,
                training=self.training,
                scale=aux_loss_scale,
            )
        routers.pop("router_choices", None)
        return SparseVLMCausalLMOutput(
            loss=loss,
            aux_loss=aux_loss,
            z_loss=z_loss,
            logits=outputs.logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **routers,
        )


__all__ = ["SparseVLMTextForCausalLM"]

AutoModelForCausalLM.register(SparseVLMTextConfig, SparseVLMTextForCausalLM, exist_ok=True)
