"""What a run saves of itself, and when it is told how that went."""

import hashlib
import json
import threading
from types import SimpleNamespace

import pytest
import torch
from layouts import ADAMW, MUON, run_step
from layouts import make as make_stepper
from ranks import run_ranks

from summerlm.checkpoint import writing
from summerlm.checkpoint.reading import read_tensors
from summerlm.checkpoint.store import Retention, Store
from summerlm.core.errors import NoCheckpointError, SaveError
from summerlm.core.parts import Part
from summerlm.core.ranks import ALONE
from summerlm.train.saving import Saver, resume


def tables_of(ranks, value=1.0):
    """Two rows a rank."""
    rows = torch.full((2, 3), value)
    part = Part(rows, 2 * ranks.rank, (2 * ranks.world, 3))
    return {"model": {"w": part}, "optimizer": {"w/step": Part.whole(torch.tensor(value))}}


def event_of(ranks, step, lanes=4):
    own = range(ranks.rank, lanes, ranks.world)
    state = {
        "data": {"seed": 1},
        "step": step,
        "lanes": {str(lane): {"rows": step} for lane in own},
    }
    return SimpleNamespace(step=step, tokens=step * 100, data=SimpleNamespace(state=state))


def make(ranks, folder, tables=None, **changes):
    said, saved = [], []
    saver = Saver(
        Store(folder, said.append),
        ranks,
        tables or tables_of(ranks),
        states=changes.get(
            "states",
            {"guard": lambda: {"in_a_row": 2}, "ledger": lambda: {"rank": ranks.rank}},
        ),
        files={"config.toml": b"[run]\n"},
        identity={"tokenizer": "abc", "settings": "def"},
        retention=changes.get("retention", Retention(2)),
        warn=said.append,
        saved=saved.append,
    )
    return saver, said, saved


def save_on_ranks(ranks, folder):
    saver, said, saved = make(ranks, folder)
    saver.save(event_of(ranks, 7))
    saver.save(event_of(ranks, 7))  # once a step
    saver.finish()
    saver.save(event_of(ranks, 7))
    saver.finish()
    return said, [outcome.step for outcome in saved]


@pytest.mark.ranks
def test_the_state_is_that_of_all_ranks_lanes(tmp_path):
    assert run_ranks(save_on_ranks, tmp_path / "c") == [([], [7])] * 2
    state = json.loads((tmp_path / "c" / "step-00000007" / "state.json").read_bytes())
    assert state == {
        "step": 7,
        "tokens": 700,
        "tokenizer": "abc",
        "guard": {"in_a_row": 2},
        "ledger": {"rank": 0},
        "data": {
            "data": {"seed": 1},
            "step": 7,
            "lanes": {str(lane): {"rows": 7} for lane in range(4)},
        },
    }
    tables = tables_of(ALONE)
    tables["model"]["w"] = Part.whole(torch.zeros(4, 3))
    folder, read = resume(Store(tmp_path / "c", print), tables)
    assert read == state
    assert folder.name == "step-00000007"
    assert tables["model"]["w"].tensor.eq(1).all()


def test_a_failed_save_is_told_once_at_the_next_step_and_the_next_one_works(tmp_path, monkeypatch):
    saver, said, saved = make(ALONE, tmp_path / "c")
    with monkeypatch.context() as patch:
        patch.setattr(writing, "write_file", refuse)
        saver.save(event_of(ALONE, 1))
        saver._flight._save.thread.join()
    saver.poll([saver.report()])
    assert len(said) == 1
    assert "step 1 not saved, training goes on" in said[0]
    assert "disk full" in said[0]
    saver.poll([saver.report()])
    saver.finish()
    assert len(said) == 1
    saver.save(event_of(ALONE, 2))
    saver.finish()
    assert [outcome.step for outcome in saved] == [2]


def refuse(*_):
    raise OSError(28, "disk full")


def test_what_gives_the_state_may_go_on_at_once(tmp_path, monkeypatch):
    gate, take, ledger = threading.Event(), writing.Snapshot.take, {"tokens": {"text": 1}}
    monkeypatch.setattr(writing.Snapshot, "take", lambda self: (gate.wait(9), take(self)))
    saver, _, _ = make(ALONE, tmp_path / "c", states={"ledger": lambda: ledger})
    saver.save(event_of(ALONE, 1))
    ledger["tokens"]["text"] = 2
    gate.set()
    saver.finish()
    path = Store(tmp_path / "c", pytest.fail).path(1) / "state.json"
    assert json.loads(path.read_text())["ledger"] == {"tokens": {"text": 1}}


def test_the_same_step_may_be_tried_again(tmp_path, monkeypatch):
    saver, said, saved = make(ALONE, tmp_path / "c")
    with monkeypatch.context() as patch:
        patch.setattr(writing, "write_file", refuse)
        saver.save(event_of(ALONE, 1))
        with pytest.raises(SaveError, match=r"step-00000001: can't be saved: .*disk full"):
            saver.finish()
    assert said == []  # raised instead
    saver.save(event_of(ALONE, 1))
    saver.finish()
    assert [outcome.step for outcome in saved] == [1]


def test_a_save_that_is_due_waits_for_the_one_before(tmp_path):
    tables = tables_of(ALONE)
    saver, said, saved = make(ALONE, tmp_path / "c", tables, retention=Retention(5))
    for step in (1, 2, 3):
        saver.release()
        tables["model"]["w"].tensor.fill_(step)
        saver.save(event_of(ALONE, step))  # never polled between
    saver.finish()
    assert [outcome.step for outcome in saved] == [1, 2, 3]
    assert said == []
    store = Store(tmp_path / "c", pytest.fail)
    for step in (1, 2, 3):
        assert read_tensors(store.path(step), "model")["w"].eq(step).all()


