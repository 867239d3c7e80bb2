"""Applies the host's techniques to the model, in this order: tensor parallelism, chunk parallelism, activation
checkpointing, torch.compile, FSDP2 (sharding, replication, or both).
"""

from typing import Any, cast

from torch import nn
from torchtitan.distributed import ParallelDims
from torchtitan.models.llama3.infra.parallelize import apply_compile
from torchtitan.tools.logging import logger

from megalodon_plugin.model.output import OutputLayer
from megalodon_plugin.parallel.chunk import apply_chunk_parallel
from megalodon_plugin.parallel.collectives import Ranks
from megalodon_plugin.parallel.tensor_plan import apply_tensor_parallel

from .activation_checkpointing import checkpoint_activations
from .fsdp import data_mesh, shard_model
from .job_config import TrainingOptions
from .stage import MegalodonStage


def parallelize_megalodon(model: nn.Module, parallel_dims: ParallelDims, job_config: Any) -> nn.Module:
    """The model, or a pipeline stage of it, with what the job asks for. Call it on the meta device.

    That the layout can train the model has been checked with the job (see `job_rules`).
    """
    stage = cast(MegalodonStage, model)
    options = getattr(job_config, "megalodon", None) or TrainingOptions()
    stage.weight_decay_on = options.weight_decay_on
    if parallel_dims.tp_enabled:
        loss_parallel = not job_config.parallelism.disable_loss_parallel
        apply_tensor_parallel(stage, parallel_dims.get_mesh("tp"), loss_parallel)
        logger.info("Applied Tensor Parallelism to the model: features between blocks, heads inside attention")
    if parallel_dims.cp_enabled:
        apply_chunk_parallel(model, Ranks.of(parallel_dims.get_mesh("cp").get_group()))
        logger.info("Applied Chunk Parallelism to the model on the context parallel mesh")
    _set_loss(stage, parallel_dims, options.loss_chunk_tokens, job_config)
    compile_model = job_config.compile.enable and "model" in job_config.compile.components
    if job_config.activation_checkpoint.mode != "none":
        checkpoint_activations(stage, job_config, compile_model)
    if compile_model:
        apply_compile(model, job_config.compile)
        if parallel_dims.cp_enabled and stage.norm is not None:
            # Its summary's backward pass would else be several passes over the features.
            stage.norm.compile(backend=job_config.compile.backend, fullgraph=True)
    mesh = data_mesh(parallel_dims, job_config.training.mixed_precision_param != "float32")
    if mesh is not None:
        shard_model(stage, mesh, parallel_dims, job_config)
    return model


def _set_loss(stage: MegalodonStage, parallel_dims: ParallelDims, rows: int, job_config: Any) -> None:
    """End in the loss, `rows` positions at a time, where this rank has all of the output layer and the loss follows the
    model; 0: never.
    """
    if rows == 0 or parallel_dims.tp_enabled or parallel_dims.pp_enabled or not isinstance(stage.output, OutputLayer):
        return
    stage.logits_in_loss = True
    stage.output.rows_at_once = rows
    stage.output.compile_loss = job_config.compile.enable and "loss" in job_config.compile.components
