import pytest

from summerlm.core.config import read_settings
from summerlm.core.errors import UsageError
from summerlm.recipes.settings import Settings, check_changes, derive


def changed(config, *overrides):
    return read_settings(Settings, config, overrides)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.batch_tokens=250", "multiple of model.context"),
        ("data.lanes=3", "data.lanes (3) must divide"),
        ("model.heads=3", "kv_heads (2) must divide heads (3)"),
        ("model.layers=2.5", "model.layers"),
        ("data.sources.text.path=none", "exactly one of"),
        ("optim.peek_lr=1", "did you mean optim.peak_lr?"),
    ],
)
def test_settings_that_do_not_fit(tiny_config, override, words):
    with pytest.raises(UsageError) as error:
        changed(tiny_config, override)
    assert words in str(error.value)


def test_derived_rounds_up_to_whole_steps(tiny_config):
    derived = derive(changed(tiny_config, "train.budget_tokens=1000"))
    assert (derived.rows, derived.steps, derived.tokens) == (8, 4, 1024)
    assert derived.stable_steps == 2
    assert derive(changed(tiny_config, "optim.schedule=cosine")).stable_steps is None


@pytest.mark.parametrize(
    "override",
    [
        "run.log_every_steps=1",
        "data.mirror=elsewhere",
        "data.workers=2",
        "parallel.micro_batch_rows=2",
        "parallel.shard_ranks=all",
        "checkpoint.every_steps=1",
        "train.on_spike=skip",  # what a stop at a spike advises
        "data.sources.text.max_epochs=2",  # what the stop at the former one advises
        "train.budget_tokens=4000",
        "train.budget_tokens=2900",  # rounds up to the same steps
    ],
)
def test_what_a_run_may_change(tiny_config, tiny_settings, override):
    check_changes(tiny_settings, changed(tiny_config, override))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.width=64", "model.width is 32 in this run, 64 was asked for"),
        ("run.seed=1", "run.seed"),
        ("data.sources.text.weight=2", "data.sources.text.weight"),
        ("train.budget_tokens=1000", "can only grow"),
        ("optim.peak_lr=0.1", "optim.peak_lr"),
    ],
)
def test_what_it_may_not(tiny_config, tiny_settings, override, words):
    with pytest.raises(UsageError) as error:
        check_changes(tiny_settings, changed(tiny_config, override))
    assert words in str(error.value)


def test_going_back_needs_checkpoints_on_the_way(tiny_config):
    with pytest.raises(UsageError, match=r"set checkpoint\.every_steps"):
        changed(tiny_config, "train.on_spike=rollback", "checkpoint.every_steps=none")


def test_cosine_can_not_be_extended(tiny_config):
    old = changed(tiny_config, "optim.schedule=cosine")
    new = changed(tiny_config, "optim.schedule=cosine", "train.budget_tokens=9000")
    with pytest.raises(UsageError, match="every rate depends on the budget"):
        check_changes(old, new)
