"""A file imports from lower layers only; from its own layer, only inside its own folder (docs/design.md, "Layers")."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "sparsevlm"

LAYERS: dict[str, int] = {
    "registry": 0,
    "recipe": 0,
    "rundir": 0,
    "vision.tokens": 1,
    "data": 1,
    "surgery": 2,
    "recompute": 2,
    "vision.preprocess": 2,
    "vision.encoder": 2,
    "vision.eva": 2,
    "vision.feature_store": 2,
    "vision.frames": 2,
    "vision.native": 2,
    "vision.packed": 2,
    "vision.patches": 2,
    "vision.qwen": 2,
    "vision.qwen_towers": 2,
    "vision.raw": 2,
    "vision.raw_config": 2,
    "vision.side_by_side": 2,
    "vision.side_by_side_config": 2,
    "vision.sides": 2,
    "vision.views": 2,
    "moe": 2,
    "connectors": 2,
    "fusion": 3,
    "adapters": 3,
    "model": 4,
    "export": 5,
    "eval": 5,
    "chat": 5,
    "features": 5,
    "report": 5,
    "train": 6,  # a stage ends with its evaluations
    "cli_features": 6,
    "cli_hub": 6,  # one command of the command line
    "cli_merge": 6,
    "cli": 7,
    "__main__": 8,
}
"""Folder or file (dotted, below the package) -> layer."""

SHARED = {"vision.tokens", "surgery", "recompute"}
"""The noun, the hook and what a forward pass knows: single files that their own layer may import too."""

OUTSIDE = {"", "autoclasses", "vision"}
"""The package's own `__init__`, what it calls, and a folder that spans layers: they import nothing that has a layer."""


def home(module: str) -> str | None:
    """Return the entry of `LAYERS` that a module (dotted, below the package) belongs to."""
    parts = module.split(".")
    return next((".".join(parts[:n]) for n in (2, 1) if ".".join(parts[:n]) in LAYERS), None)


def imports(path: Path, module: str) -> set[str]:
    """Return the modules of the package that a file imports anywhere, dotted, below the package."""
    found = set()
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            start = ".".join(["sparsevlm", *filter(None, above)]) if node.level else ""
            source = ".".join(filter(None, [start, node.module]))
            # `from sparsevlm.data import media` names a module, `from sparsevlm.data.media import x` something in it
            names = [f"{source}.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {name.removeprefix("sparsevlm.") for name in names if name.startswith("sparsevlm.")}
    return found


def faults(path: Path, module: str) -> list[str]:
    own = home(module)
    if own is None:
        assert module in OUTSIDE, f"{module} is in no layer: enter it in LAYERS and in docs/design.md"
        return [f"{module or 'sparsevlm'} imports {name}" for name in imports(path, module) if home(name)]
    wrong = []
    for name in sorted(imports(path, module)):
        other = home(name)
        if other is None or other == own or (other in SHARED and LAYERS[own] >= LAYERS[other]):
            continue
        same_folder = own.split(".")[0] == other.split(".")[0]
        if LAYERS[other] > LAYERS[own] or (LAYERS[other] == LAYERS[own] and not same_folder and LAYERS[own] > 0):
            wrong.append(f"{module} (layer {LAYERS[own]}) imports {name} (layer {LAYERS[other]})")
    return wrong


FILES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip("."): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


@pytest.mark.parametrize("module", FILES)
def test_imports_go_down(module):
    assert faults(FILES[module], module) == []


@pytest.mark.parametrize(
    ("module", "line", "wrong"),
    [
        ("data.media", "from sparsevlm.model.build import build_model", True),
        ("data.media", "from sparsevlm.vision import encoder", True),
        ("data.media", "from sparsevlm.vision import tokens", False),
        ("data.media", "from sparsevlm.data import sample", False),
        ("data.media", "from ..train import stage", True),
        ("data.media", "from . import sample", False),
        ("data.media", "def f():\n    import sparsevlm.train.stage", True),
        ("recipe.load", "from sparsevlm.registry import suggest", False),
        ("recipe.load", "from sparsevlm.data.sample import Sample", True),
        ("connectors.mlp", "from sparsevlm.moe.block import MoeConfig", True),
        ("moe.block", "from sparsevlm.surgery import decoder_layers", False),
        ("data.media", "from sparsevlm.surgery import decoder_layers", True),
        ("eval.run", "from sparsevlm.train.stage import run_stage", True),
        ("vision.encoder", "from sparsevlm.vision.tokens import Grid", False),
        ("", "from sparsevlm.model.build import build_model", True),
    ],
)
def test_the_walk_sees_what_it_should(tmp_path, module, line, wrong):
    path = tmp_path / "module.py"
    path.write_text(line)
    assert bool(faults(path, module)) is wrong
