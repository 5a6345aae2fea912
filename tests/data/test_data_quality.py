"""Gopher's rules against a plain reading of them, and on both sides of every threshold."""

import re
from collections import Counter
from fractions import Fraction

import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from summerlm.data.rules.quality import QUALITY, REPETITION, RULES, failing

TABLE_A1 = {
    "gopher-duplicate-lines": 0.30,
    "gopher-duplicate-paragraphs": 0.30,
    "gopher-duplicate-line-characters": 0.20,
    "gopher-duplicate-paragraph-characters": 0.20,
    "gopher-top-2-grams": 0.20,
    "gopher-top-3-grams": 0.18,
    "gopher-top-4-grams": 0.16,
    "gopher-duplicate-5-grams": 0.15,
    "gopher-duplicate-6-grams": 0.14,
    "gopher-duplicate-7-grams": 0.13,
    "gopher-duplicate-8-grams": 0.12,
    "gopher-duplicate-9-grams": 0.11,
    "gopher-duplicate-10-grams": 0.10,
}
BULLETS = "•‣◦⁃▪■●○·*-–"


def share(part, whole):
    return Fraction(part, whole) if whole else Fraction(0)


def repeated(pieces):
    """Pieces after their first occurrence."""
    return [piece for place, piece in enumerate(pieces) if piece in pieces[:place]]


def characters(pieces):
    return sum(len(piece) for piece in pieces)


def quality_by_hand(text):
    words = text.split()
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    stops = set(re.findall(r"\b(the|be|to|of|and|that|have|with)\b", text.lower()))
    ellipses = len(re.findall(r"\.\.\.|…", text))
    return {
        "gopher-words": not 50 <= len(words) <= 100_000,
        "gopher-word-length": bool(words) and not 3 <= share(characters(words), len(words)) <= 10,
        "gopher-symbols": share(max(text.count("#"), ellipses), len(words)) > Fraction("0.1"),
        "gopher-bullets": share(sum(x[0] in BULLETS for x in lines), len(lines)) > Fraction("0.9"),
        "gopher-ellipses": share(sum(x.endswith(("...", "…")) for x in lines), len(lines))
        > Fraction("0.3"),
        "gopher-letters": bool(words)
        and share(sum(any(c.isalpha() for c in word) for word in words), len(words))
        < Fraction("0.8"),
        "gopher-stop-words": len(stops) < 2,
    }


def repetition_by_hand(text):
    words = text.split()
    lines, paragraphs = [], [[]]
    for line in map(str.strip, text.splitlines()):
        if line:
            lines.append(line)
            paragraphs[-1].append(line)
        else:
            paragraphs.append([])
    paragraphs = ["\n".join(lines) for lines in paragraphs if lines]
    shares = {}
    for name, pieces in (("line", lines), ("paragraph", paragraphs)):
        again = repeated(pieces)
        shares[f"gopher-duplicate-{name}s"] = share(len(again), len(pieces))
        shares[f"gopher-duplicate-{name}-characters"] = share(characters(again), characters(pieces))
    for n in range(2, 11):
        grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        if n < 5:
            counts = Counter(grams)
            most = max(counts.values(), default=0)
            top = max((characters(g) for g in counts if counts[g] == most), default=0)
            part = most * top if most > 1 else 0
        else:
            inside = {i + k for i in range(len(grams)) if grams[i] in grams[:i] for k in range(n)}
            part = characters(words[i] for i in inside)
        kind = "top" if n < 5 else "duplicate"
        shares[f"gopher-{kind}-{n}-grams"] = share(part, characters(words))
    return {name: shares[name] > Fraction(str(TABLE_A1[name])) for name in TABLE_A1}


def by_hand(text):
    verdicts = {**quality_by_hand(text), **repetition_by_hand(text)}
    return {name for name in verdicts if verdicts[name]}


PIECES = (
    "the be to of and that have with a I WITH That's other_the words naïve 北京 x1 123 4.5 ² ½ Ⅷ # "
    "## #... wait... … – - • * •x -- ? \u0301 " + "w" * 40
).split(" ")
SPACES = (
    " ",
    " ",
    " ",
    "  ",
    "\t",
    "\n",
    "\n",
    "\r\n",
    "\n\n",
    "\r\n\r\n",
    " \n \n",
    "\u2028",
    "\x0c",
    "",
)
odd_texts = st.lists(st.tuples(st.sampled_from(PIECES), st.sampled_from(SPACES)), max_size=80).map(
    lambda pairs: "".join(piece + space for piece, space in pairs)
)
few_words = st.lists(st.sampled_from(["a", "bc", "def\n", "the\n\n"]), max_size=60).map(" ".join)


@settings(max_examples=300, deadline=None)
@given(st.one_of(odd_texts, few_words, st.text()))
@example("")
@example(" \n\r\n\t")
@example("w" * 100_000)
@example("7" * 100_000)
@example("a " * 100)
@example("the same line and that is it\r\n" * 60)
def test_rules_agree_with_a_plain_reading(text):
    assert set(failing(text, RULES)) == by_hand(text)


