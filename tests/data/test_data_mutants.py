"""The tests of order and reading can fail: they must notice each of these breaks of the code."""

import pytest
from mutants import break_code, copy_code, run_tests

NAMES = (
    *("batch", "lanes", "ledger", "loader", "mixture", "permutation", "workers"),
    *("hygiene", "sources", "transfer", "faults"),
)

CONFTEST = """
from pathlib import Path
import summerlm
from hypothesis import Phase, settings
assert Path(summerlm.__file__).is_relative_to(Path(__file__).parent)
settings.register_profile("m", database=None, derandomize=True, phases=[Phase.generate])
settings.load_profile("m")
"""

# (tests that must notice, module, text, what it becomes)
MUTANTS = {
    "offset not saved": ("lanes", "streams", "[*p.place, p.offset]", "[*p.place, 0]"),
    "documents not in turn": ("lanes", "streams", "self._packers.rotate(-1)", "pass"),
    "open document drawn twice": ("lanes", "streams", "ordinal, row + 1)", "ordinal, row)"),
    "turns forgotten": ("lanes", "streams", "unopened + opened", "opened + unopened"),
    "rows dealt not restored": ("lanes", "lanes", 'state["rows"] if state else 0', "0"),
    "every epoch alike": ("lanes", "lanes", '"units", order.seed, source.name, epoch', '"units"'),
    "row order by where one begins": ("lanes", "lanes", "name, epoch, unit)", "name, first_row)"),
    "resumes a row late": (
        "lanes",
        "lanes",
        "arange(first_row, count)",
        "arange(first_row + 1, count)",
    ),
    "later units begun late": ("lanes", "lanes", "            first_row = 0\n", ""),
    "later epochs begun late": ("lanes", "lanes", "        first_ordinal = 0\n", ""),
    "lanes share units": (
        "lanes",
        "lanes",
        "len(source.units), order.lanes)",
        "len(source.units))",
    ),
    "one epoch too many": ("lanes", "lanes", "epoch >= limit", "epoch > limit"),
    "short unit accepted": ("lanes", "lanes", "len(rows) != count", "len(rows) > count"),
    "skipped rows counted again": (
        "ledger",
        "lanes",
        "last_met, dropped = epoch, Counter()",
        "last_met = epoch",
    ),
    "changes counted again": ("ledger", "packing", "self.place is not None)", "False)"),
    "rules forgotten": (
        "lanes",
        "lanes",
        "source.clean(row.decode())",
        "Cleaned(row.decode(), {})",
    ),
    "lock not in the identity": ("loader", "lanes", '{**source.lock(), "units"', '{"units"'),
    "a token between rows lost": ("lanes", "packing", "self.offset -= 1", "self.offset -= 0"),
    "eos lost at a row's edge": (
        "lanes",
        "packing",
        "if self.offset == self._ids.size:",
        "if self.offset >= self._ids.size - 1:",
    ),
    "open document begun anew": (
        "lanes",
        "packing",
        "not self._ids.size:\n",
        "not self._ids.size:\n            self.offset = 0\n",
    ),
    "first input counted": ("ledger", "packing", "byte_lengths[piece[1:]]", "byte_lengths[piece]"),
    "surplus counted twice": ("lanes", "packing", "and piece.size > 1", "and piece.size > 0"),
    "lanes all alike": ("mixture", "mixture", "self._g * lane", "self._g * 0"),
    "rotation not chosen": ("mixture", "mixture", "key=turning)", "key=lambda c: abs(c - golden))"),
    "positions not walked inside": ("permutation", "permutation", ").any():", ").all():"),
    "key by hash()": (
        "permutation",
        "permutation",
        "json.dumps(key).encode()",
        "str(hash(key)).encode()",
    ),
    "bos as a target": ("batch", "batch", "rows.masked_fill(begins, IGNORE)", "rows"),
    "borders from before the row": ("batch", "batch", " - begins[:, :1].long()", ""),
    "identity shared": ("loader", "loader", "copy.deepcopy(self.identity)", "self.identity"),
    "ranks take neighbouring lanes": (
        "loader",
        "loader",
        "range(rank, lanes, world)",
        "range(rank * lanes // world, (rank + 1) * lanes // world)",
    ),
    "parts laid side by side": (
        "loader",
        "loader",
        "index :: len(parts)]",
        "index * 2 : index * 2 + part.shape[1]]",
    ),
    "step not restored": (
        "loader",
        "loader",
        'state["step"] if state is not None',
        "0 if state is not None",
    ),
    "errors as tracebacks": (
        "workers",
        "workers",
        "except SummerError as error",
        "except KeyError as error",
    ),
    "dropped rows not counted": ("ledger", "lanes", "dropped[text.reason] += 1", "pass"),
    "copies of held-out rows kept": (
        "hygiene",
        "hygiene",
        "for held_out in (True, False):",
        "for held_out in (False, True):",
    ),
    "a dropped text takes its copy with it": (
        "hygiene",
        "hygiene",
        " and isinstance(source.clean(row).text, str)",
        "",
    ),
    "duplicates kept": ("hygiene", "sources", "rows[index] = reason", "pass"),
    "duplicates not pinned": ("hygiene", "sources", "self._found_in = lists.sha256", "pass"),
    "evaluation sets not pinned": (
        "hygiene",
        "sources",
        "else self.evaluation.pins",
        "else None",
    ),
    "any data accepted": ("hygiene", "opening", "if found := lock_differences(old, new):", "if 0:"),
    "a row of each stripe lost": ("sources", "units", "kept[last - 1] + 1", "kept[last - 1]"),
    "held-out rows trained on": ("sources", "units", "~rule.mask(name", "0 <= rule.mask(name"),
    "given up at once": ("faults", "shards/retrying", "if spent + wait >= deadline_s:", "if 1:"),
    "pause not as long as asked": (
        "transfer",
        "shards/retrying",
        "(fault.retry_after_s or 0) + ",
        "0 * ",
    ),
    "wrong bytes accepted": (
        "transfer",
        "shards/transfer",
        'if kind != "etag" and hash_file',
        'if kind == "none" and hash_file',
    ),
}


def run_quick_tests(folder, names=NAMES):
    """Run quick tests on the copy in `folder`; 0 = all passed, 1 = one failed."""
    # the tests of dying processes are slow, and of other things
    quick = ("-m", "not slow", "-k", "not trainer and not killed and not group and not at_once")
    return run_tests(folder, *quick, *(f"test_data_{name}.py" for name in names))


@pytest.fixture
def copied(tmp_path):
    """A copy of the package and of the order's tests."""
    files = ("data_streams.py", "hub_server.py", *(f"test_data_{name}.py" for name in NAMES))
    copy_code(tmp_path, "summerlm", *(f"tests/data/{name}" for name in files))
    (tmp_path / "conftest.py").write_text(CONFTEST)
    return tmp_path


@pytest.mark.slow
def test_the_code_as_it_is_passes(copied):
    assert run_quick_tests(copied) == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(MUTANTS))
def test_a_mutant_is_killed(name, copied):
    tests, module, old, new = MUTANTS[name]
    break_code(copied, f"data/{module}", old, new)
    assert run_quick_tests(copied, [tests]) == 1, "survived"
