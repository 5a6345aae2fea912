"""Prompts to text: what is written, when it stops, what is refused."""

import inspect

import pytest
import torch
from models import build

from summerlm.core.errors import UsageError
from summerlm.generate.engine import LanguageModel
from summerlm.model.config import ModelConfig
from summerlm.tokenizer.learn import learn_bpe
from summerlm.tokenizer.mistral import mistral_v3

CONTEXT = 32


@pytest.fixture(scope="module")
def tokenizer():
    return learn_bpe(["the cat sat on the mat, and the dog sat on the cat. " * 20], 280)


@pytest.fixture(scope="module")
def lm(tokenizer):
    config = ModelConfig(
        vocabulary=tokenizer.vocabulary,
        width=32,
        layers=2,
        heads=4,
        kv_heads=2,
        head_dim=8,
        mlp_hidden=40,
        context=CONTEXT,
        alibi=True,
        init_std=0.3,
        zero_init_outputs=False,
    )
    return LanguageModel(build(config, seed=0).eval(), tokenizer)


def test_greedy_is_the_argmax_of_the_whole_forward(lm):
    ids = [lm.tokenizer.bos, *lm.tokenizer.encode("the cat")]
    written = []
    for _ in range(12):
        written.append(lm.logits(ids + written)[-1].argmax().item())
    stream = lm.tokenizer.stream()
    for token in ids:
        stream.push(token)
    expected = "".join(map(stream.push, written)) + stream.flush()
    assert lm.generate("the cat", max_tokens=12, temperature=0, stop_at_eos=False) == expected


def test_the_request_decides_the_text(lm):
    texts = [lm.generate("the", max_tokens=20, seed=seed, temperature=2.0) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    state = torch.get_rng_state()
    lm.generate("the", max_tokens=3)
    assert torch.equal(torch.get_rng_state(), state)  # nobody else's random numbers


@pytest.mark.parametrize("prompt", ["", "the", "é", " the"])
def test_pieces_join_to_the_text(lm, prompt):
    values = {"max_tokens": 25, "temperature": 1.5, "top_k": 50, "top_p": 0.95, "seed": 4}
    assert "".join(lm.stream(prompt, **values)) == lm.generate(prompt, **values)


def scripted(monkeypatch, tokens):
    """Let the sampler give these tokens, one a call."""
    script = iter(tokens)
    monkeypatch.setattr(
        "summerlm.generate.engine.sample", lambda logits, **_: torch.tensor([next(script)])
    )
    return script


def test_eos_ends_the_text(lm, monkeypatch):
    the, eos = lm.tokenizer.encode("the")[0], lm.tokenizer.eos
    script = scripted(monkeypatch, [the, eos, the])
    assert lm.generate("cat", max_tokens=3) == lm.tokenizer.decode([the])
    assert list(script) == [the]
    scripted(monkeypatch, [the, eos, the])
    text = lm.generate("cat", max_tokens=3, stop_at_eos=False)
    assert text == lm.tokenizer.decode([the, the])


def test_the_first_word_keeps_its_space(monkeypatch):
    """Mistral's vocabulary drops a text's first space, but a completion goes on after a prompt."""
    tokenizer = mistral_v3()
    config = ModelConfig(
        vocabulary=tokenizer.vocabulary,
        width=8,
        layers=1,
        heads=1,
        kv_heads=1,
        head_dim=8,
        mlp_hidden=8,
        context=16,
    )
    lm = LanguageModel(build(config, seed=0).eval(), tokenizer)
    sat = tokenizer.encode("sat")
    for prompt, text in (("the cat", " sat"), ("", "sat")):
        scripted(monkeypatch, sat)
        assert lm.generate(prompt, max_tokens=len(sat)) == text


def test_pieces_are_whole_characters(lm, monkeypatch):
    euro = lm.tokenizer.encode("€")
    assert len(euro) == 3
    scripted(monkeypatch, euro + euro[:1])
    assert list(lm.stream("cat", max_tokens=4)) == ["", "", "€", "", "\ufffd"]


def test_writing_stops_when_the_context_is_full(lm, monkeypatch):
    a = lm.tokenizer.encode("q")
    prompt = "q" * 10
    T = 1 + len(lm.tokenizer.encode(prompt))
    scripted(monkeypatch, a * 100)
    assert lm.generate(prompt, max_tokens=1000) == "q" * (CONTEXT - T + 1)
    full = "q" * (10 + CONTEXT - T)
    scripted(monkeypatch, a * 100)
    assert lm.generate(full, max_tokens=1000) == "q"
    with pytest.raises(UsageError, match=rf"{CONTEXT + 1} tokens, BOS included.*1 to {CONTEXT}"):
        lm.generate(full + "q")


def test_special_tokens_in_a_prompt_are_text(lm, monkeypatch):
    seen = []
    forward = lm.model.forward

    def spy(tokens, *args, **kwargs):
        seen.append(tokens[0].tolist())
        return forward(tokens, *args, **kwargs)

    monkeypatch.setattr(lm.model, "forward", spy)
    lm.generate("<s></s>", max_tokens=1)
    assert seen[0][0] == lm.tokenizer.bos
    assert not set(seen[0][1:]) & set(lm.tokenizer.specials.values())


def test_a_pass_reads_only_what_is_new(lm, monkeypatch):
    lengths = []
    forward = lm.model.forward

    def spy(tokens, *args, **kwargs):
        lengths.append(tokens.shape[1])
        return forward(tokens, *args, **kwargs)

    monkeypatch.setattr(lm.model, "forward", spy)
    lm.generate("q" * 5, max_tokens=4, stop_at_eos=False)
    assert lengths == [6, 1, 1, 1]


def test_logits(lm):
    ids = [3, 1, 4, 1, 5]
    logits = lm.logits(ids)
    assert logits.shape == (5, lm.tokenizer.vocabulary)
    assert logits.dtype == torch.float32
    assert not logits.requires_grad
    with torch.no_grad():
        expected = lm.model.logits(lm.model(torch.tensor([ids])))[0]
    assert torch.equal(logits, expected)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "0 tokens"),
        ([1] * (CONTEXT + 1), f"{CONTEXT + 1} tokens"),
        ([1, 10**6], "ids from 1 to 1000000"),
        ([-1], "ids from -1 to -1"),
    ],
)
def test_ids_that_mean_nothing(lm, ids, message):
    with pytest.raises(UsageError, match=message):
        lm.logits(ids)


@pytest.mark.parametrize("values", [{"max_tokens": 0}, {"temperature": -1.0}, {"top_p": 2.0}])
def test_requests_that_mean_nothing(lm, values):
    with pytest.raises(UsageError, match=f"{next(iter(values))} = "):
        lm.stream("the", **values)  # at the call, not at the first piece


def test_model_and_tokenizer_must_belong_together(lm):
    other = learn_bpe(["other text " * 20], 270)
    with pytest.raises(UsageError, match=r"knows 280 tokens, the tokenizer 270"):
        LanguageModel(lm.model, other)


def test_a_model_in_training_is_our_bug(lm):
    lm.model.train()
    try:
        with pytest.raises(AssertionError, match="eval"):
            lm.logits([1])
    finally:
        lm.model.eval()


def test_generate_and_stream_take_the_same():
    generate, stream = (
        inspect.signature(f) for f in (LanguageModel.generate, LanguageModel.stream)
    )
    assert generate.parameters == stream.parameters
