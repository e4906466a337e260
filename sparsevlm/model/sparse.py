"""What a sparse model adds to transformers' base class, with vision or without."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from sparsevlm.adapters.names import is_adapter_parameter
from sparsevlm.adapters.quantise import settings_of
from sparsevlm.fusion import initialize_fusion
from sparsevlm.moe.block import initialize_moe, set_implementation
from sparsevlm.moe.router import KEEP_FLOAT32


class MoePreTrainedModel(PreTrainedModel):
    """A model with a decoder of any class of transformers, in which FFNs may be MoE blocks."""

    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _keep_in_fp32_modules_strict = [KEEP_FLOAT32]

    @property
    def decoder(self) -> Any:
        """The decoder that holds the blocks."""
        return getattr(self, "language_model", None) or self.get_submodule("model.language_model")

    def initialize_weights(self) -> None:
        """Draw what no checkpoint holds; the decoder's own class does not know what we put into it."""
        super().initialize_weights()
        initialize_moe(self)
        initialize_fusion(self)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Save the whole model, as any model of transformers.

        Raises:
            ValueError: An adapter is attached, or weights are quantised.
        """
        self._refuse_adapter("save_pretrained")
        super().save_pretrained(*args, **kwargs)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """Upload the whole model, as any model of transformers.

        Raises:
            ValueError: An adapter is attached, or weights are quantised.
        """
        self._refuse_adapter("push_to_hub")
        return super().push_to_hub(*args, **kwargs)

    def _refuse_adapter(self, method: str) -> None:
        """Refuse to write weights under the names that an adapter's layers give them: nothing could load those."""
        if settings_of(self) is not None:
            raise ValueError(
                f"{method}() writes a whole model, and the weights of this one are quantised for an adapter. To save "
                "the adapter: sparsevlm.adapters.attach.save_adapter(model, directory, parent). For a whole model: "
                "'sparsevlm merge' on the adapter's directory"
            )
        if any(is_adapter_parameter(name) for name, _ in self.named_parameters()):
            raise ValueError(
                f"{method}() writes a whole model, and this one has an adapter attached. To save the adapter alone: "
                "sparsevlm.adapters.attach.save_adapter(model, directory, parent). To save the model with the adapter "
                "in its weights: sparsevlm.adapters.attach.detach(model, merge=True) first, or 'sparsevlm merge' on "
                "the adapter's directory; 'sparsevlm push' uploads either"
            )

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        """MoE blocks read their kernel's name from the decoder's config, whatever the decoder's class."""
        return True

    def set_experts_implementation(self, experts_implementation: str | dict[str, str]) -> None:
        """Choose the experts' kernel: `auto`, `grouped_mm`, `eager`, …, or one registered with transformers."""
        name = experts_implementation
        if isinstance(name, dict):
            name = name.get("text_config", name.get("", "eager"))
        set_implementation(self.decoder, self.config.text_config, name)
