"""One training step of the product on any layout, and the same step by the oracle, in comparable pieces.

``run_step`` is what a rank of the pool does; ``train`` runs it on a layout's ranks and puts what they return together
by sample and by Hugging Face name, so that a test compares dictionaries and never knows a layout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import numpy as np
import torch

from megatron_gspo.types import PackedBatch, Sample, Shard, TokenShard
from tests import oracle
from tests.pool import RankPool

LAYOUTS: dict[str, tuple[int, dict[str, int]]] = {
    "TP1": (1, {}),
    "TP2": (2, {"tensor": 2}),  # EP1: Megatron-Core 0.16.1 leaves expert gradients wrong here by itself
    "PP2": (2, {"pipeline": 2}),
    "EP2": (2, {"expert": 2}),  # over two data-parallel ranks
    "DP2": (2, {}),
    "PP4": (4, {"pipeline": 4}),  # two stages with neither embedding nor head
    "TP2xEP2": (2, {"tensor": 2, "expert": 2}),
    "TP2xPP2": (4, {"tensor": 2, "pipeline": 2}),
    "TP2xDP2xEP4": (4, {"tensor": 2, "expert": 4}),
    "TP2xPP2xEP2": (4, {"tensor": 2, "pipeline": 2, "expert": 2}),
    "TP2xPP2xDP2xEP2": (8, {"tensor": 2, "pipeline": 2, "expert": 2}),
    "CP2": (2, {"context": 2}),
    "CP4": (4, {"context": 4}),
    "TP2xCP2": (4, {"tensor": 2, "context": 2}),
    "CP2xPP2": (4, {"context": 2, "pipeline": 2}),
    "CP2xEP2": (2, {"context": 2, "expert": 2}),  # experts over the two context ranks
    "CP2xDP2": (4, {"context": 2}),
    "TP2xCP2xEP2": (4, {"tensor": 2, "context": 2, "expert": 2}),
    "TP2xCP2xPP2": (8, {"tensor": 2, "context": 2, "pipeline": 2}),
    "CP2xDP2xEP4": (4, {"context": 2, "expert": 4}),
    "PP2xVPP2": (2, {"pipeline": 2, "virtual_pipeline": 2}),
    "PP2xVPP2xDP2xEP2": (4, {"pipeline": 2, "virtual_pipeline": 2, "expert": 2}),
    "PP2xVPP2xTP2xEP2": (4, {"pipeline": 2, "virtual_pipeline": 2, "tensor": 2, "expert": 2}),
    "PP3": (3, {"pipeline": 3}),  # stages of 2, 1 and 1 layers
    "TP2xETP2": (2, {"tensor": 2, "expert_tensor": 2}),
    "TP2xDP2xEP2xETP2": (4, {"tensor": 2, "expert": 2, "expert_tensor": 2}),
    "DP2xETP2": (2, {"expert_tensor": 2}),
}
"""Name -> (ranks, ``[parallel]``). Data-parallel ranks are what is left."""

Key = tuple[int, int]
"""(group, sample)."""
Plan = Sequence[Sequence[Sequence[int]]]
"""Data-parallel rank -> micro-batch -> the indices of its samples; an empty micro-batch is a dummy."""


@dataclass(frozen=True)
class Case:
    """A mini-batch and the policy that it trains."""

    path: str
    samples: tuple[Sample, ...]
    old: tuple[np.ndarray, ...]
    """By sample, [R] float64: log-probabilities under pi_old."""
    ref: tuple[np.ndarray, ...] | None = None
    loss: str = "gspo"
    clip_low: float = 1e-3
    clip_high: float = 1e-3
    kl_loss_coef: float = 0.0
    temperature: float = 0.8
    dtype: str = "float64"
    recompute: str = "off"
    recompute_modules: tuple[str, ...] = ("mlp", "moe")
    recompute_method: str = "uniform"
    exact: bool = True
    """Takes Megatron's float32 router softmax out (``exact_router``), and expects its float32 rotary angles."""
    kernels: str = "auto"
    chunk: int = 10
    """Tokens of logits at a time: fewer than a micro-batch has, and no divisor of it."""
    pad_to: int = 1
    """Micro-batches are padded to a multiple of this times what their ranks need."""
    optimizer: Mapping[str, Any] = field(
        default_factory=lambda: {"lr": 1e-6, "weight_decay": 0.1, "clip_grad": 0.5, "betas": [0.9, 0.95]}
    )
    updates: int = 0
    """Optimizer steps taken, all on this mini-batch."""


