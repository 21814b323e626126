"""Every candidate weighed: those that fit, by the time of an outer step, and why the others are out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from megatron_gspo.config import ParallelConfig
from megatron_gspo.plan import training
from megatron_gspo.plan.candidates import fleets, floor, layouts, splits, variants
from megatron_gspo.plan.estimates import NOTHING, Range, total, with_rest
from megatron_gspo.plan.memory import FEW, Memory, TrainerMemory, limit_of, memory_of, server_memory, trainer_memory
from megatron_gspo.plan.models import Model
from megatron_gspo.plan.rates import REST, Gpu
from megatron_gspo.plan.serving import AT_ONCE, Servers, rollout_seconds
from megatron_gspo.plan.settings import Choice, Request

ENOUGH, SLOWER = 4, 1.1
"""Plans to have before layouts are only counted, and how much slower these are than the fastest."""


@dataclass(frozen=True)
class Plan:
    """A candidate with what it would take."""

    choice: Choice
    memory: Memory
    seconds: dict[str, Range]
    """Part of an outer step -> its time."""

    @property
    def step(self) -> Range:
        """An outer step: its parts are one after another."""
        return total(self.seconds)

    def shares(self) -> dict[str, float]:
        """Part -> its share of the expected time."""
        whole = self.step.mid
        return {name: part.mid / whole for name, part in self.seconds.items()}


@dataclass
class Outcome:
    """What a search has found."""

    plans: list[Plan] = field(default_factory=list)
    """That fit, the fastest first: of each layout and placement its fastest form."""
    nearest: Plan | None = None
    """Of the others, the one that lacks least; its times are not summed up."""
    layouts: int = 0
    """Legal ones, in all placements."""
    slower: int = 0
    """Of them, those that could not be fast enough, whether they fit or not."""
    lacking: dict[str, int] = field(default_factory=dict)
    """What the others lack memory for ("training", "serving", "host") -> how many."""

    def best(self, top: int) -> list[Plan]:
        """The ``top`` fastest, the last of them being the fastest of the other placement where there is one."""
        first = self.plans[:top]
        others = [plan for plan in self.plans if plan.choice.colocated != self.plans[0].choice.colocated]
        if top < 2 or not others or any(plan in first for plan in others):
            return first
        return [*first[:-1], others[0]] if len(first) == top else [*first, others[0]]

    def refuse(self, choice: Choice, memory: Memory) -> None:
        """Counts one that does not fit."""
        self.lacking[memory.lacking] = self.lacking.get(memory.lacking, 0) + 1
        if self.nearest is None or memory.needed < self.nearest.memory.needed:
            self.nearest = Plan(choice, memory, {})


def search(model: Model, gpu: Gpu, request: Request) -> Outcome:
    """All legal candidates, those first that could be the fastest if memory were no matter; once some of a placement
    fit, layouts that would take ``SLOWER`` times as long even so are only counted."""
    outcome = Outcome()
    large: list[tuple[int, Layout]] = []
    times: dict[bool, list[float]] = {False: [], True: []}
    for layout in sorted(_layouts(model, gpu, request), key=lambda layout: layout.bound):
        outcome.layouts += 1
        least = floor(model, layout.parallel, request.lora)
        alike = times[layout.colocated]
        if len(alike) >= ENOUGH and layout.bound > SLOWER * min(alike):
            outcome.slower += 1
        elif least > limit_of(gpu):
            large.append((least, layout))
        elif _weigh(model, gpu, request, layout, outcome):
            alike.append(outcome.plans[-1].step.mid)
    if large and not outcome.plans and outcome.nearest is None:
        smallest = min(large, key=lambda pair: pair[0])
        large.remove(smallest)
        _weigh(model, gpu, request, smallest[1], outcome)
    if large:
        outcome.lacking["training"] = outcome.lacking.get("training", 0) + len(large)
    outcome.plans.sort(key=lambda plan: plan.step.mid)
    return outcome


def _weigh(model: Model, gpu: Gpu, request: Request, layout: Layout, outcome: Outcome) -> bool:
    """Adds the layout's best form to the plans, or counts why it is none; returns which."""
    form, trainer = _trainer(model, gpu, request, variants(layout.parallel, layout.gpus, layout.colocated, request))
    choice, memory, rollout = _with_servers(model, gpu, request, form, trainer, layout.fleet)
    if memory.lacking:
        outcome.refuse(choice, memory)
        return False
    rest = trainer_seconds(model, gpu, request, choice, memory)
    outcome.plans.append(Plan(choice, memory, with_rest({"rollout": rollout} | rest)))
    return True


