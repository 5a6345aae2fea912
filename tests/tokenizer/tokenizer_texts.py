"""A bit of code to learn from, and hard texts for properties."""

from hypothesis import strategies as st

CODE = """
def greet(name, times=100):
    for _ in range(times):
        if name:
            print("hello, " + name)
        else:
            print("<p>who's there?</p>")
"""


FRAGMENTS = (
    *(" ", "  ", " " * 17, "\n", "\r\n", "\t", "\x00", "\u2581", "\u00a0", "\ufeff", "\ufffd"),
    *("<s>", "</s>", "<unk>", "[INST]", "[/INST]", "<p>", "<think>", "</doc>", "[control_12]"),
    *(
        "<0x41>",
        "<0xE2>",
        "<",
        ">",
        "Ġ",
        "Ċ",
        "##a",
        "</w>",
        "e\u0301",
        "👩‍👩‍👧",
        "🏴󠁧󠁢",
        "\U0010ffff",
    ),
    *("def f(x):\n        return x", "it's", "1234567", "日本", "שלום", "ab" * 9, "----------"),
)
# plain hypothesis text seldom has two special spellings or a long run of spaces in one example
TEXTS = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=12), max_size=12).map("".join)
