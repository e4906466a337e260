"""The `features` command. Nothing heavy is imported before it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer


def features(
    model: Annotated[
        str,
        typer.Argument(metavar="RECIPE_OR_MODEL", help="Recipe, whose first tower is taken; run, model or Hub id."),
    ],
    films: Annotated[list[Path], typer.Argument(metavar="FILM", help="Films.")],
    out: Annotated[Path, typer.Option("--output", "-o", help="Folder: a film gets the file NAME.safetensors in it.")],
    fps: Annotated[float, typer.Option(min=0.001, help="Frames a second that are kept.")] = 1.0,
    block: Annotated[int, typer.Option(min=1, help="Frames that memory holds at once.")] = 32,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, …; default: a GPU where there is one.")] = None,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="Type of the weights; auto: as saved.")
    ] = "auto",
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Compute what the vision tower gives for films, once.

    A row, a question or a chat then names the file in the film's place; no frame is decoded any more. For towers that
    do not train: features of another tower are refused. Films that are there already are left as they are.
    """
    from sparsevlm.features import keep_films, open_tower

    for film in films:
        if not film.is_file():
            raise ValueError(f"{film}: no such file")
    tower = open_tower(model, device, dtype)
    for film, kept in keep_films(tower, films, out, fps, block):
        frames, tokens, width = kept.shape
        there = " (was there)" if kept.was_there else ""
        size = f"{frames:,} frames of {tokens} x {width}, {kept.num_bytes / 1e6:,.1f} MB"
        typer.echo(f"{film} -> {kept.path}: {size}{there}")
