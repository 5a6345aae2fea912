"""Planted copies are found, others stay, and the lists depend on the documents' order alone."""

import gzip
import json
import random
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from summerlm.core.errors import DataChangedError, SaveError, UsageError
from summerlm.data.rules import duplicates
from summerlm.data.rules.droplists import DropLists
from summerlm.data.rules.duplicates import GRAM, LIKENESS, SLOTS, Document, find_duplicates
from summerlm.data.rules.words import normalised_words


@pytest.fixture(scope="module")
def texts(request):
    """Real texts of at least 60 words: prose, code, LaTeX."""
    data = request.getfixturevalue("stand_in_data")
    hub = data / "hub"
    found = []
    for folder, column in (("HuggingFaceFW", "text"), ("bigcode", "content")):
        for file in sorted((hub / folder).rglob("*.parquet"))[:2]:
            found += pq.read_table(file, columns=[column]).column(0).to_pylist()
    for file in sorted((hub / "common-pile/arxiv_papers_filtered").rglob("*.gz"))[:1]:
        with gzip.open(file) as lines:
            found += [json.loads(line)["text"] for line in lines]
    return [text for text in found if len(normalised_words(text)) >= 60]


def shingles(text):
    words = normalised_words(text)
    return {tuple(words[i : i + GRAM]) for i in range(len(words) - GRAM + 1)}


def likeness(one, other):
    a, b = shingles(one), shingles(other)
    return len(a & b) / max(len(a | b), 1)


def dropped(texts, near=True):
    lists = find_duplicates(Document("x", n, text, near) for n, text in enumerate(texts))
    return lists.exact["x"].tolist(), lists.near["x"].tolist()


