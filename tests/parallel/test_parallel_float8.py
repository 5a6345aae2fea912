"""fp8 products: where they are refused, what they compute, and that nothing else changes.

Without such a GPU torchao emulates them: operands are rounded in the same way and multiplied in
float32. One test at the end multiplies on a GPU, where there is one.
"""

import dataclasses
import io
from types import SimpleNamespace

import pytest
import torch
from layouts import CPU, MODEL, batch_of, make, run_step
from ranks import run_ranks
from rich.console import Console
from torch import nn

import summerlm
from summerlm.checkpoint.reading import read_tensors
from summerlm.checkpoint.store import Store
from summerlm.core.config import read_settings
from summerlm.core.errors import UsageError
from summerlm.core.ranks import ALONE
from summerlm.model.config import ModelConfig
from summerlm.parallel import float8, layout
from summerlm.parallel.config import ParallelConfig
from summerlm.recipes.pretrain import pretrain
from summerlm.recipes.settings import Settings

# sizes that fp8 products take
SIZES = {"width": 32, "heads": 4, "kv_heads": 2, "head_dim": 8, "mlp_hidden": 48, "context": 16}
LINEARS = ("attention.qkv", "attention.output", "mlp.gate_up", "mlp.down")
CONFIG = ModelConfig(**MODEL | SIZES)
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


@pytest.fixture
def emulated(monkeypatch):
    """Let this machine's CPU do what a GPU would."""
    recipe = dataclasses.replace(float8.recipe(), emulate=True)
    monkeypatch.setattr(float8, "missing", lambda device: None)
    monkeypatch.setattr(float8, "recipe", lambda: recipe)


def stepper_of(fp8, ranks=ALONE, dtype=torch.bfloat16, **parallel):
    return make(ranks, {"float8": fp8, **parallel}, model=SIZES, dtype=dtype)


# where it is refused


def lay_out(config=CONFIG, dtype=torch.bfloat16):
    parallel = ParallelConfig(float8=True)
    return layout.lay_out(config, parallel, ALONE, seed=0, device=CPU, dtype=dtype)


@pytest.fixture
def nothing_made(monkeypatch):
    """Fail where a model is made."""
    monkeypatch.setattr(layout, "Transformer", lambda config: pytest.fail("a model was made"))


def test_a_device_without_fp8_is_refused_before_a_model_is_made(nothing_made):
    with pytest.raises(UsageError, match=r"parallel.float8 = true: needs .*H100.* is on cpu"):
        lay_out()


def test_a_missing_package_is_named(nothing_made, emulated, monkeypatch):
    monkeypatch.setattr(float8.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'summerlm\[fp8\]'"):
        lay_out()


def test_float32_contradicts_fp8(nothing_made, emulated):
    with pytest.raises(UsageError, match=r"train.precision = 'float32'"):
        lay_out(dtype=None)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"width": 40}, r"model.width \(40\) must be a multiple of 16"),
        ({"heads": 3, "kv_heads": 1}, r"model.heads \* head_dim \(24\)"),
        ({"kv_heads": 1, "head_dim": 4}, r"kv_heads\) \* head_dim \(24\)"),
        ({"mlp_hidden": 56}, r"model.mlp_hidden \(56\)"),
        ({"context": 24}, r"model.context \(24\)"),
    ],
    ids=["width", "heads", "kv_heads", "mlp_hidden", "context"],
)
def test_sizes_that_fp8_products_do_not_take_are_refused(nothing_made, emulated, sizes, words):
    with pytest.raises(UsageError, match=words):
        lay_out(CONFIG.model_copy(update=sizes))


@pytest.mark.parametrize(
    ("hip", "properties", "able"),
    [
        (None, {"name": "NVIDIA A100", "major": 8, "minor": 0}, False),
        (None, {"name": "NVIDIA L40S", "major": 8, "minor": 9}, True),
        (None, {"name": "NVIDIA H100", "major": 9, "minor": 0}, True),
        ("7.0", {"name": "AMD MI250X", "gcnArchName": "gfx90a:sramecc+"}, False),
        ("7.0", {"name": "AMD MI300X", "gcnArchName": "gfx942:sramecc+"}, True),
    ],
    ids=["a100", "l40s", "h100", "mi250", "mi300"],
)
def test_devices_that_multiply_fp8(monkeypatch, hip, properties, able):
    found = SimpleNamespace(**properties)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    words = float8.missing(torch.device("cuda"))
    assert words is None if able else words.endswith(f"this is {found.name}")


