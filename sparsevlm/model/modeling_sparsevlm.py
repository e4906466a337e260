"""The unified model: vision tower -> connector blocks -> language model (dense or MoE) -> loss.

Legend: B rows, T tokens a row, H language width, V vocabulary, F frames of all visual items together, I visual items,
D tower width, N visual tokens after the connector, S = B * T routed tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForImageTextToText, GenerationMixin
from transformers.cache_utils import Cache

from sparsevlm.connectors.base import BlockSpec, connector_dims, parse_connector
from sparsevlm.data.sample import IGNORE_INDEX
from sparsevlm.fusion import fusing, install_fusion, media_apart
from sparsevlm.model import attention
from sparsevlm.model.configuration_sparsevlm import SparseVLMConfig
from sparsevlm.model.generation import MEDIA_INPUTS, repeat_media
from sparsevlm.model.outputs import SparseVLMCausalLMOutput, SparseVLMModelOutput, routing_columns
from sparsevlm.model.sparse import MoePreTrainedModel
from sparsevlm.model.visual import VisualMixin, read_guides, read_items, read_known
from sparsevlm.moe.block import install_moe
from sparsevlm.moe.groups import Settings, router_groups
from sparsevlm.moe.losses import add_routing_losses, wants_losses
from sparsevlm.moe.padding import leave_out_padding, padding_mask
from sparsevlm.moe.router import collect_routing, mark_initialized
from sparsevlm.vision.encoder import feature_dim
from sparsevlm.vision.native import make_native, native_dim

attention.register()


class SparseVLMPreTrainedModel(MoePreTrainedModel):
    """Base: loading, saving and what the parts support."""

    config_class = SparseVLMConfig
    base_model_prefix = "model"
    input_modalities = ["image", "video", "text"]


def build_connector(config: SparseVLMConfig) -> nn.ModuleList:
    """Build the connector's blocks, freshly initialised.

    Raises:
        ValueError: The blocks do not end at the language model's width, though visual tokens go where text goes.
    """
    specs, dims = connector_widths(config)
    text_dim = config.text_config.hidden_size
    if dims[-1] != text_dim and not media_apart(config.fusion):
        raise ValueError(
            f"the connector ends at width {dims[-1]} but the language model is {text_dim} wide (widths after each "
            f"block: {dims[1:]}); end it with {{type: linear}} or {{type: mlp}}"
        )
    return nn.ModuleList(spec.build(dim, text_dim) for spec, dim in zip(specs, dims, strict=False))


def add_fusion(language_model: nn.Module, config: SparseVLMConfig) -> None:
    """Add to a decoder what the model's fusion needs, freshly initialised."""
    install_fusion(language_model, config.text_config, config.fusion, connector_widths(config)[1][-1])


def connector_widths(config: SparseVLMConfig) -> tuple[list[BlockSpec], list[int]]:
    """Return the connector's blocks, and the widths before the first and after each."""
    specs = parse_connector(config.connector or [])
    width = feature_dim if config.vision_native is None else native_dim
    tower_dim = width(config.vision_config, config.vision_feature_layer)
    return specs, connector_dims(specs, tower_dim, config.text_config.hidden_size)


