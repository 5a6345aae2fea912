"""What tests of several stations share: the stand-in data, and a run that trains in seconds."""

import os

# tests run side by side, one core each; before torch is imported, and for subprocesses too
os.environ.setdefault("OMP_NUM_THREADS", "1")

import random
from importlib.util import find_spec
from pathlib import Path

import pytest
from tiny import TINY

from summerlm.core.config import read_settings
from summerlm.recipes.settings import Settings
from summerlm.tokenizer.learn import learn_bpe


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let tests of ranks come first: these are forks, and a fork of a process in which compilers
    and profilers have left threads and locks may never come to its first line."""
    items.sort(key=lambda item: item.get_closest_marker("ranks") is None)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs packages that aren't there, or fail where they are required."""
    for marker in item.iter_markers("peers"):
        if missing := [name for name in marker.args if find_spec(name) is None]:
            lacking = f"needs {', '.join(missing)}: make peers"
            if os.environ.get("SUMMERLM_TEST_PEERS") == "required":
                pytest.fail(lacking, pytrace=False)
            pytest.skip(lacking)


@pytest.fixture(scope="session")
def stand_in_data() -> Path:
    """The folder of real text in the hub's layout; tests skip where it is missing."""
    default = Path(__file__).parent.parent.parent / "shared" / "data"
    folder = Path(os.environ.get("SUMMERLM_TEST_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"no stand-in data at {folder}; set SUMMERLM_TEST_DATA")
    return folder


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory) -> Path:
    """A folder of small text files, the same at every run."""
    folder = tmp_path_factory.mktemp("text")
    words = ["the", "sun", "rises", "over", "a", "small", "field", "and", "every", "bird", "sings"]
    draw = random.Random(0)
    for number in range(40):
        lines = [" ".join(draw.choices(words, k=9)) for _ in range(draw.randint(3, 30))]
        (folder / f"{number:02d}.txt").write_text("\n".join(lines) + f"\n{number}\n")
    return folder


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_text, tmp_path_factory) -> Path:
    """A learnt tokenizer of 300 ids."""
    folder = tmp_path_factory.mktemp("tokenizer")
    texts = (path.read_text() for path in sorted(tiny_text.iterdir()))
    learn_bpe(texts, 300).save(folder)
    return folder


@pytest.fixture
def tiny_config(tiny_text, tiny_tokenizer, tmp_path) -> Path:
    """A settings file of a run that trains in seconds, in a folder of its own."""
    path = tmp_path / "tiny.toml"
    path.write_text(
        TINY
        + f"""
[tokenizer]
name = "{tiny_tokenizer}"

[data.sources.text]
path = "{tiny_text}/*.txt"
weight = 1
licence = "CC0-1.0"

[run]
folder = "{tmp_path / "run"}"
"""
    )
    return path


@pytest.fixture
def tiny_settings(tiny_config) -> Settings:
    """The settings of `tiny_config`."""
    return read_settings(Settings, tiny_config)
