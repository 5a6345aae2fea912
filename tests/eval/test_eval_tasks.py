"""Definitions of tasks: their files, the texts made of rows, and that these are lm-eval's."""

import random
import runpy
from pathlib import Path

import pytest
from task_rows import ROWS, write_mirror
from task_texts import PAIRS

from summerlm.core.config import validate
from summerlm.core.errors import UsageError
from summerlm.eval.definition import Task
from summerlm.eval.items import Where
from summerlm.eval.preparing import prepare
from summerlm.eval.task import (
    describe,
    describe_suites,
    expand,
    load_task,
    suite_names,
    task_names,
)
from summerlm.eval.templates import ItemError, describe_part, evaluate, render, shots

ROOT = Path(__file__).parent.parent.parent
ISSUE = [  # every one that was asked for
    *("lambada_openai", "lambada_standard", "arc_easy", "arc_challenge", "hellaswag", "piqa"),
    *("winogrande", "openbookqa", "boolq", "copa", "commonsense_qa", "sciq", "mmlu", "gsm8k"),
    *("wikitext2", "wikitext103", "lambada_text"),
]


def own_name(name):
    """One subject stands for all of MMLU."""
    return "mmlu_abstract_algebra" if name == "mmlu" else name


def items_of(name, rows=None):
    task = load_task(own_name(name))
    return [render(task, row, task.part_names[0]) for row in rows or ROWS[name]]


def test_there_are_all_tasks():
    assert set(task_names()) == set(ISSUE)
    assert [task.name for task in expand(["all"])] != []
    assert set(describe_suites()["all"].tasks) == set(ISSUE)


@pytest.mark.parametrize("name", ISSUE)
def test_task_says_what_it_is(name):
    task = load_task(name)
    assert task.name == name
    assert task.licence
    assert task.source
    assert task.description.endswith(".")
    assert len(task.description) < 100


@pytest.mark.parametrize("name", suite_names())
def test_suites_hold_tasks(name):
    assert name not in task_names()
    assert [task.name for task in expand([name])] == list(describe_suites()[name].tasks)


def test_names_are_expanded_once_and_in_order():
    assert [task.name for task in expand(["arc", "sciq", "arc_easy", "arc"])] == [
        "arc_easy",
        "arc_challenge",
        "sciq",
    ]


def test_mmlu_has_57_subjects_in_four_groups():
    task = load_task("mmlu")
    assert len(task.part_names) == len(set(task.part_names)) == 57
    sizes = {group: len(names) for group, names in task.parts.items()}
    assert sizes == {"stem": 19, "humanities": 13, "social_sciences": 12, "other": 13}
    assert load_task("mmlu_stem").part_names == task.parts["stem"]
    assert load_task("mmlu_anatomy").part_names == ("anatomy",)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("hellaswagg", "did you mean hellaswag?"),
        ("arc_esy", "did you mean arc_easy"),
        ("mmlu_anatmy", "did you mean mmlu_anatomy"),
        ("coer", "did you mean core?"),
        ("zzzz", "there are arc_challenge, arc_easy"),
    ],
)
def test_an_unknown_task_names_the_nearest(name, words):
    with pytest.raises(UsageError, match=f"no task or suite '{name}'") as caught:
        expand([name])
    assert words in str(caught.value)


def test_parts_of_what_is_measured_whole_are_refused():
    values = load_task("gsm8k").model_dump(mode="json", exclude_none=True)
    with pytest.raises(UsageError, match="takes no parts"):
        validate(Task, values | {"parts": {"a": ["b", "c"]}}, "x")


def test_a_definition_that_lacks_a_key_is_refused():
    values = load_task("arc_easy").model_dump(mode="json", exclude_none=True)
    assert validate(Task, values, "x") == load_task("arc_easy")
    del values["prompt"]["answer"]
    with pytest.raises(UsageError, match="lacks a key"):
        validate(Task, values, "x")
    with pytest.raises(
        UsageError, match=r"no setting prompt\.contxt; did you mean prompt\.context"
    ):
        validate(Task, {**values, "prompt": {"contxt": "x"}}, "x")


