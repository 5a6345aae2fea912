"""The tests of many ranks and their saves can fail: they must notice each of these breaks.

The data order has mutants of its own, in `test_data_mutants`.
"""

import pytest
from mutants import break_code, copy_code, run_tests

RECORD = "recipes/test_recipes_jobs.py::test_many_ranks_record_what_one_does"
LAYOUT = "train/test_train_layouts.py::test_a_layout_changes_nothing"
TWICE = "train/test_train_layouts.py::test_a_layout_gives_the_same_bits_twice_and_over_a_restart"
KILL = "checkpoint/test_checkpoint_kills.py::test_a_kill_at_any_line_loses_no_announced_step"
POWER = "checkpoint/test_checkpoint_kills.py::test_power_may_go_whenever_it_likes"

# (test that must notice, module, text, what it becomes)
MUTANTS = {
    "own targets taken for all": (
        RECORD,
        "train/feed",
        "count=sum(message.count for message in messages)",
        "count=own.count",
    ),
    "own rows hashed for all": (
        RECORD,
        "train/feed",
        "hash_ranks(ids, borders, self._loader.lane_rows) if self._ranks.leads else item.sha",
        "item.sha",
    ),
    "gradients become means": (
        RECORD,
        "parallel/layout",
        "        self._copies.register_comm_hook(None, _sum_bucket)\n",
        "",
    ),
    "first weights of the first rows": (
        LAYOUT,
        "model/init",
        "whole[part.start : part.stop]",
        "whole[: part.stop - part.start]",
    ),
    "order of sums not settled": (
        TWICE,
        "train/step",
        "self._settled = not layout.settles",
        "self._settled = True",
    ),
    "replicas' gradients counted twice": (LAYOUT, "train/step", "/ self.layout.replicas", "/ 1"),
    "a stop is no one else's": (
        "recipes/test_recipes_jobs.py::test_a_signal_to_any_rank_stops_all_after_the_same_step",
        "train/feed",
        "            self._stop.received = stops[0]\n",
        "            pass\n",
    ),
    "lost step not noticed": (
        "recipes/test_recipes_job_faults.py::test_a_rank_that_loses_step_is_found_before_it_spoils_a_weight",
        "train/feed",
        "if any(step != number for step in steps):",
        "if False:",
    ),
    "manifest not synced": (
        POWER,
        "checkpoint/manifest",
        "os.fsync(file.fileno())",
        "file.flush()",
    ),
    "folder not synced": (POWER, "core/files", "        sync_folder(draft)\n", "        pass\n"),
    "a draft under its final name": (
        KILL,
        "checkpoint/store",
        'f"tmp-{step:08d}-{nonce}"',
        'f"step-{step:08d}"',
    ),
    "snapshot is no copy": (
        "checkpoint/test_checkpoint_resharding.py::test_a_snapshot_doesn_t_see_later_steps",
        "checkpoint/writing",
        "        self._snapshot.wait()\n",
        "        self._snapshot.take()\n        self._snapshot.wait()\n",
    ),
    "an update that waits for no copy": (
        "recipes/test_recipes_pretrain.py::test_a_save_holds_its_step_however_slowly_it_is_copied",
        "train/step",
        "        self._before_update()\n",
        "",
    ),
    "replicas not compared": (
        "checkpoint/test_checkpoint_replicas.py::test_a_flipped_bit_ends_the_job_and_keeps_the_good_checkpoint",
        "checkpoint/flight",
        'difference(self._plan, [r["sums"] for r in current if r], save.step)',
        "None",
    ),
    "rows of the wrong place": (
        "checkpoint/test_checkpoint_resharding.py::test_any_rows_from_any_rows",
        "checkpoint/reading",
        "low - start, high - start",
        "0, high - low",
    ),
    "guard forgets over a resume": (
        "recipes/test_recipes_job_faults.py::test_a_spike_changes_nothing_over_a_resume_either",
        "recipes/pretrain",
        'Guard(settings.train, state.get("guard"))',
        "Guard(settings.train)",
    ),
    "quarantine hides nothing": (
        "train/test_train_rollback.py::test_rollback_leaves_out_the_document_and_nothing_else",
        "train/quarantine",
        "        if not own:\n",
        "        if True:\n",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(MUTANTS))
def test_a_mutant_is_killed(name, tmp_path):
    test, module, old, new = MUTANTS[name]
    copy_code(tmp_path, "summerlm", "tests", "configs", "pyproject.toml")
    break_code(tmp_path, module, old, new)
    assert run_tests(tmp_path, "-n", "0", f"tests/{test}") == 1, "survived"
