"""The prose is held to the code: files, tests, commands, settings and links that it names exist.

What stands in backticks in README.md, CONTRIBUTING.md and docs/*.md is told apart by its form;
`WRONG` below shows, for each form, what is noticed.
"""

import ast
import json
import re
import runpy
import shlex
import tomllib
from functools import cache
from pathlib import Path

import pytest
import typer
from test_architecture import ALLOWED

import summerlm
from summerlm.cli import app
from summerlm.core.config import known_keys
from summerlm.recipes.settings import Settings

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
KEYS = known_keys(Settings)
CODE = {path: path.read_text() for path in sorted((ROOT / "summerlm").rglob("*.py"))}

OURS = r"(summerlm|tests|docs|configs|benchmarks|\.ci)/.+"  # folders of the repository
ENDINGS = r".+\.(py|md|jinja|sh|toml|json|jsonl|html|safetensors)"
PLACEHOLDER = re.compile(r"[A-Z_]+|\.\.\.|<.*>")  # CONFIG, RUN, ...: what a reader puts there


def inline_code(text):
    """What stands in backticks outside of fenced blocks, line ends as spaces."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    return [" ".join(found.split()) for _, found in re.findall(r"(`+)(.+?)\1", prose, flags=re.S)]


def fenced_blocks(text):
    """(language, content) of fenced blocks."""
    return re.findall(r"^```(\w*)\n(.*?)^```", text, flags=re.M | re.S)


def block_commands(content):
    """The lines of a shell block that a reader would type, continued lines joined."""
    for line in content.replace("\\\n", " ").splitlines():
        if re.match(r"\$ |(\S+=\S+ )*(\S*/)?(summerlm|make|python|bash) ", line):
            yield line.removeprefix("$ ")


@cache
def strings():
    """Every string in the package, docstrings included, and the Makefile: they name their files."""
    nodes = (node for text in CODE.values() for node in ast.walk(ast.parse(text)))
    found = [n.value for n in nodes if isinstance(n, ast.Constant) and type(n.value) is str]
    return "\n".join([*found, (ROOT / "Makefile").read_text()])


@cache
def commands():
    """The command line as a tree of typer's commands."""
    return typer.main.get_command(app)


def options(command):
    return {o for p in command.params for o in (*p.opts, *p.secondary_opts)} | {"--help"}


def all_options(command):
    inner = [all_options(c) for c in getattr(command, "commands", {}).values()]
    return options(command).union(*inner)


# each check gives what is wrong, or nothing


def wrong_test(words):
    name, _, function = words.partition("::")
    files = [ROOT / name] if "/" in name else list((ROOT / "tests").rglob(name))
    if len(files) != 1 or not files[0].is_file():
        return f"{words}: no such file, or several"
    nodes = ast.walk(ast.parse(files[0].read_text()))
    defined = {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
    return "" if function in defined else f"{words}: no such test"


def wrong_key(words):
    key = words.partition("=")[0].split(".")
    for known in (text.split(".") for text in KEYS):
        if key[-1] == "*" and len(known) >= len(key):  # `run.*`: all of a section
            known = [*known[: len(key) - 1], "*"]
        if len(known) == len(key) and all(n in (k, "*") for n, k in zip(known, key, strict=True)):
            return ""
    module = ROOT / "summerlm" / key[0] / f"{key[1]}.py"  # `train.loop` may be one of these
    if "=" not in words and module in CODE and all(k in CODE[module] for k in key[2:]):
        return ""
    return f"{words}: no such setting"


def wrong_path(words):
    """A file of the repository must be there; of others, the code must know each part's name."""
    words = words.removesuffix("/")
    if re.fullmatch(r"\w+\.py", words):  # a name alone has to be the only one
        files = [f for base in ("summerlm", "tests", "docs") for f in (ROOT / base).rglob(words)]
        return "" if len(files) == 1 else f"{words}: no such file, or several"
    if re.fullmatch(OURS, words) or words.endswith((".py", ".md", ".jinja", ".sh")):
        bases = [ROOT, ROOT / "summerlm", ROOT / "docs", ROOT / "configs"]
        return "" if any(any(base.glob(words)) for base in bases) else f"{words}: no such file"
    if any((base / words).exists() for base in (ROOT, ROOT / "summerlm", ROOT / "configs")):
        return ""
    parts = words.split("/")
    for part in parts[2:] if parts[0] == "runs" else parts:  # runs/... is the reader's to name
        literal = re.split(r"[<*\d]", part)[0]
        if PLACEHOLDER.fullmatch(part) or not literal:
            continue
        if not re.search(rf"(?<![\w.]){re.escape(literal)}(?!\w)", strings()):
            return f"{words}: the code knows no {literal}"
    return ""


def wrong_command(words):
    """A whole command line: subcommands, options, settings and our own files in it."""
    for word in words:
        if re.fullmatch(OURS, word) and (wrong := wrong_path(word)):
            return wrong
    while words and "=" in words[0]:  # variables of the environment
        words = words[1:]
    program = words[0].split("/")[-1] if words else ""
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.M)
        asked = [word for word in words[1:] if "=" not in word]
        return "".join(f"make {word}: no such target" for word in asked if word not in targets)
    return wrong_summerlm(words[1:]) if program == "summerlm" else ""


