"""`summerlm eval` as a user meets it: tables, Markdown, JSON, where data come from, mistakes."""

import hashlib
import json
import sys
from functools import partial

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from tiny import TINY

from summerlm.cli import main
from summerlm.eval.plans import PROTOCOLS
from summerlm.eval.text import measure
from summerlm.recipes import eval_tables, evaluating
from summerlm.recipes.eval_request import where_of
from summerlm.recipes.eval_rows import decimals, number, sections
from summerlm.recipes.evaluating import read_documents

WORDS = ["the", "sun", "rises", "over", "a", "small", "field", "and", "every", "bird", "sings"]
ARTICLE = ["", " = Sun = \n", "", " the sun rises over a small field , and every bird sings . \n"]


def in_mirror(folder, place, rows, split="test"):
    (folder / place).mkdir(parents=True, exist_ok=True)
    file = folder / place / f"{split}-00000-of-00001.parquet"
    pq.write_table(pa.Table.from_pylist(rows), file)


@pytest.fixture(scope="module")
def mirror(tmp_path_factory):
    """WikiText-2's v1 validation alone, and two tasks of eleven rows."""
    folder = tmp_path_factory.mktemp("mirror")
    lines = [*(ARTICLE * 3)[:-1], " it has <unk> birds . \n"]
    rows = [{"text": line} for line in lines]
    in_mirror(folder, "Salesforce/wikitext/wikitext-2-v1", rows, "validation")
    texts = [{"text": f"{' '.join(WORDS[n:])} every bird sings over a"} for n in range(11)]
    in_mirror(folder, "EleutherAI/lambada_openai/default", texts)
    choices = [
        {
            "id": f"q{n}",
            "question": f"the {WORDS[n]} rises over",
            "choices": {"text": [WORDS[n], "a small field", "sings"], "label": ["A", "B", "C"]},
            "answerKey": "ABC"[n % 3],
        }
        for n in range(11)
    ]
    in_mirror(folder, "allenai/ai2_arc/ARC-Easy", choices)
    in_mirror(folder, "allenai/ai2_arc/ARC-Easy", choices, "train")
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_text, tiny_tokenizer):
    """A run that was trained for seconds."""
    folder = tmp_path_factory.mktemp("evaluated")
    config = folder / "tiny.toml"
    own = (
        f'name = "{tiny_tokenizer}"\n[data.sources.text]\npath = "{tiny_text}/*.txt"\nweight = 1\n'
    )
    place = f'licence = "CC0-1.0"\n[run]\nfolder = "{folder / "run"}"\n'
    config.write_text(f"{TINY}\n[tokenizer]\n{own}{place}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["summerlm", "train", str(config), "train.budget_tokens=1024"])
        with pytest.raises(SystemExit) as end:
            main()
        assert not end.value.code
    return folder / "run"


@pytest.fixture
def command(monkeypatch, capsys):
    """Run `summerlm ARGS` here; gives (exit code, stdout, stderr)."""

    def go(*args):
        monkeypatch.setattr(sys, "argv", ["summerlm", *map(str, args)])
        monkeypatch.delenv("SUMMERLM_HUB_MIRROR", raising=False)
        capsys.readouterr()
        try:
            main()
            code = 0
        except SystemExit as end:
            code = end.code or 0
        return code, *capsys.readouterr()

    return go


def test_a_suite_is_measured_and_written_in_every_form(command, run, mirror, tmp_path):
    json_to, markdown_to = tmp_path / "out.json", tmp_path / "out.md"
    names = "wikitext2,lambada,arc_easy"
    forms = ("--json", json_to, "--markdown", markdown_to, f"data.mirror={mirror}")
    code, out, _ = command("eval", run, "--suite", names, *forms)
    assert code == 0
    facts = json.loads(json_to.read_text())
    wikitext, _, arc = facts["results"]
    assert list(wikitext["parts"]) == list(PROTOCOLS)
    assert (arc["items"], len(arc["chosen"]), len(arc["answers"])) == (11, 11, 11)
    assert facts["model"]["step"] == facts["step"] == 4
    assert facts["model"]["tokens"] == 1024
    assert facts["settings"]["mirror"] == str(mirror)
    assert {"summerlm", "torch", "python"} <= set(facts["versions"])
    hashes = {result["data"]["rows_sha256"] for result in facts["results"]}
    assert len(hashes) == 3
    # a line a figure, where there is no terminal
    lines = [line for line in out.splitlines() if line.startswith("arc_easy  ")]
    assert [line.split("  ")[1].strip() for line in lines] == ["acc", "acc norm"]
    value = number(arc["figures"]["acc"]["value"], 4)
    assert f"{value} ± " in lines[0]
    assert lines[0].endswith("chance 0.3333  n 11 items")
    assert sum(line.startswith("wikitext2  ") for line in out.splitlines()) == 7
    assert "the mirror lacks wikitext-2-raw-v1 test" in out
    assert "<unk>" in out
    assert "blocks of 32, the model's context" in out
    # a row a figure, which stands for itself
    table, notes = markdown_to.read_text().split("\n\n")
    head, rule, *rows = [line.strip("| ").split(" | ") for line in table.splitlines()]
    assert len(rows) == 7 + 2 + 2
    assert all(len(row) == len(head) == len(rule) for row in rows)
    rolling = dict(zip(head, rows[2], strict=True))
    assert (rolling["task"], rolling["protocol"]) == ("wikitext2", "rolling")
    assert rolling["figure"] == "word perplexity"
    assert "1,024 tokens trained" in rolling["model"]
    assert rolling["n"].endswith("words")
    assert rolling["data"] == "Salesforce/wikitext wikitext-2-v1 validation (mirror), 3 documents"
    assert "- wikitext2: the mirror lacks" in notes


def test_own_files_go_before_mirrors(command, run, mirror, tmp_path):
    file = tmp_path / "mine.jsonl"
    text = "the sun rises over a small field"
    file.write_text("".join(json.dumps({"text": f"{text} {n}"}) + "\n" for n in range(3)))
    args = ("--suite", "lambada", f"data.files.lambada_openai={file}", f"data.mirror={mirror}")
    (result,) = json.loads(command("eval", run, *args, "--json", "-")[1])["results"]
    assert (result["items"], result["data"]["origin"]) == (3, "file")


def test_the_same_evaluation_gives_the_same_file(command, run, mirror):
    args = ("eval", run, "--suite", "arc_easy", f"data.mirror={mirror}", "--json", "-")
    first, again = (command(*args)[1] for _ in range(2))
    assert first == again
    shots = json.loads(command(*args, "--few-shot", 2)[1])["results"][0]
    other = json.loads(command(*args, "--few-shot", 2, "--seed", 5)[1])["results"][0]
    assert shots["few_shot"] == 2
    assert shots["logprobs"] != other["logprobs"]
    limited = json.loads(command(*args, "--limit", 3)[1])["results"][0]
    assert limited["items"] == 3
    checkpoint = ("eval", run / "checkpoints" / "step-00000004", *args[2:])
    model = json.loads(command(*checkpoint)[1])["model"]
    assert (model["name"], model["step"]) == ("run", 4)


@pytest.mark.parametrize("stride", [None, 7])
def test_a_text_has_all_protocols_and_what_it_always_had(command, run, tiny_text, stride):
    args = ("--text", f"{tiny_text}/0*.txt", "--json", "-")
    args += () if stride is None else ("--stride", stride)
    facts = json.loads(command("eval", run, *args)[1])
    loaded = evaluating.load(run, evaluating.pick_device("cpu"))
    expected = measure(
        loaded.model,
        loaded.tokenizer,
        read_documents([f"{tiny_text}/0*.txt"]),
        context=32,
        stride=stride,
    )
    for name in ("documents", "tokens", "bytes"):
        assert facts[name] == getattr(expected, name)
    for name in ("loss", "perplexity", "bits_per_byte"):
        assert facts[name] == pytest.approx(getattr(expected, name), rel=1e-5)
    assert (facts["context"], facts["stride"]) == (32, stride or 16)
    (result,) = facts["results"]
    assert list(result["parts"]) == list(PROTOCOLS)
    digest = hashlib.sha256()
    for document in read_documents([f"{tiny_text}/0*.txt"]):
        digest.update(hashlib.sha256(document.encode()).digest())
    assert result["data"]["rows_sha256"] == digest.hexdigest()


@pytest.mark.parametrize("width", [80, 120])
def test_tables_fit_a_terminal(command, run, mirror, width, tmp_path):
    to = tmp_path / "out.json"
    args = ("--suite", "wikitext2,lambada,arc_easy", f"data.mirror={mirror}", "--json", to)
    command("eval", run, *args)
    facts = json.loads(to.read_text())
    for part in facts["results"][0]["parts"].values():  # as large as they get
        part["data"]["n"] = dict.fromkeys(part["data"]["n"], 123_456_789)
        for figure in part["figures"].values():
            figure |= {"value": 123_456.7, "error": 12_345.6, "low": 99_999.9, "high": 234_567.8}
    terminal = partial(Console, force_terminal=True, color_system=None, width=width)
    with (tmp_path / "shown").open("w") as file:
        eval_tables.show(facts, terminal(file=file))
    shown = (tmp_path / "shown").read_text().splitlines()
    tables = [line for line in shown if line.startswith(" ")]
    assert max(map(len, tables)) <= width
    assert sum("123,456,789" in line for line in tables) == 7
    assert sum("100,000\u20132.346e5" in line for line in tables) == 7
    heads = [line.split() for line in tables if "figure" in line]
    assert heads[0] == ["figure", "value", "error", "95", "%", "n"]  # no chance in a text
    assert heads[2] == ["figure", "value", "error", "chance", "n"]


def test_what_a_figures_row_shows():
    found = [decimals(value) for value in (None, 0.1234, 9.9, 99.5, 999.4, 1234.0)]
    assert found == [4, 4, 3, 2, 2, 1]
    assert number(-1234.5, 1) == "-1,234.5"
    assert number(3.5e12, 0) == "3.500e12"


def test_lm_evals_figures_are_rows_too():
    found = {
        "results": {
            "arc": {"alias": "arc", "acc,none": 0.25, "acc_stderr,none": 0.01, "x,flex": 1.0}
            | {"sample_len": 10},
            "wiki": {"word_perplexity,none": 9.0, "word_perplexity_stderr,none": "N/A"},
        },
        "n-shot": {"arc": 3},
        "higher_is_better": {"wiki": {"word_perplexity": False}},
    }
    arc, wiki = sections({"results": [], "lm_eval": found})
    assert [row.cells for row in arc.rows] == [
        ("acc", "0.2500", "0.0100", "-", "-", "10 items"),
        ("x flex", "1.0000", "-", "-", "-", "10 items"),
    ]
    assert arc.shots == 3
    assert (wiki.rows[0].error, wiki.rows[0].higher_is_better) == (None, False)


@pytest.mark.parametrize("task", ["mmlu", "mmlu_stem", "mmlu_anatomy"])
def test_notes_of_a_task_of_parts(task):
    """A part's own folder is no other set's; and so many items are of each part."""
    data = {"origin": "mirror", "repository": "cais/mmlu", "folder": "*", "split": "test"}
    data |= {"limit": 5, "truncated": 8}
    result = {"task": task, "protocol": "choices", "items": 5, "few_shot": 0, "figures": {}}
    result |= {"data": data, "notes": (), "parts": {}}
    if task == "mmlu_anatomy":
        data["folder"] = "anatomy"
    else:
        result["parts"] = {"anatomy": {"figures": {}, "items": 5, "data": {}}}
    (section,) = sections({"results": [result]})
    of = "" if task == "mmlu_anatomy" else " of each part"
    lost = "8 times a context lost its beginning: the model reads less than it has"
    assert section.notes == (f"the first 5{of} only", lost)


def test_the_mirror_is_what_is_asked_for_then_the_runs_then_the_environments(
    run, tmp_path, monkeypatch
):
    assert where_of(run, [], bundle=False).mirror is None  # the environment's, or the hub
    assert where_of(run, ["data.mirror=a"], bundle=True).bundle
    own = tmp_path / "own"
    (own / "checkpoints" / "step").mkdir(parents=True)
    (own / "config.toml").write_text('[data]\nmirror = "b"\nstall_timeout_s = 7\nlanes = 4\n')
    for place in (own, own / "checkpoints" / "step"):
        found = where_of(place, [], bundle=False)
        assert (str(found.mirror), found.stall_timeout_s) == ("b", 7)
        assert str(where_of(place, ["data.mirror=a"], bundle=False).mirror) == "a"
        assert where_of(place, ["data.mirror=none"], bundle=False).mirror is None


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["RUN"], "ask for --suite, --text or --lm-eval"),
        ([], "eval needs a run folder"),
        (["RUN", "--suite", "arc_eazy"], "did you mean arc_easy"),
        (["RUN", "--suite", "arc_easy", "data.miror=x"], "did you mean data.mirror"),
        (["RUN", "--suite", "arc_easy", "optim.peak_lr=1"], "no setting optim"),
        (["RUN", "--suite", "arc_easy", "data.files.arc_eazy=x"], "no such task is measured"),
        (["RUN", "--suite", "hellaswag", "data.mirror=MIRROR"], "a mirror needs"),
        (["RUN", "--suite", "arc_easy", "data.mirror=gone"], "gone"),
        (["RUN", "--text", "gone/*.txt"], "no file matches"),
        (["RUN", "--suite", "wikitext2", "--stride", "33", "data.mirror=MIRROR"], "stride 33"),
        (["RUN", "--suite", "arc_easy", "--stride", "3"], "only texts are read in windows"),
        (["RUN", "--suite", "wikitext2", "--few-shot", "1"], "texts take no examples"),
        (["RUN", "--lm-eval", "arc_easy"], "pip install 'summerlm[eval]'"),
        (["gone", "--suite", "arc_easy"], "neither a run folder nor a checkpoint"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(command, run, mirror, args, words, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # as if it weren't installed
    monkeypatch.delitem(sys.modules, "summerlm.eval.harness_tasks", raising=False)
    monkeypatch.delitem(sys.modules, "summerlm.eval.harness", raising=False)
    known = {"RUN": run, "data.mirror=MIRROR": f"data.mirror={mirror}"}
    code, _, err = command("eval", *[known.get(arg, arg) for arg in args])
    assert code == 2
    last = err.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert words in last


def test_all_there_is_can_be_listed(command):
    code, out, _ = command("eval", "--list")
    assert code == 0
    for words in ("wikitext2", "mmlu", "suite core", "CC-BY-SA-4.0", "allenai/ai2_arc"):
        assert words in out
