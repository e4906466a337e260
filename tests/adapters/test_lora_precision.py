"""LoRA on experts in bfloat16: weights in it, arithmetic in it, or both."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sparsevlm.adapters.attach import attach, detach
from sparsevlm.adapters.names import is_adapter_parameter
from sparsevlm.recipe.adapter import Lora
from sparsevlm.recipe.schema import Optim
from sparsevlm.train.parts import parameter_groups, select_trainable
from tests.adapters.specs import stir
from tests.adapters.test_every_type import batch_of, build

TARGETS = ["language.attention", "moe.experts", "moe.router"]


@pytest.mark.parametrize("experts", ["all", [0, 2]], ids=["all", "chosen"])
@pytest.mark.parametrize(
    ("dtype", "autocast"), [(torch.float32, True), (torch.bfloat16, False), (torch.bfloat16, True)]
)
def test_losses_are_finite_gradients_reach_everything_and_merging_rounds(
    tiny_parts: dict[str, str], dtype: torch.dtype, autocast: bool, experts: Any
) -> None:
    model, processor = build(tiny_parts, upcycled=True)
    model.to(dtype)
    batch = batch_of(processor, packed=True)
    attach(model, Lora(type="lora", r=4, targets=TARGETS, experts=experts))
    select_trainable(model, ["adapter", "connector"])
    stir(model, seed=1)
    optimizer = torch.optim.AdamW(parameter_groups(model, Optim(lr=1e-2)))
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model.train()(**batch).loss
        loss.backward()
        losses.append(loss.item())
        for name, parameter in model.named_parameters():
            if is_adapter_parameter(name) or name.startswith("model.connector."):
                assert parameter.grad is not None, name
                assert parameter.grad.any(), name
                assert parameter.grad.isfinite().all(), name
        optimizer.step()
    assert all(loss == loss and abs(loss) < 100 for loss in losses)
    assert losses[-1] < losses[0]

    def logits() -> torch.Tensor:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return model.eval()(**{key: value for key, value in batch.items() if key != "labels"}).logits.float()

    before = logits()
    detach(model, merge=True)
    # a merged weight is rounded once: 8 bits of a logit, over a few layers; routing may tip for a token or two
    close = ((logits() - before).abs() <= 0.05 * before.abs().max()).float().mean()
    assert close > 0.95
