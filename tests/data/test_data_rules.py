"""The catalogue of rules, and texts on their way through the asked ones."""

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from summerlm.core.errors import UsageError
from summerlm.data.rules.catalogue import GROUPS, OF_THE_WHOLE, RULES, expand
from summerlm.data.rules.contamination import ContaminationIndex
from summerlm.data.rules.pipeline import TOO_LONG, TOO_SHORT, Cleaned, Rules
from summerlm.data.rules.scrubbing import EMAIL, SECRET
from summerlm.data.shards.rows import Dropped

PROSE = (
    "The old harbour lay quiet that morning, and the boats with their folded sails seemed to be "
    "asleep. A woman walked along the wall; she had come to look for a letter, as people have "
    "always done in places where ships arrive. Nobody spoke of the storm, though everyone could "
    "still hear it somewhere behind the hills."
)
QUIZ = ContaminationIndex([("quiz", ["People have always done in places where ships arrive"])])
KEY = "AKIA" + "QWERTYUIOPASDFGH"  # no key of anyone


def test_names_are_those_of_the_settings():
    assert list(RULES) == [
        "gopher-words",
        "gopher-word-length",
        "gopher-symbols",
        "gopher-bullets",
        "gopher-ellipses",
        "gopher-letters",
        "gopher-stop-words",
        "gopher-duplicate-lines",
        "gopher-duplicate-line-characters",
        "gopher-duplicate-paragraphs",
        "gopher-duplicate-paragraph-characters",
        *(f"gopher-top-{n}-grams" for n in (2, 3, 4)),
        *(f"gopher-duplicate-{n}-grams" for n in range(5, 11)),
        "exact-duplicates",
        "near-duplicates",
        "contamination",
        "emails",
        "secrets",
    ]
    assert all(sentence.endswith(".") for sentence in RULES.values())
    assert set(OF_THE_WHOLE) == {"exact-duplicates", "near-duplicates"}


def test_groups_stand_for_their_rules():
    gopher = [name for name in RULES if name.startswith("gopher-")]
    assert expand(["gopher"]) == tuple(gopher)
    assert expand(["gopher-quality"]) == tuple(gopher[:7])
    assert expand(["gopher-repetition"]) == tuple(gopher[7:])
    assert not set(GROUPS) & set(RULES)


@given(st.lists(st.sampled_from([*RULES, *GROUPS])))
def test_expanding_gives_each_rule_once_in_order(names):
    rules = expand(names)
    assert expand(rules) == rules == expand(reversed(names))
    assert sorted(rules, key=list(RULES).index) == list(rules)
    assert len(set(rules)) == len(rules)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("gopher-wrds", "gopher-words"),
        ("Emails", "emails"),
        ("exact-duplicate", "exact-duplicates"),
        ("gophers", "gopher"),
        ("", "secrets"),
    ],
)
def test_an_unknown_name_is_told_its_nearest(name, nearest):
    with pytest.raises(UsageError, match=rf'^no rule "{name}"; did you mean {nearest}'):
        expand(["emails", name])
    with pytest.raises(UsageError, match="no rule"):
        Rules([name])


def test_no_rules_change_nothing():
    assert Rules([])("x") == Cleaned("x", {})
    assert Rules([])("") == Cleaned("", {})


def test_a_kept_text_is_changed_and_the_changes_counted():
    text = f"{PROSE} ann@mail.org bob@mail.org {KEY}"
    assert Rules(["gopher", "emails", "secrets"])(text) == Cleaned(
        f"{PROSE} {EMAIL} {EMAIL} {SECRET}", {"emails": 2, "secrets": 1}
    )
    assert Rules(["secrets"])(text).changes == {"secrets": 1}
    assert Rules(["gopher", "emails", "secrets"])(PROSE) == Cleaned(PROSE, {})


def test_the_first_rule_that_hits_is_the_reason():
    rules = Rules(["emails", "contamination", "gopher-stop-words", "gopher-words"], QUIZ, 5, 1000)
    assert rules("Hi") == Cleaned(Dropped(TOO_SHORT), {})
    assert rules("Write to ann@mail.org") == Cleaned(Dropped("gopher-words"), {})
    assert rules("word " * 60) == Cleaned(Dropped("gopher-stop-words"), {})
    assert rules(PROSE) == Cleaned(Dropped("contamination"), {})
    bullets = Rules(["gopher-stop-words", "gopher-bullets"])
    assert bullets("- x\n" * 60) == Cleaned(Dropped("gopher-bullets"), {})
    assert rules(PROSE * 4) == Cleaned(Dropped(TOO_LONG), {})
    assert rules(PROSE.replace("ships", "boats")).text == PROSE.replace("ships", "boats")


def test_lengths_are_in_characters_and_include_their_ends():
    rules = Rules([], None, 3, 5)
    assert [rules("é" * n).text for n in range(2, 7)] == [
        Dropped("shorter than min_characters"),
        "ééé",
        "éééé",
        "ééééé",
        Dropped("longer than max_characters"),
    ]


def test_a_report_gets_every_reason():
    rules = Rules(["gopher", "contamination"], QUIZ, None, 40)
    text = "people have always done in places where ships arrive"
    assert list(rules.failing(text)) == [
        TOO_LONG,
        "gopher-words",
        "gopher-stop-words",
        "contamination",
    ]


def test_rules_of_the_whole_are_not_asked_of_a_text():
    assert Rules(["exact-duplicates", "near-duplicates"])("a") == Cleaned("a", {})


def test_contamination_is_asked_by_name_and_needs_its_sets():
    assert Rules([], QUIZ)(PROSE).text == PROSE
    with pytest.raises(AssertionError):
        Rules(["contamination"])


def test_rules_travel_to_another_process():
    rules = Rules(["gopher", "contamination", "emails", "secrets"], QUIZ, 2, 5000)
    copy = pickle.loads(pickle.dumps(rules))
    for text in (PROSE, "x", "", f"a@b.org {PROSE[:150]}", f"{PROSE[:250]} ann@mail.org {KEY}"):
        assert copy(text) == rules(text)
