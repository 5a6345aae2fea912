"""Write docs/performance.md from benchmarks/results/*.json: `python docs/make_performance.py`.

Each file is a section: what was asked (the first line of the program that wrote it), where, when
and how it was measured, and what the program itself prints of it (its `lines`). So the page can't
say anything that wasn't measured; tests/test_docs.py fails when it is not what this makes.
"""

import importlib.util
import json
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from summerlm.recipes import benching

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "performance.md"
RESULTS = ROOT / "benchmarks" / "results"

HEAD = """\
# Performance

Made by `python docs/make_performance.py` from the files in `benchmarks/results/`; measure anew and
make it anew, don't edit it.

Figures compare within one section only: its sides ran in turn, on one machine, in one call; another
day's machine is another one. What was tried, predicted and found, the useless too, stands in
[LOG.md](../LOG.md).
"""


def page(results: Path = RESULTS) -> str:
    """Make the whole page.

    Args:
        results: Folder of JSON files; those of quick runs and toy sizes are left out.
    """
    found = {path: json.loads(path.read_text()) for path in sorted(results.glob("*.json"))}
    usable = {p: f for p, f in found.items() if not f.get("quick") and not f.get("toy")}
    return HEAD + "".join(section(path.name, figures) for path, figures in usable.items())


def section(name: str, figures: Mapping[str, Any]) -> str:
    """Make the section of one file."""
    program = program_of(figures["command"])
    question = (program.__doc__ or "").split("\n")[0].rstrip()
    hardware, versions = figures["hardware"], figures["versions"]
    cores = f", {hardware['cores']} cores" if "cores" in hardware else ""
    named = ", ".join(f"{package} {is_}" for package, is_ in versions.items() if is_)
    told = [
        f"Measured {figures['date'][:10]} at commit {figures['commit']} on {hardware_of(figures)}"
        f"{cores}; Python {hardware['python']}, torch {hardware['torch']}, {named}.",
        f"```\n{figures['command']}\n```",
        body(program, figures),
        f"All of it: [{name}](../benchmarks/results/{name}).",
    ]
    return "\n".join([f"\n## {question}\n", "\n\n".join(told), ""])


def hardware_of(figures: Mapping[str, Any]) -> str:
    """Name what was measured on."""
    hardware = figures["hardware"]
    accelerator = hardware.get("accelerator")
    return f"one {accelerator}" if accelerator else str(hardware["processor"])


def program_of(command: str) -> ModuleType:
    """Find the program that a command calls: one of benchmarks/, or the package's own command."""
    words = shlex.split(command)
    if words[:2] == ["summerlm", "bench"]:
        return benching
    name = next(Path(word).stem for word in words if word.endswith((".py", ".sh")))
    folder = ROOT / "benchmarks"
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", folder / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up
    sys.path.insert(0, str(folder))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(folder))
    return module


def body(program: ModuleType, figures: Mapping[str, Any]) -> str:
    """Lay the figures out as the program does: its lines of text, or a table of its figures."""
    lines = list(program.lines(figures))
    if not lines:
        raise ValueError(
            f"{figures['command']}: its file holds nothing that {program.__name__} shows"
        )
    if isinstance(lines[0], str):
        return "\n".join(["```", *lines, "```"])
    text = table(lines)
    if program is benching and "parts" in figures:
        text += f"\n\n{parts(figures['parts'])}"
    return text


def table(lines: list[tuple[str, Any]]) -> str:
    """Make a table of names and numbers, or spreads of repeats."""
    repeated = any(isinstance(value, Mapping) for _, value in lines)
    columns = ("median", "lowest", "highest") if repeated else ("median",)
    titles = ("figure or median", "lowest", "highest") if repeated else ("figure",)
    rows = [f"| | {' | '.join(titles)} |", "|---|" + "---:|" * len(columns)]
    for name, value in lines:
        values = value if isinstance(value, Mapping) else {"median": value}
        cells = [number(values[key]) if key in values else "" for key in columns]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(rows)


def parts(found: Mapping[str, Any]) -> str:
    """Make the table of a step's parts."""
    rows = ["| part of a step, under the profiler | ms | share |", "|---|---:|---:|"]
    step = {"part": "the step", "seconds": found["seconds"], "share": 1.0}
    for row in (*found["parts"], step):
        rows.append(f"| {row['part']} | {1e3 * row['seconds']:.2f} | {row['share']:.1%} |")
    return "\n".join(rows)


def number(value: float) -> str:
    """Write a number with three significant digits, whole from 1,000 on."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
