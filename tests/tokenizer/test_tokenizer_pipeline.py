"""A file that isn't ours, or is damaged, is refused with its name, whatever is wrong with it."""

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers.models import WordLevel

from summerlm.core.errors import UsageError
from summerlm.tokenizer.learn import learn_bpe
from summerlm.tokenizer.pipeline import ADDED
from summerlm.tokenizer.registry import load_tokenizer
from summerlm.tokenizer.tokenizer import Tokenizer

Definition = dict[str, Any]


def add(definition: Definition, token: str, special: bool = True) -> None:
    new = {**definition["added_tokens"][0], "content": token, "special": special}
    vocabulary = definition["model"]["vocab"]
    new["id"] = vocabulary.get(token, len(vocabulary.keys() | specials(definition)))
    definition["added_tokens"].append(new)


def specials(definition: Definition) -> set[str]:
    return {token["content"] for token in definition["added_tokens"]}


def learn_special(definition: Definition) -> None:
    """Merge "<", "p" and ">" to "<p>"."""
    definition["model"]["merges"] += [["<", "p"], ["<p", ">"]]
    vocabulary = definition["model"]["vocab"]
    vocabulary["<p"] = len(vocabulary)


def rename(definition: Definition, old: str, new: str) -> None:
    definition["model"]["vocab"][new] = definition["model"]["vocab"].pop(old)


WRONG: dict[str, tuple[Callable[[Definition], object], str]] = {
    "lower-cases": (
        lambda d: d.update(normalizer={"type": "Lowercase"}),
        "isn't a pipeline that SummerLM makes",
    ),
    "adds tokens around": (
        lambda d: d.update(post_processor=d["decoder"]),
        "isn't a pipeline that SummerLM makes",
    ),
    "drops merges": (
        lambda d: d["model"].update(dropout=0.5),
        "isn't a pipeline that SummerLM makes",
    ),
    "cuts long texts": (
        lambda d: d.update(
            truncation={"max_length": 9, "strategy": "LongestFirst", "stride": 0}
            | {"direction": "Right"}
        ),
        "isn't a pipeline that SummerLM makes",
    ),
    "drops what it splits at": (
        lambda d: d["pre_tokenizer"]["pretokenizers"][0].update(behavior="Removed"),
        "isn't a pipeline that SummerLM makes",
    ),
    "splits at white space": (
        lambda d: d.update(pre_tokenizer={"type": "Whitespace"}),
        "isn't a pipeline that SummerLM makes",
    ),
    "splits at nothing": (
        lambda d: d.update(pre_tokenizer=None),
        "isn't a pipeline that SummerLM makes",
    ),
    "a token that isn't special": (lambda d: add(d, "hello", False), "aren't special"),
    "a special byte": (lambda d: add(d, "a"), "no ordinary token for 1 of the 256 bytes"),
    "a special made by a merge": (learn_special, "text could make its token '<p>'"),
    "a gap in the ids": (lambda d: d["model"]["vocab"].update(new=999), "don't count from 0"),
    "an id twice": (lambda d: d["model"]["vocab"].update(new=20), "don't count from 0"),
    "no byte 0": (lambda d: rename(d, "Ā", "ĀĀ"), "no ordinary token for 1 of the 256 bytes"),
    "a token without bytes": (
        lambda d: d["model"]["vocab"].update({"日本": len(d["model"]["vocab"])}),
        "token '日本' stands for no bytes",
    ),
    "no end of document": (
        lambda d: d["added_tokens"].pop(1),
        r"lacks the special tokens \['</s>'\]",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_definition_that_breaks_a_promise_is_refused(learned, tmp_path, what):
    spoil, message = WRONG[what]
    learned.save(tmp_path)
    file = tmp_path / "tokenizer.json"
    definition = json.loads(file.read_text())
    spoil(definition)
    file.write_text(json.dumps(definition))
    Backend.from_str(file.read_text())  # the library itself is content
    with pytest.raises(UsageError, match=rf"tokenizer\.json: not a tokenizer.*{message}"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(("left", "right"), [("[IN", "ST]"), ("<0x", "41>"), ("é", "")])
def test_a_special_that_text_could_make_in_the_space_pipeline_is_refused(
    mistral, tmp_path, left, right
):
    definition = json.loads(mistral._backend.to_str())
    if right:
        definition["model"]["merges"].append([left, right])
        vocabulary = definition["model"]["vocab"]
        for token in (*ADDED, left, right):
            vocabulary.setdefault(token, len(vocabulary))
    else:
        add(definition, left)
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    with pytest.raises(UsageError, match=rf"text could make its token '{re.escape(left + right)}'"):
        Tokenizer.load(tmp_path)


def test_a_damaged_file_is_refused_or_means_the_same(tmp_path):
    """Cut it, flip its bytes: no other error, and never a tokenizer that loses text."""
    learn_bpe(["the cat sat. " * 3], 266).save(tmp_path)
    file = tmp_path / "tokenizer.json"
    whole, draw, text = file.read_bytes(), random.Random(0), "<s>the cat\n é</s>"
    refused = kept = 0
    for _ in range(300):
        damaged = bytearray(whole)
        if draw.random() < 0.3:
            del damaged[draw.randrange(len(damaged)) :]
        for _ in range(2):
            damaged[draw.randrange(len(damaged) or 1) : 1] = bytes([draw.randrange(256)])
        file.write_bytes(damaged)
        try:
            tokenizer = Tokenizer.load(file)
        except UsageError as error:
            refused += str(error).startswith(f"{file}: ") and "\n" not in str(error)
        else:
            kept += tokenizer.decode(tokenizer.encode(text)) == text
    assert refused + kept == 300
    assert refused > 200


@pytest.mark.parametrize("content", [b"", b"{}", b"[" * 100_000, b"null", b"\xff\xfe", b'{"a": 1}'])
def test_what_is_no_tokenizer_at_all_is_refused(tmp_path: Path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(UsageError, match=r"tokenizer\.json: can't be read as a tokenizer"):
        Tokenizer.load(tmp_path)


def test_another_kind_of_model_is_refused(tmp_path: Path):
    Backend(WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "other.json"))
    with pytest.raises(UsageError, match=r"other\.json: not a tokenizer of SummerLM"):
        Tokenizer.load(tmp_path / "other.json")


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(UsageError, match=r"nowhere\.json: no such file"):
        Tokenizer.load(tmp_path / "nowhere.json")
    with pytest.raises(UsageError, match=r"tokenizer\.json: no such file"):
        Tokenizer.load(tmp_path)


def test_names_lead_to_tokenizers(mistral, learned, tmp_path: Path):
    learned.save(tmp_path)
    assert load_tokenizer("mistral-v3").fingerprint == mistral.fingerprint
    assert load_tokenizer(str(tmp_path)).fingerprint == learned.fingerprint
    assert load_tokenizer(str(tmp_path / "tokenizer.json")).fingerprint == learned.fingerprint
    with pytest.raises(UsageError, match="no tokenizer 'mistral-v4': name mistral-v3 or a token"):
        load_tokenizer("mistral-v4")
