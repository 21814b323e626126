"""Attention on a CPU server, sequences of equal length together, against one sequence at a time."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from megatron_gspo.rollout.sglang.attention import attend_decode, attend_extend

HEADS, GROUPS, DIM, CACHE = 4, 2, 16, 400
OPTIONS = {"scale": DIM**-0.5, "enable_gqa": True}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As the server has: with several, the size of a batch says how its sums are cut."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def cache() -> tuple[torch.Tensor, ...]:
    """Keys, values, and the rows of 9 requests' tokens, which lie anywhere and are shared by some."""
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, CACHE, GROUPS, DIM, generator=generator)
    place = torch.stack([torch.randperm(CACHE, generator=generator)[:40] for _ in range(9)])
    place[3, :10] = place[5, :10]
    return keys, values, place


def alone(query_EHD: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, places_L: torch.Tensor) -> torch.Tensor:
    """[E, H, D]: the last E of L tokens, written as a mask over all pairs."""
    new, length = len(query_EHD), len(places_L)
    mask = torch.ones(new, length, dtype=torch.bool).tril(length - new)
    key, value = (tensor[places_L].transpose(0, 1)[None] for tensor in (keys, values))
    return scaled_dot_product_attention(query_EHD.transpose(0, 1)[None], key, value, mask, **OPTIONS)[0].transpose(0, 1)


def test_a_decoded_token_attends_to_its_own_sequence_and_no_other(cache: tuple[torch.Tensor, ...]) -> None:
    keys, values, place = cache
    request, length = torch.tensor([5, 3, 8, 0, 1]), torch.tensor([13, 14, 13, 1, 14])
    query = torch.randn(5, HEADS, DIM, generator=torch.Generator().manual_seed(1))
    out = attend_decode(query, torch.full_like(query, torch.nan), keys, values, place, request, length, **OPTIONS)
    for row in range(5):
        expected = alone(query[row : row + 1], keys, values, place[request[row], : length[row]])
        torch.testing.assert_close(out[row], expected[0])


def test_a_sequences_new_tokens_attend_to_its_prefix_and_to_themselves(cache: tuple[torch.Tensor, ...]) -> None:
    keys, values, place = cache
    request = torch.tensor([5, 3, 8, 0, 1, 2])
    prefix, new = torch.tensor([0, 10, 0, 10, 10, 0]), torch.tensor([13, 3, 13, 3, 7, 1])
    query = torch.randn(int(new.sum()), HEADS, DIM, generator=torch.Generator().manual_seed(1))
    empty = torch.full_like(query, torch.nan)
    out = attend_extend(query, empty, keys, values, place, request, prefix + new, prefix, new, **OPTIONS)
    for row, (own, got) in enumerate(zip(query.split(new.tolist()), out.split(new.tolist()), strict=True)):
        torch.testing.assert_close(got, alone(own, keys, values, place[request[row], : prefix[row] + new[row]]))


def test_what_else_is_in_a_batch_changes_no_bit(cache: tuple[torch.Tensor, ...]) -> None:
    keys, values, place = cache
    request, length = torch.arange(9), torch.tensor([13, 14, 13, 20, 14, 13, 13, 7, 13])
    query = torch.randn(9, HEADS, DIM, generator=torch.Generator().manual_seed(1))
    together = attend_decode(query, torch.empty_like(query), keys, values, place, request, length, **OPTIONS)
    for row in range(9):
        one = slice(row, row + 1)
        own = attend_decode(query[one], query[one].clone(), keys, values, place, request[one], length[one], **OPTIONS)
        assert torch.equal(own, together[one])
