"""The mixture-of-modality adapter as a tuner of PEFT: where it goes, and what its routers read.

In LaVIN every router reads the state of one more token, put before the text, whose embedding says whether the sample
has a picture. That token attends to itself alone and nobody attends to it, so its state in a layer depends on the
modality and the layers below, and on nothing of the sample. So it needs no place in the sample: once a forward pass, M
rows of one token, the modality embeddings, run through the decoder, each layer's router reads them there, and the
samples take the weights of their modality. One-sample batches come out as in LaVIN; packed and mixed rows, which LaVIN
cannot run, as if each sample ran alone; and cached generation runs them once, with the prompt.

*Deviations* from LaVIN's code:

- No position is taken: with rotary embeddings that changes nothing (they are relative), with learned positions text
  sits one position earlier than LaVIN would put it.
- Dropout on the modality's way through the adapters is drawn once a forward pass, not once a sample.
- In the vision tower each image is routed by its own first token. LaVIN's code, by a slip of layouts, takes the first
  image of the batch, and other weights at each position.

Legend: M modalities, d width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sparsevlm.adapters.mma.context import (
    ModalityRouting,
    carry_weights,
    collecting,
    running,
    set_running,
)
from sparsevlm.adapters.mma.inputs import sample_modality
from sparsevlm.adapters.mma.layer import MERGE_REFUSED, MmaLayer
from sparsevlm.adapters.mma.places import Place, find_places
from sparsevlm.adapters.passes import add_hooks, find_parts, models_to, named_inputs, remove_hooks
from sparsevlm.adapters.tuner import UnmergeableTuner


class MmaModel(UnmergeableTuner):
    """Puts `MmaLayer` around attentions; made by `peft.get_peft_model(model, MmaConfig(...))`."""

    prefix = "mma_"
    tuner_layer_cls = MmaLayer  # pyright: ignore[reportAssignmentType]
    merge_refused = MERGE_REFUSED

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        return peft_config

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        self._places = find_places(model, peft_config)
        peft_config.target_modules = list(self._places)

    def _check_target_module_exists(self, peft_config: Any, key: str) -> bool:  # type: ignore[override]
        # PEFT matches by the end of a name; these are whole names, of which another may be the end.
        return key in self._places

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        place: Place | None = self._places.get(current_key)
        if place is None:
            raise ValueError(
                f"mma: the adapter's weights have {current_key}, which layers={peft_config.layers!r} and "
                f"vision_layers={peft_config.vision_layers!r} do not name in this model; load it onto its own base"
            )
        settings: dict[str, Any] = {"source": place.source, "holds_modality": place.holds_modality}
        if isinstance(target, MmaLayer):
            target.update_layer(adapter_name, peft_config, **settings)
            reference = next(target.base_layer.parameters())
            if not any(p.is_meta for p in target.mma_down[adapter_name].parameters()):
                target.to(reference.device)
            return
        layer = MmaLayer(target, adapter_name, peft_config, dim=place.dim, path=current_key, **settings)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        setattr(parent, child_name, new_module)
        if isinstance(new_module, MmaLayer) and not any(p.is_meta for p in new_module.parameters()):
            new_module.to(next(child.parameters()).device)

    def inject_adapter(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """Put the adapter in and have the model announce its samples' modality."""
        super().inject_adapter(model, *args, **kwargs)
        language, _ = find_parts(model)
        for path in language:
            for module, rest in models_to(model, path):
                add_hooks(module, _Start(rest, text_only=not find_parts(module)[1]), _end)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        model: Any = super()._unload_and_optionally_merge(*args, **kwargs)
        remove_hooks(model, lambda hook: isinstance(hook, _Start) or hook is _end)
        return model


