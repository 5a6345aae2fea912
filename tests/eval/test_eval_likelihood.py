"""Answers against one whole pass in float64 for each ask; what is read, and how often."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import build
from ranks import run_ranks

from summerlm.core.errors import UsageError
from summerlm.eval import likelihood
from summerlm.eval.likelihood import Answer, Ask, answer
from summerlm.eval.sharing import Query, Row, common, deal, plan
from summerlm.model.bias import key_channels
from summerlm.model.config import ModelConfig
from summerlm.model.kernels import Branches, Channelled, Masked, Memory
from summerlm.model.transformer import Positions
from summerlm.parallel.config import ParallelConfig
from summerlm.parallel.layout import lay_out

V, CONTEXT = 50, 200
VARIANTS = {
    "rope": {},
    "alibi": {"alibi": True, "rope": False, "qk_norm": False},
    "both, one key head": {"alibi": True, "kv_heads": 1},
    "neither, capped, tied": {"rope": False, "tied_embeddings": True, "logit_soft_cap": 3.0},
    "odd shapes": {"heads": 3, "kv_heads": 3, "head_dim": 6, "width": 22, "mlp_bias": True},
}


def config_of(**changes):
    values = {
        "vocabulary": V,
        "width": 16,
        "layers": 2,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 4,
        "mlp_hidden": 24,
        "context": CONTEXT,
        "init_std": 0.3,
        "zero_init_outputs": False,
    }
    return ModelConfig(**values | changes)


@pytest.fixture(scope="module")
def model():
    return build(config_of(), seed=0)


def reference(model, asks):
    """One pass a question, whole, in float64."""
    exact = type(model)(model.config)
    exact.load_state_dict(model.state_dict())
    exact.eval().double()
    answers = []
    for ask in asks:
        ids = (*ask.context, *ask.continuation)[-model.config.context - 1 :]
        count = len(ask.continuation)
        targets = torch.tensor(ids[-count:])
        with torch.no_grad():
            hidden = exact(torch.tensor([ids[:-1]]))[0, -count:]
            logits = (hidden @ exact.head_weight.T)[:, : model.config.vocabulary]
            cap = model.config.logit_soft_cap
            logits = logits if cap is None else cap * torch.tanh(logits / cap)
        scores = logits.log_softmax(-1)
        greedy = bool((scores.argmax(-1) == targets).all())
        answers.append(Answer(scores.gather(1, targets[:, None]).sum().item(), greedy))
    return answers


def assert_answers(model, asks, found):
    expected = reference(model, asks)
    for one, other in zip(found, expected, strict=True):
        assert one.logprob == pytest.approx(other.logprob, rel=1e-5, abs=1e-5)
        assert one.greedy == other.greedy


def questions(seed=0):
    """Few-shot questions, short ones with options, passages; some longer than the context."""
    draw = random.Random(seed)

    def text(low, high):
        return tuple(draw.randrange(V) for _ in range(draw.randint(low, high)))

    shots, asks = text(90, 90), []
    for start in (shots, (), (), text(20, 20)):
        for _ in range(6):
            question = (0, *start, *text(1, 25))
            asks += [Ask(question, text(1, 6)) for _ in range(4)]
    asks += [Ask((0,), text(30, 60)), Ask(text(190, 230), text(5, 9)), Ask((0,), text(200, 200))]
    asks += [Ask(asks[0].context, (t,)) for t in range(5)]
    asks += [Ask((0, *shots), text(1, 6)) for _ in range(2)]  # no longer than what all share
    passage = text(80, 80)
    asks += [Ask((0, *passage, *text(1, 9)), text(1, 6)) for _ in range(3)]
    asks += asks[:3]
    draw.shuffle(asks)
    return asks


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("batch_tokens", [1, 300, None])
def test_equals_one_whole_pass_each(variant, batch_tokens):
    model = build(config_of(**VARIANTS[variant]), seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.fill_(0.1)  # a bias begins at zero, where it does nothing yet
    asks = questions()
    assert_answers(model, asks, answer(model, asks, batch_tokens=batch_tokens))


def test_scores_are_made_a_few_at_a_time(model, monkeypatch):
    monkeypatch.setattr(likelihood, "LOGIT_ROWS", 3)
    asks = questions()
    assert_answers(model, asks, answer(model, asks))


def test_the_likeliest_continuation_is_greedy(model):
    model.eval()
    ids = [0, 7]
    with torch.no_grad():
        for _ in range(5):
            ids.append(model.logits(model(torch.tensor([ids])))[0, -1].argmax().item())
    right = Ask((0, 7), tuple(ids[2:]))
    wrong = Ask((0, 7), (*ids[2:6], (ids[6] + 1) % V))
    assert [one.greedy for one in answer(model, [right, wrong])] == [True, False]


texts = st.lists(st.integers(0, 2), min_size=1, max_size=9).map(tuple)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.builds(Ask, texts, texts), min_size=1, max_size=14),
    st.integers(1, 60),
    st.lists(st.integers(0, 2), max_size=80).map(tuple),
)
def test_anything_that_begins_alike(asks, batch_tokens, shots):
    """Three ids only: contexts begin alike, contain each other, and end in each other."""
    model = SMALL
    asks = [Ask((*shots, *ask.context), ask.continuation) for ask in asks]
    assert_answers(model, asks, answer(model, asks, batch_tokens=batch_tokens))


SMALL = build(config_of(alibi=True, context=60), seed=1)


def test_what_stands_beside_an_ask_changes_nothing_but_rounding(model):
    """Neither padding nor other branches are read."""
    asks = questions()
    together = answer(model, asks, batch_tokens=4096)
    for number in range(0, len(asks), 7):
        (alone,) = answer(model, [asks[number]])
        assert alone.logprob == pytest.approx(together[number].logprob, rel=2e-6)


@pytest.mark.parametrize("alibi", [False, True])
def test_padding_and_other_branches_change_no_bit(alibi):
    """What a token reads is decided by the tree alone: others' ids are free."""
    model = build(config_of(alibi=alibi), seed=0).eval()
    trunk, first, second = (1, 2, 3), (4, 5), (6, 7, 8)
    row = Row([Query(0, (*trunk, *first, 9), 3), Query(1, (*trunk, *second, 9), 4)], 0)
    assert row.tokens == [*trunk, *first, *second]
    positions = torch.tensor([[*row.positions, 0, 0]])
    branches = Branches(positions, torch.tensor([[*row.ends, 9, 10]]))
    with torch.no_grad():
        before = model(torch.tensor([[*row.tokens, 0, 0]]), branches=branches)
        changed = torch.tensor([[1, 2, 3, 4, 5, 30, 31, 32, 33, 34]])
        after = model(changed, branches=branches)
    same = (before == after).all(-1)[0].tolist()
    assert same == [True] * 5 + [False] * 5


