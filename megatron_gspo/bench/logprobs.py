"""Time and peak memory of the logprob pass, beside its matrix products alone and two ways that make all logits.

Every tensor rank is a process of its own. One process holds the inputs and runs every head in turn, several times over
(first come, first served would give the first a colder and the last a warmer machine), so that what else the machine
does falls on all alike; ratios are of runs of the same turn.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from megatron_gspo.bench.heads import HEADS, Problem
from megatron_gspo.bench.launch import on_ranks
from megatron_gspo.bench.measure import Clock, PeakMemory, Spread, available_bytes, machine
from megatron_gspo.config import ParallelConfig
from megatron_gspo.errors import ConfigError
from megatron_gspo.megatron.groups import device, make_groups, start_distributed
from megatron_gspo.platforms import here
from megatron_gspo.quiet import mute
from megatron_gspo.types import DTYPES

TIME_AIM, MEMORY_AIM = 1.15, 0.1
"""Ours, at most: times the products' time, and times the extra memory of full logits."""


@dataclass(frozen=True)
class Settings:
    """What is measured."""

    tokens: tuple[int, ...]
    """Micro-batches, in tokens over all tensor ranks."""
    ranks: tuple[int, ...] = (1, 2)
    """Tensor ranks."""
    alone: tuple[int, ...] = ()
    """Micro-batches at which ours alone runs, once, for its peak."""
    vocab: int = 151_936
    hidden: int = 2048
    chunk: int = 1024
    """``model.logprob_chunk``"""
    dtype: str = "float32"
    repetitions: int = 3
    threads: int = 1
    """Threads a rank, on a CPU."""


@dataclass(frozen=True)
class Row:
    """One head at one size. Seconds are of the slowest rank, bytes of the one that took most."""

    tokens: int
    ranks: int
    head: str
    repetitions: int
    forward_s: Spread
    backward_s: Spread
    total_s: Spread
    cpu_s: Spread
    """Processor time of the busiest rank, forward and backward: what a shared machine disturbs least."""
    extra_bytes: int
    """Peak above the inputs (hidden states, head, and the buffer that the head's gradient is added to)."""


def run(settings: Settings) -> dict[str, Any]:
    """Measures everything; progress goes to stderr. Raises ConfigError for sizes that ranks do not divide.

    Returns {"machine", "settings", "rows": [Row as a dict], "ratios": [...]}; see ``ratios``.
    """
    where = torch.device(here().device_type)
    _check(settings, where)
    turns: dict[tuple[int, int], Samples] = {}
    for ranks in settings.ranks:
        heads = {tokens: _heads(settings, tokens, ranks, where) for tokens in (*settings.tokens, *settings.alone)}
        turns |= {(tokens, ranks): samples for tokens, samples in _on_ranks(ranks, settings, heads).items()}
    rows = [_row(*size, head, of_head) for size, samples in turns.items() for head, of_head in samples.items()]
    described = machine(where) | {"threads_per_rank": settings.threads}
    found = [ratio for (tokens, ranks), samples in turns.items() if (ratio := ratios(tokens, ranks, samples, turns))]
    return {"machine": described, "settings": asdict(settings), "rows": [asdict(row) for row in rows], "ratios": found}


Sample = tuple[float, float, float, int]
"""forward seconds, backward seconds, processor seconds of both, extra bytes"""
Samples = dict[str, list[Sample]]
"""By head, one a turn."""


def ratios(tokens: int, ranks: int, samples: Samples, every: dict[tuple[int, int], Samples]) -> dict[str, Any]:
    """Ours over what it is held against, at one size; empty where ours ran alone.

    ``time``: median over turns of ours / the faster of the two ways to run the products; ``cpu_time``: the same in
    processor time. ``memory``: ours / full logits, which run on one rank: at n ranks against the n-th part of it.
    """
    ours, whole, tiled = (samples.get(head, []) for head in ("ours", "matmuls", "matmuls-tiled"))
    if not ours or not whole:
        return {}
    full = every.get((tokens, 1), {}).get("full-logits", [])
    seconds = [[forward + backward for forward, backward, *_ in head] for head in (ours, whole, tiled)]
    cpu = [[sample[2] for sample in head] for head in (ours, whole, tiled)]
    return {
        "tokens": tokens,
        "ranks": ranks,
        "time": median(a / min(b, c) for a, b, c in zip(*seconds, strict=True)),
        "time_aim": TIME_AIM,
        "cpu_time": median(a / min(b, c) for a, b, c in zip(*cpu, strict=True)),
        "memory": _peak(ours) * ranks / _peak(full) if full else None,
        "memory_aim": MEMORY_AIM,
    }


def _peak(samples: list[Sample]) -> int:
    return max(sample[3] for sample in samples)


