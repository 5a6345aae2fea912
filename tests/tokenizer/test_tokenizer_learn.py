"""Learning a BPE: against a plain reference, for its split, its sizes and its sameness."""

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_texts import CODE, TEXTS
from tokenizers.pre_tokenizers import ByteLevel

from summerlm.core.errors import UsageError
from summerlm.tokenizer.learn import SPLIT, learn_bpe
from summerlm.tokenizer.pipeline import byte_pipeline
from summerlm.tokenizer.tokenizer import LoneSurrogateError

SPECIALS = ["<s>", "</s>", "<p>", "<think>", "</think>", "<doc>", "</doc>"]


def words(text: str) -> list[str]:
    """Cut a text at the borders that no token crosses."""
    splits = byte_pipeline(SPLIT).pre_tokenizer[0].pre_tokenize_str(text)
    return [word for word, _ in splits]


def reference_bpe(text: str, merges: int) -> list[bytes]:
    """Count every pair anew for every merge; of equals the pair of the smallest ids wins."""
    bytes_of = {character: byte for byte, character in gpt2_characters().items()}
    tokens = [bytes([bytes_of[character]]) for character in sorted(bytes_of)]
    ids = {token[0]: i for i, token in enumerate(tokens)}
    counts = Counter(words(text))
    splits = {word: [ids[byte] for byte in word.encode()] for word in counts}
    for made in range(256, 256 + merges):
        pairs: Counter[tuple[int, int]] = Counter()
        for word, split in splits.items():
            for pair in pairwise(split):
                pairs[pair] += counts[word]
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        tokens.append(tokens[best[0]] + tokens[best[1]])
        splits = {word: merge(split, best, made) for word, split in splits.items()}
    return tokens


def merge(split: list[int], pair: tuple[int, int], made: int) -> list[int]:
    merged: list[int] = []
    for token in split:
        if merged and (merged[-1], token) == pair:
            merged[-1] = made
        else:
            merged.append(token)
    return merged


def gpt2_characters() -> dict[int, str]:
    """Ask the library, byte by byte, for those bytes that can stand in UTF-8; the rest follow."""
    printable = {b for b in range(256) if chr(b).isprintable() and chr(b) != " "}
    hidden = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(hidden)}


def test_merges_are_those_of_a_plain_reference():
    learned = learn_bpe([CODE, CODE], 263 + 60)
    expected = [b""] * 7 + reference_bpe(CODE + CODE, 60)
    assert [learned.token_bytes(i) for i in range(learned.vocabulary)] == expected


def test_ids_begin_with_the_specials_and_hold_every_byte():
    tokenizer = learn_bpe([CODE], 280)
    assert tokenizer.specials == {token: i for i, token in enumerate(SPECIALS)}
    assert (tokenizer.bos, tokenizer.eos, tokenizer.vocabulary) == (0, 1, 280)
    single = [tokenizer.token_bytes(i) for i in range(7, 263)]
    assert sorted(single) == [bytes([byte]) for byte in range(256)]
    assert set(ByteLevel.alphabet()) == set(gpt2_characters().values())


@settings(deadline=None)
@given(text=TEXTS, vocabulary=st.integers(263, 280))
def test_what_one_text_teaches_encodes_any_text(text, vocabulary):
    tokenizer = learn_bpe([CODE], vocabulary)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.count_bytes(tokenizer.encode(text)) == len(text.encode())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("def f(x):\n        return x", ["def", " f", "(x", "):\n", "       ", " return", " x"]),
        ("a\n\n\n    b", ["a", "\n\n\n", "   ", " b"]),
        ("\tif x:\r\n\t\ty", ["\tif", " x", ":\r\n", "\t", "\ty"]),
        ("x   ", ["x", "   "]),
        ("it's we'LL", ["it", "'s", " we", "'LL"]),
        ("1234567 3.14", ["123", "456", "7", " ", "3", ".", "14"]),
        ("self._size += 1", ["self", "._", "size", " +=", " ", "1"]),
        ("naïve 日本語", ["naïve", " 日本語"]),
        ("<s>a</s><p>", ["<s", ">a", "</", "s", "><", "p", ">"]),
    ],
)
def test_the_split(text, expected):
    assert words(text) == expected


def test_a_line_s_indentation_becomes_one_token():
    tokenizer = learn_bpe(["if x:\n            pass\n" * 4], 275)
    assert len(tokenizer.encode("            pass")) < 4
    assert b" " * 11 in [tokenizer.token_bytes(i) for i in range(275)]


def test_special_spellings_in_the_texts_teach_no_special_id():
    tokenizer = learn_bpe(["<s></s><p></doc> <think>" * 50], 272)
    for text in SPECIALS:
        ids = tokenizer.encode(text * 3)
        assert tokenizer.decode(ids) == text * 3
        assert min(ids) >= len(SPECIALS)


@pytest.mark.parametrize("vocabulary", [-1, 0, 262])
def test_a_vocabulary_without_room_for_the_bytes_is_refused(vocabulary):
    with pytest.raises(UsageError, match=rf"vocabulary = {vocabulary}: should be at least 263"):
        learn_bpe([CODE], vocabulary)


def test_texts_that_teach_too_little_are_refused_with_what_they_teach():
    with pytest.raises(UsageError, match="the texts are too small, they teach only 264 ids"):
        learn_bpe(["ab ab"], 300)  # "ab"; a pair that occurs once isn't merged
    assert learn_bpe(["ab ab"], 264).token_bytes(263) == b"ab"


def test_a_lone_surrogate_in_the_texts_is_refused():
    def texts() -> Iterator[str]:
        yield "good"
        yield "bad \udead"

    with pytest.raises(LoneSurrogateError, match=r"U\+DEAD at character 4"):
        learn_bpe(texts(), 263)


def test_what_a_source_of_texts_raises_comes_through():
    def texts() -> Iterator[str]:
        yield "good"
        raise ConnectionError("the source went away")

    with pytest.raises(ConnectionError, match="went away"):
        learn_bpe(texts(), 263)


def test_the_same_texts_give_the_same_tokenizer_in_any_process():
    program = (
        "from tokenizer_texts import CODE; from summerlm.tokenizer.learn import learn_bpe; "
        "print(learn_bpe([CODE, CODE.upper(), CODE.swapcase()] * 9, 350).fingerprint)"
    )
    prints = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(sys.path),
                "PYTHONHASHSEED": str(threads),
                "RAYON_NUM_THREADS": str(threads),
            },
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for threads in (1, 2, 5)
    }
    assert len(prints) == 1
    assert learn_bpe([CODE], 280).fingerprint != learn_bpe([CODE], 281).fingerprint
