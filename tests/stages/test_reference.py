"""Columns on disk: found again by content, verified, computed once by all ranks together."""

from dataclasses import replace
from functools import partial

import judged
import pytest
import torch
import workers

from framework.errors import CheckpointError
from framework.stages import columns
from framework.stages.reference import Cached, cached

ROWS = [([1, 2], [3, 4, 5], [6]), ([1], [7, 8], [9, 3]), ([1, 2], [3, 4], [6, 6]), ([4], [3], [5, 5, 5])]
IDENTITY = {"model": "tiny", "data": {"train": "abc"}}


class Asked:
    """A start model that answers -0.1 * (id + 0.01 * position), and counts the batches."""

    def __init__(self):
        self.batches = 0

    def __call__(self, batches):
        self.batches += len(batches)
        return [answer(batch) for batch in batches]


def answer(batch):
    return -0.1 * (batch.targets + 0.01 * batch.position_ids.flatten()[batch.trained]).float()


def interleaved(batch):
    """The same pairs with the trained positions of both answers in turn, as where a prompt is shared."""
    pair, within = batch.segments // 2, torch.zeros_like(batch.segments)
    for s in range(len(batch.boundaries) - 1):
        within[batch.segments == s] = torch.arange(int((batch.segments == s).sum()))
    order = (pair * 10000 + within * 10 + batch.segments % 2).argsort()
    return replace(
        batch, **{k: getattr(batch, k)[order] for k in ("trained", "targets", "weights", "segments")}
    )


def test_columns_are_found_however_the_data_is_cut(tmp_path):
    """Written from a padded and an interleaved batch of two, read from others in another order."""
    ask = Asked()
    written = [judged.pairs(ROWS[:2], packed=False), interleaved(judged.pairs(ROWS[2:])), judged.pairs([])]
    reference = cached(tmp_path, IDENTITY, written, ask=ask, world=judged.One())
    assert ask.batches == 3
    for batch in (judged.pairs(ROWS[::-1][:2]), judged.pairs(ROWS[:1]), interleaved(judged.pairs(ROWS))):
        (found,) = reference([batch])
        torch.testing.assert_close(found, answer(batch), rtol=0, atol=0)
    fill = judged.pairs([])
    assert reference([fill])[0].shape == fill.targets.shape


def test_a_segment_of_a_shared_prompt_is_the_same_segment():
    """[1, 2 | 3, 4 | 6] with `places` against the same answers with a prompt each."""
    apart = judged.pairs([([1, 2], [3, 4], [6])])
    shared = replace(
        apart,
        input_ids=torch.tensor([[1, 2, 3, 4, 6]]),
        position_ids=torch.tensor([[0, 1, 2, 3, 2]]),
        places=torch.tensor([0, 1, 2, 3, 0, 1, 4]),
        trained=torch.tensor([1, 1, 2]),
        targets=torch.tensor([3, 6, 4]),
        segments=torch.tensor([0, 1, 0]),
    )
    assert (columns.keys(shared) == columns.keys(apart)).all()


def test_what_is_trained_is_part_of_the_key():
    """The same four tokens, of which two or three are the answer."""
    two, three = columns.keys(judged.pairs([([1, 2], [3, 4], [5]), ([1], [2, 3, 4], [5])]))[[0, 2]]
    assert (two != three).any()


def test_a_second_start_asks_nobody(tmp_path):
    world = judged.One()
    cached(tmp_path, IDENTITY, [judged.pairs(ROWS)], ask=Asked(), world=world)
    ask = Asked()
    reference = cached(tmp_path, IDENTITY, [judged.pairs(ROWS)], ask=ask, world=world)
    assert ask.batches == 0
    assert isinstance(reference, Cached)
    cached(tmp_path, IDENTITY | {"model": "other"}, [judged.pairs(ROWS)], ask=ask, world=world)
    assert ask.batches == 1


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone", "no manifest"])
def test_damaged_columns_are_computed_again(tmp_path, damage):
    world = judged.One()
    cached(tmp_path, IDENTITY, [judged.pairs(ROWS)], ask=Asked(), world=world)
    (directory,) = tmp_path.iterdir()
    path = directory / ("manifest.json" if damage == "no manifest" else "values-0.bin")
    raw = bytearray(path.read_bytes())
    if damage == "flipped":
        raw[5] ^= 1
        path.write_bytes(raw)
    elif damage == "cut":
        path.write_bytes(raw[:-4])
    else:
        path.unlink()
    ask, batch = Asked(), judged.pairs(ROWS)
    (found,) = cached(tmp_path, IDENTITY, [batch], ask=ask, world=world)([batch])
    assert ask.batches == 1
    torch.testing.assert_close(found, answer(batch), rtol=0, atol=0)


def test_a_segment_that_was_never_asked_for_is_an_error(tmp_path):
    reference = cached(tmp_path, IDENTITY, [judged.pairs(ROWS[:2])], ask=Asked(), world=judged.One())
    with pytest.raises(CheckpointError, match="never asked"):
        reference([judged.pairs(ROWS[2:])])


def test_a_pass_that_fails_leaves_nothing_behind(tmp_path):
    def failing(batches):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        cached(tmp_path, IDENTITY, [judged.pairs(ROWS)], ask=failing, world=judged.One())
    assert not list(tmp_path.iterdir())
    cached(tmp_path, IDENTITY, [judged.pairs(ROWS)], ask=Asked(), world=judged.One())


def test_what_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        cached(tmp_path / "file", IDENTITY, [judged.pairs(ROWS)], ask=Asked(), world=judged.One())


def test_two_ranks_write_their_shares_and_read_all(tmp_path):
    """Each rank asks for its own rows and then looks up the other's."""
    assert workers.run(2, on_two_ranks, tmp_path) == [True, True]


def on_two_ranks(world, root):
    make = partial(judged.pairs)
    mine = judged.share(ROWS[:3], world.rank, world.size, make, at_once=1)
    ask = Asked()
    reference = cached(root, IDENTITY, mine, ask=ask, world=world)
    everything = judged.pairs(ROWS[:3])
    (found,) = reference([everything])
    return ask.batches == 2 and bool((found == answer(everything)).all())
