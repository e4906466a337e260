"""The `push` command. Nothing heavy is imported before it runs."""

from __future__ import annotations

from typing import Annotated

import typer


def push(
    model: Annotated[
        str, typer.Argument(metavar="RUN_OR_MODEL", help="Run (its last complete stage), model or adapter.")
    ],
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Repository on the Hub; made where there is none.")],
    private: Annotated[bool, typer.Option("--private", help="Make the repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch; made where there is none (main).")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show files, sizes and the card; send nothing.")] = False,
    message: Annotated[str | None, typer.Option("--message", "-m", help="Of the commit.")] = None,
    license: Annotated[str | None, typer.Option(help="Of the model, for its card: apache-2.0, mit, …")] = None,
    adapter_only: Annotated[
        bool, typer.Option("--adapter-only", help="Leave out the model that an adapter belongs to.")
    ] = False,
    base: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME[@REVISION]", help="With --adapter-only: where that model is.")
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Upload a model or an adapter with its card and records to the Hugging Face Hub.

    Sends weights, processor, recipe, metrics and report, never checkpoints or data; started again, it sends what is
    missing. An adapter takes its base along, in the folder `base`. Paths of this machine are cut out; a file that
    holds a token or key stops it.
    """
    from rich.console import Console

    from sparsevlm.export import hub

    ready = hub.prepare(model, repo, revision=revision, license=license, adapter_only=adapter_only, base=base)
    hub.print_prepared(ready, Console(), card=dry_run)
    if dry_run:
        return
    pushed = hub.send(ready, private=private, message=message, tell=lambda line: typer.echo(line, err=True))
    hub.print_pushed(pushed, Console())
