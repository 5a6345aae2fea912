"""Figures of tasks: models whose answers are known, plain accounts of each figure, and limits."""

import json
import math
import statistics
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from models import build
from ranks import run_ranks
from task_rows import ARC, ROWS, write_mirror

from summerlm.core.errors import SummerError, UsageError
from summerlm.eval import running
from summerlm.eval.definition import Extract
from summerlm.eval.items import Where
from summerlm.eval.likelihood import Answer
from summerlm.eval.metrics import (
    INVALID,
    best_choice,
    find_answer,
    mean,
    perplexity,
    pooled,
    same_answer,
)
from summerlm.eval.results import Figure
from summerlm.eval.running import run_task
from summerlm.eval.task import load_task
from summerlm.eval.templates import render
from summerlm.generate.engine import LanguageModel
from summerlm.model.config import ModelConfig
from summerlm.recipes.eval_request import Wanted
from summerlm.recipes.evaluating import evaluate_suite
from summerlm.tokenizer.learn import learn_bpe

BYTES = learn_bpe([], 263)  # an id a byte
CONTEXT = 4000


class Speaker:
    """A model that gives each continuation the log-likelihood that a function says, and no more."""

    def __init__(self, says, monkeypatch, writes=None, context=CONTEXT):
        self.tokenizer, self.model = BYTES, SimpleNamespace()
        self.config = SimpleNamespace(context=context)
        self.says, self.writes = says, writes
        self.asked = []  # every pair of texts
        monkeypatch.setattr(running, "answer", self.answer)

    def answer(self, model, asks, *, precision, ranks):
        assert model is self.model
        assert all(ask.context[0] == BYTES.bos for ask in asks)
        texts = [(BYTES.decode(ask.context), BYTES.decode(ask.continuation)) for ask in asks]
        self.asked += texts
        said = [self.says(*pair) for pair in texts]
        return [one if isinstance(one, Answer) else Answer(one, False) for one in said]

    def complete(self, prompts, *, max_tokens, stop, precision):
        self.precision = precision
        self.asked += [(BYTES.decode(ids), (max_tokens, tuple(stop))) for ids in prompts]
        assert all(ids[0] == BYTES.bos for ids in prompts)
        return [self.writes(BYTES.decode(ids)) for ids in prompts]


def measure(name, says, monkeypatch, tmp_path, rows=None, few_shot=0, pool=(), **settings):
    """Let a function be the model in a task of these rows."""
    if rows is not None:
        monkeypatch.setitem(ROWS, "mmlu" if name.startswith("mmlu") else name, rows)
    lm = Speaker(says, monkeypatch)
    where = Where(write_mirror(tmp_path, name, pool))
    result = run_task(lm, load_task(name), where, few_shot=few_shot, **settings)
    return result, lm


def arc(count, answers="AB"):
    """Questions of two to five choices."""
    rows = []
    for n in range(count):
        size = 2 + n % 4
        labels = list("ABCDE"[:size])
        texts = [f"{'x' * (1 + (n + i) % 5)}{i}" for i in range(size)]
        key = answers[n % len(answers)]
        choices = {"text": texts, "label": labels}
        rows.append({"id": f"q{n}", "question": f"q{n}", "choices": choices, "answerKey": key})
    return rows


def test_the_model_is_asked_about_the_texts_of_the_items(monkeypatch, tmp_path):
    result, lm = measure("arc_easy", lambda c, f: -1.0, monkeypatch, tmp_path)
    assert lm.asked[:3] == [
        ("Question: Which gives off light?\nAnswer:", " a lamp"),
        ("Question: Which gives off light?\nAnswer:", " a stone"),
        ("Question: Which gives off light?\nAnswer:", " a spoon"),
    ]
    assert len(lm.asked) == 10
    assert [len(values) for values in result.logprobs] == [3, 5, 2]
    assert (result.task, result.items, result.few_shot) == ("arc_easy", 3, 0)


def test_all_alike_is_the_first_choice_and_chance(monkeypatch, tmp_path):
    result, _ = measure("arc_easy", lambda c, f: -7.0, monkeypatch, tmp_path, arc(400, "ABAB"))
    assert result.chosen == [0] * 400
    assert result.figures["acc"].value == 0.5
    # two to five choices: the mean of 1/2, 1/3, 1/4, 1/5
    chance = (1 / 2 + 1 / 3 + 1 / 4 + 1 / 5) / 4
    assert result.figures["acc"].chance == pytest.approx(chance)
    assert result.figures["acc_norm"].chance == pytest.approx(chance)


