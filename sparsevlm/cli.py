"""The command line: parses arguments, then calls the library. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import functools
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from sparsevlm import __version__, cli_features, cli_hub, cli_merge

app = typer.Typer(
    name="sparsevlm",
    help="Build, sparsify and cheaply tune vision-language models from one recipe.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

EXIT_FAULT, EXIT_USER, EXIT_INTERRUPTED = 1, 2, 130

Recipe = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Options of the recipe to replace: stages.moe.optim.lr=1e-5"),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, …; default: a GPU where there is one.")]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="Type of the weights; auto: as saved.")
]


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """Turn errors of a command into a message and an exit code.

    2: a `ValueError`, which is what a user can cause. 1: anything else; an `OSError` (disk, network) is told in one
    line, the rest with its traceback, since it is a fault of the program. 130: interrupted.
    """

    @functools.wraps(command)
    def run(*args: Any, debug: bool = False, **kwargs: Any) -> None:
        _quiet_libraries()
        try:
            command(*args, **kwargs)
        except KeyboardInterrupt:
            typer.echo(f"interrupted{_how_to_continue(command.__name__)}", err=True)
            raise typer.Exit(EXIT_INTERRUPTED) from None
        except (ValueError, OSError) as error:
            if debug:
                import traceback

                traceback.print_exc()
            # The faults of a recipe are lines `file:line:column: …` each, which editors and terminals turn into links.
            typer.echo(str(error) if hasattr(error, "faults") else f"error: {error}", err=True)
            raise typer.Exit(EXIT_USER if isinstance(error, ValueError) else EXIT_FAULT) from None

    return run


_REMARKS = {
    "DeepSpeed": "Setting accelerator to CPU",  # on standard output, where JSON and replies go
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",  # an optional kernel, at every import
}
"""Remarks of libraries about nothing that a user can or need change, by logger."""


def _quiet_libraries() -> None:
    """Keep libraries to warnings; whoever set these variables gets what they asked for."""
    quiet = {
        "TRANSFORMERS_VERBOSITY": "warning",
        "DATASETS_VERBOSITY": "warning",
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "TOKENIZERS_PARALLELISM": "false",  # workers are forked after the tokenizer ran
    }
    if not sys.stderr.isatty():
        quiet["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # transformers' bars obey it too; in a file they are litter
    for name, value in quiet.items():
        os.environ.setdefault(name, value)
    # A logger keeps a filter that was set before its library is imported.
    for name, remark in _REMARKS.items():
        logging.getLogger(name).addFilter(lambda record, remark=remark: remark not in str(record.msg))


def _how_to_continue(command: str) -> str:
    return "; run the same command again to continue from the last complete checkpoint" if command == "train" else ""


@app.command()
@guarded
def plan(
    recipe: Recipe,
    overrides: Overrides = None,
    media: Annotated[
        str | None,
        typer.Option(help="Count visual tokens of these: 640x480, 64f@1280x720 (frames), 8v@640x480 (views)."),
    ] = None,
    ranks: Annotated[int, typer.Option(min=1, help="Processes that the stages run on.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    debug: Debug = False,
) -> None:
    """Check a recipe and show what its stages cost.

    Prints for each stage what trains at which rate, parameters, visual tokens, memory and arithmetic. Reads no weights
    and needs no GPU.
    """
    from sparsevlm.recipe.load import load_recipe
    from sparsevlm.train.plan import plan as make_plan
    from sparsevlm.train.plan import print_plan

    document = make_plan(load_recipe(recipe, overrides or []), media.split(",") if media else [], world=ranks)
    if as_json:
        import json

        typer.echo(json.dumps(document, indent=2))
    else:
        print_plan(document)


@app.command()
@guarded
def train(
    recipe: Recipe,
    overrides: Overrides = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="Processes on this machine, one a GPU.")] = None,
    nproc: Annotated[int | None, typer.Option(min=1, help="Processes on this machine, on CPU.")] = None,
    nnodes: Annotated[int, typer.Option(min=1, help="Machines.")] = 1,
    node_rank: Annotated[int, typer.Option(min=0, help="Which of the machines this is.")] = 0,
    rdzv: Annotated[str | None, typer.Option(help="HOST:PORT of machine 0, where the machines meet.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Run directory instead of the recipe's.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Run a recipe's stages in order.

    Started again, it skips what is complete and continues what was interrupted.
    """
    from sparsevlm.train import launch

    where = {"gpus": gpus, "nproc": nproc, "nnodes": nnodes, "node_rank": node_rank, "rdzv": rdzv}
    try:
        launch.train(recipe, overrides or [], **where, output=output)
    except launch.LaunchError as error:  # the failing process has told why
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(EXIT_FAULT) from None


