"""lm-eval's own class for Hugging Face models against ours, within lm-eval and by ourselves.

The same trained weights, float32, the same tokenizer, the same items: every choice must be the same
and perplexities must agree to four digits. The model is the demo's, trained for a minute; set
SUMMERLM_TEST_RUN to a run folder to compare that one.
"""

import fcntl
import itertools
import os
import random
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from evaluation_models import export
from models import build
from rich.console import Console

import summerlm
from summerlm.eval.items import Where
from summerlm.eval.running import run_task
from summerlm.eval.task import load_task
from summerlm.generate.engine import LanguageModel
from summerlm.model.config import ModelConfig
from summerlm.recipes.demo import VOCABULARY, demo_settings, training_texts
from summerlm.recipes.opening import is_finished
from summerlm.recipes.pretrain import pretrain
from summerlm.tokenizer.learn import learn_bpe

pytestmark = [
    pytest.mark.slow,
    pytest.mark.peers("lm_eval", "transformers", "accelerate"),
    pytest.mark.timeout(1500),
]

ROOT = Path(__file__).parent.parent.parent
BUDGET_TOKENS = 300_000
ITEMS = 200
FOUR_DIGITS = 5e-5
SHOT_SEED = 1234  # lm-eval's own
STAND_IN = Path(os.environ.get("SUMMERLM_TEST_DATA", ROOT.parent / "shared" / "data"))


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    """A folder that all workers of this test session see."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "equality"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def lm(shared):
    """The demo's model; whichever worker comes first trains it."""
    if "SUMMERLM_TEST_RUN" in os.environ:
        return summerlm.load(os.environ["SUMMERLM_TEST_RUN"])
    settings = demo_settings(shared / "run", BUDGET_TOKENS)
    with (shared / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not is_finished(settings):
            learn_bpe(training_texts(), VOCABULARY).save(shared / "run" / "tokenizer")
            assert pretrain(settings, Console(quiet=True)) == 0
    return summerlm.load(shared / "run")


@pytest.fixture(scope="module")
def stock(lm, tmp_path_factory):
    """The same weights and tokenizer as stock classes of transformers."""
    return stock_classes(lm, tmp_path_factory.mktemp("stock") / "model")


def stock_classes(lm, folder):
    """Write a model for Hugging Face's classes, and read it with these."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    export(lm, folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def theirs(stock, lm):
    """Make lm-eval's class for Hugging Face models."""
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = stock

    def make(add_bos_token):
        length = lm.config.context
        options = {"max_length": length, "batch_size": 16, "add_bos_token": add_bos_token}
        return HFLM(model, tokenizer=tokenizer, **options)

    return make


@pytest.fixture(scope="module")
def ours(lm):
    from summerlm.eval.harness import HarnessModel

    return HarnessModel(lm)


@pytest.fixture(scope="module")
def mirror(tmp_path_factory):
    """The stand-in data in the hub's layout, and what they lack made of what there is; where there
    are none, items made of words of Python's library."""
    hub, folder = STAND_IN / "hub", tmp_path_factory.mktemp("hub")

    def read(repository, config, split):
        if not hub.is_dir():
            return made_up(repository, config)
        (path,) = (hub / repository / config).glob(f"{split}-*.parquet")
        return pq.read_table(path).to_pylist()

    def write(repository, config, **splits):
        (folder / repository / config).mkdir(parents=True)
        for split, rows in splits.items():
            path = folder / repository / config / f"{split}-00000-of-00001.parquet"
            pq.write_table(pa.Table.from_pylist(rows), path)

    easy, hard = (read("allenai/ai2_arc", f"ARC-{name}", "test") for name in ("Easy", "Challenge"))
    write("allenai/ai2_arc", "ARC-Easy", test=easy, train=hard)
    write("allenai/ai2_arc", "ARC-Challenge", test=hard, train=easy)
    passages = read("EleutherAI/lambada_openai", "default", "test")
    write("EleutherAI/lambada_openai", "default", test=passages)
    exam = [as_exam(row) for row in easy + hard if len(row["choices"]["text"]) == 4]
    write("cais/mmlu", "astronomy", test=exam[5 : 5 + ITEMS], dev=exam[:5])
    sums = read("openai/gsm8k", "main", "train")
    write("openai/gsm8k", "main", test=sums[:24], train=sums[100:200])
    lines = as_articles(read("Salesforce/wikitext", "wikitext-2-v1", "validation"))
    write("Salesforce/wikitext", "wikitext-2-raw-v1", test=[{"text": line} for line in lines])
    pages = [{"page": page} for page in as_pages(lines)]
    write("EleutherAI/wikitext_document_level", "wikitext-2-raw-v1", test=pages)
    return folder


def made_up(repository, config):
    """Make rows of a set's form, of unequal lengths, from words of Python's library."""
    draw = random.Random(f"{repository}/{config}")
    texts = itertools.islice(training_texts(), 60)
    words = [word for text in texts for word in re.findall(r"[A-Za-z]+", text)]

    def some(least, most):
        start = draw.randrange(len(words) - most)
        return " ".join(words[start : start + draw.randint(least, most)])

    def question(number):
        choices = {"text": [some(1, 9) for _ in range(4)], "label": list("ABCD")}
        key = draw.choice("ABCD")
        text = f"{some(4, 40)}?"
        return {"id": f"{number}", "question": text, "choices": choices, "answerKey": key}

    def article(number):
        body = [f" {some(5, 120)} . \n" for _ in range(draw.randint(1, 6))]
        return [f" = {some(1, 3)} = \n", "", *body, ""]

    if repository == "allenai/ai2_arc":
        return [question(number) for number in range(ITEMS + 50)]
    if repository == "EleutherAI/lambada_openai":
        return [{"text": some(20, 120)} for _ in range(2 * ITEMS)]
    if repository == "openai/gsm8k":
        return [{"question": some(5, 60), "answer": f"#### {n}"} for n in range(ITEMS)]
    return [{"text": line} for number in range(ITEMS + 20) for line in ["", *article(number)]]


def as_exam(row):
    """Give an item of ARC the columns of MMLU."""
    texts, labels = row["choices"]["text"], row["choices"]["label"]
    answer = labels.index(row["answerKey"])
    return {"question": row["question"], "subject": "", "choices": texts, "answer": answer}


def as_articles(rows):
    """Make articles of the sections, so that there are enough; gives lines."""
    return [re.sub(r"^ (?:= )+([^=]+?)(?: =)+ ?\n", r" = \1 = \n", row["text"]) for row in rows]


def as_pages(lines):
    """Join the lines of each article; one without words is a space, as on the hub."""
    starts = [i for i, line in enumerate(lines) if re.fullmatch(r" = [^=]+ = \n", line)]
    for start, end in zip(starts, [*starts[1:], len(lines)], strict=True):
        yield "\n".join(line.removesuffix("\n") or " " for line in lines[start:end])


@pytest.fixture
def measured(mirror, monkeypatch, tmp_path):
    """Let lm-eval measure a model on one task; gives its figures and the answers by item."""
    import datasets.config
    from lm_eval import simple_evaluate

    from summerlm.eval.harness_tasks import task_manager

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def measure(model, task, shots=0, limit=None, **more):
        found = simple_evaluate(
            model=model,
            tasks=[task],
            num_fewshot=shots,
            limit=limit,
            fewshot_random_seed=SHOT_SEED,
            task_manager=task_manager(mirror=mirror, few_shot=shots),
            bootstrap_iters=0,
            log_samples=True,
            **more,
        )
        first = {}  # one entry an item and filter; the answers are the same
        for sample in sorted(found["samples"][task], key=lambda sample: sample["doc_id"]):
            first.setdefault(sample["doc_id"], sample)
        return found["results"][task], list(first.values())

    return measure


def test_the_stock_class_computes_the_same_logits(lm, stock):
    V, context = lm.config.vocabulary, lm.config.context
    tokens = torch.randint(V, (3, context), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = lm.model.logits(lm.model(tokens)), stock[0](tokens).logits
    assert (ours - theirs).abs().max() < 2e-5
    assert ours.std() > 0.5  # there is something to agree on


@pytest.mark.parametrize("qk_norm", [True, False], ids=["qwen3", "llama"])
def test_other_shapes_export_too(qk_norm, tmp_path):
    shape = {"width": 32, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 8, "mlp_hidden": 40}
    more = {"context": 24, "init_std": 0.3, "zero_init_outputs": False, "qk_norm": qk_norm}
    model = build(ModelConfig(vocabulary=285, **shape, **more), seed=0).eval()
    tokenizer = learn_bpe(["the sun rises over a small field and every bird sings"] * 9, 285)
    stock, _ = stock_classes(LanguageModel(model, tokenizer), tmp_path / "model")
    tokens = torch.arange(24)[None] * 11
    with torch.no_grad():
        ours, theirs = model.logits(model(tokens)), stock(tokens).logits
    assert theirs.shape == (1, 24, 285)
    assert (ours - theirs).abs().max() < 2e-5 * ours.abs().max()


def test_the_stock_tokenizer_gives_the_same_ids(lm, stock, mirror):
    for text in (
        "def f(x):\n    return 'ß'",
        "A question: why?",
        " = Sun = \n \n Hot . ",
        "\U0001f43b",
    ):
        ids = lm.tokenizer.encode(text)
        assert stock[1].encode(text, add_special_tokens=True) == [lm.tokenizer.bos, *ids]
        assert stock[1].encode(text, add_special_tokens=False) == ids
        assert stock[1].decode(ids) == lm.tokenizer.decode(ids) == text


def answers(samples):
    """Log-probabilities and greedy flags, an array an item."""
    values = [np.array([value for value, _ in sample["filtered_resps"]]) for sample in samples]
    flags = [[flag for _, flag in sample["filtered_resps"]] for sample in samples]
    return values, flags


def by_characters(samples):
    """Choose as acc_norm does: log-probability a character of the choice."""
    chosen = []
    for sample, values in zip(samples, answers(samples)[0], strict=True):
        sizes = [len(text.removeprefix(" ")) for _, text in sample["arguments"]]
        chosen.append(int(np.argmax(values / np.array(sizes, dtype=float))))
    return chosen


def assert_unequal(samples):
    assert len(samples) >= ITEMS
    assert len({len(sample["arguments"][0][0]) for sample in samples}) > ITEMS / 4


def assert_figures_agree(found, expected, names):
    """Exactly for what counts choices, to four digits for what sums log-probabilities."""
    assert names
    for name in names:
        exact = name.startswith(("acc", "exact"))
        assert found[name] == pytest.approx(expected[name], rel=0 if exact else FOUR_DIGITS), name


def native(lm, task, mirror, **options):
    found = run_task(lm, load_task(task), Where(mirror=mirror), seed=SHOT_SEED, **options)
    return found.parts.get("astronomy", found)  # the one part of MMLU that there is


def by_our_names(result, names):
    """Our figures of what lm-eval calls `name,filter`."""
    return {name: result.figures[name.partition(",")[0]].value for name in names}


CHOICE = {
    "arc_easy": ("arc_easy", 0, None),
    "arc_challenge": ("arc_challenge", 0, None),
    "arc_easy_two_shots": ("arc_easy", 2, ITEMS),
    "mmlu_five_shots": ("mmlu_astronomy", 5, None),
}


@pytest.mark.parametrize(("task", "shots", "limit"), CHOICE.values(), ids=CHOICE)
def test_every_choice_is_the_same(task, shots, limit, lm, ours, theirs, measured, mirror):
    expected, their_samples = measured(theirs(add_bos_token=True), task, shots, limit)
    found, our_samples = measured(ours, task, shots, limit)
    own = native(lm, task, mirror, few_shot=shots, limit=limit)
    assert_unequal(their_samples)
    assert len(our_samples) == own.items == len(their_samples)
    their_values, their_flags = answers(their_samples)
    our_values, our_flags = answers(our_samples)
    for values in (our_values, own.logprobs):
        for mine, other in zip(values, their_values, strict=True):
            assert np.array(mine) == pytest.approx(other, abs=1e-3)
    choices = [int(np.argmax(values)) for values in their_values]
    assert [int(np.argmax(values)) for values in our_values] == own.chosen == choices
    if not task.startswith("mmlu"):  # where a small model always says the same letter
        assert len(set(choices)) > 2
    assert np.ptp([values[0] for values in their_values]) > 0.1
    assert our_flags == their_flags
    names = [name for name in expected if name.startswith("acc") and "stderr" not in name]
    assert_figures_agree(found, expected, names)
    assert_figures_agree(by_our_names(own, names), expected, names)
    if "acc_norm,none" in names:
        chosen = by_characters(their_samples)
        assert by_characters(our_samples) == own.chosen_norm == chosen != choices


def test_lambada_agrees(lm, ours, theirs, measured, mirror):
    task, limit = "lambada_openai", 2 * ITEMS
    expected, their_samples = measured(theirs(add_bos_token=True), task, limit=limit)
    found, our_samples = measured(ours, task, limit=limit)
    own = native(lm, task, mirror, limit=limit)
    assert_unequal(their_samples)
    their_values, their_flags = answers(their_samples)
    our_values, our_flags = answers(our_samples)
    assert our_flags == their_flags == [[bool(flag)] for flag in own.chosen]
    for values in (our_values, own.logprobs):
        assert np.array(values) == pytest.approx(np.array(their_values), abs=1e-3)
    names = ["perplexity,none", "acc,none"]
    assert_figures_agree(found, expected, names)
    assert_figures_agree(by_our_names(own, names), expected, names)


def test_documents_longer_than_the_context_agree(lm, ours, theirs, measured, mirror):
    expected, their_samples = measured(theirs(add_bos_token=False), "wikitext", limit=ITEMS)
    found, our_samples = measured(ours, "wikitext", limit=ITEMS)
    tokens = [len(lm.tokenizer.encode(s["target"])) for s in their_samples]
    assert len(tokens) == ITEMS
    assert len(set(tokens)) > ITEMS / 4
    assert sum(count > lm.config.context for count in tokens) > ITEMS / 4
    for mine, other in zip(our_samples, their_samples, strict=True):
        assert mine["filtered_resps"] == pytest.approx(other["filtered_resps"], rel=FOUR_DIGITS)
    names = ["word_perplexity,none", "byte_perplexity,none", "bits_per_byte,none"]
    assert_figures_agree(found, expected, names)
    own = native(lm, "wikitext2", mirror, limit=ITEMS).parts["rolling"]
    assert own.items == ITEMS
    assert_figures_agree(by_our_names(own, names), expected, names)


def test_a_second_bos_is_what_lm_evals_class_adds_to_documents(lm, ours, theirs):
    """With add_bos_token=True it asks for BOS after BOS; so it is compared without, above."""
    from types import SimpleNamespace

    from summerlm.eval.likelihood import Ask, answer

    text = "The sun rises over a small field."
    (twice,) = theirs(add_bos_token=True).loglikelihood_rolling([SimpleNamespace(args=(text,))])
    ids, bos = lm.tokenizer.encode(text), lm.tokenizer.bos
    (explained,) = answer(lm.model, [Ask((bos,), (bos, *ids))])
    (once,) = ours.loglikelihood_rolling([SimpleNamespace(args=(text,))])
    assert twice == pytest.approx(explained.logprob, abs=1e-3)
    assert abs(twice - once) > 0.1


def test_what_is_written_is_the_same(lm, ours, theirs, measured, mirror):
    most, stop = 40, ("\n\n", "Question:")
    options = {"gen_kwargs": {"max_gen_toks": most, "until": list(stop)}}
    _, their_samples = measured(theirs(add_bos_token=True), "gsm8k", **options)
    _, our_samples = measured(ours, "gsm8k", **options)
    texts = [text for sample in their_samples for (text,) in sample["resps"]]
    assert [text for sample in our_samples for (text,) in sample["resps"]] == texts
    assert len(set(texts)) > len(texts) / 2
    task = load_task("gsm8k")
    generation = task.generation.model_copy(update={"max_tokens": most, "stop": stop})
    task = task.model_copy(update={"generation": generation})
    assert run_task(lm, task, Where(mirror=mirror), few_shot=0).written == texts