def test_guessing_gives_chance(monkeypatch, tmp_path):
    draw = np.random.default_rng(0)
    rows = arc(2000, "ABABABA")
    result, _ = measure("arc_easy", lambda c, f: draw.normal(), monkeypatch, tmp_path, rows)
    for figure in result.figures.values():
        assert abs(figure.value - figure.chance) < 4 * figure.error
        assert 0.009 < figure.error < 0.012


@pytest.mark.parametrize("name", [n for n in ROWS if not n.startswith(("lambada", "gsm8k"))])
def test_an_oracle_is_always_right_and_its_opposite_never(name, monkeypatch, tmp_path):
    own = "mmlu_anatomy" if name == "mmlu" else name
    task = load_task(own)
    right = set()
    for row in ROWS[name]:
        item = render(task, row, "anatomy")
        context, follows = item.pairs[item.answer]
        kept = context.rstrip()  # spaces at its end go to what follows
        right.add((kept, context[len(kept) :] + follows))

    def oracle(context, follows):
        return 0.0 if any(context.endswith(c) and f == follows for c, f in right) else -50.0

    best, _ = measure(own, oracle, monkeypatch, tmp_path)
    assert {f.value for f in best.figures.values()} == {1.0}
    assert {f.error for f in best.figures.values()} == {0.0}
    assert best.chosen == best.answers
    worst, _ = measure(own, lambda c, f: -1.0 - oracle(c, f), monkeypatch, tmp_path)
    assert worst.figures["acc"].value == 0.0


def test_acc_norm_is_by_characters_of_the_choice(monkeypatch, tmp_path):
    """Not by bytes, tokens, or with the space before it."""
    choices = {"text": ["ööö", "abcde"], "label": ["A", "B"]}
    rows = [{"id": "1", "question": "?", "choices": choices, "answerKey": "A"}]
    said = {" ööö": -3.1, " abcde": -5.0}  # by character -1.03 and -1; by byte -.52 and -1
    result, _ = measure("arc_easy", lambda c, f: said[f], monkeypatch, tmp_path, rows)
    assert (result.chosen, result.chosen_norm) == ([0], [1])
    said = {" ööö": -3.1, " abcde": -5.3}  # with the space: -.775 and -.883, without -1.033, -1.06
    result, _ = measure("arc_easy", lambda c, f: said[f], monkeypatch, tmp_path, rows)
    assert result.chosen_norm == [0]
    said = {" ööö": -3.0, " abcde": -4.5}  # with the space -.75 and -.75: the first
    result, _ = measure("arc_easy", lambda c, f: said[f], monkeypatch, tmp_path, rows)
    assert result.chosen_norm == [1]


def test_figures_are_what_numpy_makes_of_them(monkeypatch, tmp_path):
    draw = np.random.default_rng(1)
    rows = arc(60, "AABBBAB")
    result, _ = measure("arc_easy", lambda c, f: -draw.random() * 9, monkeypatch, tmp_path, rows)
    hits, norm_hits = [], []
    for row, values in zip(rows, result.logprobs, strict=True):
        right = row["choices"]["label"].index(row["answerKey"])
        sizes = np.array([float(len(text)) for text in row["choices"]["text"]])
        hits.append(float(np.argmax(values) == right))
        norm_hits.append(float(np.argmax(np.array(values) / sizes) == right))
    for name, expected in (("acc", hits), ("acc_norm", norm_hits)):
        figure = result.figures[name]
        assert figure.value == np.mean(expected)
        assert figure.error == pytest.approx(np.std(expected, ddof=1) / math.sqrt(60), rel=1e-12)
    assert hits != norm_hits


