"""How far the predictions are from times that others have published with the inputs that they depend on.

A published time without its inputs (lengths, GPUs, layout) says nothing about a prediction, and is left out: verl's
step times of Qwen3-30B-A3B on H20 (no mean length), miles' and verl's weight syncs (no number of servers: they are the
source of ``rates.SYNC_GB``), NVIDIA's rounded bands for Megatron-Core, and whatever was computed in fp8. Steps that
overlap rollouts with training are left out too: here they follow each other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from math import exp, log
from statistics import mean

from megatron_gspo.config import ParallelConfig
from megatron_gspo.plan.estimates import Range, total, with_rest
from megatron_gspo.plan.models import Model, find_model
from megatron_gspo.plan.rates import GPUS
from megatron_gspo.plan.serving import AT_ONCE, Servers, decode_seconds, prefill_seconds, rollout_seconds, spread
from megatron_gspo.plan.training import Trainer, gradients, pass_seconds, sync
from megatron_gspo.plan.workload import Workload

NEMO_RL = "NeMo RL performance summary"
AUTOMODEL = "NeMo AutoModel performance summary, commit 36044ad"
ML_ENERGY = "ml.energy leaderboard, commit 0cd52da, task gpqa"
QWEN = "Qwen3 speed benchmark, commit 7a2f61f"


@dataclass(frozen=True)
class Point:
    """A published time."""

    kind: str
    """"step", "training" or "decoding"."""
    name: str
    source: str
    seconds: float
    predict: Callable[[], Range]

    def compared(self) -> Compared:
        """Beside the prediction."""
        return Compared(self, self.predict())


@dataclass(frozen=True)
class Compared:
    """A published time and its prediction."""

    point: Point
    predicted: Range

    @property
    def ratio(self) -> float:
        """Predicted / published."""
        return self.predicted.mid / self.point.seconds

    @property
    def inside(self) -> bool:
        """Whether the published time is within the predicted range."""
        return self.predicted.low <= self.point.seconds <= self.predicted.high


@lru_cache(maxsize=16)
def _model(name: str) -> Model:
    return find_model(name)


@dataclass(frozen=True)
class GrpoStep:
    """A synchronous, colocated GRPO step of NeMo RL with a reference policy: rollout, two forward passes, training,
    refit.

    Prompts of OpenMathInstruct-2 are taken as 100 tokens, with 32 responses each; a micro-batch is as long as the
    longest sequence."""

    version: str
    model: str
    gpus: int
    seconds: float
    sequences: int
    minibatches: int
    longest: int
    mean: float
    server: int
    """Tensor-parallel ranks of a server."""
    layout: tuple[int, int, int, int]
    """Tensor, context, expert, pipeline."""
    recompute: str = "off"

    def point(self) -> Point:
        """As a published time."""
        return Point(
            "step", f"{self.model}, {self.gpus} H100", f"{NEMO_RL}, {self.version}", self.seconds, self.predict
        )

    def predict(self) -> Range:
        """The same parts as in ``plan.search``."""
        model, gpu = _model(self.model), GPUS["h100-80"]
        prompts, longest = self.sequences // 32, self.longest - 100
        work = Workload(prompts, 32, 100, longest, 100, self.mean - 100, self.minibatches, reference=True)
        tensor, context, expert, pipeline = self.layout
        data = self.gpus // (tensor * context * pipeline)
        parallel = ParallelConfig(tensor=tensor, context=context, expert=expert, pipeline=pipeline, data=data)
        trainer = Trainer(parallel, self.gpus, 8, self.longest, self.recompute)
        servers = Servers(self.gpus // self.server, self.server)
        once = pass_seconds(model, gpu, trainer, work, backward=False)
        parts = {
            "rollout": rollout_seconds(model, gpu, servers, work, AT_ONCE, self.server > 8),
            "forward": once.times(2),
            "training": pass_seconds(model, gpu, trainer, work, backward=True),
            "sync": sync(model, servers),
        }
        return total(with_rest(parts))


def _pretraining(name: str, gpus: int, sequences: int, layout: str, packed: int) -> Callable[[], Range]:
    """A step over sequences of 4,096 tokens, all of which are trained, with full recompute."""
    ep, pp, vp = map(int, layout.split(","))

    def predict() -> Range:
        model, gpu = _model(name), GPUS["h100-80"]
        work = Workload(sequences, 1, 1, 4095, 1, 4095, 1)
        parallel = ParallelConfig(expert=ep, pipeline=pp, virtual_pipeline=vp, data=gpus // pp)
        trainer = Trainer(parallel, gpus, 8, 4096 * packed, "full")
        once = pass_seconds(model, gpu, trainer, work, backward=False)
        dense, expert = model.matrices.dense // pp, model.matrices.experts // (pp * ep)
        return pass_seconds(model, gpu, trainer, work, backward=True) + gradients(
            gpu, trainer, work, dense, expert, once
        )

    return predict


def _decoding(name: str, tensor: int, batch: float, tokens: float) -> Callable[[], Range]:
    """A step of a batch in the middle of its responses; GPQA's questions are taken as 300 tokens."""

    def predict() -> Range:
        step = decode_seconds(_model(name), GPUS["h100-80"], Servers(1, tensor), batch, 300 + tokens / 2)
        return spread(GPUS["h100-80"], step)

    return predict


