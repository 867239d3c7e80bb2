"""The host's validator over the plugin's data sets."""

from typing import Any

from torch import Tensor
from torchtitan.components.validate import Validator

from .dataloader import build_text_validation_dataloader


class MegalodonValidator(Validator):
    """`Validator` whose data come from the plugin's loader; the host's constructor knows its own data sets only."""

    def __init__(self, job_config: Any, dp_world_size: int, dp_rank: int, tokenizer: Any, **parts: Any):
        self.job_config = job_config
        self.tokenizer = tokenizer
        self.validation_dataloader = build_text_validation_dataloader(
            dp_world_size, dp_rank, tokenizer, job_config, infinite=job_config.validation.steps != -1
        )
        for name, part in parts.items():  # named as the host's Trainer passes them and its `validate` reads them
            setattr(self, name, part)

    def post_dataloading_process(self, input_dict: dict[str, Tensor], labels: Tensor, model_parts: Any):
        """Inputs and labels as they are: the host's version asks the model for attention masks, which ours has not."""
        return input_dict["input"], labels, {}, {}


def build_validator(job_config: Any, **parts: Any) -> MegalodonValidator:
    """`build_validator_fn` of the train spec."""
    return MegalodonValidator(job_config, **parts)
