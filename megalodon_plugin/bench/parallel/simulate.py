"""Simulated rows of `megalodon bench parallel`: one rank's measured work, and links of published speed."""

from typing import Any

from megalodon_plugin.planning.job import planned_job
from megalodon_plugin.planning.links import Links
from megalodon_plugin.planning.step_time import simulate_step
from megalodon_plugin.titan.command_line import read_job

from ..train.job import TrainingJob
from .results import Measured, Simulated
from .scenarios import Scenario

FORWARD_SHARE = {"none": 1 / 3, "selective": 1 / 3, "full": 1 / 4}
"""Of a step's work by the count of matrix products: a forward pass, two for the gradients, one again under "full"."""


def simulated_row(scenario: Scenario, job: TrainingJob, measured: Measured, links: Links) -> Simulated:
    """`measured`, one rank's row without exchanges, with the time of a whole step in place of its own.

    "work_seconds" is what was measured; "exposed" and "exchanged" are seconds by dimension.
    """
    options: Any = read_job(job.arguments(1, "unused"))
    plan = planned_job(options)
    (stage,) = plan.stages(scenario.layout.pp)
    exchanges = plan.exchanges(scenario.layout, stage)
    step = simulate_step(measured["seconds"], FORWARD_SHARE[job.checkpointing], exchanges, links)
    slower = measured["seconds"] / step.seconds
    row: Simulated = {
        **measured,
        "simulated": True,
        "work_seconds": measured["seconds"],
        "seconds": step.seconds,
        "tokens_per_s": scenario.tokens / step.seconds,
        "exposed": step.exposed,
        "exchanged": step.exchanged,
        "communication": {"exposed": 1 - slower},
    }
    row.pop("losses_and_norms", None)  # of exchanges that were none
    if "mfu" in row:
        row["mfu"] *= slower
    return row
