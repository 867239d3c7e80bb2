"""The harness's interface: a task made of local data gives what full forward passes give."""

import json
import os
import subprocess
import sys

import pytest
import torch

from megalodon_plugin.checkpoint.checkpoint import Checkpoint, write_checkpoint
from megalodon_plugin.model import Megalodon, MegalodonConfig, generate

from support.processes import HANG_S
from support.small_model import SIZES

pytest.importorskip("lm_eval", reason="needs the optional extra lm-eval")

QUESTIONS = [{"question": f"{i} times 2 is", "choices": [f"{2 * i}.", "7, or so"], "answer": i % 2} for i in range(6)]
TASK = """
task: local_choice
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
{rest}
"""
CHOICE = """
doc_to_target: answer
doc_to_choice: "{{choices}}"
target_delimiter: " "
metric_list: [{metric: acc}]
"""
GENERATE = """
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 12}
metric_list: [{metric: exact_match}]
"""


@pytest.fixture(scope="module")
def model():
    model = Megalodon(MegalodonConfig(**SIZES | {"vocab_size": 258}))
    torch.manual_seed(2)
    model.init_weights()
    return model.eval()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lm_eval")
    tensors = {name: value.detach() for name, value in model.state_dict().items()}
    write_checkpoint(folder / "checkpoint", Checkpoint(model.cfg, "byte", tensors, "dcp"), "safetensors")
    (folder / "data.jsonl").write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    return folder


def run(folder, name, kind, rest):
    """Samples that the harness's command logs."""
    tasks = folder / name
    tasks.mkdir()
    (tasks / "task.yaml").write_text(TASK.format(data=folder / "data.jsonl", kind=kind, rest=rest))
    command = [sys.executable, "-m", "megalodon_plugin.cli.lm_eval", "--model", "megalodon", "--tasks", "local_choice"]
    command += ["--model_args", f"pretrained={folder / 'checkpoint'}", "--device", "cpu", "--include_path", str(tasks)]
    command += ["--output_path", str(tasks / "out"), "--log_samples"]
    environment = os.environ | {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf")}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=HANG_S, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    (samples,) = (tasks / "out").rglob("samples_*.jsonl")
    return sorted((json.loads(line) for line in samples.read_text().splitlines()), key=lambda s: s["doc_id"])


def tokens_of(text):
    return [256, *text.encode()]


def test_choices_are_scored_as_by_full_passes(folder, model):
    samples = run(folder, "choice", "multiple_choice", CHOICE)
    assert len(samples) == len(QUESTIONS)
    for sample, question in zip(samples, QUESTIONS, strict=True):
        for response, choice in zip(sample["filtered_resps"], question["choices"], strict=True):
            prefix, whole = tokens_of(question["question"]), tokens_of(f"{question['question']} {choice}")
            with torch.no_grad():
                logs = model(torch.tensor([whole]))[0].log_softmax(-1)
            want = sum(float(logs[i - 1, whole[i]]) for i in range(len(prefix), len(whole)))
            assert float(response[0]) == pytest.approx(want, rel=1e-5)


def test_texts_are_generated_greedily(folder, model):
    for sample, question in zip(run(folder, "generate", "generate_until", GENERATE), QUESTIONS, strict=True):
        prompt = torch.tensor([tokens_of(question["question"])])
        new = [int(token) for token in generate(model, prompt, 12, temperature=0)]
        want = bytes(token for token in new[: new.index(257) if 257 in new else 12] if token < 256)
        assert sample["resps"][0][0] == want.decode(errors="replace").split("\n")[0]


def test_a_long_text_is_scored_in_pieces(folder, model, monkeypatch):
    from lm_eval.api.instance import Instance

    from megalodon_plugin.cli import lm_eval

    lm = lm_eval.MegalodonLM(str(folder / "checkpoint"), device="cpu")
    text = "one two three " * 12
    request = Instance("loglikelihood_rolling", {}, (text,), 0)
    whole = lm.loglikelihood_rolling([request])
    monkeypatch.setattr(lm_eval, "PIECE_TOKENS", 7)
    monkeypatch.setattr(lm_eval, "SLICE_TOKENS", 3)
    assert lm.loglikelihood_rolling([request]) == pytest.approx(whole, rel=1e-6)
    tokens = tokens_of(text)
    with torch.no_grad():
        logs = model(torch.tensor([tokens]))[0].log_softmax(-1)
    want = sum(float(logs[i - 1, tokens[i]]) for i in range(1, len(tokens)))
    assert whole == [pytest.approx(want, rel=1e-5)]
