"""benchmarks/gpu.sh runs at toy sizes and keeps results as it goes; attention kernels in turn."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_benchmarks_peers import NANOGPT, ORIGINAL

from summerlm.core.config import read_settings
from summerlm.recipes.settings import Settings

FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def gpu():
    """The benchmark's modules."""
    sys.path.insert(0, str(FOLDER))
    try:
        import attention
        import gpu
        import gpu_parts
        import gpu_step
        import peers
    finally:
        sys.path.pop(0)
    return SimpleNamespace(
        command=gpu, parts=gpu_parts, step=gpu_step, peers=peers, attention=attention
    )


@pytest.fixture
def repos(tmp_path):
    """Stand-ins for the peers' checkouts."""
    files = {
        "nanogpt/model.py": NANOGPT.replace("{out_of_memory}", ""),
        "original/nmdl.py": ORIGINAL,
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(text)
    return ["--original", tmp_path / "original", "--nanogpt", tmp_path / "nanogpt"]


def run_gpu(*options):
    done = subprocess.run(
        ["bash", FOLDER / "gpu.sh", "--toy", *options],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_everything_runs_at_toy_sizes(gpu, repos, tmp_path):
    file = tmp_path / "results.json"
    done = run_gpu(*repos, file)
    figures = json.loads(file.read_text())
    assert figures["toy"] is True
    assert list(figures["parts"]) == [part.name for part in gpu.parts.parts()]
    fp8 = figures["parts"].pop("float8-4b")  # as on every CPU
    assert (fp8["status"], fp8["why"]) == ("failed", "exit code 1")
    assert any("parallel.float8 = true: needs" in line for line in fp8["log"])
    for name, row in figures["parts"].items():
        assert row["status"] == "done", row
        assert row["figures"]["toy"] is True, name
    step = figures["parts"]["modern-4b"]["figures"]
    assert {"mfu", "mfu_torchtitan", "peak_bytes", "kernel", "mode"} <= step.keys()
    assert step["planned_bytes"] > 0
    verdicts = {row["mark"]: row["verdict"] for row in figures["marks"]}
    assert set(verdicts.values()) == {"toy", "not measured"}  # no claim comes of toys
    assert verdicts["4.58B faithful / original"] == "toy"
    assert verdicts["124M / nanoGPT compiled"] == "toy"
    assert "4.58B faithful / original" in done.stdout


@pytest.mark.slow
def test_a_part_that_fails_stops_nothing_and_what_is_done_is_kept(gpu, tmp_path):
    file = tmp_path / "results.json"
    run_gpu(file, "float8-4b", "original-4b", "step-125m")
    rows = json.loads(file.read_text())["parts"]
    assert [row["status"] for row in rows.values()] == ["failed", "not measured", "done"]
    assert rows["original-4b"]["why"] == "no checkout: give --original PATH"
    before = file.read_bytes()
    assert run_gpu(file, "step-125m").stderr == ""
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    ("value", "toy", "verdict"),
    [
        (0.9, False, "met"),
        (1.1, False, "met"),
        (0.89, False, "missed"),
        (1.11, False, "missed"),
        (1.0, True, "toy"),
        (None, False, "not measured"),
    ],
)
def test_marks_are_held_against_figures(gpu, value, toy, verdict):
    mark = gpu.parts.Mark("memory", gpu.parts.figure("step", "peak_over_plan"), 0.9, 1.1)
    parts = {"step": {"figures": {"peak_over_plan": value}}, "broken": {"status": "failed"}}
    row = gpu.command.judge(mark, {"toy": toy, "parts": parts})
    assert (row["verdict"], row["figure"]) == (verdict, value)


def test_ratios_are_of_rates(gpu):
    parts = {name: {"figures": {"tokens_per_second": rate}} for name, rate in (("a", 6), ("b", 4))}
    mark = gpu.parts.Mark("a / b", gpu.parts.rates("a", "b"), 1.5)
    assert gpu.command.judge(mark, {"toy": False, "parts": parts})["verdict"] == "met"
    del parts["b"]
    assert gpu.command.judge(mark, {"toy": False, "parts": parts})["verdict"] == "not measured"


def test_a_part_that_takes_too_long_is_stopped_with_its_children(gpu, tmp_path):
    began, note = time.monotonic(), tmp_path / "child"
    script = f"sleep 60 & echo $! > {note}; wait"
    with (tmp_path / "log").open("w") as log:
        why = gpu.command.wait(["bash", "-c", script], 0.5, log)
    assert why == "stopped after 0 s"
    assert time.monotonic() - began < 30
    state = Path(f"/proc/{int(note.read_text())}/stat")
    deadline = time.monotonic() + 10
    while state.exists() and state.read_text().split()[2] != "Z":
        assert time.monotonic() < deadline, "the child lives on"
        time.sleep(0.05)


def test_results_of_other_code_or_size_are_measured_anew(gpu, tmp_path, monkeypatch):
    file = tmp_path / "results.json"
    assert gpu.command.begin(file, toy=True)["parts"] == {}
    figures = {**gpu.command.begin(file, toy=True), "parts": {"attention": {"status": "done"}}}
    file.write_text(json.dumps(figures))
    assert gpu.command.begin(file, toy=True)["parts"] == figures["parts"]
    file.write_text(json.dumps({**figures, "toy": False}))
    assert gpu.command.begin(file, toy=True)["parts"] == {}
    file.write_text(json.dumps(figures))
    monkeypatch.setattr(gpu.command, "fingerprint", lambda: "other code")
    assert gpu.command.begin(file, toy=True)["parts"] == {}
    file.write_text("{")
    assert gpu.command.begin(file, toy=True)["parts"] == {}


def test_no_part_begins_where_no_time_is_left(gpu):
    part = gpu.parts.parts()[0]
    row = gpu.command.run(part, SimpleNamespace(toy=True), time.monotonic() + 1)
    assert row["status"] == "not measured"
    assert "no time left" in row["why"]


@pytest.mark.parametrize(
    ("options", "words"), [(["results.json", "nothing"], "no part nothing"), ([], "--toy")]
)
def test_refusals_are_clear(gpu, options, words, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py", *options])
    with pytest.raises(SystemExit, match=words):
        gpu.command.parse()


def test_every_part_is_understood_at_full_size(gpu, monkeypatch, repos):
    monkeypatch.setattr(gpu.peers, "find_spec", lambda _: True)  # as where slow tests run
    for part in gpu.parts.parts():
        given = [part.program, *part.arguments]
        if part.repo is not None:
            given += [
                "--repo",
                str(dict(zip(repos[::2], repos[1::2], strict=True))[f"--{part.repo}"]),
            ]
        monkeypatch.setattr(sys, "argv", given)
        if part.program == "attention.py":
            assert gpu.attention.parse().device == "cuda"
        elif part.program == "peers.py":
            arguments = gpu.peers.parse()
            assert (arguments.device, arguments.fit) == ("cuda", True)
            assert len(arguments.vocabulary) == 1
        else:
            arguments = gpu.step.parse()
            assert arguments.device == "cuda"
            settings = read_settings(gpu.step.StepSettings, arguments.config, arguments.overrides)
            whole = read_settings(Settings, arguments.config, arguments.overrides)
            assert settings.model == whole.model
            assert settings.parallel.compile


def test_attention_kernels_are_compared_in_turn(gpu):
    shape = gpu.attention.Rows(2, 32, 4, 2, 8)
    kernels, refused = gpu.attention.passes(shape, torch.device("cpu"), torch.float32, True)
    assert {"default", "plain", "sdpa"} <= kernels.keys()
    assert "needs an NVIDIA GPU" in refused["cudnn"]
    found = gpu.attention.compare(kernels, rounds=3)
    for row in found.values():
        assert len(row["seconds"]["all"]) == 3
        pairs = zip(found["default"]["seconds"]["all"], row["seconds"]["all"], strict=True)
        assert row["ratio"]["all"] == pytest.approx([default / own for default, own in pairs])


def test_an_attention_kernel_that_cannot_do_a_shape_is_told(gpu):
    def fail():
        raise RuntimeError("no available kernel\nand a long story")

    found = gpu.attention.compare({"default": lambda: None, "cudnn": fail}, rounds=2)
    assert found["cudnn"] == {"failed": "no available kernel"}
    assert found["default"]["ratio"]["all"] == [1, 1]
