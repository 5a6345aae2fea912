"""A run as one page: curves, tasks, samples, settings and environment in a single HTML file.

Flow: `write_report` reads the run folder, draws with matplotlib into inline SVG, and fills
`report.html.jinja`; the page loads nothing and runs no script, so it works anywhere, offline.
"""

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jinja2
import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from summerlm.core.console import format_seconds, format_value
from summerlm.core.errors import UsageError
from summerlm.core.files import RunFolder, read_json, write_atomically
from summerlm.core.record import read_rows

INK, SOFT, WARM = "#1f2933", "#c9d3dc", "#d9772b"


def write_report(path: Path) -> Path:
    """Write `report.html` into a run folder.

    Args:
        path: The run folder.

    Returns:
        The page.

    Raises:
        UsageError: If the folder holds no run with at least one step.
    """
    folder = RunFolder(path)
    rows = read_rows(folder.metrics)
    steps = [row for row in rows if row["kind"] == "train" and row["loss"] is not None]
    if not steps:
        raise UsageError(f"{path}: no run with a completed step")
    checks = [row for row in rows if row["kind"] == "validation"]
    summary = read_json(path / "summary.json") if (path / "summary.json").exists() else {}
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("summerlm.recipes", "."), autoescape=True
    )
    page = environment.get_template("report.html.jinja").render(
        name=path.resolve().name,
        facts=_facts(steps, summary),
        charts=_charts(steps, checks),
        tasks=_task_charts([row for row in rows if row["kind"] == "evaluation"]),
        baselines=_baselines(summary),
        completions=summary.get("completions", []),
        samples=read_rows(folder.samples)[-12:],
        incidents=read_rows(folder.incidents)[-50:],
        settings=folder.settings.read_text(encoding="utf-8"),
        environment=_flat(read_json(path / "manifest.json"), leave_out="data"),
    )
    write_atomically(path / "report.html", page.encode())
    return path / "report.html"


