"""Training with a carried state: whole runs against the model's streaming by hand, resuming, and refusals."""

import itertools
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from megalodon_plugin.model import Megalodon
from megalodon_plugin.model.state import MegalodonState
from megalodon_plugin.titan import job_rules
from megalodon_plugin.titan.carried_state import CarriedStates
from megalodon_plugin.titan.dataloader import DocumentLoader, build_text_dataloader
from megalodon_plugin.titan.load_model import load_checkpoint
from megalodon_plugin.titan.model_args import Flavors
from megalodon_plugin.titan.tokenizer import ByteTokenizer

from support.ranks import run_on_ranks
from support.small_model import small_model
from support.tiny_job import losses_and_norms, read_job, read_records, train, train_and_kill, train_well, write_job

MEAN, LONGEST, FILLED = (f"carried_context/{name}" for name in ("mean(tokens)", "longest(tokens)", "filled(%)"))


def carrying_job(folder: Path, seq_len: int = 40, **sections: dict[str, Any]) -> Path:
    """Two rows a batch, two batches a step. Six texts of different lengths, some of which end within the run."""
    own: dict[str, dict[str, Any]] = {
        "megalodon": {"carry_state": True},
        "training": {"local_batch_size": 2, "global_batch_size": 4, "seq_len": seq_len},
    }
    for name, options in sections.items():
        own[name] = own.get(name, {}) | options
    config = write_job(folder, **own)
    for n in range(1, 7):
        (folder / "texts" / f"{n}.txt").write_text("\n".join(f"{n} times {i} is {n * i}." for i in range(1 + 5 * n)))
    return config


def by_hand(config: Path, model: Megalodon, n_steps: int) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step of a run that leaves the weights as they are.

    Each lane is streamed by itself: its document from the start in a state of its own, cut from the row before.
    """
    job = read_job(config)
    loader = build_text_dataloader(1, 0, ByteTokenizer(), job)
    assert isinstance(loader, DocumentLoader)
    streams = [loader._corpus.row_stream(lane, cursor) for lane, cursor in loader._cursors.items()]
    states: list[MegalodonState | None] = [None] * len(streams)
    found = []
    model.train()
    for _ in range(n_steps):
        losses, n_tokens = [], 0
        model.zero_grad()
        for lane, stream in enumerate(streams):
            row = stream.next_row()
            tokens = torch.from_numpy(row.tokens).long()
            state = None if row.begins or states[lane] is None else states[lane]
            logits, after = model(tokens[None, :-1], state=state, return_state=True)
            losses.append(F.cross_entropy(logits[0], tokens[1:], reduction="sum"))
            n_tokens += len(tokens) - 1
            states[lane] = after.detach()
        loss = torch.stack(losses).sum() / n_tokens
        loss.backward()
        norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
        found.append((loss.item(), norm.item()))
    return found


@pytest.mark.parametrize("seq_len", [10, 23, 32], ids=lambda length: f"L{length}")
def test_a_run_is_the_streaming_of_its_documents(tmp_path: Path, seq_len: int) -> None:
    """Rows shorter than a chunk, of another length than chunks, and of whole chunks."""
    config = carrying_job(tmp_path, seq_len, optimizer={"lr": 0.0})
    log = train_well(config, "--training.steps", "9", "--checkpoint.interval", "9")
    assert "Carried state: a row of a step continues the one" in log
    records = read_records(tmp_path / "run")
    model = load_checkpoint(tmp_path / "run" / "checkpoint" / "step-9")[0]
    expected = by_hand(config, model, 9)
    assert len({loss for loss, _ in expected}) == 9
    for (loss, norm), (wanted_loss, wanted_norm) in zip(losses_and_norms(records).values(), expected, strict=True):
        assert loss == pytest.approx(wanted_loss, rel=1e-5)
        assert norm == pytest.approx(wanted_norm, rel=1e-4)
    assert [record[LONGEST] for record in records[:3]] == [0, seq_len, 2 * seq_len]
    contexts = [record[MEAN] for record in records]
    restarted = any(after < before + seq_len for before, after in itertools.pairwise(contexts))
    assert restarted == any(record[FILLED] < 100 for record in records)
    assert restarted or seq_len == 10


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a job that ran its ten steps, of rows that end inside chunks, without a break."""
    folder = tmp_path_factory.mktemp("unbroken")
    train_well(carrying_job(folder), "--training.steps", "10")
    return folder


def close(found: dict[int, tuple[float, float]], expected: dict[int, tuple[float, float]]) -> bool:
    return all(numbers == pytest.approx(expected[step], rel=1e-4) for step, numbers in found.items())


