import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from summerlm.data.shards import rows as reasons
from summerlm.data.shards.rows import Dropped, dialogue, plain_text, turns


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_text_is_kept_as_it_stands(text: str) -> None:
    expected = text if text.strip() else reasons.EMPTY
    assert plain_text(text) == expected
    assert plain_text(text.encode()) == expected


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        (None, reasons.NULL),
        ("", reasons.EMPTY),
        (" \r\n\t\u2003", reasons.EMPTY),
        (b"\n", reasons.EMPTY),
        (b"caf\xe9", reasons.BAD_UTF8),
        (b"\xed\xa0\x80", reasons.BAD_UTF8),  # a surrogate, encoded as no encoder may
        ("a\ud800b", reasons.SURROGATE),
        ("\udfff", reasons.SURROGATE),
        (7, reasons.WRONG_TYPE),
        (True, reasons.WRONG_TYPE),
        (["text"], reasons.WRONG_TYPE),
    ],
)
def test_what_is_no_text(value: object, fault: Dropped) -> None:
    assert plain_text(value) is fault


@pytest.mark.parametrize(
    "turns",
    [
        [{"from": "system", "value": " Be brief. "}, {"from": "human", "value": "Hi\n"}],
        [{"role": "system", "content": " Be brief. "}, {"role": "human", "content": "Hi\n"}],
        [
            {"from": b"system", "value": b" Be brief. ", "weight": 0.0},
            {"role": b"human", "content": b"Hi\n"},
        ],
    ],
)
def test_dialogue_is_written_as_the_original_did(turns: object) -> None:
    assert dialogue(turns) == "\nSYSTEM:  Be brief. \nHUMAN: Hi\n"


def test_a_blank_turn_is_no_fault_beside_others() -> None:
    blank, full = {"from": "system", "value": ""}, {"from": "gpt", "value": "Yes"}
    assert dialogue([blank, full]) == "\nSYSTEM: \nGPT: Yes"
    assert dialogue([full, blank]) == "\nGPT: Yes\nSYSTEM: "


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        (None, reasons.NULL),
        ([], reasons.EMPTY),
        ([{"from": "gpt", "value": " "}], reasons.EMPTY),
        ("\nHUMAN: Hi", reasons.WRONG_TYPE),
        ({"from": "gpt", "value": "Hi"}, reasons.WRONG_TYPE),
        (["Hi"], reasons.WRONG_TYPE),
        ([None], reasons.WRONG_TYPE),
        ([{"from": "gpt", "content": "Hi"}], reasons.WRONG_TYPE),
        ([{"role": "user", "content": [{"type": "text"}]}], reasons.WRONG_TYPE),
        ([{"from": "gpt", "value": None}], reasons.NULL),
        ([{"from": None, "value": "Hi"}], reasons.NULL),
        ([{"from": "gpt", "value": b"\xff"}], reasons.BAD_UTF8),
        ([{"from": "gpt", "value": "ok"}, {"from": "gpt", "value": "\ud800"}], reasons.SURROGATE),
    ],
)
def test_what_is_no_dialogue(value: object, fault: Dropped) -> None:
    assert dialogue(value) is fault
    assert turns(value) is fault


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)


@given(st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), texts), min_size=1))
def test_turns_are_json_that_gives_every_role_and_text(talk: list[tuple[str, str]]) -> None:
    names = {"system": "System", "user": "human", "assistant": "gpt"}
    shared = turns([{"from": names[role], "value": text} for role, text in talk])
    opened = turns([{"role": role, "content": text.encode()} for role, text in talk])
    assert shared == opened
    assert json.loads(shared) == [list(turn) for turn in talk]


@pytest.mark.parametrize("speaker", ["narrator", "", "tool", "user "])
def test_a_role_that_no_chat_template_has(speaker: str) -> None:
    talk = [{"from": "gpt", "value": "Hi"}, {"from": speaker, "value": "Ho"}]
    assert turns(talk) is reasons.WRONG_TYPE
    assert dialogue(talk) == f"\nGPT: Hi\n{speaker.upper()}: Ho"
