"""The language model: embedding, layers, final TimestepNorm, output layer (arXiv 2404.08801)."""

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from .block import MegalodonBlock
from .config import MegalodonConfig
from .init import init_embedding
from .norm import TimestepNorm, at_least_float32
from .output import OutputLayer, attach_output_layer
from .rotary import Rotary
from .state import LayerPast, MegalodonState, check_state, empty_layer_state


class Megalodon(nn.Module):
    """Megalodon language model, (B, L) tokens -> (B, L, vocabulary) logits.

    Children are named as the host's models are (`tok_embeddings`, `layers`, `norm`, `output`); a pipeline stage may set
    those it does not hold to None. With `logits_in_loss`, what it returns in training are not logits but features for
    a loss that ends in the output layer, see `output.attached_output_layer`.
    """

    def __init__(self, cfg: MegalodonConfig):
        super().__init__()
        cfg.validate()
        self.cfg = cfg
        self.tok_embeddings = nn.Embedding(cfg.vocab_size, cfg.dim)
        self.layers = nn.ModuleDict({str(i): MegalodonBlock(cfg, i) for i in range(cfg.n_layers)})
        self.norm = TimestepNorm(cfg.dim, cfg.norm_groups, cfg.norm_eps)
        self.output = OutputLayer(cfg.dim, cfg.n_outputs)
        self.logits_in_loss = False
        self._tie()

    def _tie(self) -> None:
        if self.cfg.tie_embedding and self.output is not None and self.tok_embeddings is not None:
            self.output.weight = self.tok_embeddings.weight

    @torch.no_grad()
    def init_weights(self, buffer_device: torch.device | None = None) -> None:
        """Initialise every parameter by the authors' table; `buffer_device` is where the RoPE tables go.

        Call it after `to_empty` on a model from the meta device: sharing the embedding's weight is set up again here,
        because `to_empty` ends it.
        """
        self._tie()
        if self.tok_embeddings is not None:
            init_embedding(self.tok_embeddings.weight, self.cfg.dim)
        for layer in self.layers.values():
            cast(MegalodonBlock, layer).init_weights()
        if self.norm is not None:
            self.norm.init_weights()
        if self.output is not None and (self.tok_embeddings is None or not self.cfg.tie_embedding):
            init_embedding(self.output.weight, self.cfg.dim)
        if buffer_device is not None:
            for module in self.modules():
                if isinstance(module, Rotary):
                    module.to_empty(device=buffer_device)  # computes its table there, also on the meta device

    def forward(
        self,
        tokens: Tensor,
        state: MegalodonState | None = None,
        return_state: bool = False,
        positions: Tensor | None = None,
        attention_masks: None = None,
    ) -> Tensor | tuple[Tensor, MegalodonState]:
        """Logits of the next token at every position.

        Args:
            tokens: (B, L) int64, any L >= 1 (activations (B, L, D) in a pipeline stage without the embedding).
            state: what the text before these tokens left, from an earlier call; None: every row starts a text. Rows
                may be at different positions, and a piece may have any length.
            return_state: also return the state after these tokens.
            positions: accepted as the host passes it. Rows count up from their start, so there is nothing to read.
            attention_masks: must be None.

        Returns:
            logits (B, L, vocabulary): float32 in eval mode, in training the activations' dtype (the host's loss
            computes in float32); float64 in a float64 model. With `return_state`, also the state.

        Raises:
            ValueError: a shape is wrong, or the state belongs to another model.
        """
        if attention_masks is not None:
            raise ValueError(
                "`attention_masks` must be None: attention is causal inside chunks and takes no other mask"
            )
        if self.tok_embeddings is not None and tokens.ndim != 2:
            raise ValueError(f"`tokens` must have shape (B, L), but has {tuple(tokens.shape)}")
        if tokens.shape[1] < 1:
            raise ValueError(f"`tokens` must hold at least one timestep, but has shape {tuple(tokens.shape)}")
        if state is None and not return_state:
            return self._result(self.features(tokens))
        x, new_state = self.stream(tokens, state)
        return (self._result(x), new_state) if return_state else self._result(x)

    def _result(self, x: Tensor) -> Tensor:
        """What `forward` returns for features (B, L, D), or for activations in a stage without the output layer."""
        if self.training and self.logits_in_loss and isinstance(self.output, OutputLayer):
            return attach_output_layer(x, self.output)
        return x if self.output is None else self.logits(x)

    def features(self, tokens: Tensor) -> Tensor:
        """What the output layer reads, (B, L, D), for tokens (B, L) of rows that start a text.

        For rows of which not all logits are wanted at once: L rows of logits are far larger than L of features.
        """
        x = self._embed(tokens)
        for layer in self.layers.values():
            x = layer(x)
        return x if self.norm is None else self.norm(x)[0]

    def stream(self, tokens: Tensor, state: MegalodonState | None) -> tuple[Tensor, MegalodonState]:
        """`features` of a piece (B, L) after `state` (None: it starts a text), and the state after it."""
        return self._stream(tokens, state, in_place=False)

    def logits(self, features: Tensor) -> Tensor:
        """The output layer, (..., D) -> (..., vocabulary); dtypes as in `forward`."""
        logits = self.output(features)
        return logits if self.training else at_least_float32(logits)

    def step_(self, tokens: Tensor, state: MegalodonState) -> Tensor:
        """Read one more token of each row and bring the state up to date in place: the step of a long generation.

        All shapes and addresses stay the same from step to step, so a CUDA graph can hold it, and no cache is copied.

        Args:
            tokens: (B,) int64.
            state: what `forward` returned; its tensors are written. Rows may be at different positions.

        Returns:
            logits (B, vocabulary), dtypes as in `forward`.
        """
        if tokens.ndim != 1:
            raise ValueError(f"`tokens` must have shape (B,), but has {tuple(tokens.shape)}")
        x, new_state = self._stream(tokens.unsqueeze(1), state, in_place=True)
        for old, new in zip(pytree.tree_leaves(state), pytree.tree_leaves(new_state), strict=True):
            if old is not new:
                old.copy_(new)
        return self.logits(x).squeeze(1)

    def _embed(self, tokens: Tensor) -> Tensor:
        if self.tok_embeddings is None:
            return tokens
        x = self.tok_embeddings(tokens)  # (B, L, D)
        device = x.device.type
        if torch.is_autocast_enabled(device) and x.dtype == torch.float32:
            # Autocast leaves an embedding in float32, and the residual stream with it. Under FSDP's mixed precision
            # it has the low dtype; the same here, so that one device computes what many do, in half the memory.
            x = x.to(torch.get_autocast_dtype(device))
        if self.cfg.scale_embedding:
            x = x * math.sqrt(self.cfg.dim)
        return F.dropout(x, self.cfg.dropout, self.training)

    def _stream(self, tokens: Tensor, state: MegalodonState | None, in_place: bool) -> tuple[Tensor, MegalodonState]:
        x = self._embed(tokens)
        batch, length, _ = x.shape
        if state is not None:
            check_state(state, self.cfg, batch, length)
        position = torch.zeros(batch, dtype=torch.int64, device=x.device) if state is None else state.position
        new_layers = []
        for i, layer in enumerate(self.layers.values()):
            x, new_layer = layer(x, LayerPast(None if state is None else state.layers[i], position, in_place))
            new_layers.append(new_layer)
        x, norm_state = self.norm(x, None if state is None else state.norm)
        return x, MegalodonState(tuple(new_layers), norm_state, position + length)

    def empty_state(self, batch: int, dtype: torch.dtype | None = None) -> MegalodonState:
        """The state before the first timestep, explicitly: the same as passing None, in tensors of the final shapes.

        `dtype` is that of keys and values, by default the embedding's.
        """
        weight, cema_dtype = self.tok_embeddings.weight, self.norm.weight.dtype
        layer = empty_layer_state(self.cfg, batch, dtype or weight.dtype, cema_dtype, weight.device)
        position = torch.zeros(batch, dtype=torch.int64, device=weight.device)
        state = MegalodonState((layer,) * self.cfg.n_layers, layer.norm, position)
        return state.map(torch.clone)