def _row(tokens: int, ranks: int, head: str, samples: list[Sample]) -> Row:
    forward, backward, cpu, _ = (list(column) for column in zip(*samples, strict=True))
    total = [a + b for a, b in zip(forward, backward, strict=True)]
    return Row(
        tokens=tokens,
        ranks=ranks,
        head=head,
        repetitions=len(samples),
        forward_s=Spread.of(forward),
        backward_s=Spread.of(backward),
        total_s=Spread.of(total),
        cpu_s=Spread.of(cpu),
        extra_bytes=_peak(samples),
    )


def _check(settings: Settings, device: torch.device) -> None:
    for ranks in settings.ranks:
        for size in (settings.vocab, *settings.tokens, *settings.alone):
            if size < 1 or size % ranks:
                raise ConfigError(f"{ranks} tensor ranks do not divide {size} tokens or rows: choose a multiple")
        if device.type == "cuda" and ranks > torch.cuda.device_count():
            raise ConfigError(f"{ranks} tensor ranks need a GPU each, and there are {torch.cuda.device_count()}")


def _heads(settings: Settings, tokens: int, ranks: int, device: torch.device) -> list[str]:
    if tokens in settings.alone and tokens not in settings.tokens:
        return ["ours"]
    heads = [head for head in HEADS if head != "full-logits" or ranks == 1]
    inputs = 8 * settings.vocab * settings.hidden
    needed = inputs + 4 * 4 * tokens * settings.vocab  # logits, log-softmax, and the gradient of each
    if (free := available_bytes(device)) < needed:
        say(f"{tokens} tokens, {ranks} ranks: all logits need {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free")
        return [head for head in heads if head not in ("full-logits", "megatron")]
    return heads


def _on_ranks(ranks: int, settings: Settings, heads: dict[int, list[str]]) -> dict[int, Samples]:
    """Starts the ranks and joins their samples, by tokens: the slowest's time, the largest's memory."""
    parts: dict[int, dict[int, Samples]] = on_ranks(ranks, settings.threads, measure_on_a_rank, settings, heads)
    return {
        tokens: {
            head: [_worst(sample) for sample in zip(*(part[tokens][head] for part in parts.values()), strict=True)]
            for head in names
        }
        for tokens, names in heads.items()
    }


def _worst(samples: tuple[Sample, ...]) -> Sample:
    forward, backward, cpu, extra = (max(column) for column in zip(*samples, strict=True))
    return forward, backward, cpu, int(extra)


def measure_on_a_rank(settings: Settings, heads: dict[int, list[str]]) -> dict[int, Samples]:
    """One tensor rank's part, after a small problem to warm up."""
    mute()
    torch.set_num_threads(settings.threads)
    start_distributed()
    try:
        group = make_groups(ParallelConfig(tensor=dist.get_world_size())).tensor
        dtype, hidden = DTYPES[settings.dtype], settings.hidden
        warm = Problem.make(tokens=64, vocab=512 * group.size(), hidden=hidden, chunk=32, dtype=dtype, group=group)
        for head in dict.fromkeys(name for names in heads.values() for name in names):  # on every rank in this order
            measure(head, warm, device())
        return {
            tokens: _take_turns(
                names,
                Problem.make(
                    tokens=tokens, vocab=settings.vocab, hidden=hidden, chunk=settings.chunk, dtype=dtype, group=group
                ),
                settings.repetitions if len(names) > 1 else 1,
            )
            for tokens, names in heads.items()
        }
    finally:
        dist.destroy_process_group()


def _take_turns(heads: list[str], problem: Problem, repetitions: int) -> Samples:
    samples: Samples = {head: [] for head in heads}
    tokens, ranks = len(problem.labels_T), problem.group.size()
    for turn in range(repetitions):
        for head in heads:
            samples[head].append(measure(head, problem, device()))
            if problem.group.rank() == 0:
                forward, backward, _, extra = samples[head][-1]
                say(
                    f"{tokens:6d} tokens, {ranks} rank(s), turn {turn + 1}: {head:14s}"
                    f"{forward:8.2f} + {backward:.2f} s, {extra / 1e6:.0f} MB"
                )
    return samples


def measure(head: str, problem: Problem, device: torch.device) -> Sample:
    """Forward and backward once, from the same start on every rank."""
    problem.hidden_TH.grad = None
    dist.barrier(problem.group)
    memory, clock = PeakMemory(device), Clock(device)
    _, backward = HEADS[head](problem)
    forward_s, forward_cpu_s = clock.read()
    del _
    clock = Clock(device)
    backward()
    backward_s, backward_cpu_s = clock.read()
    return forward_s, backward_s, forward_cpu_s + backward_cpu_s, memory.read()


def say(line: str) -> None:
    """Progress, to stderr: stdout is for the result."""
    print(line, file=sys.stderr, flush=True)
