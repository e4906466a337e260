"""How visual tokens reach the language model.

Without a `fusion` they are soft tokens in the text, in the places of their placeholders. The others are a closed set:
gated cross-attention (`cross_attention`), where text looks at media that stay beside it, and the visual expert
(`visual_expert`), where visual tokens in the text pass weights of their own.
"""

from sparsevlm.fusion.forward import fusing
from sparsevlm.fusion.install import (
    check_fusion,
    fusion_spec,
    initialize_fusion,
    install_fusion,
    media_apart,
)

__all__ = ["check_fusion", "fusing", "fusion_spec", "initialize_fusion", "install_fusion", "media_apart"]
