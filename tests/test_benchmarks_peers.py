"""benchmarks/peers.py at toy size, beside stand-ins for the peers; no figure is one."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from summerlm.core.config import read_settings, validate
from summerlm.model.config import ModelConfig
from summerlm.plan.count import flops_per_token, parameters
from summerlm.recipes.settings import Settings, preset

FOLDER = Path(__file__).parent.parent / "benchmarks"
REAL = {"nanogpt": "SUMMERLM_TEST_NANOGPT", "original": "SUMMERLM_TEST_ORIGINAL"}
FIRST = ["--mode=eager-float32", "--environment=default"]

NANOGPT = """
from dataclasses import dataclass
import torch
from torch import nn
from torch.nn import functional as F

@dataclass
class GPTConfig:
    block_size: int = 8
    vocab_size: int = 8
    n_layer: int = 1
    n_head: int = 1
    n_embd: int = 8
    dropout: float = 0.5
    bias: bool = True

class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        assert (config.dropout, config.bias) == (0.0, False)
        assert config.vocab_size % 64 == 0
        print("number of parameters: what a peer prints is no answer")
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.AdamW(self.parameters(), lr=learning_rate * 10, betas=betas)

    def forward(self, idx, targets=None):
        {out_of_memory}
        logits = self.head(self.wte(idx))
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())
"""
TOO_LARGE = "if len(idx) > 1: raise torch.OutOfMemoryError('rows')"

ORIGINAL = """
import torch
from torch import nn
from torch.nn import functional as F

class TransformerLM(nn.Module):
    def __init__(self, vocab_size, dim, n_heads, n_layers, mlp_expansion, dropout, max_seq_len,
                 use_rotary, use_alibi, ignore_index):
        super().__init__()
        assert (dropout, use_rotary, use_alibi, ignore_index) == (0.1, True, True, -100)
        self.emb = nn.Embedding(vocab_size, dim)
        self.mlp = nn.Linear(dim, int(dim * mlp_expansion))
        self.back = nn.Linear(int(dim * mlp_expansion), dim)
        self.head = nn.Linear(dim, vocab_size, bias=False)

    def forward(self, idx, targets=None):
        logits = self.head(self.back(self.mlp(self.emb(idx))))
        return logits, F.cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten())
"""


@pytest.fixture(scope="module")
def parts():
    """The benchmark's modules."""
    sys.path.insert(0, str(FOLDER))
    try:
        import peers
        import peers_contest
        import peers_shape
        import peers_side
    finally:
        sys.path.pop(0)
    return SimpleNamespace(command=peers, contest=peers_contest, shape=peers_shape, side=peers_side)


