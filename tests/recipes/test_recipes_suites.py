"""Tasks measured while a run trains: what is recorded, what it costs, and the best checkpoint."""

import json
import os
import re
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from jobs_train import at_step, learning, rows_of, run_job, same_bits, saved
from rich.console import Console

import summerlm
from summerlm.checkpoint.best import Measured, best_first
from summerlm.checkpoint.store import Store
from summerlm.cli import main
from summerlm.core.config import read_settings
from summerlm.core.errors import SummerError, UsageError
from summerlm.core.files import RunFolder, read_json
from summerlm.core.ranks import ALONE
from summerlm.core.record import read_rows
from summerlm.eval.items import Where
from summerlm.eval.results import Figure, TaskResult
from summerlm.eval.running import run_task
from summerlm.eval.task import load_task
from summerlm.recipes import pretrain as recipe
from summerlm.recipes import suites
from summerlm.recipes.best import Best
from summerlm.recipes.pretrain import pretrain
from summerlm.recipes.report import write_report
from summerlm.recipes.settings import Settings
from summerlm.recipes.suites import Allowance
from summerlm.recipes.watching import follow_leader

SHARE = "evaluation.time_share=1.0"
TASKS = ("evaluation.tasks=['arc_easy','lambada_openai']", "evaluation.every_tokens=1000", SHARE)
EVERY = [4, 8, 12]  # the first steps of 256 tokens that reach 1,000, 2,000 and 3,000
WORDS = ["the", "sun", "rises", "over", "a", "small", "field", "and", "every", "bird", "sings"]


@pytest.fixture(scope="module")
def mirror(tmp_path_factory) -> Path:
    """Two tasks of eleven rows in the hub's layout, in words that the tiny model knows."""
    folder = tmp_path_factory.mktemp("mirror")
    rows = [
        {
            "id": f"q{n}",
            "question": f"the {WORDS[n]} rises over",
            "choices": {"text": [WORDS[n], "a small field", "sings"], "label": ["A", "B", "C"]},
            "answerKey": "ABC"[n % 3],
        }
        for n in range(11)
    ]
    texts = [{"text": f"{' '.join(WORDS[n:])} every bird sings over a"} for n in range(11)]
    for place, table in (
        ("allenai/ai2_arc/ARC-Easy", rows),
        ("EleutherAI/lambada_openai/default", texts),
    ):
        (folder / place).mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(table), folder / place / "test-00000-of-00001.parquet")
    return folder


@pytest.fixture
def start(tiny_config, tmp_path, mirror):
    """Train with overrides into a named folder, which is returned."""

    def run(folder, *overrides):
        path = tmp_path / folder
        words = [f"run.folder={path}", f"data.mirror={mirror}", *overrides]
        assert pretrain(read_settings(Settings, tiny_config, words), Console(quiet=True)) == 0
        return path

    return run


def figures_of(folder):
    """What was measured, without what it cost."""
    rows = rows_of(folder, "evaluation")
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def test_rows_are_what_the_saved_model_reaches(start, mirror):
    folder = start("a", *TASKS, "evaluation.items=9", "checkpoint.keep_last=9")
    rows = rows_of(folder, "evaluation")
    names = [("arc_easy", "acc"), ("arc_easy", "acc_norm")]
    names += [("lambada_openai", "acc"), ("lambada_openai", "perplexity")]
    assert [(r["step"], r["task"], r["metric"]) for r in rows] == [
        (s, *n) for s in EVERY for n in names
    ]
    steps = {row["step"]: row["tokens"] for row in rows_of(folder)}
    for step in EVERY:
        lm = summerlm.load(folder / "checkpoints" / f"step-{step:08d}")
        for task in ("arc_easy", "lambada_openai"):
            result = run_task(lm, load_task(task), Where(mirror=mirror), limit=9)
            for name, figure in result.figures.items():
                (row,) = (
                    r for r in rows if (r["step"], r["task"], r["metric"]) == (step, task, name)
                )
                assert row["value"] == pytest.approx(figure.value, rel=1e-6)
                assert (row["chance"], row["items"], row["few_shot"]) == (figure.chance, 9, 0)
                assert row["error"] == pytest.approx(figure.error, rel=1e-6)
                assert row["tokens"] == steps[step]
                assert row["seconds"] > 0
    assert [r["chance"] for r in rows[-4:]] == [rows[0]["chance"]] * 2 + [None] * 2
    assert rows[0]["chance"] == pytest.approx(1 / 3)
    assert "loss" not in rows[0]  # which is the training rows' alone