def test_cloze(monkeypatch, tmp_path):
    said = {
        " lamp": Answer(-1.0, True),
        " four's": Answer(-3.0, False),
        " alone": Answer(-5.0, True),
    }
    result, lm = measure("lambada_openai", lambda c, f: said[f], monkeypatch, tmp_path)
    assert lm.asked[2] == ("", " alone")  # BOS alone
    assert result.chosen == [1, 0, 1]
    assert result.figures["acc"].value == pytest.approx(2 / 3)
    assert result.figures["acc"].chance is None
    found = result.figures["perplexity"]
    assert found.value == pytest.approx(math.exp(3))
    assert found.error == pytest.approx(math.exp(3) * 2 / math.sqrt(3))
    assert not found.higher_is_better


def test_errors_of_perplexity_are_those_of_a_bootstrap():
    draw = np.random.default_rng(0)
    values = (-draw.gamma(2.0, 1.5, size=1000)).tolist()
    resampled = [math.exp(-np.mean(draw.choice(values, 1000))) for _ in range(2000)]
    assert perplexity(values).error == pytest.approx(np.std(resampled, ddof=1), rel=0.08)


def test_one_item_has_no_error(monkeypatch, tmp_path):
    result, _ = measure("arc_easy", lambda c, f: -1.0, monkeypatch, tmp_path, limit=1)
    assert (result.items, result.figures["acc"].error) == (1, None)
    assert result.data["limit"] == 1


def test_a_limit_that_leaves_nothing_out_is_none(monkeypatch, tmp_path):
    for limit, told in ((1, 1), (len(ROWS["arc_easy"]), None), (99, None)):
        folder = tmp_path / str(limit)
        result, _ = measure("arc_easy", lambda c, f: -1.0, monkeypatch, folder, limit=limit)
        assert result.data["limit"] == told


def test_parts_are_weighted_by_their_items(monkeypatch, tmp_path):
    task = load_task("mmlu")
    keys = {
        part: [n % 4 for n in range(2 + number % 3)] for number, part in enumerate(task.part_names)
    }
    for part, answers in keys.items():
        rows = [
            {**ROWS["mmlu"][0], "question": f"{part} {n}", "answer": a}
            for n, a in enumerate(answers)
        ]
        with monkeypatch.context() as inside:
            inside.setitem(ROWS, "mmlu", rows)
            write_mirror(tmp_path, f"mmlu_{part}")
    where = Where(tmp_path)
    lm = Speaker(lambda c, f: float(f == " A"), monkeypatch)
    result = run_task(lm, task, where, few_shot=0)
    hits = {part: [float(a == 0) for a in answers] for part, answers in keys.items()}
    flat = [hit for part in hits.values() for hit in part]
    assert result.items == len(flat)
    assert result.figures["acc"].value == pytest.approx(np.mean(flat))
    assert result.figures["acc"].chance == pytest.approx(0.25)
    stem = [hit for part in task.parts["stem"] for hit in hits[part]]
    assert result.figures["acc_stem"].value == pytest.approx(np.mean(stem))
    assert list(result.parts) == list(task.part_names)
    assert (result.data["folder"], result.parts["anatomy"].data["folder"]) == ("*", "anatomy")
    assert result.parts["anatomy"].task == "mmlu_anatomy"
    assert result.parts["anatomy"].figures["acc"].value == np.mean(hits["anatomy"])
    first = lm.asked[0][0]
    assert first.startswith("The following are multiple choice questions (with answers) about abs")
    # and each by its own name
    alone = run_task(lm, load_task("mmlu_anatomy"), where, few_shot=0)
    assert alone.figures == {"acc": result.parts["anatomy"].figures["acc"]}
    assert alone.chosen == result.parts["anatomy"].chosen
    stem_alone = run_task(lm, load_task("mmlu_stem"), where, few_shot=0)
    assert stem_alone.figures["acc"] == result.figures["acc_stem"]
    assert stem_alone.parts["anatomy"] == result.parts["anatomy"]
    assert [c == a for c, a in zip(result.chosen, result.answers, strict=True)] == flat
    assert run_task(lm, task, where, few_shot=0, limit=1).items == 57  # of each part


def test_the_error_of_parts_is_pooled():
    """The mean variance within parts, as in https://en.wikipedia.org/wiki/Pooled_variance."""
    parts = [[1.0, 0.0, 0.0], [1.0, 1.0, 0.0, 1.0, 1.0, 0.0]]
    within = sum((len(p) - 1) * statistics.variance(p) for p in parts) / (9 - 2)
    found = pooled([mean(part) for part in parts], [3, 6])
    assert found.error == pytest.approx(math.sqrt(within / 9))
    assert found.value == pytest.approx(5 / 9)


