"""What a person does with a checkpoint that training wrote: generate, evaluate, convert there and back."""

import gzip
import json
import math
import re
from pathlib import Path

import pytest
import torch
from matplotlib import image
from torch.nn import functional as F

from megalodon_plugin.checkpoint.checkpoint import read_checkpoint, write_checkpoint
from megalodon_plugin.cli import evaluation
from megalodon_plugin.cli.main import main
from megalodon_plugin.data.files import find_text_files
from megalodon_plugin.data.stream import TextStream
from megalodon_plugin.titan.load_model import load_checkpoint

from support.tiny_job import train_well, write_job


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("job")
    train_well(write_job(folder), "--training.steps", "6")
    return folder


@pytest.fixture
def checkpoint(job: Path) -> Path:
    """A full checkpoint, with the optimizer and the data's place."""
    return job / "run" / "checkpoint" / "step-6"


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    main([str(argument) for argument in arguments])
    return capsys.readouterr().out


def fails(*arguments: object) -> str:
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    return str(stopped.value)


class TestGenerate:
    def test_prompts_are_continued_as_each_would_be_alone(self, checkpoint, capsys):
        options = ["--max-new-tokens", 30, "--temperature", 0]
        prompts = ["1 times", "a longer prompt: 3 times 4 is", "3"]
        together = run(capsys, "generate", checkpoint, *options, *[x for p in prompts for x in ("--prompt", p)])
        texts = re.split(r"=== \d of 3 ===\n", together)[1:]
        assert texts == [run(capsys, "generate", checkpoint, *options, "--prompt", p) for p in prompts]
        assert all(len(text) > len(prompt) + 5 for text, prompt in zip(texts, prompts, strict=True))

    def test_a_prompt_from_a_file_in_pieces_of_any_length(self, checkpoint, tmp_path, capsys):
        (tmp_path / "prompt").write_text("3 times 4 is 12.\n" * 5)
        options = ["--prompt-file", tmp_path / "prompt", "--temperature", 0, "--max-new-tokens", 20]
        texts = {run(capsys, "generate", checkpoint, *options, "--prefill-tokens", n) for n in (1, 7, 16, 1000)}
        assert len(texts) == 1

    def test_a_saved_state_goes_on_as_if_the_prompt_had_just_been_read(self, checkpoint, tmp_path, capsys):
        options = ["--temperature", 0, "--max-new-tokens", 20, "--prompt"]
        whole = run(capsys, "generate", checkpoint, *options, "3 times 4 is 12. 5 times")
        state = ["--save-state", tmp_path / "state"]
        run(capsys, "generate", checkpoint, "--max-new-tokens", 0, *state, "--prompt", "3 times 4 is 12.")
        assert run(capsys, "generate", checkpoint, "--load-state", tmp_path / "state", *options, " 5 times") == (
            whole.removeprefix("3 times 4 is 12.")
        )

    def test_every_option_of_sampling_is_repeatable_by_seed(self, checkpoint, capsys):
        options = ["--prompt", "3 times", "--temperature", 1.5, "--top-k", 50, "--top-p", 0.95, "--seed"]
        texts = [run(capsys, "generate", checkpoint, *options, seed) for seed in (1, 1, 2)]
        assert texts[0] == texts[1] != texts[2]

    def test_a_stop_token_ends_the_text(self, checkpoint, capsys):
        options = ["--prompt", "3 times", "--temperature", 0, "--max-new-tokens", 30]
        free = run(capsys, "generate", checkpoint, *options).removeprefix("3 times").removesuffix("\n")
        stop = free[4]
        stopped = run(capsys, "generate", checkpoint, *options, "--stop-token", ord(stop))
        assert stopped == "3 times" + free[: free.index(stop)] + "\n"

    def test_bad_input_is_told(self, checkpoint, job, tmp_path, capsys):
        (tmp_path / "latin").write_bytes(b"\xe9")
        main(["generate", str(checkpoint), "--prompt", "a", "--save-state", str(tmp_path / "state")])
        other = read_checkpoint(checkpoint)
        other.tensors["norm.weight"] += 1
        write_checkpoint(tmp_path / "other", other, "safetensors")
        for arguments, message in [
            (["--prompt", ""], "`--prompt` and `--prompt-file` must not be empty, but prompt 1 of 1 is"),
            (["--prompt", "a", "--prompt", ""], "must not be empty, but prompt 2 of 2 is"),
            ([], "there must be a prompt"),
            (["--load-state", tmp_path / "none"], "`--load-state` must be a file that exists, but is"),
            (["--prompt", "a", "--top-k", "0"], "`top_k` must be at least 1, but is 0"),
            (["--prompt-file", tmp_path / "none"], "`--prompt-file` must be a file that can be read"),
            (["--prompt-file", tmp_path / "latin"], "`--prompt-file` must be UTF-8"),
            (["--prompt", "a", "--tokenizer", "none"], "is neither a file nor a folder"),
            (
                ["--prompt", "a", "--save-state", tmp_path / "no/state"],
                "`--save-state` must lie in a folder that exists",
            ),
            (
                ["--prompt", "a", "--device", "tpu"],
                "`--device` must be cpu, or cuda where there is a GPU, but is 'tpu'",
            ),
            (["--prompt", "a", "--max-new-tokens", "-1"], "`--max-new-tokens` must not be negative, but is -1"),
        ]:
            assert message in fails("generate", checkpoint, *arguments)
        assert "other weights" in fails("generate", tmp_path / "other", "--load-state", tmp_path / "state")

    def test_the_tokenizer_of_another_model_is_refused(self, checkpoint, tmp_path):
        from tokenizers import Tokenizer
        from tokenizers.models import WordLevel

        Tokenizer(WordLevel({str(i): i for i in range(300)}, unk_token="0")).save(str(tmp_path / "tokenizer.json"))
        message = fails("generate", checkpoint, "--prompt", "a", "--tokenizer", tmp_path)
        assert "at most the model's `vocab_size` = 258 tokens, but" in message
        assert "has 300: it belongs to another model" in message

    def test_nan_in_the_weights_is_told(self, checkpoint, tmp_path):
        broken = read_checkpoint(checkpoint)
        broken.tensors["layers.0.attention.cema.alpha"][3] = float("nan")
        write_checkpoint(tmp_path / "nan", broken, "dcp")
        message = fails("generate", tmp_path / "nan", "--prompt", "a")
        assert "weights must be finite, but `layers.0.attention.cema.alpha`" in message


