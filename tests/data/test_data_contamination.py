"""Planted items of evaluation sets are found however they are dressed; other texts are not hit."""

import gzip
import json
import pickle
import random
import re
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from summerlm.core.errors import UsageError
from summerlm.data.rules.contamination import (
    GRAM,
    SHORTEST,
    ContaminationIndex,
    Overlap,
    evaluation_texts,
)
from summerlm.data.rules.words import normalised_words

SETS = {
    "lambada": "EleutherAI/lambada_openai/default",
    "arc-easy": "allenai/ai2_arc/ARC-Easy",
    "arc-challenge": "allenai/ai2_arc/ARC-Challenge",
    "gsm8k": "openai/gsm8k/main",
    "wikitext": "Salesforce/wikitext/wikitext-2-v1",
}
MAIN = {"lambada": "text", "gsm8k": "question", "wikitext": "text"}  # else `question`


def file_of(data, name):
    (file,) = (data / "hub" / SETS[name]).rglob("*.parquet")
    return file


@pytest.fixture(scope="module")
def data(request):
    return request.getfixturevalue("stand_in_data")


@pytest.fixture(scope="module")
def index(data):
    return ContaminationIndex(
        (name, texts) for name in SETS for texts in evaluation_texts(file_of(data, name))
    )


@pytest.fixture(scope="module")
def hosts(data):
    """Documents to plant items in."""
    files = sorted((data / "hub/HuggingFaceFW").rglob("*.parquet"))
    texts = pq.read_table(files[0], columns=["text"]).column(0).to_pylist()
    return [text[:3000] for text in texts if len(text) > 1000][:200]


def recased(text):
    return "".join(c.upper() if i % 3 else c.lower() for i, c in enumerate(text))


def respaced(text):
    draw = random.Random(len(text))
    return re.sub(r"\s+", lambda _: draw.choice(["  ", "\n", "\r\n> ", "\t", "\u00a0"]), text)


def repunctuated(text):
    draw = random.Random(len(text))
    other = re.sub(r"[^\w\s]|_", lambda _: draw.choice(["–", "“", "?!", "*", "_"]), text)
    return re.sub(r" ", lambda _: draw.choice([" ", ", ", " (", "... ", "-"]), other)


DRESSES = {
    "as it is": str,
    "recased": recased,
    "respaced": respaced,
    "repunctuated": repunctuated,
    "all": lambda text: recased(respaced(repunctuated(text))),
}


def main_text(name, row):
    return row[MAIN.get(name, "question")]


@pytest.mark.parametrize("dress", DRESSES)
@pytest.mark.parametrize("name", SETS)
def test_planted_items_are_found(name, dress, data, index, hosts):
    rows = pq.read_table(file_of(data, name)).to_pylist()[:600]
    items = [main_text(name, row) for row in rows]
    items = [item for item in items if len(re.findall(r"[^\W_]+", item)) >= SHORTEST]
    draw = random.Random(0)
    found = 0
    for item in items:
        host = draw.choice(hosts)
        middle = draw.randrange(len(host))
        hit = index.hit(f"{host[:middle]} {DRESSES[dress](item)} {host[middle:]}")
        found += hit is not None and set(hit.words.split()) <= set(normalised_words(item))
    assert len(items) > 250
    assert found >= 0.99 * len(items)


def test_other_texts_are_not_hit(data, index, hosts):
    """Of the stand-in data no web page, module or book shares a run with an evaluation set."""
    folder = data / "hub"
    code = pq.read_table(sorted((folder / "bigcode").rglob("*.parquet"))[0]).column("content")
    with gzip.open(
        sorted((folder / "common-pile/project_gutenberg_filtered").rglob("*.gz"))[0]
    ) as f:
        books = [json.loads(line)["text"][:200_000] for line in f]
    texts = [*hosts, *code.to_pylist(), *books]
    assert len(texts) > 500
    assert [hit for text in texts if (hit := index.hit(text))] == []


