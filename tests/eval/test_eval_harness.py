"""lm-eval's requests answered by our code, beside plain loops over whole forward passes."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import build
from rich.console import Console

from summerlm.core.errors import NoCheckpointError, SourceDownError, UsageError
from summerlm.eval.windows import rolling
from summerlm.generate.engine import LanguageModel
from summerlm.model.config import ModelConfig
from summerlm.recipes.pretrain import pretrain
from summerlm.tokenizer.learn import learn_bpe

pytestmark = pytest.mark.peers("lm_eval")

CONTEXT = 24
TEXT = "the cat sat on the mat, and the dog sat on the cat. where did the cat sit? on a mat. " * 9


@pytest.fixture(scope="module")
def harness():
    """The module; lm-eval with it."""
    import summerlm.eval.harness

    return summerlm.eval.harness


@pytest.fixture(scope="module")
def harness_tasks():
    import summerlm.eval.harness_tasks

    return summerlm.eval.harness_tasks


@pytest.fixture(scope="module")
def lm():
    tokenizer = learn_bpe([TEXT], 285)
    config = ModelConfig(
        vocabulary=tokenizer.vocabulary,
        width=32,
        layers=2,
        heads=4,
        kv_heads=2,
        head_dim=8,
        mlp_hidden=40,
        context=CONTEXT,
        init_std=0.3,
        zero_init_outputs=False,
    )
    return LanguageModel(build(config, seed=0).eval(), tokenizer)


def requests(*args):
    return [SimpleNamespace(args=one) for one in args]


def plain(lm, ids, count):
    """Log-probability of the last `count` ids, and whether all are the likeliest."""
    ids = ids[-(CONTEXT + 1) :]
    logs = lm.logits(ids[:-1]).double().log_softmax(-1)[-count:]
    asked = torch.tensor(ids[-count:])
    greedy = bool((logs.argmax(-1) == asked).all())
    return logs.gather(1, asked[:, None]).sum().item(), greedy


def likeliest(lm, text, count):
    """Write on by whole forward passes; ids."""
    ids = [lm.tokenizer.bos, *lm.tokenizer.encode(text)]
    for _ in range(count):
        ids.append(lm.logits(ids)[-1].argmax().item())
    return ids[-count:]


def test_continuations_score_what_plain_loops_and_lm_evals_encoding_give(lm, harness):
    from lm_eval.api.model import TemplateLM

    bos, encode = lm.tokenizer.bos, lm.tokenizer.encode
    theirs = SimpleNamespace(tok_encode=lambda text: [bos, *encode(text)], backend="causal")
    greedy = lm.tokenizer.decode(likeliest(lm, "the dog", 1))
    pairs = [
        ("the cat sat", " on the mat"),
        ("the cat sat  ", "on the mat"),  # spaces move over
        ("the cat sat", " on"),
        ("where did the cat sit? on a mat. " * 4, " on the mat and there the dog"),  # is cut
        ("the dog", greedy),
        ("a", "b" * 20),
    ]
    found = harness.HarnessModel(lm).loglikelihood(requests(*pairs, ("", "the cat")))
    for pair, (value, flag) in zip(pairs, found, strict=False):
        context, continuation = TemplateLM._encode_pair(theirs, *pair)
        expected, is_greedy = plain(lm, context + continuation, len(continuation))
        assert (value, flag) == (pytest.approx(expected, abs=1e-4), is_greedy), pair
    assert {flag for _, flag in found} == {True, False}
    alone = encode("the cat")
    assert found[-1][0] == pytest.approx(plain(lm, [bos, *alone], len(alone))[0], abs=1e-4)


@given(tokens=st.integers(0, 50), context=st.integers(1, 12))
def test_windows_of_documents_are_lm_evals(tokens, context):
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    stream = list(range(tokens + 1))  # 0 stands for BOS
    theirs = get_rolling_token_windows(stream[1:], 0, context, 1)
    assert [
        (stream[start : first + 1], stream[first + 1 : end + 1])
        for start, first, end in rolling(len(stream), context, stride=context)
    ] == [make_disjoint_window(pair) for pair in theirs]


def test_documents_longer_than_the_context_are_scored_once_and_in_full(lm, harness):
    encode = lm.tokenizer.encode
    words = ["the", " cat"] * 40
    texts = ["", "a", *("".join(words[:n]) for n in (5, 12, 23, 24, 25, 60))]
    assert {len(encode(text)) for text in texts} > {0, 1, CONTEXT, CONTEXT + 1}
    found = harness.HarnessModel(lm).loglikelihood_rolling(requests(*((text,) for text in texts)))
    for text, value in zip(texts, found, strict=True):
        ids, total, done = [lm.tokenizer.bos, *encode(text)], 0.0, 0
        while done < len(ids) - 1:
            end = min(done + CONTEXT, len(ids) - 1)
            total += plain(lm, ids[: end + 1], end - done)[0]
            done = end
        assert value == pytest.approx(total, abs=1e-3), text


def test_writing_stops_before_stop_strings_and_keeps_the_order(lm, harness):
    prompts = ["the cat", "the dog sat on", "a", "where did the cat sit? " * 6, "mat"]
    wholes = [lm.tokenizer.decode(likeliest(lm, p, 8)) for p in prompts if len(p) < 50]
    stop = wholes[0][3:5]
    plan = [({"until": [], "max_gen_toks": 8}, None), ({"until": stop, "max_gen_toks": 8}, stop)]
    asked = [(prompt, dict(settings)) for prompt in prompts for settings, _ in plan]
    found = harness.HarnessModel(lm).generate_until(requests(*asked))
    assert len(found) == 2 * len(prompts)
    expected = iter(wholes)
    for prompt, whole, cut in zip(prompts, found[::2], found[1::2], strict=True):
        if len(prompt) < 50:
            assert whole == next(expected), prompt
        else:  # what doesn't fit loses its beginning
            kept = [lm.tokenizer.bos, *lm.tokenizer.encode(prompt)][8 - CONTEXT :]
            assert whole == lm.complete([kept], max_tokens=8, stop=[])[0]
        assert cut == whole.split(stop)[0]
    assert found[1] != found[0]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"until": [], "do_sample": True, "temperature": 1.0}, "do_sample"),
        ({"until": [], "temperature": 0.7}, "do_sample"),
        ({"until": []}, "writes up to 256 tokens, and the model reads 24"),
        ({"until": [], "max_tokens": CONTEXT}, "writes up to 24 tokens"),
    ],
)
def test_requests_that_cannot_be_met_are_refused(lm, harness, settings, words):
    with pytest.raises(UsageError, match=words):
        harness.HarnessModel(lm).generate_until(requests(("the cat", settings)))


def test_lm_evals_own_cache_takes_the_answers(lm, harness):
    model, kept = harness.HarnessModel(lm), []
    model.set_cache_hook(SimpleNamespace(add_partial=lambda *entry: kept.append(entry)))
    (value,) = model.loglikelihood(requests(("the", " cat")))
    (text,) = model.generate_until(requests(("the", {"until": [], "max_gen_toks": 3})))
    assert kept[0] == ("loglikelihood", ("the", " cat"), value)
    assert (kept[1][0], kept[1][2]) == ("generate_until", text)


@pytest.fixture
def run(tiny_settings):
    assert pretrain(tiny_settings, Console(quiet=True)) == 0
    return tiny_settings.run.folder


def test_lm_eval_finds_the_model_by_its_name_and_a_run(run, harness):
    from lm_eval.api.registry import get_model

    kind = get_model("summerlm")
    assert kind is harness.HarnessModel
    more = {"batch_size": 1, "max_batch_size": None, "device": None}
    texts = requests(("the sun", " rises"))
    made = [
        kind.create_from_arg_string(f"run={run},device=cpu", more),
        kind.create_from_arg_obj({"run": str(run)}, {"device": "cpu"}),
        kind.from_run(str(run)),
    ]
    assert len({model.loglikelihood(texts)[0] for model in made}) == 1
    with pytest.raises(UsageError, match="no run"):
        kind.create_from_arg_string("", more)
    with pytest.raises(UsageError, match="dtype"):
        kind.create_from_arg_string(f"run={run},dtype=float16", more)
    with pytest.raises((UsageError, NoCheckpointError)):
        kind.create_from_arg_string("run=nowhere", more)


QUESTIONS = [
    {
        "id": f"q{i}",
        "question": f"where did the {one} sit",
        "choices": {"text": ["on the mat", "the dog", f"on a {one}"], "label": ["A", "B", "C"]},
        "answerKey": "ABC"[i % 3],
    }
    for i, one in enumerate(["cat", "dog", "mat", "bird", "sun"])
]


def mirrored(folder, repository, config, **splits):
    """Write splits as a mirror of the hub has them."""
    place = folder / repository / config
    place.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        pq.write_table(pa.Table.from_pylist(rows), place / f"{split}-00000-of-00001.parquet")
    return folder


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No network, and a cache of its own."""
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def own_task(tmp_path, offline):
    """A folder with a task of the user's, its data in a file beside it."""
    folder = tmp_path / "own"
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(QUESTIONS), folder / "items.parquet")
    task = {
        "task": "where_they_sit",
        "dataset_path": "parquet",
        "dataset_kwargs": {"data_files": {"test": str(folder / "items.parquet")}},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "{{question}}?",
        "doc_to_target": "{{choices.label.index(answerKey)}}",
        "doc_to_choice": "{{choices.text}}",
    }
    (folder / "where.yaml").write_text(json.dumps(task))  # JSON is YAML
    return folder


