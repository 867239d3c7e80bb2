"""The CUDA kernels against float64: outputs, states and every gradient, at sizes that fill nothing evenly.

What is allowed is measured, not chosen: see `bench.ops.accuracy`, which the benchmark shares.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import pytest
import torch
from torch import Tensor

from megalodon_plugin.bench.ops.accuracy import (
    Case,
    accuracy_row,
    golden_cases,
    judge,
    relative_errors,
    rounding_errors,
    standard_cases,
)
from megalodon_plugin.bench.ops.problems import Problem, cema_problem, padded, solve, timestep_norm_problem
from megalodon_plugin.ops import NormState, cema, timestep_norm
from megalodon_plugin.ops.dispatch import use_kernels

from support.golden_cases import FOLDER, requires_golden

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
DEVICE, MODE = torch.device("cuda"), "require"
BF16, F32 = torch.bfloat16, torch.float32
DTYPES = pytest.mark.parametrize("dtype", [BF16, F32], ids=["bfloat16", "float32"])
LENGTHS = (1, 31, 32, 33, 63, 511, 512, 513, 1025, 3000)
BATCHES = (1, 2, 3)


@pytest.fixture(autouse=True)
def kernels_required() -> Iterator[None]:
    with use_kernels(MODE):
        yield


def cover(*choices: Sequence[int], rows: int) -> list[tuple[int, ...]]:
    """Rows of one value each, in which every value comes up about equally often, in mixed company."""
    generator = torch.Generator().manual_seed(1)
    columns = []
    for values in choices:
        repeated = list(values) * -(-rows // len(values))
        columns.append([repeated[i] for i in torch.randperm(rows, generator=generator).tolist()])
    return list(zip(*columns, strict=True))


def check(op: str, make: Callable[[int], Problem], seeds: int = 1, call: Callable | None = None) -> None:
    """Judge the kernels on problems of several seeds, together: a few numbers alone may be exact by luck."""
    case = Case(op, "", [partial(make, seed) for seed in range(seeds)])
    wrong = [accuracy_row(row) for row in judge(case, mode=MODE, call=call) if not row["ok"]]
    assert not wrong, "\n".join(wrong)


@DTYPES
@pytest.mark.parametrize(
    ("length", "dim", "order", "batch"),
    cover(LENGTHS, (1, 7, 16, 17, 48, 100), (1, 3, 4, 8, 16, 17, 32), BATCHES, rows=40),
)
def test_cema_at_odd_sizes(length: int, dim: int, order: int, batch: int, dtype: torch.dtype) -> None:
    cema_input = "paper" if (length + dim) % 2 else "released"

    def make(seed: int) -> Problem:
        return cema_problem((batch, length, dim), order, dtype, DEVICE, seed).with_options(cema_input=cema_input)

    check("cema", make, seeds=max(1, 32 // dim))


@DTYPES
@pytest.mark.parametrize(
    ("length", "groups", "features", "batch"),
    cover(LENGTHS, (1, 2, 5, 12), (3, 5, 7, 16, 33, 64), BATCHES, rows=30),
)
def test_timestep_norm_at_odd_sizes(length: int, groups: int, features: int, batch: int, dtype: torch.dtype) -> None:
    """Not with two features: a first step makes +1 and -1 of any two numbers, so their gradient is only noise."""

    def make(seed: int) -> Problem:
        shape, masked = (batch, length, groups * features), (length + groups) % 3 == 0
        problem = timestep_norm_problem(shape, groups, dtype, DEVICE, seed)
        return padded(problem) if masked else problem

    check("timestep_norm", make, seeds=max(1, 32 // groups))


@DTYPES
@pytest.mark.parametrize("features", [1, 8, 48, 100, 256, 1000, 4096])
def test_timestep_norm_with_groups_of_any_size(features: int, dtype: torch.dtype) -> None:
    """One feature: the variance within a step is 0, and all of it comes from time."""
    check("timestep_norm", lambda seed: timestep_norm_problem((2, 301, 2 * features), 2, dtype, DEVICE, seed), seeds=8)


@DTYPES
@pytest.mark.parametrize("length", [1, 100, 2049])
def test_without_incoming_state(length: int, dtype: torch.dtype) -> None:
    check("cema", lambda seed: cema_problem((2, length, 40), 16, dtype, DEVICE, seed, state=False))
    check("timestep_norm", lambda seed: timestep_norm_problem((2, length, 64), 4, dtype, DEVICE, seed, state=False))


@DTYPES
@pytest.mark.parametrize("op", ["cema", "timestep_norm"])
def test_the_cases_of_the_accuracy_table(op: str, dtype: torch.dtype) -> None:
    """Slow decays over 32768 steps, decays of exactly 0 and 1, a mean of 1000, padded rows that hold NaN."""
    for case in standard_cases(op, dtype, DEVICE):
        wrong = [accuracy_row(row) for row in judge(case, mode=MODE) if not row["ok"]]
        assert not wrong, "\n".join(wrong)


@requires_golden
@DTYPES
@pytest.mark.parametrize("op", ["cema", "timestep_norm"])
def test_the_inputs_of_the_golden_vectors(op: str, dtype: torch.dtype) -> None:
    for case in golden_cases(FOLDER, op, dtype, DEVICE):
        wrong = [accuracy_row(row) for row in judge(case, mode=MODE) if not row["ok"]]
        assert not wrong, "\n".join(wrong)


# Memory layouts


def transposed(t: Tensor) -> Tensor:
    return t.transpose(0, 1).contiguous().transpose(0, 1)


def channels_first(t: Tensor) -> Tensor:
    return t.transpose(1, 2).contiguous().transpose(1, 2)


def every_other(t: Tensor) -> Tensor:
    return torch.stack([t, torch.full_like(t, float("nan"))], -1)[..., 0]


def columns_of_wider_rows(t: Tensor) -> Tensor:
    return torch.nn.functional.pad(t, (1, 2), value=float("nan"))[..., 1:-2]


def off_by_one_number(t: Tensor) -> Tensor:
    return t.new_empty(t.numel() + 1)[1:].view(t.shape).copy_(t)


def every_other_step(t: Tensor) -> Tensor:
    return torch.stack([t, torch.full_like(t, float("nan"))], 2).flatten(1, 2)[:, ::2]


def one_row_for_all(t: Tensor) -> Tensor:
    return t[:1].expand_as(t)


def one_step_for_all(t: Tensor) -> Tensor:
    return t[:, :1].expand_as(t)


def one_number(t: Tensor) -> Tensor:
    return t.new_ones(()).expand_as(t)


SAME_NUMBERS = (transposed, channels_first, every_other, columns_of_wider_rows, off_by_one_number, every_other_step)


@DTYPES
@pytest.mark.parametrize("of_dy", [*SAME_NUMBERS, one_row_for_all, one_step_for_all, one_number])
@pytest.mark.parametrize("op", ["cema", "timestep_norm"])
def test_any_strides(op: str, of_dy: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    """x and dy in layouts that differ; what lies between their numbers is NaN."""
    of_x = one_row_for_all if of_dy is one_row_for_all else SAME_NUMBERS[len(of_dy.__name__) % len(SAME_NUMBERS)]

    def make(seed: int) -> Problem:
        if op == "cema":
            problem = cema_problem((2, 150, 24), 16, dtype, DEVICE, seed)
        else:
            problem = timestep_norm_problem((2, 150, 24), 3, dtype, DEVICE, seed)
        arguments = problem.arguments | {"x": of_x(problem.arguments["x"])}
        return problem._replace(arguments=arguments, weights=problem.weights | {"y": of_dy(problem.weights["y"])})

    check(op, make, seeds=4)


# Pieces and repetition


def cema_in_pieces(x, alpha, delta, theta, gamma, omega, h0, *, cema_input):
    outputs, h = [], h0
    for piece in x.split([1, 30, 64, 129, x.shape[1] - 224], 1):
        y, h = cema(piece, alpha, delta, theta, gamma, omega, h, return_state=True, cema_input=cema_input)
        outputs.append(y)
    return {"y": torch.cat(outputs, 1), "h": h}


def timestep_norm_in_pieces(x, weight, bias, mean, var, *, groups, count, padding_mask=None):
    outputs, state, start = [], NormState(count, mean, var), 0
    for piece in x.split([1, 30, 64, 129, x.shape[1] - 224], 1):
        mask = None if padding_mask is None else padding_mask[:, start : start + piece.shape[1]]
        y, state = timestep_norm(piece, weight, bias, groups, state=state, padding_mask=mask)
        outputs.append(y)
        start += piece.shape[1]
    return {"y": torch.cat(outputs, 1), "mean": state.mean, "var": state.var}


@DTYPES
def test_pieces_with_carried_state_are_one_pass(dtype: torch.dtype) -> None:
    """Against the truth of one pass, so also the gradients that flow from piece to piece."""
    check("cema", lambda seed: cema_problem((2, 700, 40), 16, dtype, DEVICE, seed), call=cema_in_pieces)

    def norm(seed: int) -> Problem:
        return timestep_norm_problem((2, 700, 64), 4, dtype, DEVICE, seed)

    check("timestep_norm", norm, seeds=4, call=timestep_norm_in_pieces)
    check("timestep_norm", lambda seed: padded(norm(seed)), seeds=4, call=timestep_norm_in_pieces)


@DTYPES
def test_the_same_input_gives_the_same_bits(dtype: torch.dtype) -> None:
    problems = [
        cema_problem((4, 3000, 200), 16, dtype, DEVICE),
        cema_problem((1, 20000, 8), 16, dtype, DEVICE),
        timestep_norm_problem((4, 3000, 256), 4, dtype, DEVICE),
        timestep_norm_problem((1, 20000, 64), 1, dtype, DEVICE),
    ]
    for problem in problems:
        first = solve(problem)
        for _ in range(2):
            again = solve(problem)
            assert [name for name in first if not torch.equal(first[name], again[name])] == []


# Long and large


@DTYPES
def test_a_million_steps(dtype: torch.dtype) -> None:
    length = 2**20
    check("cema", lambda seed: cema_problem((1, length, 8), 16, dtype, DEVICE, seed))
    check("cema", lambda seed: cema_problem((1, length - 5, 8), 16, dtype, DEVICE, seed, decays="slow"))
    check("timestep_norm", lambda seed: timestep_norm_problem((1, length, 16), 2, dtype, DEVICE, seed, mean=3.0))


def assert_as_if_rounded(value: Tensor, truth: Tensor) -> None:
    assert relative_errors(value, truth)[0] <= 1.5 * rounding_errors(truth, BF16)[0]


class TestBeyondInt32:
    """More numbers than 32 bits count: windows of the result against float64 from the state that reaches them."""

    length, dim, groups = 2**20 + 32, 2112, 33

    @pytest.fixture
    def activations(self) -> tuple[Tensor, Tensor]:
        if torch.cuda.mem_get_info()[0] < 48 * 2**30:
            pytest.skip("needs 48 GiB of free GPU memory")
        x, dy = (torch.empty(1, self.length, self.dim, dtype=BF16, device=DEVICE) for _ in range(2))
        assert x.numel() > 2**31
        generator = torch.Generator(DEVICE).manual_seed(0)
        for part in (*x.split(2**16, 1), *dy.split(2**16, 1)):
            part.normal_(generator=generator)
        return x.requires_grad_(), dy

    def starts(self) -> tuple[int, int]:
        """Of a window around number 2^31 and of one at the end."""
        return 2**31 // self.dim - 50, self.length - 97

    def test_cema(self, activations: tuple[Tensor, Tensor]) -> None:
        x, dy = activations
        parameters = list(cema_problem((1, 1, self.dim), 16, BF16, DEVICE, state=False).arguments.values())[1:]
        names = ("alpha", "delta", "theta", "gamma", "omega")
        leaves = [x, *(p.requires_grad_() for p in parameters)]
        y, h = cema(*leaves, return_state=True)
        dx, *_, domega = torch.autograd.grad(y, leaves, dy)
        for start in self.starts():
            stop = min(start + 2000, self.length)
            exact = stop if stop == self.length else start + 100  # what comes after 2000 steps has no weight any more
            with torch.no_grad():
                _, h0 = cema(x[:, :start], *parameters, return_state=True)
            window = {"x": x.detach()[:, start:stop], **dict(zip(names, parameters, strict=True)), "h0": h0}
            truth = solve(
                Problem("cema", window, {}, {"y": dy[:, start:stop], "h": torch.zeros_like(h)}), torch.float64
            )
            assert_as_if_rounded(y[:, start:stop], truth["y"])
            assert_as_if_rounded(dx[:, start:exact], truth["dx"][:, : exact - start])
        assert_as_if_rounded(h, truth["h"])
        products = ((a.double() * b.double()).sum((0, 1)) for a, b in zip(*self.parts(x.detach(), dy), strict=True))
        assert_as_if_rounded(domega[:, 0], sum(products))

    def test_timestep_norm(self, activations: tuple[Tensor, Tensor]) -> None:
        x, dy = activations
        weight, bias = (torch.randn(self.dim, device=DEVICE).requires_grad_() for _ in range(2))
        y, last = timestep_norm(x, weight, bias, self.groups)
        dx, _, dbias = torch.autograd.grad(y, [x, weight, bias], dy)
        for start in self.starts():
            stop = min(start + 2000, self.length)
            with torch.no_grad():
                _, state = timestep_norm(x[:, :start], weight, bias, self.groups)
            window = {"x": x.detach()[:, start:stop], "weight": weight, "bias": bias}
            window |= {"mean": state.mean, "var": state.var}
            zero = torch.zeros_like(state.mean)
            weights = {"y": dy[:, start:stop], "mean": zero, "var": zero}
            options = {"groups": self.groups, "count": state.count}
            truth = solve(Problem("timestep_norm", window, options, weights), torch.float64)
            assert_as_if_rounded(y[:, start:stop], truth["y"])
        assert_as_if_rounded(dx[:, start:], truth["dx"])  # of the last window: elsewhere it depends on all that follows
        assert last.count.item() == self.length
        assert_as_if_rounded(last.var, truth["var"])
        assert_as_if_rounded(dbias, sum(part.double().sum((0, 1)) for part in self.parts(dy)[0]))

    def parts(self, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
        return [t.split(2**14, 1) for t in tensors]
