"""AdamW over shards: its formula, its states in host memory, and moments in bfloat16."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator
from unittest import mock

import pytest
import torch

from megatron_gspo.bench.measure import PeakMemory
from megatron_gspo.megatron import adamw
from megatron_gspo.megatron.adamw import ShardedAdamW, round_by_chance

LR, BETAS, EPS, DECAY = 1e-2, (0.9, 0.98), 1e-6, 0.1


@pytest.fixture(autouse=True)
def small_pieces() -> Iterator[None]:
    with mock.patch.object(adamw, "PIECE", 16):  # as a vector is wide: its ends are rounded otherwise than the rest
        yield


def optimizer_of(*shards: torch.Tensor, **how: object) -> ShardedAdamW:
    groups = [{"params": list(shards), "lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": DECAY}]
    return ShardedAdamW(groups, **{"moments": None, "on_host": False, **how})  # type: ignore[arg-type]


def trained(optimizer: ShardedAdamW, gradients: list[torch.Tensor]) -> torch.Tensor:
    """Its one shard after a step on each gradient."""
    [shard] = optimizer.state
    for gradient in gradients:
        shard.decoupled_grad = gradient.clone()  # type: ignore[attr-defined]
        optimizer.step()
    return shard


def random(count: int, size: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    chance = torch.Generator().manual_seed(3)
    return [torch.randn(size, generator=chance, dtype=torch.float64).to(dtype) for _ in range(count)]


def test_a_step_is_adams_with_decay_of_the_weight_itself_and_scaled_gradients() -> None:
    weight, *gradients = random(4, 39, torch.float64)
    optimizer = optimizer_of(weight.clone())
    optimizer.scale = 0.25
    m = v = torch.zeros_like(weight)
    for step, gradient in enumerate(gradients, 1):
        m = BETAS[0] * m + (1 - BETAS[0]) * 0.25 * gradient
        v = BETAS[1] * v + (1 - BETAS[1]) * (0.25 * gradient) ** 2
        corrected = m / (1 - BETAS[0] ** step), v / (1 - BETAS[1] ** step)
        weight = weight - LR * (corrected[0] / (corrected[1].sqrt() + EPS) + DECAY * weight)
    assert torch.allclose(trained(optimizer, gradients), weight, rtol=1e-13, atol=0)


@pytest.mark.parametrize("moments", [None, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_in_host_memory_change_no_bit_of_a_step(dtype: torch.dtype, moments: torch.dtype | None) -> None:
    weight, *gradients = random(5, 39)
    here, there = (optimizer_of(weight.to(dtype), moments=moments, on_host=on_host) for on_host in (False, True))
    assert torch.equal(trained(here, gradients), trained(there, gradients))
    (one,), (other,) = here.state.values(), there.state.values()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("moments", [None, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parked_states_come_back_bit_for_bit(dtype: torch.dtype, moments: torch.dtype | None) -> None:
    weight, *gradients = random(5, 39)
    still, parked = (optimizer_of(weight.to(dtype), moments=moments) for _ in range(2))
    for gradient in gradients:
        assert torch.equal(trained(still, [gradient]), trained(parked, [gradient]))
        parked.park()
        parked.park()  # of a step that was skipped
        (one,), (other,) = still.state.values(), parked.state.values()
        assert all(torch.equal(one[name], other[name]) for name in one), "as a checkpoint reads them"
        parked.unpark()
        parked.unpark()


def test_parked_states_leave_their_memory_and_are_not_stepped() -> None:
    [weight, gradient] = random(2, 39, torch.bfloat16)
    optimizer = optimizer_of(weight)
    trained(optimizer, [gradient])
    [state] = optimizer.state.values()
    names = ("param", "exp_avg", "exp_avg_sq")
    before = {name: weakref.ref(state[name].untyped_storage()) for name in names}
    before_at = {state[name].data_ptr() for name in names}
    optimizer.park()
    assert all(storage() is None for storage in before.values()), "nobody keeps them"
    [block] = {state[name].untyped_storage().data_ptr() for name in names}
    assert not before_at & {state[name].data_ptr() for name in names}
    with pytest.raises(AssertionError, match="unpark first"):
        trained(optimizer, [gradient])
    optimizer.unpark()
    assert block not in {state[name].untyped_storage().data_ptr() for name in names}
    optimizer.park()
    assert {state[name].untyped_storage().data_ptr() for name in names} == {block}, "host memory is taken once"


def test_states_in_host_memory_lie_in_one_block_and_not_on_each_other() -> None:
    optimizer = optimizer_of(*random(3, 39, torch.bfloat16), moments=torch.bfloat16, on_host=True)
    kept = [state[name] for state in optimizer.state.values() for name in ("param", "exp_avg", "exp_avg_sq")]
    [block] = {tensor.untyped_storage().data_ptr() for tensor in kept}
    ranges = sorted((tensor.data_ptr() - block, tensor.data_ptr() - block + tensor.nbytes) for tensor in kept)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(ranges))
    assert ranges[-1][1] <= kept[0].untyped_storage().nbytes()


def test_a_bfloat16_weight_has_a_master_that_adds_up_what_it_cannot() -> None:
    optimizer = optimizer_of(torch.ones(4, dtype=torch.bfloat16))
    optimizer.param_groups[0].update(lr=1e-4, weight_decay=0.0)
    weight = trained(optimizer, [torch.ones(4)] * 30)
    [state] = optimizer.state.values()
    assert state["param"].tolist() == pytest.approx([1 - 30e-4] * 4, abs=1e-6)
    assert torch.equal(weight, state["param"].to(torch.bfloat16))


@pytest.mark.parametrize("beta2", [0.98, 0.999])
def test_a_second_moment_in_bfloat16_goes_on_to_where_the_squares_are(beta2: float) -> None:
    """To the nearest it stalls where a step's change is below half of its last bit, up to a half short of them."""
    steps, size = round(3 / (1 - beta2)), 64
    optimizer = optimizer_of(torch.zeros(size), moments=torch.bfloat16)
    optimizer.param_groups[0]["betas"] = (0.9, beta2)
    nearest = torch.zeros(size, dtype=torch.bfloat16)
    for _ in range(steps):
        trained(optimizer, [torch.ones(size)])
        nearest = (beta2 * nearest.float() + (1 - beta2)).to(torch.bfloat16)
    [state] = optimizer.state.values()
    exact = 1 - beta2**steps
    assert state["exp_avg_sq"].float().mean().item() == pytest.approx(exact, rel=0.01)
    assert state["exp_avg"].float().mean().item() == pytest.approx(1 - 0.9**steps, rel=0.01)
    assert nearest.float().mean().item() < 0.97 * exact