def test_without_every_tokens_only_the_last_step_is_measured(start):
    folder = start("a", TASKS[0])
    assert {row["step"] for row in figures_of(folder)} == {12}


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("world", "shards"),
    [
        pytest.param(1, "1", marks=pytest.mark.slow),
        pytest.param(2, "1", marks=pytest.mark.slow),
        (2, "all"),
    ],
    ids=["alone", "replicated", "sharded"],
)
def test_looking_changes_nothing(tiny_config, tmp_path, mirror, world, shards):
    setup = (f"parallel.shard_ranks={shards}", f"data.mirror={mirror}", "model.dropout=0.1")
    folders = [tmp_path / "plain", tmp_path / "watched"]
    metric = "evaluation.metric=lambada_openai/perplexity"
    for folder, more in zip(folders, [(), (*TASKS, metric)], strict=True):
        codes, words = run_job(tiny_config, folder, *setup, *more, world=world)
        assert set(codes) == {0}, words
    assert learning(folders[0]) == learning(folders[1])
    assert same_bits(saved(folders[0]), saved(folders[1]))
    assert len(figures_of(folders[1])) == 3 * 4


@pytest.mark.ranks
@pytest.mark.slow
def test_ranks_together_measure_what_one_does(tiny_config, tmp_path, mirror):
    found = []
    for world, shards in ((1, "1"), (2, "all")):
        folder = tmp_path / shards
        setup = ("optim.name=adamw", "optim.adam_lr=none", f"data.mirror={mirror}", *TASKS)
        codes, words = run_job(
            tiny_config, folder, f"parallel.shard_ranks={shards}", *setup, world=world
        )
        assert set(codes) == {0}, words
        found.append(figures_of(folder))
    for one, two in zip(*found, strict=True):
        assert one == {**two, "value": pytest.approx(two["value"], rel=1e-3), "error": one["error"]}


@pytest.mark.ranks
@pytest.mark.parametrize(
    "killed_at",
    [6, pytest.param(8, marks=pytest.mark.slow), pytest.param(9, marks=pytest.mark.slow)],
)
def test_a_killed_run_repeats_no_row_and_loses_none(tiny_config, tmp_path, mirror, killed_at):
    setup = (f"data.mirror={mirror}", *TASKS, "evaluation.metric=arc_easy/acc")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run_job(tiny_config, whole, *setup, world=1)
    kill = at_step(killed_at, lambda: os.kill(os.getpid(), signal.SIGKILL))
    assert run_job(tiny_config, killed, *setup, world=1, fault=kill)[0] == [-signal.SIGKILL]
    codes, words = run_job(tiny_config, killed, *setup, world=1)
    assert codes == [0], words
    assert figures_of(killed) == figures_of(whole)
    assert learning(killed) == learning(whole)


def long_tasks(rank):
    """Measuring takes six times what a rank may stand still."""

    def slow(lm, task, where, **_):
        for _ in range(60):
            time.sleep(0.1)
            lm.model(torch.zeros(1, 1, dtype=torch.int64))
        return TaskResult(task.name, "slow", 1, 0, {"acc": Figure(0.5, None)})

    suites.run_task = slow


