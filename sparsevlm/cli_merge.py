"""The `merge` command. Nothing heavy is imported before it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer


def merge(
    adapters: Annotated[
        list[str], typer.Argument(metavar="ADAPTER", help="LoRA adapters of one base: directories or Hub ids.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Directory to write; must not exist.")],
    base: Annotated[
        str | None, typer.Option(help="Model that they were trained on, directory or Hub id; default: as they say.")
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            help="How several are combined, in PEFT's words: cat (adds their changes), linear, ties, dare_linear, "
            "dare_ties, magnitude_prune, svd, and these with _svd."
        ),
    ] = "cat",
    weights: Annotated[str | None, typer.Option(help="One an adapter, 0.6,0.4; default: equal, sum 1.")] = None,
    density: Annotated[float | None, typer.Option(help="Share of values that ties, dare and pruning keep.")] = None,
    svd_rank: Annotated[
        str | None, typer.Option(help="Rank that methods with svd leave, or full; default: the largest of theirs.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of what dare drops.")] = 0,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="Type of the weights; auto: the base's.")
    ] = "auto",
    max_shard_size: Annotated[str, typer.Option(help="Largest weight file.")] = "5GB",
    untie: Annotated[
        bool, typer.Option("--untie", help="Write two tensors where the adapter changes one of two tied embeddings.")
    ] = False,
    replay_quantisation: Annotated[
        bool,
        typer.Option("--replay-quantisation", help="Merge into the weights as training on quantised ones saw them."),
    ] = False,
    check: Annotated[bool, typer.Option("--check/--no-check", help="Compare logits; loads both models whole.")] = True,
    unmerge: Annotated[
        bool,
        typer.Option("--unmerge", help="Take the change off what was written and compare with the base, by weight."),
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Merge one LoRA adapter, or several, into their base: a whole model that needs no PEFT.

    Reads and writes weight by weight. Takes LoRA, rsLoRA and DoRA of language models and vision-language models of
    transformers, and of SparseVLM's own, on stacked experts too.
    """
    from rich.console import Console

    from sparsevlm.export.merge import merge_adapter
    from sparsevlm.export.merge_combine import make_recipe, parse_weights
    from sparsevlm.export.merge_report import print_report

    shares = None if weights is None else parse_weights(weights)
    recipe = make_recipe(len(adapters), method, shares, density, svd_rank, seed)
    report = merge_adapter(
        adapters,
        out,
        base=base,
        recipe=recipe if len(adapters) > 1 or weights is not None else None,
        dtype=dtype,
        max_shard_size=max_shard_size,
        untie=untie,
        replay_quantisation=replay_quantisation,
        check=check,
        unmerge=unmerge,
    )
    print_report(report, out, Console())
