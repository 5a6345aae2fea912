"""Every mark of a GPU in one call, written down as it goes.

    bash benchmarks/gpu.sh --original PATH --nanogpt PATH [FILE.json [PART...]]
    bash benchmarks/gpu.sh --toy FILE.json                on any CPU: does all of it run?

Each part of `gpu_parts` is a command of its own with its own time limit. After each, the file (else
`results/gpu.json`, or `results/gpu-toy.json`) has what it found, or why it found nothing, and the
table of marks: met, missed, or not measured. Parts that the file has already from this code and
such a machine aren't measured again, so that a second call goes on where time has ended the
first. A toy's figures are marked as such and no mark is held against them.
"""

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from gpu_parts import MARKS, Mark, Part, parts

from summerlm.core.figures import circumstances
from summerlm.core.files import write_json

FOLDER = Path(__file__).parent
MINUTES = 9.5  # of one call
TAIL = 12  # lines of what a failed part said that are kept


def main() -> None:
    arguments = parse()
    results = arguments.file or FOLDER / "results" / f"gpu{'-toy' * arguments.toy}.json"
    deadline = time.monotonic() + arguments.minutes * 60
    figures = begin(results, arguments.toy)
    for part in parts():
        if arguments.parts and part.name not in arguments.parts:
            continue
        if figures["parts"].get(part.name, {}).get("status") == "done":
            continue
        print(f"{part.name} ...", end=" ", file=sys.stderr, flush=True)
        figures["parts"][part.name] = row = run(part, arguments, deadline)
        figures["marks"] = [judge(mark, figures) for mark in MARKS]
        write_json(results, figures)
        print(row["status"], row.get("why", ""), file=sys.stderr, flush=True)
    for line in lines(figures):
        print(line)
    print(f"written to {results}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure a GPU's marks; see the file's head.")
    parser.add_argument("--toy", action="store_true", help="toy sizes on a CPU; no figures to use")
    parser.add_argument("--original", help="checkout of the original SummerLM")
    parser.add_argument("--nanogpt", help="checkout of nanoGPT")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="of the whole call")
    parser.add_argument(
        "file", nargs="?", type=Path, help="the results; read first, if it is there"
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help="else all")
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - {part.name for part in parts()}:
        names = ", ".join(part.name for part in parts())
        raise SystemExit(f"no part {', '.join(sorted(unknown))}; there are: {names}")
    if not arguments.toy and not torch.cuda.is_available():
        raise SystemExit("torch sees no GPU here; --toy runs everything at toy sizes on a CPU")
    return arguments


def begin(results: Path, toy: bool) -> dict[str, Any]:
    """Start from what is there, where it was measured with this code on such a machine.

    Args:
        results: The file.
        toy: Whether this call measures toys.

    Returns:
        The figures, to be filled.
    """
    where = circumstances("cpu" if toy else "cuda")
    fresh = {**where, "code": fingerprint(), "toy": toy, "parts": {}, "marks": []}
    try:
        old = json.loads(results.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return fresh
    if any(old.get(key) != fresh[key] for key in ("code", "toy", "hardware")):
        return fresh
    return {**fresh, "parts": old["parts"]}


def fingerprint() -> str:
    """Give the SHA-256 of all that decides what is measured: code and presets."""
    digest = hashlib.sha256()
    root = FOLDER.parent
    for pattern in ("summerlm/**/*.py", "benchmarks/*.py", "configs/*.toml"):
        for path in sorted(root.glob(pattern)):
            digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def run(part: Part, arguments: argparse.Namespace, deadline: float) -> dict[str, Any]:
    """Measure one part.

    Args:
        part: The part.
        arguments: The command's.
        deadline: When the call has to end, in seconds of the monotonic clock.

    Returns:
        Status, seconds, command, and the figures or why there are none.
    """
    repo = [] if part.repo is None else [getattr(arguments, part.repo)]
    if None in repo:
        return {"status": "not measured", "why": f"no checkout: give --{part.repo} PATH"}
    limit = min(part.limit_s, deadline - time.monotonic())
    if limit < 5:
        return {"status": "not measured", "why": "no time left; the same call again goes on here"}
    with tempfile.TemporaryDirectory(prefix="summerlm-gpu-") as folder:
        out, log = Path(folder, "figures.json"), Path(folder, "log")
        given = [text for path in repo for text in ("--repo", path)]
        sized = part.toy if arguments.toy else part.arguments
        command = [sys.executable, str(FOLDER / part.program), *given, "--json", str(out), *sized]
        began = time.monotonic()
        with log.open("w") as stream:
            why = wait(command, limit, stream)
        row: dict[str, Any] = {"seconds": time.monotonic() - began, "command": command[1:]}
        if why is not None:
            said = log.read_text(errors="replace").strip().splitlines()[-TAIL:]
            return {**row, "status": "failed", "why": why, "log": said}
        return {**row, "status": "done", "figures": json.loads(out.read_text())}


def wait(command: list[str], limit: float, log: Any) -> str | None:
    """Run a command and all that it starts for at most so many seconds.

    Args:
        command: The command.
        limit: Seconds.
        log: File for what it says.

    Returns:
        What went wrong, or None.
    """
    process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        code = process.wait(limit)
        return None if code == 0 else f"exit code {code}"
    except subprocess.TimeoutExpired:
        return f"stopped after {limit:.0f} s"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its children too, which hold the GPU
        process.wait()


def judge(mark: Mark, figures: Mapping[str, Any]) -> dict[str, Any]:
    """Hold what was measured against a mark.

    Args:
        mark: The mark.
        figures: All results.

    Returns:
        Name, limits, the figure or None, and "met", "missed", "not measured" or "toy".
    """
    found = {name: row["figures"] for name, row in figures["parts"].items() if "figures" in row}
    try:
        value: float | None = mark.find(found)
    except (KeyError, TypeError):
        value = None
    row = {"mark": mark.name, "least": mark.least, "most": mark.most, "figure": value}
    if value is None:
        return {**row, "verdict": "not measured"}
    if figures["toy"]:
        return {**row, "verdict": "toy"}
    met = mark.least <= value and (mark.most is None or value <= mark.most)
    return {**row, "verdict": "met" if met else "missed"}


def lines(figures: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is printed in the end."""
    for name, row in figures["parts"].items():
        yield f"{name}: {row['status']} {row.get('why', '')}".rstrip()
        if "tokens_per_second" in row.get("figures", {}):
            yield f"    {told(row['figures'])}"
    for row in figures["marks"]:
        value = "" if row["figure"] is None else f"{row['figure']:,.4g}"
        most = "" if row["most"] is None else f" to {row['most']:g}"
        yield f"{row['verdict']:>12}  {row['mark']}: {value} (aimed at {row['least']:g}{most})"


def told(found: Mapping[str, Any]) -> str:
    """Say what a step was measured to be."""
    words = [f"{found['tokens_per_second']:,.0f} tokens/s"]
    if found["mfu"] is not None:
        words.append(f"{found['mfu']:.1%} MFU")
    if found["mfu_torchtitan"] is not None:
        words.append(f"{found['mfu_torchtitan']:.1%} as torchtitan counts")
    if found["peak_bytes"] is not None:
        words.append(f"{found['peak_bytes'] / 1e9:.1f} GB")
    if found["planned_bytes"] is not None:
        words.append(f"{found['planned_bytes'] / 1e9:.1f} GB planned")
    words.append(f"{found['mode']['micro_rows']} rows at once")
    if "kernel" in found:
        words.append(f"attention by {found['kernel']}")
    return ", ".join(words)


if __name__ == "__main__":
    main()
