"""The figures in an evaluation's facts, a row each, whatever measured them.

Flow: `eval_tables` lays rows out for people; `comparing` matches those of several models.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from summerlm.core.errors import UsageError
from summerlm.eval.task import load_task

Facts = Mapping[str, Any]

UNIT = {"perplexity": "tokens", "word_perplexity": "words"}  # what a text's figure is of; or bytes
WITHIN = "measured within lm-eval"
LARGE = 100_000  # from here on numbers are written with a power of ten
HEADINGS = ("figure", "value", "error", "95 %", "chance", "n")


@dataclass(frozen=True)
class Row:
    """A figure.

    Attributes:
        part: The protocol of a text, the part of a task that has several; else empty.
        figure: Its name.
        value: Its value; None where it is no finite number.
        error: Its standard error, or None.
        low: Lower end of its 95 % interval, or None.
        high: Upper end, or None.
        chance: What guessing gives, or None.
        n: What it was measured over, with its unit.
        higher_is_better: Which way is up.
    """

    part: str
    figure: str
    value: float | None
    error: float | None
    low: float | None
    high: float | None
    chance: float | None
    n: str
    higher_is_better: bool

    @property
    def name(self) -> str:
        """Part and figure in words."""
        return f"{self.part} {self.figure}".strip().replace("_", " ")

    @property
    def cells(self) -> tuple[str, ...]:
        """The row under `HEADINGS`."""
        digits = decimals(self.value)
        interval = "-"
        if self.low is not None and self.high is not None:
            interval = f"{number(self.low, digits)}\u2013{number(self.high, digits)}"
        chance = number(self.chance, decimals(self.chance))
        value, error = number(self.value, digits), number(self.error, digits)
        return (self.name, value, error, interval, chance, self.n)


@dataclass(frozen=True)
class Section:
    """What was measured in one task.

    Attributes:
        task: Its name.
        protocol: How it was measured.
        shots: Examples in front of each item; None for texts.
        data: Where its rows are from.
        rows: Its figures.
        notes: What a reader must know.
    """

    task: str
    protocol: str
    shots: int | None
    data: str
    rows: tuple[Row, ...]
    notes: tuple[str, ...]

    @property
    def how(self) -> str:
        """Protocol and examples in words."""
        return self.protocol if self.shots is None else f"{self.protocol}, {self.shots}-shot"


def sections(facts: Facts) -> list[Section]:
    """Read the figures of an evaluation's facts.

    Args:
        facts: What `evaluating.evaluate` returns, or a file of it.

    Returns:
        A section a task, in their order; those of lm-eval last.
    """
    found = [_of_text(one) if is_text(one) else _of_task(one) for one in facts["results"]]
    return found + list(_of_harness(facts.get("lm_eval") or {}))


def is_text(result: Facts) -> bool:
    """Tell whether a result is that of a text, under several protocols.

    Args:
        result: One of the facts' results.

    Returns:
        Whether its parts are protocols.
    """
    return any("sums" in part["data"] for part in result["parts"].values())


def decimals(value: float | None) -> int:
    """Tell how many decimals show at least four digits of a value.

    Args:
        value: The value, or None.

    Returns:
        0 to 4.

    Example:
        >>> [decimals(value) for value in (0.25, 12.3, 456.7, 1234.5)]
        [4, 3, 2, 1]
    """
    whole = 1 if value is None else len(f"{abs(value):.0f}")
    return max(0, 5 - whole)


def number(value: float | None, digits: int) -> str:
    """Write a number, or a dash for None.

    Args:
        value: The number.
        digits: Its decimals.

    Returns:
        Its text, four digits and a power of ten where it is large.

    Example:
        >>> number(1234.5, 1), number(821136.0, 0), number(None, 4)
        ('1,234.5', '8.211e5', '-')
    """
    if value is None:
        return "-"
    text = f"{value:,.{digits}f}"
    return text if abs(value) < LARGE else f"{value:.3e}".replace("e+0", "e").replace("e+", "e")


def _of_text(result: Facts) -> Section:
    rows, notes, read, alone = [], [], 0, 0
    for name, part in result["parts"].items():
        n = part["data"]["n"]
        for figure, values in part["figures"].items():
            unit = UNIT.get(figure, "bytes")
            rows.append(_row(name, figure, values, f"{n[unit]:,} {unit}"))
        notes += part["notes"]
        read += part["data"]["settings"]["read"]
        alone += part["data"]["settings"]["alone"]
    slides, raw = (result["parts"][p]["data"]["settings"]["stride"] for p in ("sliding", "raw"))
    notes.append(
        f"a window of sliding is asked for {slides:,} tokens, one of raw for {raw:,}; the model "
        f"read {read:,} positions, protocol by protocol it would be {alone:,}"
    )
    data = f"{_origin(result['data'])}, {result['items']:,} documents"
    return Section(
        result["task"],
        result["protocol"],
        None,
        data,
        tuple(rows),
        (*_of_data(result), *_once(notes)),
    )


def _of_task(result: Facts) -> Section:
    rows = [_row("", f, v, f"{result['items']:,} items") for f, v in result["figures"].items()]
    for name, part in result["parts"].items():
        for figure, values in part["figures"].items():
            rows.append(_row(name, figure, values, f"{part['items']:,} items"))
    notes = [*_of_data(result), *result["notes"]]
    if cut := result["data"].get("truncated"):
        notes.append(
            f"{cut:,} times a context lost its beginning: the model reads less than it has"
        )
    data = _origin(result["data"])
    return Section(
        result["task"], result["protocol"], result["few_shot"], data, tuple(rows), _once(notes)
    )


def _of_harness(found: Facts) -> Iterator[Section]:
    """Read lm-eval's results: a figure's key is its name, a comma, and a filter's name."""
    for task, values in found.get("results", {}).items():
        count = values.get("sample_len")  # of groups, too
        up = found.get("higher_is_better", {}).get(task, {})
        rows = []
        for key, value in values.items():
            name, comma, kind = key.partition(",")
            if not comma or name.endswith("_stderr") or isinstance(value, str):
                continue
            error = values.get(f"{name}_stderr,{kind}")
            figure = {
                "value": value,
                "error": None if isinstance(error, str) else error,
                "higher_is_better": up.get(name, True),
            }
            shown = name if kind == "none" else f"{name} {kind}"
            rows.append(_row("", shown, figure, "" if count is None else f"{count:,} items"))
        shots = found.get("n-shot", {}).get(task)
        yield Section(
            f"lm-eval {task}", WITHIN, shots, "rows as lm-eval reads them", tuple(rows), ()
        )


