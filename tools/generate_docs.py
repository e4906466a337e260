"""Writes docs/recipes.md and recipes/schema.json from the recipe's types: python tools/generate_docs.py [--check]"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from sparsevlm.recipe.reference import recipe_json_schema, recipe_reference

ROOT = Path(__file__).resolve().parent.parent


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write docs/recipes.md and recipes/schema.json.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 when a file is out of date")
    parser.add_argument("--root", type=Path, default=ROOT, help="folder that holds docs/ and recipes/")
    options = parser.parse_args(arguments)
    files = {
        "docs/recipes.md": recipe_reference(),
        "recipes/schema.json": json.dumps(recipe_json_schema(), indent=2, ensure_ascii=False) + "\n",
    }
    stale = 0
    for name, text in files.items():
        path = options.root / name
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            continue
        stale += 1
        if options.check:
            print(f"{name} is out of date: run python tools/generate_docs.py", file=sys.stderr)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            print(f"wrote {name}")
    return 1 if options.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