def test_rounding_by_chance_is_right_in_the_mean_and_keeps_what_is_bfloat16_already() -> None:
    for value in (1.0 + 2**-9, -3e-20 * (1 + 2**-10), 5.5e3 + 1):
        rounded = round_by_chance(torch.full((100_000,), value), seed=1).double()
        assert rounded.unique().numel() == 2
        assert rounded.mean().item() == pytest.approx(value, rel=1e-4)
    exact = torch.randn(1000).to(torch.bfloat16)
    assert torch.equal(round_by_chance(exact.float(), seed=2), exact)
    assert round_by_chance(torch.tensor([0.0, torch.inf]), seed=3).tolist() == [0.0, torch.inf]


def test_the_same_steps_round_the_same_way() -> None:
    weight, *gradients = random(5, 39)
    one, other = (optimizer_of(weight.clone(), moments=torch.bfloat16) for _ in range(2))
    assert torch.equal(trained(one, gradients), trained(other, gradients))
    values = torch.rand(1000)
    assert not torch.equal(round_by_chance(values, seed=1), round_by_chance(values, seed=2))


@pytest.mark.parametrize(("moments", "on_host"), [(None, False), (torch.bfloat16, False), (torch.bfloat16, True)])
def test_a_step_keeps_little_beside_its_states(moments: torch.dtype | None, on_host: bool) -> None:
    """torch's foreach form, its default on a GPU, makes copies of all of them: fault 7."""
    optimizer = optimizer_of(torch.zeros(2**24), moments=moments, on_host=on_host)
    gradient = torch.ones(2**24)
    with mock.patch.object(adamw, "PIECE", 2**20):
        trained(optimizer, [gradient])  # what is allocated once
        [shard] = optimizer.state
        shard.decoupled_grad = gradient  # type: ignore[attr-defined]
        peak = PeakMemory(torch.device("cpu"))
        optimizer.step()
        assert peak.read() < 48 * 2**20, "the shard itself is 64 MiB"


def test_on_a_gpu_host_memory_is_locked_while_its_optimizer_lives_and_no_longer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Memory that stays locked when the system takes it back is refused where it hands it out again."""
    runtime = mock.Mock(cudaHostRegister=mock.Mock(return_value=0))
    monkeypatch.setattr(adamw, "here", lambda: adamw.CUDA)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "check_error", lambda result: None)
    optimizer = optimizer_of(*random(2, 39, torch.bfloat16), on_host=True)
    [(address, size, _)] = [call.args for call in runtime.cudaHostRegister.call_args_list]
    first = next(iter(optimizer.state.values()))["param"]
    assert address <= first.data_ptr() < address + size
    assert not runtime.cudaHostUnregister.called
    del optimizer, first
    assert [call.args for call in runtime.cudaHostUnregister.call_args_list] == [(address,)]
