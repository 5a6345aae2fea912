"""Many prompts at once against one at a time without a cache."""

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import build
from ranks import run_ranks

from summerlm.core.errors import SummerError, UsageError
from summerlm.generate import engine
from summerlm.generate.engine import LanguageModel
from summerlm.model.config import ModelConfig
from summerlm.parallel.config import ParallelConfig
from summerlm.parallel.layout import lay_out
from summerlm.tokenizer.learn import learn_bpe

TOKENIZER = learn_bpe(["the cat sat on the mat, and the dog sat on the cat. " * 20], 280)
CONTEXT = 64
VARIANTS = {
    "rope": {},
    "alibi": {"alibi": True, "rope": False, "qk_norm": False},
    "both, one key head": {"alibi": True, "kv_heads": 1},
    "neither, capped, tied": {"rope": False, "tied_embeddings": True, "logit_soft_cap": 3.0},
}


def config_of(**changes):
    values = {
        "vocabulary": TOKENIZER.vocabulary,
        "width": 32,
        "layers": 2,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 8,
        "mlp_hidden": 40,
        "context": CONTEXT,
        "init_std": 0.3,
        "zero_init_outputs": False,
    }
    return ModelConfig(**values | changes)


def make(**changes):
    return LanguageModel(build(config_of(**changes), seed=0).eval(), TOKENIZER)


@pytest.fixture(scope="module")
def lm():
    return make()


def prompts_of(count, longest=80, seed=0):
    draw = random.Random(seed)
    return [
        [TOKENIZER.bos, *(draw.randrange(5, 280) for _ in range(draw.randint(0, longest)))]
        for _ in range(count)
    ]


def alone(lm, prompt, max_tokens, stop):
    """One prompt, every token by a whole pass; stop texts are looked for in all of the text."""
    ids = list(prompt[-(lm.config.context - max_tokens) :])
    stream = lm.tokenizer.stream()
    for token in ids:
        stream.push(token)
    text = ""
    for _ in range(max_tokens):
        token = lm.logits(ids)[-1].argmax().item()
        if token == lm.tokenizer.eos:
            break
        ids.append(token)
        text += stream.push(token)
        if any(one in text for one in stop):
            break
    if not any(one in text for one in stop):
        text += stream.flush()
    return text[: min((text.find(one) for one in stop if one in text), default=len(text))]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("stop", [[], ["q", "at", "&'"]], ids=["no stop", "stops"])
def test_equals_one_at_a_time(variant, stop, monkeypatch):
    monkeypatch.setitem(engine.CACHED, "cpu", 600)  # several batches
    lm, prompts = make(**VARIANTS[variant]), prompts_of(12)
    found = lm.complete(prompts, max_tokens=20, stop=stop)
    assert found == [alone(lm, prompt, 20, stop) for prompt in prompts]
    assert len(set(map(len, found))) > 3


@settings(max_examples=10, deadline=None)
@given(
    st.integers(0, 10_000), st.integers(1, 30), st.lists(st.text("aeq t", min_size=1, max_size=3))
)
def test_equals_one_at_a_time_whatever_is_asked(seed, max_tokens, stop):
    prompts = prompts_of(4, 40, seed)
    found = SMALL.complete(prompts, max_tokens=max_tokens, stop=stop)
    assert found == [alone(SMALL, prompt, max_tokens, stop) for prompt in prompts]


SMALL = make(layers=1, alibi=True)


def test_nan_is_an_error(lm, monkeypatch):
    logits = lm.model.logits
    monkeypatch.setattr(lm.model, "logits", lambda hidden: logits(hidden) * math.nan)
    with pytest.raises(SummerError, match="NaN"):
        lm.complete(prompts_of(3), max_tokens=2)