def test_rules_agree_on_real_texts(stand_in_data):
    file = sorted((stand_in_data / "hub/HuggingFaceFW").rglob("*.parquet"))[0]
    web = pq.read_table(file, columns=["text"]).column(0).to_pylist()
    file = sorted((stand_in_data / "hub/bigcode").rglob("*.parquet"))[0]
    code = pq.read_table(file, columns=["content"]).column(0).to_pylist()
    texts = [text for text in web[::10] + code[::10] if len(text) < 6000]
    verdicts = [set(failing(text, RULES)) for text in texts]
    assert verdicts == [by_hand(text) for text in texts]
    assert len(set().union(*verdicts)) > 10


def words(count, length=5):
    """Different words of one length, two of them stop words."""
    return ["that", "with", *(f"{i:x}".rjust(length, "g") for i in range(count - 2))]


def lines_of(*counts):
    """Lines of equal length, the k-th of them so many times."""
    return "\n".join(f"line {k:03}" for k, count in enumerate(counts) for _ in range(count))


def grams(n, times, others):
    """A gram of n words, so often, and other words, all of five characters."""
    gram = [f"gram{i:x}" for i in range(n)]
    rest = iter(f"w{i:04}" for i in range(others))
    text = []
    for _ in range(times):
        text += [*gram, next(rest)]  # parted by another word
    return " ".join([*text, *rest])


# rule: (a text at its threshold, which stays, and one a little past it)
EDGES = {
    "few words": ("gopher-words", " ".join(words(50)), " ".join(words(49))),
    "many words": ("gopher-words", "ab " * 100_000, "ab " * 100_001),
    "short words": ("gopher-word-length", "abc " * 60, "abc " * 60 + "ab"),
    "long words": ("gopher-word-length", "abcdefghij " * 60, "abcdefghij " * 60 + "abcdefghijk"),
    "hashes": ("gopher-symbols", "a " * 90 + "# " * 10, "a " * 90 + "## " + "# " * 9),
    "dots": ("gopher-symbols", "a " * 90 + "a... " * 10, "a " * 89 + "a... " * 11),
    "ellipsis signs": ("gopher-symbols", "a " * 90 + "a… " * 10, "a " * 89 + "a… " * 11),
    "bullets": ("gopher-bullets", "x\n" + "- y\n" * 9, "x\n" + " • y\n" * 10),
    "ellipses": ("gopher-ellipses", "x\n" * 7 + "y... \n" * 3, "x\n" * 6 + "y...\r\n" * 2 + "z…\n"),
    "letters": ("gopher-letters", "ab " * 80 + "12 " * 20, "ab " * 80 + "12 " * 21),
    "stop words": ("gopher-stop-words", "The cat, (of) all", "The cat, the other, together"),
    "lines": ("gopher-duplicate-lines", lines_of(4, *[1] * 6), lines_of(5, *[1] * 6)),
    "line characters": (
        "gopher-duplicate-line-characters",
        lines_of(3, *[1] * 7),
        lines_of(3, *[1] * 6),
    ),
    "paragraphs": (
        "gopher-duplicate-paragraphs",
        lines_of(4, *[1] * 6).replace("\n", "\n\n"),
        lines_of(5, *[1] * 6).replace("\n", "\r\n \r\n"),
    ),
    "paragraph characters": (
        "gopher-duplicate-paragraph-characters",
        lines_of(3, *[1] * 7).replace("\n", "\n\n"),
        lines_of(3, *[1] * 6).replace("\n", "\n\n\n"),
    ),
    "top 2": ("gopher-top-2-grams", grams(2, 10, 80), grams(2, 10, 79)),
    "top 3": ("gopher-top-3-grams", grams(3, 6, 82), grams(3, 6, 81)),
    "top 4": ("gopher-top-4-grams", grams(4, 4, 84), grams(4, 4, 83)),
    **{
        f"duplicate {n}": (
            f"gopher-duplicate-{n}-grams",
            # one copy of n words is a percentage of 100 n / percentage words
            grams(n, percent + 1, n * (100 - percent - 1)),
            grams(n, percent + 1, n * (100 - percent - 1) - 1),
        )
        for n, percent in zip(range(5, 11), range(15, 9, -1), strict=True)
    },
}


@pytest.mark.parametrize("edge", EDGES)
def test_thresholds(edge):
    name, stays, goes = EDGES[edge]
    assert list(failing(stays, [name])) == []
    assert list(failing(goes, [name])) == [name]


def test_every_rule_has_an_edge_and_its_threshold_in_its_sentence():
    assert {name for name, _, _ in EDGES.values()} == set(RULES)
    for name, threshold in TABLE_A1.items():
        assert f"{round(100 * threshold)} %" in REPETITION[name].sentence
    assert set(QUALITY) == set(quality_by_hand(""))


def test_overlapping_copies_count_once():
    text = "a b " * 50 + " ".join(words(600))  # 100 words of one character, all but 2 repeated
    assert list(failing(text, ["gopher-duplicate-5-grams"])) == []


def test_rules_come_in_the_order_asked_and_only_these_are_computed(monkeypatch):
    def refuse(measures):
        raise AssertionError("not asked")

    monkeypatch.setitem(RULES, "gopher-letters", RULES["gopher-letters"]._replace(hits=refuse))
    names = ["gopher-stop-words", "gopher-words", "gopher-letters"]
    found = failing("- ", names)
    assert [next(found), next(found)] == names[:2]
    with pytest.raises(AssertionError, match="not asked"):
        next(found)