# what it computes


def rounded(x, dtype):
    """x as the nearest fp8 multiples of one factor, which takes its largest magnitude as far as it
    goes."""
    factor = torch.finfo(dtype).max / x.abs().max().double()
    return (x.float() * factor.float()).to(dtype).float() / factor.float()


def test_values_and_gradients_are_those_of_rounded_operands(emulated):
    torch.manual_seed(0)
    linear = nn.Linear(32, 48)
    x = torch.randn(5, 7, 32, requires_grad=True)
    g = torch.randn(5, 7, 48) * torch.rand(48) * 1e-4  # as small as gradients are
    blocks = nn.ModuleList([nn.Sequential(linear)])
    float8.convert_blocks(blocks)
    y = blocks[0](x)
    y.backward(g)
    y = y.detach()
    weight, rows, flat = linear.weight.detach(), x.detach().flatten(0, 1), g.flatten(0, 1)
    x8, w8, g8 = rounded(rows, E4M3), rounded(weight, E4M3), rounded(flat, E5M2)
    expected = {
        "value": (y.flatten(0, 1), x8 @ w8.T + linear.bias.detach()),
        "input": (x.grad.flatten(0, 1), g8 @ w8),
        "weight": (linear.weight.grad, g8.T @ x8),
        "bias": (linear.bias.grad, flat.sum(0)),
    }
    for found, reference in expected.values():
        assert torch.allclose(found, reference, rtol=1e-5, atol=1e-5 * reference.abs().max().item())


def gradients(fp8, **parallel):
    stepper = stepper_of(fp8, **parallel)
    hidden = []
    model = stepper.layout.model
    model.final_norm.register_forward_hook(lambda module, inputs, output: hidden.append(output))
    kept = {}
    stepper.optimizer.step = lambda gradients, ok: (
        kept.update({name: gradient.clone() for name, gradient in gradients.items()})
        or torch.zeros(())
    )
    loss = run_step(stepper, 1).loss.item()
    return loss, hidden[0].detach(), kept


def distance(one, other):
    return ((one - other).norm() / other.norm()).item()


def assert_near(found, true):
    """Assert that results differ by no more than their roundings.

    A rounding to e4m3 (3 bits) errs by at most 2^-4 of a number, 2.6 % in the mean square, and one
    to e5m2 by twice as much. A product of two rounded operands errs by 3.7 %, one with gradients by
    6 %; here are 4 of the first kind on the way forward and, for a matrix, 4 of the second on the
    way back at most, each of which adds to a stream that keeps what was right in it. What norms
    get are sums over all positions, in which true parts cancel and errors don't.
    """
    (exact_loss, exact, wanted), (loss, hidden, gradients) = true, found
    assert loss == pytest.approx(exact_loss, rel=0.01)
    assert 0.005 < distance(hidden, exact) < 4**0.5 * 0.037
    assert gradients.keys() == wanted.keys()
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32
        assert distance(gradient, wanted[name]) < (4**0.5 * 0.06 if gradient.ndim == 2 else 0.3), (
            name
        )


def test_a_model_is_as_near_to_bfloat16_as_its_roundings(emulated):
    assert_near(gradients(True), gradients(False))


def test_every_linear_of_a_block_is_converted_and_nothing_else(emulated):
    plain, fp8 = (stepper_of(on).layout for on in (False, True))
    changed = [
        name
        for name, module in fp8.model.named_modules()
        if type(module) is not type(plain.model.get_submodule(name))
    ]
    assert sorted(changed) == sorted(f"blocks.{i}.{name}" for i in range(2) for name in LINEARS)
    assert list(fp8.parts) == list(plain.parts)
    for name, part in fp8.parts.items():  # first weights and what a checkpoint holds
        assert torch.equal(part.tensor, plain.parts[name].tensor), name
        assert part.tensor.dtype == torch.float32
        assert type(fp8.model.get_parameter(name)) is nn.Parameter
    assert fp8.model.matrix_blocks() == plain.model.matrix_blocks()


def falling(fp8):
    stepper, batch = stepper_of(fp8), batch_of(1)
    count = int((batch.targets >= 0).sum())
    return [stepper(batch, n, 1.0, count=count).loss.item() for n in range(1, 41)]


def test_losses_fall_alike(emulated):
    exact, found = falling(False), falling(True)
    assert exact[-1] < 0.7 * exact[0]
    # what is left to lose differs by less than 3 % of what was lost
    lost = exact[0] - exact[-1]
    assert max(abs(a - b) for a, b in zip(exact, found, strict=True)) < 0.03 * lost
    assert exact != found