class TestConvert:
    def test_there_and_back_and_into_training(self, checkpoint, job, tmp_path, capsys):
        for source, target, options in [
            (checkpoint, "safetensors", []),
            (tmp_path / "safetensors", "authors", ["--shards", 2]),
            (tmp_path / "authors", "dcp", []),
        ]:
            run(capsys, "convert", source, tmp_path / target, "--to", target, *options)
        first, last = read_checkpoint(checkpoint), read_checkpoint(tmp_path / "dcp")
        assert first.config == last.config
        assert first.tensors.keys() == last.tensors.keys()
        assert all(torch.equal(value, last.tensors[name]) for name, value in first.tensors.items())
        prompt = ["--prompt", "3 times", "--seed", 4]
        texts = {run(capsys, "generate", tmp_path / f, *prompt) for f in ("safetensors", "authors", "dcp")}
        assert texts == {run(capsys, "generate", checkpoint, *prompt)}

    def test_the_host_saves_and_loads_safetensors(self, job, checkpoint, tmp_path, capsys):
        """Training from a converted folder starts with its weights, and its last save in safetensors reads back."""
        run(capsys, "convert", checkpoint, tmp_path / "hf", "--to", "safetensors")
        options = {
            "initial_load_path": str(tmp_path / "hf"),
            "initial_load_in_hf": True,
            "last_save_in_hf": True,
            "last_save_model_only": True,
        }
        config = write_job(tmp_path, optimizer={"lr": 1e-30}, checkpoint=options)
        train_well(config, "--training.steps", "1")
        saved = tmp_path / "run" / "checkpoint" / "step-1"
        assert list(saved.glob("*.safetensors"))
        first, last = read_checkpoint(checkpoint), read_checkpoint(saved)
        assert first.config == last.config
        assert last.format == "safetensors"
        for name, value in first.tensors.items():  # a step of 1e-30 with weight decay changes no float32
            torch.testing.assert_close(value, last.tensors[name], rtol=1e-6, atol=1e-12)


