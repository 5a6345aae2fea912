"""Several models side by side, with how sure their differences are.

Flow:
    1. `read_facts` takes files that `summerlm eval --json` wrote; runs are measured anew;
    2. `compare` matches figures and gives the differences to the first model, item by item where
       both answered the same items;
    3. `compare_tables` lays them out.

Two models fail on the same items more often than not, so that their difference is surer than
their figures: the error of a difference is taken over items' differences, or over documents drawn
for both at once.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from summerlm.core.errors import UsageError
from summerlm.core.files import read_json
from summerlm.core.progress import Progress
from summerlm.eval.bootstrap import Floats, bootstrap
from summerlm.eval.plans import COLUMNS, FIGURES
from summerlm.eval.results import CHOSEN
from summerlm.recipes.eval_request import FORMAT, Wanted, where_of
from summerlm.recipes.eval_rows import is_text, sections
from summerlm.recipes.evaluating import evaluate

Facts = Mapping[str, Any]

_READ = ("task", "protocol", "items", "few_shot", "figures", "parts", "data", "notes")


def facts_of(
    path: Path, wanted: Wanted, overrides: Sequence[str], bundle: bool, progress: Progress
) -> dict[str, Any]:
    """Get a model's figures: from a file of them, or by measuring a run.

    Args:
        path: The file, a run folder or a checkpoint.
        wanted: What is measured of runs.
        overrides: See `where_of`.
        bundle: See `where_of`.
        progress: Told how far measuring has come.

    Returns:
        What `evaluating.evaluate` returns.

    Raises:
        UsageError: If the path is none of these, or nothing is asked for of a run.
    """
    if path.is_file():
        return read_facts(path)
    return evaluate(path, wanted, where_of(path, overrides, bundle=bundle), progress)


def read_facts(path: Path) -> dict[str, Any]:
    """Read a file that `summerlm eval --json` wrote.

    Args:
        path: The file.

    Returns:
        Its facts.

    Raises:
        UsageError: If it is not such a file.
    """
    facts = read_json(path)
    if not isinstance(facts, dict) or not {"format", "model", "results"} <= set(facts):
        raise UsageError(f"{path}: not a file that summerlm eval --json wrote")
    if facts["format"] != FORMAT:
        raise UsageError(f"{path}: has format {facts['format']}, this version reads {FORMAT}")
    for number, result in enumerate(facts["results"]):
        if lacking := _lacking(result):
            raise UsageError(f"{path}: result {number} has no {lacking}; measure the model again")
    return facts


def _lacking(result: Facts) -> str | None:
    """Name what a result, or a part of it, should have; None where all is there."""
    if not isinstance(result, dict):
        return "figures"
    first = next((key for key in _READ if key not in result), None)
    if first is not None:
        return first
    return next((name for part in result["parts"].values() if (name := _lacking(part))), None)


def compare(found: Sequence[Facts]) -> dict[str, Any]:
    """Put models side by side.

    Args:
        found: Facts of at least two models.

    Returns:
        `models`, and `rows`: each with `task`, `figure`, `values` (a model each, None where it has
        none), `errors`, `higher_is_better`, `differences` (of each further model to the first:
        `value`, `error`, whether that is `paired`, and `but`, what differs besides the model).

    Raises:
        UsageError: If there are fewer than two, or they have no figure in common.
    """
    if len(found) < 2:
        raise UsageError("compare needs two runs or files at least")
    tables = [_figures(facts) for facts in found]
    keys = [key for key in tables[0] if any(key in table for table in tables[1:])]
    if not keys:
        raise UsageError("nothing to compare: the models have no task in common")
    rows = []
    for key in keys:
        cells = [table.get(key) for table in tables]
        first = cells[0]
        assert first is not None
        rows.append(
            {
                "task": key[0],
                "figure": first["row"].name,
                "values": [cell and cell["row"].value for cell in cells],
                "errors": [cell and cell["row"].error for cell in cells],
                "higher_is_better": first["row"].higher_is_better,
                "differences": [cell and _difference(first, cell) for cell in cells[1:]],
            }
        )
    return {"models": [facts["model"] for facts in found], "rows": rows}


def _figures(facts: Facts) -> dict[tuple[str, str, str], dict[str, Any]]:
    """List a model's figures by task, part and name, each with the result that it is of."""
    found = {}
    # lm-eval's sections come last, and have no result of ours
    results: list[Facts] = [*facts["results"]]
    for place, section in enumerate(sections(facts)):
        own = results[place] if place < len(results) else None
        text = own is not None and is_text(own)
        for row in section.rows:
            result = own["parts"].get(row.part, own) if own is not None else None
            cell = {"row": row, "result": result, "text": text}
            found[section.task, row.part, row.figure] = cell
    return found