def wrong_summerlm(words):
    """What follows `summerlm` on a command line."""
    command, rest = commands(), words
    while rest and hasattr(command, "commands") and not rest[0].startswith("-"):
        if PLACEHOLDER.fullmatch(rest[0]):
            return ""
        if rest[0] not in command.commands:
            return f"summerlm {' '.join(words)}: no command {rest[0]}"
        command, rest = command.commands[rest[0]], rest[1:]
    for word in rest:
        bare = word.strip("[]").removesuffix("...").strip("[]")
        if re.match(r"--?[a-z]", bare) and bare.partition("=")[0] not in options(command):
            return f"summerlm {' '.join(words)}: no option {bare}"
        override = re.match(r"\w+(\.\w+)+=", bare) and bare != "section.key=value"
        if override and (wrong := wrong_key(bare)):
            return wrong
    return ""


def wrong_option(words):
    option = words.split()[0].partition("=")[0]
    text = "".join((ROOT / name).read_text() for name in ("Makefile", "pyproject.toml"))
    known = option in all_options(commands()) or option in text
    return "" if known else f"{option}: no command has this option"


def wrong_variable(words):
    """A variable of the environment is read by the package or by the tests."""
    texts = [*CODE.values(), (ROOT / "tests" / "conftest.py").read_text()]
    whole = re.compile(rf"\b{words}\b")
    return "" if any(map(whole.search, texts)) else f"{words}: nothing reads it"


def wrong_attribute(words):
    name = words.split(".")[1].partition("(")[0]
    known = hasattr(summerlm, name) or (ROOT / "summerlm" / name).is_dir()
    return "" if known else f"{words}: the package has no {name}"


def looks_like_a_path(words):
    if re.match(r"[~/$]|path/|my", words):  # the reader's own files
        return False
    return re.fullmatch(rf"[\w.*<>-]*/[\w.*<>/-]*|{ENDINGS}|\.\w[\w.]*", words)


def looks_like_a_key(words):
    """`section.key` of a section, or with a name that is some section's key."""
    if not re.fullmatch(r"[a-z]+(\.[\w*]+)+(=.*)?", words):
        return False
    names = words.partition("=")[0].split(".")
    leaves = {key.split(".")[-1] for key in KEYS}
    return names[0] in {key.split(".")[0] for key in KEYS} or names[-1] in leaves


def wrong_code(words):
    """What is wrong with one piece of inline code, told apart by its form."""
    if re.fullmatch(r"[\w./]+::\w+", words) and words != "file::test":  # how tests are named
        return wrong_test(words)
    if re.match(r"--[a-z]", words):
        return wrong_option(words)
    if " " in words:
        return wrong_command(words.split())
    if re.match(r"summerlm\.\w", words):
        return wrong_attribute(words)
    if re.fullmatch(r"SUMMERLM_\w+", words):
        return wrong_variable(words)
    if looks_like_a_path(words):
        return wrong_path(words)
    return wrong_key(words) if looks_like_a_key(words) else ""


def wrong_toml(content):
    """Settings in a TOML block that don't exist."""

    def keys(table, prefix=""):
        for name, value in table.items():
            if isinstance(value, dict):
                yield from keys(value, f"{prefix}{name}.")
            elif prefix == "data.sources." and value == "none":
                continue  # an inherited source taken away
            elif prefix:  # what stands above all tables is `extends`
                yield prefix + name

    return list(filter(None, map(wrong_key, keys(tomllib.loads(content)))))


def wrong_in(text):
    """All that is wrong in a page."""
    found = [wrong_code(words) for words in inline_code(text)]
    for language, content in fenced_blocks(text):
        if language == "toml":
            found += wrong_toml(content)
        if language in ("", "sh", "bash", "console", "shell"):
            found += [wrong_command(shlex.split(c, comments=True)) for c in block_commands(content)]
    return [wrong for wrong in found if wrong]