def test_a_killed_run_continues_to_the_last_bit(unbroken: Path, tmp_path: Path) -> None:
    config, run = carrying_job(tmp_path), tmp_path / "run"
    train_and_kill(config, "step:  5")
    killed = len(read_records(run))
    train_well(config, "--training.steps", "10")
    resumed = read_records(run)[killed:]
    assert resumed[0]["step"] == 4 and resumed[-1]["step"] == 10
    assert resumed[0][LONGEST] > 0
    whole = losses_and_norms(read_records(unbroken / "run"))
    assert losses_and_norms(read_records(run)) == whole and len(set(whole.values())) == 10


def test_two_ranks_are_one_and_continue_from_one(unbroken: Path, tmp_path: Path) -> None:
    """The same rows and states, whether a step is two batches of one process or one batch of each of two."""
    whole = losses_and_norms(read_records(unbroken / "run"))
    config, run = carrying_job(tmp_path), tmp_path / "run"
    train_well(config, "--training.steps", "3")
    before = len(read_records(run))
    train_well(config, "--training.steps", "7", processes=2)
    later = read_records(run)[before:]
    assert later[0]["step"] == 4 and later[0][LONGEST] == 120
    assert close(losses_and_norms(later), whole)
    # And back to one, with the ranks' states from the checkpoint.
    before = len(read_records(run))
    train_well(config, "--training.steps", "10", "--training.local_batch_size", "1")
    assert close(losses_and_norms(read_records(run)[before:]), whole)


def test_a_checkpoint_of_other_rows_ends_the_run(unbroken: Path, tmp_path: Path) -> None:
    config = carrying_job(tmp_path)
    (unbroken / "run").rename(tmp_path / "run")
    for options in (["--training.global_batch_size", "2"], ["--megalodon.no_carry_state"]):
        result = train(config, "--training.steps", "12", *options)
        assert result.returncode != 0 and "where that is true, the rows of a step. Set it back" in result.stdout
    result = train(config, "--training.steps", "12", "--megalodon.chunk_size", "8")
    assert result.returncode != 0
    assert re.search(r"must hold the state that the rows of .* `carried_float32_0` of shape", result.stdout)
    exclude = "--checkpoint.exclude_from_loading"
    result = train(config, "--training.steps", "12", exclude, "train_state")
    assert result.returncode != 0 and "must not name train_state without dataloader" in result.stdout
    # Data from their beginning: every row begins a document, and no state is asked for.
    before = len(read_records(tmp_path / "run"))
    train_well(config, "--training.steps", "11", "--megalodon.chunk_size", "8", exclude, "dataloader")
    (record,) = read_records(tmp_path / "run")[before:]
    assert record["step"] == 11 and record[LONGEST] == 0
    (tmp_path / "run").rename(unbroken / "run")


def test_validation_carries_nothing(tmp_path: Path) -> None:
    options = {"enable": True, "dataset": "local_text", "local_batch_size": 1, "seq_len": 30, "freq": 2, "steps": 2}
    sections = {"validation": options | {"dataset_path": str(tmp_path / "texts")}, "data": {"validation_fraction": 0.2}}
    config = carrying_job(tmp_path, 32, training={"global_batch_size": 2}, optimizer={"lr": 0.0}, **sections)
    train_well(config, "--training.steps", "4", "--checkpoint.no_enable")
    losses = [record["validation_metrics/loss"] for record in read_records(tmp_path / "run", "validation")]
    assert len(losses) == 3 and len(set(losses)) == 1


def tokens_of(batch: int, length: int) -> Tensor:
    return torch.randint(31, (batch, length), generator=torch.Generator().manual_seed(1))


def test_a_row_starts_again_where_its_document_begins() -> None:
    model = small_model()
    states = CarriedStates(model, [0, 1, 2, 3], 2, torch.float32, torch.device("cpu"), whole_chunks=False)
    tokens = tokens_of(4, 10)
    for begins in ([True] * 4, [False, True, True, False]):
        states.begin_step()
        outputs = []
        for micro in range(2):
            rows = slice(2 * micro, 2 * micro + 2)
            state = states.before(torch.tensor(begins[rows]), tokens[rows])
            logits, after = model(tokens[rows], state=state, return_state=True)
            states.after(after)
            outputs.append(logits)
        found = torch.cat(outputs)
        assert all(not leaf.requires_grad for state in states._states for leaf in pytree.tree_leaves(state))
    once = model(tokens)
    twice = model(torch.cat([tokens, tokens], 1))[:, 10:]
    for row, began in enumerate(begins):
        torch.testing.assert_close(found[row], (once if began else twice)[row], rtol=1e-4, atol=1e-5)
    again = CarriedStates(model, [2, 3], 1, torch.float32, torch.device("cpu"), whole_chunks=False)
    again.load_state_dict(states.state_dict())
    want = states._states[1]
    for i, state in enumerate(again._states):
        torch.testing.assert_close(state, want.select([i]), rtol=0, atol=0)


