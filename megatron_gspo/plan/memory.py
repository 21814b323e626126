"""What each card and each node would hold: the trainer by ``doctor.estimate``, servers and host added here."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_gspo.config import RunConfig
from megatron_gspo.config.placement import MEMORY
from megatron_gspo.doctor.estimate import Estimate, estimate
from megatron_gspo.doctor.passing import Passing, peak
from megatron_gspo.doctor.served import cache_per_token
from megatron_gspo.doctor.tensors import Elements, elements_of_stage
from megatron_gspo.kernels.choice import Machine
from megatron_gspo.plan import rates
from megatron_gspo.plan.models import Model, adapters
from megatron_gspo.plan.rates import Gpu
from megatron_gspo.plan.serving import Servers, sequences_at_once, weights_per_card
from megatron_gspo.plan.settings import Choice, Request, config_of
from megatron_gspo.plan.training import ITEM, WIDE

FEW = 16
"""Of the longest sequences that a server must hold at once."""
PLANNED = Machine(capability=9, triton=True, apex=True)
"""The kernels that are planned with: a GPU's with all that ``make install DEVICE=cuda`` and ``make kernels`` bring."""


@dataclass(frozen=True)
class TrainerMemory:
    """Of the fullest rank."""

    parts: dict[str, int]
    """Part -> bytes on the card while it trains; "context" is what nobody counts."""
    offloaded: int
    """Of its states, what stays in host memory."""
    moved: int
    """What goes to host memory while servers generate on the same card, and comes back."""
    stays: int
    """Weights of all models, which stay there meanwhile."""
    elements: Elements
    """That are trained: all of its own, or adapters."""
    states: int
    """Of the optimizer, wherever they lie."""

    @property
    def total(self) -> int:
        """Of a card."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class ServerMemory:
    """Of one of its cards, while it is awake."""

    parts: dict[str, int]
    """Part -> bytes: weights, cache, working memory, what of the trainer stays beside them."""
    at_once: int
    """Sequences of the longest length whose keys and values it holds."""
    at_once_mean: int
    """Of mean length, on average half done."""
    sequence: int
    """Bytes of the longest sequence's keys and values."""
    share: float
    """Of the card, weights and cache: ``placement.memory``."""

    @property
    def total(self) -> int:
        """With a cache as large as there is room for."""
        return sum(self.parts.values())

    @property
    def needed(self) -> int:
        """With a cache for ``FEW`` of the longest sequences at least."""
        return self.total + max(0, FEW * self.sequence - self.parts["cache"])


@dataclass(frozen=True)
class Memory:
    """Of a candidate."""

    trainer: TrainerMemory
    server: ServerMemory
    host: int
    """Of a node's host memory."""
    limit: int
    """Bytes of a card that may be planned for."""

    @property
    def lacking(self) -> str:
        """What does not fit: "training", "serving" or "host"; empty where all does."""
        if self.trainer.total > self.limit:
            return "training"
        if self.server.at_once < FEW:
            return "serving"
        return "host" if self.host > rates.HOST_NODE else ""

    @property
    def needed(self) -> int:
        """Bytes that a card would have to have free."""
        return max(self.trainer.total, self.server.needed if self.server.at_once < FEW else 0)


def limit_of(gpu: Gpu) -> int:
    """Bytes of a card that may be planned for: not what uneven experts and fragments may take."""
    return int((1 - rates.HEADROOM) * gpu.memory)


def trainer_memory(model: Model, request: Request, choice: Choice, config: RunConfig | None = None) -> TrainerMemory:
    """Of a candidate's fullest rank: the first pipeline stage has most micro-batches in flight, the last one the
    head. ``config``: the one that the choice was read from; otherwise it is made of the choice."""
    config = config or config_of(model, request, choice)
    data = choice.parallel.data_size(choice.gpus)
    stages = sorted({0, choice.parallel.pipeline - 1})
    ranks = [_rank(model, config, choice, data, stage) for stage in stages]
    return max(ranks, key=lambda rank: rank.total)


def memory_of(request: Request, gpu: Gpu, choice: Choice, trainer: TrainerMemory, server: ServerMemory) -> Memory:
    """Both, and the host of a node: its ranks' states and processes, its servers' processes."""
    ranks = min(choice.gpus, request.per_node)
    servers = max(1, min(choice.servers.count, request.per_node // choice.servers.tensor))
    host = ranks * (trainer.offloaded + trainer.moved + rates.HOST_RANK) + servers * rates.HOST_SERVER
    return Memory(trainer, server, host, limit_of(gpu))


def _rank(model: Model, config: RunConfig, choice: Choice, data: int, stage: int) -> TrainerMemory:
    low_rank = adapters(model, config.lora)
    needed = estimate(
        config, model.shape, model.tensors, data_size=data, stage=stage, adapters=low_rank, machine=PLANNED
    )
    passing = Passing.of(config, model.shape, stage, data, PLANNED)
    trained = low_rank if choice.lora else model.tensors
    elements = elements_of_stage(trained, model.shape, choice.parallel, stage)
    there = needed.on_card(config)
    parts = _parts(there, peak(there, passing)) | {"context": rates.CONTEXT}
    critic = needed.critic * ITEM // (ITEM + WIDE)
    if choice.colocated:
        parts["sleeping server"] = rates.ASLEEP
    return TrainerMemory(
        parts={name: size for name, size in parts.items() if size},
        offloaded=needed.total - there.total,
        moved=there.gradients + there.optimizer + there.critic - critic + there.critic_states
        if choice.colocated
        else 0,
        stays=needed.weights + needed.reference + critic,
        elements=elements,
        states=needed.optimizer,
    )


def _parts(there: Estimate, fullest: int) -> dict[str, int]:
    """What a rank holds at its fullest, which may be later than when it holds most of activations: these are then as
    much less, and nothing comes and goes."""
    parts = {name.replace("_", " "): size for name, size in vars(there).items()}
    passing = fullest - there.total
    for name in ("logprobs", "activations"):
        less = max(0, min(parts[name], -passing))
        parts[name], passing = parts[name] - less, passing + less
    return parts | {"temporary": passing}


def server_memory(
    model: Model, gpu: Gpu, request: Request, servers: Servers, trainer: TrainerMemory | None, share: float = 0.0
) -> ServerMemory:
    """One of ``servers``; ``trainer``: the one that shares them and keeps its weights there; ``share``: of
    a card, for weights and cache; 0: as much as there is."""
    weights, tensor, work, shape = weights_per_card(model, servers), servers.tensor, request.work, model.shape
    stays = trainer.stays if trainer else 0
    beside = rates.CONTEXT + rates.SERVER_WORK + stays
    share = share or max(0.01, int(100 * min(MEMORY["apart"], 1 - rates.HEADROOM / 2 - beside / gpu.memory)) / 100)
    room = max(0, int(share * gpu.memory) - weights)
    parts = {"weights": weights, "cache": room, "working": rates.SERVER_WORK, "context": rates.CONTEXT}
    return ServerMemory(
        parts=parts | ({"trainer's weights": stays} if stays else {}),
        at_once=sequences_at_once(room, shape, tensor, work.longest),
        at_once_mean=sequences_at_once(room, shape, tensor, work.mean_prompt + work.mean_response / 2),
        sequence=cache_per_token(shape, tensor) * work.longest,
        share=share,
    )