def _facts(steps: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> dict[str, str]:
    last = steps[-1]
    facts = {
        "steps": format_value(last["step"]),
        "tokens": format_value(last["tokens"]),
        "final loss": f"{_mean_loss(steps[-20:]):.3f} nats",
        "time": format_seconds(summary.get("train_seconds", last["elapsed_s"])),
        "speed": f"{last['tokens_per_second']:,.0f} tokens/s",
    }
    if "parameters" in summary:
        facts = {"parameters": format_value(summary["parameters"]), **facts}
    return facts


def _mean_loss(steps: Sequence[Mapping[str, Any]]) -> float:
    return sum(row["loss"] for row in steps) / len(steps)


def _baselines(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Give the demo's three measurements with the width of their bars, in percent."""
    names = {
        "bits_per_byte": "this model",
        "xz_bits_per_byte": "xz -9e",
        "baseline_5gram_bits_per_byte": "5-gram",
    }
    found = {label: summary[key] for key, label in names.items() if key in summary}
    longest = max(found.values(), default=1.0)
    return [
        {"label": label, "value": f"{value:.3f}", "percent": 100 * value / longest}
        for label, value in found.items()
    ]


def _charts(
    steps: Sequence[Mapping[str, Any]], checks: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    tokens = [row["tokens"] for row in steps]
    loss = [row["loss"] for row in steps]
    held_out = [(row["tokens"], row["held_out_loss"]) for row in checks]
    return [
        {
            "title": "Loss (nats a token)",
            "svg": _draw(tokens, loss, "training", points=held_out, points_name="held out"),
        },
        {"title": "Learning rate", "svg": _draw(tokens, [row["lr"] for row in steps])},
        {"title": "Gradient norm", "svg": _draw(tokens, [row["grad_norm"] for row in steps])},
        {"title": "Tokens/s", "svg": _draw(tokens, [row["tokens_per_second"] for row in steps])},
    ]


def _draw(
    tokens: Sequence[int],
    values: Sequence[float],
    name: str | None = None,
    *,
    points: Sequence[tuple[int, float]] = (),
    points_name: str = "",
) -> str:
    """Draw one curve over tokens as SVG text; a named curve also gets its smoothed self."""
    with _drawing((6.4, 3.0) if name else (3.1, 1.9)) as (axes, svg):
        axes.plot(tokens, values, color=SOFT if name else INK, linewidth=0.9, label=name)
        if name:
            axes.plot(tokens, _smooth(values), color=INK, linewidth=1.5, label=f"{name}, smoothed")
        if points:
            axes.plot(*zip(*points, strict=True), "o-", color=WARM, markersize=4, label=points_name)
        if name:
            axes.legend(frameon=False)
    return svg.getvalue()


def _task_charts(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Give a curve for each figure of each task, in the order of their first rows."""
    curves: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["value"] is not None:  # as a perplexity that has run out of numbers
            curves.setdefault((row["task"], row["metric"]), []).append(row)
    return [
        {"title": _task_caption(task, metric, curve[-1]), "svg": _draw_task(curve)}
        for (task, metric), curve in curves.items()
    ]


def _task_caption(task: str, metric: str, last: Mapping[str, Any]) -> str:
    error = "" if last["error"] is None else f" ± {format_value(last['error'])}"
    chance = "" if last["chance"] is None else f", chance {format_value(last['chance'])} (dashed)"
    shots = f"{last['few_shot']}-shot"
    return (
        f"{task}, {metric}: {format_value(last['value'])}{error} at step {last['step']}{chance}; "
        f"n = {last['items']:,}, {shots}"
    )


def _draw_task(curve: Sequence[Mapping[str, Any]]) -> str:
    """Draw a figure of a task over tokens, one standard error up and down, and its chance level."""
    tokens, values = [row["tokens"] for row in curve], [row["value"] for row in curve]
    errors = [row["error"] or 0.0 for row in curve]
    with _drawing((3.1, 1.9)) as (axes, svg):
        low, high = (
            [value + sign * error for value, error in zip(values, errors, strict=True)]
            for sign in (-1, 1)
        )
        axes.fill_between(tokens, low, high, color=SOFT, linewidth=0)
        axes.plot(tokens, values, "o-", color=INK, markersize=3, linewidth=1.2, gid="curve")
        if len(curve) == 1:  # a band of no width can't be seen
            axes.errorbar(tokens, values, errors, color=SOFT, zorder=0)
        if (chance := curve[-1]["chance"]) is not None:
            axes.axhline(chance, color=WARM, linestyle="--", linewidth=1, gid="chance")
        axes.margins(y=0.15)  # the chance line is not to lie on the axis
    return svg.getvalue()


@contextmanager
def _drawing(size: tuple[float, float]) -> Iterator[tuple[Axes, io.StringIO]]:
    """Lend axes over tokens, of a size in inches; what is drawn on them is then SVG text."""
    text = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "summerlm", "font.size": 9}):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        yield axes, text
        axes.set_xlabel("tokens")
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.set_major_formatter(mpl.ticker.EngFormatter(sep=""))
        buffer = io.StringIO()
        figure.savefig(
            buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
        )
    whole = buffer.getvalue()
    text.write(whole[whole.index("<svg") :])


def _smooth(values: Sequence[float], share: float = 0.02) -> list[float]:
    """Average exponentially over about a share of all values, without the start's bias."""
    keep = 1 - 1 / max(1.0, share * len(values))
    mean = weight = 0.0
    smoothed = []
    for value in values:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        smoothed.append(mean / weight)
    return smoothed


def _flat(values: Mapping[str, Any], leave_out: str) -> dict[str, str]:
    """Give nested facts as one table, without the long lists of the data."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        if key == leave_out:
            continue
        if isinstance(value, Mapping):
            flat |= _flat(value, leave_out)
        else:
            flat[key] = str(value)
    return flat