def anchors(page):
    """The anchors of a page's headings, as forges make them."""
    headings = re.findall(r"^#+ (.*)", page.read_text(), flags=re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def wrong_links(page, text):
    """Relative links that lead nowhere."""
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.is_relative_to(ROOT) or not file.exists():
            yield f"{target}: leads nowhere"
        elif anchor and anchor not in anchors(file):
            yield f"{target}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_what_a_page_names_exists(page):
    text = page.read_text()
    assert wrong_in(text) == []
    assert list(wrong_links(page, text)) == []


def test_the_changelogs_links_lead_somewhere():
    page = ROOT / "CHANGELOG.md"
    assert list(wrong_links(page, page.read_text())) == []


WRONG = [
    "`summerlm/train/stop.py`",
    "`train/stop.py`",
    "`configs/16m.toml`",
    "`configs/*.yaml`",
    "`metric.jsonl`",
    "`checkpoints/stop-<step>/state.json`",
    "`runs/demo/sumary.json`",
    "`.ci/runs`",
    "`test_docs.py::test_nothing`",
    "`tests/docs.py::test_nothing`",
    "`conftest.py::pytest_configure`",  # there are two
    "`conftest.py`",
    "`test_docs.pie::test_nothing`",
    "`optin.peak_lr`",
    "`.venv/bin/pytest tests/data/test_model_loss.py`",
    "`summerlm trian CONFIG`",
    "`summerlm data hsh`",
    "`summerlm demo --hours 4`",
    "`summerlm train CONFIG optim.peek_lr=1`",
    "`summerlm train configs/16m.toml`",
    "`make al`",
    "`python docs/make_setting.py`",
    "`--hours`",
    "`summerlm.lod`",
    "`SUMMERLM_HUB`",
    "`optim.peek_lr`",
    "`data.sources.web.weigth`",
    "`train.budget_token=4`",
    "`train.lop`",
    "`train.loop.Evnt`",
    "```sh\nX=1 .venv/bin/summerlm train configs/15m.toml \\\n    dta.lanes=4  # few\n```",
    "```\n$ summerlm evl RUN\n```",
    '```toml\nextends = "15m.toml"\n[data.sources.mine]\npath = "a"\nwieght = 1\n```',
]
RIGHT = [
    "`train.loop.Event`, `train.budget_tokens=4`, `data.sources.NAME.weight`, `run.*`, `torch.x`",
    "`summerlm train CONFIG [section.key=value]...`, `summerlm tokenizer`, `make demo PYTHON=x`",
    "`runs/mine/metrics.jsonl`, `step-00000010`, `<owner>/<name>`, `~/texts/*.txt`, `.parquet`",
    '```toml\nextends = "15m.toml"\n[data.sources.mine]\npath = "a"\nweight = 1\n```',
    "```\nstep      1  loss 8.3180  rate 1.00e-03\n```",
]


@pytest.mark.parametrize("text", WRONG)
def test_a_false_word_is_noticed(text):
    assert len(wrong_in(text)) == 1


@pytest.mark.parametrize("text", RIGHT)
def test_a_true_word_is_not(text):
    assert wrong_in(text) == []


def test_false_links_are_noticed():
    page = ROOT / "docs" / "architecture.md"
    text = "[a](nothing.md) [b](../../elsewhere) [c](#nowhere) [d](settings.md#nowhere)"
    assert len(list(wrong_links(page, text))) == 4
    assert list(wrong_links(page, "[a](settings.md#run) [b](https://x.org/y)")) == []


# what stands in both the prose and the code


def table(page, heading):
    """The rows of the first table below a heading, as lists of cells."""
    section = (ROOT / page).read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in row] for row in rows[1:]]


def test_the_table_of_stations_is_the_one_that_is_held():
    rows = table("docs/architecture.md", "Stations")
    told = {inline_code(name)[0]: " ".join(inline_code(allowed)) for name, _, allowed in rows}
    assert told == ALLOWED


def test_the_table_of_dependencies_is_the_packages():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [re.split(r"[>=<\[]", dependency)[0] for dependency in project["dependencies"]]
    rows = table("docs/architecture.md", "Dependencies")
    assert sorted(inline_code(name)[0] for name, _ in rows) == sorted(asked)


def test_the_table_of_exit_codes_is_the_errors():
    from summerlm.core import errors

    classes = [c for c in vars(errors).values() if isinstance(c, type)]
    codes = {c.__name__: str(c.exit_code) for c in classes if issubclass(c, errors.SummerError)}
    del codes["SummerError"]
    rows = table("docs/architecture.md", "Exit codes")
    assert {name: code for code, text in rows for name in re.findall(r"\(`(\w+)`\)", text)} == codes


def test_the_rows_of_metrics_are_told_whole():
    written = {}
    for text in CODE.values():
        for node in ast.walk(ast.parse(text)):
            name = isinstance(node, ast.Call) and getattr(node.func, "attr", None)
            first = node.args[0] if name == "write" and node.args else None
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                fields = {keyword.arg for keyword in node.keywords} - {"line"}
                written.setdefault(first.value, set()).update(fields)
    assert "train" in written
    del written["sample"], written["note"]  # has a file of its own; stands in none
    page = (ROOT / "docs" / "architecture.md").read_text()
    items = re.findall(r'^- "(\w+)": (.+?)(?=\n- |\n\n)', page, flags=re.M | re.S)
    told = {kind: {c for c in inline_code(item) if "." not in c} for kind, item in items}
    assert told == written


