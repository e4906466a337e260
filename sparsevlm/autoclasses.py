"""Registration with the Auto classes of transformers and the tables of PEFT, at no cost to an import that uses neither.

`import sparsevlm` must stay fast (the command line starts with it), but after it `AutoProcessor`, `AutoModel…` and
`pipeline` must know our classes. So the modules that register themselves are imported right after transformers' own
Auto modules are, whenever that happens; and our adapter methods right after PEFT is.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

_REGISTERED_BY = {
    "transformers.models.auto.configuration_auto": (
        "sparsevlm.model.configuration_sparsevlm",
        "sparsevlm.model.configuration_text",
        "sparsevlm.vision.raw_config",
        "sparsevlm.vision.side_by_side_config",
    ),
    "transformers.models.auto.modeling_auto": (
        "sparsevlm.model.modeling_sparsevlm",
        "sparsevlm.model.modeling_text",
        "sparsevlm.vision.raw",
        "sparsevlm.vision.side_by_side",
    ),
    # Not with the Auto modules, which may be imported by one of these, half-way.
    "transformers.models.blip_2.configuration_blip_2": ("sparsevlm.vision.eva",),
    "transformers.models.blip_2.modeling_blip_2": ("sparsevlm.vision.eva",),
    "transformers.models.instructblip.configuration_instructblip": ("sparsevlm.vision.eva",),
    "transformers.models.instructblip.modeling_instructblip": ("sparsevlm.vision.eva",),
    "transformers.models.qwen2_vl.configuration_qwen2_vl": ("sparsevlm.vision.qwen_towers",),
    "transformers.models.qwen2_vl.modeling_qwen2_vl": ("sparsevlm.vision.qwen_towers",),
    "transformers.models.qwen2_5_vl.configuration_qwen2_5_vl": ("sparsevlm.vision.qwen_towers",),
    "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl": ("sparsevlm.vision.qwen_towers",),
    "transformers.models.auto.processing_auto": ("sparsevlm.model.processing_sparsevlm",),
    "peft": ("sparsevlm.adapters.methods",),
}
"""Module of another package -> our modules, each of which registers its class at its own end."""


class _ThenImport(importlib.abc.Loader):
    """Loads a module with its own loader, then imports ours."""

    def __init__(self, loader: importlib.abc.Loader, then: Sequence[str]) -> None:
        self._loader = loader
        self._then = then

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        # Already being imported: it is what pulled the Auto module in, and registers itself when it is done.
        modeling = module.__name__.replace(".configuration_", ".modeling_")
        for ours in self._then:
            # Or its classes are still being imported, and did so with their configuration: theirs is the next entry.
            unfinished = modeling != module.__name__ and modeling in sys.modules
            if ours not in sys.modules and not (unfinished and ours in _REGISTERED_BY.get(modeling, ())):
                importlib.import_module(ours)

    def __getattr__(self, name: str) -> object:
        return getattr(self._loader, name)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the Auto modules and wraps their loaders."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in _REGISTERED_BY:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenImport(spec.loader, _REGISTERED_BY[fullname])
        return spec


def install() -> None:
    """Register now what is already imported, and the rest when it will be."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    for auto, ours in _REGISTERED_BY.items():
        if auto in sys.modules:
            for module in ours:
                importlib.import_module(module)
