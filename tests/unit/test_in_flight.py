"""What a stage keeps at one time, against Megatron's own schedule, and weights and gradients that take no memory."""

from __future__ import annotations

import pytest
import torch
from megatron.core.pipeline_parallel.schedules import get_schedule_table

from megatron_gspo.config import ParallelConfig
from megatron_gspo.doctor.in_flight import most_in_flight
from megatron_gspo.megatron.optimizer import make_room
from megatron_gspo.parallel.gradients import gradient_was_added
from megatron_gspo.parallel.grouped import Runs, grouped_linear


def pipeline(stages: int, parts: int = 1) -> ParallelConfig:
    return ParallelConfig(pipeline=stages, virtual_pipeline=parts)


def test_one_micro_batch_a_later_stage_is_kept_beside_its_own() -> None:
    kept = [most_in_flight([3.0], pipeline(4), stage, 100) for stage in range(4)]
    assert kept == [12.0, 9.0, 6.0, 3.0]
    assert most_in_flight([3.0], pipeline(4), 0, 2) == 6.0


def test_virtual_stages_of_one_length_are_kept_by_their_number() -> None:
    """Twice the later stages, a turn of each virtual stage but the last, and one."""
    assert most_in_flight([5.0] * 4, pipeline(2, 4), 0, 100) == 5 * (2 + 3 * 2 + 1)
    assert most_in_flight([5.0] * 4, pipeline(2, 4), 1, 100) == 5 * (3 * 2 + 1)
    assert most_in_flight([5.0] * 2, pipeline(4, 2), 0, 4) == 5 * 8, "there are no more"


def test_of_virtual_stages_of_unlike_length_the_long_ones_are_kept_together() -> None:
    """Seven chunks on the last of two stages: 7 x the largest, where their mean length says 36.75."""
    assert most_in_flight([7, 7, 6, 1], pipeline(2, 4), 1, 16) == 49
    assert most_in_flight([7, 7, 7, 6], pipeline(2, 4), 0, 16) == 63


@pytest.mark.parametrize(("stages", "parts", "stage"), [(2, 4, 0), (2, 4, 1), (4, 2, 0), (4, 2, 2), (4, 3, 1)])
def test_the_order_is_that_of_megatrons_table(stages: int, parts: int, stage: int) -> None:
    kept = [float(3**part) for part in range(parts)]
    table = [part for _, part in get_schedule_table(stages * 4, parts, stages)]
    warm, now, most = 2 * (stages - stage - 1) + (parts - 1) * stages, 0.0, 0.0
    for step, part in enumerate(table):
        now += kept[part]
        most = max(most, now)
        now -= kept[parts - 1 - table[step - warm]] if step >= warm else 0.0
    assert most_in_flight(kept, pipeline(stages, parts), stage, stages * 4) == most


def test_weights_without_values_take_no_memory_and_frozen_ones_keep_theirs() -> None:
    model = torch.nn.Linear(300, 200)
    model.bias.requires_grad = False
    bias = model.bias.detach().clone()
    make_room(model)
    assert model.weight.shape == (200, 300) and model.weight.untyped_storage().nbytes() == 4
    assert model.weight.data._base is None, "DDP refuses views"
    assert torch.equal(model.bias, bias) and model.bias.untyped_storage().nbytes() == 800


def test_a_gradient_that_was_added_takes_no_memory_and_the_hook_still_finds_one() -> None:
    """As Megatron's DDP does it: the hook of the accumulation asks that there be a gradient, and lets go of it."""
    weight = torch.nn.Parameter(torch.randn(2, 5, 3, dtype=torch.float64))
    weight.main_grad = torch.zeros(2, 5, 3, dtype=torch.float64)  # type: ignore[attr-defined]
    weight.grad_added_to_main_grad = False  # type: ignore[attr-defined]
    accumulate = weight.expand_as(weight).grad_fn.next_functions[0][0]  # type: ignore[union-attr]
    sizes: list[int] = []

    def hook(*_: object) -> None:
        assert weight.grad is not None and weight.grad.shape == weight.shape
        sizes.append(weight.grad.untyped_storage().nbytes())
        weight.grad = None

    accumulate.register_hook(hook)
    x = torch.randn(6, 3, dtype=torch.float64)
    y = grouped_linear(x, weight, Runs(torch.tensor([2, 4])), "loop")
    y.backward(torch.ones_like(y))
    assert sizes == [8]
    expected = torch.stack([torch.ones(5, 2).double() @ x[:2], torch.ones(5, 4).double() @ x[2:]])
    assert torch.allclose(weight.main_grad, expected, atol=1e-12)  # type: ignore[attr-defined]


def test_a_zero_stands_for_a_gradient_of_any_shape() -> None:
    weight = torch.nn.Parameter(torch.ones(4, 7, dtype=torch.bfloat16))
    gradient_was_added(weight)
    assert weight.grad is not None and weight.grad.stride() == (0, 0) and weight.grad.dtype == torch.bfloat16
