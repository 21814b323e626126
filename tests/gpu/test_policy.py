"""A policy on one CUDA device takes the step that it takes on a CPU, repeats itself bitwise, and never holds logits.

The CPU's step is held against transformers in float64 by ``tests/distributed``; here the same code runs on both.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_gspo.types import Shard
from tests import oracle
from tests.distributed import steps
from tests.distributed.steps import Case, Step
from tests.gpu.one_rank import needs_cuda, on_cpu, on_gpu

pytestmark = needs_cuda

PLAN = [[0, 1, 2, 3, 4], [5, 6, 7], [8, 9, 10, 11]]
"""Micro-batch -> the indices of its samples."""
ADAMW: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "clip_grad": 0.5, "betas": [0.9, 0.95], "eps": 1e-8}
Weights = dict[str, np.ndarray]


@dataclass
class Taken:
    """A whole step: what it gave, and the weights on both sides of the update."""

    step: Step
    """Log-probabilities are those of ``Policy.logprobs``, a pass of its own."""
    before: Weights
    after: Weights


# -------------------------------------------------------------------------------------- what runs in its own process


def take_step(case: Case, deterministic: bool = False) -> Taken:
    """Logprobs, gradients and one update, on whatever device this process has."""
    from megatron_gspo.algorithm.objective import objective
    from megatron_gspo.megatron.groups import device
    from megatron_gspo.parallel.sequence import ShardedSequenceSum

    policy, groups = deterministic_policy(case) if deterministic else steps.make_policy(case, {})
    packed = [steps.pack_samples(case, part, Shard()) for part in PLAN]
    batches = [batch.to(device()) for batch in packed]
    shards = [steps.with_old_logprobs(case, batch, Shard()).map(lambda values: values.to(device())) for batch in packed]
    result, algorithm = Step(), steps.algorithm_of(case)

    def loss_of(index: int, logprobs_T: torch.Tensor, entropy_T: torch.Tensor) -> torch.Tensor:
        output = objective(algorithm, shards[index], logprobs_T, ShardedSequenceSum(groups.token))
        own_T, own_entropy_T = scored[index]
        steps.note(result, case, packed[index], groups, own_T.cpu(), own_entropy_T.cpu(), output)
        return output.loss

    scored = policy.logprobs(batches)
    before = arrays(policy.weights())
    policy.gradients(batches, loss_of)
    result.gradients = arrays(policy.named_gradients())
    result.grad_norms = [policy.step(0, 1)[0]]
    return Taken(result, before, arrays(policy.weights()))


def arrays(tensors: Any) -> Weights:
    return {name: tensor.double().cpu().numpy() for name, tensor in tensors}


def deterministic_policy(case: Case) -> tuple[Any, Any]:
    """(Policy, Groups) of a run under ``train.deterministic``."""
    from megatron_gspo.megatron.policy import Policy
    from megatron_gspo.runs.loop import set_determinism

    policy, groups = steps.make_policy(case, {})
    train = policy.config.train.model_copy(update={"deterministic": True})
    settings = policy.config.model_copy(update={"train": train})
    set_determinism(settings)
    return Policy(settings, groups), groups


def pi_old_is_the_training_forward(case: Case) -> list[bool]:
    """Of each micro-batch: equal bit by bit, log-probabilities and entropies."""
    policy, _ = deterministic_policy(case)
    batches = [steps.pack_samples(case, part, Shard()).to("cuda") for part in PLAN]
    old, equal = policy.logprobs(batches), []

    def loss_of(index: int, logprobs_T: torch.Tensor, entropy_T: torch.Tensor) -> torch.Tensor:
        equal.append(torch.equal(old[index][0], logprobs_T.detach()) and torch.equal(old[index][1], entropy_T))
        return logprobs_T.sum()

    policy.gradients(batches, loss_of)
    return equal


def steps_repeat(case: Case) -> bool:
    """Whether a step taken twice gives the same gradients and weights, bit by bit."""
    first, second = (take_step(case, deterministic=True) for _ in range(2))
    pairs = [(first.step.gradients, second.step.gradients), (first.after, second.after)]
    return all(np.array_equal(a[name], b[name]) for a, b in pairs for name in a)


def peak_bytes(case: Case, train: bool) -> int:
    """Device memory that one packed micro-batch of all samples takes at its peak, beyond what the policy holds."""
    policy, _ = steps.make_policy(case, {})
    batches = [steps.pack_samples(case, range(len(case.samples)), Shard()).to("cuda")]
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    if train:
        policy.gradients(batches, lambda index, logprobs_T, entropy_T: logprobs_T.sum())
    else:
        policy.logprobs(batches)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - held


# ---------------------------------------------------------------------------------------------------------------- tests


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    path = str(oracle.make_tiny_qwen3_moe(tmp_path_factory.mktemp("moe")))
    return steps.straddling_case(path, dtype="float32", exact=False, optimizer=ADAMW)


@pytest.fixture(scope="module")
def taken(case: Case) -> Callable[[str, str], Taken]:
    """(device, dtype) -> the step, taken once. In bfloat16 no ratio is clipped: its noise is wider than the range."""

    @functools.cache
    def take(device: str, dtype: str) -> Taken:
        wide = case if dtype == "float32" else replace(case, clip_low=0.9, clip_high=0.9)
        return (on_gpu if device == "gpu" else on_cpu)(take_step, replace(wide, dtype=dtype))

    return take


def distance(a: Weights, b: Weights) -> float:
    """|a - b| / |b| over all tensors together."""
    assert a.keys() == b.keys()
    squares = [(float(((a[name] - b[name]) ** 2).sum()), float((b[name] ** 2).sum())) for name in b]
    return float(np.sqrt(sum(difference for difference, _ in squares) / sum(size for _, size in squares)))


def test_a_float32_step_is_that_of_a_cpu(taken: Callable[[str, str], Taken]) -> None:
    gpu, cpu = taken("gpu", "float32").step, taken("cpu", "float32").step
    assert any(cpu.clipped.values()) and not all(cpu.clipped.values()), "a comparison without clipping on both sides"
    assert gpu.clipped == cpu.clipped
    assert steps.worst(gpu.logprobs, cpu.logprobs)[0] < 2e-5  # TF32 would show
    assert steps.worst(gpu.entropy, cpu.entropy)[0] < 2e-5
    assert gpu.loss == pytest.approx(cpu.loss, rel=1e-4)
    assert distance(gpu.gradients, cpu.gradients) < 1e-4
    error, where = steps.worst(gpu.gradients, cpu.gradients)
    assert error < 1e-3, f"the gradient of {where} is off by {error:.1e}"
    assert gpu.grad_norms == pytest.approx(cpu.grad_norms, rel=1e-3)


def test_a_bfloat16_step_is_as_near_to_float32_as_a_cpus(taken: Callable[[str, str], Taken]) -> None:
    gpu, cpu, exact = (taken(*place).step for place in (("gpu", "bfloat16"), ("cpu", "bfloat16"), ("cpu", "float32")))
    for name in ("logprobs", "entropy"):
        noise = distance(getattr(cpu, name), getattr(exact, name))
        assert 1e-4 < noise < 0.1, f"{name}: the CPU's own noise"
        assert distance(getattr(gpu, name), getattr(exact, name)) < 3 * noise, name
    # Both are bfloat16's rounding of one gradient: a wrong or missing term would be of the gradient's own size.
    assert distance(gpu.gradients, cpu.gradients) < 0.3
    assert gpu.grad_norms == pytest.approx(cpu.grad_norms, rel=0.2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_update_is_adamw_on_its_own_clipped_gradients(taken: Callable[[str, str], Taken], dtype: str) -> None:
    gpu = taken("gpu", dtype)
    norm = np.sqrt(sum((gradient**2).sum() for gradient in gpu.step.gradients.values()))
    assert gpu.step.grad_norms[0] == pytest.approx(norm, rel=1e-3)
    factor, lr = ADAMW["clip_grad"] / norm, ADAMW["lr"]
    assert factor < 1, "gradients are not scaled"
    ulp = 2.0**-8 if dtype == "bfloat16" else 2.0**-23
    for name, before in gpu.before.items():
        gradient = gpu.step.gradients[name] * factor
        decay = ADAMW["weight_decay"] * before if before.ndim > 1 else 0.0
        # Adam's first step: both moments, without their bias, are the gradient and its square.
        expected = before - lr * (gradient / (np.abs(gradient) + ADAMW["eps"]) + decay)
        assert np.abs(gpu.after[name] - before).max() > 0.9 * lr, f"{name} has not moved"
        assert (np.abs(gpu.after[name] - expected) <= 2 * ulp * np.abs(expected) + 1e-2 * lr).all(), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_under_deterministic_the_pi_old_pass_is_bitwise_the_first_training_forward(case: Case, dtype: str) -> None:
    assert on_gpu(pi_old_is_the_training_forward, replace(case, dtype=dtype)) == [True] * len(PLAN)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_under_deterministic_a_step_repeats_bitwise(case: Case, dtype: str) -> None:
    assert on_gpu(steps_repeat, replace(case, dtype=dtype))


@pytest.mark.parametrize("train", [False, True], ids=["logprobs", "gradients"])
def test_a_logprob_pass_needs_less_memory_than_its_logits(tmp_path: Path, train: bool) -> None:
    vocab = 151_936
    path = str(oracle.make_tiny_qwen3_moe(tmp_path, layers=1, vocab=vocab, dtype=torch.float32))
    samples = oracle.random_samples(vocab=vocab, groups=16, group_size=8, max_prompt=2, max_response=60)
    tokens = sum(sample.length for sample in samples)
    assert tokens > 3000
    case = Case(path, tuple(samples), (), dtype="float32", chunk=128)
    logits = tokens * vocab * 4
    assert 0 < on_gpu(peak_bytes, case, train) < logits / 3
