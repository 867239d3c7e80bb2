"""torchtitan's Trainer with what Megalodon runs need of it; start it by `megalodon_plugin.cli.train`."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.distributed import ParallelDims
from torchtitan.tools import utils
from torchtitan.tools.logging import logger
from torchtitan.train import Trainer

from . import job_rules
from .carried_state import CarriedStates, StateKeepingLoss
from .checkpoint_checks import (
    check_data,
    check_fits,
    check_same_shapes,
    checkpoint_to_load,
    loads_model_only,
    remove_incomplete,
    saved_tensors,
)
from .data_source import use_hosts_validation_data
from .dataloader import Batch, DocumentLoader
from .host_patches import around_load
from .loss import ScaledLoss
from .loss_totals import LossTotals, count_labels
from .metrics import JsonLinesMetrics, StepNumbers
from .model_args import MegalodonModelArgs
from .model_json import write_model_json

RANDOM_STATE, CARRIED_STATE = "random state", "carried state"


class MegalodonTrainer(Trainer):
    """`Trainer` that also

    * keeps the random state in the checkpoint, so that dropout resumes exactly;
    * checks the checkpoint before it is loaded (see `checkpoint_checks`);
    * scales the loss before the backward pass under pipeline parallelism;
    * counts tokens and losses so that records and checkpoints are right under every layout (see `JsonLinesMetrics`):
      `ntokens_seen` counts the tokens of all ranks, whatever their number;
    * carries the model's state from step to step with `megalodon.carry_state` (see `carried_state`);
    * writes `model.json`, the model's configuration, into the dump folder, for whoever reads the checkpoint.

    The host's own models train under it as they do under `Trainer`.
    """

    loss_fn: Any
    _carried: CarriedStates | None = None
    # Of RANDOM_STATE and CARRIED_STATE, what `state_dict` leaves out at the moment.
    _left_out: frozenset[str] = frozenset()

    def __init__(self, job_config: Any):
        if job_config.model.name == "megalodon":
            job_rules.use_own_trainer(job_config)
        else:
            job_rules.check_other_model(job_config)
            use_hosts_validation_data(job_config)
        if job_config.training.enable_cpu_offload and utils.device_type == "cpu":
            raise ValueError("`training.enable_cpu_offload` must be false on a machine without a GPU, but is true")
        super().__init__(job_config)
        self._step_totals = LossTotals(self.device)
        # The host's own models have the host's metrics, which want the host's counts.
        self._counts_whole_job = isinstance(self.metrics_processor, JsonLinesMetrics)
        if isinstance(self.metrics_processor, JsonLinesMetrics):
            self.metrics_processor.numbers_of_step = self._numbers_of_step
        if isinstance(self.dataloader, DocumentLoader):
            self._carry(self.dataloader)
        if job_config.checkpoint.create_seed_checkpoint:
            self._write_model_json()

    def _carry(self, dataloader: DocumentLoader) -> None:
        training = self.job_config.training
        whole_chunks = training.seq_len % self.model_args.chunk_size == 0
        dtype = TORCH_DTYPE_MAP[training.mixed_precision_param]
        model: Any = self.model_parts[0]
        carried = CarriedStates(model, dataloader.lanes, training.local_batch_size, dtype, self.device, whole_chunks)
        self._carried = carried
        self.loss_fn = StateKeepingLoss(self.loss_fn, carried)  # not the validator's
        chunk = "ends with a chunk" if whole_chunks else "may end inside a chunk, whose keys and values are carried too"
        logger.info(
            f"Carried state: a row of a step continues the one of the step before, {training.seq_len} tokens of one "
            f"document a step, and {chunk}. Gradients stop at a row's start"
        )

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        if RANDOM_STATE not in self._left_out:
            # Ranks of one pipeline stage share their random state, so it has one name for all of them.
            stage = self.parallel_dims.get_mesh("pp").get_local_rank() if self.parallel_dims.pp_enabled else 0
            state[f"random_state_{stage}"] = torch.get_rng_state()
            if utils.device_type != "cpu":
                state[f"{utils.device_type}_random_state_{stage}"] = utils.device_module.get_rng_state()
        if self._carried is not None and CARRIED_STATE not in self._left_out:
            state |= self._carried.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for name, value in state_dict.items():
            if name.startswith("random_state"):
                torch.set_rng_state(value)
            elif name.startswith(f"{utils.device_type}_random_state"):
                utils.device_module.set_rng_state(value)
        if self._carried is not None and CARRIED_STATE not in self._left_out:
            self._carried.load_state_dict(state_dict)

    def train(self) -> None:
        self._prepare_checkpoints()
        self._write_model_json()  # not before the checks: those of another configuration leave the file as it is
        super().train()

    def _prepare_checkpoints(self) -> None:
        dump_folder = Path(self.job_config.job.dump_folder)
        checkpoint_options = self.job_config.checkpoint
        if checkpoint_options.enable and not checkpoint_options.load_only and torch.distributed.get_rank() == 0:
            remove_incomplete(dump_folder / checkpoint_options.folder)
        torch.distributed.barrier()
        checkpoint = checkpoint_to_load(self.job_config)
        saved = saved_tensors(checkpoint) if checkpoint is not None else None
        if checkpoint is None or saved is None:
            return
        check_fits(checkpoint, saved, self.model_parts)
        if loads_model_only(self.job_config, checkpoint):
            return
        with_data = "dataloader" not in checkpoint_options.exclude_from_loading
        if with_data:
            check_data(checkpoint, saved, self.dataloader)
        if self._carried is not None:
            job_rules.check_loading_of_carried_state(self.job_config)
            if with_data:
                check_same_shapes(checkpoint, saved, self._carried.state_dict())
            else:
                around_load(self.checkpointer, partial(self._leaving_out, CARRIED_STATE))  # all rows begin a document
        if any("random_state" in name and f"train_state.{name}" not in saved for name in self.state_dict()):
            logger.warning("The checkpoint holds no random state for this layout: dropout will not resume exactly")
            around_load(self.checkpointer, partial(self._leaving_out, RANDOM_STATE))

    @contextmanager
    def _leaving_out(self, what: str) -> Iterator[None]:
        before = self._left_out
        self._left_out = before | {what}
        try:
            yield
        finally:
            self._left_out = before

    def _write_model_json(self) -> None:
        if isinstance(self.model_args, MegalodonModelArgs) and torch.distributed.get_rank() == 0:
            write_model_json(self.job_config, self.model_args)

    def batch_generator(self, data_iterable: Iterable[Batch]) -> Iterator[Batch]:
        for input_dict, labels in super().batch_generator(data_iterable):
            if self._counts_whole_job:
                # The host has added this rank's tokens.
                self.ntokens_seen += tokens_of_other_ranks(labels.numel(), self.parallel_dims)
            yield input_dict, labels

    def train_step(self, data_iterator: Iterator[Batch]) -> None:
        self._step_totals.clear()
        if self._carried is not None:
            self._carried.begin_step()
        super().train_step(data_iterator)

    def post_dataloading_process(self, input_dict: dict[str, Tensor], labels: Tensor):
        begins = input_dict.pop("begins") if self._carried is not None else None
        processed = super().post_dataloading_process(input_dict, labels)
        if self._carried is not None and begins is not None:
            processed[3].update(state=self._carried.before(begins, labels), return_state=True)
        own_labels = processed[1]  # under context parallelism the slice of this rank
        self._own_tokens = count_labels(own_labels)
        return processed

    def _numbers_of_step(self) -> StepNumbers:
        of_carried = {} if self._carried is None else self._carried.numbers_of_step()
        return StepNumbers(self._step_totals.over_ranks(), self.ntokens_seen, of_carried)

    def forward_backward_step(
        self, *, input_dict: dict[str, Tensor], labels: Tensor, global_valid_tokens: Any
    ) -> Tensor:
        loss = self._scaled_before_backward(
            input_dict=input_dict, labels=labels, global_valid_tokens=global_valid_tokens
        )
        if not self.parallel_dims.pp_enabled or self.pp_has_last_stage:
            self._step_totals.add(loss.detach().double() * global_valid_tokens, self._own_tokens)
        return loss

    def _scaled_before_backward(
        self, *, input_dict: dict[str, Tensor], labels: Tensor, global_valid_tokens: Any
    ) -> Tensor:
        if not self.parallel_dims.pp_enabled or not isinstance(self.loss_fn, ScaledLoss):
            return super().forward_backward_step(
                input_dict=input_dict, labels=labels, global_valid_tokens=global_valid_tokens
            )
        with self.loss_fn.scaled_by(1.0 / global_valid_tokens):
            # The losses come back scaled; the host's division by a count of 1 leaves them so.
            one = torch.ones((), device=self.device)
            return super().forward_backward_step(input_dict=input_dict, labels=labels, global_valid_tokens=one)


def tokens_of_other_ranks(n_own: int, parallel_dims: ParallelDims) -> int:
    """Tokens that the job's other ranks have received while this one has received `n_own`.

    Every data parallel rank has received as many; all other ranks share their rows.
    """
    return (parallel_dims.dp_replicate * parallel_dims.dp_shard - 1) * n_own
