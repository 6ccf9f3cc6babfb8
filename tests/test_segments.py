"""ops/segments.py: sums by text and domain, against math.fsum."""

import itertools
import math

import numpy as np
import pytest
import torch

from lldfast.errors import InputError
from lldfast.ops.segments import SegmentSums


@pytest.fixture
def tokens():
    rng = np.random.default_rng(0)
    segment = rng.integers(0, 9, 5000)
    segment[segment == 4] = 5  # an empty segment
    segment[123] = 8
    segment[segment == 8] = 7
    segment[123] = 8  # a segment of one token
    return torch.from_numpy(-rng.exponential(4.0, 5000) * 10.0 ** rng.integers(-6, 4, 5000)), segment


def exact(values, segment, n):
    return np.array([math.fsum(values[segment == i].tolist()) for i in range(n)])


def test_unsorted_segments(tokens):
    values, segment = tokens
    sums = SegmentSums.zeros(9)
    sums.add(values, segment)
    np.testing.assert_allclose(sums.logprob, exact(values.numpy(), segment, 9), rtol=1e-13)
    assert sums.n_tokens.tolist() == np.bincount(segment, minlength=9).tolist()
    assert sums.logprob[4] == 0 and sums.n_tokens[4] == 0 and sums.logprob[8] == float(values[123])


def test_texts_across_batches_and_ranks(tokens):
    values, segment = tokens
    whole = exact(values.numpy(), segment, 9)
    cuts = [0, 1, 17, 1800, 1800, 4999, 5000]
    parts = []
    for a, b in itertools.pairwise(cuts):
        part = SegmentSums.zeros(9)
        part.add(values[a:b], segment[a:b])
        parts.append(part)
    left, right = SegmentSums.zeros(9), SegmentSums.zeros(9)
    for part in parts:
        left.merge(part)
    for part in reversed(parts):
        right.merge(part)
    for sums in (left, right):
        np.testing.assert_allclose(sums.logprob, whole, rtol=1e-13)
        assert sums.n_tokens.sum() == 5000


def test_padded_batches():
    logprob = torch.tensor([[-1.0, -2.0, 7.0], [-4.0, 7.0, 7.0]])
    labels = torch.tensor([[3, 4, -100], [5, -100, -100]])
    sums = SegmentSums.zeros(3)
    sums.add(logprob, [2, 0], labels != -100)
    assert sums.logprob.tolist() == [-4.0, 0.0, -3.0] and sums.n_tokens.tolist() == [1, 0, 2]
    domains = sums.group([0, 1, 0], 2)
    assert domains.logprob.tolist() == [-7.0, 0.0] and domains.n_tokens.tolist() == [3, 0]


def test_the_order_of_addition_is_that_of_tokens():
    values = torch.rand(4097, dtype=torch.float64) - 0.5
    sums = SegmentSums.zeros(1)
    sums.add(values, np.zeros(4097, np.int64))
    one_by_one = 0.0
    for value in values.tolist():
        one_by_one += value
    assert float(sums.logprob[0]) == one_by_one


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda s: s.add(torch.zeros(3), [0, 1]), "segment has shape"),
        (lambda s: s.add(torch.zeros(3), [0, 1, 4]), "there are 4 segments"),
        (lambda s: s.add(torch.zeros(3), [0, -1, 2]), "there are 4 segments"),
        (lambda s: s.add(torch.zeros(2), [0, 1], torch.ones(3, dtype=torch.bool)), "scored must be bool"),
        (lambda s: s.merge(SegmentSums.zeros(3)), "cannot merge 3 segments into 4"),
        (lambda s: s.group([0, 1, 2, 3], 3), "group numbers below 3"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(InputError, match=message):
        call(SegmentSums.zeros(4))