@pytest.mark.parametrize("alibi", [False, True])
def test_both_frames_of_branches_agree(alibi):
    """GPUs take channels and a mask, CPUs a matrix; here both run on the CPU."""
    torch.manual_seed(0)
    config = config_of(alibi=alibi)
    positions = Positions(config)
    queries = [Query(0, (1, 2, 3, 4, 9), 2), Query(1, (1, 2, 5, 6, 7, 9), 4)]
    row = Row(queries, 0)
    T = len(row.tokens)
    branches = Branches(torch.tensor([row.positions]), torch.tensor([row.ends]))
    masked = positions.branch(branches, 0)
    assert type(masked) is Masked
    shapes = [(1, T, heads, 4) for heads in (4, 2, 2)]
    q, k, v = (torch.randn(shape) for shape in shapes)
    keys = key_channels(branches.positions, torch.zeros_like(branches.positions))
    other = Channelled(
        masked.cos, masked.sin, positions.query_channels, keys, "sdpa", branches.readable(0)
    )
    expected = masked.attend(q, k, v, Memory(), 0.0)
    torch.testing.assert_close(other.attend(q, k, v, Memory(), 0.0), expected, rtol=1e-4, atol=1e-5)


def positions_of(queries, batch_tokens=1024):
    units = plan(queries, batch_tokens, 1)
    return sum(unit.size for unit in units), units


def test_a_question_is_read_once_for_its_options():
    question = tuple(range(30))
    queries = [Query(i, (*question, 40 + i, 45, 46), 3) for i in range(4)]
    size, units = positions_of(queries)
    assert size == 30 + 4 * 2  # the last id isn't read
    assert [unit.passes for unit in units] == [1]


def test_options_of_one_token_cost_nothing():
    queries = [Query(i, (*range(30), 40 + i), 1) for i in range(10)]
    assert positions_of(queries)[0] == 30


def test_examples_are_read_once_for_all_questions():
    shots = (0,) * 500
    queries = [
        Query(4 * i + j, (*shots, *range(i, i + 20), 99 - j), 1)
        for i in range(1, 21)
        for j in range(4)
    ]
    size, (unit,) = positions_of(queries)
    assert unit.prefix == shots
    assert size == 500 + 20 * 20
    # few contexts aren't worth a pass: they stand in one row
    size, units = positions_of(queries[:8])
    assert [unit.prefix for unit in units] == [()]
    assert size == 500 + 2 * 20


