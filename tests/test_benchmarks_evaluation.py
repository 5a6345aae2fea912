"""The benchmark of scoring tasks runs at toy size and writes what it promises."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.mark.slow
@pytest.mark.peers("lm_eval", "transformers")
def test_both_sides_answer_alike(tmp_path, stand_in_data):
    out = tmp_path / "figures.json"
    done = subprocess.run(
        [
            *(sys.executable, FOLDER / "evaluation.py", "--quick", "--json", out),
            *("--config", FOLDER.parent / "configs" / "demo.toml"),
            *("--mirror", stand_in_data / "hub"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(out.read_text())
    assert {"date", "command", "commit", "hardware", "versions"} <= figures.keys()
    model = figures["models"]["demo"]
    assert model["ratio"]["median"] > 0
    assert model["tasks"].keys() == {"arc_easy", "arc_challenge", "lambada_openai"}
    for task in model["tasks"].values():
        assert task["items"] == 4
        assert task["ours"]["seconds"]["lowest"] > 0
        agreement = dict(task["agreement"])
        assert agreement.pop("largest_relative_difference") < 1e-4
        assert agreement == {"greedy": 0, "choices": 0, "choices_norm": 0}


def test_a_python_without_the_peer_is_refused(tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    command = [sys.executable, FOLDER / "evaluation.py", "--peer-python", python]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "has no `lm_eval`" in done.stderr