class SparseVLMModel(VisualMixin, SparseVLMPreTrainedModel):
    """Vision tower, connector and decoder, without a language-model head."""

    def __init__(self, config: SparseVLMConfig) -> None:
        super().__init__(config)
        text_config = config.text_config
        # Dense classes refuse a config that names an experts kernel; the blocks get it instead.
        kernel = text_config._experts_implementation
        text_config._experts_implementation = config.vision_config._experts_implementation = None
        self.vision_tower = AutoModel.from_config(config.vision_config)
        if config.vision_native is not None:
            make_native(self.vision_tower, config.vision_native["positions"])
        self.connector = build_connector(config)
        self.language_model = AutoModel.from_config(text_config)
        if config.moe is not None:
            install_moe(self.language_model, text_config, config.moe, experts_implementation=kernel)
        add_fusion(self.language_model, config)
        mark_initialized(self.connector)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the language model's token embedding."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the language model's token embedding."""
        self.language_model.set_input_embeddings(value)

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        media_kinds: Tensor | None = None,
        media_owners: Tensor | None = None,
        media_places: Tensor | None = None,
        guide_ids: Tensor | None = None,
        guide_mask: Tensor | None = None,
        media_guides: Tensor | None = None,
        visual_features: Tensor | None = None,
        feature_towers: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        output_router_logits: bool | None = None,
        groups: Mapping[str, Settings] | None = None,
        **kwargs: Any,
    ) -> SparseVLMModelOutput:
        """Run the decoder over text with the visual tokens in their places.

        Args:
            input_ids: ``(B, T)``; each visual token is one placeholder id.
            pixel_values: ``(F, 3, height, width)``, or patches ``(P, 3 * patch * patch)`` at native resolution.
            image_grid_thw: ``(I, 3)`` tower grid of each item.
            media_kinds: ``(I,)`` index into `MEDIA_KINDS`; default image.
            media_owners: ``(I,)`` document of each item; default 0, 1, 2, ….
            media_places: ``(I, 7)`` medium of each item and its `Place`; default: each item is a medium.
            guide_ids: ``(G, L)`` texts for connector blocks that look at text.
            guide_mask: ``(G, L)``, 0 for their padding.
            media_guides: ``(I,)`` text of each item.
            visual_features: ``(M, D)`` of items whose features were computed before, and which have no pixels.
            feature_towers: ``(I,)`` number of the tower that gave an item's features; 0: it has pixels.
            attention_mask: ``(B, T)``, or None for packed rows.
            position_ids: ``(B, T)``; restarts at every document of a packed row.
            past_key_values: Cache.
            inputs_embeds: ``(B, T, H)`` instead of `input_ids`; then no media may be given.
            output_router_logits: Collect the routers' logits and choices.
            groups: Groups of routers (`sparsevlm.moe.groups`), from who holds the adapters; default: this module's.
            **kwargs: Passed to the language model (`cu_seq_lens_q`, `use_cache`, …).
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        kwargs.pop("return_dict", None)
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        assert inputs_embeds is not None
        tokens = None
        apart = media_apart(self.config.fusion)
        if pixel_values is not None or visual_features is not None:
            if input_ids is None or image_grid_thw is None:
                raise ValueError("pixel_values need input_ids (to find their places) and image_grid_thw")
            items = read_items(image_grid_thw, media_kinds, media_owners, media_places)
            guides, known = (
                read_guides(guide_ids, guide_mask, media_guides),
                read_known(visual_features, feature_towers),
            )
            tokens = self.encode_media(pixel_values, *items, guides, known)
            if not apart:
                inputs_embeds = self.write_media(input_ids, inputs_embeds, tokens)
        elif self.training and torch.is_grad_enabled() and not apart:
            inputs_embeds = self.touch_vision(inputs_embeds)

        packed = kwargs.get("cu_seq_lens_q") is not None
        if packed and past_key_values is not None:
            raise ValueError("a packed row takes no past_key_values; generate from padded prompts")
        if packed or (
            past_key_values is None and (self.training or (position_ids is not None and attention_mask is None))
        ):
            # With a cache, even a fresh one, transformers takes a packed row for one document, and its documents would
            # see each other.
            kwargs["use_cache"] = False
        groups = router_groups(self) if groups is None else groups
        collect = bool(output_router_logits) and bool(groups)
        mask = padding_mask(attention_mask, groups, self.training, inputs_embeds.shape[1])
        padding = leave_out_padding(self.language_model, mask)
        fusion = fusing(self, input_ids, inputs_embeds, tokens, attention_mask, position_ids, past_key_values, kwargs)
        with collect_routing(collect) as collected, padding, fusion as remember:
            outputs = self.language_model(
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                **kwargs,
            )
            remember(outputs.past_key_values)
        return SparseVLMModelOutput(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=None if tokens is None else tokens.features,
            **(routing_columns(collected) if collect else {}),
        )