@dataclass(frozen=True)
class Layout:
    """A legal layout, with the servers that it may have."""

    bound: float
    """Seconds that a step takes at least, as expected."""
    gpus: int
    """Of the trainer."""
    colocated: bool
    parallel: ParallelConfig
    fleet: list[Servers]


def _layouts(model: Model, gpu: Gpu, request: Request) -> Iterator[Layout]:
    for gpus, served, colocated in splits(request):
        fleet = list(fleets(model, served, request))
        if not fleet:
            continue
        rollout = min(
            rollout_seconds(model, gpu, servers, request.work, AT_ONCE, servers.tensor > request.per_node).mid
            for servers in fleet
        )
        for parallel in layouts(model, gpus, request):
            forms = variants(parallel, gpus, colocated, request)
            fastest = min(_training_time(model, gpu, request, form) for form in forms)
            yield Layout((rollout + fastest) * (1 + REST.mid), gpus, colocated, parallel, fleet)


def _trainer(model: Model, gpu: Gpu, request: Request, forms: list[Choice]) -> tuple[Choice, TrainerMemory]:
    """The fastest form that fits, of the first kind of states of which any does; else the leanest of all.

    Kinds come in the order of what they cost: all on the card, in host memory, with narrow moments.
    """
    kinds: dict[tuple[str, bool], list[Choice]] = {}
    for form in forms:
        kinds.setdefault((form.state_dtype, form.offload), []).append(form)
    leanest: list[tuple[Choice, TrainerMemory]] = []
    for kind in kinds.values():
        leanest.append((kind[-1], trainer_memory(model, request, kind[-1])))
        if leanest[-1][1].total > limit_of(gpu):
            continue
        for form in sorted(kind[:-1], key=lambda form: _training_time(model, gpu, request, form)):
            memory = trainer_memory(model, request, form)
            if memory.total <= limit_of(gpu):
                return form, memory
        return leanest[-1]
    return min(leanest, key=lambda pair: pair[1].total)


def _with_servers(
    model: Model, gpu: Gpu, request: Request, form: Choice, trainer: TrainerMemory, fleet: list[Servers]
) -> tuple[Choice, Memory, Range]:
    """The servers of ``fleet`` that end a rollout first, of those that fit; else those that lack least."""
    found = []
    for servers in fleet:
        server = server_memory(model, gpu, request, servers, trainer if form.colocated else None)
        choice = replace(form, servers=servers, share=server.share)
        crossing = servers.tensor > request.per_node
        time = rollout_seconds(model, gpu, servers, request.work, max(1, server.at_once_mean), crossing)
        found.append((server.at_once < FEW, server.needed if server.at_once < FEW else time.mid, choice, server, time))
    _, _, choice, server, time = min(found, key=lambda item: item[:2])
    return choice, memory_of(request, gpu, choice, trainer, server), time


def _trainer_of(request: Request, choice: Choice) -> training.Trainer:
    return training.Trainer(
        choice.parallel, choice.gpus, request.per_node, choice.microbatch_tokens, choice.recompute, choice.lora > 0
    )


def _training_time(model: Model, gpu: Gpu, request: Request, form: Choice) -> float:
    return training.pass_seconds(model, gpu, _trainer_of(request, form), request.work, backward=True).mid


def trainer_seconds(model: Model, gpu: Gpu, request: Request, choice: Choice, memory: Memory) -> dict[str, Range]:
    """Part of an outer step, but for the rollout -> its time."""
    work, trainer, held = request.work, _trainer_of(request, choice), memory.trainer
    once = training.pass_seconds(model, gpu, trainer, work, backward=False)
    step = training.pass_seconds(model, gpu, trainer, work, backward=True)
    return {
        "pi_old": once,
        "reference": once if work.reference else NOTHING,
        "critic": once + step.times(work.critic) if work.critic else NOTHING,
        "training": step + training.gradients(gpu, trainer, work, held.elements.dense, held.elements.expert, once),
        "optimizer": training.optimizer(gpu, work, held.states, choice.offload),
        "sync": training.sync(model, choice.servers),
        "moving": training.moving(gpu, held.moved),
    }