@dataclass
class Step:
    """What a step gave, put together from all ranks; arrays are numpy's."""

    logprobs: dict[Key, np.ndarray] = field(default_factory=dict)
    """[R] of each response."""
    entropy: dict[Key, np.ndarray] = field(default_factory=dict)
    log_ratio: dict[Key, float] = field(default_factory=dict)
    """log s_i."""
    clipped: dict[Key, bool] = field(default_factory=dict)
    loss: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)
    """Of the first update, as a run reports them; the same on every rank of the last stage."""
    gradients: dict[str, np.ndarray] = field(default_factory=dict)
    """Of the first update, by Hugging Face name."""
    grad_norms: list[float] = field(default_factory=list)
    """One an update."""
    moved: dict[str, np.ndarray] = field(default_factory=dict)
    """What all updates added to them."""


def train(
    ranks: RankPool,
    case: Case,
    layout: str = "TP1",
    *,
    plan: Plan | None = None,
    fault: Callable[[], Any] | None = None,
) -> Step:
    """Runs a case on a layout. ``fault`` makes a context manager that each rank enters around the whole step."""
    world, parallel = LAYOUTS[layout]
    plan = filled_up(plan or uneven_plan(len(case.samples), data_size(layout)), parallel)
    parts = ranks.run(world, run_step, case, parallel, plan, fault)
    whole = Step(grad_norms=parts[0].grad_norms)
    for part in parts:
        assert part.grad_norms == whole.grad_norms, "ranks disagree on the gradient norm"
        for name in ("logprobs", "entropy", "log_ratio", "clipped", "gradients", "moved"):
            mine, theirs = getattr(whole, name), getattr(part, name)
            assert not mine.keys() & theirs.keys(), f"two ranks own {name} of {sorted(mine.keys() & theirs.keys())[:3]}"
            mine.update(theirs)
        whole.loss += part.loss
        if fault is None and whole.metrics and part.metrics:
            assert whole.metrics == part.metrics, "ranks disagree on a metric"
        whole.metrics = part.metrics or whole.metrics
    return whole


def data_size(layout: str) -> int:
    world, parallel = LAYOUTS[layout]
    return world // (parallel.get("tensor", 1) * parallel.get("pipeline", 1) * parallel.get("context", 1))


def uneven_plan(samples: int, ranks: int, microbatches: int = 3) -> Plan:
    """Shares of different sizes, out of order; the last of several ranks ends with a dummy micro-batch."""
    order = np.random.default_rng(7).permutation(samples)
    cuts = np.linspace(0, 1, ranks + 1) ** 0.7  # the first rank has more
    shares = np.split(order, (cuts[1:-1] * samples).round().astype(int))
    plan = [[part.tolist() for part in np.array_split(share, microbatches)] for share in shares]
    if ranks > 1:
        *_, before_last, last = plan[-1]
        plan[-1][-2:] = [before_last + last, []]
    return plan


def filled_up(plan: Plan, parallel: Mapping[str, int]) -> Plan:
    """Dummies after the second micro-batch, until virtual stages can take turns."""
    multiple = parallel.get("pipeline", 1) if parallel.get("virtual_pipeline", 1) > 1 else 1
    return [[*share[:2], *[[]] * (-len(share) % multiple), *share[2:]] for share in plan]


