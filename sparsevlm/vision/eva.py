"""EVA-CLIP-g as transformers has it: the vision model inside BLIP-2 and InstructBLIP, under the Auto classes.

LLaMA-VID, MiniGPT-4, BLIP-2, InstructBLIP and InternLM-XComposer see through this tower (39 blocks, 1408 wide). Its
weights are read out of a whole BLIP-2 model, ``Salesforce/blip2-opt-2.7b`` for one.
"""

from __future__ import annotations

from transformers import AutoModel, Blip2VisionConfig, InstructBlipVisionConfig
from transformers.models.blip_2.modeling_blip_2 import Blip2VisionModel
from transformers.models.instructblip.modeling_instructblip import InstructBlipVisionModel


class Blip2Tower(Blip2VisionModel):
    """The tower of a BLIP-2 checkpoint, or one saved by itself."""

    base_model_prefix = "vision_model"  # under which a whole model's file has it


class InstructBlipTower(InstructBlipVisionModel):
    """The same of an InstructBLIP checkpoint."""

    base_model_prefix = "vision_model"


AutoModel.register(Blip2VisionConfig, Blip2Tower, exist_ok=True)
AutoModel.register(InstructBlipVisionConfig, InstructBlipTower, exist_ok=True)
