"""The order of examples: everything once an epoch, shares of a mixture, alike lengths together."""

from collections import Counter

import numpy as np
import pytest

from mlx_smolvlm.train.batches import WINDOW, BatchOrder, pad_length


def draw(order: BatchOrder, batches: int) -> list[tuple[int, int]]:
    """The examples of the first batches."""
    return [one for number in range(batches) for one in order.get_batch(number)]


@pytest.mark.parametrize("size", [1, 4, 8])
def test_an_epoch_holds_every_example_once(size: int) -> None:
    lengths = [np.random.default_rng(0).integers(10, 900, 80).tolist(), [50] * 120]
    batches = 2 * 200 // size
    found = draw(BatchOrder(lengths, None, size, batches, 3), batches)
    assert set(Counter(found).values()) == {2}
    assert len(found) == 400
    plain = [index for _, index in draw(BatchOrder([[9] * 64], None, 1, 128, 3), 128)]
    # Each epoch has an order of its own, and not only within its windows.
    assert set(plain[:WINDOW]) != set(plain[64 : 64 + WINDOW])
    assert sorted(plain[:64]) == sorted(plain[64:])
    first = draw(BatchOrder(lengths, None, size, 200 // size, 3), 200 // size)
    assert set(Counter(first).values()) == {1}


def test_shares_of_a_mixture() -> None:
    # Text, video and image as SmolVLM2 was trained on.
    lengths, shares = [[30] * 50, [500] * 20, [200] * 90], [14.0, 33.0, 53.0]
    found = draw(BatchOrder(lengths, shares, 4, 500, 0), 500)
    counts = Counter(dataset for dataset, _ in found)
    assert [counts[i] / 2000 for i in range(3)] == pytest.approx([0.14, 0.33, 0.53], abs=0.003)
    for dataset, many in enumerate(lengths):  # no example is more than once ahead of another
        often = Counter(index for d, index in found if d == dataset)
        assert max(often.values()) - min(often.values()) <= 1
        assert len(often) == len(many)


def test_a_batch_follows_from_its_number() -> None:
    lengths = [np.random.default_rng(1).integers(10, 900, 333).tolist(), [70] * 11]
    one, other = (BatchOrder(lengths, [3, 1], 4, 400, 5) for _ in range(2))
    numbers = [*range(0, 400, 7), 3, 399, WINDOW, WINDOW - 1]
    forward = {number: one.get_batch(number) for number in sorted(numbers)}
    assert {number: other.get_batch(number) for number in numbers} == forward
    assert BatchOrder(lengths, [3, 1], 4, 400, 6).get_batch(0) != forward[0]


def test_little_is_padded_and_order_has_nothing_to_do_with_length() -> None:
    lengths = [np.random.default_rng(2).integers(10, 2000, 4096).tolist()]
    order = BatchOrder(lengths, None, 8, 512, 0)
    batches = [[lengths[0][i] for _, i in order.get_batch(number)] for number in range(512)]
    taken = sum(8 * pad_length(max(batch)) for batch in batches)
    assert taken < 1.1 * sum(lengths[0])
    means = [np.mean(batch) for batch in batches]
    assert abs(np.corrcoef(means[:WINDOW], range(WINDOW))[0, 1]) < 0.5
    # Lengths that cost the same are mixed.
    short = BatchOrder([[8, 9] * 500], None, 8, 125, 0)
    assert all(len({i % 2 for _, i in short.get_batch(number)}) == 2 for number in range(20))
