"""One event of a run, written to every place that someone reads.

Flow: `recipes` make a `Recorder` with the sinks of the run; `train`'s hooks call
`Recorder.write(kind, **fields)`; each sink takes what it can show.

Kinds: "train" is one completed step and the only kind with a `loss`; "validation", "evaluation" (a
row a figure of a task), "sample", "resume", "stop" and "incident" tell what happened beside the
steps; a "note" says what is being done, to whoever reads along, and stands in no file.
"""

import contextlib
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

from summerlm.core.errors import UsageError
from summerlm.core.files import write_atomically


class Sink(Protocol):
    """A place that events go to."""

    def write(self, kind: str, fields: dict[str, Any], line: str | None) -> None:
        """Take one event; `line` is what to tell a person."""

    def close(self) -> None:
        """Finish."""


class Recorder:
    """Hands each event to all sinks.

    Args:
        sinks: Where the events go.
    """

    def __init__(self, sinks: Iterable[Sink]) -> None:
        self._sinks = tuple(sinks)

    def write(self, kind: str, line: str | None = None, **fields: Any) -> None:
        """Record one event.

        Args:
            kind: What happened; see the module's list.
            line: What to tell a person, where the fields alone wouldn't.
            **fields: Plain values; non-finite floats become null.
        """
        for sink in self._sinks:
            sink.write(kind, fields, line)

    def close(self) -> None:
        """Finish all sinks."""
        for sink in self._sinks:
            sink.close()


class JsonLines:
    """Appends events to a file, an object a line, flushed at once.

    A disk that refuses never stops the training: the alarm is the missing row, and the
    checkpoint that fails next.

    Args:
        path: The file.
        takes: Says which kinds of events belong into this file.
    """

    def __init__(self, path: Path, takes: Callable[[str], bool]) -> None:
        self._file = path.open("a", encoding="utf-8")
        self._takes = takes

    def write(self, kind: str, fields: dict[str, Any], line: str | None) -> None:
        """Append one event."""
        if not self._takes(kind):
            return
        row = json.dumps(_finite({"kind": kind, **fields}), allow_nan=False, ensure_ascii=False)
        try:
            self._file.write(row + "\n")
            self._file.flush()
        except OSError as error:
            print(f"warning: {self._file.name}: {error.strerror}; row not written")

    def close(self) -> None:
        """Close the file."""
        with contextlib.suppress(OSError):  # a full disk's refusal, which `write` has reported
            self._file.close()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read a file of JSON lines; a line that a crash cut short at the end is left out.

    Args:
        path: The file; may be missing.

    Returns:
        Its rows in order.

    Raises:
        UsageError: If a line other than the last holds no JSON.
    """
    if not path.exists():
        return []
    # not splitlines: a text may hold U+2028 and its like, which JSON leaves as they are
    lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    if lines == [""]:
        return []
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise UsageError(f"{path}: line {number} is no JSON") from None
    return rows


def cut_rows(path: Path, last_step: int) -> int:
    """Drop the rows past a step, so that a resumed run writes each step once.

    Args:
        path: A file of JSON lines with a `step` each; may be missing.
        last_step: The last step whose rows stay.

    Returns:
        How many rows went.
    """
    rows = read_rows(path)
    kept = [row for row in rows if row.get("step", 0) <= last_step]
    if path.exists():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept)
        write_atomically(path, text.encode())
    return len(rows) - len(kept)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class TensorBoardSink:
    """Writes every number of an event to TensorBoard; needs the extra `summerlm[track]`.

    Args:
        folder: Where the event files go.

    Raises:
        UsageError: If TensorBoard is not installed.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UsageError(
                "run.tensorboard = true needs TensorBoard: pip install 'summerlm[track]'"
            ) from None
        self._writer = SummaryWriter(str(folder))

    def write(self, kind: str, fields: dict[str, Any], line: str | None) -> None:
        """Write one event's numbers under `kind/name`; of a task's figure its value alone."""
        if kind == "evaluation":
            kind = f"{kind}/{fields['task']}"
            fields = {"step": fields["step"], fields["metric"]: fields["value"]}
        for name, value in fields.items():
            if isinstance(value, int | float) and name != "step":
                self._writer.add_scalar(f"{kind}/{name}", value, fields.get("step", 0))

    def close(self) -> None:
        """Flush the event file."""
        self._writer.close()