def _difference(first: Facts, other: Facts) -> dict[str, Any]:
    """Take a figure of one model from that of another."""
    a, b, results = first["row"], other["row"], (first["result"], other["result"])
    if a.value is None or b.value is None:
        return {"value": None, "error": None, "paired": False, "but": []}
    differs = _what_differs(*results) if all(results) else []
    error = None
    if all(results) and not set(differs) & {"items", "examples"}:
        error = (_of_documents if first["text"] else _of_items)(*results, a.figure)
    paired = error is not None
    if not paired and a.error is not None and b.error is not None:
        error = math.hypot(a.error, b.error)  # as if they had answered different items
    return {"value": b.value - a.value, "error": error, "paired": paired, "but": differs}


def _what_differs(first: Facts, other: Facts) -> list[str]:
    """Name what differs between two results besides the model."""
    ours, theirs = ({**one["data"], **one["data"].get("settings", {})} for one in (first, other))
    drawn = ("seed",) if first["few_shot"] else ()
    keys = {"items": ("rows_sha256", "limit"), "examples": drawn}
    keys |= {key: (key,) for key in ("context", "stride", "block")}
    found = [name for name, of in keys.items() if any(ours.get(k) != theirs.get(k) for k in of)]
    return found + ["examples"] * (first["few_shot"] != other["few_shot"])


def _of_items(first: Facts, other: Facts, figure: str) -> float | None:
    """Give the standard error of a difference over the same items."""
    if figure == "perplexity":  # of a cloze: nats of an ending, by item
        nats = [[-one[0] for one in result["logprobs"]] for result in (first, other)]
        units = [{"nats": own, "tokens": [1.0] * len(own)} for own in nats]
        return _resampled(units, figure, first["data"].get("seed"))
    key = CHOSEN.get(figure, "")
    right = np.array(first["answers"])
    chosen = [np.array(one.get(key) or []) for one in (first, other)]
    if len(right) < 2 or any(len(one) != len(right) for one in chosen):
        return None
    hits = [(one == right).astype(float) for one in chosen]
    return float((hits[1] - hits[0]).std(ddof=1) / math.sqrt(len(right)))


def _of_documents(first: Facts, other: Facts, figure: str) -> float | None:
    """Give the standard error of a difference over documents drawn for both models at once."""
    sums = [one["data"]["sums"] for one in (first, other)]
    return _resampled(sums, figure, first["data"].get("seed"))


def _resampled(both: Sequence[Facts], figure: str, seed: int | None) -> float | None:
    """Bootstrap a difference from what each unit adds to the totals of both models."""
    first, other = (len(sums["nats"]) for sums in both)
    if first != other:
        return None  # blocks of two tokenizers aren't the same text
    blank = [0.0] * first
    sums = np.array([one.get(name, blank) for one in both for name in COLUMNS]).T
    make, width = FIGURES[figure].of, len(COLUMNS)

    def difference(totals: Floats) -> Floats:
        return make(totals[:, width:]) - make(totals[:, :width])

    return bootstrap(sums, difference, seed=seed or 0).error
