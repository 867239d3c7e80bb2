"""Layouts: their names, the host's options for them, and every reason to refuse one."""

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import megalodon_plugin.titan  # noqa: F401  chooses the device before torchtitan does
from megalodon_plugin.model import PRESETS, MegalodonConfig
from megalodon_plugin.parallel.layout import Job, Layout, host_refusal, refusal, reshards_after_forward

# isort: split
from torchtitan.config.job_config import Parallelism

SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "dim": 32,
    "n_layers": 4,
    "n_heads": 4,
    "z_dim": 16,
    "value_dim": 32,
    "ffn_dim": 16,
    "cema_ndim": 4,
    "chunk_size": 16,
    "norm_groups": 4,
}
PP = r"`parallelism\.pipeline_parallel_degree`"
TP = r"`parallelism\.tensor_parallel_degree`"


def reason(layout: str, job: dict[str, Any] | None = None, **options: Any) -> str | None:
    facts: dict[str, Any] = {"lengths": {"training.seq_len": 128}, "local_rows": 4} | (job or {})
    return refusal(Layout.parse(layout), MegalodonConfig(**SIZES | options), Job(**facts))


@pytest.mark.parametrize("name", ["1", "cp 8", "fsdp 2 x cp 4", "replicate 2 x fsdp 4 x cp 2 x tp 2 x pp 2"])
def test_layouts_have_names(name: str) -> None:
    assert str(Layout.parse(name)) == name


@pytest.mark.parametrize("text", ["", "cp", "cp 0", "cp -2", "ring 2", "cp 2 x cp 2", "cp 2, tp 2", "cp ²"])
def test_what_is_no_layout_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="a layout must be degrees of"):
        Layout.parse(text)


def test_the_hosts_options_and_the_ranks_that_share_something() -> None:
    layout = Layout.parse("replicate 2 x fsdp 3 x cp 5 x pp 7")
    assert layout.options == {
        "parallelism.data_parallel_replicate_degree": 2,
        "parallelism.data_parallel_shard_degree": 3,
        "parallelism.context_parallel_degree": 5,
        "parallelism.tensor_parallel_degree": 1,
        "parallelism.pipeline_parallel_degree": 7,
    }
    assert (layout.gpus, layout.data, layout.shards) == (210, 6, 15)


def test_layers_are_gathered_again_as_the_host_says() -> None:
    found = {policy: [reshards_after_forward(policy, pp) for pp in (False, True)] for policy in ("always", "never")}
    assert found == {"always": [True, True], "never": [False, False]}
    assert [reshards_after_forward("default", pp) for pp in (False, True)] == [True, False]


@pytest.mark.parametrize("layout", ["1", "tp 4", "cp 8", "pp 4", "replicate 2 x fsdp 2", "cp 2 x tp 2 x pp 2"])
def test_layouts_that_are_taken(layout: str) -> None:
    assert reason(layout) is None