@pytest.mark.parametrize("name", ROWS)
def test_texts_are_those_of_lm_eval(name):
    task = load_task(own_name(name))
    first = describe_part(task, task.part_names[0])
    made = [[(first + c, follows) for c, follows in item.pairs] for item in items_of(name)]
    if name == "gsm8k":  # lm-eval asks for writing: it has no continuation
        made = [[(context, "") for context, _ in pairs] for pairs in made]
    assert made == PAIRS[name]


def test_answers_and_examples():
    answers = {name: [item.answer for item in items_of(name)] for name in ROWS}
    assert answers["arc_easy"] == [0, 4, 1]
    assert answers["hellaswag"] == [2, 0]
    assert answers["winogrande"] == [1, 0]
    assert answers["openbookqa"] == [0, 1]
    assert answers["boolq"] == [1, 0]
    assert answers["commonsense_qa"] == [2, 0]
    assert answers["sciq"] == [3, 3]
    assert answers["mmlu"] == [1, 3]
    assert items_of("copa")[0].example == "The tap was open therefore  water ran.\n\n"
    assert items_of("winogrande")[0].example == "Ann thanked Bea because Bea had helped.\n\n"
    assert items_of("lambada_openai")[1].example == "one  two\nthree  four's\n\n"
    assert items_of("gsm8k")[0].example.endswith(" nuts.\n#### 12\n\n")


def test_normalisation_is_by_the_choices_own_characters():
    assert items_of("arc_easy")[1].choices[4] == "ö"  # without the delimiter; one character
    assert items_of("copa")[0].choices[0] == " water ran."  # its space is its own, as in lm-eval


def test_description_of_a_subject():
    assert describe_part(load_task("mmlu"), "us_foreign_policy") == (
        "The following are multiple choice questions (with answers) about us foreign policy.\n\n"
    )


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("arc_easy", {"answerKey": "D"}, "answer key is none of its 3 choices .*answerKey = 'D'"),
        ("arc_easy", {"answerKey": ""}, "answer key is none"),
        ("arc_easy", {"choices": {"text": [], "label": []}}, "no choices"),
        ("arc_easy", {"choices": {"text": ["a", ""], "label": ["A", "B"]}}, "choices is empty"),
        ("arc_easy", {"choices": {"text": "ab", "label": ["A", "B"]}}, "no list of texts"),
        ("hellaswag", {"label": ""}, "answer key is none"),  # a test split's, without labels
        ("hellaswag", {"label": "4"}, "answer key is none"),
        ("piqa", {"label": -1}, "answer key is none"),
        ("boolq", {"label": 2}, "answer key is none of its 2 choices"),
        ("boolq", {"label": True}, "answer key is none"),
        ("mmlu", {"answer": 4}, "answer key is none of its 4 choices"),
        ("commonsense_qa", {"answerKey": ""}, "answer key is none"),
        ("winogrande", {"answer": "3"}, "answer key is none"),
        ("winogrande", {"sentence": "nothing is left out"}, "can't be found"),
        ("copa", {"question": "reason"}, "texts can't be made"),
        ("copa", {"choice1": ""}, "can't be found"),
    ],
)
def test_a_row_that_cannot_be_used_is_refused(name, change, words):
    with pytest.raises(ItemError, match=words):
        items_of(name, [{**ROWS[name][0], **change}])


def test_templates_stay_in_their_sandbox():
    for text in ("''.__class__.__mro__", "choices.append('x')", "nothing", "1 // 0"):
        with pytest.raises(ItemError):
            evaluate(text, {"choices": []})


def numbered(count):
    return [{"question": f"q{i}", "answer": f"a{i}"} for i in range(count)]