def test_items_too_short_are_told(index):
    assert index.too_short["lambada"] == index.too_short["gsm8k"] == 0
    assert 0 < index.too_short["wikitext"] < index.items["wikitext"]  # headings
    assert index.items["gsm8k"] == 7473
    assert index.items["arc-easy"] == 300


def test_items_without_words_are_no_items():
    eight = "one two three four five six seven eight"
    index = ContaminationIndex([("a", [" "]), ("a", ["one two"]), ("a", [eight]), ("b", ["", "!"])])
    assert (+index.items, +index.too_short) == ({"a": 2}, {"a": 1})


def test_a_copy_travels_to_another_process_and_finds_the_same(index, hosts):
    copy = pickle.loads(pickle.dumps(index))
    item = "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips"
    assert index.hit(hosts[0] + item) == copy.hit(hosts[0] + item)
    assert index.hit(hosts[0] + item).evaluation_set == "gsm8k"


few_words = st.lists(st.sampled_from("abc"), max_size=40).map(" ".join)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.lists(few_words, max_size=3), max_size=4), few_words)
@example([["a b c a b c a b"]], "c c a b c a b c a b c")
@example([["a b c a b c a b"]], "c c a b c a b c a")
@example([[" ".join("abcabcabcabcabc")]], " ".join("bcabcabcabcab"))
@example([[" ".join("abcabcabcabcabc")]], " ".join("bcabcabcabca"))
def test_hits_are_those_of_plain_comparison(items, text):
    """Few letters, so that runs overlap and repeat."""
    index = ContaminationIndex((f"set {n}", texts) for n, texts in enumerate(items))
    runs = {}
    for number, texts in enumerate(items):
        for piece in texts:
            words = piece.split()
            if len(words) >= SHORTEST:
                n = min(len(words), GRAM)
                for start in range(len(words) - n + 1):
                    runs.setdefault(tuple(words[start : start + n]), f"set {number}")
    words = text.split()
    expected = None
    for start in range(len(words)):
        for n in range(GRAM, SHORTEST - 1, -1):
            run = tuple(words[start : start + n])
            if expected is None and run in runs:
                expected = Overlap(" ".join(run), runs[run])
    assert index.hit(text) == expected


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("xy"), st.lists(few_words, max_size=3))), few_words)
@example([("x", []), ("y", ["a b c a b c a b"]), ("x", ["a b c a b c a b"])], "a b c a b c a b c")
def test_every_item_that_shares_a_run_is_found(items, text):
    count, expected, words = {"x": 0, "y": 0}, set(), text.split()
    for name, texts in items:
        for piece in map(str.split, texts):
            n = min(len(piece), GRAM)
            runs = {tuple(piece[i : i + n]) for i in range(len(piece) - n + 1)}
            if n >= SHORTEST and any(tuple(words[i : i + n]) in runs for i in range(len(words))):
                expected.add((name, count[name]))
        count[name] += 1
    index = ContaminationIndex(items)
    found = index.items_in(text)
    assert found.keys() == expected
    assert all(f" {run} " in f" {text} " for run in found.values())
    assert bool(found) == (index.hit(text) is not None)


def test_every_run_has_the_name_of_its_set():
    pieces = [" ".join(f"word{n}x{k}" for k in range(8 + n % 8)) for n in range(60)]
    index = ContaminationIndex((f"set {n % 7}", [piece]) for n, piece in enumerate(pieces))
    hits = [index.hit(f"and {piece} so") for piece in pieces]
    assert [hit.evaluation_set for hit in hits] == [f"set {n % 7}" for n in range(60)]


def test_the_longer_run_comes_first():
    words = " ".join(f"word{n}" for n in range(13))
    index = ContaminationIndex([("short", [words[:47]]), ("long", [words])])
    assert index.hit(words) == Overlap(words, "long")
    assert index.hit(words[:47]) == Overlap(
        "word0 word1 word2 word3 word4 word5 word6 word7", "short"
    )


