"""Evaluation on several ranks: every image once, and equally many batches."""

import math

import pytest
import torch
from torch.utils.data import TensorDataset

from gflow_pl.data.unrepeated_sampler import UnrepeatedSampler, even_batch_size


@pytest.mark.parametrize(("number", "ranks"), [(355, 2), (10, 4), (16, 2), (33, 2), (7, 3)])
def test_every_image_is_in_exactly_one_share(number, ranks) -> None:
    images = TensorDataset(torch.arange(number))
    shares = [list(UnrepeatedSampler(images, ranks, rank)) for rank in range(ranks)]
    assert sorted(i for share in shares for i in share) == list(range(number))
    assert [len(share) for share in shares] == [len(UnrepeatedSampler(images, ranks, rank)) for rank in range(ranks)]


@pytest.mark.parametrize("batch_size", [3, 8, 128])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_all_ranks_have_equally_many_batches(batch_size, ranks) -> None:
    found = 0
    for number in range(ranks * 2, 400):
        size = even_batch_size(batch_size, number, ranks)
        if size:
            assert 0 < size <= batch_size
            counts = {math.ceil(len(range(rank, number, ranks)) / size) for rank in range(ranks)}
            assert len(counts) == 1, number
            found += 1
    assert found > 300