def test_an_ask_that_is_repeated_is_answered_once(model, monkeypatch):
    seen = []
    forward = model.forward
    monkeypatch.setattr(
        model, "forward", lambda tokens, **rest: seen.append(tokens) or forward(tokens, **rest)
    )
    ask = Ask((0, 1, 2), (3, 4))
    first, *others = answer(model, [ask] * 5)
    assert others == [first] * 4
    assert [tokens.tolist() for tokens in seen] == [[[0, 1, 2, 3]]]


def test_passes_keep_to_their_budget():
    draw = random.Random(0)
    queries = [
        Query(i, tuple(draw.randrange(V) for _ in range(draw.randint(2, 120))), 1)
        for i in range(200)
    ]
    for unit in plan(queries, 256, 1):
        for batch in unit.batches:
            assert batch.size <= 256
    slots = [
        target.slot
        for unit in plan(queries, 256, 1)
        for batch in unit.batches
        for row in batch.rows
        for target in row.targets
    ]
    assert sorted(slots) == list(range(200))


def test_ranks_get_about_the_same():
    queries = [
        Query(i, ((0,) * 300 + tuple(random.Random(i).choices(range(V), k=40))), 1)
        for i in range(100)
    ]
    units = plan(queries, 512, 4)
    hands = deal(units, 4)
    sizes = [sum(unit.size for unit in hand) for hand in hands]
    assert len(units) >= 4
    assert max(sizes) < 2 * min(sizes)


def test_matrices_are_packed_where_that_is_fast_and_only_meanwhile(model, monkeypatch):
    """To the bit the same before and after; float32's own rounding between."""
    counted = []
    forward = model.forward

    def spy(tokens, **rest):
        counted.append(sum("forward" in vars(m) for m in model.blocks.modules()))
        return forward(tokens, **rest)

    monkeypatch.setattr(model, "forward", spy)
    answer(model, [Ask((0,), (1,))])
    answer(model, [Ask((0,), (1,))], precision=torch.bfloat16)
    linears = 4 * model.config.layers
    assert counted == [linears if torch.backends.mkldnn.is_available() else 0, 0]
    assert not any("forward" in vars(module) for module in model.blocks.modules())
    assert "unembed" not in vars(model)


@given(texts, texts)
def test_common_beginnings(one, other):
    expected = 0
    while expected < min(len(one), len(other)) and one[expected] == other[expected]:
        expected += 1
    assert common(one, other) == expected


def test_training_mode_comes_back_and_dropout_is_off():
    model = build(config_of(dropout=0.5), seed=0)
    model.train()
    asks = questions()[:10]
    first, second = answer(model, asks), answer(model, asks)
    assert first == second
    assert model.training
    model.blocks[1].forward = lambda *_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        answer(model, asks)
    assert model.training


def test_precision_is_autocasts(model):
    asks = questions()[:40]
    exact, rounded = answer(model, asks), answer(model, asks, precision=torch.bfloat16)
    for one, other in zip(exact, rounded, strict=True):
        assert one.logprob == pytest.approx(other.logprob, rel=0.05, abs=0.2)
    assert exact != rounded


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (Ask((), (1,)), "ask 1: the context is empty"),
        (Ask((0,), ()), "ask 1: the continuation is empty"),
        (Ask((0,), (1,) * (CONTEXT + 1)), f"{CONTEXT + 1} tokens, the model reads {CONTEXT}"),
        (Ask((0, V), (1,)), f"ids from 0 to {V}; the model knows 0 to {V - 1}"),
        (Ask((0,), (-1,)), "ids from -1 to 0"),
    ],
)
def test_what_has_no_answer(model, ask, message):
    with pytest.raises(UsageError, match=message):
        answer(model, [Ask((0,), (1,)), ask])


def test_nothing_asked(model):
    assert answer(model, []) == []


def shared_answers(ranks, asks, shards):
    parallel, cpu = ParallelConfig(shard_ranks=shards), torch.device("cpu")
    layout = lay_out(config_of(), parallel, ranks, seed=0, device=cpu, dtype=None)
    first = answer(layout.model, asks[:1], ranks=ranks)  # one pass, and ranks without work
    return first + answer(layout.model, asks, batch_tokens=256, ranks=ranks)


@pytest.mark.ranks
@pytest.mark.parametrize("layout", ["replicated", "sharded"])
def test_ranks_that_share_the_work_find_what_one_finds(layout):
    asks = questions()
    found = run_ranks(shared_answers, asks, 2 if layout == "sharded" else 1, world=2)
    assert found[0] == found[1]
    assert_answers(build(config_of(), seed=0), asks[:1] + asks, found[0])
