"""The command line as a user meets it: exit codes, one-line errors, JSON, every subcommand."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from summerlm.cli import main
from summerlm.core.config import read_settings
from summerlm.core.record import read_rows
from summerlm.recipes.settings import Settings

ROOT = Path(__file__).parent.parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.toml"))


@pytest.fixture
def command(monkeypatch, capsys):
    """Run `summerlm ARGS` here; gives (exit code, stdout, stderr)."""

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["summerlm", *map(str, args)])
        monkeypatch.setenv("COLUMNS", "160")
        try:
            main()
            code = 0
        except SystemExit as end:
            code = end.code or 0
        out = capsys.readouterr()
        return code, out.out, out.err

    return run


@pytest.fixture
def trained(command, tiny_config, tmp_path):
    assert command("train", tiny_config)[0] == 0
    return tmp_path / "run"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_shipped_configuration_is_valid(path, command):
    code, out, _ = command("plan", path, "--json", "-")
    assert code == 0
    plan = json.loads(out)
    assert plan["tokens"] >= read_settings(Settings, path).train.budget_tokens


def test_plan_reproduces_the_original(command):
    code, out, _ = command(
        "plan",
        ROOT / "configs/summer-4b.toml",
        "--hardware",
        "mi300x",
        "--mfu",
        0.276,
        "--json",
        "-",
    )
    plan = json.loads(out)
    assert code == 0
    assert plan["parameters"] == 4_581_393_408
    assert plan["context"] == 4096
    assert plan["steps"] == 610_352
    assert plan["flops_per_token"] == pytest.approx(29.3e9, rel=0.001)
    # the original's 9 days and 27.6 % were at context 2048, where a token costs 4 % less
    assert plan["days"] == pytest.approx(9.4, abs=0.05)
    assert plan["dollars"] == pytest.approx(4170, abs=20)
    code, out, _ = command(
        "plan",
        ROOT / "configs/summer-4b.toml",
        "model.context=2048",
        *("--hardware", "mi300x", "--mfu", 0.276, "--json", "-"),
    )
    assert json.loads(out)["days"] == pytest.approx(9.0, abs=0.02)
    assert json.loads(out)["dollars"] == pytest.approx(3992, abs=10)


def test_plan_says_what_it_cannot(command):
    code, _, err = command("plan", ROOT / "configs/15m.toml", "--hardware", "abacus")
    assert (code, err.count("\n")) == (2, 1)
    assert "known: h200" in err
    code, out, _ = command("plan", ROOT / "configs/15m.toml", "--hardware", "h200", "--json", "-")
    assert json.loads(out)["dollars"] is None  # no price in the table, none given


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["train", "CONFIG", "optim.peek_lr=1"], "no setting optim.peek_lr; did you mean"),
        (["train", "CONFIG", "model.heads=3"], "kv_heads (2) must divide heads (3)"),
        (["train", "CONFIG", "data.lanes=5"], "data.lanes (5) must divide"),
        (["train", "nowhere.toml"], "nowhere.toml: no such settings file"),
        (["train", "CONFIG", "data.sources.text.path=gone/*.txt"], "no file matches"),
        (["train", "CONFIG", "tokenizer.name=gone"], "gone"),
        (["train", "CONFIG", "samples.prompts=['" + "sun " * 60 + "']"], "samples.prompts"),
        (["generate", "gone", "x"], "neither a run folder nor a checkpoint"),
        (["eval", "gone", "--text", "x"], "neither a run folder nor a checkpoint"),
        (["data", "lock", "CONFIG", "data.sources.text.licence=none"], "no licence"),
        (["data", "show", "CONFIG", "--source", "gone"], "no such source; there are text"),
        (["data", "show", "nowhere.toml"], "nowhere.toml: no such settings file"),
        (["data", "report", "CONFIG", "data.sources.text.rules=['gofer']"], "did you mean gopher"),
        (["report", "gone"], "no run"),
        (["bench", "CONFIG", "--only", "speed"], "--only speed: known parts are step"),
        (
            ["train", "CONFIG", "parallel.float8=true"],
            "parallel.float8 = true: needs an NVIDIA GPU",
        ),
        (["tokenizer", "decode", "[1, true]"], "JSON list"),
        (["tokenizer", "encode", "x", "--tokenizer", "gone"], "gone"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(command, tiny_config, args, words):
    code, _, err = command(*[tiny_config if arg == "CONFIG" else arg for arg in args])
    assert code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert words in err


@pytest.mark.parametrize(
    "args", [["train"], ["nonsense"], ["train", "--wrong", "x"], ["eval", "x"]]
)
def test_wrong_usage_exits_2_without_traceback(command, args):
    code, out, err = command(*args)
    assert code == 2
    assert "Traceback" not in out + err


def test_help_of_every_command_fits_a_screen(command):
    for args in (
        [],
        *[[name] for name in ("demo", "train", "plan", "eval", "generate", "report", "data")],
        *[["data", name] for name in ("lock", "check", "show", "report", "hash", "tokenize")],
        ["tokenizer"],
        *[["tokenizer", name] for name in ("encode", "decode", "show", "train")],
    ):
        code, out, _ = command(*args, "--help")
        assert code == 0
        assert len(out.splitlines()) <= 40, args


def test_show_prints_settings_that_read_back(command, tiny_config, tmp_path):
    code, out, _ = command("train", tiny_config, "--show", "model.width=64")
    (tmp_path / "shown.toml").write_text(out)
    assert code == 0
    shown = read_settings(Settings, tmp_path / "shown.toml")
    assert shown == read_settings(Settings, tiny_config, ["model.width=64"])
    assert not (tmp_path / "run").exists()


def test_one_s_own_files_take_the_place_of_the_mixture(command, tmp_path):
    own = tmp_path / "own.toml"
    names = ("web", "code", "books", "arxiv", "instructions")
    removed = "".join(f'{name} = "none"\n' for name in names)
    own.write_text(
        f'extends = "{ROOT}/configs/15m.toml"\n[data.sources]\n{removed}'
        '[data.sources.mine]\npath = "mine/*.txt"\nweight = 1\nlicence = "mine"\n'
    )
    assert list(read_settings(Settings, own).data.sources) == ["mine"]


def test_data_hash_is_the_run_s_own_record_for_any_world(command, tiny_config, trained):
    rows = [row for row in read_rows(trained / "metrics.jsonl") if row["kind"] == "train"]
    expected = [f"{row['step']} {row['batch_sha']}" for row in rows]
    for world, workers in [(1, 0), (2, 1), (4, 0)]:
        args = ("--steps", 12, "--world", world, "--workers", workers)
        code, out, _ = command("data", "hash", tiny_config, *args)
        assert code == 0
        assert out.splitlines() == expected
    checkpoint = trained / "checkpoints" / "step-00000008"
    args = ("--steps", 4, "--world", 2, "--workers", 0, "--from", checkpoint)
    assert command("data", "hash", tiny_config, *args)[1].splitlines() == expected[8:]
    code, _, err = command("data", "hash", tiny_config, "--world", 3)
    assert code == 2
    assert "3" in err
    assert "data.lanes" in err
    other = command("data", "hash", tiny_config, "run.seed=5", "--steps", 12, "--workers", 0)[1]
    assert not set(other.splitlines()) & set(expected)


def test_eval_generate_and_report(command, trained, tiny_text, tmp_path):
    to = tmp_path / "eval.json"
    code, out, _ = command("eval", trained, "--text", f"{tiny_text}/0*.txt", "--json", to)
    assert code == 0
    assert "bits per byte" in out
    score = json.loads(to.read_text())
    size = sum(len(path.read_bytes()) for path in tiny_text.glob("0*.txt"))
    assert (score["documents"], score["bytes"], score["step"]) == (10, size, 12)
    code, out, _ = command("eval", trained, "--text", f"{tiny_text}/0*.txt", "--json", "-")
    assert json.loads(out) == score
    code, out, _ = command("generate", trained, "the sun", "--max-tokens", 5)
    assert code == 0
    assert out.startswith("the sun")
    code, _, err = command("generate", trained, "the sun " * 40)
    assert code == 2
    assert "32" in err
    code, out, _ = command("report", trained)
    page = (trained / "report.html").read_text()
    assert code == 0
    assert str(trained / "report.html") in out
    assert page.count("<svg") == 4
    assert "http" not in page.replace("http://www.w3.org", "")  # but for names of XML formats
    assert "<script" not in page
    assert "07.txt" not in page  # the manifest's long list of files


def test_report_shows_text_as_text(trained):
    from summerlm.recipes.report import write_report

    with (trained / "samples.jsonl").open("a") as file:
        row = {"kind": "sample", "step": 12, "prompt": "<script>", "text": "</pre><b>&"}
        file.write(json.dumps(row) + "\n")
    page = write_report(trained).read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page


def test_data_lock_pins_and_finds_as_pinned(command, tiny_config, tiny_text, tmp_path):
    code, out, _ = command("data", "lock", tiny_config)
    lock = json.loads((tmp_path / "run" / "data.lock.json").read_text())
    assert code == 0
    assert "written" in out
    assert "CC0-1.0" in out
    assert len(lock["sources"][0]["files"]) == 40
    code, out, _ = command("data", "lock", tiny_config)
    assert (code, "as pinned" in out) == (0, True)
    assert command("data", "lock", tiny_config, "--out", tmp_path / "other.json")[0] == 0
    assert json.loads((tmp_path / "other.json").read_text()) == lock
    code, _, err = command("data", "lock", tiny_config, f"data.sources.text.path={tiny_text}/0*")
    assert (code, err.count("\n")) == (4, 1)


def test_data_check_tells_all_and_exits_with_the_gravest(command, tiny_config, tmp_path):
    code, out, _ = command("data", "check", tiny_config, "--documents", 20)
    assert code == 0
    assert "nothing is wrong" in out
    assert max(map(len, out.splitlines())) <= 100
    file = tmp_path / "check.json"
    gone = "data.sources.text.path=gone/*.txt"
    code, out, err = command("data", "check", tiny_config, gone, "--json", file)
    facts = json.loads(file.read_text())
    assert (code, err) == (2, "")
    assert "problem: " in out
    assert (facts["ok"], len(facts["sources"])) == (False, 1)
    code, out, _ = command("data", "check", tiny_config, gone, "--json", "-")
    assert (code, json.loads(out)) == (2, facts)


def test_data_show_prints_rows_of_the_run_itself(command, tiny_config, tmp_path):
    code, out, _ = command("data", "show", tiny_config, "--rows", 2, "--step", 3)
    assert code == 0
    assert out.count("step 3, row ") == 2
    assert "row 0 of 8: text, 32 targets" in out
    assert not (tmp_path / "run").exists()  # looking leaves no trace
    assert command("data", "show", tiny_config, "--rows", 2, "--step", 2)[1] != out
    assert command("data", "show", tiny_config, "--rows", 99)[1].count("step 1, row ") == 8


def test_data_report_names_every_rule(command, tiny_config):
    from summerlm.data.rules.catalogue import RULES

    rules = "data.sources.text.rules=['gopher-quality']"
    code, out, _ = command("data", "report", tiny_config, rules, "--documents", 30)
    assert code == 0
    assert all(rule in out for rule in RULES)
    assert max(map(len, out.splitlines())) <= 100
    code, out, _ = command("data", "report", tiny_config, "--json", "-")
    assert json.loads(out)["sources"][0]["name"] == "text"


def test_data_tokenize_makes_what_training_reads(command, tiny_config, tmp_path):
    out = tmp_path / "tokens"
    assert command("data", "tokenize", tiny_config, "--out", out, "--workers", 0)[0] == 0
    hashes = command("data", "hash", tiny_config, "--steps", 12, "--workers", 0)[1]
    assert len(hashes.splitlines()) == 12
    read = command("data", "hash", tiny_config, f"data.tokens={out}", "--steps", 12)
    assert read[:2] == (0, hashes)
    shown = command("data", "show", tiny_config, "--step", 4)[1]
    assert command("data", "show", tiny_config, "--step", 4, f"data.tokens={out}")[1] == shown


def test_tokenizer_commands(command, tiny_tokenizer, tiny_text, tmp_path):
    code, out, _ = command("tokenizer", "encode", "<s>a sun", "--tokenizer", tiny_tokenizer)
    ids = json.loads(out)
    assert code == 0
    assert 0 < len(ids) <= 7
    code, out, _ = command("tokenizer", "decode", json.dumps(ids), "--tokenizer", tiny_tokenizer)
    assert out == "<s>a sun\n"
    code, out, _ = command("tokenizer", "show", "--tokenizer", tiny_tokenizer, "--json", "-")
    assert json.loads(out)["vocabulary"] == 300
    args = ("--out", tmp_path / "new", "--vocabulary", 290)
    code, out, _ = command("tokenizer", "train", f"{tiny_text}/*.txt", *args)
    assert code == 0
    assert (tmp_path / "new" / "tokenizer.json").exists()


def test_a_held_folder_exits_7(command, tiny_config, tmp_path):
    from summerlm.core.files import RunFolder

    with RunFolder(tmp_path / "run"):
        code, _, err = command("train", tiny_config)
    assert code == 7
    assert "held by process" in err


def test_a_folder_that_can_not_be_made_exits_6(command, tiny_config, tmp_path):
    (tmp_path / "file").write_text("")
    code, _, err = command("train", tiny_config, f"run.folder={tmp_path}/file/run")
    assert code == 6
    assert "can't be made" in err


def test_out_of_memory_exits_8(command, tiny_config, monkeypatch):
    def explode(*_, **__):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried")

    monkeypatch.setattr("summerlm.recipes.pretrain.run_steps", explode)
    code, _, err = command("train", tiny_config)
    assert code == 8
    assert "parallel.micro_batch_rows" in err


@pytest.mark.parametrize(("world", "code"), [("1", -signal.SIGTERM), ("2", 0)])
def test_a_signal_in_its_last_moments_does_not_spoil_a_rank(tiny_tokenizer, world, code):
    late = (
        "import atexit, os, signal; from summerlm.cli import main; "
        "atexit.register(lambda: os.kill(os.getpid(), signal.SIGTERM)); main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", late, "tokenizer", "show", "--tokenizer", tiny_tokenizer],
        env={**os.environ, "WORLD_SIZE": world},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stderr
    assert "fingerprint" in done.stdout


def test_the_front_door_is_light():
    code = (
        "import time; start = time.perf_counter(); import summerlm;"
        "assert time.perf_counter() - start < 0.2;"
        "import sys; assert 'torch' not in sys.modules; print(summerlm.__version__)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    code = "import sys, summerlm.cli; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