def few_words_changed(text, draw):
    words = text.split(" ")
    for place in draw.sample(range(len(words)), max(len(words) // 80, 1)):
        words[place] = draw.choice(["zebra", "QUARTZ", "--", "vex"])
    return " ".join(words)


def paragraph_added(text, draw):
    extra = " ".join(draw.choices(text.split(), k=len(text.split()) // 10 + 1))
    paragraphs = text.split("\n\n")
    paragraphs.insert(draw.randrange(len(paragraphs) + 1), extra)
    return "\n\n".join(paragraphs)


def paragraph_removed(text, draw):
    words = text.split(" ")
    length = max(len(words) // 10, 1)
    start = draw.randrange(len(words) - length + 1)
    return " ".join(words[:start] + words[start + length :])


def reformatted(text, draw):
    return text.upper().replace(", ", " , ").replace("\n", "\r\n") + "\n(Copied)"


CHANGES = [few_words_changed, paragraph_added, paragraph_removed, reformatted]


@pytest.mark.parametrize("change", CHANGES)
def test_planted_near_duplicates_are_dropped(change, texts):
    draw = random.Random(1)
    originals = draw.sample(texts, 650)
    plants = [change(text, draw) for text in originals]
    order = [*originals, *plants]
    alike = [
        n
        for n, (text, plant) in enumerate(zip(originals, plants, strict=True), len(originals))
        if likeness(text, plant) >= 0.8
    ]
    exact, near = dropped(order)
    assert len(alike) >= 500
    assert len(set(alike) & {*exact, *near}) >= 0.99 * len(alike)


def test_planted_exact_copies_are_dropped_all(texts):
    copies = texts[::3]
    assert len(copies) > 500
    for near in (False, True):
        exact, _ = dropped([*texts, *copies], near)
        assert exact == list(range(len(texts), len(texts) + len(copies)))


def test_what_is_dropped_is_alike(texts):
    """By brute force: each dropped text has an earlier one that is about alike, none else has."""
    sample = texts[700:2000:4]
    exact, near = dropped(sample)
    assert not exact
    runs = [shingles(text) for text in sample]
    places = {}
    for number, run in enumerate(runs):
        for gram in run:
            places.setdefault(gram, []).append(number)
    best = [0.0] * len(sample)  # likeness with any earlier text
    for number, run in enumerate(runs):
        shared = {}
        for gram in run:
            for other in places[gram]:
                if other < number:
                    shared[other] = shared.get(other, 0) + 1
        for other, common in shared.items():
            best[number] = max(best[number], common / (len(run) + len(runs[other]) - common))
    assert all(best[number] >= LIKENESS - 0.12 for number in near)
    assert {n for n, value in enumerate(best) if value >= LIKENESS + 0.12} <= set(near)
    assert 0 < len(near) < 0.02 * len(sample)


def test_estimates_are_those_of_the_sets(texts):
    """Of pairs of any likeness the share of equal slots is off as a binomial share is."""
    draw = random.Random(2)
    errors = []
    for text in draw.sample(texts, 300):
        words = text.split(" ")
        other = " ".join(words[: draw.randint(len(words) // 3, len(words))])
        if min(len(normalised_words(text)), len(normalised_words(other))) >= GRAM:
            one, two = map(duplicates._signature, (text, other))
            true = likeness(text, other)
            errors.append(
                ((one == two).mean() - true) / max((true * (1 - true) / SLOTS), 1e-4) ** 0.5
            )
    assert abs(np.mean(errors)) < 0.25
    assert np.std(errors) < 1.2


def test_the_earliest_stays_over_all_sources():
    words = [f"word{n}" for n in range(200)]
    first, second = " ".join(words), " ".join([*words, "more"])
    fed = [("a", 7, second), ("b", 9, first), ("b", 3, second), ("a", 2, first), ("c", 0, "else")]
    lists = find_duplicates(Document(*row, near=True) for row in fed)
    assert {name: rows.tolist() for name, rows in lists.exact.items()} == {
        "a": [2],
        "b": [3],
        "c": [],
    }
    assert {name: rows.tolist() for name, rows in lists.near.items()} == {
        "a": [],
        "b": [9],
        "c": [],
    }
    assert lists.near["c"].dtype == lists.exact["a"].dtype == np.int64


def test_positions_ascend_whatever_their_order():
    """Held-out rows may be fed first."""
    lists = find_duplicates(Document("x", position, "same", False) for position in (5, 9, 3, 7))
    assert lists.exact["x"].tolist() == [3, 7, 9]


def test_only_documents_that_ask_are_compared_by_likeness():
    words = [f"word{n}" for n in range(200)]
    one, two, three = (" ".join([*words, extra]) for extra in "abc")
    fed = [Document("x", 0, one, False), Document("x", 1, two, True), Document("x", 2, three, True)]
    assert find_duplicates(fed).near["x"].tolist() == [2]
    fed = [Document("x", 0, one, True), Document("x", 1, two, False), Document("x", 2, three, True)]
    assert find_duplicates(fed).near["x"].tolist() == [2]


def test_an_exact_copy_is_no_near_duplicate_too():
    text = " ".join(f"word{n}" for n in range(20))
    assert dropped([text, text, text]) == ([1, 2], [])


def test_short_texts_are_compared_exactly_only():
    assert dropped(["one two three four", "One two three four!", "one two three four"]) == ([2], [])
    assert dropped(["one two three four five", "One two three four five!"]) == ([], [1])
    assert dropped(["", "!", ""]) == ([2], [])


def test_texts_without_spaces_are_compared():
    draw = random.Random(3)
    text = "".join(draw.choices([chr(c) for c in range(0x4E00, 0x4F00)], k=300))
    other = "".join(draw.choices([chr(c) for c in range(0x4E00, 0x4F00)], k=300))
    assert dropped([text, text[:150] + "一" + text[150:], other]) == ([], [1])


documents = st.lists(
    st.tuples(
        st.sampled_from("ab"),
        st.lists(st.sampled_from("uvwxyz"), max_size=12).map(" ".join),
        st.booleans(),
    ),
    max_size=30,
)


@settings(deadline=None)
@given(documents)
def test_lists_keep_their_rules(fed):
    fed = [Document(source, 5 * n, text, near) for n, (source, text, near) in enumerate(fed)]
    lists = find_duplicates(fed)
    exact = {n for n, document in enumerate(fed) if document.text in {d.text for d in fed[:n]}}
    near = {5 * n // 5 for rows in lists.near.values() for n in rows // 5}
    assert {n for rows in lists.exact.values() for n in rows // 5} == exact
    assert not exact & near
    for n in near:
        assert fed[n].near
        assert any(likeness(fed[n].text, earlier.text) > 0.4 for earlier in fed[:n] if earlier.near)
    stays = [document for n, document in enumerate(fed) if n not in exact | near]
    assert not any(rows.size for rows in find_duplicates(stays).exact.values())


def test_the_size_of_what_is_read_at_once_changes_nothing(texts, monkeypatch):
    draw = random.Random(4)
    fed = [*texts[:300], *(few_words_changed(text, draw) for text in texts[:300])]
    whole = dropped(fed)
    assert len(whole[1]) > 290
    monkeypatch.setattr(duplicates, "_CHUNK", 7)
    assert dropped(fed) == whole
    assert dropped(iter(fed)) == whole


def test_a_bucket_is_bounded_and_still_drops_copies_of_its_first(monkeypatch):
    monkeypatch.setattr(duplicates, "BUCKET_KEPT", 2)
    signatures = np.arange(4 * SLOTS, dtype=np.uint32).reshape(4, SLOTS)
    stay = duplicates._thin(signatures[[0, 1, 2, 0, 1, 2]], np.arange(6))
    assert stay.tolist() == [True, True, True, False, False, True]  # the third was not remembered


def test_signatures_are_those_that_lists_were_made_with():
    """Another algorithm gives other lists: a new version of rensa must be noticed here."""
    signature = duplicates._signature(" ".join(f"word{n}" for n in range(40)))
    assert signature[:4].tolist() == [3282413204, 1867291166, 3347198026, 3136937783]


def test_memory_grows_by_50_bytes_a_document(monkeypatch):
    """Half the documents fall into one bucket, none of them like another."""
    draw = np.random.default_rng(5)

    def signature(text):
        slots = draw.integers(2**32, size=SLOTS, dtype=np.uint32)
        slots[:6] *= int(text) % 2
        return slots

    monkeypatch.setattr(duplicates, "_signature", signature)
    monkeypatch.setattr(duplicates, "_CHUNK", 1000)

    def peak(count):
        tracemalloc.start()
        find_duplicates(Document("x", n, str(n), True) for n in range(count))
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    few, many = peak(5_000), peak(15_000)
    assert (many - few) / 10_000 < 50


def test_nothing_is_left_on_the_disk(tmp_path):
    find_duplicates([Document("x", 0, "a b c d e f", True)], tmp_path)

    def broken():
        yield Document("x", 0, "a b c d e f", True)
        raise RuntimeError

    with pytest.raises(RuntimeError):
        find_duplicates(broken(), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_no_room_is_told(tmp_path):
    with pytest.raises(SaveError, match=r"missing.*make"):
        find_duplicates([], tmp_path / "missing")
    full = Path("/dev/full")
    with (
        pytest.raises(SaveError, match="No space left"),
        duplicates._saving(),
        full.open("wb") as f,
    ):
        f.write(b"x" * 100_000)


def test_another_rensa_is_refused(monkeypatch):
    document = Document("x", 0, "a b c d e f", True)
    other = SimpleNamespace(RMinHash=SimpleNamespace(ALGORITHM_VERSION=3))
    monkeypatch.setitem(__import__("sys").modules, "rensa", other)
    with pytest.raises(UsageError, match=r"version 3.*pip install"):
        find_duplicates([document])
    monkeypatch.setitem(__import__("sys").modules, "rensa", None)
    with pytest.raises(UsageError, match="needs rensa: pip install"):
        find_duplicates([document])
    assert find_duplicates([document._replace(near=False)]).exact["x"].size == 0


LISTS = DropLists(
    {"web/é": np.array([3, 5]), "b": np.array([], np.int64)},
    {"web/é": np.array([4]), "b": np.array([2**40])},
)


def test_lists_come_back_from_their_file(tmp_path):
    file = tmp_path / "folder" / "lists.npz"
    LISTS.save(file)
    back = DropLists.load(file, LISTS.sha256)
    assert back.sha256 == LISTS.sha256
    for old, new in ((LISTS.exact, back.exact), (LISTS.near, back.near)):
        assert list(old) == list(new)
        assert all((old[name] == new[name]).all() and new[name].dtype == np.int64 for name in old)
    assert [path.name for path in file.parent.iterdir()] == ["lists.npz"]


def test_every_content_has_its_own_hash():
    rows = np.array([1, 2])
    none = np.array([], np.int64)
    variants = [
        DropLists({"a": rows, "b": none}, {"a": none, "b": none}),
        DropLists({"a": none, "b": rows}, {"a": none, "b": none}),
        DropLists({"a": none, "b": none}, {"a": rows, "b": none}),
        DropLists({"a": rows[:1], "b": none}, {"a": rows[1:], "b": none}),
        DropLists({"a": rows, "b": none}, {"a": none, "b": rows}),
        DropLists({"a": rows, "c": none}, {"a": none, "c": none}),
    ]
    assert len({lists.sha256 for lists in variants}) == len(variants)
    again = DropLists({"b": none, "a": rows}, {"b": none, "a": none})
    assert again.sha256 == variants[0].sha256


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "flipped", "other", "pickle"])
def test_damaged_lists_are_refused(tmp_path, damage):
    file = tmp_path / "lists.npz"
    LISTS.save(file)
    content = bytearray(file.read_bytes())
    if damage == "missing":
        file.unlink()
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "cut":
        file.write_bytes(content[:-30])
    elif damage == "flipped":
        content[content.index(b"exact0.npy") + 30] ^= 0x55
        file.write_bytes(content)
    elif damage == "other":
        DropLists({"b": np.array([1])}, {"b": np.array([2])}).save(file)
    else:
        np.savez(file, sources=np.array([{}], object))
    with pytest.raises(DataChangedError, match=r"lists\.npz.*remove it"):
        DropLists.load(file, LISTS.sha256)
