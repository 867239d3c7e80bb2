"""What the documentation shows is there and runs."""

import re
import tomllib
from pathlib import Path

from torchtitan.config import ConfigManager
from torchtitan.config import JobConfig as HostConfig

from megalodon_plugin.titan.job_config import JobConfig

from architecture.sources import ROOT, label

PAGES = [ROOT / "README.md", *sorted([*(ROOT / "kernels").rglob("*.md"), *(ROOT / "docs").rglob("*.md")])]
LINK = re.compile(r"\]\((?!https?:)([^)#]+)\)")
NAMED_FILE = re.compile(r"\b((?:train_configs|tests|megalodon_plugin|docs)/[\w./]+\.(?:toml|py|md))\b")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    return [code for found, code in BLOCK.findall(page.read_text()) if found == language]


def run_example(page: str) -> dict:
    """The names that the page's Python example leaves."""
    (code,) = blocks(ROOT / page, "python")
    names: dict = {}
    exec(compile(code, page, "exec"), names)
    return names


def test_readme_example_runs() -> None:
    names = run_example("README.md")
    assert names["logits"].shape == (1, 300, 32000)
    assert names["state"].position.tolist() == [1000]


def test_example_of_decoding_runs() -> None:
    assert run_example("docs/inference.md")["tokens"].shape == (2,)


def test_links_lead_somewhere() -> None:
    links = [(page, link) for page in PAGES for link in LINK.findall(page.read_text())]
    assert links
    assert not [f"{label(page)}: {link}" for page, link in links if not (page.parent / link).exists()]


def test_named_files_of_the_repository_exist() -> None:
    named = [(page, name) for page in PAGES for name in NAMED_FILE.findall(page.read_text())]
    assert named
    assert not [f"{label(page)}: {name}" for page, name in named if not (ROOT / name).exists()]


def test_toml_examples_hold_known_keys() -> None:
    merged = ConfigManager._merge_configs(HostConfig, JobConfig)
    examples = [(page, code) for page in PAGES for code in blocks(page, "toml")]
    assert examples
    wrong = []
    for page, code in examples:
        try:
            ConfigManager()._dict_to_dataclass(merged, tomllib.loads(code))
        except ValueError as error:  # an unknown key, or no TOML
            wrong.append(f"{label(page)}: {error}")
    assert not wrong
