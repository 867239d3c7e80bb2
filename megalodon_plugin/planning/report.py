"""What `megalodon plan` prints and writes."""

import dataclasses
import json
import shlex
import textwrap
from collections.abc import Iterable
from typing import Any

from megalodon_plugin.parallel.layout import Layout

from .candidates import GIB, RESERVE, Candidate, PlanOptions, Refused, candidates
from .job import PlannedJob
from .traffic import Exchange

WIDTH = 120
"""Of running text, characters."""
LEGEND = (
    "Degrees; GiB that a rank holds, in all in the total; GiB that it sends in a step, by dimension and in all;\n"
    "seconds of a step if no exchange overlaps with computation; the share of them that is not computation."
)


def report(
    job: PlannedJob, found: list[Candidate], refused: list[Refused], plan: PlanOptions, overrides: list[str]
) -> str:
    """Why layouts are refused, the table of those that fit, best first, and the recommendation."""
    fitting = [c for c in found if c.fits(plan.memory)]
    parts = [_head(job, found, fitting, plan)]
    if refused:
        number = sum(one.layouts for one in refused)
        title = f"Refused: {number} of {number + len(found)} layouts, by the first rule that they break"
        parts.append(f"{title}\n{reasons(refused)}")
    if fitting:
        parts.append(f"{_table(fitting[: plan.rows])}\n\n{LEGEND}")
        if len(fitting) > plan.rows:
            parts.append(f"... and {len(fitting) - plan.rows} more (--rows {len(fitting)})")
        parts += [_recommendation(fitting[0], plan, overrides), _exchanges(fitting[0], plan)]
    return "\n\n".join(parts)


def reasons(refused: list[Refused]) -> str:
    """Each reason behind the number of layouts that it refuses; its other numbers are those of one of them."""
    return "\n".join(
        textwrap.fill(
            one.reason,
            width=WIDTH,
            initial_indent=f"{one.layouts:>6}  ",
            subsequent_indent=" " * 8,
            break_long_words=False,
            break_on_hyphens=False,
        )
        for one in refused
    )


def advice(job: PlannedJob, found: list[Candidate], plan: PlanOptions) -> str:
    """What would make the job fit."""
    smallest = min(found, key=lambda c: c.memory.total)
    need = smallest.memory.total / (1 - RESERVE) / GIB
    lines = [
        "No layout fits. What would:",
        f"  GPUs with {need:.0f} GiB (now {plan.memory:g}), as {_name(smallest.layout)}: {_memory(smallest)}",
    ]
    if smallest.work.checkpointing != "full":
        full = [c for c in candidates(job.with_checkpointing("full"), plan)[0] if c.fits(plan.memory)]
        text = f"fits as {_name(full[0].layout)}" if full else "is not enough alone"
        lines.append(f'  activation_checkpoint.mode = "full" {text}')
    for factor in (2, 4, 8, 16):
        more = dataclasses.replace(plan, gpus=plan.gpus * factor)
        if more.gpus > more.gpus_per_node and more.gpus % more.gpus_per_node:
            continue
        fitting = [c for c in candidates(job, more)[0] if c.fits(plan.memory)]
        if fitting:
            lines.append(f"  {more.gpus} GPUs, as {_name(fitting[0].layout)}")
            break
    if job.options.training.local_batch_size > 1:
        lines.append(f"  training.local_batch_size below {job.options.training.local_batch_size}")
    return "\n".join(lines)


def as_json(job: PlannedJob, found: list[Candidate], refused: list[Refused], plan: PlanOptions) -> str:
    """Every allowed layout with its memory, times and exchanges, in bytes and seconds; and why others are refused."""
    keys = ("gpus", "memory", "gpus_per_node", "node_gb_s", "network_gb_s", "latency_us", "tflops")
    content = {
        "config": str(plan.config),
        **{key: getattr(plan, key) for key in keys},
        "reserve": RESERVE,
        "seq_len": job.tokens_per_row,
        "model": dataclasses.asdict(job.args.config),
        "n_parameters": _n_parameters(job),
        "forward_flops_per_token": job.forward_flops,
        "layouts": [_candidate_json(c, plan) for c in found],
        "refused": [dataclasses.asdict(one) for one in refused],
    }
    return json.dumps(content, indent=1) + "\n"


def _candidate_json(c: Candidate, plan: PlanOptions) -> dict[str, Any]:
    return {
        **dataclasses.asdict(c.layout),
        "fits": c.fits(plan.memory),
        "rows_per_step": c.rows,
        "work": dataclasses.asdict(c.work),
        "memory": dataclasses.asdict(c.memory) | {"total": c.memory.total},
        "seconds": c.seconds,
        "exchange_seconds": c.exchange_seconds,
        "lost": c.lost,
        "exchanges": [dataclasses.asdict(e) | {"sent": e.sent} for e in c.exchanges],
    }


def _n_parameters(job: PlannedJob) -> int:
    return sum(p.numel() for p in job.parameters)