@pytest.mark.peers("lm_eval")
def test_figures_are_those_of_the_lm_eval_that_is_installed():
    from lm_eval.api import metrics as theirs

    draw = np.random.default_rng(0)
    parts = [draw.integers(0, 2, size).tolist() for size in (7, 30, 12)]
    ours = [mean(part) for part in parts]
    for part, own in zip(parts, ours, strict=True):
        assert own.value == theirs.mean(part)
        assert own.error == pytest.approx(theirs.mean_stderr(part))
    sizes = [len(part) for part in parts]
    errors = [theirs.mean_stderr(part) for part in parts]
    assert pooled(ours, sizes).error == pytest.approx(theirs.pooled_sample_stderr(errors, sizes))
    values = (-draw.gamma(2.0, 1.5, size=50)).tolist()
    assert perplexity(values).value == pytest.approx(theirs.perplexity(values))


ANSWERS = {  # what is written -> (strict, flexible), where the key is 1,001
    "1,000 + 1.\n#### 1,001": (True, True),
    "#### 1001": (True, True),
    "####1001": (False, True),
    "#### 1,001.": (True, True),
    "#### 7 no, #### 1001": (False, True),
    "It is 1001, surely": (False, True),
    "It is 1001 of 2": (False, False),
    "$1,001.": (False, True),
    "#### -1001": (False, False),
    "none": (False, False),
    "": (False, False),
    "#### 1002": (False, False),
    "#### 100": (False, False),
}


def test_answers_that_are_written(monkeypatch, tmp_path):
    rows = [{**ROWS["gsm8k"][1], "question": f"q{n}"} for n in range(len(ANSWERS))]
    monkeypatch.setitem(ROWS, "gsm8k", rows)
    texts = dict(zip((f"Question: q{n}\nAnswer:" for n in range(len(rows))), ANSWERS, strict=True))
    lm = Speaker(None, monkeypatch, writes=texts.__getitem__)
    where = Where(write_mirror(tmp_path, "gsm8k"))
    result = run_task(lm, load_task("gsm8k"), where, few_shot=0, precision=torch.bfloat16)
    assert lm.precision == torch.bfloat16
    assert lm.asked[0][1] == (256, ("Question:", "</s>", "<|im_end|>"))
    assert result.written == list(ANSWERS)
    strict, flexible = zip(*ANSWERS.values(), strict=True)
    assert result.figures["exact_match_strict"].value == np.mean(strict)
    assert result.figures["exact_match_flexible"].value == np.mean(flexible)


def verdicts(extract_and_compare):
    key = ROWS["gsm8k"][1]["answer"]
    return [
        tuple(extract_and_compare(text, key, name) for name in ("strict", "flexible"))
        for text in ANSWERS
    ]


def test_answers_are_found_and_compared():
    how = load_task("gsm8k").generation

    def ours(text, key, name):
        return same_answer(find_answer(text, how.extract[name]), key, how)

    assert verdicts(ours) == list(ANSWERS.values())
    assert same_answer("YES", "yes", how)
    assert find_answer("no number", how.extract["flexible"]) == INVALID
    assert find_answer("a  b ", Extract(pattern="(a)? (b )?", match=0)) == "a"


@pytest.mark.peers("lm_eval")
def test_answers_are_judged_as_the_lm_eval_that_is_installed_does():
    from lm_eval.api.metrics import exact_match_hf_evaluate
    from lm_eval.filters.extraction import RegexFilter

    how = load_task("gsm8k").generation

    def theirs(text, key, name):
        extract = how.extract[name]
        found = RegexFilter(extract.pattern, extract.match).apply([[text]], [{}])[0]
        options = {"regexes_to_ignore": list(how.ignore), "ignore_case": True}
        return bool(exact_match_hf_evaluate(found, [key], **options)["exact_match"])

    assert verdicts(theirs) == list(ANSWERS.values())