class SparseVLMForConditionalGeneration(SparseVLMPreTrainedModel, GenerationMixin):
    """The model that is trained, generated with, saved and loaded."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}

    def __init__(self, config: SparseVLMConfig) -> None:
        super().__init__(config)
        self.model = SparseVLMModel(config)
        text_config: Any = config.text_config
        self.lm_head = nn.Linear(text_config.hidden_size, text_config.vocab_size, bias=config.lm_head_bias)
        embedding = self.model.get_input_embeddings()
        name = next(name for name, module in self.named_modules() if module is embedding)  # embed_tokens, embed_in, ...
        self._tied_weights_keys = {"lm_head.weight": f"{name}.weight"}
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the language model's token embedding."""
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the language model's token embedding."""
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """Return the head."""
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the head."""
        self.lm_head = new_embeddings

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        media_kinds: Tensor | None = None,
        media_owners: Tensor | None = None,
        media_places: Tensor | None = None,
        guide_ids: Tensor | None = None,
        guide_mask: Tensor | None = None,
        media_guides: Tensor | None = None,
        visual_features: Tensor | None = None,
        feature_towers: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        aux_loss_scale: float = 1.0,
        logits_to_keep: int | Tensor = 0,
        output_router_logits: bool | None = None,
        **kwargs: Any,
    ) -> SparseVLMCausalLMOutput:
        """Run the model; with `labels`, also the loss.

        Args:
            input_ids: See `SparseVLMModel.forward`, as for all that is not listed here.
            pixel_values: As there.
            image_grid_thw: As there.
            media_kinds: As there.
            media_owners: As there.
            media_places: As there.
            guide_ids: As there.
            guide_mask: As there.
            media_guides: As there.
            visual_features: As there.
            feature_towers: As there.
            attention_mask: As there.
            position_ids: As there.
            past_key_values: As there.
            inputs_embeds: As there.
            labels: ``(B, T)``, -100 where there is no target; shifted here.
            num_items_in_batch: Target tokens of the whole optimizer step; the loss is the sum over targets divided by
                it, or the mean over this batch's targets where it is None.
            aux_loss_scale: Factor on the auxiliary losses besides their coefficients; a trainer that accumulates over
                m micro-batches passes 1 / m, since these losses are means for each.
            logits_to_keep: Project only the last so many positions (0: all), or these positions.
            output_router_logits: Return the routers' logits and choices.
            **kwargs: Passed to the language model.
        """
        groups = router_groups(self)
        need_aux = labels is not None and wants_losses(groups)
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            image_grid_thw=image_grid_thw,
            media_kinds=media_kinds,
            media_owners=media_owners,
            media_places=media_places,
            guide_ids=guide_ids,
            guide_mask=guide_mask,
            media_guides=media_guides,
            visual_features=visual_features,
            feature_towers=feature_towers,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            output_router_logits=bool(output_router_logits) or need_aux,
            groups=groups,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state  # (B, T, H)
        loss, logits = None, None
        if labels is not None and self.training:
            # Visual tokens and prompts have no target: project only the positions that have one.
            loss = self._target_loss(hidden_states, labels, num_items_in_batch)
        else:
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden_states[:, keep])  # (B, kept, V)
            if labels is not None:
                if logits.shape[1] != labels.shape[1]:
                    raise ValueError("labels need all logits: leave logits_to_keep at 0")
                loss = _shifted_cross_entropy(logits, labels, num_items_in_batch)
        aux_loss, z_loss = None, None
        if need_aux:
            assert loss is not None and labels is not None
            loss, aux_loss, z_loss = add_routing_losses(
                loss,
                groups,
                outputs.router_groups,
                outputs.router_logits,
                outputs.router_choices,
                padding_mask(attention_mask, groups, self.training, labels.shape[1]),
                training=self.training,
                scale=aux_loss_scale,
            )
        return SparseVLMCausalLMOutput(
            loss=loss,
            aux_loss=aux_loss,
            z_loss=z_loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
            router_logits=outputs.router_logits,
            router_indices=outputs.router_indices,
            router_groups=outputs.router_groups,
        )

    def _target_loss(self, hidden_states: Tensor, labels: Tensor, num_items: Tensor | int | None) -> Tensor:
        """Cross entropy over target positions only; equal to the loss over all logits."""
        shifted = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)  # (B, T)
        target = shifted != IGNORE_INDEX
        logits = self.lm_head(hidden_states[target]).float()  # (targets, V)
        total = F.cross_entropy(logits, shifted[target].to(logits.device), reduction="sum")
        return total / (target.sum().clamp(min=1) if num_items is None else num_items)

    def prepare_inputs_for_generation(
        self, *args: Any, is_first_iteration: bool | None = False, use_cache: bool = True, **kwargs: Any
    ) -> dict[str, Any]:
        """Give media to the pass over the prompt only; transformers knows of `pixel_values` by itself."""
        options: dict[str, Any] = {"is_first_iteration": is_first_iteration, "use_cache": use_cache}
        inputs = super().prepare_inputs_for_generation(*args, **options, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        if use_cache and not is_first_iteration:
            inputs.pop("visual_features", None)
        return inputs

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[Any, dict[str, Any]]:
        """Repeat rows for beams and several return sequences, and each row's media with them."""
        media = {key: model_kwargs.pop(key) for key in MEDIA_INPUTS if model_kwargs.get(key) is not None}
        input_ids, model_kwargs = super()._expand_inputs_for_generation(  # pyright: ignore[reportAttributeAccessIssue]
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        if media and expand_size > 1:
            media = repeat_media(media, expand_size)
        return input_ids, {**model_kwargs, **media}


def _shifted_cross_entropy(logits: Tensor, labels: Tensor, num_items: Tensor | int | None) -> Tensor:
    """Next-token cross entropy over full logits ``(B, T, V)``."""
    shifted = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX).to(logits.device)
    total = F.cross_entropy(logits.float().flatten(0, 1), shifted.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
    return total / ((shifted != IGNORE_INDEX).sum().clamp(min=1) if num_items is None else num_items)


__all__ = ["SparseVLMForConditionalGeneration", "SparseVLMModel", "SparseVLMPreTrainedModel"]

AutoModel.register(SparseVLMConfig, SparseVLMModel, exist_ok=True)
AutoModelForImageTextToText.register(SparseVLMConfig, SparseVLMForConditionalGeneration, exist_ok=True)
