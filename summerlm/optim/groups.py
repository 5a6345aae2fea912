"""Which optimizer trains which parameter, at which rate and decay: one table.

Flow: `build.build_optimizer` lays `RULES` over the model's parameters with `parameter_groups`
and hands the groups to AdamW and Muon; `group_table` prints them before step 1.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import NamedTuple

from summerlm.core.parts import Part
from summerlm.optim.config import OptimConfig


class Rule(NamedTuple):
    """What is done with the parameters whose name matches a shell pattern (`*` crosses dots)."""

    pattern: str
    hidden: bool  # a matrix between hidden states: Muon's, and at `peak_lr`; else AdamW's
    decay: bool  # without `decay_all`


RULES = (  # the first rule that matches holds
    Rule("embedding.weight", hidden=False, decay=False),
    Rule("head.weight", hidden=False, decay=True),
    Rule("*norm.weight", hidden=False, decay=False),
    Rule("*_scale.weight", hidden=False, decay=False),
    Rule("*.bias", hidden=False, decay=False),
    Rule("blocks.*.attention.qkv.weight", hidden=True, decay=True),
    Rule("blocks.*.attention.output.weight", hidden=True, decay=True),
    Rule("blocks.*.mlp.gate_up.weight", hidden=True, decay=True),
    Rule("blocks.*.mlp.down.weight", hidden=True, decay=True),
)


@dataclass(frozen=True)
class Group:
    """The parameters of one rule, and how they are trained."""

    pattern: str
    optimizer: str  # "adamw" or "muon"
    rate: float  # at the schedule's peak
    decay: float  # share of a weight that a step at rate 1 takes away
    parts: dict[str, Part]

    @property
    def elements(self) -> int:
        """Numbers in all tensors of the group, over all ranks."""
        return sum(math.prod(part.shape) for part in self.parts.values())


def parameter_groups(
    parts: Mapping[str, Part],
    config: OptimConfig,
    matrices: Mapping[str, tuple[int, ...]],
) -> list[Group]:
    """Sort a model's parameters into groups, one for each rule that matches any.

    Args:
        parts: The model's parameters, the rows of each that this rank holds.
        config: Optimizer, rates and decay.
        matrices: For each hidden matrix the row counts of its blocks, as
            `Transformer.matrix_blocks()` gives them.

    Returns:
        The groups in the order of `RULES`; together they hold every parameter once.

    Raises:
        LookupError: If a parameter has no rule, or rules and `matrices` disagree on which
            parameters are hidden matrices.
    """
    members: dict[Rule, dict[str, Part]] = {rule: {} for rule in RULES}
    for name, part in parts.items():
        rule = _rule_of(name)
        if rule.hidden != (name in matrices):
            raise LookupError(f"{name}: rule {rule.pattern!r} and matrix_blocks() disagree")
        members[rule][name] = part
    return [_group(rule, config, found) for rule, found in members.items() if found]


def group_table(groups: Iterable[Group]) -> str:
    """Lay groups out as lines of text, for the log.

    Args:
        groups: What `parameter_groups` returned.

    Returns:
        A headline and one line a group: pattern, tensors, parameters, optimizer, rate, decay.
    """
    line = "{:<34}{:>8}{:>16}{:>11}{:>10}{:>8}".format
    rows = [line("parameters", "tensors", "elements", "optimizer", "peak lr", "decay")]
    for g in groups:
        elements = f"{g.elements:,}"
        rate, decay = f"{g.rate:g}", f"{g.decay:g}"
        rows.append(line(g.pattern, len(g.parts), elements, g.optimizer, rate, decay))
    return "\n".join(rows)


def _rule_of(name: str) -> Rule:
    for rule in RULES:
        if fnmatchcase(name, rule.pattern):
            return rule
    raise LookupError(f"no rule for parameter {name}: add one to RULES in optim/groups.py")


def _group(rule: Rule, config: OptimConfig, parts: dict[str, Part]) -> Group:
    optimizer = "muon" if rule.hidden and config.name == "muon" else "adamw"
    rate = config.peak_lr if rule.hidden else config.adam_lr or config.peak_lr
    decay = config.weight_decay if rule.decay or config.decay_all else 0.0
    return Group(rule.pattern, optimizer, rate, decay, parts)