def test_precision_is_autocasts(lm, monkeypatch):
    seen, forward = [], lm.model.forward

    def spy(*args):
        seen.append(torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu"))
        return forward(*args)

    monkeypatch.setattr(lm.model, "forward", spy)
    for precision in (None, torch.bfloat16):
        lm.complete(prompts_of(1), max_tokens=1, precision=precision)
    assert seen == [False, torch.bfloat16]


def test_who_is_done_leaves_the_batch(lm, monkeypatch):
    rows = []
    forward = lm.model.forward
    monkeypatch.setattr(
        lm.model,
        "forward",
        lambda tokens, *rest: rows.append(len(tokens)) or forward(tokens, *rest),
    )
    prompts = prompts_of(20)
    texts = lm.complete(prompts, max_tokens=20, stop=["a", "e", "t"])
    assert rows[0] == 20
    assert rows == sorted(rows, reverse=True)
    assert rows[-1] < 20
    assert not any(set(text) & set("aet") for text in texts)


def scripted(monkeypatch, lm, columns):
    """Let the rows draw these tokens, a column a step."""
    script = iter(columns)
    monkeypatch.setattr(lm, "_agree", lambda tokens: torch.tensor(next(script)))


def test_end_of_text_and_stop_texts_across_tokens(monkeypatch):
    lm, eos = make(), TOKENIZER.eos
    (a,), (q,) = TOKENIZER.encode("a"), TOKENIZER.encode("q")
    prompts = [[TOKENIZER.bos, a], [TOKENIZER.bos, q], [TOKENIZER.bos, a, a]]
    # the longest prompt is the first row; a row that is done has no place in the next column
    scripted(monkeypatch, lm, [[a, a, q], [q, eos, a], [a, q], [q]])
    assert lm.complete(prompts, max_tokens=4, stop=["qaq"]) == ["a", "", "a"]


def test_characters_are_whole(monkeypatch):
    lm = make()
    euro = TOKENIZER.encode("€")
    scripted(monkeypatch, lm, [[euro[0]], [euro[1]], [euro[2]], [euro[0]]])
    assert lm.complete([[TOKENIZER.bos]], max_tokens=4) == ["€\ufffd"]


def test_a_long_prompt_loses_its_beginning(lm, monkeypatch):
    seen = []
    forward = lm.model.forward
    monkeypatch.setattr(
        lm.model, "forward", lambda tokens, *rest: seen.append(tokens) or forward(tokens, *rest)
    )
    prompt = [TOKENIZER.bos, *range(10, 110)]
    lm.complete([prompt], max_tokens=CONTEXT - 1)
    assert seen[0].tolist() == [prompt[-1:]]
    seen.clear()
    lm.complete([prompt], max_tokens=4)
    assert seen[0].tolist() == [prompt[-(CONTEXT - 4) :]]


@pytest.mark.parametrize(
    ("prompts", "values", "message"),
    [
        ([[1]], {"max_tokens": 0}, "max_tokens = 0: should be 1 to 63"),
        ([[1]], {"max_tokens": CONTEXT}, "max_tokens = 64: should be 1 to 63"),
        ([[1]], {"max_tokens": 3, "stop": ["a", ""]}, "stop: an empty text"),
        ([[1], []], {"max_tokens": 3}, "0 tokens"),
        ([[1], [280]], {"max_tokens": 3}, "ids from 280 to 280"),
    ],
)
def test_requests_that_mean_nothing(lm, prompts, values, message):
    with pytest.raises(UsageError, match=message):
        lm.complete(prompts, **values)


def test_no_prompts(lm):
    assert lm.complete([], max_tokens=3) == []


def complete_sharded(ranks, prompts):
    parallel, cpu = ParallelConfig(shard_ranks=2), torch.device("cpu")
    layout = lay_out(config_of(), parallel, ranks, seed=0, device=cpu, dtype=None)
    layout.model.eval()

    def follow(tokens):
        return torch.tensor(ranks.exchange(tokens.tolist())[0])

    lm = LanguageModel(layout.model, TOKENIZER, agree=follow)
    return lm.complete(prompts, max_tokens=10, stop=["a"])


@pytest.mark.ranks
def test_ranks_that_hold_one_model_write_the_same(lm):
    prompts = prompts_of(8)
    found = run_ranks(complete_sharded, prompts, world=2)
    assert found[0] == found[1] == lm.complete(prompts, max_tokens=10, stop=["a"])