@pytest.mark.parametrize(("name", "spare"), [("gsm8k", 0), ("hellaswag", 1)])
def test_examples_are_drawn_as_lm_eval_draws_them(name, spare):
    task, pool = load_task(name), numbered(50)
    found = shots(task, [{"question": "?"}] * 7, pool, 5, seed=1234)
    generator = random.Random(1234)
    assert found == [generator.sample(range(50), 5 + spare)[:5] for _ in range(7)]
    assert found == shots(task, [{"question": "?"}] * 7, pool, 5, seed=1234)
    assert found != shots(task, [{"question": "?"}] * 7, pool, 5, seed=1)


@pytest.mark.parametrize("name", ["lambada_openai", "hellaswag"])
@pytest.mark.parametrize("copies", [1, 3])
def test_a_row_is_never_its_own_example(name, copies):
    task, pool = load_task(name), numbered(6) + numbered(1) * (copies - 1)
    drawn = shots(task, pool[:1] * 300, pool, 3, seed=0)
    assert all(len(set(places)) == 3 for places in drawn)
    assert all(pool[place] != pool[0] for places in drawn for place in places)


def test_first_examples_are_the_same_for_all_rows():
    task, pool = load_task("mmlu"), numbered(6)
    assert shots(task, [{"question": "?"}] * 3, pool, 5, seed=0) == [[0, 1, 2, 3, 4]] * 3
    assert shots(task, pool[1:2], pool, 5, seed=0) == [[0, 2, 3, 4, 5]]


@pytest.mark.parametrize("name", ["mmlu", "gsm8k", "hellaswag"])
def test_too_few_examples_are_refused(name):
    with pytest.raises(UsageError, match=r"split .* has 4 rows; ask for fewer"):
        shots(load_task(name), numbered(1), numbered(4), 5, seed=0)


def test_the_page_of_tasks_is_made_of_their_files():
    made = runpy.run_path(str(ROOT / "docs" / "make_tasks.py"))["page"]()
    assert (ROOT / "docs" / "tasks.md").read_text() == made, "run: python docs/make_tasks.py"
    assert all(row["licence"] in made for row in describe())


@pytest.fixture(scope="module")
def lm_eval_tasks():
    """lm-eval's own definitions, which read what mirror they are given."""
    from summerlm.eval.harness_tasks import Tasks, task_manager

    manager = task_manager()

    def load(name, mirror, few_shot):
        manager._factory = Tasks(mirror, few_shot)
        task = manager.load([name])["tasks"][name]
        task.set_config(key="num_fewshot", value=few_shot)
        task.set_fewshot_seed(1234)
        task.build_all_requests(rank=0, world_size=1)
        pairs = {}
        for asked in task.instances:
            context, follows = asked.args
            follows = follows if isinstance(follows, str) else ""  # settings of writing
            pairs.setdefault(asked.doc_id, []).append((context, follows))
        return [pairs[number] for number in sorted(pairs)]

    return load


@pytest.mark.peers("lm_eval")
@pytest.mark.parametrize("few_shot", [0, 2])
@pytest.mark.parametrize("name", ROWS)
def test_texts_are_those_of_the_lm_eval_that_is_installed(
    name, few_shot, lm_eval_tasks, tmp_path, monkeypatch
):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    own = own_name(name)
    task = load_task(own)
    rows = ROWS[name]
    if few_shot and task.few_shot.split == task.data.split:
        pytest.skip("lm-eval may show a row its own answer here")
    key = task.data.id  # may not come twice
    copies = [
        {**row, key: 90 + n if isinstance(row[key], int) else f"x{n}"} if key else row
        for n, row in enumerate([*rows, *rows])
    ]
    if task.few_shot.spare:  # as in lm-eval: the pool may hold the row itself, even twice
        pool, measured = [*rows, *copies], rows
    else:
        pool, measured = copies if key else copies[:1] * 3, rows[1:]
    monkeypatch.setitem(ROWS, name, measured)
    mirror = write_mirror(tmp_path, own, pool if few_shot else ())
    part = prepare(task, task.part_names[0], Where(mirror), few_shot, 1234, None)
    made = [part.pairs_of(number) for number in range(len(part.items))]
    if name == "gsm8k":
        made = [[(context, "") for context, _ in pairs] for pairs in made]
    assert made == lm_eval_tasks(own, mirror, few_shot)
