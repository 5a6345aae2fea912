import pytest
import torch

from summerlm.core.parts import Part
from summerlm.optim.config import OptimConfig
from summerlm.optim.groups import group_table, parameter_groups

SHAPES = {  # every kind of name that a model of ours can have
    "embedding.weight": (24, 8),
    "blocks.0.attention_norm.weight": (8,),
    "blocks.0.attention.qkv.weight": (16, 8),
    "blocks.0.attention.query_norm.weight": (4,),
    "blocks.0.attention.key_norm.weight": (4,),
    "blocks.0.attention.output.weight": (8, 8),
    "blocks.0.attention_scale.weight": (8,),
    "blocks.0.mlp_norm.weight": (8,),
    "blocks.0.mlp.gate_up.weight": (40, 8),
    "blocks.0.mlp.gate_up.bias": (40,),
    "blocks.0.mlp.down.weight": (8, 20),
    "blocks.0.mlp.down.bias": (8,),
    "blocks.0.mlp_scale.weight": (8,),
    "final_norm.weight": (8,),
    "head.weight": (24, 8),
}
BLOCKS = {
    "blocks.0.attention.qkv.weight": (8, 4, 4),
    "blocks.0.attention.output.weight": (8,),
    "blocks.0.mlp.gate_up.weight": (20, 20),
    "blocks.0.mlp.down.weight": (8,),
}
PARTS = {name: Part.whole(torch.zeros(shape)) for name, shape in SHAPES.items()}


def treatment(config):
    """{name: (optimizer, rate, decay)}, and a check that every parameter stands there once."""
    groups = parameter_groups(PARTS, config, BLOCKS)
    names = [name for group in groups for name in group.parts]
    assert sorted(names) == sorted(PARTS)
    assert all(p is PARTS[name] for g in groups for name, p in g.parts.items())
    return {n: (g.optimizer, g.rate, g.decay) for g in groups for n in g.parts}


def test_muon_takes_exactly_the_hidden_matrices():
    config = OptimConfig(name="muon", peak_lr=0.01, adam_lr=0.004, weight_decay=0.1)
    expected = dict.fromkeys(SHAPES, ("adamw", 0.004, 0.0))
    expected["head.weight"] = ("adamw", 0.004, 0.1)
    expected |= dict.fromkeys(BLOCKS, ("muon", 0.01, 0.1))
    assert treatment(config) == expected


def test_adam_rate_defaults_to_the_peak():
    assert {rate for _, rate, _ in treatment(OptimConfig(peak_lr=0.02)).values()} == {0.02}


def test_adamw_decays_matrices_alone():
    config = OptimConfig(name="adamw", peak_lr=0.01, weight_decay=0.1)
    decayed = {*BLOCKS, "head.weight"}
    expected = {n: ("adamw", 0.01, 0.1 if n in decayed else 0.0) for n in SHAPES}
    assert treatment(config) == expected


def test_the_faithful_recipe_decays_everything():
    config = OptimConfig(name="adamw", peak_lr=1e-4, weight_decay=0.01, decay_all=True)
    assert set(treatment(config).values()) == {("adamw", 1e-4, 0.01)}


def test_a_parameter_without_a_rule_raises():
    with pytest.raises(LookupError, match=r"blocks\.0\.mixer\.weight"):
        parameter_groups({"blocks.0.mixer.weight": Part.whole(torch.zeros(2))}, OptimConfig(), {})


def test_rules_and_model_must_agree_on_hidden_matrices():
    without = {name: rows for name, rows in BLOCKS.items() if "down" not in name}
    with pytest.raises(LookupError, match=r"mlp\.down\.weight"):
        parameter_groups(PARTS, OptimConfig(), without)
    with pytest.raises(LookupError, match=r"head\.weight"):
        parameter_groups(PARTS, OptimConfig(), {**BLOCKS, "head.weight": (24,)})


def test_the_table_counts_every_parameter():
    groups = parameter_groups(PARTS, OptimConfig(adam_lr=0.004), BLOCKS)
    rows = [line.split() for line in group_table(groups).splitlines()[1:]]
    assert sum(int(row[1]) for row in rows) == len(PARTS)
    assert sum(int(row[2].replace(",", "")) for row in rows) == sum(
        p.tensor.numel() for p in PARTS.values()
    )
    assert rows[0] == ["embedding.weight", "1", "192", "adamw", "0.004", "0"]
    assert ["blocks.*.mlp.down.weight", "1", "160", "muon", "0.001", "0.1"] in rows
