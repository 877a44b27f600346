"""Samplers: each rank's share of the training order, every image once in evaluation, and seeds."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.data.samplers import EvaluationSampler, SampleKey, TrainingSampler, derive_seed, seeded
from utils.runtime.errors import UserError

shapes = st.tuples(st.integers(1, 5), st.integers(1, 6), st.integers(1, 6), st.integers(0, 40))
seeds = st.integers(0, 2**32)
epochs = st.integers(0, 100)


def number_of_images(world_size: int, batch_size: int, steps: int, extra: int) -> int:
    """Enough for `steps` global batches, and a remainder smaller than one."""
    return world_size * batch_size * steps + extra % (world_size * batch_size)


def shares_of_ranks(num_images: int, batch_size: int, world_size: int, epoch: int, **settings: int):
    """The batches of each rank."""
    shares = []
    for rank in range(world_size):
        sampler = TrainingSampler(num_images, batch_size, rank, world_size, **settings)
        sampler.set_position(epoch)
        shares.append(list(sampler))
    return shares


def whole_order(num_images: int, seed: int, epoch: int) -> list[int]:
    """The permutation of an epoch, from a sampler of one rank and batches of one image."""
    [share] = shares_of_ranks(num_images, 1, 1, epoch, seed=seed)
    return [key.index for [key] in share]


@settings(deadline=None)
@given(shapes, seeds, epochs)
def test_ranks_share_each_global_batch_of_the_permutation(shape, seed, epoch):
    world_size, batch_size, steps, extra = shape
    num_images = number_of_images(*shape)
    order = whole_order(num_images, seed, epoch)
    assert sorted(order) == list(range(num_images))
    shares = shares_of_ranks(num_images, batch_size, world_size, epoch, seed=seed)
    assert [len(share) for share in shares] == [steps] * world_size
    global_batch = world_size * batch_size
    for step in range(steps):
        assert [len(share[step]) for share in shares] == [batch_size] * world_size
        together = [key.index for share in shares for key in share[step]]
        assert sorted(together) == sorted(order[step * global_batch : (step + 1) * global_batch])
    keys = [key for share in shares for batch in share for key in batch]
    assert {(key.epoch, key.repeat) for key in keys} == {(epoch, 0)}
    assert len({key.index for key in keys}) == len(keys) == num_images - extra % global_batch


@settings(deadline=None)
@given(shapes, seeds, epochs, st.data())
def test_a_resumed_position_gives_the_rest_of_the_epoch(shape, seed, epoch, data):
    world_size, batch_size, steps, _ = shape
    num_images = number_of_images(*shape)
    first_step = data.draw(st.integers(0, steps))
    for rank, whole in enumerate(shares_of_ranks(num_images, batch_size, world_size, epoch, seed=seed)):
        sampler = TrainingSampler(num_images, batch_size, rank, world_size, seed)
        sampler.set_position(epoch, first_step)
        assert list(sampler) == whole[first_step:]
        assert len(sampler) == steps - first_step
        assert sampler.steps_per_epoch == steps


@settings(deadline=None)
@given(shapes, seeds, epochs, st.integers(2, 5))
def test_repeated_augmentation_repeats_each_image_in_a_row(shape, seed, epoch, repeats):
    world_size, batch_size, steps, _ = shape
    num_images = number_of_images(*shape)
    order = whole_order(num_images, seed, epoch)
    expected = [SampleKey(order[place // repeats], epoch, place % repeats) for place in range(num_images)]
    [alone] = shares_of_ranks(num_images, 1, 1, epoch, seed=seed, repeats=repeats)
    assert [key for [key] in alone] == expected
    shares = shares_of_ranks(num_images, batch_size, world_size, epoch, seed=seed, repeats=repeats)
    together = sorted(key for share in shares for batch in share for key in batch)
    assert together == sorted(expected[: steps * world_size * batch_size])
    for rank, share in enumerate(shares):  # copies of one image go to different ranks
        assert share[0] == expected[rank : world_size * batch_size : world_size]


def test_the_order_differs_between_epochs_and_between_seeds():
    orders = [whole_order(40, seed, epoch) for seed in range(2) for epoch in range(2)]
    assert len(set(map(tuple, orders))) == 4
    assert whole_order(40, 1, 1) == orders[3]


def test_a_seeded_block_draws_the_same_numbers_and_restores_the_generator():
    before = torch.get_rng_state()
    with seeded(7):
        drawn = torch.rand(4)
    assert torch.equal(drawn, torch.rand(4, generator=torch.Generator().manual_seed(7)))
    assert torch.equal(torch.get_rng_state(), before)


def test_derived_seeds_differ_by_purpose_and_numbers():
    arguments = [("order", 0, 1), ("order", 1, 0), ("order", 0), ("order", 0, 0, 1), ("mixing", 0, 1), ("order", 0, 2)]
    seeds = [derive_seed(*argument) for argument in arguments]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**64 for seed in seeds)
    assert derive_seed("order", 0, 1) == seeds[0]


def test_fewer_images_than_a_global_batch_are_refused():
    assert len(TrainingSampler(8, 4, 0, 2)) == 1
    with pytest.raises(UserError, match=r"holds 7 images, fewer than one global batch of 4 x 2 processes = 8"):
        TrainingSampler(7, 4, 0, 2)


@settings(deadline=None)
@given(st.integers(0, 60), st.integers(1, 7), st.integers(1, 8))
def test_evaluation_gives_each_image_exactly_once(num_images, batch_size, world_size):
    seen = []
    for rank in range(world_size):
        sampler = EvaluationSampler(num_images, batch_size, rank, world_size)
        share = list(sampler)
        assert len(share) == len(sampler)
        assert all(1 <= len(batch) <= batch_size for batch in share)
        seen += [key for batch in share for key in batch]
    assert sorted(seen) == [SampleKey(index) for index in range(num_images)]
