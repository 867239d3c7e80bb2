"""The error of an implementation against float64, in units of the error that cannot be avoided.

With ||.|| the Euclidean norm over all numbers, the error of a result is ||result - truth|| / ||truth||. The truth is
the PyTorch path in float64 on the same inputs, activations already rounded to their dtype. The unit is

    bfloat16 activations   the error of the truth rounded to bfloat16; an implementation may have 1.5 times that
    float32 activations    the error of the PyTorch path in float32; an implementation may have twice that
"""

import json
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megalodon_plugin.ops.dispatch import use_kernels

from .problems import COEFFICIENTS, Call, Problem, cema_problem, padded, solve, timestep_norm_problem
from .results import AccuracyRow

LIMITS = {torch.bfloat16: 1.5, torch.float32: 2.0}
FLOOR = 1e-7
"""Errors below it count as this one: about the rounding of float32, 2^-24 = 6e-8."""


class Case(NamedTuple):
    """Problems of one kind, judged together: their numbers are put into one vector."""

    op: str
    name: str
    problems: Sequence[Callable[[], Problem]]
    """Made one at a time, when they are needed: some are large."""


def relative_errors(value: Tensor, truth: Tensor) -> tuple[float, float]:
    """||value - truth|| / ||truth||, Euclidean and by the largest number; undivided where the truth is zero."""
    difference = (value.double() - truth.double()).flatten()
    found = []
    for order in (2, torch.inf):
        scale = torch.linalg.vector_norm(truth.double().flatten(), order).item()
        found.append(torch.linalg.vector_norm(difference, order).item() / (scale or 1.0))
    return found[0], found[1]


def rounding_errors(truth: Tensor, dtype: torch.dtype) -> tuple[float, float]:
    """`relative_errors` of the truth rounded to `dtype`."""
    return relative_errors(truth.to(dtype), truth)