def test_what_stays(tmp_path):
    rule = Retention(2, every=4, steps=frozenset({3}))
    saver, _, _ = make(ALONE, tmp_path / "c", retention=rule)
    for step in range(1, 11):
        saver.save(event_of(ALONE, step))
        saver.finish()
    assert Store(tmp_path / "c", pytest.fail).steps() == [3, 4, 8, 9, 10]


def test_damaged_ones_are_neither_counted_nor_deleted_where_they_are_new(tmp_path):
    saver, said, _ = make(ALONE, tmp_path / "c", retention=Retention(9))
    for step in (1, 2, 3, 4):
        saver.save(event_of(ALONE, step))
        saver.finish()
    (tmp_path / "c" / "step-00000004" / "state.json").unlink()
    again, said, _ = make(ALONE, tmp_path / "c", retention=Retention(2))
    again.save(event_of(ALONE, 5))
    again.finish()
    assert Store(tmp_path / "c", pytest.fail).steps() == [3, 4, 5]
    assert len(said) == 1
    assert "state.json: is missing" in said[0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t["model"].pop("w"), "model tensor w is not part of this run"),
        (lambda t: t["model"].update(b=t["model"]["w"]), "model has no tensor b"),
        (lambda t: t["model"].update(w=Part.whole(torch.zeros(3, 2))), r"w is \(2, 3\) float32"),
        (
            lambda t: t["model"].update(w=Part.whole(torch.zeros(2, 3, dtype=torch.float64))),
            r"this run wants \(2, 3\) float64",
        ),
    ],
    ids=["extra", "missing", "shape", "dtype"],
)
def test_what_does_not_fit_is_refused_and_left_where_it_is(tmp_path, change, words):
    saver, _, _ = make(ALONE, tmp_path / "c")
    saver.save(event_of(ALONE, 1))
    saver.finish()
    tables = tables_of(ALONE, 0.0)
    change(tables)
    store = Store(tmp_path / "c", pytest.fail)
    with pytest.raises(NoCheckpointError, match=words):
        resume(store, tables)
    assert store.steps() == [1]
    assert all(not part.tensor.any() for table in tables.values() for part in table.values())


def test_nothing_is_nothing(tmp_path):
    assert resume(Store(tmp_path / "c", pytest.fail), tables_of(ALONE)) is None


# rows that no number of ranks divides, few enough that some ranks hold none of some tensors
ODD = {"width": 24, "mlp_hidden": 20}
RESHAPED = [(1, 1), (2, 1), (2, "all"), (3, "all"), (4, 2), (4, 1), (4, "all")]


def tables_of_stepper(stepper):
    return {"model": stepper.layout.parts, "optimizer": stepper.optimizer.parts()}


def bits(tables):
    return {
        (stem, name): hashlib.sha256(part.tensor.detach().contiguous().numpy().tobytes()).digest()
        for stem, table in tables.items()
        for name, part in table.items()
    }


def train_and_save(ranks, folder, shards, optim):
    """Train 2 steps, save, train 2 more; gives the bits at the end."""
    stepper = make_stepper(ranks, {"shard_ranks": shards}, optim, ODD)
    losses = [run_step(stepper, number).loss.item() for number in (1, 2)]
    saver, said, _ = make(ranks, folder, tables_of_stepper(stepper))
    saver.save(event_of(ranks, 2))
    saver.release()
    losses += [run_step(stepper, number).loss.item() for number in (3, 4)]
    saver.finish()
    assert said == []
    return losses, bits(tables_of_stepper(stepper))


def load_and_train(ranks, folder, shards, optim):
    """Load, compare each row with the files', train on; gives the bits at the end."""
    stepper = make_stepper(ranks, {"shard_ranks": shards}, optim, ODD)
    tables = tables_of_stepper(stepper)
    found, state = resume(Store(folder, pytest.fail), tables, ranks)
    for stem, table in tables.items():
        saved = read_tensors(found, stem)
        assert table.keys() == saved.keys()
        for name, part in table.items():
            own = saved[name][part.start : part.stop] if part.shape else saved[name]
            assert torch.equal(part.tensor, own), name
    assert state["step"] == 2
    losses = [run_step(stepper, number).loss.item() for number in (3, 4)]
    return losses, bits(tables)


@pytest.mark.ranks
def test_a_sharded_and_a_lone_run_go_on_in_each_other(tmp_path):
    check_reshaping(tmp_path, [(1, 1), (2, "all")], MUON)


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.parametrize("optim", [ADAMW, MUON], ids=["adamw", "muon"])
def test_every_layout_goes_on_in_another(tmp_path, optim):
    check_reshaping(tmp_path, RESHAPED, optim)


def check_reshaping(tmp_path, layouts, optim):
    """The same layout goes on bit for bit, any other to 1e-5; what is loaded are the bits saved."""
    written = {}
    for world, shards in layouts:
        folder = tmp_path / f"{world}-{shards}"
        written[world, shards] = run_ranks(train_and_save, folder, shards, optim, world=world)
    for number, (world, shards) in enumerate(layouts):
        same = tmp_path / f"{world}-{shards}"
        again = run_ranks(load_and_train, same, shards, optim, world=world)
        for (losses, end), (later, other) in zip(written[world, shards], again, strict=True):
            assert losses[2:] == later
            assert end == other
        other = layouts[number - 1]
        folder = tmp_path / f"{other[0]}-{other[1]}"
        for losses, _ in run_ranks(load_and_train, folder, shards, optim, world=world):
            expected = written[other][0][0][2:]
            assert max(abs(a - b) for a, b in zip(losses, expected, strict=True)) < 1e-5