@pytest.mark.slow
def test_a_task_of_the_users_by_file_and_by_folder(lm, harness, harness_tasks, own_task):
    evaluate = harness_tasks.evaluate_with_harness
    by_file = evaluate(lm, [str(own_task / "where.yaml")], seed=5)
    assert by_file["config"]["fewshot_seed"] == 5
    by_folder = evaluate(lm, [str(own_task)])
    asked = [(f"{q['question']}?", f" {text}") for q in QUESTIONS for text in q["choices"]["text"]]
    values = harness.HarnessModel(lm).loglikelihood(requests(*asked))
    scores = torch.tensor([value for value, _ in values]).view(-1, 3)
    right = torch.tensor(["ABC".index(q["answerKey"]) for q in QUESTIONS])
    for found in (by_file, by_folder):
        accuracy = found["results"]["where_they_sit"]["acc,none"]
        assert accuracy == pytest.approx((scores.argmax(1) == right).double().mean().item())
        assert found["results"]["where_they_sit"]["sample_len"] == 5
        assert not found.keys() & set(harness_tasks.OF_THE_DAY)


@pytest.mark.slow
def test_a_mirror_takes_the_hubs_place(lm, harness_tasks, tmp_path, offline):
    evaluate, path = harness_tasks.evaluate_with_harness, tmp_path / "hub"
    mirrored(path, "allenai/ai2_arc", "ARC-Easy", test=QUESTIONS)
    found = evaluate(lm, ["arc_easy"], mirror=path, limit=4)
    assert found["n-samples"]["arc_easy"] == {"original": 5, "effective": 4}
    assert 0 <= found["results"]["arc_easy"]["acc_norm,none"] <= 1
    with pytest.raises(UsageError, match=r"arc_easy: .* split 'train'"):
        evaluate(lm, ["arc_easy"], mirror=path, few_shot=2)
    with pytest.raises(UsageError, match=r"arc_challenge: no file .*ARC-Challenge.*hf download"):
        evaluate(lm, ["ai2_arc"], mirror=path)  # a tag, of both
    mirrored(path, "allenai/ai2_arc", "ARC-Easy", train=QUESTIONS[::-1])
    shots = evaluate(lm, ["arc_easy"], mirror=path, few_shot=2)
    assert shots["n-shot"]["arc_easy"] == 2
    assert shots["config"]["fewshot_seed"] == 1234


