"""Batches of rows of similar length."""

import torch

from trainers.length_buckets import MEGABATCH, LengthBuckets


def test_an_epoch_serves_every_row_once_in_batches_of_similar_length():
    lengths = torch.randint(1, 500, (1003,), generator=torch.Generator().manual_seed(0)).tolist()
    sampler = LengthBuckets(lengths, 10, seed=3)
    first, again = list(sampler), list(sampler)
    assert first == again and sorted(first) == list(range(1003)) and len(sampler) == 1003
    sampler.set_epoch(1)
    assert list(sampler) != first
    spreads = [max(batch) - min(batch) for batch in torch.tensor(lengths)[first[:1000]].view(-1, 10).tolist()]
    assert max(spreads) < 500 / MEGABATCH * 3
    means = torch.tensor(lengths)[first[:1000]].view(-1, 10).double().mean(1)
    steps = (means[1:] - means[:-1]).sign()
    assert 30 < (steps > 0).sum() < 70  # batches are shuffled, not served from long to short


def test_rows_that_fill_no_batch_come_last():
    assert sorted(LengthBuckets([3, 1, 2], 4, seed=0)) == [0, 1, 2]
    assert list(LengthBuckets([5] * 9, 4, seed=0))[8] in range(9)