# with everything else


def job_losses(ranks, fp8, shards, recompute):
    stepper = stepper_of(fp8, ranks, shard_ranks=shards, recompute=recompute, micro_batch_rows=4)
    return [run_step(stepper, n).loss.item() for n in range(1, 6)], list(stepper.layout.parts)


@pytest.mark.ranks
def test_shards_lose_what_copies_lose(emulated):
    replicated, names = run_ranks(job_losses, True, 1, None)[0]
    sharded, same = run_ranks(job_losses, True, "all", None)[0]
    assert same == names
    # shards' weights come in bfloat16 and are rounded twice
    assert sharded == pytest.approx(replicated, rel=5e-3)
    plain, _ = run_ranks(job_losses, False, 1, None)[0]
    assert sharded == pytest.approx(plain, rel=1e-2)
    assert sharded != plain


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_gives_the_same_gradients(emulated, recompute):
    loss, _, expected = gradients(True)
    again, _, found = gradients(True, recompute=recompute)
    assert again == loss
    for name, gradient in found.items():
        assert torch.equal(gradient, expected[name]), name


@pytest.mark.ranks
def test_shards_recompute(emulated):
    expected, _ = run_ranks(job_losses, True, "all", None)[0]
    assert run_ranks(job_losses, True, "all", "selective")[0][0] == expected


def test_a_run_in_fp8_leaves_checkpoints_like_any_other(emulated, tiny_config, tmp_path):
    def train(folder, *overrides):
        words = [f"run.folder={tmp_path / folder}", "train.precision=bfloat16", *overrides]
        console = Console(width=160, file=io.StringIO())
        assert pretrain(read_settings(Settings, tiny_config, words), console) == 0
        newest = Store(tmp_path / folder / "checkpoints", pytest.fail).latest()
        tensors = {stem: read_tensors(newest, stem) for stem in ("model", "optimizer")}
        return tensors, console.file.getvalue()

    (plain, _), (fp8, words) = train("plain"), train("fp8", "parallel.float8=true")
    assert "matrix products in torch.bfloat16, of blocks in fp8" in words
    for stem, tensors in fp8.items():
        assert {name: (t.shape, t.dtype) for name, t in tensors.items()} == {
            name: (t.shape, t.dtype) for name, t in plain[stem].items()
        }
        assert not all(torch.equal(t, plain[stem][name]) for name, t in tensors.items())
    again, _ = train("again", "parallel.float8=true")
    assert all(torch.equal(t, again["model"][name]) for name, t in fp8["model"].items())
    # from fp8 to bfloat16 and back, on what was saved
    for budget, on in ((4096, "false"), (5120, "true")):
        grown, words = train("fp8", f"train.budget_tokens={budget}", f"parallel.float8={on}")
        assert "resuming after step" in words
        assert grown["model"].keys() == plain["model"].keys()
    model = summerlm.load(tmp_path / "fp8").model
    assert all(
        torch.equal(weight, grown["model"][name]) for name, weight in model.named_parameters()
    )


@pytest.mark.slow
def test_compiled_blocks_multiply_in_fp8_too(emulated):
    torch._dynamo.reset()
    assert_near(gradients(True, compile=True), gradients(False))


# on a GPU


@pytest.mark.slow
@pytest.mark.skipif(
    not torch.cuda.is_available() or float8.missing(torch.device("cuda")) is not None,
    reason="needs a GPU that multiplies fp8",
)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_gpu_multiplies_what_is_emulated(monkeypatch, compiled):
    device = torch.device("cuda")
    batch = batch_of(1).to(device)

    def model_gradients(parallel):
        config = ParallelConfig(float8=True, **parallel)
        made = layout.lay_out(CONFIG, config, ALONE, seed=1, device=device, dtype=torch.bfloat16)
        with torch.autocast("cuda", torch.bfloat16):
            made(batch.tokens, batch.documents).float().square().sum().backward()
        return {n: p.grad for n, p in made.model.named_parameters() if p.grad is not None}

    found = model_gradients({"compile": compiled})
    recipe = dataclasses.replace(float8.recipe(), emulate=True)
    monkeypatch.setattr(float8, "recipe", lambda: recipe)
    for name, gradient in model_gradients({}).items():
        assert distance(found[name], gradient) < 0.02, name
