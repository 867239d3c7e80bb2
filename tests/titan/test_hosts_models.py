"""The host's own models train under the plugin's entry as they do under the host's."""

import json
import re
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers

from support.processes import run_python

OWN = "from megalodon_plugin.cli.train import main; main()"
# Behind the plugin's import, which lets the host run on a CPU.
STOCK = "import megalodon_plugin.titan; from torchtitan.train import Trainer, main; main(Trainer)"
STEP = re.compile(r"step: +(\d+) +loss: +([\d.]+) +grad_norm: +([\d.]+)")


def write_llama_job(folder: Path) -> Path:
    """torchtitan's smallest Llama on its test data set, of which the wheel holds no text, and a tokenizer of bytes."""
    (folder / "texts").mkdir()
    lines = [json.dumps({"text": f"{n} times 7 is {n * 7}. " * 20}) for n in range(50)]
    (folder / "texts" / "some.jsonl").write_text("\n".join(lines))
    letters = {letter: number for number, letter in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), "<s>"])}
    tokenizer = Tokenizer(models.BPE(letters, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    (folder / "tokenizer").mkdir()
    tokenizer.save(str(folder / "tokenizer" / "tokenizer.json"))
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "<s>"}))
    config = folder / "job.toml"
    config.write_text(
        f"""
[job]
custom_config_module = "megalodon_plugin.titan.job_config"
[experimental]
custom_import = "megalodon_plugin.titan"
[model]
name = "llama3"
flavor = "debugmodel"
hf_assets_path = "{folder / "tokenizer"}"
[training]
dataset = "c4_test"
dataset_path = "{folder / "texts"}"
local_batch_size = 2
seq_len = 32
steps = 2
[metrics]
log_freq = 1
disable_color_printing = true
[debug]
seed = 0
"""
    )
    return config


def test_a_llama_trains_as_under_the_hosts_entry(tmp_path: Path) -> None:
    cache = f"import datasets; datasets.config.HF_DATASETS_CACHE = {str(tmp_path / 'cache')!r}\n"
    config = write_llama_job(tmp_path)
    steps = []
    for number, entry in enumerate((OWN, STOCK)):
        run = tmp_path / f"run{number}"
        result = run_python("-c", cache + entry, "--job.config_file", config, "--job.dump_folder", run)
        assert result.returncode == 0 and "Training completed" in result.stdout, result.stdout
        steps.append(STEP.findall(result.stdout))
        assert not (run / "model.json").exists()
    assert [number for number, _, _ in steps[0]] == ["1", "2"]
    assert steps[0] == steps[1]
