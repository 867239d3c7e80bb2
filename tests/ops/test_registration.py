"""The ops as torch sees them: schemas, fake tensors, autograd, and compilation without a graph break."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from megalodon_plugin.ops import NormState, cema, chunk_attention, timestep_norm

B, L, D, G, N, H, E, W, C = 2, 70, 6, 3, 4, 2, 4, 3, 16  # L is one whole block of CEMA's 64 steps and a rest
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
OPTIONAL = pytest.mark.parametrize("optional", [False, True], ids=["plain", "optional_arguments"])
LAYOUTS = pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
OPS = (
    "cema",
    "cema_backward",
    "timestep_norm",
    "timestep_norm_backward",
    "chunk_attention",
    "chunk_attention_backward",
)
FORWARD_OPS = [name for name in OPS if not name.endswith("_backward")]
COEFFICIENT_SHAPES = ((D, N, 1), (D, N, 1), (D, 1, 1), (D, N, 2), (D, 1))


class Inputs:
    """Seeded arguments of the ops; activations in `dtype`, with every other stride doubled if `strided`."""

    def __init__(self, dtype, strided, requires_grad=False, length=L):
        self.generator = torch.Generator().manual_seed(3)
        self.dtype, self.strided, self.requires_grad, self.length = dtype, strided, requires_grad, length

    def activation(self, *shape):
        if self.strided:
            t = torch.randn(*shape, 2, generator=self.generator).to(self.dtype).transpose(0, 1).contiguous()
            t = t.transpose(0, 1)[..., 0]
            assert not t.is_contiguous()
        else:
            t = torch.randn(shape, generator=self.generator).to(self.dtype)
        return t.requires_grad_(self.requires_grad)

    def parameter(self, *shape):
        return torch.randn(shape, generator=self.generator).requires_grad_(self.requires_grad)

    def variance(self, *shape):
        return (torch.rand(shape, generator=self.generator) + 0.5).requires_grad_(self.requires_grad)

    def cema(self, optional):
        x = self.activation(B, self.length, D)
        coefficients = [self.parameter(*shape) for shape in COEFFICIENT_SHAPES]
        return x, *coefficients, self.parameter(B, D, N, 2) if optional else None, optional

    def cema_backward(self, optional):
        dy = self.activation(B, self.length, D)
        no_kept_states = torch.empty(0, B, D, N, 2)
        return dy, self.parameter(B, D, N, 2) if optional else None, *self.cema(optional), no_kept_states

    def timestep_norm(self, optional):
        x = self.activation(B, self.length, D)
        weight, bias, mean, var = self.parameter(D), self.parameter(D), self.parameter(B, G), self.variance(B, G)
        count = torch.tensor([5, 0])
        mask = torch.arange(self.length) % 7 == torch.tensor([[2], [5]]) if optional else None
        return x, weight, bias, count, mean, var, mask, G, 1e-5

    def timestep_norm_backward(self, optional):
        x, weight, bias, count, mean, var, mask, groups, eps = self.timestep_norm(optional)
        with torch.no_grad():
            *_, step_mean, step_rstd = torch.ops.megalodon.timestep_norm(
                x, weight, bias, count, mean, var, mask, groups, eps
            )
        dstate = [self.parameter(B, G) if optional else None for _ in range(2)]
        return self.activation(B, self.length, D), *dstate, x, weight, count, mean, var, mask, step_mean, step_rstd

    def chunk_attention(self, optional):
        return *(self.activation(B, self.length, H, size) for size in (E, E, W)), C if optional else 2 * self.length

    def chunk_attention_backward(self, optional):
        q, k, v, chunk_size = self.chunk_attention(optional)
        with torch.no_grad():
            out, log_sum = torch.ops.megalodon.chunk_attention(q, k, v, chunk_size)
        return self.activation(B, self.length, H, W), q, k, v, out, log_sum, chunk_size


def operator(name):
    return getattr(torch.ops.megalodon, name).default


@DTYPES
@OPTIONAL
@LAYOUTS
@pytest.mark.parametrize("name", OPS)
def test_opcheck(name, strided, optional, dtype):
    """Schema, autograd registration, fake tensors, and AOT dispatch with symbolic sizes, gradients included."""
    backward = name.endswith("_backward")
    arguments = getattr(Inputs(dtype, strided, requires_grad=not backward), name)(optional)
    torch.library.opcheck(operator(name), arguments)


@pytest.mark.parametrize("length", [1, 64])
@pytest.mark.parametrize("name", OPS)
def test_opcheck_at_other_lengths(name, length):
    """One step, and whole blocks only."""
    backward = name.endswith("_backward")
    arguments = getattr(Inputs(torch.float32, False, requires_grad=not backward, length=length), name)(True)
    torch.library.opcheck(operator(name), arguments)


@DTYPES
@OPTIONAL
@LAYOUTS
@pytest.mark.parametrize("name", OPS)
def test_fake_tensors_are_what_the_op_returns(name, strided, optional, dtype):
    """Shape, dtype and strides; the outputs are contiguous whatever the input's strides are."""
    arguments = getattr(Inputs(dtype, strided), name)(optional)
    real = operator(name)(*arguments)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments]
        fake = operator(name)(*fakes)
    assert len(real) == len(fake)
    for got, want in zip(fake, real, strict=True):
        assert (got.shape, got.dtype, got.stride()) == (want.shape, want.dtype, want.stride())
        assert want.is_contiguous()