class TestEvaluate:
    @pytest.fixture
    def data(self, tmp_path) -> Path:
        (tmp_path / "data").mkdir()
        (tmp_path / "data/a.txt").write_text("3 times 4 is 12.\n" * 40)
        with gzip.open(tmp_path / "data/b.jsonl.gz", "wt") as file:
            file.writelines(json.dumps({"text": f"é{i} times 2 is {2 * i}"}) + "\n" for i in range(30))
        return tmp_path / "data"

    def test_losses_are_those_of_full_passes(self, checkpoint, data, tmp_path, capsys):
        out = tmp_path / "out"
        run(capsys, "evaluate", checkpoint, "--data", data, "--context", 50, 400, "--piece-tokens", 100, "--out", out)
        report = json.loads((out / "evaluation.json").read_text())
        model, tokenizer = load_checkpoint(checkpoint)
        text = TextStream(find_text_files(str(data)), tokenizer).take(10**6)
        assert report["tokens"] == len(text)
        n_bytes = 40 * 17 + sum(len(f"é{i} times 2 is {2 * i}".encode()) for i in range(30))
        assert report["bytes"] == n_bytes
        for found, context in zip(report["contexts"], (50, 400), strict=True):
            losses = []
            for start in range(0, len(text) - 1, context):
                inputs, targets = text[start:-1][:context], text[start + 1 :][:context]
                with torch.no_grad():
                    losses.append(F.cross_entropy(model(inputs.unsqueeze(0))[0], targets, reduction="none"))
            total = float(torch.cat(losses).double().sum())
            assert found["tokens"] == len(text) - 1
            assert found["loss"] == pytest.approx(total / (len(text) - 1), rel=1e-5)
            assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
            assert found["bits_per_byte"] == pytest.approx(total / math.log(2) / n_bytes, rel=1e-5)
            assert sum(bucket["tokens"] for bucket in found["by_position"]) == len(text) - 1
        assert image.imread(out / "evaluation.png").std() > 0.05
        assert sorted(path.name for path in out.iterdir()) == ["evaluation.json", "evaluation.png"]

    def test_a_killed_evaluation_goes_on_to_the_same_numbers(self, checkpoint, data, tmp_path, capsys, monkeypatch):
        arguments = ["evaluate", checkpoint, "--data", data, "--context", 50, 600, "--piece-tokens", 60]
        run(capsys, *arguments, "--out", tmp_path / "whole")
        real = evaluation.score_text

        def killed(model, take, score, *options):
            for n, step in enumerate(real(model, take, score, *options)):
                yield step
                if score.context == 600 and n == 5:
                    raise KeyboardInterrupt

        monkeypatch.setattr(evaluation, "score_text", killed)
        with pytest.raises(KeyboardInterrupt):
            main([str(a) for a in (*arguments, "--out", tmp_path / "out", "--save-every", 0)])
        monkeypatch.undo()
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["progress.safetensors"]
        other = [*arguments[:-1], 61, "--out", tmp_path / "out"]
        assert "its `piece_tokens` is 60 and not 61" in fails(*other)
        run(capsys, *arguments, "--out", tmp_path / "out")
        reports = [json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("whole", "out")]
        for report in reports:
            del report["date"], report["command"]
            for found in report["contexts"]:
                del found["tokens_per_s"], found["peak_mib"]
        assert reports[0] == reports[1]

    def test_bad_input_is_told(self, checkpoint, data, tmp_path):
        for arguments, message in [
            (
                ["--data", data, "--context", "100000"],
                "must have more tokens than the longest `--context` = 100000, but",
            ),
            (["--data", data, "--context", "0"], "`--context` must be different positive numbers, but is [0]"),
            (["--data", data, "--context", "5", "5"], "`--context` must be different positive numbers, but is [5, 5]"),
            (["--data", tmp_path / "none", "--context", "5"], "does not exist"),
            (["--data", data, "--context", "50", "--max-tokens", "50"], "`--max-tokens` must be above the longest"),
            (
                ["--data", data, "--context", "5", "--piece-tokens", "0"],
                "`--piece-tokens` must be at least 1, but is 0",
            ),
        ]:
            assert message in fails("evaluate", checkpoint, "--out", tmp_path / "out", *arguments)
        assert not (tmp_path / "out").exists()