class _Start:
    """Runs before a model's forward pass and prepares its routing.

    Args:
        decoder: Path of the language model from there.
        text_only: There is no vision tower.
    """

    def __init__(self, decoder: str, text_only: bool) -> None:
        self.decoder = decoder
        self.text_only = text_only

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if running() is not None:  # a model around this one has done it
            return
        decoder: Any = module.get_submodule(self.decoder)
        found = _modality_layers(decoder)
        if found is None:
            return
        holder, name = found
        inputs = named_inputs(module, args, kwargs)
        cache = inputs.get("past_key_values")
        known: _Remembered | None = getattr(cache, "mma_modality", None)
        cached = cache is not None and cache.get_seq_length() > 0
        if cached and known is None:
            raise ValueError(
                "mma: the cache was filled without this adapter, or copied in part, so the modality of its samples is "
                "unknown; encode the prompt again with the adapter enabled"
            )
        ids = known.continue_with(module, inputs, self.text_only) if cached and known is not None else None
        if ids is None:
            ids = sample_modality(module, inputs, holder.mma_settings[name][0].modalities, self.text_only)
        if decoder.training and torch.is_grad_enabled():
            carry_weights(decoder)
        usable = cached and known is not None and known.name == name and not torch.is_grad_enabled()
        weights = known.weights if usable and known is not None else _run_modalities(decoder, holder, name)
        set_running(ModalityRouting(ids, weights, owner=module))
        if cache is not None and not cached:
            cache.mma_modality = _Remembered(name, holder.mma_settings[name][0].modalities, ids[:, -1], weights)


class _Remembered:
    """What a cache keeps of its samples, so that cached steps know them: ``rows`` (B,) and the layers' weights."""

    def __init__(self, name: str, modalities: int, rows: Tensor, weights: dict[str, Tensor]) -> None:
        self.name, self.modalities, self.rows = name, modalities, rows
        self.weights = {layer: each.detach() for layer, each in weights.items()}

    def continue_with(self, module: nn.Module, inputs: dict[str, Any], text_only: bool) -> Tensor:
        """Return the modality of the next tokens, ``(B, T)``.

        Raises:
            ValueError: Other rows, or tokens that would make a text sample an image sample.
        """
        input_ids = inputs.get("input_ids")
        tokens = input_ids if input_ids is not None else inputs["inputs_embeds"]
        if tokens.shape[0] != self.rows.shape[0]:
            raise ValueError(
                f"mma: the cache holds {self.rows.shape[0]} rows, the input {tokens.shape[0]}; encode the prompts again"
            )
        ids = self.rows[:, None].to(tokens.device).expand(tokens.shape[:2])
        if input_ids is not None and tokens.shape[1] > 1:
            new = sample_modality(module, {"input_ids": input_ids}, self.modalities, text_only)
            if bool((new > ids).any()):
                raise ValueError(
                    "mma: a picture or video comes after tokens that were cached as a sample without one, and a "
                    "sample's modality is one; encode the conversation from its start"
                )
        return ids


def _end(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """End the forward pass that this module started; a cache made inside remembers it."""
    routing = running()
    if routing is None or routing.owner is not module:
        return
    set_running(None)
    cache = getattr(output, "past_key_values", None)
    if cache is not None and not hasattr(cache, "mma_modality"):
        found = _modality_layers(module)
        assert found is not None and routing.ids is not None
        holder, name = found
        modalities = holder.mma_settings[name][0].modalities
        cache.mma_modality = _Remembered(name, modalities, routing.ids[:, -1], routing.weights)


def _modality_layers(module: nn.Module) -> tuple[MmaLayer, str] | None:
    """Return the layer that holds the active adapter's modality embedding, and its name; None where none is active."""
    active: dict[str, MmaLayer | None] = {}
    for layer in module.modules():
        if not isinstance(layer, MmaLayer):
            continue
        name = layer.active()
        if name is None or layer.mma_settings[name][1] != "modality":
            continue
        active.setdefault(name, None)
        if name in layer.mma_modality:
            active[name] = layer
    if not active:
        return None
    if len(active) > 1:
        raise ValueError(f"mma: the adapters {', '.join(active)} are all active; choose one with set_adapter")
    name, holder = active.popitem()
    assert holder is not None, f"no layer holds the modality embedding of {name}"
    return holder, name


def _run_modalities(decoder: Any, holder: MmaLayer, name: str) -> dict[str, Tensor]:
    """Return each layer's mixing weights for each modality: layer -> ``(M, P)``."""
    embedding: Any = holder.mma_modality[name]
    # Through the module, not its weight: a sharded weight is there only while the module runs.
    states = embedding(torch.arange(embedding.num_embeddings, device=embedding.weight.device))  # (M, d)
    dtype = decoder.get_input_embeddings().weight.dtype
    with collecting() as weights:
        decoder(inputs_embeds=states[:, None].to(dtype), use_cache=False)
    return dict(weights)
