"""Layouts: how the ranks of a job are spread over the five dimensions of the host's mesh.

Here stand what a layout is called, the host's options that ask for it, and every reason to refuse one. The adapter, the
planner, the benchmark and the tests ask here, so that what one of them takes is what the others take.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from megalodon_plugin.model import MegalodonConfig

OWN_ENTRY = "python -m torch.distributed.run -m megalodon_plugin.cli.train"
DROPOUTS = ("dropout", "hidden_dropout", "attention_dropout")
ONE_STAGE_A_RANK = ("1F1B", "GPipe", "PipelineScheduleSingle")
"""Schedules under which a rank of a pipeline holds one stage; under the others it holds several."""
TWO_STAGES_A_RANK = ("ZBVZeroBubble", "DualPipeV")
"""Schedules that come back: of 2 P stages the rank r of P holds the stages r and 2 P - 1 - r, and no others."""


@dataclass(frozen=True)
class Dimension:
    """One dimension of the host's mesh."""

    field: str
    """Of `Layout`."""
    key: str
    """The host's option of `[parallelism]`."""


DIMENSIONS = {
    "replicate": Dimension("dp_replicate", "data_parallel_replicate_degree"),
    "fsdp": Dimension("dp_shard", "data_parallel_shard_degree"),
    "cp": Dimension("cp", "context_parallel_degree"),
    "tp": Dimension("tp", "tensor_parallel_degree"),
    "pp": Dimension("pp", "pipeline_parallel_degree"),
}
"""By the names that layouts are written with."""
CP, TP, PP = (f"parallelism.{DIMENSIONS[name].key}" for name in ("cp", "tp", "pp"))
LAYERS_PER_STAGE = "parallelism.pipeline_parallel_layers_per_stage"
PARTS = "parallelism.module_fqns_per_model_part"
LESS_LAYERS = tuple(f"parallelism.pipeline_parallel_{end}_stage_less_layers" for end in ("first", "last"))


@dataclass(frozen=True)
class Layout:
    """Degrees of the five dimensions. `str` writes it as `parse` reads it: "fsdp 2 x cp 4", "1" for one rank."""

    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1
    pp: int = 1

    @classmethod
    def parse(cls, text: str) -> "Layout":
        """ "fsdp 2 x cp 4" -> Layout(dp_shard=2, cp=4); "1" is one rank.

        Raises:
            ValueError: it is not written so.
        """
        if text.strip() == "1":
            return cls()
        degrees: dict[str, int] = {}
        for part in text.split(" x "):
            name, _, degree = part.strip().partition(" ")
            is_new = name in DIMENSIONS and name not in degrees
            if not is_new or not (degree.isascii() and degree.isdigit()) or int(degree) < 1:
                names = ", ".join(DIMENSIONS)
                raise ValueError(f"a layout must be degrees of {names}, as in 'fsdp 2 x cp 4', but is {text!r}")
            degrees[name] = int(degree)
        return cls(**{DIMENSIONS[name].field: degree for name, degree in degrees.items()})

    def __str__(self) -> str:
        return " x ".join(f"{name} {degree}" for name, degree in self.degrees.items() if degree > 1) or "1"

    @property
    def degrees(self) -> dict[str, int]:
        """Name of each dimension -> its degree."""
        return {name: getattr(self, dimension.field) for name, dimension in DIMENSIONS.items()}

    @property
    def options(self) -> dict[str, int]:
        """The host's options for it, {"parallelism.…": degree}, all five."""
        return {f"parallelism.{DIMENSIONS[name].key}": degree for name, degree in self.degrees.items()}

    @property
    def gpus(self) -> int:
        return math.prod(dataclasses.astuple(self))

    @property
    def data(self) -> int:
        """Ranks that read different rows."""
        return self.dp_replicate * self.dp_shard

    @property
    def shards(self) -> int:
        """Ranks that share the parameters of one replica and stage: those of chunk parallelism too."""
        return self.dp_shard * self.cp

    @property
    def has_fsdp(self) -> bool:
        """Whether the host applies FSDP2, which it also does for replication alone."""
        return self.data * self.cp > 1


