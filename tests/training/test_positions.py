"""A position in an epoch, taken over by another number of processes."""

from hypothesis import given, settings
from hypothesis import strategies as st

from utils.data.samplers import SampleKey, TrainingSampler


@settings(deadline=None)
@given(
    st.integers(60, 200),
    st.integers(1, 6),
    st.lists(st.tuples(st.integers(1, 10), st.integers(0, 20)), min_size=1, max_size=5),
    st.integers(1, 4),
    st.integers(0, 2**32),
    st.integers(0, 100),
)
def test_a_position_goes_over_to_any_number_of_processes(num_images, batch_size, starts, repeats, seed, epoch):
    """starts: (world size, steps until the next start). No image of the epoch's order is lost, none comes twice."""
    whole = TrainingSampler(num_images, 1, seed=seed, repeats=repeats)
    whole.set_position(epoch)
    order = [key for [key] in whole]  # of the whole epoch
    assert len(order) == len(set(order)) == num_images
    seen: list[SampleKey] = []
    first_step = 0
    for world_size, steps in starts:
        samplers = [
            TrainingSampler(num_images, batch_size, rank, world_size, seed, repeats) for rank in range(world_size)
        ]
        for sampler in samplers:
            sampler.set_position(epoch, first_step, first_image=len(seen))
        shares = [list(sampler) for sampler in samplers]
        global_batch = world_size * batch_size
        left = (num_images - len(seen)) // global_batch
        assert [len(share) for share in shares] == [len(sampler) for sampler in samplers] == [left] * world_size
        assert {sampler.steps_per_epoch for sampler in samplers} == {first_step + left}
        for rank, share in enumerate(shares):
            tail = order[len(seen) :][: left * global_batch]
            assert [key for batch in share for key in batch] == tail[rank::world_size]
            assert all(len(batch) == batch_size for batch in share)
        steps = min(steps, left)
        seen += order[len(seen) :][: steps * global_batch]
        first_step += steps
        assert {sampler.images_before(first_step) for sampler in samplers} == {len(seen)}


@settings(deadline=None)
@given(st.integers(24, 100), st.integers(1, 4), st.integers(1, 6), st.integers(0, 3), st.data())
def test_a_position_without_images_is_that_of_the_same_number_of_processes(num_images, batch_size, world, rank, data):
    samplers = [TrainingSampler(num_images, batch_size, rank % world, world) for _ in range(2)]
    step = data.draw(st.integers(0, samplers[0].steps_per_epoch))
    samplers[0].set_position(3, step)
    samplers[1].set_position(3, step, step * batch_size * world)
    assert list(samplers[0]) == list(samplers[1])
    for sampler in samplers:  # and a new epoch begins at its beginning
        sampler.set_position(4)
        assert len(sampler) == sampler.steps_per_epoch == num_images // (batch_size * world)
    assert list(samplers[0]) == list(samplers[1])