@app.command("eval")
@guarded
def evaluate(
    model: Annotated[
        str, typer.Argument(metavar="RUN_OR_MODEL", help="Run (its last complete stage), model or Hub id.")
    ],
    files: Annotated[list[str] | None, typer.Argument(metavar="FILE", help="Question files of the task.")] = None,
    task: Annotated[
        str | None, typer.Option(help="scenes, vqa, multiple_choice, …; default: the evaluations of the run's recipe.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the result to this JSON file.")] = None,
    predictions: Annotated[Path | None, typer.Option(help="Write every reply to NAME.jsonl in this folder.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="First so many questions only.")] = None,
    blind: Annotated[bool, typer.Option("--blind", help="Ask without the pictures: the text-only baseline.")] = False,
    option: Annotated[
        list[str] | None, typer.Option("--option", metavar="KEY=VALUE", help="Option of the task; may be repeated.")
    ] = None,
    media_root: Annotated[str | None, typer.Option(help="Folder of the media; default: that of the file.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Questions generated together.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer.")] = None,
    routing: Annotated[
        bool, typer.Option("--routing", help="Look at which experts the tokens go to instead; -o takes a folder too.")
    ] = False,
    device: Device = None,
    dtype: Dtype = "auto",
    debug: Debug = False,
) -> None:
    """Ask a model questions and score its answers.

    Accuracy stands beside the chance level, which is that of always giving the commonest answer. With --routing, a
    sparse model reads the questions and their answers, and what its routers do is shown by layer and modality.
    """
    from rich.console import Console

    from sparsevlm.eval import report

    common = {"limit": limit, "media_root": media_root, "batch_size": batch_size, "max_new_tokens": max_new_tokens}
    options = _options(option or []) | ({"blind": True} if blind else {})
    specs = report.evaluations(model, task, files or [], common, options)
    if routing:
        from sparsevlm.eval import survey

        if predictions is not None or max_new_tokens is not None:
            raise ValueError("--routing generates no answers: leave out --predictions and --max-new-tokens")
        document, pictures = survey.survey_saved(model, specs, device=device, dtype=dtype)
        survey.print_survey(document, Console())
        if output is not None:
            typer.echo(f"wrote {survey.write_survey(document, pictures, output)}")
        return
    results = report.evaluate_saved(model, specs, device=device, dtype=dtype, predictions=predictions)
    for name, result in results.items():
        report.print_result(name, result, Console())
    if output is not None:
        report.write_document(report.as_document(model, results), output)
        typer.echo(f"wrote {output}")


@app.command()
@guarded
def chat(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Run (its last complete stage), model or Hub id.")],
    image: Annotated[list[str] | None, typer.Option(help="Picture to talk about; may be repeated.")] = None,
    video: Annotated[list[str] | None, typer.Option(help="Video to talk about; may be repeated.")] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="Ask this and leave; repeated: the turns of one conversation.")
    ] = None,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample from this much of the probability.")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(help="Longest reply.")] = 512,
    seed: Annotated[int, typer.Option(help="Seed of sampling.")] = 0,
    device: Device = None,
    dtype: Dtype = "auto",
    debug: Debug = False,
) -> None:
    """Talk to a model about pictures and videos."""
    from sparsevlm import chat as talk

    options = talk.ChatOptions(max_new_tokens, temperature, top_p, seed)
    session = talk.open_chat(model, options, images=image or [], videos=video or [], device=device, dtype=dtype)
    if prompt:
        talk.one_shot(session, prompt)
    else:
        talk.converse(session)