def _row(part: str, figure: str, values: Facts, n: str) -> Row:
    return Row(
        part,
        figure,
        values["value"],
        values["error"],
        values.get("low"),
        values.get("high"),
        values.get("chance"),
        n,
        values["higher_is_better"],
    )


def _origin(data: Facts) -> str:
    """Say where rows are from."""
    names = [data.get(key) for key in ("repository", "folder", "split")]
    revision = f" at {data['revision'][:12]}" if data.get("revision") else ""
    words = {"mirror": " (mirror)", "bundle": " (installed package)"}
    return " ".join(filter(None, names)) + revision + words.get(data.get("origin", ""), "")


def _of_data(result: Facts) -> list[str]:
    """Note where other rows were measured than the task asks for, or not all."""
    data = result["data"]
    notes: list[str] = []
    if data.get("repository") is not None:
        try:
            asked = load_task(result["task"]).data
        except UsageError:  # facts of a version that knew other tasks
            return notes
        instead = [(other.folder, other.split) for other in asked.instead]
        if data["origin"] == "mirror" and (data["folder"], data["split"]) in instead:
            notes.append(
                f"the mirror lacks {asked.folder} {asked.split}, which this task asks for: what "
                f"was measured is {data['folder']} {data['split']}"
            )
        if data["origin"] == "bundle" and data["split"] != asked.split:
            notes.append(f"split {data['split']}, where others report {asked.split}")
    if data.get("limit") is not None:
        of = " of each part" if result["parts"] and not is_text(result) else ""
        notes.append(f"the first {data['limit']:,}{of} only")
    return notes


def _once(notes: list[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(notes))