@pytest.mark.parametrize("name", ["arc_easy", "hellaswag", "gsm8k", "mmlu_anatomy"])
def test_examples_stand_in_front(name, monkeypatch, tmp_path):
    rows = ROWS["mmlu" if name.startswith("mmlu") else name]
    task = load_task(name)
    if task.data.id:
        pool = [{**rows[0], task.data.id: f"p{n}", "question": f"example {n}"} for n in range(6)]
    elif name == "hellaswag":
        pool = [{**rows[0], "activity_label": f"example {n}"} for n in range(6)]
    else:
        pool = [{**rows[0], "question": f"example {n}"} for n in range(6)]
    monkeypatch.setitem(ROWS, "mmlu" if name.startswith("mmlu") else name, rows)
    where = Where(write_mirror(tmp_path, name, pool))
    for few_shot, expected in ((None, task.few_shot.count), (3, 3)):
        lm = Speaker(lambda c, f: -1.0, monkeypatch, writes=lambda c: "")
        result = run_task(lm, task, where, few_shot=few_shot)
        assert result.few_shot == expected
        contexts = list(dict.fromkeys(context for context, _ in lm.asked))
        assert all(context.count("example") == expected for context in contexts)
        again = Speaker(lambda c, f: -1.0, monkeypatch, writes=lambda c: "")
        run_task(again, task, where, few_shot=few_shot)
        assert again.asked == lm.asked  # the same seed
        other = Speaker(lambda c, f: -1.0, monkeypatch, writes=lambda c: "")
        run_task(other, task, where, few_shot=few_shot, seed=1)
        first = task.few_shot.sampler == "first"
        assert (other.asked == lm.asked) is (first or not expected)
    assert result.data["few_shot_split"] == task.few_shot.split


def test_an_item_never_stands_before_itself(monkeypatch, tmp_path):
    """LAMBADA's only split gives the examples too."""
    rows = [{"text": f"word{n} ends so{n}"} for n in range(6)]
    monkeypatch.setitem(ROWS, "lambada_openai", rows)
    lm = Speaker(lambda c, f: -1.0, monkeypatch)
    run_task(
        lm, load_task("lambada_openai"), Where(write_mirror(tmp_path, "lambada_openai")), few_shot=4
    )
    assert len(lm.asked) == 6
    for context, follows in lm.asked:
        assert context.count("ends") == 5
        assert follows not in context


def test_what_the_model_cannot_read_whole_is_counted(monkeypatch, tmp_path):
    lm = Speaker(lambda c, f: -1.0, monkeypatch, context=47)
    where = Where(write_mirror(tmp_path, "arc_easy"))
    result = run_task(lm, load_task("arc_easy"), where)
    lengths = [1 + len((c + f).encode()) for c, f in lm.asked]  # BOS and bytes
    assert result.data["truncated"] == sum(length > 48 for length in lengths)
    assert 0 < result.data["truncated"] < len(lengths)


def test_nan_is_an_error(monkeypatch, tmp_path):
    with pytest.raises(SummerError, match="NaN of item 1"):
        measure("arc_easy", lambda c, f: math.nan if "bees" in c else -1.0, monkeypatch, tmp_path)


def test_a_bad_row_is_shown(monkeypatch, tmp_path):
    rows = [ARC[0], {**ARC[1], "answerKey": "E"}]
    with pytest.raises(
        UsageError, match=r"task arc_easy: row 1: its answer key .*; the row: .*'A2'"
    ):
        measure("arc_easy", lambda c, f: -1.0, monkeypatch, tmp_path, rows)


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("arc_easy", {"limit": 0}, "limit 0"),
        ("arc_easy", {"few_shot": -1}, "-1 examples"),
        ("arc_easy", {"few_shot": 2}, "no file of split 'train'"),
        ("lambada_text", {"few_shot": 2}, "a text takes none"),
    ],
)
def test_settings_that_mean_nothing_are_refused(name, settings, words, monkeypatch, tmp_path):
    where = Where(write_mirror(tmp_path, "arc_easy"))
    with pytest.raises(UsageError, match=words):
        run_task(Speaker(None, monkeypatch), load_task(name), where, **settings)


def test_a_missing_set_is_told_before_others_are_measured(monkeypatch, tmp_path):
    lm = Speaker(lambda c, f: -1.0, monkeypatch)
    where = Where(write_mirror(tmp_path, "arc_easy"))
    with pytest.raises(UsageError, match="task sciq: the mirror has no folder"):
        evaluate_suite(lm, Wanted(names=["arc_easy", "sciq"]), where)
    assert lm.asked == []
    (result,) = evaluate_suite(lm, Wanted(names=["arc_easy"]), where)
    assert result.items == len(ROWS["arc_easy"])