def _one_sequence(name: str, tensor: int, prompt: int) -> Callable[[], Range]:
    """2,048 tokens behind a prompt, alone on an H20."""

    def predict() -> Range:
        model, gpu = _model(name), GPUS["h20-96"]
        work = Workload(1, 1, prompt, 2048, prompt, 2048, 1)
        tokens = 2048 * decode_seconds(model, gpu, Servers(1, tensor), 1, prompt + 1024)
        return spread(gpu, tokens) + prefill_seconds(model, gpu, Servers(1, tensor), work)

    return predict


POINTS: tuple[Point, ...] = (
    GrpoStep("v0.6", "qwen3-30b-a3b", 32, 192, 2048, 4, 4096, 3203, 2, (1, 1, 8, 1)).point(),
    GrpoStep("v0.4", "qwen3-30b-a3b", 32, 225, 2048, 4, 4096, 3154, 4, (2, 1, 8, 1)).point(),
    GrpoStep("v0.4", "qwen3-32b", 32, 393, 2048, 4, 4096, 3206, 4, (4, 1, 1, 4)).point(),
    GrpoStep("v0.6", "qwen3-235b-a22b", 128, 395, 512, 1, 8192, 5698, 16, (2, 2, 16, 8), "full").point(),
    GrpoStep("v0.6", "qwen3-235b-a22b", 256, 312, 512, 1, 8192, 5713, 16, (2, 2, 16, 8), "full").point(),
    Point("training", "qwen3-30b-a3b, 8 H100", AUTOMODEL, 21.773, _pretraining("qwen3-30b-a3b", 8, 512, "8,1,1", 4)),
    Point("training", "deepseek-v3, 256 H100", AUTOMODEL, 8.18, _pretraining("deepseek-v3", 256, 512, "64,4,8", 1)),
    Point("training", "deepseek-v3, 1024 H100", AUTOMODEL, 37.87, _pretraining("deepseek-v3", 1024, 8192, "64,4,8", 1)),
    *(
        Point(
            "decoding",
            f"{name}, {tensor} H100, batch {batch}",
            ML_ENERGY,
            batch / rate,
            _decoding(name, tensor, batch, tokens),
        )
        for name, tensor, batch, tokens, rate in (
            ("qwen3-8b", 1, 8, 7854, 818),
            ("qwen3-8b", 1, 32, 8170, 1917),
            ("qwen3-14b", 1, 16, 7432, 924),
            ("qwen3-14b", 1, 59, 6711, 2146),
            ("qwen3-32b", 2, 16, 6906, 827),
            ("qwen3-32b", 2, 64, 7058, 2079),
            ("qwen3-30b-a3b", 1, 8, 8162, 648),
            ("qwen3-30b-a3b", 1, 16, 8243, 955),
            ("qwen3-30b-a3b", 2, 32, 8110, 1965),
            ("qwen3-30b-a3b", 2, 128, 8058, 4664),
            ("qwen3-235b-a22b", 8, 8, 9195, 394),
            ("qwen3-235b-a22b", 8, 32, 8955, 955),
        )
    ),
    *(
        Point(
            "decoding",
            f"{name}, {tensor} H20, one sequence behind {prompt}",
            QWEN,
            (prompt + 2048) / rate,
            _one_sequence(name, tensor, prompt),
        )
        for name, tensor, prompt, rate in (
            ("qwen3-0.6b", 1, 1, 414.17),
            ("qwen3-8b", 1, 1, 81.73),
            ("qwen3-32b", 1, 1, 20.72),
            ("qwen3-30b-a3b", 1, 1, 137.18),
            ("qwen3-30b-a3b", 1, 30720, 1283.94),
            ("qwen3-235b-a22b", 8, 1, 74.50),
            ("qwen3-235b-a22b", 8, 30720, 979.41),
        )
    ),
)
"""Every published time whose inputs are published."""


def compared() -> list[Compared]:
    """All of them."""
    return [point.compared() for point in POINTS]


def factor_off(rows: list[Compared]) -> float:
    """By what factor predictions are off, either way, on (geometric) average."""
    return exp(mean(abs(log(row.ratio)) for row in rows))