@pytest.mark.ranks
@pytest.mark.slow
def test_a_long_task_is_no_hanging_rank(tiny_config, tmp_path, mirror):
    setup = (
        "parallel.timeout_s=1",
        "parallel.shard_ranks=all",
        f"data.mirror={mirror}",
        *TASKS[:1],
    )
    codes, words = run_job(tiny_config, tmp_path / "a", *setup, fault=long_tasks)
    assert codes == [0, 0], words


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["evaluation.tasks=['arc_eazy']"],
            "evaluation: tasks: no task or suite 'arc_eazy'.*arc_easy",
        ),
        (["evaluation.metric=arc_easy/acc"], "metric = 'arc_easy/acc'.*these are none"),
        ([TASKS[0], "evaluation.metric=hellaswag/acc"], "these are arc_easy, lambada_openai"),
        ([TASKS[0], "evaluation.metric=arc_easy/perplexity"], "arc_easy has acc and acc_norm"),
        (["evaluation.metric=held_out_loss", "validation.characters_per_source=0"], "is 0"),
        (["evaluation.metric=held_out_loss", "data.held_out_fraction=0"], "no source has held-out"),
        (["evaluation.tasks=['piqa']"], "task piqa: .*MIRROR/"),
    ],
    ids=[
        "task",
        "no tasks",
        "other task",
        "other figure",
        "no text",
        "nothing held out",
        "no data",
    ],
)
def test_what_cant_be_measured_is_said_before_the_first_step(start, tmp_path, overrides, words):
    with pytest.raises(UsageError, match=words):
        start("a", *overrides)
    assert not (tmp_path / "a" / "metrics.jsonl").exists() or not rows_of(tmp_path / "a")


class Clock(SimpleNamespace):
    """A clock that a test turns."""

    now = 0.0

    def monotonic(self):
        return self.now


@pytest.fixture
def scripted(monkeypatch):
    """Tasks that take and give what a test says, on a clock on which a step takes a second."""
    clock, made = Clock(), []
    script = SimpleNamespace(seconds=5.0, values=lambda step: 0.5, better=True, clock=clock)
    script.step = 0

    def fake(lm, task, where, **_):
        assert lm._agree.func is follow_leader  # sharded ranks that part wait for each other
        made.append((script.step, task.name))
        clock.now += script.seconds
        figures = {"acc": Figure(script.values(script.step), 0.1, 0.25, script.better)}
        return TaskResult(task.name, "scripted", 10, 0, figures)

    train = recipe.train

    def timed(*args, **kwargs):
        for event in train(*args, **kwargs):
            clock.now += 1.0
            script.step = event.step
            yield event

    monkeypatch.setattr(suites, "time", clock)
    monkeypatch.setattr(suites, "run_task", fake)
    monkeypatch.setattr(suites, "seconds_spent", seconds_spent)
    monkeypatch.setattr(recipe, "train", timed)
    script.made = made
    return script


def seconds_spent(folder: RunFolder):
    """What the last step's row would say on the scripted clock: rounds after it aren't in it."""
    steps, rounds = (rows_of(folder.path, kind) for kind in ("train", "evaluation"))
    return len(steps) + sum(r["seconds"] for r in rounds if r["step"] < steps[-1]["step"])


ONE = ("evaluation.tasks=['arc_easy']", "evaluation.every_tokens=256")


def test_rounds_take_their_share_of_the_time_and_no_more(start, scripted):
    """Rounds of 5 s beside steps of 1 s, of which they may take half."""
    folder = start("a", *ONE, "evaluation.time_share=0.5")
    # the first tells what one costs; 10 s of rounds are half of 20 s when 10 steps are made; the
    # last is measured whatever it costs
    assert scripted.made == [(1, "arc_easy"), (10, "arc_easy"), (12, "arc_easy")]
    told = read_rows(folder / "incidents.jsonl")
    assert [row["step"] for row in told] == [2, 3, 4, 5, 6, 7, 8, 9, 11]
    assert told[0]["reason"] == (
        "measuring arc_easy is put off: it takes about 5 s, and rounds have taken 5 s of 7 s; "
        "evaluation.time_share is 0.5"
    )