@pytest.mark.parametrize("page", ["docs/architecture.md", "CONTRIBUTING.md"])
def test_words_in_backticks_occur_in_the_code(page):
    """Words and dotted words: a file's field, a class, a kind of row."""
    texts = [*CODE.values(), *((ROOT / n).read_text() for n in ("pyproject.toml", "Makefile"))]
    folders = ("summerlm", "tests", "configs", "docs")
    files = [*ROOT.glob("*"), *(file for folder in folders for file in (ROOT / folder).rglob("*"))]
    known = set(re.findall(r"\w+", "\n".join([*texts, *(file.name for file in files)])))
    code = [c for c in inline_code((ROOT / page).read_text()) if not wrong_code(c)]
    dotted = [c for c in code if re.fullmatch(r"[A-Za-z][\w.]*", c)]
    words = {w for c in dotted if not c.startswith("SUMMERLM_") for w in c.split(".")}
    assert words - known == set()


def test_the_page_of_settings_is_up_to_date():
    made = runpy.run_path(str(ROOT / "docs" / "make_settings.py"))["page"]()
    page = (ROOT / "docs" / "settings.md").read_text()
    assert page == made, "run: python docs/make_settings.py"
    assert all(f"`{key.replace('*', 'NAME')}`" in page for key in KEYS)


PERFORMANCE = runpy.run_path(str(ROOT / "docs" / "make_performance.py"))


def test_the_page_of_performance_is_up_to_date():
    page = (ROOT / "docs" / "performance.md").read_text()
    assert page == PERFORMANCE["page"](), "run: python docs/make_performance.py"


def figures_of(command, **figures):
    return {
        "date": "2026-01-02T03:04:05+00:00",
        "command": command,
        "commit": "abc1234",
        "hardware": {"processor": "CPU", "cores": 2, "python": "3.11", "torch": "2.13"},
        "versions": {"numpy": "2.3", "pyarrow": None},
        **figures,
    }


def test_the_page_of_performance_takes_what_is_there(tmp_path):
    spread = {"median": 2.0, "lowest": 1.0, "highest": 1234.5, "all": []}
    step = {
        "seconds": spread,
        "tokens": 256,
        "tokens_per_second": 128.0,
        "data_wait_s": spread,
        "flops_per_second": {"causal": 1e12, "full": 2e12},
        "mfu": {"causal": None, "full": 0.5},
        "memory_bytes": 3e9,
    }
    kernels = {"plain": {"seconds": spread, "ratio": spread}}
    shape = {"shape": {"B": 8}, "kernels": kernels, "refused": {"cudnn": "no GPU"}}
    parts = {"seconds": 2.0, "parts": [{"part": "MLP: norm", "seconds": 2.0, "share": 1.0}]}
    gpu = {"hardware": {"accelerator": "H200", "python": "3", "torch": "2", "processor": "CPU"}}
    found = {
        "a": figures_of("summerlm bench x.toml", config="x.toml", step=step, parts=parts),
        "b": figures_of("python benchmarks/attention.py", shapes=[shape]),
        "c": figures_of("bash benchmarks/gpu.sh", marks=[], parts={"step": {"status": "done"}})
        | gpu,
        "d": figures_of("python benchmarks/data.py", quick=True, commit="quick"),
        "e": figures_of("bash benchmarks/gpu.sh", toy=True, commit="toy"),
    }
    for name, figures in found.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(figures))
    page = PERFORMANCE["page"](tmp_path)
    assert page.count("\n## ") == 3
    assert "at commit abc1234 on CPU, 2 cores; Python 3.11, torch 2.13, numpy 2.3.\n" in page
    assert "```\nsummerlm bench x.toml\n```" in page
    assert "| step: s | 2 | 1 | 1,234 |" in page
    assert "| step: MFU, counted in full, as torchtitan does: % | 50 |  |  |" in page
    assert page.count("MFU") == 1
    assert "| MLP: norm | 2000.00 | 100.0% |\n| the step | 2000.00 | 100.0% |" in page
    assert "```\nB = 8\n  plain: 2e+03 ms, 2.00 (1.00 to 1234.50)" in page
    assert "  cudnn: not here: no GPU\n```\n\nAll of it: [b.json]" in page
    assert "on one H200; Python" in page
    assert "```\nstep: done\n```" in page


def test_a_section_without_figures_is_refused(tmp_path):
    figures = figures_of("python benchmarks/attention.py", shapes=[])
    (tmp_path / "a.json").write_text(json.dumps(figures))
    with pytest.raises(ValueError, match=r"benchmarks/attention\.py: its file holds nothing"):
        PERFORMANCE["page"](tmp_path)