@pytest.fixture(scope="module")
def repos(tmp_path_factory):
    """Folders with the files of each peer that a benchmark imports."""
    folder = tmp_path_factory.mktemp("repos")
    files = {
        "nanogpt/model.py": NANOGPT.replace("{out_of_memory}", ""),
        "narrow/model.py": NANOGPT.replace("{out_of_memory}", TOO_LARGE),
        "original/nmdl.py": ORIGINAL,
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return folder


def found_by(tmp_path, *options):
    file = tmp_path / "figures.json"
    done = subprocess.run(
        [sys.executable, FOLDER / "peers.py", "--toy", "--json", file, *map(str, options)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(file.read_text())
    (only,) = figures["vocabularies"].values()
    return figures, only, done.stdout


@pytest.mark.slow
def test_both_sides_are_measured_in_turn(repos, tmp_path):
    options = ["--peer=nanogpt", "--repo", repos / "nanogpt", "--fit", "--micro-rows=2", *FIRST]
    figures, found, said = found_by(tmp_path, *options)
    assert figures["toy"] is True
    assert found["mark"] is None  # no figure of a toy is held against a mark
    assert found["sides"].keys() == {"ours, modern", "nanogpt"}
    for name, side in found["sides"].items():
        assert side["mode"]["micro_rows"] == 2
        assert len(side["seconds"]["all"]) == 4
        assert side["tokens_per_second"] == pytest.approx(64 / side["seconds"]["median"])
        share = side["tokens_per_second"] * side["flops_per_token"]
        share /= figures["matmul_peak"]["float32"]
        assert side["share_of_matmul_peak"] == pytest.approx(share)
        assert f"{name}: {side['tokens_per_second']:,.0f} tokens/s" in said
    ours, theirs = (found["sides"][name]["seconds"]["all"] for name in found["sides"])
    slices = [(sum(theirs[i : i + 2]) / sum(ours[i : i + 2])) for i in (0, 2)]  # medians of two
    assert found["ratios"]["ours, modern"]["all"] == pytest.approx(slices)
    assert found["sides"]["ours, modern"]["kernel"]


@pytest.mark.slow
def test_the_original_meets_both_recipes_in_their_best_modes(repos, tmp_path):
    options = ["--peer=original", "--repo", repos / "original", "--mode=eager-float32"]
    _, found, _ = found_by(tmp_path, *options, "--micro-rows=4", "--micro-rows=2")
    assert found["ratios"].keys() == {"ours, modern", "ours, faithful"}
    for name, side in found["sides"].items():
        rates = {json.dumps(row["mode"]): row["tokens_per_second"] for row in found["tried"][name]}
        assert len(rates) == 3  # two micro-batches, and the best of them in the other environment
        assert json.dumps(side["mode"]) == max(rates, key=rates.get)


@pytest.mark.slow
def test_what_does_not_fit_into_memory_is_passed_over(repos, tmp_path):
    options = ["--peer=nanogpt", "--repo", repos / "narrow", *FIRST, "--fit"]
    _, found, _ = found_by(tmp_path, *options)
    assert found["sides"]["nanogpt"]["mode"]["micro_rows"] == 1
    assert found["sides"]["ours, modern"]["mode"]["micro_rows"] == 4


def search(
    parts, rates, modes=((False, "float32"),), micro_rows=(4, 2, 1), environments=("default",)
):
    """Search among modes of made-up rates; gives the best and the number of tries."""

    class Child:
        def __init__(self, mode):
            self.rate = rates(mode)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def answer(self, question=None):
            if question is None:
                return {"out_of_memory": True} if self.rate is None else {}
            return {"seconds": [9 / self.rate, 1 / self.rate, 0.1 / self.rate]}

    side = SimpleNamespace(name="toy", tokens=1, start=lambda mode, warm: Child(mode))
    searching = parts.contest.Search(side, parts.contest.Amounts())
    best = searching.best(modes, micro_rows, environments)
    for row in searching.tried:
        rate = rates(parts.contest.Mode(**row["mode"]))
        assert row["tokens_per_second"] == (rate and pytest.approx(rate))
    return best, len(searching.tried)


def test_the_fastest_mode_is_found(parts):
    def rates(mode):
        rate = 2 if mode.compiled else 1
        return rate * (3 if mode.micro_rows == 2 else 1) * (1 + (mode.environment != "default"))

    modes = [(False, "float32"), (True, "bfloat16")]
    best, tries = search(parts, rates, modes, environments=parts.contest.ENVIRONMENTS)
    assert best == parts.contest.Mode(True, "bfloat16", 2, parts.contest.OURS)
    assert tries == 2 + 2 + 1


def test_an_environment_is_a_variable(parts):
    assert parts.contest.variables("default") == {}
    assert parts.contest.variables("GOMP_SPINCOUNT=2000") == {"GOMP_SPINCOUNT": "2000"}
    for wrong in ("GOMP_SPINCOUNT", "=2"):
        with pytest.raises(ValueError, match=f"'{wrong}': write default, or NAME=VALUE"):
            parts.contest.variables(wrong)


def test_a_mode_that_fits_with_fewer_rows_is_a_candidate(parts):
    def rates(mode):
        if mode.compiled and mode.micro_rows > 1:
            return None
        return 5 if mode.compiled else 1

    best, _ = search(parts, rates, [(False, "float32"), (True, "float32")])
    assert best == parts.contest.Mode(True, "float32", 1)


def test_nothing_is_tried_where_there_is_no_choice_and_nothing_found_where_nothing_fits(parts):
    best, tries = search(parts, lambda mode: None, micro_rows=(2,))
    assert (best.micro_rows, tries) == (2, 0)
    with pytest.raises(SystemExit, match="no mode fits"):
        search(parts, lambda mode: None)


def losses(parts, side, repo, micro_rows, steps, shape=None, recipe="modern"):
    shape = shape or parts.shape.Shape(2, 32, 2, 2, 16, 4, 300)
    peer = side if side != "ours" else "nanogpt"
    model = {**parts.shape.our_model(peer, shape, recipe), "dropout": 0.0}
    optim = {"name": "adamw", "peak_lr": 6e-3}
    job = {
        "side": side,
        "device": "cpu",
        "shape": asdict(shape),
        "repo": str(repo),
        "tables": {"model": model, "optim": optim, "train": {}, "parallel": {}},
        "compiled": False,
        "dtype": "float32",
        "micro_rows": micro_rows,
    }
    made = parts.side.Side(job)
    return made, [made.steps(1)["loss"] for _ in range(steps)]


@pytest.mark.parametrize(
    ("side", "recipe", "fall"),
    [
        ("ours", "modern", 0.3),
        ("ours", "faithful", 0.3),
        ("nanogpt", "modern", 0.3),
        ("original", "modern", 0.07),  # its rate is lower
    ],
)
def test_every_side_trains(parts, repos, side, recipe, fall):
    _, values = losses(parts, side, repos / side, 4, steps=60, recipe=recipe)
    assert values[0] == pytest.approx(5.7, abs=0.7)  # ln 300
    assert sum(values[-8:]) / 8 < values[0] - fall  # small ids come more often


@pytest.mark.peers("transformers")
def test_llama_trains_with_the_parameters_that_were_counted(parts):
    shape = parts.shape.Shape(2, 48, 4, 2, 16, 4, 300)
    made, values = losses(parts, "llama", ".", 4, steps=40, shape=shape)
    matrices = 2 * parts.shape.block_matrices("llama", shape) + 2 * 300 * 48
    assert made.about(0.0)["parameters"] == matrices + 5 * 48  # and norms
    assert values[-1] < values[0] - 0.05


LLAMA = pytest.param("llama", marks=pytest.mark.peers("transformers"))


@pytest.mark.parametrize("side", ["ours", "nanogpt", "original", LLAMA])
def test_micro_batches_change_no_loss_and_no_gradient(parts, repos, side, monkeypatch):
    norms, clip = [], torch.nn.utils.clip_grad_norm_

    def spy(parameters, limit):
        norms.append(clip(parameters, limit).item())

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spy)
    whole, cut = (losses(parts, side, repos / side, rows, steps=6)[1] for rows in (4, 1))
    assert cut == pytest.approx(whole, abs=2e-3)
    assert whole[-1] != whole[0]
    assert norms[6:] == pytest.approx(norms[:6], rel=0.02)
    assert len(norms) == (0 if side == "ours" else 12)


def test_ours_makes_the_step_that_it_is_asked_for(parts, repos):
    made, _ = losses(parts, "ours", repos, 1, steps=0)
    trainer, (tokens, targets), passes = made._trainer, next(made._batches), []
    model = trainer._layout.model
    with torch.no_grad():
        expected = F.cross_entropy(model.logits(model(tokens)).flatten(0, 1), targets.flatten())
    model.register_forward_pre_hook(lambda _, given: passes.append(len(given[0])))
    assert trainer.step(tokens, targets).item() == pytest.approx(expected.item(), abs=1e-4)
    assert passes == [1, 1, 1, 1]


@pytest.mark.parametrize("peer", ["nanogpt", "original", "llama"])
@pytest.mark.parametrize("width", [256, 768, 2048])
def test_ours_has_the_peers_parameters(parts, peer, width):
    shapes = parts.shape
    shape = shapes.Shape(6, width, 8, 8, 512, 8, 4096)
    for head_dim in (None, width // 8 - 8):
        model = validate(ModelConfig, shapes.our_model(peer, shape, head_dim=head_dim), "model")
        tables = 1 if peer == "nanogpt" else 2
        theirs = 6 * shapes.block_matrices(peer, shape) + tables * 4096 * width
        assert parameters(model) == pytest.approx(theirs, rel=0.02)
    if (peer, width) == ("nanogpt", 256):
        assert shapes.our_model(peer, shape)["mlp_hidden"] == 704


def test_faithful_is_the_preset_of_the_original(parts):
    shapes = parts.shape
    model = read_settings(Settings, preset("summer-4b")).model
    shape = shapes.Shape(32, 3072, 32, 32, 4096, 4, 32773)
    table = validate(ModelConfig, shapes.our_model("original", shape, "faithful"), "model")
    assert table == model
    assert shapes.peer_flops("original", shape) == flops_per_token(model)
    assert shapes.shape_like(model, 4).hidden == 10752


@pytest.mark.parametrize("name", ["summer-4b-next", "350m", "125m"])
def test_the_original_is_as_large_as_a_preset(parts, name):
    shapes = parts.shape
    model = read_settings(Settings, preset(name)).model
    shape = shapes.shape_like(model, 4)
    tables = (1 if model.tied_embeddings else 2) * model.vocabulary * model.width
    theirs = model.layers * shapes.block_matrices("original", shape) + tables
    assert theirs == pytest.approx(parameters(model), rel=0.002)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--peer=nanogpt"], "give its checkout with --repo PATH"),
        (["--peer=nanogpt", "--repo=."], "--repo .: has no model.py"),
        (["--peer=llama", "--fit"], "goes with one --mode and one --environment"),
        (["--peer=original", "--repo=HERE", "--kv-heads=1"], "has as many as --heads"),
        (["--peer=llama"], "pip install transformers"),
    ],
)
def test_refusals_are_clear(parts, repos, options, words, monkeypatch):
    found = None if "pip" in words else object()
    monkeypatch.setattr(parts.command, "find_spec", lambda _: found)
    given = [text.replace("HERE", str(repos / "original")) for text in options]
    monkeypatch.setattr(sys, "argv", ["peers.py", *given])
    with pytest.raises(SystemExit, match=words):
        parts.command.parse()


@pytest.mark.slow
def test_compiled_bf16(repos, tmp_path):
    options = ["--peer=nanogpt", "--repo", repos / "nanogpt", "--mode=compiled-bf16"]
    _, found, _ = found_by(tmp_path, *options, "--environment=default", "--fit")
    for side in found["sides"].values():
        assert (side["mode"]["compiled"], side["mode"]["dtype"]) == (True, "bfloat16")


@pytest.mark.slow
@pytest.mark.parametrize("peer", sorted(REAL))
def test_the_peers_own_checkouts(peer, tmp_path):
    repo = os.environ.get(REAL[peer])
    if repo is None:
        pytest.skip(f"set {REAL[peer]} to a checkout of the peer")
    options = ["--peer", peer, "--repo", repo, "--micro-rows=4", "--mode=eager-bf16"]
    _, found, _ = found_by(tmp_path, *options)
    assert found["sides"][peer]["first_loss"] == pytest.approx(5.7, abs=0.7)
    assert found["ratios"]["ours, modern"]["median"] > 0
