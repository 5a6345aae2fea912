"""Limits against a healthy run on record, planted spikes, divergence, and levels that shift."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import build
from pydantic import ValidationError

from summerlm.core.errors import DivergedError
from summerlm.model.config import ModelConfig
from summerlm.train.config import TrainConfig
from summerlm.train.guards import LEVEL, WINDOW, Guard, Verdict

HEALTHY = json.loads((Path(__file__).parent / "healthy_run.json").read_text())
RUN = list(zip(HEALTHY["loss"], HEALTHY["grad_norm"], strict=True))
EARLY = 36  # steps in which the level still holds the steep beginning


def make(policy="skip", state=None, **settings):
    return Guard(TrainConfig(on_spike=policy, **settings), state)


def judge(guard, step, loss, norm):
    """What the step and the loop do: the device decides by the limits, the guard hears of it."""
    most_loss, most_norm = guard.limits()
    ok = math.isfinite(loss) and math.isfinite(norm) and loss <= most_loss and norm <= most_norm
    return guard.see(step, loss, norm, ok)


def run(guard, steps, first=1):
    verdicts = []
    for step, (loss, norm) in enumerate(steps, first):
        verdicts.append(judge(guard, step, loss, norm))
        guard.check(step)
    return verdicts


def test_a_healthy_run_meets_no_limit():
    guard = make("stop")
    assert set(run(guard, RUN)) == {Verdict.FINE}
    assert (guard.in_a_row, guard.total) == (0, 0)


def test_planted_spikes_are_found_at_every_step():
    """A loss twice as high once the steep beginning is past; a norm of a hundred times what it
    was, and a loss thrice as high, from the first limits on."""
    guard = make()
    for step, (loss, norm) in enumerate(RUN, 1):
        most_loss, most_norm = guard.limits()
        if step > LEVEL:
            assert norm * 100 > most_norm
            assert loss * 3 > most_loss
        if step > EARLY:
            assert loss * 2 > most_loss
        judge(guard, step, loss, norm)


def test_limits_are_six_deviations_above_the_level_by_numpy():
    guard, draw = make(), np.random.default_rng(0)
    losses, norms = draw.normal(3, 0.2, 300).cumsum() / 3, draw.lognormal(0.5, 0.6, 300)
    for step in range(300):
        if step < LEVEL:
            assert guard.limits() == (math.inf, math.inf)
        else:
            loss, norm = losses[max(0, step - WINDOW) : step], norms[max(0, step - WINDOW) : step]
            for limit, x in zip(guard.limits(), (loss, np.log(norm)), strict=True):
                level, floor = np.median(x[-LEVEL:]), 0.05 if x is loss else 0.4
                around = np.median(np.abs(x[-LEVEL:] - level))
                between = np.median(np.abs(x[1:] - x[:-1])) / 2**0.5
                spread = max(around, between) / 0.6744897501960817
                expected = level + 6 * max(spread, floor)
                found = limit if x is loss else math.log(limit)
                assert found == pytest.approx(expected, rel=1e-4)
        guard.see(step, losses[step], norms[step], ok=True)


def test_small_unrest_in_a_smooth_run_is_borne():
    guard = make()
    run(guard, [(2.0, 0.5)] * 200)
    assert judge(guard, 201, 2.29, 0.5) is Verdict.FINE
    assert judge(guard, 202, 2.0, 5.5) is Verdict.FINE
    assert judge(guard, 203, 2.31, 0.5) is Verdict.SPIKE
    assert judge(guard, 204, 2.0, 5.6) is Verdict.SPIKE


def test_a_loss_that_comes_in_waves_meets_no_limit():
    """As of documents that fill many rows: from step to step little changes, over many much."""
    draw = np.random.default_rng(1)
    waves = 3 + 0.8 * np.sin(np.arange(600) / 12) + draw.normal(0, 0.03, 600)
    assert set(run(make(), [(loss, 1.0) for loss in waves])) == {Verdict.FINE}


def test_limits_follow_a_loss_that_fell_fast():
    """From 8 nats to a quarter in 70 steps; soon after a loss of 1 is a spike."""
    guard = make()
    run(guard, [(8 * math.exp(-min(step, 70) / 20), 1.0) for step in range(70 + LEVEL)])
    assert judge(guard, 103, 1.0, 1.0) is Verdict.SPIKE


def test_skipped_steps_leave_the_limits_alone():
    guard = make()
    run(guard, RUN[:300])
    before = guard.limits()
    nan, inf = math.nan, math.inf
    spikes = [(9.0, 1.0), (3.0, 500.0), (nan, 1.0), (3.0, nan), (inf, inf), (3.0, inf)]
    verdicts = run(guard, spikes)
    assert verdicts == [Verdict.SPIKE] * 2 + [Verdict.NOT_FINITE] * 4
    assert guard.limits() == before
    assert (guard.in_a_row, guard.total) == (6, 6)
    assert run(guard, RUN[300:301]) == [Verdict.FINE]
    assert (guard.in_a_row, guard.total) == (0, 6)


@pytest.mark.parametrize("at", [0, 10, 31, 32, 100, 200, 420])
def test_a_resumed_guard_judges_as_the_one_before(at):
    spiked = [
        (loss * 3, norm) if step % 50 == 49 else (loss, norm)
        for step, (loss, norm) in enumerate(RUN[:500])
    ]
    whole, parted = make(), make()
    expected = run(whole, spiked)
    first = run(parted, spiked[:at])
    resumed = make(state=json.loads(json.dumps(parted.state())))
    assert resumed.limits() == parted.limits()
    assert first + run(resumed, spiked[at:]) == expected
    assert resumed.state() == whole.state()
    assert whole.total == expected.count(Verdict.SPIKE) >= 8


def test_a_resume_is_no_way_out_of_too_many_in_a_row():
    guard = make(max_skipped_steps=3)
    run(guard, [(math.nan, 1.0)] * 3)
    resumed = make(state=json.loads(json.dumps(guard.state())), max_skipped_steps=3)
    assert (resumed.in_a_row, resumed.total) == (3, 3)
    with pytest.raises(DivergedError, match="for 4 steps in a row"):
        run(resumed, [(math.nan, 1.0)], 4)


def test_a_state_is_shared_with_nobody():
    guard = make()
    run(guard, RUN[:50])
    state = guard.state()
    text = json.dumps(state)
    run(guard, RUN[50:99])
    assert json.dumps(state) == text


def test_without_a_policy_only_what_is_not_finite_is_skipped():
    guard = make(None)
    run(guard, RUN[:200])
    assert guard.limits() == (math.inf, math.inf)
    assert run(guard, [(1e30, 1e30), (math.nan, 1.0)]) == [Verdict.FINE, Verdict.NOT_FINITE]


def test_a_spike_stops_a_run_that_says_so_after_its_step():
    guard = make("stop")
    run(guard, RUN[:300])
    assert judge(guard, 301, 20.0, 1.0) is Verdict.SPIKE
    with pytest.raises(DivergedError, match="step 301: a spike beyond a loss of") as error:
        guard.check(301)
    assert error.value.exit_code == 9
    guard = make("stop")
    run(guard, RUN[:300])
    assert run(guard, [(math.nan, 1.0)]) == [Verdict.NOT_FINITE], "that is skipped, as ever"


@pytest.mark.parametrize("policy", ["skip", "rollback", None])
@pytest.mark.parametrize("bad", [(9.0, 1.5), (math.nan, math.nan)], ids=["spike", "nan"])
def test_a_level_that_stays_is_not_skipped_for_ever(policy, bad):
    guard = make(policy, max_skipped_steps=4)
    run(guard, RUN[:300])
    if policy is None and math.isfinite(bad[0]):
        assert set(run(guard, [bad] * 200, 301)) == {Verdict.FINE}
        return
    assert Verdict.FINE not in run(guard, [bad] * 4, 301)
    with pytest.raises(DivergedError, match=r"step 305: .* for 5 steps in a row"):
        run(guard, [bad], 305)


def test_steps_without_targets_are_passed_over():
    """As many as a long document that is left out may fill."""
    guard = make("stop", max_skipped_steps=2)
    run(guard, RUN[:200])
    guard.see(201, math.nan, math.nan, ok=False)
    before = guard.state()
    for step in range(202, 260):
        assert guard.see(step, math.nan, math.nan, ok=False, count=0) is Verdict.EMPTY
        guard.check(step)
    assert guard.state() == before


def test_no_skipped_step_may_be_borne():
    with pytest.raises(DivergedError, match="for 1 steps in a row"):
        run(make(max_skipped_steps=0), [(math.nan, 1.0)])


def test_a_norm_of_zero_is_a_norm():
    guard = make()
    assert set(run(guard, [(1.0, 0.0)] * 50)) == {Verdict.FINE}
    assert math.isfinite(guard.limits()[1])


def test_an_unknown_policy_is_refused():
    with pytest.raises(ValidationError):
        TrainConfig(on_spike="pray")


def test_a_rate_a_hundred_times_too_high_is_divergence():
    """A real model and optimizer, whose rate jumps after 60 steps; the limits end it in time."""
    config = ModelConfig(
        vocabulary=50,
        width=32,
        layers=2,
        heads=2,
        kv_heads=2,
        head_dim=16,
        mlp_hidden=64,
        context=32,
    )
    model = build(config, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    draw = torch.Generator().manual_seed(0)
    guard, seen = make(max_skipped_steps=5), []

    def train_step(step):
        first = torch.randint(50, (8, 1), generator=draw)
        ids = (first + 7 * torch.arange(33)) % 50  # after 30 steps it is nearly learnt
        noise = torch.rand(8, 33, generator=draw) < 0.1
        ids = torch.where(noise, torch.randint(50, (8, 33), generator=draw), ids)
        logits = model.logits(model(ids[:, :-1]))
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 0.3 if step > 60 else 3e-3
        verdict = judge(guard, step, loss.item(), norm.item())
        if verdict is Verdict.FINE:
            optimizer.step()
        return verdict

    def train():
        for step in range(1, 200):
            seen.append(train_step(step))
            guard.check(step)

    with pytest.raises(DivergedError, match="for 6 steps in a row"):
        train()
    assert set(seen[:60]) == {Verdict.FINE}
    assert len(seen) < 75, "found at once"
