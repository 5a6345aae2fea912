"""Silent corruption: any bit that differs between replicas is found at the next save."""

import random

import pytest
import torch
from checkpoints import cut, files_of, in_threads, make_flight, publish, whole
from ranks import run_ranks

from summerlm.checkpoint.store import Store
from summerlm.core.errors import CorruptionError


def flip(tensor, bit):
    """Flip one bit of a tensor in place, counted from its first byte."""
    view = tensor.view(-1).view(torch.uint8)
    view[bit // 8] ^= 1 << bit % 8


def save_with_flip(ranks, folder, shards, rank, stem, name, bit):
    tables = cut(whole(2), ranks.rank % shards, shards)
    flight = make_flight(Store(folder, print), tables, ranks)
    if ranks.rank == rank:
        flip(tables[stem][name].tensor, bit)
    flight.start(2, None, lambda _: files_of(2))
    try:
        return flight.wait()
    except CorruptionError as error:
        return str(error)


@pytest.mark.ranks
def test_a_flipped_bit_ends_the_job_and_keeps_the_good_checkpoint(tmp_path):
    store = Store(tmp_path / "c", pytest.fail)
    publish(store, 1)
    said = run_ranks(save_with_flip, store.folder, 1, 1, "model", "a.weight", 12_345)
    assert said[0] == said[1]
    assert "step 2: replicas differ in model a.weight (rows 0 to 40)" in said[0]
    assert "between ranks 0 and 1" in said[0]
    assert store.steps() == [1]
    assert store.latest() == store.path(1)
    assert CorruptionError.exit_code == 1


def test_every_tensor_and_any_bit(tmp_path):
    draw = random.Random(4)
    tensors = [(stem, name, t) for stem, table in whole(2).items() for name, t in table.items()]
    for number, (stem, name, tensor) in enumerate(tensors * 4):
        bit = draw.randrange(tensor.numel() * tensor.element_size() * 8)
        folder = tmp_path / str(number)
        said = in_threads(
            3, lambda r, f=folder, s=stem, n=name, b=bit: save_with_flip(r, f, 1, 2, s, n, b)
        )
        assert len(set(said)) == 1
        assert f"{stem} {name} (rows 0 to" in said[0]
        assert "on rank 2 against 0, 1" in said[0]
        assert not list(folder.iterdir())


def test_replicas_of_a_shard_are_compared_with_one_another(tmp_path):
    """Of two copies on four ranks only one row range differs: its holders are named."""
    said = in_threads(
        4, lambda r: save_with_flip(r, tmp_path / "c", 2, 3, "optimizer", "a.weight/m", 5)
    )
    assert "optimizer a.weight/m (rows 20 to 40) between ranks 1 and 3" in said[0]


def test_rows_that_one_rank_alone_holds_have_nothing_to_differ_from(tmp_path):
    said = in_threads(2, lambda r: save_with_flip(r, tmp_path / "c", 2, 1, "model", "a.weight", 5))
    assert [outcome.error for outcome in said] == [None, None]


def test_a_scalar_that_every_rank_holds_is_compared(tmp_path):
    said = in_threads(
        2, lambda r: save_with_flip(r, tmp_path / "c", 2, 1, "optimizer", "a.weight/step", 3)
    )
    assert "optimizer a.weight/step (rows 0 to 1) between ranks 0 and 1" in said[0]


@pytest.mark.parametrize("rows", [3, 4, 7])
def test_replicas_are_the_same_wherever_their_rows_begin_in_memory(tmp_path, rows):
    """One rank's rows lie at an odd offset of their storage, as views of a flat buffer may."""

    def save(ranks):
        tables = cut({"model": {"w": torch.arange(float(rows * 3)).view(rows, 3)}, "optimizer": {}})
        part = tables["model"]["w"]
        if ranks.rank == 1:
            shifted = torch.cat((torch.zeros(1), part.tensor.view(-1)))[1:].view(rows, 3)
            tables["model"]["w"] = part.like(shifted)
        flight = make_flight(Store(tmp_path / "c", print), tables, ranks)
        flight.start(1, None, lambda _: files_of(1))
        return flight.wait().error

    assert in_threads(2, save) == [None, None]


def test_zero_and_minus_zero_are_not_the_same_bits(tmp_path):
    def save(ranks):
        zero = torch.zeros(4, 2) * (-1 if ranks.rank else 1)
        flight = make_flight(
            Store(tmp_path / "c", print), cut({"model": {"w": zero}, "optimizer": {}}), ranks
        )
        flight.start(1, None, lambda _: files_of(1))
        flight.wait()

    with pytest.raises(CorruptionError, match="w"):
        in_threads(2, save)


def test_only_the_first_of_many_tensors_are_named(tmp_path):
    def save(ranks):
        table = {f"w{i}": torch.full((2,), float(ranks.rank)) for i in range(9)}
        flight = make_flight(
            Store(tmp_path / "c", print), cut({"model": table, "optimizer": {}}), ranks
        )
        flight.start(1, None, lambda _: files_of(1))
        flight.wait()

    with pytest.raises(CorruptionError, match=r"w0.*w1.*w2.*and 6 more"):
        in_threads(2, save)