@dataclass(frozen=True)
class Job:
    """What the rules need of a training job besides the model's configuration."""

    lengths: Mapping[str, int]
    """The host's option -> tokens of a row: "training.seq_len" and, if the job validates, "validation.seq_len"."""
    local_rows: int = 1
    """`training.local_batch_size`, rows of one forward and backward pass of a data parallel rank."""
    rows: int | None = None
    """`training.global_batch_size`, rows of a step over all ranks; None: `local_rows` of each data parallel rank."""
    microbatch_rows: int = 1
    """`parallelism.pipeline_parallel_microbatch_size`."""
    schedule: str = "1F1B"
    """`parallelism.pipeline_parallel_schedule`, in capitals or not."""
    schedule_csv: str | None = None
    """`parallelism.pipeline_parallel_schedule_csv`, a file whose order of work replaces that of `schedule`. The model
    is cut into stages for `schedule` all the same."""
    layers_per_stage: int | None = None
    """`parallelism.pipeline_parallel_layers_per_stage`."""
    less_layers: tuple[int, int] = (1, 1)
    """Those of LESS_LAYERS: as how many layers the host counts the embedding, and the last norm with the output."""
    parts: int | None = None
    """Length of `parallelism.module_fqns_per_model_part`, the stages as the user has written them; None: the host cuts
    the model."""
    carry_state: bool = False
    float8: bool = False
    own_trainer: bool = True
    """The plugin's Trainer trains the job, not the host's."""
    gpus_per_node: int | None = None
    """GPUs that are joined by fast links, where that is known."""


ONE_RANK = Layout()


def reshards_after_forward(policy: str, pipeline: bool) -> bool:
    """What `parallelism.fsdp_reshard_after_forward` means for a layer; "default": unless a pipeline's microbatches
    would gather it again and again.
    """
    return {"always": True, "never": False, "default": not pipeline}[policy]


def refusal(layout: Layout, config: MegalodonConfig, job: Job) -> str | None:
    """Why the model cannot be trained so: option, rule and value; None if it can."""
    found = (reason for rule in RULES for reason in rule(layout, config, job))
    return next(found, None) or host_refusal(layout, config.n_layers, job)


def host_refusal(layout: Layout, n_layers: int, job: Job) -> str | None:
    """Why the host cannot train any model of `n_layers` layers so; None if it can."""
    return next((reason for rule in (_rows, _pipeline) for reason in rule(layout, n_layers, job)), None)


def check_layout(layout: Layout, config: MegalodonConfig, job: Job) -> None:
    """Raise ValueError with the text of `refusal` if there is one."""
    reason = refusal(layout, config, job)
    if reason is not None:
        raise ValueError(reason)


def tensor_parallel_refusal(config: MegalodonConfig, degree: int) -> str | None:
    """Why `degree` ranks cannot share the model's heads, groups and widths evenly; None if they can.

    Every rank also needs a row of the output layer: PyTorch's loss on parts of the logits waits for all ranks, and one
    that holds none would not take part.
    """
    # The other widths need no check: heads divide z_dim and value_dim, groups divide dim.
    sizes = {name: getattr(config, name) for name in ("n_heads", "norm_groups", "ffn_dim")}
    most = math.gcd(*sizes.values())
    fitting = [n for n in range(1, most + 1) if most % n == 0 and not _ranks_without_rows(config.n_outputs, n)]
    would_work = f"what would work: {' or '.join(map(str, fitting))}"
    for name, size in sizes.items():
        if size % degree:
            return f"`{TP}` must divide `{name}` = {size}, but is {degree}; {would_work}"
    if _ranks_without_rows(config.n_outputs, degree):
        return (
            f"`{TP}` must leave every rank a part of the {config.n_outputs} rows of the output layer, which are cut "
            f"into parts of {-(-config.n_outputs // degree)}, but is {degree}; {would_work}"
        )
    return None


