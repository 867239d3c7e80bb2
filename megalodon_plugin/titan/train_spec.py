"""What torchtitan needs to know to train a Megalodon."""

from torchtitan.components.lr_scheduler import build_lr_schedulers
from torchtitan.distributed.pipeline_parallel import pipeline_llm
from torchtitan.protocols.train_spec import TrainSpec

from megalodon_plugin.model import Megalodon

from .dataloader import build_text_dataloader
from .loss import build_loss
from .metrics import build_metrics
from .model_args import Flavors
from .optimizer import build_megalodon_optimizers
from .parallelize import parallelize_megalodon
from .state_dict_adapter import MegalodonStateDictAdapter
from .tokenizer import build_tokenizer
from .validator import build_validator


def megalodon_train_spec() -> TrainSpec:
    """The train spec that `model.name = "megalodon"` names."""
    return TrainSpec(
        model_cls=Megalodon,  # type: ignore[arg-type]  # has the protocol's methods without its base class
        model_args=Flavors(),
        parallelize_fn=parallelize_megalodon,
        pipelining_fn=pipeline_llm,
        build_optimizers_fn=build_megalodon_optimizers,
        build_lr_schedulers_fn=build_lr_schedulers,
        build_dataloader_fn=build_text_dataloader,
        build_tokenizer_fn=build_tokenizer,
        build_loss_fn=build_loss,
        build_validator_fn=build_validator,
        build_metrics_processor_fn=build_metrics,
        state_dict_adapter=MegalodonStateDictAdapter,
    )
