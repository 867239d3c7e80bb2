"""The ops and the model on a CUDA GPU against float64 on the CPU."""

import dataclasses

import pytest
import torch

from megalodon_plugin.model import PRESETS, Megalodon
from megalodon_plugin.ops import cema, chunk_attention, timestep_norm

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def relative_error(value: torch.Tensor, truth: torch.Tensor) -> float:
    return ((value.double().cpu() - truth).abs().max() / truth.abs().max()).item()


def errors(op, inputs: list[torch.Tensor], dtypes: list[torch.dtype]) -> list[float]:
    """Errors of the output and of every gradient on the GPU in `dtypes`; the truth is float64 on the CPU on the same,
    already rounded, numbers, the output's gradient among them.
    """
    rounded = [x.to(dtype) for x, dtype in zip(inputs, dtypes, strict=True)]
    results = []
    for device, cast in (("cuda", lambda x: x), ("cpu", torch.Tensor.double)):
        leaves = [cast(x).to(device).requires_grad_() for x in rounded]
        y = op(*leaves)
        dy = torch.linspace(-1, 1, y.numel()).view(y.shape).to(dtypes[0]).to(device, y.dtype)
        results.append([y, *torch.autograd.grad(y, leaves, dy)])
    return [relative_error(value.detach(), truth.detach()) for value, truth in zip(*results, strict=True)]


@pytest.mark.parametrize("length", [63, 300])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_ops_on_the_gpu_agree_with_float64_on_the_cpu(length: int, dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(length)
    x, v = (torch.randn(2, length, 32, generator=generator) for _ in range(2))
    q, k = (torch.randn(2, length, 2, 16, generator=generator) / 4 for _ in range(2))
    shapes = [(32, 4, 1), (32, 4, 1), (32, 1, 1), (32, 4, 2), (32, 1)]
    parameters = [torch.randn(*shape, generator=generator) for shape in shapes]
    gain = [torch.randn(32, generator=generator) for _ in range(2)]
    found = [
        *errors(lambda x, *p: cema(x, *p)[0], [x, *parameters], [dtype] + [torch.float32] * 5),
        *errors(lambda x, *p: timestep_norm(x, *p, num_groups=4)[0], [x, *gain], [dtype, torch.float32, torch.float32]),
        *errors(lambda q, k, v: chunk_attention(q, k, v, 128), [q, k, v.unflatten(2, (2, 16))], [dtype] * 3),
    ]
    assert max(found) <= tolerance


def test_model_on_the_gpu_gives_the_logits_of_the_cpu() -> None:
    torch.manual_seed(0)
    model = Megalodon(dataclasses.replace(PRESETS["debug"], vocab_size=64, chunk_size=32))
    model.init_weights()
    model.eval()
    tokens = torch.randint(64, (2, 100))
    with torch.no_grad():
        truth = model.double()(tokens)
        on_gpu = model.float().cuda()(tokens.cuda())
    assert relative_error(on_gpu, truth) < 1e-5


def test_streaming_on_the_gpu_equals_one_pass() -> None:
    torch.manual_seed(0)
    model = Megalodon(dataclasses.replace(PRESETS["debug"], vocab_size=64, chunk_size=32)).cuda()
    model.init_weights()
    model.eval()
    tokens = torch.randint(64, (2, 100), device="cuda")
    with torch.no_grad():
        whole = model(tokens)
        state, pieces = None, []
        for piece in tokens.split([45, 1, 54], 1):
            logits, state = model(piece, state=state, return_state=True)
            pieces.append(logits)
    assert relative_error(torch.cat(pieces, 1), whole.double().cpu()) < 1e-5
