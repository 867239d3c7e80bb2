"""Which implementation an op takes: modes, one warning for each reason, failures that are remembered."""

import importlib.util
import warnings
from typing import Any

import pytest
import torch

from megalodon_plugin.kernels import KernelUnavailable
from megalodon_plugin.ops import dispatch
from megalodon_plugin.ops.dispatch import kernel_or_none, kernels_mode, set_kernels, use_kernels

X = torch.zeros(2)


class Loader:
    """Gives "kernels", or raises the reason that it is given; counts its calls."""

    def __init__(self, reason: str | None = None) -> None:
        self.reason = reason
        self.calls = 0

    def __call__(self) -> str:
        self.calls += 1
        if self.reason is not None:
            raise KernelUnavailable(self.reason)
        return "kernels"


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_mode", "auto")
    monkeypatch.setattr(dispatch, "_failures", {})
    monkeypatch.setattr(dispatch, "_warned", set())


def test_kernels_that_work_are_taken() -> None:
    loader = Loader()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [kernel_or_none("cema", X, loader) for _ in range(2)] == ["kernels"] * 2


def test_a_failure_is_told_once_and_not_tried_again() -> None:
    loader = Loader("no NVRTC")
    with pytest.warns(RuntimeWarning, match=r"cema RUNS AS PYTORCH CODE on cpu, .*: no NVRTC\n.*megalodon\.kernels"):
        assert kernel_or_none("cema", X, loader) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kernel_or_none("cema", X, loader) is None
        # The same op and reason on another device: tried there, but the warning would say nothing new.
        assert kernel_or_none("cema", torch.zeros(2, device="meta"), loader) is None
    assert loader.calls == 2
    with pytest.warns(RuntimeWarning, match="timestep_norm RUNS"):
        assert kernel_or_none("timestep_norm", X, loader) is None
    assert kernel_or_none("cema_backward", X, Loader()) == "kernels"


def test_required_kernels_that_fail_are_an_error_each_time() -> None:
    loader = Loader("the GPU is too old")
    with use_kernels("require"):
        for _ in range(2):
            with pytest.raises(KernelUnavailable, match=r"cema has no CUDA kernel on cpu, .* required: the GPU is too"):
                kernel_or_none("cema", X, loader)
        assert kernel_or_none("timestep_norm", X, Loader()) == "kernels"
    assert loader.calls == 1


def test_other_errors_are_not_hidden() -> None:
    def broken() -> str:
        raise ValueError("a mistake in the launcher")

    with pytest.raises(ValueError, match="a mistake"):
        kernel_or_none("cema", X, broken)


def test_off_and_float64_ask_for_no_kernel() -> None:
    loader = Loader("never asked")
    with use_kernels("off"):
        assert kernel_or_none("cema", X, loader) is None
    for mode in ("auto", "require"):
        with use_kernels(mode):
            assert kernel_or_none("cema", X.double(), loader) is None
    assert loader.calls == 0


def test_modes() -> None:
    assert kernels_mode() == "auto"
    set_kernels("off")
    with pytest.raises(ZeroDivisionError), use_kernels("require"):
        assert kernels_mode() == "require"
        raise ZeroDivisionError
    assert kernels_mode() == "off"
    for key in ("mode", "megalodon.kernels"):
        with pytest.raises(ValueError, match=f"`{key}` must be one of auto, require, off, but is 'on'"):
            set_kernels("on", key)
    assert kernels_mode() == "off"


@pytest.mark.parametrize(("value", "mode"), [(None, "auto"), ("", "auto"), ("off", "off"), ("require", "require")])
def test_the_environment_decides_the_first_mode(monkeypatch: pytest.MonkeyPatch, value: str | None, mode: str) -> None:
    monkeypatch.delenv("MEGALODON_KERNELS", raising=False)
    if value is not None:
        monkeypatch.setenv("MEGALODON_KERNELS", value)
    assert second_copy().kernels_mode() == mode


def test_a_wrong_environment_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGALODON_KERNELS", "fast")
    with pytest.raises(ValueError, match=r"^`MEGALODON_KERNELS` must be one of auto, require, off, but is 'fast'$"):
        second_copy()


def second_copy() -> Any:
    """A second copy of the module, as its first import makes it; the one that the ops use stays as it is."""
    assert dispatch.__spec__ is not None and dispatch.__spec__.loader is not None
    copy = importlib.util.module_from_spec(dispatch.__spec__)
    dispatch.__spec__.loader.exec_module(copy)
    return copy


def test_inside_a_compiled_custom_op() -> None:
    """A custom op runs as it is under torch.compile, so that the choice is made at each call."""
    loader: Any = Loader()

    @torch.library.custom_op("megalodon_test::choose", mutates_args=())
    def choose(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if kernel_or_none("choose", x, loader) else x - 1

    choose.register_fake(torch.empty_like)
    compiled = torch.compile(lambda x: choose(x) * 2, fullgraph=True, backend="aot_eager")
    assert compiled(X).tolist() == [2, 2]
    with use_kernels("off"):
        assert compiled(X).tolist() == [-2, -2]
