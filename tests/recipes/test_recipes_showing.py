"""Rows as printed: read back to the ids' meaning, whatever the texts spell."""

import io
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from summerlm.core.config import read_settings
from summerlm.data.batch import IGNORE
from summerlm.recipes.data.batches import open_loader
from summerlm.recipes.data.locking import open_data
from summerlm.recipes.data.showing import (
    CUT,
    FIRST,
    LINE_END,
    ON,
    SPECIAL,
    TEXT,
    row_lines,
    show_rows,
)
from summerlm.recipes.settings import Settings
from summerlm.tokenizer.learn import learn_bpe
from summerlm.tokenizer.registry import load_tokenizer

MARKS = [SPECIAL, TEXT, ON, FIRST, CUT, LINE_END, "─" * 20]
SPELLED = [
    "<s>",
    "</s>",
    "[INST]",
    "\n",
    "\t",
    "\r\n",
    "\x1b[31m",
    "\u202e",
    "東京",
    "e\u0301",
    "  ",
]
TEXTS = st.lists(
    st.sampled_from([*MARKS, *SPELLED, "the sun ", "rises"]) | st.text(max_size=4),
    min_size=1,
    max_size=12,
).map("".join)


@pytest.fixture(scope="module")
def tokenizers():
    # the second has learnt `<s>` as an ordinary token
    return [load_tokenizer("mistral-v3"), learn_bpe(["<s> <s> " * 50] * 9, 265)]


def shown(text):
    """What a text should look like, its line feeds as (LINE_END, new line)."""
    characters = (
        c if c == "\n" or (c.isprintable() and c != LINE_END) else ascii(c)[1:-1] for c in text
    )
    return "".join(characters)


def parse(lines):
    """Read printed lines back: documents as lists of (kind, content)."""
    documents = [[]]
    for line in lines:
        if set(line) == {"─"}:
            documents.append([])
            continue
        mark, content = line[:2], line[2:]
        kind = {SPECIAL: "special", TEXT: "text", ON: "text", FIRST: "text", CUT: "cut"}[mark]
        content = content.removesuffix(LINE_END) + "\n" * content.endswith(LINE_END)
        last = documents[-1][-1] if documents[-1] else None
        if kind == "text" and last and last[0] == "text":
            assert mark == (TEXT if last[1].endswith("\n") else ON)
            documents[-1][-1] = ("text", last[1] + content)
        else:
            documents[-1].append((kind, content))
    return documents


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(TEXTS, min_size=1, max_size=3),
    which=st.integers(0, 1),
    width=st.integers(12, 60),
)
def test_whole_documents_read_back(tokenizers, texts, which, width):
    tokenizer = tokenizers[which]
    ids = [i for t in texts for i in [tokenizer.bos, *tokenizer.encode(t), tokenizer.eos]]
    lines = [line.plain for line in row_lines(np.array(ids), tokenizer, 10_000, width)]
    assert all(cell_len(line) <= width for line in lines)
    texts = [text.replace("\u2581", " ") if which == 0 else text for text in texts]
    assert parse(lines) == [
        [("special", "<s>"), *[("text", shown(text))] * bool(text), ("special", "</s>")]
        for text in texts
    ]


@settings(max_examples=60, deadline=None)
@given(text=TEXTS, which=st.integers(0, 1), data=st.data())
def test_any_window_shows_each_special_id_and_no_other(tokenizers, text, which, data):
    tokenizer = tokenizers[which]
    ids = [tokenizer.bos, *tokenizer.encode(text), tokenizer.eos] * 3
    start = data.draw(st.integers(0, len(ids) - 2))
    ids = np.array(ids[start : data.draw(st.integers(start + 2, len(ids)))])
    tokens = data.draw(st.integers(2, 40))
    lines = [line.plain for line in row_lines(ids, tokenizer, tokens, 40)]
    special = np.isin(ids, list(tokenizer.specials.values())).tolist()
    printed = sum(line.startswith(SPECIAL) for line in lines)
    hidden = [
        [int(w.replace(",", "")) for w in line.split() if w.replace(",", "").isdigit()]
        for line in lines
        if line.startswith(CUT)
    ]
    assert printed + sum(cut[1] for cut in hidden) == sum(special)
    borders = int((ids[1:] == tokenizer.bos).sum())
    assert sum(set(line) == {"─"} for line in lines) == borders
    lengths = np.diff([0, *(np.flatnonzero(ids[1:] == tokenizer.bos) + 1).tolist(), len(ids)])
    assert sum(cut[0] for cut in hidden) == sum(max(n - tokens, 0) for n in lengths)
    assert lines[0].startswith(SPECIAL if special[0] else FIRST)
    assert sum(line.startswith(FIRST) for line in lines) <= (0 if special[0] else 4)