def test_a_round_that_waits_is_made_as_soon_as_it_fits(start, scripted):
    # due after steps 4, 8 and 12; after 4 nothing is known of its cost
    scripted.seconds = 4.0
    start("a", ONE[0], TASKS[1], "evaluation.time_share=0.475")
    # at 4: made. At 8: 8 s of 16 s are too many; at 9: 8 of 17 are not, a step after it was due
    assert scripted.made == [(4, "arc_easy"), (9, "arc_easy"), (12, "arc_easy")]


def test_a_share_of_one_puts_nothing_off(start, scripted):
    start("a", *ONE, SHARE)
    assert [step for step, _ in scripted.made] == list(range(1, 13))


def test_what_was_spent_and_put_off_is_known_after_a_resume(start, scripted, monkeypatch):
    share = "evaluation.time_share=0.5"
    stop = recipe.train

    def stopped(*args, **kwargs):
        for event in stop(*args, **kwargs):
            if event.step == 5:
                os.kill(os.getpid(), signal.SIGTERM)
            yield event

    monkeypatch.setattr(recipe, "train", stopped)
    folder = start("a", *ONE, share)
    assert scripted.made == [(1, "arc_easy")]
    monkeypatch.setattr(recipe, "train", stop)
    scripted.clock.now = 1000.0  # another process's clock begins anywhere
    start("a", *ONE, share)
    assert scripted.made == [(1, "arc_easy"), (10, "arc_easy"), (12, "arc_easy")]
    assert [row["step"] for row in rows_of(folder, "evaluation")] == [1, 10, 12]


def test_every_task_counts_once_however_many_figures_it_has(tmp_path, monkeypatch):
    rows = [{"kind": "train", "step": 8, "elapsed_s": 60.0}]
    for step, metric in ((4, "acc"), (4, "acc_norm"), (8, "acc"), (8, "acc_norm")):
        row = {"kind": "evaluation", "step": step, "task": "t", "metric": metric, "seconds": 10.0}
        rows.append(row)
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(suites, "time", clock := Clock())
    allowance = Allowance(RunFolder(tmp_path), share=0.3)
    clock.now = 19.0  # 20 s of 89 s, of which 10 followed the last step's row; 30 of 99 are more
    assert "rounds have taken 20 s of 1 min 29 s" in allowance.refusal(["t"])
    clock.now = 20.0
    assert allowance.refusal(["t"]) is None
    allowance.add("t", 10.0)
    assert allowance.refusal(["t"]) is not None


def test_a_stop_ends_a_round_between_two_tasks(start, scripted, monkeypatch):
    fake = suites.run_task

    def stops(lm, task, where, **more):
        result = fake(lm, task, where, **more)
        if (scripted.step, task.name) == (4, "arc_easy"):
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    monkeypatch.setattr(suites, "run_task", stops)
    folder = start("a", *TASKS)
    assert scripted.made == [(4, "arc_easy")]
    (incident,) = read_rows(folder / "incidents.jsonl")
    assert incident["reason"] == "measuring lambada_openai is put off: the run is asked to stop"
    monkeypatch.setattr(suites, "run_task", fake)
    start("a", *TASKS)
    done = [(row["step"], row["task"]) for row in rows_of(folder, "evaluation")]
    assert done[:2] == [(4, "arc_easy"), (5, "lambada_openai")]
    assert [step for step, _ in done[2:]] == [8, 8, 12, 12]


def test_a_task_that_fails_is_told_and_training_goes_on(start, scripted, monkeypatch):
    fake = suites.run_task

    def fails(lm, task, where, **more):
        if (scripted.step, task.name) == (8, "arc_easy"):
            raise SummerError("the model says NaN of item 3")
        return fake(lm, task, where, **more)

    monkeypatch.setattr(suites, "run_task", fails)
    folder = start("a", *TASKS)
    (incident,) = read_rows(folder / "incidents.jsonl")
    assert incident["reason"] == "arc_easy can't be measured: the model says NaN of item 3"
    done = [(row["step"], row["task"]) for row in rows_of(folder, "evaluation")]
    assert [d for d in done if d[0] > 4] == [
        (8, "lambada_openai"),
        (12, "arc_easy"),
        (12, "lambada_openai"),
    ]


