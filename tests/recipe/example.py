"""A good recipe to spoil, and the faults of a bad one."""

from pathlib import Path

import pytest

from sparsevlm.recipe.load import RecipeError, load_recipe

GOOD = """\
name: tiny
model:
  vision: {path: tower}
  language: {path: talker}
  connector:
    - type: linear
    - type: mlp
      depth: 2
data:
  words: {path: words.json, format: llava}
  clips: {path: clips.json, format: llava}
stages:
  align:
    trains: [connector]
    data: [words]
    steps: 10
    optim: {lr: 1e-3}
  moe:
    trains: [moe, connector]
    data: [words, clips]
    steps: 20
    upcycle: {experts: 4}
"""


def faults(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    return str(caught.value).splitlines()
