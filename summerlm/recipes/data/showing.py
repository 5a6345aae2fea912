"""Packed rows as the model sees them, for the eyes of whoever trains on them.

Flow: the command `data show` calls `show_rows`, which has the run's own loader make a step and
prints rows of it by `row_lines`. Each printed line begins with a mark that tells what it is, so
that no text can pass for anything else, whatever it spells: see `LEGEND`.

Shapes: B rows of T targets.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate, groupby

import numpy as np
from rich.cells import chop_cells
from rich.console import Console
from rich.text import Text

from summerlm.core.errors import UsageError
from summerlm.core.progress import progress_bar
from summerlm.data.batch import IGNORE
from summerlm.data.loader import Step
from summerlm.recipes.data.batches import open_loader
from summerlm.recipes.data.locking import open_run_data
from summerlm.recipes.settings import Settings
from summerlm.tokenizer.registry import load_tokenizer
from summerlm.tokenizer.tokenizer import Tokenizer

SPECIAL, TEXT, ON, FIRST, CUT = "◆ ", "│ ", "┊ ", "▸ ", "⋯ "
LINE_END = "↵"
LEGEND = (
    f"{SPECIAL}special token   {TEXT}text   {ON}the same line goes on   {LINE_END} line end\n"
    f"{FIRST}the row's first id, which is no target here but of the row before   {CUT}ids cut\n"
    "ignored as target: what begins a document, for it can't be foreseen"
)


def show_rows(
    settings: Settings,
    rows: int,
    step: int,
    source: str | None,
    tokens: int,
    console: Console,
) -> None:
    """Print packed rows of one step.

    Args:
        settings: The run's settings.
        rows: How many rows, at most; the step's first ones.
        step: Which step, from 1; those before it are made as well.
        source: Name of the source whose rows are wanted; None = of all.
        tokens: Ids shown of each document in a row, at least 2.
        console: Where to.

    Raises:
        UsageError: If there is no such source.
    """
    names = list(settings.data.sources)
    if source is not None and source not in names:
        raise UsageError(f"--source {source}: no such source; there are {', '.join(names)}")
    tokenizer = load_tokenizer(settings.tokenizer.name)
    made = _make_step(settings, step, tokenizer)
    of_row = [names[index] for index in made.batch.sources.tolist()]
    wanted = [row for row, name in enumerate(of_row) if source in (None, name)][:rows]
    console.print(Text(LEGEND, "dim"))
    if not wanted:
        console.print(f"step {step} has no row of {source} among its {len(of_row)}; try others")
    for row in wanted:
        ids, targets = made.ids[row], made.batch.targets[row].numpy()
        ignored = f", {count:,} ignored" if (count := int((targets == IGNORE).sum())) else ""
        console.print()
        console.print(
            f"step {step}, row {row} of {len(of_row)}: {of_row[row]}, {len(targets):,} targets"
            f"{ignored}",
            style="bold",
            markup=False,
            highlight=False,
        )
        for line in row_lines(ids, tokenizer, tokens, console.width):
            console.print(line, highlight=False, soft_wrap=True)


def _make_step(settings: Settings, number: int, tokenizer: Tokenizer) -> Step:
    """Make a step by the run's loader, in this process."""
    sources = open_run_data(settings, training=False)
    loader = open_loader(settings, sources, tokenizer, None, workers=0)
    try:
        with progress_bar() as progress:
            for step in loader:
                progress("making steps", step.number, number)
                if step.number == number:
                    break
    finally:
        loader.close()
    return step


def row_lines(ids: np.ndarray, tokenizer: Tokenizer, tokens: int, width: int) -> Iterator[Text]:
    """Lay out one row.

    Args:
        ids: The row, (T + 1,), any integer dtype.
        tokenizer: What the ids belong to.
        tokens: Ids shown of each document, at least 2; the middle of a longer one is cut.
        width: Cells of a line, marks included.

    Yields:
        Lines of at most `width` cells; a rule stands between documents, which don't see each other.
    """
    special = np.isin(ids, list(tokenizer.specials.values()))
    starts = sorted({0, *np.flatnonzero(ids == tokenizer.bos).tolist()})
    for start, stop in zip(starts, [*starts[1:], len(ids)], strict=True):
        if start:
            yield Text("─" * width, "dim")
        tail = tokens // 3
        cut = (start + tokens - tail, stop - tail) if stop - start > tokens else (stop, stop)
        mark = TEXT
        if start == 0 and not special[0]:
            yield from _run_lines(ids[:1].tolist(), tokenizer, FIRST, width)
            start, mark = 1, TEXT if tokenizer.token_bytes(ids[0]).endswith(b"\n") else ON
        yield from _run_lines(ids[start : cut[0]].tolist(), tokenizer, mark, width)
        if hidden := special[slice(*cut)].tolist():
            told = f"{CUT}{len(hidden):,} ids cut, {sum(hidden):,} of them special"
            yield Text(told, "dim")
        yield from _run_lines(ids[cut[1] : stop].tolist(), tokenizer, TEXT, width)


def _run_lines(ids: Sequence[int], tokenizer: Tokenizer, mark: str, width: int) -> Iterator[Text]:
    """Lay out ids that stand side by side."""
    names = {token: name for name, token in tokenizer.specials.items()}
    after_special = False  # there the tokenizer may have put a space that the text doesn't have
    for special, run in groupby(ids, names.__contains__):
        if special:
            yield from (Text(f"{SPECIAL}{names[token]}", "bold magenta") for token in run)
        else:
            data = b"".join(map(tokenizer.token_bytes, run))
            if after_special and tokenizer.space_in_front:
                data = data.removeprefix(b" ")
            yield from _text_lines(data.decode(errors="backslashreplace"), mark, width)
        after_special = special


def _text_lines(text: str, mark: str, width: int) -> Iterator[Text]:
    """Lay out a text; what a terminal wouldn't show as itself is written as in Python."""
    *ended, last = text.split("\n")
    for line in [f"{line}\n" for line in ended] + [last] * bool(last):
        shown = Text()
        for plain, characters in groupby(line.removesuffix("\n"), _is_plain):
            part = "".join(characters)
            shown.append(part if plain else ascii(part)[1:-1], "" if plain else "cyan")
        shown.append(LINE_END * line.endswith("\n"), "dim")
        pieces = chop_cells(shown.plain, width - len(mark))
        for piece in shown.divide(list(accumulate(map(len, pieces)))[:-1]):
            yield Text.assemble((mark, "dim"), piece)
            mark = ON
        mark = TEXT


def _is_plain(character: str) -> bool:
    return character.isprintable() and character != LINE_END
