"""What the file of a task may say: where its rows lie, the texts made of them, what is measured.

Flow: `task` fills a `Task` from a file; `items` takes its `Data`, `templates` its `Prompt` and
`FewShot`, `running` the rest.
"""

from typing import Literal, Self

from pydantic import Field, model_validator

from summerlm.core.config import Section

Kind = Literal["choice", "cloze", "generate", "text"]
Metric = Literal["acc", "acc_norm", "perplexity"]
ColumnKind = Literal["text", "texts", "integer"]


class Bundle(Section):
    """Where a task's rows lie in the installed package of offline items, under other names."""

    folder: str
    """Folder below the package's data sets."""

    split: str
    """The split that is measured there."""

    few_shot_split: str | None = None
    """The split that examples come from; none = the package has none."""

    nameless: bool = False
    """Whether the package leaves out the column that names a row."""

    expressions: dict[str, str] = Field(default_factory=dict)
    """Columns that the package names otherwise, as jinja expressions over its own."""


class Instead(Section):
    """What a mirror may hold in place of a task's rows; a result says that it was measured."""

    folder: str
    """Folder below the repository."""

    split: str
    """The split."""


class Data(Section):
    """Where a task's rows lie, and what columns they have."""

    repository: str
    """Data set repository `owner/name` of the hub."""

    revision: str = "main"
    """Branch, tag or commit; a result names the commit."""

    folder: str | None = None
    """Folder below the repository, `{part}` standing for the part; none = all of it."""

    split: str
    """The split that is measured."""

    id: str | None = None
    """Column whose values name a row and may not come twice; none = there is none."""

    columns: dict[str, ColumnKind]
    """Columns, or keys below them with a dot, that a row must have, and what they hold."""

    bundle: Bundle | None = None
    """Where the rows lie in the package of offline items; none = not there."""

    instead: tuple[Instead, ...] = ()
    """What is taken, and said, where a mirror lacks the split."""


class Prompt(Section):
    """The texts made of a row: templates, and expressions where values are no text."""

    description: str = ""
    """Text before all else."""

    context: str = ""
    """What the model reads of a row."""

    contexts: str | None = None
    """Expression for the contexts, one a choice; none = `context` for all choices."""

    choices: str | None = None
    """Expression for the choices that may follow the context."""

    answer: str | None = None
    """Expression for the right choice's index."""

    target: str | None = None
    """What follows the context: a cloze's ending, or an answer in full."""

    delimiter: str = " "
    """Between context and choice, and between context and answer of an example."""

    separator: str = "\n\n"
    """After an example."""


class FewShot(Section):
    """Examples in front of a row."""

    split: str
    """The split that they come from."""

    count: int = Field(default=0, ge=0)
    """How many, unless asked otherwise."""

    sampler: Literal["random", "first"] = "random"
    """Drawn anew for each row, or the first ones for all."""

    spare: bool = False
    """Draw one more, for where the row itself is drawn: lm-eval does so for sets without a test."""


class Extract(Section):
    """How an answer is found in what a model writes."""

    pattern: str
    """Regular expression; of its groups the first that isn't empty counts."""

    match: int
    """Which match: 0 = the first, -1 = the last."""


class Generation(Section):
    """How a model writes, and how that is compared with the key."""

    max_tokens: int = Field(ge=1)
    """Most tokens written."""

    stop: tuple[str, ...]
    """Texts before which writing ends."""

    ignore: tuple[str, ...] = ()
    """Regular expressions taken out of answer and key, in this order, before they are compared."""

    extract: dict[str, Extract]
    """Ways of finding the answer; each gives a figure `exact_match_<name>`."""


class Task(Section):
    """One task."""

    name: str
    """The file's name, or that and a part's."""

    kind: Kind
    """Choices compared by likelihood, a word to be foretold, writing, or plain text."""

    description: str
    """One line on what it asks."""

    source: str
    """Paper and section."""

    licence: str
    """Licence of the rows."""

    metrics: tuple[Metric, ...] = ()
    """What is measured of choices and clozes."""

    layout: Literal["wikitext", "documents"] | None = None
    """Of text: a document a row, or WikiText's lines, in which headings begin documents."""

    data: Data
    """Where the rows lie."""

    prompt: Prompt = Prompt()
    """The texts made of a row."""

    few_shot: FewShot | None = None
    """Examples; none = never."""

    generation: Generation | None = None
    """Of kind "generate"."""

    parts: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """Groups of parts, each measured by itself and all together; none = one part."""

    @model_validator(mode="after")
    def _kinds_have_theirs(self) -> Self:
        prompt = self.prompt
        needed = {
            "choice": (prompt.answer, prompt.contexts or prompt.choices, self.metrics),
            "cloze": (prompt.context, prompt.target, self.metrics),
            "generate": (prompt.context, prompt.target, self.generation),
            "text": (self.layout,),
        }[self.kind]
        if not all(needed):
            raise ValueError(f"a task of kind {self.kind!r} lacks a key that the kind needs")
        if self.parts and self.kind in ("generate", "text"):
            raise ValueError(f"a task of kind {self.kind!r} is measured whole: it takes no parts")
        return self

    @property
    def part_names(self) -> tuple[str, ...]:
        """The parts in the files' order; one nameless part where there are none."""
        return tuple(part for group in self.parts.values() for part in group) or ("",)

    def name_of(self, part: str) -> str:
        """Give the name that a part has by itself, as a task."""
        if len(self.part_names) == 1:
            return self.name
        whole = self.name
        for group in self.parts:
            whole = whole.removesuffix(f"_{group}")  # where this is a group of the whole
        return f"{whole}_{part}"


class Suite(Section):
    """A name for several tasks."""

    description: str
    """One line on what they are."""

    tasks: tuple[str, ...]
    """Names of tasks."""