def pooled(solutions: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    """All numbers of each quantity over several solutions, as one vector."""
    collected: dict[str, list[Tensor]] = {}
    for solution in solutions:
        for name, value in solution.items():
            collected.setdefault(name, []).append(value.flatten())
    return {name: torch.cat(values) for name, values in collected.items()}


def judge(
    case: Case, impl: str = "cuda", mode: str = "require", call: Call | None = None, limit: float | None = None
) -> list[AccuracyRow]:
    """One row for each output and gradient of the case.

    Args:
        impl: the implementation's name in the rows.
        mode: what the ops run as (`ops.dispatch.use_kernels`).
        call: an implementation other than the op.
        limit: how many units of error are allowed, by default `LIMITS`.

    Returns:
        rows, with ok where error <= limit * unit + FLOOR. A number that is not finite is an infinite error.
    """
    results, truths, units = [], [], []
    for make in case.problems:
        problem = make()
        with use_kernels(mode):
            results.append(solve(problem, call=call))
        with use_kernels("off"):
            truths.append(solve(problem, torch.float64))
            if problem.dtype == torch.float32:
                units.append(solve(problem))
        dtype = problem.dtype
    limit = LIMITS[dtype] if limit is None else limit
    result, truth, unit = pooled(results), pooled(truths), pooled(units)
    rows: list[AccuracyRow] = []
    for name, value in result.items():
        want = truth[name]
        errors = relative_errors(value, want) if torch.isfinite(value).all() else (torch.inf, torch.inf)
        least = relative_errors(unit[name], want) if name in unit else rounding_errors(want, dtype)
        rows.append(
            {
                "op": case.op,
                "case": case.name,
                "dtype": str(dtype).removeprefix("torch."),
                "impl": impl,
                "quantity": name,
                "error": errors[0],
                "unit": least[0],
                "ratio": ratio(errors[0], least[0]),
                "error_max": errors[1],
                "unit_max": least[1],
                "ratio_max": ratio(errors[1], least[1]),
                "limit": limit,
                "ok": errors[0] <= limit * least[0] + FLOOR,
            }
        )
    return rows


def accuracy_row(row: AccuracyRow) -> str:
    """A row of `judge` as a sentence."""
    return (
        f"{row['op']} {row['case']}, {row['dtype']}, {row['quantity']}: error {row['error']:.3g} is {row['ratio']:.3g} "
        f"units of {row['unit']:.3g}, and at most {row['limit']:g} are allowed"
    )


def ratio(error: float, unit: float) -> float:
    """error / unit, where both below float32's rounding count as that."""
    return max(error, FLOOR) / max(unit, FLOOR)


def standard_cases(op: str, dtype: torch.dtype, device: torch.device, large: bool = True) -> list[Case]:
    """The cases of the accuracy table; `large` as on a GPU, else of the same kinds and sizes for a CPU."""

    def cases(
        name: str,
        make: Callable[..., Problem],
        seeds: int,
        *arguments: Any,
        change: Callable[[Problem], Problem] | None = None,
        **options: Any,
    ) -> Case:
        def one(seed: int) -> Problem:
            problem = make(*arguments, dtype=dtype, device=device, seed=seed, **options)
            return problem if change is None else change(problem)

        return Case(op, name, [partial(one, seed) for seed in range(seeds)])

    def as_in_the_paper(problem: Problem) -> Problem:
        return problem.with_options(cema_input="paper")

    if op == "cema":
        wide, long, dim = ((2, 4097, 256), 32768, 64) if large else ((2, 197, 20), 500, 6)
        length = wide[1]
        return [
            cases(f"as initialised, L {length}", cema_problem, 1, wide, 16, state=False),
            cases(f"carried state, paper's p, L {length}", cema_problem, 1, wide, 16, change=as_in_the_paper),
            cases(f"slow decays, L {long}", cema_problem, 1, (1, long, dim), 16, decays="slow"),
            cases(f"slow decays, L {long - 33}", cema_problem, 1, (2, long - 33, dim), 16, decays="slow"),
            cases("decays of 0 and 1, L 1001", cema_problem, 1, (2, 1001, dim), 16, decays="extreme"),
            cases("short pieces, L 3", cema_problem, 4, (2, 3, dim), 16),
        ]
    shape, groups = ((2, 4097, 1024), 32) if large else ((2, 197, 24), 4)
    length = shape[1]
    return [
        cases(f"mean 0, L {length}", timestep_norm_problem, 1, shape, groups, state=False),
        cases(f"mean 1000, L {length}", timestep_norm_problem, 1, shape, groups, mean=1000.0, state=False),
        cases(f"carried state, mean 1000, L {length}", timestep_norm_problem, 1, shape, groups, mean=1000.0),
        cases(f"carried state, padding, L {length}", timestep_norm_problem, 1, shape, groups, change=padded),
        cases("short pieces, L 3", timestep_norm_problem, 4, (2, 3, shape[2]), groups),
    ]


def golden_cases(folder: Path, op: str, dtype: torch.dtype, device: torch.device) -> list[Case]:
    """The inputs of the golden vectors (NAME.json and NAME.safetensors), one case for each regime.

    Raises:
        ValueError: the folder holds no vectors of the op.
    """
    infos = [(path, json.loads(path.read_text())) for path in sorted(folder.glob("*.json"))]
    kinds: dict[str, list[Callable[[], Problem]]] = {}
    for path, info in infos:
        if info.get("kind") == op:
            kind = info["regime"] if op == "cema" else f"mean {info['x_mean']:g}"
            make = _golden_cema if op == "cema" else _golden_timestep_norm
            kinds.setdefault(kind, []).append(partial(make, path, info, dtype, device))
    if not kinds:
        raise ValueError(f"`--golden` must be a folder with golden vectors of {op}, but {folder} holds none")
    return [Case(op, f"golden, {kind} ({len(made)})", made) for kind, made in kinds.items()]


def _load(path: Path, device: torch.device) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return {name: value.to(device) for name, value in load_file(path.with_suffix(".safetensors")).items()}


def _golden_cema(path: Path, info: dict[str, Any], dtype: torch.dtype, device: torch.device) -> Problem:
    tensors = _load(path, device)
    arguments = {"x": tensors["in.x"].transpose(1, 2).to(dtype)}  # stored as (B, D, L)
    arguments |= {name: tensors[f"param.{name}"].float() for name in COEFFICIENTS}
    weights = {"y": tensors["gout.y"].transpose(1, 2).to(dtype)}
    if info["incoming_hx"]:
        arguments["h0"] = tensors["in.hx"].float()
    if info["compute_last_state"]:
        weights["h"] = tensors["gout.h"].float()
    return Problem("cema", arguments, {}, weights)


def _golden_timestep_norm(path: Path, info: dict[str, Any], dtype: torch.dtype, device: torch.device) -> Problem:
    tensors = _load(path, device)
    batch = info["B"]
    arguments = {"x": tensors["in.x"].to(dtype)}
    arguments |= {name: tensors[f"param.{name}"].float() for name in ("weight", "bias")}
    options = {"groups": info["groups"], "eps": info["eps"], "padding_mask": tensors.get("in.padding_mask")}
    if info["prior_count"]:  # a learnable prior is a carried state that all rows share
        arguments["mean"] = tensors["param.prior_mean"].float().expand(batch, -1).contiguous()
        arguments["var"] = tensors["param.prior_logv"].float().exp().expand(batch, -1).contiguous()
        options["count"] = torch.full((batch,), info["prior_count"], device=device)
    elif info["carry"]:
        arguments |= {name: tensors[f"in.prev_{name}"].float() for name in ("mean", "var")}
        options["count"] = tensors["in.prev_count"]
    weights = {"y": tensors["gout.y"].to(dtype)}
    weights |= {name: tensors[f"gout.{name}"].float() for name in ("mean", "var") if f"gout.{name}" in tensors}
    return Problem("timestep_norm", arguments, options, weights)