@pytest.mark.parametrize("name", OPS)
def test_meta_tensors_give_meta_tensors(name):
    arguments = getattr(Inputs(torch.bfloat16, True), name)(True)
    real = operator(name)(*arguments)
    meta = operator(name)(*(a.to("meta") if isinstance(a, torch.Tensor) else a for a in arguments))
    for got, want in zip(meta, real, strict=True):
        assert got.device.type == "meta"
        assert (got.shape, got.dtype) == (want.shape, want.dtype)
        assert got.is_contiguous()


@pytest.mark.parametrize("name", OPS)
def test_the_op_returns_no_view_of_an_argument_and_changes_none(name):
    """A custom op may neither alias nor write its inputs, and opcheck only sees what its own arguments reach."""
    arguments = getattr(Inputs(torch.float32, False), name)(True)
    tensors = [a for a in arguments if isinstance(a, torch.Tensor)]
    copies = [t.clone() for t in tensors]
    outputs = operator(name)(*arguments)
    storages = {t.untyped_storage().data_ptr() for t in tensors}
    assert not storages & {t.untyped_storage().data_ptr() for t in outputs}
    assert all(map(torch.equal, tensors, copies))


def use_cema(x, *coefficients):
    y, h = cema(2 * x, *coefficients, return_state=True, cema_input="paper")
    return y.sin(), h


def use_timestep_norm(x, weight, bias, mean, var):
    y, state = timestep_norm(2 * x, weight, bias, G, state=NormState(torch.tensor([5, 0]), mean, var))
    return y.sin(), state.mean, state.var, state.count


def use_chunk_attention(q, k, v):
    return (chunk_attention(2 * q, k, v, C).sin(),)


def arguments_of(name, dtype):
    inputs = Inputs(dtype, False, requires_grad=True)
    if name == "cema":
        return use_cema, inputs.cema(True)[:7]
    if name == "timestep_norm":
        x, weight, bias, _, mean, var, *_ = inputs.timestep_norm(True)
        return use_timestep_norm, (x, weight, bias, mean, var)
    return use_chunk_attention, inputs.chunk_attention(True)[:3]


def values_and_gradients(function, arguments):
    outputs = function(*arguments)
    floating = [out for out in outputs if out.is_floating_point()]
    weights = [torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out) for out in floating]
    gradients = torch.autograd.grad(floating, arguments, weights)
    return [*outputs, *gradients]


@DTYPES
@pytest.mark.parametrize("name", FORWARD_OPS)
def test_compiled_whole_equals_eager(name, dtype):
    function, arguments = arguments_of(name, dtype)
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for got, want in zip(
        values_and_gradients(compiled, arguments), values_and_gradients(function, arguments), strict=True
    ):
        assert got.dtype == want.dtype
        assert torch.equal(got, want)


def test_compiled_by_inductor_equals_eager():
    """The default backend fuses what stands around the op, so the last bits of float32 may differ."""
    function, arguments = arguments_of("cema", torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="inductor")
    for got, want in zip(
        values_and_gradients(compiled, arguments), values_and_gradients(function, arguments), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
