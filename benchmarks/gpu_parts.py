"""What `gpu.py` measures, part by part, and what is aimed at.

Flow: `gpu.py` runs each of `parts` as a command with a time limit, and holds what they found
against `MARKS`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peers_contest import OURS

CONFIGS = Path(__file__).parent.parent / "configs"
ADAM = ["optim.name=adamw", "optim.adam_lr=none"]
# 16,384 tokens a step, the original's on each of its GPUs. Muon's work doesn't shrink with the
# batch and isn't dealt out on one GPU: at the preset's batch it is a hundredth of the step.
LARGE = ["--rows", "4", "--micro-rows", "4", "--micro-rows", "2", "--micro-rows", "1"]
LONG = ["--steps", "20", "--slice", "10"]  # a slice ends with the host waiting for the device
TOY_MODEL = ["model.width=64", "model.layers=2", "model.heads=4", "model.kv_heads=4"]
TOY_MODEL += ["model.head_dim=16", "model.mlp_hidden=128", "model.vocabulary=500"]
TOY_MODEL += ["model.context=32", "parallel.compile=false"]
TOY_STEPS = ["--toy", "--device", "cpu", "--steps", "3", "--warm", "1", "--tried", "1"]
TOY_SHAPE = ["--layers", "2", "--width", "64", "--heads", "4", "--context", "32", "--rows", "4"]


@dataclass(frozen=True)
class Part:
    """One thing to measure.

    Attributes:
        name: Its key in the results.
        limit_s: Seconds after which it is stopped.
        program: A file of this folder.
        arguments: Its arguments at full size.
        toy: Its arguments at toy size.
        repo: Whose checkout it needs: "original", "nanogpt" or None.
    """

    name: str
    limit_s: float
    program: str
    arguments: list[str]
    toy: list[str]
    repo: str | None = None


def step(
    name: str, limit_s: float, config: str, *more: str, side: str = "ours", rows: list[str] = LARGE
) -> Part:
    """Make the part that measures one preset's step."""
    overrides = [text for text in more if "=" in text]
    options = ["--config", str(CONFIGS / f"{config}.toml"), "--side", side]
    return Part(
        name,
        limit_s,
        "gpu_step.py",
        [*options, *rows, *LONG, *overrides],
        [*options, "--rows", "4", *TOY_STEPS, *TOY_MODEL, *overrides],
        "original" if side == "original" else None,
    )


def against(name: str, limit_s: float, peer: str, repo: str | None, *shape: str) -> Part:
    """Make the part that measures ours and a peer in turn, both compiled in bf16."""
    same = ["--peer", peer, "--fit", "--environment", OURS]
    return Part(
        name,
        limit_s,
        "peers.py",
        [*same, "--device", "cuda", "--mode", "compiled-bf16", *LONG, *shape],
        [*same, *TOY_STEPS, "--mode", "eager-bf16", *TOY_SHAPE],
        repo,
    )


def parts() -> list[Part]:
    """List what is measured, the most important first: time may end before the list does."""
    small, medium = (["--rows", n, "--micro-rows", n] for n in ("16", "12"))
    return [
        Part("attention", 60, "attention.py", ["--device", "cuda"], ["--toy"]),
        step("modern-4b", 150, "summer-4b-next", *ADAM),
        step("float8-4b", 150, "summer-4b-next", *ADAM, "parallel.float8=true"),
        step("faithful-4b", 150, "summer-4b"),
        step("original-4b", 270, "summer-4b", side="original"),
        step("step-350m", 60, "350m", *ADAM, rows=medium),
        step("step-125m", 60, "125m", *ADAM, rows=small),
        against("nanogpt-124m", 120, "nanogpt", "nanogpt", *_124M),
        against("llama-1b", 150, "llama", None, *_1B),
        step("original-350m", 120, "350m", *ADAM, side="original", rows=medium),
        step("original-125m", 120, "125m", *ADAM, side="original", rows=small),
        # the preset as it is, Muon at 196,608 tokens a step: an eighth of the preset's batch
        step("muon-4b", 150, "summer-4b-next", rows=["--rows", "48", *LARGE[2:]]),
    ]


# GPT-2 124M as nanoGPT trains it, and a Llama as large as the preset 1b, with its key/value heads
_124M = ["--layers", "12", "--width", "768", "--heads", "12", "--context", "1024", "--rows", "24"]
_124M += ["--vocabulary", "50257", "--micro-rows", "24", "--micro-rows", "12"]
_1B = ["--layers", "20", "--width", "2048", "--heads", "16", "--kv-heads", "4", "--head-dim", "120"]
_1B += ["--context", "4096", "--rows", "4", "--vocabulary", "32768"]
_1B += ["--micro-rows", "4", "--micro-rows", "2", "--micro-rows", "1"]


@dataclass(frozen=True)
class Mark:
    """What is aimed at.

    Attributes:
        name: For people.
        find: Takes the figures of a part by its name, and gives this mark's figure; raises
            KeyError, TypeError or IndexError where there is none.
        least: The figure that meets it.
        most: The largest that meets it, or None.
    """

    name: str
    find: Callable[[Mapping[str, Any]], float]
    least: float
    most: float | None = None


def figure(part: str, key: str) -> Callable[[Mapping[str, Any]], float]:
    """Find a key of a part."""
    return lambda found: float(found[part][key])


def rates(ours: str, theirs: str) -> Callable[[Mapping[str, Any]], float]:
    """Find the quotient of two parts' rates."""
    key = "tokens_per_second"
    return lambda found: float(found[ours][key] / found[theirs][key])


def ratio(part: str) -> Callable[[Mapping[str, Any]], float]:
    """Find the ratio of a comparison."""

    def find(found: Mapping[str, Any]) -> float:
        (vocabulary,) = found[part]["vocabularies"].values()
        return float(vocabulary["ratios"]["ours, modern"]["median"])

    return find


MARKS = [
    Mark("4.58B modern, MFU", figure("modern-4b", "mfu"), 0.55),
    Mark("4.58B modern, tokens/s", figure("modern-4b", "tokens_per_second"), 18_600),
    Mark("4.58B faithful, MFU", figure("faithful-4b", "mfu"), 0.48),
    Mark("4.58B fp8, tokens/s", figure("float8-4b", "tokens_per_second"), 21_500),
    Mark("4.58B faithful / original", rates("faithful-4b", "original-4b"), 1.35),
    Mark("4.58B modern / original", rates("modern-4b", "original-4b"), 1.5),
    Mark("4.58B fp8 / original", rates("float8-4b", "original-4b"), 1.8),
    Mark("350M / original", rates("step-350m", "original-350m"), 1.5),
    Mark("125M / original", rates("step-125m", "original-125m"), 1.5),
    Mark("124M / nanoGPT compiled", ratio("nanogpt-124m"), 1.15),
    Mark("1B / Hugging Face Llama compiled", ratio("llama-1b"), 1.15),
    Mark("350M, MFU", figure("step-350m", "mfu"), 0.45),
    Mark("125M, MFU", figure("step-125m", "mfu"), 0.40),
    *(
        Mark(f"{part}, peak memory / planner's", figure(part, "peak_over_plan"), 0.9, 1.1)
        for part in ("modern-4b", "float8-4b", "faithful-4b", "step-350m", "step-125m")
    ),
]
