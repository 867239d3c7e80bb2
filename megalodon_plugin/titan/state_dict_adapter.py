"""What the host needs to load and save Megalodon as safetensors (`initial_load_in_hf`, `last_save_in_hf`)."""

from pathlib import Path
from typing import Any

from torchtitan.protocols.state_dict_adapter import StateDictAdapter

from megalodon_plugin.checkpoint.formats.safetensors import INDEX, from_stored, to_stored


class MegalodonStateDictAdapter(StateDictAdapter):
    """Native names <-> those of our safetensors folders. Values pass unchanged, DTensors too."""

    def __init__(self, model_args: Any, hf_assets_path: str | None):
        # The base class looks for an index among the tokenizer's files; most tokenizers come without weights.
        has_index = hf_assets_path is not None and (Path(hf_assets_path) / INDEX).is_file()
        super().__init__(model_args, hf_assets_path if has_index else None)
        self.hf_assets_path = hf_assets_path
        self._tied = model_args.tie_embedding

    def to_hf(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Names as in a safetensors folder; without a tied output weight."""
        return to_stored(state_dict, self._tied)

    def from_hf(self, hf_state_dict: dict[str, Any]) -> dict[str, Any]:
        """Native names; with a tied output weight.

        Raises:
            ValueError: a name is none of ours.
        """
        return from_stored(hf_state_dict, self._tied)
