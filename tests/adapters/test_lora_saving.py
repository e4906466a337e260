"""A model with an adapter attached is not saved as if it were a whole one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from sparsevlm.adapters.attach import attach, detach, save_adapter
from sparsevlm.model.modeling_sparsevlm import SparseVLMForConditionalGeneration
from sparsevlm.recipe.adapter import Lora


@pytest.mark.parametrize("merge", [True, False])
def test_a_whole_model_is_saved_without_its_adapter_or_with_it_merged(
    tiny_model: Any, tmp_path: Path, merge: bool
) -> None:
    model, _ = tiny_model
    attach(model, Lora(type="lora", r=4))
    for call in (lambda: model.save_pretrained(tmp_path / "out"), lambda: model.push_to_hub("someone/model")):
        with pytest.raises(ValueError, match=r"save_adapter\(model, directory, parent\).*sparsevlm merge"):
            call()
    assert not (tmp_path / "out").exists()
    detach(model, merge=merge)
    model.save_pretrained(tmp_path / "out")
    again = SparseVLMForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_what_peft_merged_or_took_off_is_saved_again(tiny_model: Any, tmp_path: Path) -> None:
    model, _ = tiny_model
    model.save_pretrained(tmp_path / "parent")
    attach(model, Lora(type="lora", r=4))
    save_adapter(model, tmp_path / "adapter", tmp_path / "parent")
    base: Any = SparseVLMForConditionalGeneration.from_pretrained(tmp_path / "parent")
    wrapped = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    wrapped.save_pretrained(str(tmp_path / "again"))  # PEFT's own way saves the adapter
    assert (tmp_path / "again" / "adapter_model.safetensors").is_file()
    with pytest.raises(ValueError, match="save_adapter"):
        base.save_pretrained(tmp_path / "out")
    merged: Any = wrapped.merge_and_unload()
    merged.save_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").is_file()
