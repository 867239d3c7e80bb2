"""`make quickstart`: train a small Megalodon on real text on the CPU, compare, sample and draw.

Trains train_configs/quickstart.toml (bytes of the running Python's standard library), reports what byte n-grams reach
on the same held-out text, samples through the streaming path, and leaves loss.png, loss.json and sample.txt in the
run's folder. Started again it continues an unfinished run.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from megalodon_plugin.files import write_text

CONFIG = Path(__file__).resolve().parents[2] / "train_configs" / "quickstart.toml"
PROMPT = "def read_lines(path):\n    "


def main(arguments: list[str] | None = None) -> None:
    """Run the whole of it; options that are not its own go to torchtitan."""
    try:
        _run(arguments)
    except ValueError as error:
        sys.exit(f"quickstart: {error}")


def _run(arguments: list[str] | None) -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--config", type=Path, default=CONFIG)
    own, options = parser.parse_known_args(arguments)

    from megalodon_plugin.data.records import losses, read_records
    from megalodon_plugin.titan.checkpoint_checks import is_complete

    from .continuations import generate_from_checkpoint
    from .plot import plot_run
    from .torchrun import training_command

    command = training_command(own.config, 1, options)
    levels, run, checkpoints = _compare(own.config, options)
    for label, value in levels.items():
        print(f"quickstart: held-out bytes under interpolated {label}s: {value:.3f} nats a byte", flush=True)
    finished = subprocess.run(command)
    if finished.returncode:
        sys.exit(finished.returncode)
    steps, values = losses(read_records(run), "validation")
    complete = [path for path in checkpoints.glob("step-*") if is_complete(path)]
    if not values or not complete:
        raise ValueError(
            "`validation.enable` and `checkpoint.enable` must be true, because the quickstart shows what they write"
        )
    last = max(complete, key=lambda path: int(path.name.split("-")[1]))
    print(f"\nquickstart: a sample of {last}, from the prompt {PROMPT!r}:\n{'-' * 80}")
    sample = generate_from_checkpoint(last, PROMPT, max_new_tokens=600, temperature=0.7, seed=0, out=sys.stdout)
    print("-" * 80)
    write_text(PROMPT + sample + "\n", run / "sample.txt")
    picture = plot_run(run, {f"byte {label}": value for label, value in levels.items()})
    compared = ", ".join(f"{label} {value:.3f}" for label, value in levels.items())
    print(f"quickstart: validation loss {values[-1]:.3f} nats a byte after {steps[-1]} steps (byte {compared})")
    print(f"quickstart: the checkpoint is {last}, the picture {picture}, the sample {run / 'sample.txt'}")


def _compare(config: Path, options: list[str]) -> tuple[dict[str, float], Path, Path]:
    """What n-grams score on the job's held-out text, and the job's folders."""
    from megalodon_plugin.data.ngram import ngram_losses
    from megalodon_plugin.titan.command_line import read_job
    from megalodon_plugin.titan.data_source import side_as_bytes

    job = read_job(["--job.config_file", str(config), *options])
    scores = ngram_losses(side_as_bytes(job, "training"), side_as_bytes(job, "validation"))
    run = Path(job.job.dump_folder)
    return {f"{order}-gram": loss for order, loss in scores.items()}, run, run / job.checkpoint.folder


if __name__ == "__main__":
    main()