@app.command()
@guarded
def upcycle(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Dense model: directory, run or Hub id.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Directory to write; must not exist.")],
    layers: Annotated[
        str | None, typer.Option(help="alternate (default), all, first_half, second_half, or 0,2,8-11.")
    ] = None,
    experts: Annotated[int | None, typer.Option(help="Experts a layer (4).")] = None,
    top_k: Annotated[int | None, typer.Option(help="Experts a token is sent to (2).")] = None,
    granularity: Annotated[int | None, typer.Option(help="Cut each expert into so many narrower ones (1).")] = None,
    shared_expert: Annotated[str | None, typer.Option(help="none (default), residual or gated.")] = None,
    noise_std: Annotated[float | None, typer.Option(help="Noise on each expert, in deviations of its weights.")] = None,
    drop_ratio: Annotated[float | None, typer.Option(help="Share of each expert's units that starts afresh.")] = None,
    expert_from: Annotated[
        list[str] | None, typer.Option(metavar="MODEL", help="Model that becomes an expert; once an expert.")
    ] = None,
    scoring: Annotated[str | None, typer.Option(help="softmax (default), topk_softmax or sigmoid.")] = None,
    norm_topk_prob: Annotated[bool | None, typer.Option(help="Divide the k weights by their sum (yes).")] = None,
    router_init: Annotated[str | None, typer.Option(help="normal (default), zero or kmeans (needs --sample).")] = None,
    router_init_std: Annotated[float | None, typer.Option(help="Size of the router's first weights (0.02).")] = None,
    jitter: Annotated[float | None, typer.Option(help="Router jitter while training.")] = None,
    bias_update_rate: Annotated[float | None, typer.Option(help="Step of the balance bias (sigmoid only).")] = None,
    capacity_factor: Annotated[float | None, typer.Option(help="Capacity while training; default: dropless.")] = None,
    eval_capacity_factor: Annotated[float | None, typer.Option(help="The same outside training.")] = None,
    min_capacity: Annotated[int | None, typer.Option(help="Tokens that an expert takes at least (4).")] = None,
    drop: Annotated[str | None, typer.Option(help="Whom a full expert turns away: position or probability.")] = None,
    aux_loss_coef: Annotated[float | None, typer.Option(help="Weight of the balancing loss (0.01).")] = None,
    aux_loss_reduction: Annotated[str | None, typer.Option(help="mean (default) or sum over layers.")] = None,
    aux_loss_scope: Annotated[str | None, typer.Option(help="device (default) or global.")] = None,
    aux_loss_count: Annotated[str | None, typer.Option(help="Choices that count: all (default) or first.")] = None,
    z_loss_coef: Annotated[float | None, typer.Option(help="Weight of the router z-loss (0).")] = None,
    experts_implementation: Annotated[str | None, typer.Option(help="Kernel of the experts (auto).")] = None,
    seed: Annotated[int, typer.Option(help="Of all that is drawn at random.")] = 0,
    form: Annotated[
        Literal["auto", "native", "sparsevlm"],
        typer.Option("--format", help="Class of the result; auto: transformers' own where there is one."),
    ] = "auto",
    max_shard_size: Annotated[str, typer.Option(help="Largest weight file.")] = "5GB",
    sample: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Text for k-means and for the comparison of logits.")
    ] = None,
    check: Annotated[bool, typer.Option("--check/--no-check", help="Compare logits; loads both models whole.")] = True,
    debug: Debug = False,
) -> None:
    """Make a dense model on disk sparse: copies of its FFNs become routed experts.

    Takes language models and vision-language models of transformers, and SparseVLM's own. Reads and writes tensor by
    tensor. The options are those of a recipe's upcycle section.
    """
    from rich.console import Console

    from sparsevlm.export.options import print_report, read_options

    given = {
        "layers": layers, "experts": experts, "top_k": top_k, "granularity": granularity,
        "shared_expert": shared_expert, "noise_std": noise_std, "drop_ratio": drop_ratio, "experts_from": expert_from,
        "router.scoring": scoring, "router.norm_topk_prob": norm_topk_prob, "router.init": router_init,
        "router.init_std": router_init_std, "router.jitter": jitter, "router.bias_update_rate": bias_update_rate,
        "router.capacity_factor": capacity_factor, "router.eval_capacity_factor": eval_capacity_factor,
        "router.min_capacity": min_capacity, "router.drop": drop, "aux_loss_coef": aux_loss_coef,
        "aux_loss_reduction": aux_loss_reduction, "aux_loss_scope": aux_loss_scope, "aux_loss_count": aux_loss_count,
        "z_loss_coef": z_loss_coef, "experts_implementation": experts_implementation,
    }  # fmt: skip
    spec = read_options(given)  # before anything heavy is imported
    from sparsevlm.export.stream import upcycle_checkpoint

    report = upcycle_checkpoint(
        source, out, spec, seed=seed, max_shard_size=max_shard_size, form=form, check=check, sample=sample
    )
    print_report(report, out, Console())


