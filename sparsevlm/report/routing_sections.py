"""The sections of a stage with routed experts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from sparsevlm.report import flow, live_plots, maps
from sparsevlm.report.read import Stage
from sparsevlm.report.routing import LORA_EXPERTS, LiveRouting, Routing
from sparsevlm.report.sections import Plot, Section, Table, number, percent, slug

LATER = "Expert similarity by pair, token pathways and pictures appear when the stage is complete."


def routing_section(stage: Stage) -> Section | None:
    """Return the routing of a stage (of one group of its routers), None for a dense one."""
    if not stage.sparse:
        return None
    notes, plots, tables = _introduction(stage), [], []
    of_adapter = stage.group == LORA_EXPERTS
    prefix = f"{slug(stage.name)}_" + (f"{LORA_EXPERTS}_" if of_adapter else "")
    if stage.live is not None:
        plots += _live_plots(stage.live, stage.experts_per_token, stage.by_modality)
    if stage.routing is not None:
        routing = _by_modality(stage.routing) if stage.by_modality else stage.routing
        more, tables = _final_plots(routing), _tables(routing)
        plots += more
    elif stage.live is not None:
        plots.append(_last_load(stage.live))
    plots = [Plot(prefix + plot.name, plot.title, plot.caption, plot.figure) for plot in plots]
    title = f"Routing in {stage.name}" + (" (LoRA experts)" if of_adapter else "")
    return Section(title, notes, plots, tables)


def _introduction(stage: Stage) -> list[str]:
    notes = []
    found = stage.routing or stage.live
    if found is not None:
        k = stage.experts_per_token
        chosen = f", {k} for each token" if k is not None else ""
        what = ("FFN{} with {} LoRA experts" if stage.group == LORA_EXPERTS else "MoE layer{} of {} experts").format(
            "s" * (len(found.layers) > 1), found.num_experts
        )
        notes.append(
            f"{len(found.layers)} {what}{chosen}; the fair share of an expert is {percent(1 / found.num_experts)}."
        )
    if stage.by_modality:
        notes.append(
            "Tokens go to experts by what they are: text to expert 0, visual tokens to expert 1. Nothing is learned or "
            "balanced there; how far the two have moved apart is what training changes."
        )
    if stage.routing is not None:
        tokens = ", ".join(f"{n:,} {kind}" for kind, n in stage.routing.tokens.items())
        notes.append(f"Measured after training on {stage.routing.samples} samples: {tokens} tokens.")
        if len(stage.routing.layers) == 1 and not stage.by_modality:
            notes.append("Pathways need two layers with experts; there is one.")
    elif stage.complete:
        notes.append(
            "There is no routing.json in this stage. `sparsevlm eval --routing` measures the routing of a saved model."
        )
    else:
        notes.append(LATER if stage.live is not None else f"No log line holds routing numbers yet. {LATER}")
    return notes


def _by_modality(routing: Routing) -> Routing:
    """Leave out what says nothing where nothing is chosen: balance, certainty, pathways, pictures of one colour."""
    return replace(routing, entropy={}, measures={}, transitions={}, pathways={}, pictures=[])


def _live_plots(live: LiveRouting, top_k: int | None, by_modality: bool) -> list[Plot]:
    plots = []
    if by_modality:
        live = replace(live, entropy={}, measures={k: v for k, v in live.measures.items() if k == "similarity"})
    balance = None if by_modality else live_plots.balance(live, top_k)
    if balance is not None:
        caption = (
            "The number of the progress line: exp(entropy of the load) / experts in the layer where it is least. "
            "1: all experts get the same; k / E: every token goes to the same k experts."
        )
        plots.append(Plot("balance", "Balance over time", caption, balance))
    caption = (
        "Share of the choices that go to each expert, all tokens. A collapsing layer runs away from the fair share."
    )
    plots.append(Plot("load_over_time", "Expert load over time", caption, live_plots.expert_load(live)))
    health = live_plots.health(live)
    if health is not None:
        caption = (
            "A line a layer. Entropy is that of a token's distribution over experts, as a share of log E. Max "
            "violation is the largest load over the fair share, minus 1. Similarity is the mean cosine between the "
            "weights of two experts: 1 right after upcycling, falling as they grow apart. The larger the logit scale, "
            "the harder a choice is to change."
        )
        plots.append(Plot("health", "Routing health by layer, over time", caption, health))
    return plots


def _last_load(live: LiveRouting) -> Plot:
    load = {kind: values[-1] for kind, values in live.load.items() if np.isfinite(values[-1]).any()}
    caption = f"Of the last log line, step {live.steps[-1]:.0f}. White: the fair share."
    return Plot("load", "Expert load by layer and modality", caption, maps.load_maps(load, live.layers))


def _final_plots(routing: Routing) -> list[Plot]:
    caption = "Share of each modality's choices, in %. White: the fair share; orange: more, purple: less."
    plots = [Plot("load", "Expert load by layer and modality", caption, maps.load_maps(routing.load, routing.layers))]
    by_layer = maps.by_layer(routing)
    if by_layer is not None:
        caption = "From the first MoE layer to the last, after training."
        plots.append(Plot("by_layer", "Certainty and balance, layer by layer", caption, by_layer))
    similarity = maps.similarity(routing)
    if similarity is not None:
        caption = "Cosine between the weights of every two experts of a layer, after training."
        plots.append(Plot("similarity", "Similarity between experts", caption, similarity))
    pathways = flow.pathways(routing)
    if pathways is not None:
        caption = (
            "A column of experts for each MoE layer. The width of a line is the share of tokens whose first choice "
            "goes from one expert to the other; the commonest complete pathways are in colour, dots are coloured by "
            "load (white: fair share, orange: more, purple: less). Transitions of less than "
            f"{100 * flow.hidden(routing.num_experts):.2g} % of the tokens are left out."
        )
        bare = [kind for kind in routing.transitions if not flow.highlighted(routing, kind)]
        if bare:
            least = f"{100 * flow.HIGHLIGHTED_FROM:.2g} %"
            caption += f" No complete pathway of {', '.join(bare)} tokens is taken by {least} of them."
        plots.append(Plot("pathways", "Token pathways", caption, pathways))
    for i, picture in enumerate(routing.pictures):
        drawn = maps.picture(picture, routing.layers, routing.num_experts)
        if drawn is None:
            continue
        caption = "Each patch in the colour of the expert it was sent to first."
        if picture.text:
            caption += f" Asked: {picture.text}"
        plots.append(Plot(f"picture_{i}", "Patches by expert" if i == 0 else "", caption, drawn))
    return plots


def _tables(routing: Routing) -> list[Table]:
    measures = routing.measures
    columns = {
        "balance": measures.get("balance"),
        "max violation": measures.get("max_violation"),
        "dead experts": measures.get("dead_experts"),
        **{f"entropy ({kind})": values for kind, values in routing.entropy.items()},
        "dropped": measures.get("dropped_share"),
        "logit scale": measures.get("logit_rms"),
        "similarity": similarity_means(routing),
    }
    columns = {name: values for name, values in columns.items() if values is not None}
    write = {"dead experts": lambda value: number(value, 0), "dropped": percent}
    rows = [
        [str(layer), *(write.get(name, number)(float(values[i])) for name, values in columns.items())]
        for i, layer in enumerate(routing.layers)
    ]
    tables = [Table("By layer, after training", ["layer", *columns], rows)]
    paths = [
        [kind, " → ".join(map(str, experts)), percent(share)]
        for kind, commonest in routing.pathways.items()
        for experts, share in commonest
        if len(experts) > 1
    ]
    if paths:
        title = f"Commonest pathways (experts of layers {', '.join(map(str, routing.layers))})"
        tables.append(Table(title, ["tokens", "experts", "share"], paths, text=(0, 1)))
    return tables


def similarity_means(routing: Routing) -> list[float] | None:
    """Return the mean cosine between two different experts of each layer."""
    if routing.similarity is None:
        return None
    experts = routing.num_experts
    return [(float(matrix.sum()) - float(matrix.trace())) / (experts * (experts - 1)) for matrix in routing.similarity]
