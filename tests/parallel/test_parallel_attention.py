"""The choice of an attention kernel: by rule or measurement, refused where it can't be, kept."""

import json

import pytest
import torch
import torch.nn.attention
from tiny import TINY

from summerlm.core.config import read_settings
from summerlm.core.errors import UsageError
from summerlm.core.files import RunFolder
from summerlm.core.ranks import ALONE
from summerlm.model.config import ModelConfig
from summerlm.model.kernels import Channelled, Masked, install
from summerlm.parallel import attention
from summerlm.parallel.attention import choose_kernel, measure_kernels
from summerlm.parallel.config import ParallelConfig
from summerlm.parallel.layout import lay_out
from summerlm.recipes.identity import settle_kernel
from summerlm.recipes.settings import Settings

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def config(**changes):
    sizes = {"vocabulary": 60, "width": 16, "layers": 1, "heads": 2, "kv_heads": 1}
    return ModelConfig(**{**sizes, "head_dim": 8, "mlp_hidden": 16, "context": 24, **changes})


@pytest.mark.parametrize(("context", "kernel"), [(24, "plain"), (2048, "plain"), (2049, "sdpa")])
def test_cpus_go_by_a_rule(context, kernel):
    assert choose_kernel("auto", config(context=context), CPU, None) == kernel


def test_gpus_go_by_measurement(monkeypatch):
    times = {"sdpa": 3.0, "flash": 2.0, "cudnn": 1.0}
    monkeypatch.setattr(attention, "measure_kernels", lambda *_: times)
    assert choose_kernel("auto", config(), GPU, torch.bfloat16) == "cudnn"


@pytest.mark.parametrize("changes", [{}, {"alibi": True, "kv_heads": 2}, {"dropout": 0.1}])
def test_all_kernels_that_can_are_measured(changes):
    times = measure_kernels(config(**changes), CPU, torch.bfloat16, rows=2)
    can = {"sdpa", "plain"} if changes.get("dropout") else {"sdpa", "flash", "plain"}
    assert set(times) == can
    assert all(seconds > 0 for seconds in times.values())


def test_a_kernel_that_torch_refuses_for_a_shape_is_left_out(monkeypatch):
    def seconds(name, *_):
        if name == "flash":
            raise RuntimeError("No available kernel. Aborting execution.")
        return 1.0

    monkeypatch.setattr(attention, "_seconds", seconds)
    assert set(measure_kernels(config(), CPU, torch.bfloat16)) == {"sdpa", "plain"}


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), RuntimeError("broken")])
def test_what_no_kernel_can_help_is_raised(monkeypatch, error):
    def seconds(name, *_):
        if name == "flash" and not isinstance(error, torch.OutOfMemoryError):
            return 1.0
        raise error

    monkeypatch.setattr(attention, "_seconds", seconds)
    with pytest.raises(type(error)):
        measure_kernels(config(), CPU, torch.bfloat16)


def test_flash_attention_3_is_put_in_and_taken_out(monkeypatch):
    now = []
    names = ("activate_flash_attention_impl", "restore_flash_attention_impl")
    for name, act in zip(names, (now.append, now.clear), strict=True):
        monkeypatch.setattr(torch.nn.attention, name, act)
    monkeypatch.setattr(
        torch.nn.attention, "current_flash_attention_impl", lambda: now[0] if now else None
    )
    install("flash3")
    assert now == ["FA3"]
    lay_out(config(), ParallelConfig(), ALONE, seed=0, device=CPU, dtype=None)
    assert now == []


@pytest.mark.parametrize(
    ("wish", "device", "dtype", "dropout", "words"),
    [
        ("cudnn", CPU, torch.bfloat16, 0.0, "needs an NVIDIA GPU, and this is cpu"),
        ("flash3", CPU, torch.bfloat16, 0.0, "needs an NVIDIA GPU"),
        ("flash", CPU, None, 0.1, "model.dropout"),
        ("flash", GPU, None, 0.0, "train.precision"),
        ("flash3", GPU, torch.bfloat16, 0.1, "model.dropout"),
    ],
)
def test_a_kernel_that_cannot_is_refused(wish, device, dtype, dropout, words):
    with pytest.raises(UsageError, match=f"parallel.attention = '{wish}'.*{words}"):
        choose_kernel(wish, config(dropout=dropout), device, dtype)


@pytest.mark.parametrize(("wish", "kind"), [("auto", Masked), ("flash", Channelled)])
def test_the_model_attends_by_what_was_chosen(wish, kind):
    layout = lay_out(
        config(), ParallelConfig(attention=wish), ALONE, seed=0, device=CPU, dtype=None
    )
    tokens = torch.zeros(1, 24, dtype=torch.int64)
    assert type(layout.model.positions(tokens, None)) is kind
    assert type(layout.model.positions(tokens, None, whole=False)) is Channelled


def test_a_run_that_goes_on_keeps_its_kernel(tmp_path):
    (tmp_path / "tiny.toml").write_text(TINY)
    settings = read_settings(
        Settings, tmp_path / "tiny.toml", ["data.sources.a.path='x'", "data.sources.a.weight=1"]
    )
    folder = RunFolder(tmp_path)
    assert settle_kernel(settings, folder, CPU, None).parallel.attention == "plain"
    for recorded, began_on, kept in [
        ("sdpa", "cpu", "sdpa"),
        ("sdpa", "cuda:0", "plain"),  # another kind of device: chosen anew
        ("cudnn", "cpu", "plain"),
        ("gone", "cpu", "plain"),
    ]:
        manifest = {"attention": recorded, "hardware": {"device": began_on}}
        (tmp_path / "manifest.json").write_text(json.dumps(manifest))
        assert settle_kernel(settings, folder, CPU, None).parallel.attention == kept
    manifest = {"attention": "sdpa", "hardware": {"device": "cpu"}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    own = settings.model_copy(update={"parallel": ParallelConfig(attention="flash")})
    assert settle_kernel(own, folder, CPU, None).parallel.attention == "flash"
