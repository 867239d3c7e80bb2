"""Registration of an op under torch.ops.megalodon, with little work on the CPU in each call.

`torch.library.custom_op` and `torch.library.register_autograd` do the same, but at each call they compare the storage
of every output with that of every input and go through the schema's defaults, which for ten tensors takes longer than
launching the kernels. No op here returns an input or has a default; opcheck tests both.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def define_op(name: str, function: Callable) -> torch._ops.OpOverload:
    """Make `function` the op `megalodon::name` on every device; its annotations are the schema."""
    qualified = f"megalodon::{name}"
    schema = torch.library.infer_schema(function, mutates_args=())
    torch.library.define(qualified, schema, tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(qualified, ("cpu", "cuda"), function)
    return getattr(torch.ops.megalodon, name).default


def define_gradient(op: torch._ops.OpOverload, save: Callable, backward: Callable) -> None:
    """Give `op` a backward pass.

    Args:
        save: called as save(ctx, inputs, output) after the forward pass.
        backward: called as backward(ctx, *gradients of the outputs), gives the inputs' gradients.
    """

    def forward(ctx, *inputs):
        with torch._C._AutoDispatchBelowAutograd():
            output = op(*inputs)
        save(ctx, inputs, output)
        return output

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    node: Any = type(f"{op.name()}_gradient", (torch.autograd.Function,), members)

    def dispatch(*inputs):
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs):
            return node.apply(*inputs)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*inputs)

    torch.library.impl(op.name(), "Autograd", dispatch)