def test_a_special_token_and_its_spelling_look_different(tokenizers):
    for tokenizer in tokenizers:
        ids = np.array([tokenizer.bos, *tokenizer.encode("<s> ◆ <s>\n◆ <s>"), tokenizer.eos])
        lines = [line.plain for line in row_lines(ids, tokenizer, 100, 60)]
        assert lines == ["◆ <s>", "│ <s> ◆ <s>↵", "│ ◆ <s>", "◆ </s>"]


def test_marks_of_a_dialogue_stand_for_themselves(tokenizers):
    tokenizer = tokenizers[0]
    begin, end = tokenizer.specials["[INST]"], tokenizer.specials["[/INST]"]
    ids = [tokenizer.bos, begin, *tokenizer.encode("Hi [INST]"), end, *tokenizer.encode("Yo")]
    lines = [line.plain for line in row_lines(np.array(ids), tokenizer, 100, 60)]
    assert lines == ["◆ <s>", "◆ [INST]", "│ Hi [INST]", "◆ [/INST]", "│ Yo"]


def test_special_tokens_have_a_colour_of_their_own(tokenizers):
    tokenizer = tokenizers[0]
    ids = np.array([tokenizer.bos, *tokenizer.encode("<s>"), tokenizer.eos])
    special, text, _ = row_lines(ids, tokenizer, 100, 60)
    assert special.style == "bold magenta"
    assert "magenta" not in str([text.style, *text.spans])


def test_a_character_cut_in_two_is_shown_as_bytes(tokenizers):
    tokenizer = tokenizers[1]
    ids = np.array(tokenizer.encode("é!"))
    assert len(ids) == 3
    lines = [line.plain for line in row_lines(ids, tokenizer, 100, 60)]
    assert lines == [r"▸ \xc3", r"┊ \xa9!"]


@pytest.fixture
def two_sources(tiny_config, tiny_text):
    """The tiny run with a second source."""
    own = [f"path={tiny_text}/*.txt", "weight=1", "licence=x"]
    return read_settings(Settings, tiny_config, [f"data.sources.more.{line}" for line in own])


def printed(settings, rows, step, source):
    console = Console(width=100, record=True, file=io.StringIO())
    show_rows(settings, rows, step, source, 1000, console)
    return console.export_text()


def test_rows_are_those_of_the_run_s_own_step(two_sources):
    tokenizer = load_tokenizer(two_sources.tokenizer.name)
    sources = open_data(two_sources, write=False)
    loader = open_loader(two_sources, sources, tokenizer, None, workers=0)
    step = list(itertools.islice(loader, 3))[-1]
    names = [["text", "more"][index] for index in step.batch.sources.tolist()]
    assert len(set(names)) == 2
    for source in (None, "text", "more"):
        text = printed(two_sources, 3, 3, source)
        wanted = [row for row, name in enumerate(names) if source in (None, name)][:3]
        heads = [line for line in text.splitlines() if line.startswith("step ")]
        assert len(heads) == len(wanted)
        for row, head in zip(wanted, heads, strict=True):
            assert head.startswith(f"step 3, row {row} of 8: {names[row]}, 32 targets")
            ignored = int((step.batch.targets[row] == IGNORE).sum())
            assert head.endswith(f", {ignored} ignored" if ignored else "targets")
            lines = [line.plain for line in row_lines(step.ids[row], tokenizer, 1000, 100)]
            assert "\n".join([head, *lines]) in text


def test_a_step_without_rows_of_the_source_says_so(tiny_config, tiny_text):
    own = [f"path={tiny_text}/*.txt", "weight=0.0001", "licence=x"]
    settings = read_settings(Settings, tiny_config, [f"data.sources.rare.{line}" for line in own])
    assert "step 1 has no row of rare" in printed(settings, 3, 1, "rare")