def _head(job: PlannedJob, found: list[Candidate], fitting: list[Candidate], plan: PlanOptions) -> str:
    options = job.options
    checkpointing = options.activation_checkpoint.mode
    if checkpointing == "selective":
        checkpointing += f" ({options.activation_checkpoint.selective_ac_option})"
    rows = found[0].rows if options.training.global_batch_size > 0 else "one local batch of each rank's"
    return "\n".join(
        [
            f"{options.model.flavor}: {_n_parameters(job):,} parameters, {rows} rows of {job.tokens_per_row} tokens a "
            f"step, activation checkpointing {checkpointing}",
            f"GPUs: {plan.gpus} with {plan.memory:g} GiB, {min(plan.gpus, plan.gpus_per_node)} a node. Layouts "
            f"that the rules allow: {len(found)}; that fit with {RESERVE:.0%} of the memory left free: {len(fitting)}",
            f"Estimates, not measurements. Time: {plan.tflops:g} TFLOP/s, {plan.node_gb_s:g} GB/s inside a node, "
            f"{plan.network_gb_s:g} GB/s between nodes, {plan.latency_us:g} µs a message, nothing hidden",
        ]
    )


def _table(shown: list[Candidate]) -> str:
    columns = [_columns(c) for c in shown]
    return _aligned([list(columns[0]), *(list(row.values()) for row in columns)])


def _columns(c: Candidate) -> dict[str, str]:
    """Heading -> what stands under it in a layout's line."""
    m = c.memory
    memory = {
        "state": m.parameters + m.gradients + m.moments,
        "gathered": m.gathered,
        "saved": m.saved,
        "at work": m.at_work,
        "total GiB": m.total,
    }
    groups = {"fsdp": ("fsdp", "replicate"), "tp": ("tp",), "cp": ("cp",), "pp": ("pp",)}
    sent = {f"{name} GiB": _sent(c.exchanges, dimensions) for name, dimensions in groups.items()}
    sent["sent GiB"] = sum(sent.values())
    return {
        **{name: str(degree) for name, degree in c.layout.degrees.items()},
        **{name: f"{size / GIB:.1f}" for name, size in memory.items()},
        **{name: f"{size / GIB:.2f}" for name, size in sent.items()},
        **{name: f"{seconds:.2f}" for name, seconds in c.seconds.items()},
        "lost": f"{c.lost:.1%}",
    }


def _recommendation(best: Candidate, plan: PlanOptions, overrides: list[str]) -> str:
    degrees = best.layout.options
    toml = ["[parallelism]", *(f"{key.removeprefix('parallelism.')} = {degree}" for key, degree in degrees.items())]
    options = [f"--{key} {degree}" for key, degree in degrees.items()]
    if plan.seq_len is not None:
        options.insert(0, f"--training.seq_len {plan.seq_len}")
    if overrides:
        options.insert(0, shlex.join(overrides))
    config, nodes = shlex.quote(str(plan.config)), plan.gpus // plan.gpus_per_node
    if nodes > 1:
        start = f"torchrun --nnodes {nodes} --nproc_per_node {plan.gpus_per_node} ... -m megalodon_plugin.cli.train"
        start += f" --job.config_file {config}"
    else:
        start = f"megalodon train {config} --nproc {plan.gpus}"
    return "\n".join(
        [f"Recommended: {_name(best.layout)}; {_memory(best)}. In the file", "", *_indented(toml), ""]
        + ["or on the command line" + (", on every node" if nodes > 1 else ""), ""]
        + _indented([" \\\n      ".join([start, *options])])
    )


def _exchanges(best: Candidate, plan: PlanOptions) -> str:
    if not best.exchanges:
        return "Nothing is exchanged."
    rows = [["exchange", "kind", "ranks", "part MiB", "sent MiB", "forward", "backward", "layers", "messages a step"]]
    for e in best.exchanges:
        number = [f"{size / 2**20:.3g}" for size in (e.part, e.sent)]
        counts = [str(n) for n in (e.forward, e.backward, e.layers)]
        rows.append([f"{e.dimension}: {e.what}", e.kind, str(e.ranks), *number, *counts, f"{e.messages:g}"])
    legend = (
        "Part: what a rank contributes or keeps. Sent: what one message moves over its link. Forward, backward:\n"
        "messages of a layer in one pass; those of a step include what activation checkpointing repeats."
    )
    return f"{_aligned(rows, left=2)}\n\n{legend}"


def _sent(exchanges: Iterable[Exchange], dimensions: tuple[str, ...]) -> float:
    return sum(e.messages * e.sent for e in exchanges if e.dimension in dimensions)


def _memory(c: Candidate) -> str:
    return f"{c.memory.total / GIB:.1f} GiB a rank"


def _name(layout: Layout) -> str:
    return "one GPU" if layout.gpus == 1 else str(layout)


def _indented(lines: Iterable[str]) -> list[str]:
    return [f"    {line}" for line in lines]


def _aligned(rows: list[list[str]], left: int = 0) -> str:
    """Columns of equal width; the first `left` flush left, the others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