# the best checkpoint

VALUES = {1: 0.3, 2: 0.7, 3: 0.7, 4: 0.4, 5: 0.9, 6: 0.2}
JUDGED = (*ONE, SHARE, "evaluation.metric=arc_easy/acc")


@pytest.mark.parametrize(
    ("better", "asked", "best"),
    [(True, [1, 2, 5, 6, 12], 5), (False, [1, 6, 12], 6)],
    ids=["higher", "lower"],
)
def test_the_best_step_is_saved_and_stays(start, scripted, better, asked, best, command):
    scripted.values, scripted.better = lambda step: VALUES.get(step, 0.5), better
    setup = ("checkpoint.every_steps=none", "checkpoint.keep_last=1", "optim.cooldown_fraction=0.5")
    folder = start("a", *JUDGED, *setup)
    assert [row["step"] for row in rows_of(folder, "save")] == asked  # 6 ends the stable phase
    store = Store(folder / "checkpoints", pytest.fail)
    assert store.steps() == sorted({best, 6, 12})
    assert store.best_first()[0] == Measured(best, "arc_easy/acc", VALUES[best], better)
    assert command("prune", folder, "--keep-last", 1)[0] == 0
    assert best in store.steps()
    _, out, _ = command("list", folder, "--json", "-")
    facts = json.loads(out)
    assert facts["best"] == {
        "metric": "arc_easy/acc",
        "value": VALUES[best],
        "step": best,
        "checkpoint": str(store.path(best)),
    }
    assert [row["measured"] for row in facts["checkpoints"]][-1] == 0.5
    _, out, _ = command("list", folder)
    assert f"best by arc_easy/acc: step {best}, {store.path(best)}" in out
    assert summerlm.load(store.path(best)).generate("the", max_tokens=1) is not None


def test_the_best_by_held_out_loss_is_the_least(start):
    setup = ("validation.every_steps=2", "evaluation.metric=held_out_loss", "optim.peak_lr=0.05")
    folder = start("a", *setup, "checkpoint.keep_last=1", "checkpoint.every_steps=none")
    losses = {row["step"]: row["held_out_loss"] for row in rows_of(folder, "validation")}
    best = min(losses, key=losses.get)
    store = Store(folder / "checkpoints", pytest.fail)
    assert store.best_first()[0] == Measured(best, "held_out_loss", losses[best], False)
    assert best in store.steps()


def test_a_resumed_run_saves_only_what_beats_its_checkpoints(start, scripted, monkeypatch):
    scripted.values = lambda step: {2: 0.9}.get(step, 0.1 * step / 12)
    stop = recipe.train

    def stopped(*args, **kwargs):
        for event in stop(*args, **kwargs):
            if event.step == 5:
                os.kill(os.getpid(), signal.SIGTERM)
            yield event

    monkeypatch.setattr(recipe, "train", stopped)
    setup = ("checkpoint.every_steps=none", "checkpoint.keep_last=1")
    folder = start("a", *JUDGED, *setup)
    monkeypatch.setattr(recipe, "train", stop)
    start("a", *JUDGED, *setup)
    assert [row["step"] for row in rows_of(folder, "save")] == [1, 2, 5, 6, 12]
    assert Store(folder / "checkpoints", pytest.fail).best_first()[0].step == 2


def test_another_figure_than_before_is_compared_with_none_of_the_old():
    store = SimpleNamespace(best_first=lambda: [Measured(3, "arc_easy/acc", 0.9, True)])
    settings = SimpleNamespace(evaluation=SimpleNamespace(metric="held_out_loss"))
    best, asked = Best(SimpleNamespace(store=store, ranks=ALONE, settings=settings)), []
    best.see(Measured(5, "held_out_loss", 3.0, False))
    best.when_new(asked.append)(SimpleNamespace(step=5))
    assert [event.step for event in asked] == [5]