def ranks_of_responses(case: Case, plan: Plan, tensor: int, context: int) -> dict[Key, list[Shard]]:
    """Which ranks' shards the tokens of each response lie on, by the definition of the zigzag, token by token."""
    found = {}
    for indices in (part for share in plan for part in share if part):
        batch = pack_samples(case, indices, Shard(tensor_size=tensor, context_size=context))
        starts, ends = batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist()
        rows: list[list[int]] = [[] for _ in range(context)]  # what each context rank holds
        for start, end in zip(starts, ends, strict=True):
            chunks = np.split(np.arange(start, end), 2 * context) if context > 1 else [np.arange(start, end)]
            for rank in range(context):
                rows[rank] += [*chunks[rank], *(chunks[2 * context - 1 - rank] if context > 1 else [])]
        owner = {
            int(position): Shard(index * tensor // len(row), tensor, rank, context)
            for rank, row in enumerate(rows)
            for index, position in enumerate(row)
        }
        by_response = response_positions(case, batch).split(batch.lengths_S.tolist())
        for key, positions in zip(batch.samples, by_response, strict=True):
            found[key] = list({owner[position]: None for position in positions.tolist()})
    return found


def algorithm_of(case: Case) -> Any:
    from megatron_gspo.algorithm.base import make_algorithm

    clip = {"clip_low": case.clip_low, "clip_high": case.clip_high, "allow_wide_clip": True}
    return make_algorithm(case.loss, **clip, kl_loss_coef=case.kl_loss_coef)


def run_step(case: Case, parallel: dict[str, int], plan: Plan, fault: Callable[[], Any] | None) -> Step:
    """One rank's part of ``train``."""
    from megatron_gspo.algorithm.metrics import MetricSums, finish, minibatch_sums
    from megatron_gspo.algorithm.objective import objective
    from megatron_gspo.parallel.sequence import ShardedSequenceSum
    from megatron_gspo.parallel.sums import reduce_metric_sums

    sums = MetricSums.zeros()
    with exact_router() if case.exact else nullcontext(), (fault or nullcontext)():
        policy, groups = make_policy(case, parallel)
        batches = [pack_samples(case, part, groups.shard) for part in plan[groups.data_rank]]
        shards = [with_old_logprobs(case, batch, groups.shard) for batch in batches]
        result, algorithm = Step(), algorithm_of(case)

        def loss_of(index: int, logprobs_T: torch.Tensor, entropy_T: torch.Tensor) -> torch.Tensor:
            nonlocal sums
            output = objective(algorithm, shards[index], logprobs_T, ShardedSequenceSum(groups.token))
            if not result.grad_norms:
                note(result, case, batches[index], groups, logprobs_T, entropy_T, output)
                sums = sums + minibatch_sums(shards[index], output, entropy_T, logprobs_T)
            return output.loss

        before = {name: as_array(weight) for name, weight in policy.weights()}
        policy.gradients(batches, loss_of)
        if groups.is_last_stage:
            result.metrics = finish(reduce_metric_sums(sums, stage=groups.tensor_data, data=groups.data))
        result.gradients = {name: as_array(gradient) for name, gradient in policy.named_gradients()}
        for update in range(case.updates):
            if update:
                policy.gradients(batches, loss_of)
            result.grad_norms.append(policy.step(update, case.updates)[0])
        if case.updates:
            result.moved = {name: as_array(weight) - before[name] for name, weight in policy.weights()}
    return result


def as_array(tensor: torch.Tensor) -> np.ndarray:
    """numpy knows no bfloat16: that is widened."""
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def make_policy(case: Case, parallel: dict[str, int]) -> tuple[Any, Any]:
    """(Policy, Groups) of a case on this rank."""
    from megatron_gspo import config
    from megatron_gspo.megatron.groups import make_groups
    from megatron_gspo.megatron.policy import Policy

    tree = {
        "model": {
            "path": case.path,
            "dtype": case.dtype,
            "logprob_chunk": case.chunk,
            "kernels": case.kernels,
            "recompute": case.recompute,
            "recompute_modules": case.recompute_modules,
            "recompute_method": case.recompute_method,
        },
        "data": {"path": "unused"},
        "train": {"run_dir": "nowhere"},
        "parallel": parallel,
        "optimizer": dict(case.optimizer),
        "rollout": {"temperature": case.temperature},
    }
    settings = config.parse(tree)
    groups = make_groups(settings.parallel)
    return Policy(settings, groups), groups


def pack_samples(case: Case, indices: Sequence[int], shard: Shard) -> PackedBatch:
    """Samples packed for that many tensor and context ranks."""
    from megatron_gspo.batching import packing

    dtype = torch.float64 if case.dtype == "float64" else torch.float32
    ranks = {"tensor": shard.tensor_size, "context": shard.context_size}
    if not indices:
        return packing.dummy_batch(dtype, **ranks)
    return packing.pack([case.samples[i] for i in indices], loss_dtype=dtype, pad_to=case.pad_to, **ranks)


def with_old_logprobs(case: Case, batch: PackedBatch, place: Shard) -> TokenShard:
    """This rank's shard, with the case's old (and reference) log-probabilities laid over its tokens."""
    from megatron_gspo.batching.packing import shard_positions, shard_tokens

    index_of = {(s.group, s.sample): i for i, s in enumerate(case.samples)}
    shard = shard_tokens(batch, place)

    def own(values: Sequence[np.ndarray] | None) -> torch.Tensor | None:
        if values is None:
            return None
        whole_T = batch.advantages_T.new_full((batch.num_tokens,), torch.nan)  # masked positions must not matter
        rows = [torch.from_numpy(values[index_of[key]]) for key in batch.samples if key in index_of]
        if rows:
            whole_T[response_positions(case, batch)] = torch.cat(rows).to(whole_T.dtype)
        return whole_T[shard_positions(batch.cu_seqlens, place)]

    return shard.replace(old_logprobs_T=own(case.old), ref_logprobs_T=own(case.ref))


def response_positions(case: Case, batch: PackedBatch) -> torch.Tensor:
    """[sum of R] the positions that predict response tokens, worked out from lengths alone (not from the mask)."""
    sample_of = {(s.group, s.sample): s for s in case.samples}
    positions = []
    for start, key in zip(batch.cu_seqlens.tolist(), batch.samples, strict=False):
        prompt, response = int((~sample_of[key].trained).sum()), sample_of[key].num_trained
        positions.append(torch.arange(start + prompt - 1, start + prompt + response - 1))
    return torch.cat(positions)


def note(
    result: Step,
    case: Case,
    batch: PackedBatch,
    groups: Any,
    logprobs_T: torch.Tensor,
    entropy_T: torch.Tensor,
    output: Any,
) -> None:
    """Records a micro-batch's results, on the first token rank of the last stage."""
    from megatron_gspo.batching.packing import unshard_tokens
    from megatron_gspo.parallel.exchange import gather_pieces

    pieces = [gather_pieces(piece.detach(), groups.token) for piece in (logprobs_T, entropy_T)]
    if groups.token.rank() or batch.samples == ((-1, -1),):
        assert batch.samples != ((-1, -1),) or float(output.loss) == 0.0
        return
    whole = [unshard_tokens(piece, batch.cu_seqlens, groups.shard) for piece in pieces]
    positions, lengths = response_positions(case, batch), batch.lengths_S.tolist()
    for values, into in zip(whole, (result.logprobs, result.entropy), strict=True):
        rows = values[positions].double().split(lengths)
        into.update({key: row.numpy() for key, row in zip(batch.samples, rows, strict=True)})
    result.log_ratio.update(zip(batch.samples, output.log_ratio_S.tolist(), strict=True))
    result.clipped.update(zip(batch.samples, output.clipped_S.tolist(), strict=True))
    result.loss += float(output.loss.detach())


@contextmanager
def exact_router() -> Iterator[None]:
    """Megatron takes a router's softmax in float32 whatever ``moe_router_dtype`` says; here it stays in float64."""
    softmax = torch.softmax

    def wide(input: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if input.dtype == torch.float64:
            kwargs.pop("dtype", None)
        return softmax(input, *args, **kwargs)

    with mock.patch.object(torch, "softmax", wide):
        yield


# --------------------------------------------------------------------------------------------------------- expectations


def straddling_case(path: str, *, seed: int = 7, per_token: bool = False, kl: float = 0.0, **settings: Any) -> Case:
    """A mini-batch whose sequence ratios lie on both sides of the clip range.

    per_token: advantages differ from token to token. kl: a reference policy, a little off, with this weight.
    """
    case = Case(path, tuple(oracle.random_samples(seed=seed, max_prompt=4, max_response=20)), (), **settings)
    rng = np.random.default_rng(seed)
    if per_token:
        advantages = [rng.normal(s.advantage, 1.0, s.num_trained) for s in case.samples]
        samples = [replace(s, token_advantages=a) for s, a in zip(case.samples, advantages, strict=True)]
        case = replace(case, samples=tuple(samples))
    logprobs, _ = oracle.oracle_logprobs(path, case.samples, temperature=case.temperature, exact_rotary=not case.exact)
    old = oracle.straddling_old_logprobs(logprobs, spread=1e-3)
    ref = [row.numpy() + rng.normal(0, 0.1, len(row)) for row in logprobs]
    return replace(
        case,
        old=tuple(row.numpy() for row in old),
        ref=tuple(ref) if kl else None,
        kl_loss_coef=kl,
    )


def expected_step(case: Case, *, idle: str = "no parameter") -> Step:
    """The oracle's answer; fails when the case could not tell right from wrong.

    idle: parameters whose name has this in it may have gradients of zero, and only they.
    """
    answer = oracle.oracle_step(
        case.path,
        case.samples,
        [torch.from_numpy(row) for row in case.old],
        loss=case.loss,
        clip_low=case.clip_low,
        clip_high=case.clip_high,
        temperature=case.temperature,
        ref_logprobs=case.ref and [torch.from_numpy(row) for row in case.ref],
        kl_loss_coef=case.kl_loss_coef,
        exact_rotary=not case.exact,
    )
    at_work = {name: gradient for name, gradient in answer.gradients.items() if idle not in name}
    oracle.assert_meaningful(at_work, answer.log_ratio_S, answer.clipped_S)
    keys = [(s.group, s.sample) for s in case.samples]
    return Step(
        logprobs={key: row.numpy() for key, row in zip(keys, answer.logprobs, strict=True)},
        entropy={key: row.numpy() for key, row in zip(keys, answer.entropy, strict=True)},
        log_ratio=dict(zip(keys, answer.log_ratio_S.tolist(), strict=True)),
        clipped=dict(zip(keys, answer.clipped_S.tolist(), strict=True)),
        loss=answer.loss,
        gradients={name: gradient.numpy() for name, gradient in answer.gradients.items()},
    )


def worst(actual: Mapping[Any, Any], expected: Mapping[Any, Any]) -> tuple[float, Any]:
    """The largest max|a - b| / max|b| over tensors of one name, and that name; names and shapes must agree."""
    assert actual.keys() == expected.keys(), f"only on one side: {sorted(actual.keys() ^ expected.keys())[:5]}"
    errors = []
    for name, b in expected.items():
        a, b = np.asarray(actual[name], np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape, f"{name}: {a.shape} != {b.shape}"
        scale = np.abs(b).max(initial=0.0)
        error = np.abs(a - b).max(initial=0.0)
        errors.append((float(error / scale if scale else error), name))
    return max(errors, key=lambda entry: entry[0])