@pytest.mark.slow
def test_a_group_reads_the_mirror(lm, harness_tasks, tmp_path, offline):
    rows = [
        {"question": q["question"], "choices": [*q["choices"]["text"], "no"], "answer": 1}
        for q in QUESTIONS
    ]
    path = tmp_path / "hub"
    for part in ("astronomy", "virology"):
        mirrored(path, "cais/mmlu", part, test=rows, dev=rows)
    names = ["mmlu_astronomy", "mmlu_virology"]
    group = tmp_path / "own" / "pair.yaml"
    group.parent.mkdir()
    means = [{"metric": "acc"}]
    group.write_text(json.dumps({"group": "pair", "task": names, "aggregate_metric_list": means}))
    found = harness_tasks.evaluate_with_harness(lm, [str(group.parent)], mirror=path, few_shot=5)
    assert found["groups"].keys() == {"pair"}
    assert found["results"]["pair"]["sample_len"] == 2 * len(rows)
    assert found["groups"]["pair"]["acc,none"] == found["results"]["mmlu_virology"]["acc,none"]


@pytest.mark.slow
def test_what_lm_eval_does_not_have(lm, harness_tasks, offline, tmp_path):
    evaluate = harness_tasks.evaluate_with_harness
    with pytest.raises(UsageError, match=r"no task 'arc_esay'; did you mean arc_easy\?"):
        evaluate(lm, ["arc_esay"])
    with pytest.raises(UsageError, match=r"no task '.*gone.yaml'"):
        evaluate(lm, [str(tmp_path / "gone.yaml")])
    with pytest.raises(SourceDownError, match=r"arc_easy: .*a mirror is needed"):
        evaluate(lm, ["arc_easy"])  # without network


@pytest.mark.slow
def test_lm_evals_own_command(run, own_task, tmp_path):
    command = [sys.executable, "-m", "summerlm.eval.harness", "--model", "summerlm"]
    options = ["--model_args", f"run={run},device=cpu", "--tasks", str(own_task / "where.yaml")]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "|where_they_sit|" in done.stdout
