"""Launch files and the commands of docs/clusters.md, run dry: what would be started, and how."""

import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs" / "clusters.md").read_text()
BIN = Path(sys.executable).parent

# stand-ins for the commands: each notes its arguments and torchrun's variables
NOTE = """#!/usr/bin/env bash
echo "$(basename "$0") $*" >> "$NOTES"
env | grep ^PET_ | sort >> "$NOTES"
"""
STAND_INS = {
    "summerlm": NOTE + 'exit "${CODE:-0}"\n',
    "srun": NOTE + 'exec "$@"\n',
    "scontrol": NOTE + 'if [ "$1" = show ]; then printf "node07\\nnode08\\n"; fi\n',
    "python": 'echo "${GPUS}"\n',
}


def dry_run(folder: Path, script: str, *arguments: str, **env: object) -> tuple[int, list[str]]:
    """Run a script with stand-ins: its exit code, and what was noted."""
    for name, text in STAND_INS.items():
        (folder / name).write_text(text if text.startswith("#!") else f"#!/bin/sh\n{text}")
        (folder / name).chmod(0o755)
    notes = folder / "notes"
    notes.unlink(missing_ok=True)
    values = {name: str(value) for name, value in env.items()}
    values |= {"PATH": f"{folder}:{os.environ['PATH']}", "NOTES": str(notes)}
    result = subprocess.run(["bash", ROOT / "runs" / script, *arguments], env=values)
    return result.returncode, notes.read_text().splitlines()


@pytest.mark.parametrize("path", sorted((ROOT / "runs").glob("*.sh")), ids=lambda path: path.name)
def test_launch_files_are_bash_and_can_be_run(path):
    subprocess.run(["bash", "-n", path], check=True)
    assert os.access(path, os.X_OK)


def test_one_machine_gets_a_rank_for_each_gpu(tmp_path):
    _, notes = dry_run(tmp_path, "node.sh", "a.toml", "b.c=d e", GPUS=4)
    assert notes == ["summerlm train a.toml b.c=d e --nproc 4 --max-restarts 3"]
    _, notes = dry_run(tmp_path, "node.sh", "a.toml", RANKS=2, RESTARTS=0)
    assert notes == ["summerlm train a.toml --nproc 2 --max-restarts 0"]


SLURM = {
    "SLURM_JOB_NODELIST": "node[07-08]",
    "SLURM_NNODES": 2,
    "SLURM_CPUS_PER_TASK": 64,
    "SLURM_JOB_ID": 99,
    "SLURM_GPUS_ON_NODE": 8,
}


@pytest.mark.parametrize("code", [0, 1, 2, 75])
def test_under_slurm_the_launchers_meet_at_the_first_node_and_only_75_is_queued_again(
    tmp_path, code
):
    ended, notes = dry_run(tmp_path, "slurm.sh", "a.toml", "b.c=1", CODE=code, **SLURM)
    assert ended == code
    command = "summerlm train a.toml b.c=1 --nproc 8 --max-restarts 3"
    variables = [
        "PET_NNODES=2",
        "PET_RDZV_BACKEND=c10d",
        "PET_RDZV_ENDPOINT=node07:29400",
        "PET_RDZV_ID=99.0",
    ]
    wanted = ["scontrol show hostnames node[07-08]", f"srun {command}", *variables]
    wanted += [command, *variables]
    if code == 75:
        wanted += ["scontrol requeue 99", *variables]
    assert notes == wanted


def test_slurm_sends_the_signal_that_ends_with_75():
    lines = (ROOT / "runs" / "slurm.sh").read_text()
    assert re.search(r"^#SBATCH --signal=USR1@\d+$", lines, flags=re.M)
    assert "#SBATCH --ntasks-per-node=1\n" in lines
    assert "#SBATCH --requeue\n" in lines


def test_torchs_variables_on_the_page_are_known_to_torch():
    libraries = Path(torch.__file__).parent
    names = set(re.findall(r"`(TORCH_\w+|GLOO_SOCKET\w+)`", PAGE))
    assert len(names) >= 5
    texts = [p.read_bytes() for p in (libraries / "include/torch/csrc").rglob("*NCCL*.hpp")]
    texts += [p.read_bytes() for p in (libraries / "lib").glob("libtorch_cpu*")]
    missing = [name for name in names if not any(name.encode() in text for text in texts)]
    assert not missing


def test_the_settings_files_of_the_pages_commands_are_there():
    for name in re.findall(r"configs/\S+\.toml", PAGE):
        assert (ROOT / name).exists(), name


@pytest.mark.slow
@pytest.mark.ranks
def test_the_pages_command_for_several_machines_makes_one_job(tiny_config):
    """Two launchers on this machine, told as the page tells two machines."""
    line = re.search(r"^PET_NNODES.*$", PAGE, flags=re.M)[0]
    variables = dict(word.split("=") for word in shlex.split(line) if word.startswith("PET_"))
    assert set(variables) == {"PET_NNODES", "PET_RDZV_BACKEND", "PET_RDZV_ENDPOINT", "PET_RDZV_ID"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        variables["PET_RDZV_ENDPOINT"] = f"localhost:{free.getsockname()[1]}"
    command = [BIN / "summerlm", "train", tiny_config, "--nproc", "1"]
    both = [
        subprocess.Popen(command, env=os.environ | variables, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    try:
        words = [process.communicate(timeout=120)[0] for process in both]
    finally:
        for process in both:
            process.kill()
    assert [process.returncode for process in both] == [0, 0]
    assert sum("ranks          2" in text for text in words) == 1, "rank 0 speaks, on its machine"
    assert (tiny_config.parent / "run/checkpoints/step-00000012/MANIFEST.json").exists()