@app.command()
@guarded
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory, also of a run in progress.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The page; default: report.html in the run.")
    ] = None,
    png: Annotated[Path | None, typer.Option(help="Write the plots as PNG files into this folder too.")] = None,
    debug: Debug = False,
) -> None:
    """Show a run as one HTML page.

    Loss, accuracy, throughput and, of sparse stages, where the tokens go. Reads only the files of the run.
    """
    from sparsevlm.report.page import write_report

    written = write_report(run, output, png)
    for fault in written.run.faults:
        typer.echo(f"could not be read: {fault}", err=True)
    typer.echo(f"wrote {written.page} ({written.plots} plots)")


@app.command()
@guarded
def export(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="Run (its last complete stage), model or Hub id.")
    ] = None,
    output: Annotated[Path | None, typer.Argument(metavar="OUT", help="Directory to write; must not exist.")] = None,
    form: Annotated[
        Literal["auto", "native", "sparsevlm"],
        typer.Option("--format", help="A transformers class or an error; ours; auto: native where there is one."),
    ] = "auto",
    text_only: Annotated[bool, typer.Option("--text-only", help="The language model alone.")] = False,
    check: Annotated[bool, typer.Option(help="Compare with the result in a fresh process; needs its memory.")] = True,
    show: Annotated[bool, typer.Option("--list", help="Show what goes where, and leave.")] = False,
    debug: Debug = False,
) -> None:
    """Write a model in a class that transformers loads without SparseVLM.

    Renames weights, never recomputes them; ends by comparing logits, pixels and text with the original.
    """
    from rich.console import Console

    from sparsevlm.export import summary

    if show:
        summary.print_list(Console())
        return
    if model is None or output is None:
        raise ValueError("name a model and the directory to write: sparsevlm export MODEL OUT (or see --list)")
    from sparsevlm.export.native import export as export_model

    summary.print_report(export_model(model, output, form=form, text_only=text_only, check=check), Console())


app.command()(guarded(cli_features.features))
app.command()(guarded(cli_merge.merge))
app.command()(guarded(cli_hub.push))


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)


def _options(pairs: list[str]) -> dict[str, Any]:
    """Parse KEY=VALUE pairs; a value is YAML, as in a recipe's overrides."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    options = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise ValueError(f"--option {pair!r} is not of the form KEY=VALUE")
        try:
            options[key] = YAML(typ="safe", pure=True).load(value)
        except YAMLError as error:
            raise ValueError(f"--option {pair!r}: {value!r} is not YAML ({error})") from None
    return options


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; ends the process."""
    app(args=sys.argv[1:] if arguments is None else arguments, prog_name="sparsevlm")
