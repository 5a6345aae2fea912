"""lm-eval's tasks for our models, with their data from the hub or a mirror of it.

Flow: `recipes.evaluating` calls `evaluate_with_harness`; `Tasks` points the data of each task that
lm-eval builds at the mirror, if there is one.

Needs the extra `eval`.
"""

import difflib
import json
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from lm_eval.tasks._factory import TaskFactory
from lm_eval.tasks._index import Entry
from lm_eval.utils import handle_non_serializable

from summerlm.core.errors import SourceDownError, UsageError
from summerlm.data.config import SourceConfig
from summerlm.data.shards.files import find_files
from summerlm.data.shards.transfer import File, Transfer
from summerlm.eval.harness import HarnessModel
from summerlm.eval.items import of_split
from summerlm.generate.engine import LanguageModel

SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")
KINDS = {".parquet": "parquet", ".arrow": "arrow", ".jsonl": "json", ".json": "json"}
"""What `datasets` calls the reader of files with these endings."""
OF_THE_DAY = ("date", "pretty_env_info")  # of its results: what the same evaluation gives otherwise


class Tasks(TaskFactory):
    """Makes lm-eval's tasks; those that read the hub read a mirror instead.

    Args:
        mirror: Folder that holds `owner/name/...` as the hub does, with a folder a configuration;
            None = the hub itself.
        few_shot: Examples in front of each item; None = the task's own number.
    """

    def __init__(self, mirror: Path | None, few_shot: int | None) -> None:
        super().__init__()
        self._mirror, self._few_shot = mirror, few_shot

    def _build_task(self, entry: Entry, overrides: dict[str, Any] | None) -> Any:
        try:
            return super()._build_task(entry, overrides)
        except OSError as error:  # all that `datasets` raises where it can't get at data
            raise SourceDownError(
                f"lm-eval's task {entry.name}: {error}; without network a mirror is needed "
                "(data.mirror=FOLDER)"
            ) from error

    def _load_full_config(self, entry: Entry, overrides: dict[str, Any] | None = None) -> Any:
        config = super()._load_full_config(entry, overrides)
        repository = config.get("dataset_path") or ""
        if self._mirror is None or "/" not in repository or Path(repository).exists():
            return config
        try:
            return config | self._mirrored(self._mirror, config)
        except UsageError as error:
            words = str(error).removeprefix(f"source {config['task']}: ")
            raise UsageError(
                f"lm-eval's task {config['task']}: {words}; a mirror needs what `hf download "
                f"{repository} --repo-type dataset --local-dir MIRROR/{repository}` writes"
            ) from None

    def _mirrored(self, mirror: Path, config: dict[str, Any]) -> dict[str, Any]:
        """Say where a task's splits lie in the mirror; those that it lacks are none."""
        repository, folder = config["dataset_path"], config.get("dataset_name")
        if folder == "default" and not (mirror / repository / folder).is_dir():
            folder = None  # the hub's name for the only configuration of a set
        source = SourceConfig(weight=1, hub=repository, data_dir=folder)
        listing = find_files(config["task"], source, mirror, Transfer(30, 120))
        splits = {key: config[key] for key in SPLITS if config.get(key)}
        shots = dict(config.get("fewshot_config") or {})
        files: dict[str, list[File]] = {}
        for split in {*splits.values(), shots.get("split")} - {None}:
            with suppress(UsageError):
                files[split] = of_split(listing, folder, split)
        for split in self._needed(config, splits, shots) - files.keys():
            of_split(listing, folder, split)  # says what there is instead
        kinds = {KINDS[Path(file.name).suffix] for found in files.values() for file in found}
        if len(kinds) > 1:
            raise UsageError(f"{repository}: its splits are files of several forms: {kinds}")
        if shots.get("split") not in files:
            shots.pop("split", None)
        paths = {split: [str(file.local) for file in found] for split, found in files.items()}
        return {
            **{key: split if split in files else None for key, split in splits.items()},
            "fewshot_config": shots or None,
            "dataset_path": kinds.pop(),
            "dataset_name": None,
            "dataset_kwargs": {"data_files": paths},
        }

    def _needed(
        self, config: dict[str, Any], splits: dict[str, str], shots: dict[str, Any]
    ) -> set[str]:
        """Name the splits that lm-eval will read of those that a task has."""
        asked = splits.get("test_split") or splits.get("validation_split")
        needed = {asked} if asked else set()
        count = config.get("num_fewshot") if self._few_shot is None else self._few_shot
        if count and "samples" not in shots:
            order = ("fewshot_split", "training_split", "validation_split", "test_split")
            needed.add(shots.get("split") or next(splits[key] for key in order if key in splits))
        return needed


def task_manager(
    include: Iterable[Path] = (), mirror: Path | None = None, few_shot: int | None = None
) -> TaskManager:
    """Read lm-eval's task definitions.

    Args:
        include: Folders with further definitions.
        mirror: See `Tasks`.
        few_shot: See `Tasks`.

    Returns:
        What `simple_evaluate` takes as its `task_manager`.
    """
    manager = TaskManager(include_path=[str(folder) for folder in include] or None)
    manager._factory = Tasks(mirror, few_shot)
    return manager


def evaluate_with_harness(
    lm: LanguageModel,
    tasks: Sequence[str],
    *,
    mirror: Path | None = None,
    few_shot: int | None = None,
    limit: int | None = None,
    seed: int = 1234,
) -> dict[str, Any]:
    """Let lm-eval measure a model on tasks of its own or of the user's.

    Args:
        lm: The model with its tokenizer.
        tasks: Names of its tasks, groups and tags, patterns of them such as "mmlu_*", YAML files
            of tasks, or folders of such files, of which all tasks are taken.
        mirror: See `Tasks`.
        few_shot: See `Tasks`.
        limit: Items a task at most; None = all.
        seed: Of the few-shot examples; lm-eval's own default.

    Returns:
        lm-eval's results as JSON would give them back, without the date and the machine.

    Raises:
        UsageError: If a task isn't known or the mirror lacks what it needs.
        SourceDownError: If data can't be read.
    """
    folders = [Path(name) for name in tasks if Path(name).is_dir()]
    manager = task_manager(folders, mirror, few_shot)
    found = simple_evaluate(
        model=HarnessModel(lm),
        tasks=[name for task in tasks for name in _names(task, manager)],
        num_fewshot=few_shot,
        limit=limit,
        fewshot_random_seed=seed,
        task_manager=manager,
        log_samples=False,
    )
    results: dict[str, Any] = json.loads(json.dumps(found, default=handle_non_serializable))
    return {key: value for key, value in results.items() if key not in OF_THE_DAY}


def _names(task: str, manager: TaskManager) -> list[str]:
    """Give the names of the tasks that a word of the user's means."""
    path = Path(task)
    if path.is_dir():
        inside = path.resolve()
        index = manager.task_index.items()
        found = [n for n, e in index if e.yaml_path and inside in e.yaml_path.resolve().parents]
    elif path.suffix == ".yaml":
        found = [task] if path.is_file() else []
    else:
        found = manager.match_tasks([task])
    if not found:
        nearest = difflib.get_close_matches(task, manager.all_tasks, 1)
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        raise UsageError(f"lm-eval knows no task {task!r}{hint}")
    return found
