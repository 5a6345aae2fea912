import pytest

from summerlm.core.config import read_settings
from summerlm.core.errors import UsageError
from summerlm.optim.config import OptimConfig


@pytest.mark.parametrize(
    "override",
    [
        *("peak_lr=0", "beta1=1", "beta2=-0.1", "eps=0", "weight_decay=-1", "momentum=1"),
        *("warmup_tokens=-1", "floor_ratio=2", "cooldown_fraction=0", "cooldown_fraction=1.5"),
        *("schedule=linear", "name=sgd", "adam_lr=0", "newton_schulz_dtype=float16"),
    ],
)
def test_a_senseless_value_is_refused_by_name(override):
    with pytest.raises(UsageError, match=override.split("=")[0]):
        read_settings(OptimConfig, None, [override])


def test_adam_lr_under_adamw_is_refused():
    with pytest.raises(UsageError, match="adam_lr"):
        read_settings(OptimConfig, None, ["name=adamw", "adam_lr=0.1"])
    assert read_settings(OptimConfig, None, ["adam_lr=0.1"]).adam_lr == 0.1