def _ranks_without_rows(rows: int, ranks: int) -> bool:
    """Whether parts of equal size, as DTensor cuts them, are used up before the last rank."""
    return -(-rows // ranks) * (ranks - 1) >= rows


def _stock_entry(layout: Layout, config: MegalodonConfig, job: Job) -> Iterator[str]:
    """The host's own Trainer would train these wrongly."""
    needs_own_trainer = {
        PP: (
            layout.pp,
            "its loss is divided by the token count only after the backward pass (torchtitan #2972), so that gradients "
            "would always be clipped",
        ),
        CP: (layout.cp, "its metrics count every token once a rank (torchtitan #2983, #3111)"),
    }
    for key, (degree, reason) in needs_own_trainer.items():
        if degree > 1 and not job.own_trainer:
            yield (
                f"`{key}` must be 1 when torchtitan's own command starts the job, but is {degree}: {reason}. "
                f"Start the job with `{OWN_ENTRY}` or `megalodon train`"
            )


def _tensor_parallel(layout: Layout, config: MegalodonConfig, job: Job) -> Iterator[str]:
    reason = tensor_parallel_refusal(config, layout.tp)
    if reason is not None:
        yield reason
    node = job.gpus_per_node
    if node is not None and (layout.tp > node or node % layout.tp):
        yield f"`{TP}` must divide the {node} GPUs of a node, but is {layout.tp}"


def _chunk_parallel(layout: Layout, config: MegalodonConfig, job: Job) -> Iterator[str]:
    """Every rank holds whole chunks of a row."""
    chunk, degree = config.chunk_size, layout.cp
    step = chunk * degree
    for name, length in job.lengths.items():
        if degree == 1 or length % step == 0:
            continue
        lengths = [n for n in (length // step * step, (length // step + 1) * step) if n]
        degrees = [n for n in range(1, -(-length // chunk) + 1) if length % (chunk * n) == 0]
        fitting = f", or `{CP}` = {' or '.join(map(str, degrees))}" if degrees else ""
        yield (
            f"`{name}` must be a multiple of `megalodon.chunk_size` x `{CP}` = {chunk} x {degree} = {step}, so that "
            f"every rank holds whole chunks, but is {length}; what would work: "
            f"`{name}` = {' or '.join(map(str, lengths))}{fitting}"
        )


def _tied_embedding(layout: Layout, config: MegalodonConfig, job: Job) -> Iterator[str]:
    if layout.pp > 1 and config.tie_embedding:
        yield (
            f"`megalodon.tie_embedding` must be false with `{PP}` = {layout.pp}: the embedding and the output layer "
            "lie on different ranks"
        )


def _carried_state(layout: Layout, config: MegalodonConfig, job: Job) -> Iterator[str]:
    """A carried state is whole on one rank, which the rows that it belongs to must be too."""
    sharing_a_row = {
        CP: (
            layout.cp,
            "it shares one row over ranks; use it without a carried state, or a carried state with shorter rows",
        ),
        TP: (layout.tp, "its ranks hold the features and heads of one state"),
        PP: (layout.pp, "its stages exchange activations alone"),
    }
    for key, (degree, reason) in sharing_a_row.items():
        if job.carry_state and degree > 1:
            yield f"`{key}` must be 1 with `megalodon.carry_state`, but is {degree}: {reason}"


def _float8(layout: Layout, config: MegalodonConfig, job: Job) -> Iterator[str]:
    """The float8 product takes multiples of 16, of which the host checks whole matrices and not a rank's part."""
    for name in ("dim", "z_dim", "value_dim", "ffn_dim"):
        size, least = getattr(config, name), 16 * layout.tp
        if job.float8 and size % 16 == 0 and size % least:
            yield (
                f"`megalodon.{name}` must be a multiple of {least} for float8 on `{TP}` = {layout.tp} ranks, whose "
                f"parts are multiples of 16, but is {size}"
            )


def _dropout(layout: Layout, config: MegalodonConfig, job: Job) -> Iterator[str]:
    ranks = {"data parallel": layout.data, "context parallel": layout.cp, "tensor parallel": layout.tp}
    several = next((f"{name} degree {degree}" for name, degree in ranks.items() if degree > 1), None)
    for name in DROPOUTS:
        if several is not None and getattr(config, name) > 0:
            yield (
                f"`megalodon.{name}` must be 0 with {several}, but is {getattr(config, name)}: torchtitan "
                "gives all these ranks one seed, so they would drop the same places"
            )


def _rows(layout: Layout, n_layers: int, job: Job) -> Iterator[str]:
    if job.rows is not None and job.rows % (job.local_rows * layout.data):
        yield (
            "`training.global_batch_size` must be a multiple of `training.local_batch_size` x data parallel ranks = "
            f"{job.local_rows} x {layout.data}, but is {job.rows}"
        )


def _pipeline(layout: Layout, n_layers: int, job: Job) -> Iterator[str]:
    degree = layout.pp
    if degree == 1:
        return
    wrong = [*_counts(job)]
    if wrong:  # The rules below divide by them.
        yield from wrong
        return
    yield from _stages(degree, n_layers, job)
    if job.local_rows % job.microbatch_rows:
        yield (
            "`training.local_batch_size` must be a multiple of `parallelism.pipeline_parallel_microbatch_size` = "
            f"{job.microbatch_rows}, but is {job.local_rows}"
        )
    least = job.microbatch_rows * degree
    if is_schedule(job.schedule, "1F1B") and not job.schedule_csv and job.local_rows < least:
        yield (
            "`training.local_batch_size` must be at least `parallelism.pipeline_parallel_microbatch_size` x "
            f"`{PP}` = {job.microbatch_rows} x {degree} under the schedule 1F1B, but is {job.local_rows}; what would "
            f'work: {least} rows or more, or `parallelism.pipeline_parallel_schedule` = "GPipe", which waits longer'
        )


def _counts(job: Job) -> Iterator[str]:
    first, last = job.less_layers
    least_of = {
        "parallelism.pipeline_parallel_microbatch_size": (1, job.microbatch_rows),
        LAYERS_PER_STAGE: (1, job.layers_per_stage),
        LESS_LAYERS[0]: (0, first),
        LESS_LAYERS[1]: (0, last),
    }
    for key, (least, value) in least_of.items():
        if value is not None and value < least:
            yield f"`{key}` must be at least {least}, but is {value}"


def _stages(degree: int, n_layers: int, job: Job) -> Iterator[str]:
    """The host makes as many stages as the schedule needs, or as options ask for, and shares the layers among them."""
    fewest, most = (1, 1) if is_schedule(job.schedule, *ONE_STAGE_A_RANK) else (2, None)  # of a rank
    if is_schedule(job.schedule, *TWO_STAGES_A_RANK):
        most = 2
    first, last = job.less_layers
    layers, least = n_layers + first + last, max(1, first, last)
    stages = degree * fewest
    if job.layers_per_stage is not None:
        stages = -(-layers // job.layers_per_stage)
        yield from _stages_of_ranks(degree, stages, LAYERS_PER_STAGE, fewest, most)
    if job.parts is not None:
        # These the host takes one a rank too.
        yield from _stages_of_ranks(degree, job.parts, PARTS, 1 if most is None else fewest, most)
    elif stages * least > layers:
        each_rank = f", with {fewest} stages a rank" if fewest > 1 else ""
        key, rule, value = PP, f"be at most {layers // least // fewest}{each_rank}", degree
        if job.layers_per_stage is not None:
            key, rule, value = LAYERS_PER_STAGE, "make fewer stages", job.layers_per_stage
        yield (
            f"`{key}` must {rule}, so that each stage has at least {least} of `n_layers` = {n_layers} layers and the "
            f"{first} + {last} that the embedding and the output count for (`{LESS_LAYERS[0]}`, `{LESS_LAYERS[1]}`), "
            f"but is {value}"
        )


def _stages_of_ranks(degree: int, stages: int, option: str, fewest: int, most: int | None) -> Iterator[str]:
    """Every rank holds as many stages, and as few or many as the schedule takes."""
    if stages % degree == 0 and fewest <= stages // degree <= (most or stages):
        return
    rule = {(1, 1): "be", (2, 2): "be half of", (1, None): "divide", (2, None): "divide, and be at most half of,"}
    yield (f"`{PP}` must {rule[fewest, most]} the {stages} stages that `{option}` asks for, but is {degree}")


def is_schedule(schedule: str, *names: str) -> bool:
    """Whether a schedule is one of these; like the host, in capitals or not."""
    return schedule.lower() in [name.lower() for name in names]


Rule = Callable[[Layout, Any, Job], Iterator[str]]
RULES: tuple[Rule, ...] = (
    _stock_entry,
    _tensor_parallel,
    _chunk_parallel,
    _tied_embedding,
    _carried_state,
    _float8,
    _dropout,
)
"""Those of the model, in the order in which they are asked."""
