"""Is `summerlm plan --probe` right? Its step time and peak memory against real runs.

For each of eight configurations, none of which was used to find a constant: the command's probe
and real runs of the same settings in turn (A-B-A-B-...-A). A run's step is the median of all but
the first two, its peak its process's. Both read torch's own code from a file of JSON lines. Each
run is held against the mean of the probes before and after it, for a machine grows slower and
faster; an error is the median of the runs'.

    python benchmarks/plan.py --json benchmarks/results/plan.json
    python benchmarks/plan.py --steps 4 --turns 1 --cases wide      # a try
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from measuring import circumstances

from summerlm.core.config import read_settings
from summerlm.core.files import write_json
from summerlm.core.record import read_rows
from summerlm.recipes.settings import Settings
from summerlm.tokenizer.learn import learn_bpe

CONFIG = """
[model]
vocabulary = 4096
width = 256
layers = 4
heads = 8
kv_heads = 4
head_dim = 32
mlp_hidden = 704
context = 256

[optim]
name = "muon"
peak_lr = 0.01

[data]
lanes = 4
workers = 1

[data.sources.code]
path = "{texts}"
weight = 1
licence = "BSD-3-Clause"

[train]
batch_tokens = 4096

[validation]
characters_per_source = 0

[tokenizer]
name = "{tokenizer}"
"""
CASES = {
    "base": "",
    "wide": "model.width=512 model.mlp_hidden=1408 model.head_dim=64",
    "deep": "model.layers=10 model.width=192 model.mlp_hidden=512",
    "long": "model.context=1024 train.batch_tokens=8192",
    "micro": "parallel.micro_batch_rows=2",
    "many": "parallel.micro_batch_rows=4 train.batch_tokens=16384",
    "recomputed": "parallel.recompute=full train.batch_tokens=8192",
    "adamw": "optim.name=adamw train.precision=float32",
}
REAL = """
import sys
from summerlm.cli import main
try:
    main()
finally:
    lines = open("/proc/self/status").read().splitlines()
    print(next(line for line in lines if line.startswith("VmHWM")).split()[1])
"""


def probe(config: Path, overrides: list[str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "summerlm", "plan", str(config), *overrides]
    command += ["--probe", "--json", "-"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)["probe"]
    return found


def run_really(config: Path, overrides: list[str], folder: Path) -> dict[str, float]:
    command = [sys.executable, "-c", REAL, "train", str(config), *overrides, f"run.folder={folder}"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    rows = [row for row in read_rows(folder / "metrics.jsonl") if row["kind"] == "train"]
    ends = [row["elapsed_s"] for row in rows]
    seconds = [after - before for before, after in itertools.pairwise(ends[1:])]
    return {
        "step_seconds": statistics.median(seconds),
        "peak_bytes": 1024 * int(done.stdout.splitlines()[-1]),
    }


def compare(config: Path, case: str, steps: int, turns: int, folder: Path) -> dict[str, Any]:
    settings = read_settings(Settings, config, CASES[case].split())
    overrides = [*CASES[case].split(), f"train.budget_tokens={steps * settings.train.batch_tokens}"]
    probes = [probe(config, overrides)]
    runs = []
    for turn in range(turns):
        runs.append(run_really(config, overrides, folder / f"{case}-{turn}"))
        probes.append(probe(config, overrides))
    errors = {
        key: [
            (before[key] + after[key]) / 2 / run[key] - 1
            for run, (before, after) in zip(runs, itertools.pairwise(probes), strict=True)
        ]
        for key in ("step_seconds", "peak_bytes")
    }
    return {
        "settings": overrides,
        "time_error": statistics.median(errors["step_seconds"]),
        "memory_error": statistics.median(errors["peak_bytes"]),
        "errors": errors,
        "runs": runs,
        "probes": probes,
    }


def write_config(folder: Path) -> Path:
    """Write settings, their text and their tokenizer into a folder."""
    code = sorted((Path(torch.__file__).parent / "nn").rglob("*.py"))
    texts = [path.read_text(encoding="utf-8") for path in code]
    file = folder / "code.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    learn_bpe(texts, 4096).save(folder / "tok")
    config = folder / "plan.toml"
    config.write_text(CONFIG.format(tokenizer=folder / "tok", texts=file))
    return config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the figures there")
    parser.add_argument("--steps", type=int, default=24, help="of each real run")
    parser.add_argument("--turns", type=int, default=4, help="real runs of each configuration")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    args = parser.parse_args()
    report: dict[str, Any] = {**circumstances(), "cases": {}}
    with tempfile.TemporaryDirectory(prefix="summerlm-plan-") as name:
        folder = Path(name)
        config = write_config(folder)
        for case in args.cases:
            report["cases"][case] = found = compare(config, case, args.steps, args.turns, folder)
            print(line_of(case, found), flush=True)
            if args.json:  # as it goes, for a run that is cut short
                write_json(args.json, report)


def lines(figures: Mapping[str, Any]) -> Iterator[str]:
    """Lay the figures out for people.

    Args:
        figures: What was written as JSON.

    Yields:
        A line a configuration.
    """
    for case, found in figures["cases"].items():
        yield line_of(case, found)


def line_of(case: str, found: Mapping[str, Any]) -> str:
    by_run = ", ".join(f"{error:+.1%}" for error in found["errors"]["step_seconds"])
    time, memory = found["time_error"], found["memory_error"]
    return f"{case:<12} step time {time:+.1%} ({by_run})  peak memory {memory:+.1%}"


if __name__ == "__main__":
    main()
