"""The towers of Qwen2-VL and Qwen2.5-VL under the Auto classes, read out of a whole model's file or of their own."""

from __future__ import annotations

from transformers import AutoModel
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel


class Qwen2Tower(Qwen2VisionTransformerPretrainedModel):
    """The tower of a Qwen2-VL checkpoint."""

    base_model_prefix = "visual"  # under which a whole model's file has it


class Qwen25Tower(Qwen2_5_VisionTransformerPretrainedModel):
    """The tower of a Qwen2.5-VL checkpoint."""

    base_model_prefix = "visual"


AutoModel.register(Qwen2VLVisionConfig, Qwen2Tower, exist_ok=True)
AutoModel.register(Qwen2_5_VLVisionConfig, Qwen25Tower, exist_ok=True)
