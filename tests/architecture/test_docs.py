"""What the documentation shows is there and runs."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "kernels" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    return [code for found, code in BLOCK.findall(page.read_text()) if found == language]


def test_readme_example_runs() -> None:
    (code,) = blocks(ROOT / "README.md", "python")
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["logits"].shape == (1, 300, 32000)
    assert names["state"].position.tolist() == [1000]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text())
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_named_files_of_the_repository_exist(page: Path) -> None:
    named = set(
        re.findall(r"\b((?:train_configs|tests|megalodon_plugin|docs)/[\w./]+\.(?:toml|py|md))\b", page.read_text())
    )
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_toml_examples_hold_known_keys(page: Path) -> None:
    from torchtitan.config import ConfigManager
    from torchtitan.config import JobConfig as HostConfig

    from megalodon_plugin.titan.job_config import JobConfig

    merged = ConfigManager._merge_configs(HostConfig, JobConfig)
    for code in blocks(page, "toml"):
        ConfigManager()._dict_to_dataclass(merged, tomllib.loads(code))  # raises for an unknown key