def test_facts_are_json(monkeypatch, tmp_path):
    result, _ = measure("lambada_openai", lambda c, f: -1.0, monkeypatch, tmp_path)
    facts = json.loads(json.dumps(result.facts(), allow_nan=False))
    assert facts["figures"]["acc"] == {
        "value": 0.0,
        "error": 0.0,
        "chance": None,
        "higher_is_better": True,
        "low": None,
        "high": None,
    }
    assert facts["logprobs"] == [[-1.0]] * 3
    assert facts["data"]["repository"] == "EleutherAI/lambada_openai"
    bad = replace(result, figures={"x": Figure(math.inf, math.nan)})
    assert bad.facts()["figures"]["x"]["value"] is None


def small_model():
    config = ModelConfig(
        vocabulary=263,
        width=16,
        layers=1,
        heads=2,
        kv_heads=1,
        head_dim=8,
        mlp_hidden=16,
        context=64,
    )
    model = build(config, seed=0)
    with torch.no_grad():  # first weights say nearly the same of all
        for parameter in model.parameters():
            parameter.mul_(4)
    return LanguageModel(model.eval(), BYTES)


def test_a_model_of_ours_against_a_loop(tmp_path, monkeypatch):
    monkeypatch.setitem(ROWS, "arc_easy", arc(20))
    lm = small_model()
    result = run_task(lm, load_task("arc_easy"), Where(write_mirror(tmp_path, "arc_easy")))
    for row, values in zip(arc(20), result.logprobs, strict=True):
        for text, value in zip(row["choices"]["text"], values, strict=True):
            context = [BYTES.bos, *BYTES.encode(f"Question: {row['question']}\nAnswer:")]
            follows = BYTES.encode(f" {text}")
            logprobs = lm.logits([*context, *follows][:-1]).log_softmax(-1)[-len(follows) :]
            expected = logprobs.gather(1, torch.tensor(follows)[:, None]).sum().item()
            assert value == pytest.approx(expected, abs=1e-4)
    assert len(set(result.chosen)) > 1


def test_texts_are_measured_under_every_protocol(tmp_path, monkeypatch):
    monkeypatch.setitem(ROWS, "lambada_text", [{"text": f"a text of {n} words"} for n in range(8)])
    where = Where(write_mirror(tmp_path, "lambada_text"))
    result = run_task(small_model(), load_task("lambada_text"), where, limit=5)
    assert result.items == 5
    assert result.parts["raw"].figures["bits_per_byte"] == result.figures["raw_bits_per_byte"]
    assert not result.figures["rolling_word_perplexity"].higher_is_better
    assert result.data["repository"] == "EleutherAI/lambada_openai"
    assert result.data["limit"] == 5
    assert run_task(small_model(), load_task("lambada_text"), where, limit=8).data["limit"] is None
    json.dumps(result.facts(), allow_nan=False)


def _on_a_rank(ranks, folder):
    where = Where(folder)
    found = run_task(small_model(), load_task("arc_easy"), where, ranks=ranks)
    with pytest.raises(UsageError, match="the mirror has no folder"):
        run_task(small_model(), load_task("sciq"), where, ranks=ranks)
    return found.logprobs, found.figures


@pytest.mark.ranks
def test_ranks_find_what_one_finds(tmp_path, monkeypatch):
    monkeypatch.setitem(ROWS, "arc_easy", arc(20))
    where = Where(write_mirror(tmp_path, "arc_easy"))
    alone = run_task(small_model(), load_task("arc_easy"), where)
    for logprobs, figures in run_ranks(_on_a_rank, tmp_path):
        assert figures == alone.figures
        for mine, other in zip(logprobs, alone.logprobs, strict=True):
            assert mine == pytest.approx(other, abs=1e-5)


def test_ties_go_to_the_first():
    assert best_choice([-1.0, -1.0, -2.0]) == 0
    assert best_choice([-2.0, -2.0], [1, 1]) == 0
    assert best_choice([-4.0, -2.0], [4, 2]) == 0
