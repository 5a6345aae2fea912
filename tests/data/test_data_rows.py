import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from summerlm.data.shards.rows import Fault, dialogue, plain_text


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_text_is_kept_as_it_stands(text: str) -> None:
    expected = text if text.strip() else Fault.EMPTY
    assert plain_text(text) == expected
    assert plain_text(text.encode()) == expected


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        (None, Fault.NULL),
        ("", Fault.EMPTY),
        (" \r\n\t\u2003", Fault.EMPTY),
        (b"\n", Fault.EMPTY),
        (b"caf\xe9", Fault.BAD_UTF8),
        (b"\xed\xa0\x80", Fault.BAD_UTF8),  # a surrogate, encoded as no encoder may
        ("a\ud800b", Fault.SURROGATE),
        ("\udfff", Fault.SURROGATE),
        (7, Fault.WRONG_TYPE),
        (True, Fault.WRONG_TYPE),
        (["text"], Fault.WRONG_TYPE),
    ],
)
def test_what_is_no_text(value: object, fault: Fault) -> None:
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
        (None, Fault.NULL),
        ([], Fault.EMPTY),
        ([{"from": "gpt", "value": " "}], Fault.EMPTY),
        ("\nHUMAN: Hi", Fault.WRONG_TYPE),
        ({"from": "gpt", "value": "Hi"}, Fault.WRONG_TYPE),
        (["Hi"], Fault.WRONG_TYPE),
        ([None], Fault.WRONG_TYPE),
        ([{"from": "gpt", "content": "Hi"}], Fault.WRONG_TYPE),
        ([{"role": "user", "content": [{"type": "text"}]}], Fault.WRONG_TYPE),
        ([{"from": "gpt", "value": None}], Fault.NULL),
        ([{"from": None, "value": "Hi"}], Fault.NULL),
        ([{"from": "gpt", "value": b"\xff"}], Fault.BAD_UTF8),
        ([{"from": "gpt", "value": "ok"}, {"from": "gpt", "value": "\ud800"}], Fault.SURROGATE),
    ],
)
def test_what_is_no_dialogue(value: object, fault: Fault) -> None:
    assert dialogue(value) is fault
