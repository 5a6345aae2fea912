import io
import json
import os
import signal
from pathlib import Path

import pytest
from rich.console import Console

from summerlm.core.console import ConsoleSink, Stopwatch
from summerlm.core.errors import UsageError
from summerlm.core.hardware import find_accelerator, pick_device
from summerlm.core.record import JsonLines, Recorder, TensorBoardSink, cut_rows, read_rows
from summerlm.core.runtime import StopRequest

STEP = {"tokens": 10, "tokens_per_second": 5.0, "lr": 0.1, "grad_norm": 1.0}


def test_rows_are_flushed_filtered_and_finite(tmp_path):
    path = tmp_path / "m.jsonl"
    recorder = Recorder([JsonLines(path, lambda kind: kind != "sample")])
    recorder.write("train", step=1, loss=float("nan"), parts={"a": float("inf")})
    recorder.write("sample", step=1)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"kind": "train", "step": 1, "loss": None, "parts": {"a": None}}
    ]
    recorder.close()


def test_a_text_may_hold_any_line_end_of_unicode(tmp_path):
    path = tmp_path / "samples.jsonl"
    text = "a\u2028b\u2029c\x85d\x0be\nf\r"
    recorder = Recorder([JsonLines(path, lambda kind: True)])
    recorder.write("sample", step=1, text=text)
    recorder.write("sample", step=2, text=text)
    recorder.close()
    assert cut_rows(path, 1) == 1
    assert [row["text"] for row in read_rows(path)] == [text]


def test_cut_drops_later_rows_and_a_torn_last_line(tmp_path):
    path = tmp_path / "m.jsonl"
    rows = [{"kind": "train", "step": step} for step in range(1, 6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"kind": "tra')
    assert cut_rows(path, 3) == 2
    assert [row["step"] for row in read_rows(path)] == [1, 2, 3]
    assert cut_rows(tmp_path / "none.jsonl", 3) == 0
    path.write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(UsageError, match="line 2"):
        read_rows(path)


def test_a_disk_that_refuses_rows_does_not_stop_the_run(capsys):
    sink = JsonLines(Path("/dev/full"), lambda kind: True)
    sink.write("train", {"step": 1}, None)
    sink.close()
    assert "row not written" in capsys.readouterr().out


def test_console_prints_plain_lines_without_a_terminal():
    out = io.StringIO()
    sink = ConsoleSink(Console(file=out, width=200), total_tokens=40, every_steps=2)
    for step in range(1, 5):
        sink.write("train", {**STEP, "step": step, "loss": 2.5, "tokens": 10 * step}, None)
    sink.write("validation", {}, "held-out [loss] 3")
    sink.close()
    lines = out.getvalue().splitlines()
    assert [line.split()[1] for line in lines[:3]] == ["1", "2", "4"]
    assert "loss 2.5000" in lines[0]
    assert lines[3] == "held-out [loss] 3"


def test_console_shows_a_bar_on_a_terminal():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=100)
    sink = ConsoleSink(console, total_tokens=20, every_steps=1)
    sink.write("train", {**STEP, "step": 1, "loss": 2.5}, None)
    sink.close()
    assert "2.5000" in out.getvalue()
    assert "50 %" in out.getvalue()


def test_tensorboard_gets_every_number(tmp_path):
    pytest.importorskip("tensorboard")
    sink = TensorBoardSink(tmp_path)
    sink.write("train", {"step": 3, "loss": 1.5, "batch_sha": "x"}, None)
    for task, value in (("one", 0.25), ("two", 0.5)):
        figure = {"step": 3, "task": task, "metric": "acc", "value": value, "items": 7}
        sink.write("evaluation", figure, None)
    sink.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(tmp_path)).Reload()
    (event,) = found.Scalars("train/loss")
    assert (event.step, event.value) == (3, 1.5)
    assert [found.Scalars(f"evaluation/{task}/acc")[0].value for task in ("one", "two")] == [
        0.25,
        0.5,
    ]


def test_stopwatch_measures_the_window(monkeypatch):
    times = iter([0.0, 10.0, 11.0, 12.0])
    monkeypatch.setattr("time.monotonic", lambda: next(times))
    watch = Stopwatch(window=2)
    assert watch.tick(100) == 10  # the slow first step, which the window then leaves behind
    watch.tick(100)
    assert watch.tick(100) == 100


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 0), (signal.SIGUSR1, 75)]
)
def test_signals_become_requests(number, code):
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert stop.received is None
        os.kill(os.getpid(), number)
        assert stop.received is number
        assert stop.exit_code == code
    assert signal.getsignal(number) is before


def test_a_second_interrupt_ends_at_once():
    with StopRequest():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_what_is_not_there_is_said(monkeypatch):
    with pytest.raises(UsageError, match="known: h200"):
        find_accelerator("abacus")
    assert find_accelerator("MI300X").price == 2.31
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UsageError, match="no GPU"):
        pick_device("cuda")
    assert pick_device("auto").type == "cpu"
