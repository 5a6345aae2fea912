"""Which later rows hold pieces of the documents of some rows, told from dealt ids alone.

Flow: `recipes` ask `follow_tokens` where a run trains on `data.tokens`, whose sources may be gone;
where they aren't, `naming.follow` finds the same rows, and names their documents too.

Shapes: B rows of a batch, L lanes, T targets a row.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator

import numpy as np

from summerlm.data.naming import STEPS_AHEAD, Followed
from summerlm.data.tokens.reading import Tokens, TokenSteps

Place = tuple[int, int]  # a step, and a row of its batch in global order


def follow_tokens(
    tokens: Tokens, bos: int, step: int, rows: Iterable[int], last_step: int
) -> Followed:
    """Find the later rows that hold pieces of the documents of some rows.

    A lane's rows of one source come from its open documents in turn, and a document goes on where
    the turn comes to it again, until a BOS stands there.

    Args:
        tokens: The dealt steps.
        bos: The id of BOS.
        step: The step.
        rows: Rows of its batch, in global order.
        last_step: The run's last step; at most `STEPS_AHEAD` steps after this one are looked at.

    Returns:
        These rows and those that follow them, without names.

    Raises:
        DamagedDataError: If a file of the folder is damaged.
    """
    L, turns = tokens.manifest.identity["lanes"], tokens.manifest.identity["open_documents"]
    last = min(last_step, step + STEPS_AHEAD, tokens.manifest.steps)
    by_lane: defaultdict[int, set[Place]] = defaultdict(set)
    for row in rows:
        by_lane[row % L].add((step, row))
    found: list[Place] = []
    open_ends = 0
    for lane, asked in by_lane.items():
        dealt = Counter[int]()  # rows by source
        due: set[tuple[int, int]] = set()  # source, and which of its rows goes on with a document
        for place, source, ids in _lane_rows(tokens, bos, lane, step, last):
            dealt[source] += 1
            begins = ids[1:] == bos  # the first id is no target
            goes_on = (source, dealt[source]) in due and not begins[0]
            due.discard((source, dealt[source]))
            if place in asked or goes_on:
                found.append(place)
                if not begins[-1] and (place in asked or not begins.any()):
                    due.add((source, dealt[source] + turns))
            if not due and place >= max(asked):
                break
        open_ends += len(due)
    return Followed(sorted(found), [], open_ends)


def _lane_rows(
    tokens: Tokens, bos: int, lane: int, step: int, last_step: int
) -> Iterator[tuple[Place, int, np.ndarray]]:
    """Yield a lane's rows of some steps: place, index of the source, ids (T + 1,)."""
    identity = tokens.manifest.identity
    L, before = identity["lanes"], {"data": identity, "step": step - 1}
    steps = TokenSteps(tokens, bos, state=before, rank=lane, world=L)
    for number in range(step, last_step + 1):
        dealt = next(steps)
        for turn, source in enumerate(dealt.batch.sources.tolist()):
            yield (number, turn * L + lane), source, dealt.ids[turn]
