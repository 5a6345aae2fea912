"""What the tokenizer's tests share: the two kinds of tokenizer, the reference, real documents."""

import gzip
import json
import os
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from sentencepiece import SentencePieceProcessor
from tokenizer_texts import CODE

from summerlm.tokenizer.learn import learn_bpe
from summerlm.tokenizer.mistral import mistral_v3
from summerlm.tokenizer.tokenizer import Tokenizer

DATA = Path(os.environ.get("SUMMERLM_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))


@pytest.fixture(scope="session")
def mistral() -> Tokenizer:
    return mistral_v3()


@pytest.fixture(scope="session")
def learned() -> Tokenizer:
    return learn_bpe([CODE, CODE.upper(), "naïve café 日本語 " * 3], 300)


@pytest.fixture(scope="session", params=["mistral", "learned"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def reference() -> SentencePieceProcessor:
    folder = resources.files("mistral_common") / "data"
    return SentencePieceProcessor(
        model_file=str(folder / "mistral_instruct_tokenizer_240323.model.v3")
    )


@pytest.fixture(scope="session")
def documents() -> list[str]:
    """Every distinct text of the stand-in data, whatever its column."""
    if not DATA.is_dir():
        pytest.skip(f"no stand-in data at {DATA}; set SUMMERLM_TEST_DATA")
    texts: dict[str, None] = {}
    for file in sorted(DATA.rglob("*.parquet")):
        texts.update(dict.fromkeys(strings(pyarrow.parquet.read_table(file).to_pylist())))
    for file in sorted(DATA.rglob("*.json.gz")):
        with gzip.open(file, "rt", encoding="utf-8") as lines:
            texts.update(dict.fromkeys(strings([json.loads(line) for line in lines])))
    assert len(texts) > 10_000
    return list(texts)


def strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from strings(inner)
