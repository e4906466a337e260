"""LoRA sets that are chosen per token as a tuner of PEFT: where they go, and who says which token passes which set.

The model says it at the start of its forward pass, from its inputs: in the language model from the placeholders among
`input_ids` (`context.token_sets`), in the tower from where each frame is in its picture (`vision.frames`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sparsevlm.adapters.passes import add_hooks, find_parts, models_to, named_inputs, remove_hooks
from sparsevlm.adapters.token_lora.config import Part
from sparsevlm.adapters.token_lora.context import frame_sets, running, set_running, token_sets
from sparsevlm.adapters.token_lora.layer import MERGE_REFUSED, TokenLoraLayer
from sparsevlm.adapters.tuner import UnmergeableTuner
from sparsevlm.recompute import carry_to_recomputation
from sparsevlm.vision.frames import encoded_positions


class TokenLoraModel(UnmergeableTuner):
    """Puts `TokenLoraLayer` around linear layers; made by `peft.get_peft_model(model, TokenLoraConfig(...))`."""

    prefix = "loras_"
    tuner_layer_cls = TokenLoraLayer  # pyright: ignore[reportAssignmentType]
    merge_refused = MERGE_REFUSED

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        parts = _parts(model)
        paths = parts[peft_config.part]
        if not paths and any(parts.values()):
            raise ValueError(
                f"token_lora: choose={peft_config.choose!r} is about the {peft_config.part} part, and "
                f"{type(model).__name__} has none"
            )
        # A plain module without parts of transformers: the names alone decide.
        self._within = tuple(f"{path}." if path else "" for path in paths) or ("",)

    def _check_target_module_exists(self, peft_config: Any, key: str) -> Any:  # type: ignore[override]
        return key.startswith(self._within) and super()._check_target_module_exists(peft_config, key)

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
        if isinstance(target, TokenLoraLayer):
            target.update_layer(adapter_name, peft_config)
            layer, base = target, target.get_base_layer()
        else:
            layer, base = TokenLoraLayer(target, adapter_name, peft_config, path=current_key), target
            setattr(parent, target_name, layer)
        device = next(base.parameters()).device
        for added in (layer.loras_A[adapter_name], layer.loras_B[adapter_name]):
            if not any(p.is_meta for p in added.parameters()):
                added.to(device)

    def inject_adapter(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """Put the adapter in and have the model announce its tokens or frames."""
        super().inject_adapter(model, *args, **kwargs)
        parts = _parts(model)
        for path in parts["language"]:
            for module, rest in models_to(model, path):
                add_hooks(module, _TokensStart(rest), _tokens_end)
        for tower in parts["vision"].values():
            add_hooks(tower, _FramesStart(), _frames_end)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        model: Any = super()._unload_and_optionally_merge(*args, **kwargs)
        kinds = (_TokensStart, _FramesStart)
        remove_hooks(model, lambda hook: isinstance(hook, kinds) or hook in (_tokens_end, _frames_end))
        return model


def _parts(model: nn.Module) -> dict[Part, dict[str, Any]]:
    language, vision = find_parts(model)
    return {"language": language, "vision": vision}


class _TokensStart:
    """Runs before a model's forward pass and says which tokens of its decoder are visual.

    Args:
        decoder: Path of the decoder from there.
    """

    def __init__(self, decoder: str) -> None:
        self.decoder = decoder

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        decoder = module.get_submodule(self.decoder)
        if not _adapted(decoder):
            return
        if decoder is module:
            _carry(decoder, "which tokens are visual")
        if running("language") is None:  # else a model around this one has said it, or `use_sets`
            set_running("language", token_sets(module, named_inputs(module, args, kwargs)))


class _FramesStart:
    """Runs before a tower's forward pass and says where its frames are in their pictures."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not _adapted(module):
            return
        _carry(module, "which slices its frames are")
        if running("vision") is None:
            frames = named_inputs(module, args, kwargs)["pixel_values"].shape[0]
            set_running("vision", frame_sets(module, encoded_positions(), frames))


def _tokens_end(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    _end("language", module)


def _frames_end(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    _end("vision", module)


def _end(part: Part, module: nn.Module) -> None:
    """End the forward pass that this module started."""
    sets = running(part)
    if sets is not None and sets.owner is module:
        set_running(part, None)


def _adapted(part: nn.Module) -> bool:
    """Tell whether an adapter runs in a part."""
    return any(isinstance(layer, TokenLoraLayer) and layer.running() for layer in part.modules())


def _carry(part: nn.Module, what: str) -> None:
    if part.training and torch.is_grad_enabled():
        carry_to_recomputation(part, what, "adapt another part")