def test_the_first_set_that_has_a_run_is_named():
    words = " ".join(f"word{n}" for n in range(13))
    index = ContaminationIndex([("one", ["x"]), ("two", [f"{words} x"]), ("three", [f"y {words}"])])
    assert index.hit(words) == Overlap(words, "two")
    assert (
        ContaminationIndex([("one", [words]), ("two", [words])]).hit(words).evaluation_set == "one"
    )


def test_a_text_that_nearly_hits_everywhere_takes_no_longer():
    zeros = " ".join("0" * 12) + " 1"
    index = ContaminationIndex([("a", [zeros])])
    start = time.process_time()
    assert index.hit("0 " * 300_000) is None
    assert index.hit("0 " * 300_000 + "1") == Overlap(zeros, "a")
    assert time.process_time() - start < 3


def test_no_sets_and_no_words_hit_nothing():
    assert ContaminationIndex([]).hit("a " * 50) is None
    assert (
        ContaminationIndex([("quiz", ["one two three four five six seven eight"])]).hit("") is None
    )


ROWS = [
    {"id": "q1", "question": {"stem": "Why so?", "choices": ["No reason.", "Some"]}, "n": 7},
    {"id": "q2", "question": {"stem": "And then?", "choices": []}, "n": None},
]
LEAVES = [
    ["q1 Why so? No reason. Some", "q1", "Why so?", "No reason.", "Some"],
    ["q2 And then?", "q2", "And then?"],
]


def test_every_string_of_a_row_is_read_from_any_file(tmp_path):
    lines = "\n\n".join(map(json.dumps, ROWS)).encode()
    (tmp_path / "rows.jsonl").write_bytes(lines)
    (tmp_path / "by-hash").write_bytes(gzip.compress(lines))
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    for file in tmp_path.iterdir():
        assert list(evaluation_texts(file)) == LEAVES


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"a": "b"}\n{"a": ', "line 2"),
        (b"PAR1 and no more", "as an evaluation set"),
        (gzip.compress(b'{"a": "b"}' * 1000)[:-20], "end-of-stream"),
        (b'{"a": "\xff"}', "line 1"),
        (None, "No such file"),
    ],
    ids=["half a line", "not Parquet", "half a gzip", "not UTF-8", "absent"],
)
def test_a_file_that_cant_be_read_is_named(tmp_path, content, words):
    file = tmp_path / "evaluation"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UsageError, match=f"{re.escape(str(file))}.*{words}"):
        list(evaluation_texts(file))


@given(st.text())
@example("İSTANBUL ﬁne Ⅷ ½ ﷺ")
def test_words_are_alike_in_every_dress(text):
    words = normalised_words(text)
    assert all(word and word.casefold() == word for word in words)
    assert normalised_words(" ".join(words)) == words or not text.isascii()
    assert normalised_words(f"\n{text}!?") == words


@given(st.text(st.characters(max_codepoint=127)))
def test_words_of_ascii_are_those_of_any_text(text):
    marked = normalised_words(text + " \u2014")  # takes the way of other scripts
    assert normalised_words(text) == marked == re.findall("[a-z0-9]+", text.lower())


def test_words_are_alike_in_every_form_of_unicode():
    assert normalised_words("STRASSE") == normalised_words("straße") == ["strasse"]
    assert normalised_words("ﬁne １２") == ["fine", "12"]
    assert normalised_words("cafe\u0301") == normalised_words("CAFÉ")
    assert normalised_words("don’t") == normalised_words("don't") == ["don", "t"]


def test_scripts_without_spaces_are_cut_into_characters():
    assert normalised_words("我爱Python编程。カナ ไทย") == [
        "我",
        "爱",
        "python",
        "编",
        "程",
        "カ",
        "ナ",
        "ไ",
        "ท",
        "ย",
    ]
    assert normalised_words("한국어 문장") == ["한국어", "문장"]
