"""Validation: the mean loss over the validation data, the same under every layout."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.pipelining.schedules import ScheduleDualPipeV, ScheduleZBVZeroBubble
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.components.validate import Validator
from torchtitan.config.job_config import Validation
from torchtitan.distributed import utils as dist_utils
from torchtitan.distributed.context_parallel import prepare_context_parallel_input
from torchtitan.tools import utils

from .dataloader import Batch, build_text_validation_dataloader
from .loss_totals import LossTotals, count_labels
from .metrics import counted_apart


class MegalodonValidator(Validator):
    """`Validator` over the plugin's data, whose loss is the sum of the losses divided by the number of tokens.

    Both are summed over all batches and ranks. The host's own averages the batches' losses, which weighs their tokens
    unequally, reports context parallel degree times the loss, and a negative number where the last stage is not.

    Every rank takes part in as many batches as the one that has most: where ranks have different numbers of them
    (`validation.steps` = -1 on data that do not divide evenly), those that have run out continue with batches without a
    label that counts. So no rank waits for another forever, and every row counts once.

    Raises:
        ValueError: pipeline stages are asked for batches of another shape than training's, or the schedule
            is one that torch cannot run forward only.
    """

    def __init__(self, job_config: Any, dp_world_size: int, dp_rank: int, tokenizer: Any, **parts: Any):
        self.job_config = job_config
        self.tokenizer = tokenizer
        for name, part in parts.items():  # named as the host's Trainer passes them
            setattr(self, name, part)
        if self.parallel_dims.pp_enabled:
            _check_pipeline(job_config, self.pp_schedule)
        self.validation_dataloader = build_text_validation_dataloader(
            dp_world_size, dp_rank, tokenizer, job_config, infinite=job_config.validation.steps != -1
        )

    def post_dataloading_process(self, input_dict: dict[str, Tensor], labels: Tensor, model_parts: Any):
        """This rank's slice of inputs and labels, and what else the model is called with.

        The host's version also asks the model for attention masks, which Megalodon does not take.
        """
        inputs = input_dict["input"]
        extra_kwargs: dict[str, Any] = {}
        if self.parallel_dims.cp_enabled:
            cp_mesh = self.parallel_dims.get_mesh("cp")
            # No load balancer, as in training: a recurrent model needs contiguous slices.
            inputs, labels, extra_kwargs = prepare_context_parallel_input(
                inputs, labels, extra_kwargs, cp_mesh, inputs.device, load_balancer_type=None
            )
        return inputs, labels, {}, extra_kwargs

    @torch.no_grad()
    def validate(self, model_parts: list[nn.Module], step: int) -> None:
        """Log the mean loss over the validation data, or over `validation.steps` batches a rank of them.

        Raises:
            ValueError: the data are empty.
        """
        totals = LossTotals(utils.device_type)
        self._eval_mode(model_parts)
        with counted_apart(self.metrics_processor):
            batches = equally_many(self.validation_dataloader, self.job_config.validation, self._any_rank)
            for input_dict, labels in batches:
                self.metrics_processor.ntokens_since_last_log += int(count_labels(labels))
                self._add_losses(totals, model_parts, input_dict, labels)
            self.metrics_processor.log_validation(loss=totals.over_ranks().mean, step=step)
        for part in model_parts:
            part.train()

    def _eval_mode(self, model_parts: list[nn.Module]) -> None:
        for part in model_parts:
            part.eval()
            if self.parallel_dims.pp_enabled and getattr(part, "output", None) is not None:
                # Training mode of the stage itself, not of its children, changes nothing but the dtype of its logits.
                # Torch 2.11 refuses another dtype than that of the schedule's first call, in training; the loss casts
                # to float32 itself.
                part.training = True

    def _any_rank(self, has_batch: bool) -> bool:
        own = torch.tensor(int(has_batch), device=utils.device_type)
        return bool(dist_utils.dist_max(own, self.parallel_dims.get_optional_mesh("batch")))

    def _add_losses(
        self, totals: LossTotals, model_parts: list[nn.Module], input_dict: dict[str, Tensor], labels: Tensor
    ) -> None:
        input_dict = {name: value.to(utils.device_type) for name, value in input_dict.items()}
        inputs, labels, _, extra_kwargs = self.post_dataloading_process(
            input_dict, labels.to(utils.device_type), model_parts
        )
        with self.validation_context(), self.maybe_enable_amp:
            if self.parallel_dims.pp_enabled:
                loss_sum = self._pipeline_loss(inputs, labels, extra_kwargs)
            else:
                loss_sum = self.loss_fn(model_parts[0](inputs, **extra_kwargs), labels)
        if loss_sum is not None:
            totals.add(loss_sum, count_labels(labels))

    def _pipeline_loss(self, inputs: Tensor, labels: Tensor, extra_kwargs: dict[str, Any]) -> Tensor | None:
        """Sum of the losses of a batch, (); None on a rank without the last stage."""
        assert self.pp_schedule is not None
        losses: list[Tensor] = []
        self.pp_schedule.eval(
            *([inputs] if self.pp_has_first_stage else []),
            **extra_kwargs,
            target=labels if self.pp_has_last_stage else None,
            losses=losses if self.pp_has_last_stage else None,
            return_outputs=False,
        )
        return torch.stack(losses).sum() if losses else None


def equally_many(own: Iterable[Batch], options: Validation, any_rank: Callable[[bool], bool]) -> Iterator[Batch]:
    """The rank's own batches, all of one shape, and empty ones until no rank has a batch or `options.steps` are done.

    Args:
        any_rank: whether any rank says true.

    Raises:
        ValueError: no rank has a batch.
    """
    batches = iter(own)
    for i in itertools.count() if options.steps == -1 else range(options.steps):
        batch = next(batches, None)
        if not any_rank(batch is not None):
            if i == 0:
                raise ValueError("`validation.dataset` must hold text for at least one batch, but it is empty")
            return
        yield _filled(batch, options)


def _filled(batch: Batch | None, options: Validation) -> Batch:
    """The batch with rows up to `validation.local_batch_size`, none of whose labels count."""
    n_rows = 0 if batch is None else len(batch[1])
    missing = (options.local_batch_size - n_rows, options.seq_len)
    inputs, labels = torch.zeros(missing, dtype=torch.int64), torch.full(missing, IGNORE_INDEX)
    if batch is None:
        return {"input": inputs}, labels
    return {"input": torch.cat([batch[0]["input"], inputs])}, torch.cat([batch[1], labels])


def _check_pipeline(job_config: Any, pp_schedule: Any) -> None:
    if isinstance(pp_schedule, (ScheduleZBVZeroBubble, ScheduleDualPipeV)):
        schedule = job_config.parallelism.pipeline_parallel_schedule
        raise ValueError(
            f'`validation.enable` must be false with `parallelism.pipeline_parallel_schedule` = "{schedule}", which '
            "PyTorch cannot run without a backward pass; it can run Interleaved1F1B and 1F1B"
        )
    for key in ("local_batch_size", "seq_len"):
        training, validation = (getattr(getattr(job_config, section), key) for section in ("training", "validation"))
        if training != validation:
            raise ValueError(
                f"`validation.{key}` must be `training.{key}`, {training}, under pipeline parallelism, whose stages "
                f"exchange tensors of one shape, but is {validation}"
            )


def build_validator(job_config: Any, **parts: Any) -> MegalodonValidator:
    """`build_validator_fn` of the train spec."""
    return MegalodonValidator(job_config, **parts)