def test_what_was_measured_before_a_checkpoint_is_not_its_own(start, scripted):
    scripted.values = lambda step: 0.5
    folder = start("a", ONE[0], TASKS[1], *JUDGED[2:], "checkpoint.every_steps=3")
    states = {
        path.parent.name: read_json(path)["measured"]
        for path in folder.glob("checkpoints/*/state.json")
    }
    assert states["step-00000006"]["step"] == 4
    assert [own.step for own in best_first(sorted(folder.glob("checkpoints/step-*")))] == [4, 12]


def test_a_damaged_best_is_not_the_best(start, scripted, tmp_path):
    scripted.values = lambda step: VALUES.get(step, 0.5)
    folder = start("a", *JUDGED, "checkpoint.keep_last=9")
    best = folder / "checkpoints" / "step-00000005"
    weights = next(best.glob("model*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1])
    notes = []
    store = Store(folder / "checkpoints", notes.append)
    from summerlm.checkpoint.store import Retention

    assert any("step-00000005" in note for note in store.prune(Retention(1)))
    assert store.steps() == [2, 12]  # the earlier of two that are equal
    (best.parent / "step-00000002" / "state.json").write_text("{}")
    assert [own.step for own in Store(folder / "checkpoints", notes.append).best_first()] == [12]


@pytest.fixture
def command(monkeypatch, capsys):
    def call(*args):
        monkeypatch.setattr("summerlm.cli.end_process", sys.exit)
        monkeypatch.setattr(sys, "argv", ["summerlm", "checkpoint", *map(str, args)])
        monkeypatch.setenv("COLUMNS", "200")
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
        out = capsys.readouterr()
        return code, out.out, out.err

    return call


# the report


def heights(svg):
    """Where the curve's points and the chance line lie in a chart, from its top."""
    curve = re.search(r'<g id="curve">\s*<path d="([^"]*)"', svg)[1]
    chance = re.search(r'<g id="chance">\s*<path d="([^"]*)"[^>]*style="([^"]*)"', svg)
    points = [float(y) for y in re.findall(r"[ML] [\d.]+ ([\d.]+)", curve)]
    if chance is None:
        return points, None, ""
    return points, [float(y) for y in re.findall(r"[ML] [\d.]+ ([\d.]+)", chance[1])], chance[2]


def test_the_report_has_a_curve_for_each_figure_with_its_chance(start, scripted):
    scripted.values = lambda step: {4: 0.2, 8: 0.6}.get(step, 0.5)
    folder = start("a", *TASKS)
    page = write_report(folder).read_text()
    section = page[page.index("<h2>Tasks") :]
    charts = re.findall(r"<figure>(.*?)<figcaption>(.*?)</figcaption>", section, re.DOTALL)
    assert [caption for _, caption in charts] == [
        f"{task}, acc: 0.5 ± 0.1 at step 12, chance 0.25 (dashed); n = 10, 0-shot"
        for task in ("arc_easy", "lambada_openai")
    ]
    points, chance, style = heights(charts[0][0])
    assert len(points) == 3
    level = points[0] + (points[1] - points[0]) * (0.25 - 0.2) / (0.6 - 0.2)
    assert chance == [pytest.approx(level, abs=0.01)] * 2
    assert "stroke-dasharray" in style


def test_a_figure_without_chance_has_no_line(start):
    folder = start("a", "evaluation.tasks=['lambada_openai']")
    svg = write_report(folder).read_text()
    section = svg[svg.index("<h2>Tasks") :]
    assert "lambada_openai, perplexity: " in section
    assert heights(section)[1] is None


def test_the_report_of_a_run_without_tasks_says_nothing_of_them(start):
    page = write_report(start("a")).read_text()
    assert "Tasks" not in page
    assert "tasks" not in page.partition("<h2>Settings")[0]
