"""The options of the benchmarks: the command line's defaults are those of a call without a command line."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import pytest

from megalodon_plugin.bench.generate import GenerateOptions
from megalodon_plugin.bench.ops.run import OpsOptions
from megalodon_plugin.bench.train.run import TrainOptions
from megalodon_plugin.cli.bench import add_bench
from megalodon_plugin.cli.options import options_of

OPTIONS = {"ops": OpsOptions, "generate": GenerateOptions, "train": TrainOptions}


@pytest.mark.parametrize(("name", "kind"), OPTIONS.items())
def test_the_command_has_the_defaults_of_a_call(name: str, kind: Any) -> None:
    parser = argparse.ArgumentParser()
    add_bench(parser.add_subparsers(dest="command", required=True))
    parsed = dataclasses.asdict(options_of(kind, parser.parse_args(["bench", name])))
    lists_as_tuples = {key: tuple(value) if isinstance(value, list) else value for key, value in parsed.items()}
    assert kind(**lists_as_tuples) == kind(Path("outputs/bench"))