def test_whole_chunks_need_no_caches() -> None:
    model, tokens = small_model(), tokens_of(2, 48)
    state = model.empty_state(2).without_caches()
    pieces = []
    for piece in tokens.split(16, 1):
        logits, state = model(piece, state=state, return_state=True)
        pieces.append(logits)
    assert all(layer.k.numel() == layer.v.numel() == 0 for layer in state.layers)
    torch.testing.assert_close(torch.cat(pieces, 1), model(tokens), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"must be multiples of `chunk_size` = 8, but one has 12 timesteps"):
        model(tokens[:, :12], state=state, return_state=True)


def dtypes_that_cema_gets() -> tuple[torch.dtype, torch.dtype]:
    """Of activations and state, in a layer that FSDP2 runs in bfloat16."""
    from megalodon_plugin.titan.fsdp import shard_model

    training = SimpleNamespace(
        mixed_precision_param="bfloat16", mixed_precision_reduce="float32", enable_cpu_offload=False
    )
    job = SimpleNamespace(training=training, parallelism=SimpleNamespace(fsdp_reshard_after_forward="default"))
    model = small_model()
    shard_model(model, init_device_mesh("cpu", (2,)), SimpleNamespace(pp_enabled=False), job)  # type: ignore[arg-type]
    found: list[torch.dtype] = []
    cema: Any = model.layers["1"].attention.cema  # type: ignore[union-attr]
    cema.register_forward_pre_hook(lambda _, args: found.extend(arg.dtype for arg in args[:2]))
    model(tokens_of(2, 10), state=model.empty_state(2, torch.bfloat16), return_state=True)
    return found[0], found[1]


def test_fsdp_does_not_round_the_state() -> None:
    assert run_on_ranks(2, dtypes_that_cema_gets) == [(torch.bfloat16, torch.float32)] * 2


def check(config: Path, *options: str, own_trainer: bool = True) -> Any:
    job = read_job(config, *options)
    if own_trainer:
        job_rules.use_own_trainer(job)
    Flavors()["debug"].update_from_config(job)
    return job


@pytest.mark.parametrize("degree", ["context", "tensor", "pipeline"])
def test_ranks_that_share_a_row_are_refused(tmp_path: Path, degree: str) -> None:
    key = f"{degree}_parallel_degree"
    config = carrying_job(tmp_path, 32, parallelism={key: 2})
    with pytest.raises(ValueError, match=rf"`parallelism\.{key}` must be 1 with `megalodon\.carry_state`, but is 2"):
        check(config)


def test_attention_dropout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`megalodon\.attention_dropout` must be 0 with .*, but is 0\.1"):
        check(carrying_job(tmp_path, megalodon={"attention_dropout": 0.1}))
    assert check(carrying_job(tmp_path, megalodon={"dropout": 0.1}))


def test_the_option_in_a_file_and_on_the_command_line(tmp_path: Path) -> None:
    assert read_job(write_job(tmp_path)).megalodon.carry_state is False
    assert check(write_job(tmp_path), "--megalodon.carry_state").megalodon.carry_state is True
    config = carrying_job(tmp_path)
    assert check(config).megalodon.carry_state is True
    assert check(config, "--megalodon.no_carry_state").megalodon.carry_state is False


@pytest.mark.filterwarnings("ignore::UserWarning:tyro.*")
def test_the_option_is_true_or_false(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`megalodon\.carry_state` must be true or false, but is 'yes'"):
        check(carrying_job(tmp_path, megalodon={"carry_state": "yes"}))


def test_the_stock_entry_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`megalodon\.carry_state` must be false when torchtitan's own .*cli\.train"):
        check(carrying_job(tmp_path), own_trainer=False)


def test_other_models_are_refused(tmp_path: Path) -> None:
    from megalodon_plugin.titan.trainer import MegalodonTrainer

    config = carrying_job(tmp_path, model={"name": "llama3"})
    with pytest.raises(ValueError, match=r"`megalodon\.carry_state` must be false .* `model\.name` = \"llama3\""):
        MegalodonTrainer(read_job(config))