@pytest.mark.parametrize(
    ("layout", "job", "options", "message"),
    [
        ("tp 3", {}, {}, rf"^{TP} must divide `n_heads` = 4, but is 3; what would work: 1 or 2 or 4$"),
        ("tp 8", {}, {}, rf"^{TP} must divide `n_heads` = 4, but is 8; what would work: 1 or 2 or 4$"),
        ("tp 4", {}, {"norm_groups": 2}, rf"^{TP} must divide `norm_groups` = 2, but is 4; what would work: 1 or 2$"),
        ("tp 4", {}, {"ffn_dim": 18}, rf"^{TP} must divide `ffn_dim` = 18, but is 4; what would work: 1 or 2$"),
        ("tp 4", {}, {"output_size": 5}, r"a part of the 5 rows .* parts of 2, but is 4; what would work: 1 or 2$"),
        ("tp 4", {"gpus_per_node": 2}, {}, rf"^{TP} must divide the 2 GPUs of a node, but is 4$"),
        (
            "tp 2",
            {"float8": True},
            {},
            r"`megalodon.z_dim` must be a multiple of 32 for float8 .* = 2 ranks.* is 16",
        ),
        ("pp 2", {}, {"tie_embedding": True}, r"`megalodon.tie_embedding` must be false .* = 2"),
        ("pp 2", {"own_trainer": False}, {}, r"`parallelism.pipeline_parallel_degree` must be 1 .*cli\.train"),
        ("cp 2", {"own_trainer": False}, {}, r"`parallelism.context_parallel_degree` must be 1 .*cli\.train"),
        ("cp 2", {"carry_state": True}, {}, r"`parallelism.context_parallel_degree` must be 1 with .*, but is 2"),
        ("tp 2", {"carry_state": True}, {}, rf"{TP} must be 1 with `megalodon.carry_state`, but is 2"),
        ("pp 2", {"carry_state": True}, {}, r"`parallelism.pipeline_parallel_degree` must be 1 with .*, but is 2"),
        (
            "fsdp 2",
            {},
            {"hidden_dropout": 0.1},
            r"`megalodon.hidden_dropout` must be 0 with data parallel degree 2, ",
        ),
        ("tp 2", {}, {"dropout": 0.1}, r"`megalodon.dropout` must be 0 with tensor parallel degree 2, but is 0.1"),
        ("fsdp 2", {"rows": 12}, {}, r"`training.global_batch_size` must be a multiple of .* = 4 x 2, but is 12$"),
        (
            "pp 8",
            {"local_rows": 8},
            {},
            r"must be at most 6, so that each stage has at least 1 of `n_layers` = 4 .* 1 \+ 1 .*, but is 8$",
        ),
        ("pp 4", {"schedule": "interleaved1f1b"}, {}, r"must be at most 3, with 2 stages a rank, .*, but is 4$"),
        (
            "pp 2",
            {"less_layers": (3, 1), "layers_per_stage": 2, "schedule": "LoopedBFS"},
            {},
            r"`parallelism.pipeline_parallel_layers_per_stage` must make fewer .* at least 3 .* 3 \+ 1 .*, but is 2$",
        ),
        ("pp 4", {"parts": 3}, {}, rf"{PP} must be the 3 stages that .*module_fqns.*, but is 4$"),
        ("pp 4", {"layers_per_stage": 2}, {}, rf"{PP} must be the 3 stages that .*layers_per_stage.*, but is 4$"),
        ("pp 2", {"parts": 3, "schedule": "Interleaved1F1B"}, {}, r"must divide the 3 stages .*, but is 2$"),
        ("pp 2", {"parts": 2, "schedule": "ZBVZeroBubble"}, {}, r"must be half of the 2 stages .*, but is 2$"),
        ("pp 2", {"microbatch_rows": 0}, {}, r"_microbatch_size` must be at least 1, but is 0$"),
        ("pp 2", {"layers_per_stage": 0}, {}, r"_layers_per_stage` must be at least 1, but is 0$"),
        ("pp 2", {"less_layers": (1, -1)}, {}, r"_last_stage_less_layers` must be at least 0, but is -1$"),
        ("pp 2", {"microbatch_rows": 3}, {}, r"`training.local_batch_size` must be a multiple of .* = 3, but is 4$"),
        (
            "pp 4",
            {"local_rows": 2},
            {},
            r"`training.local_batch_size` must be at least .* = 1 x 4 under .*, but is 2; what would work: 4 rows",
        ),
    ],
)
def test_layouts_that_are_refused(layout: str, job: dict[str, Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        raise ValueError(reason(layout, job, **options))


@pytest.mark.parametrize(("length", "degree"), [(64, 4), (30, 1), (96, 3)])
def test_lengths_of_whole_chunks_are_accepted(length: int, degree: int) -> None:
    assert reason(f"cp {degree}", {"lengths": {"training.seq_len": length}}) is None


def test_other_lengths_are_refused_with_numbers_that_work() -> None:
    assert reason("cp 4", {"lengths": {"validation.seq_len": 96}}) == (
        "`validation.seq_len` must be a multiple of `megalodon.chunk_size` x `parallelism.context_parallel_degree` = "
        "16 x 4 = 64, so that every rank holds whole chunks, but is 96; what would work: `validation.seq_len` = 64 or "
        "128, or `parallelism.context_parallel_degree` = 1 or 2 or 3 or 6"
    )


def test_stages_of_a_pipeline_may_drop_at_random() -> None:
    assert reason("pp 2", dropout=0.1) is None


def test_presets_can_be_shared() -> None:
    job = Job({"training.seq_len": 4096})
    for degree in (1, 2, 4):
        assert refusal(Layout(tp=degree), PRESETS["paper_7B"], job) is None
    for degree in (1, 2):
        assert refusal(Layout(tp=degree), PRESETS["debug"], job) is None


def test_any_model_of_the_host_is_refused_what_its_rows_and_layers_do_not_allow() -> None:
    job = Job({"training.seq_len": 4096}, local_rows=4, rows=4)
    assert host_refusal(Layout(tp=3, cp=7), 4, job) is None
    assert host_refusal(Layout(pp=4), 4, job) is None
    assert "must be a multiple of" in str(host_refusal(Layout(dp_shard=2), 4, job))
    assert "must be at most 3, " in str(host_refusal(Layout(pp=4), 1, job))


def test_a_file_of_the_schedule_has_its_own_microbatches_but_not_its_own_stages() -> None:
    written = {"schedule_csv": "schedule.csv", "local_rows": 1}
    assert reason("pp 4", {"local_rows": 1}) is not None
    assert reason("pp 4", written) is None
    assert reason("pp 4", written | {"parts": 4}) is None
    assert "must be the 8 stages" in str(reason("pp 4", written | {"parts": 8}))


class AnyStage:
    """In place of PyTorch's stage, which would talk to other ranks."""

    is_first = is_last = True

    def __init__(self, submod: Any, *_: Any, **__: Any):
        self.submod = submod


def host_takes(degree: int, n_layers: int, parallelism: Any, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the host cuts a model into the stages of a rank."""
    from torchtitan.distributed import pipeline_parallel

    monkeypatch.setattr(pipeline_parallel, "PipelineStage", AnyStage)
    monkeypatch.setattr(pipeline_parallel, "build_pipeline_schedule", lambda *_: None)
    group = SimpleNamespace(size=lambda: degree, get_local_rank=lambda: 0, get_group=lambda _: None)
    ranks = SimpleNamespace(pp=degree, get_mesh=lambda _: group)
    model = nn.ModuleDict({"layers": nn.ModuleDict()})
    try:
        pipeline_parallel.pipeline_llm(
            model,
            ranks,  # type: ignore[arg-type]
            SimpleNamespace(parallelism=parallelism),  # type: ignore[arg-type]
            torch.device("cpu"),
            SimpleNamespace(n_layers=n_layers),  # type: ignore[arg-type]
            lambda part, *_: part,
            lambda *_: None,  # type: ignore[arg-type, return-value]
        )
    except (ValueError, AssertionError):
        return False
    return True


@pytest.mark.parametrize("schedule", ["1F1B", "GPipe", "Interleaved1F1B", "ZBVZeroBubble", "dualpipev"])
@pytest.mark.parametrize("layers_per_stage", [None, 1, 2, 3])
def test_stages_are_refused_where_the_host_refuses_them(
    schedule: str, layers_per_stage: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = []
    for n_layers, degree, first, last in itertools.product(range(1, 7), range(2, 9), range(4), range(3)):
        parallelism = Parallelism(
            pipeline_parallel_schedule=schedule,
            pipeline_parallel_layers_per_stage=layers_per_stage,
            pipeline_parallel_first_stage_less_layers=first,
            pipeline_parallel_last_stage_less_layers=last,
        )
        job = Job({}, 8, None, 1, schedule, None, layers_per_stage, (first, last))
        case = n_layers, degree, first, last
        found = host_refusal(Layout(pp=degree), n_layers, job)
        taken.append(host_takes(degree, n_layers, parallelism, monkeypatch))
        assert (found is None) == taken[-1], (case, found)
    assert any(taken) and not all(taken)
