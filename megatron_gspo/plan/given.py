"""What a configuration that is there already would take, in place of a search."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_gspo.config import RunConfig
from megatron_gspo.config.rollouts import EIGHT_BITS
from megatron_gspo.doctor.machine import gib
from megatron_gspo.doctor.reward_server import fits
from megatron_gspo.dryrun.result import DryRun
from megatron_gspo.errors import ConfigError
from megatron_gspo.hf.layout import check_layout, check_recompute
from megatron_gspo.plan import rates
from megatron_gspo.plan.estimates import with_rest
from megatron_gspo.plan.memory import ServerMemory, limit_of, memory_of, server_memory, trainer_memory
from megatron_gspo.plan.models import Model
from megatron_gspo.plan.rates import Gpu
from megatron_gspo.plan.search import Outcome, Plan, trainer_seconds
from megatron_gspo.plan.serving import Servers, rollout_seconds
from megatron_gspo.plan.settings import Choice, Request
from megatron_gspo.plan.workload import Workload
from megatron_gspo.rollout.sglang.cards import check_divides
from megatron_gspo.runs.reward_serving import placed
from megatron_gspo.train.engine_dtype import check_eight_bits


@dataclass(frozen=True)
class Given:
    """A configuration as a choice of ``plan``'s."""

    config: RunConfig
    request: Request
    choice: Choice


def given(config: RunConfig, gpus: int, per_node: int, mean_prompt: float = 0, mean_response: float = 0) -> Given:
    """Reads the layout, the servers and the work of a step off a configuration.

    Args:
        config: the run. ``placement.mode = "auto"`` is read as "colocated", unless running servers are named.
        gpus: of trainer and servers together, those of ``[reward_server]`` too, which are set aside.
        per_node: GPUs of each machine.
        mean_prompt: tokens; 0: a quarter of the longest.
        mean_response: tokens; 0: half of the longest.

    Raises ConfigError for what has no plan, and LayoutError for a layout that does not fill the trainer's GPUs.
    """
    algorithm, rollout, parallel = config.algorithm, config.rollout, config.parallel
    if not algorithm.draws_responses:
        raise ConfigError(f'algorithm.name = "{algorithm.name}": a plan is of training with rollouts')
    if gpus <= config.reward_server.cards:
        raise ConfigError(f"reward_server: {config.reward_server.cards} GPUs for it leave none of {gpus} for the run")
    gpus -= config.reward_server.cards
    colocated = config.placement.mode == "colocated" or (config.placement.mode == "auto" and not rollout.named)
    servers = _servers(config, gpus, colocated)
    ranks = gpus if colocated else gpus - servers.gpus
    if ranks < 1:
        raise ConfigError(f"{servers.count} servers of {servers.tensor} GPUs leave none of {gpus} for the trainer")
    work = Workload(
        prompts=config.train.prompts_per_step,
        group_size=rollout.group_size,
        prompt_tokens=rollout.max_prompt_tokens,
        response_tokens=rollout.max_response_tokens,
        mean_prompt=mean_prompt or max(1.0, rollout.max_prompt_tokens / 4),
        mean_response=mean_response or rollout.max_response_tokens / 2,
        minibatches=config.train.minibatches,
        reference=algorithm.uses_reference and not config.reference_is_base,
        critic=config.critic.epochs if algorithm.uses_critic else 0,
    )
    choice = Choice(
        parallel=parallel.model_copy(update={"data": parallel.data_size(ranks)}),
        gpus=ranks,
        servers=servers,
        colocated=colocated,
        microbatch_tokens=config.train.microbatch_tokens,
        recompute=config.model.recompute,
        offload=config.optimizer.offload,
        state_dtype=config.optimizer.state_dtype,
        lora=config.lora.rank,
        share=config.placement.memory or 0.0,
    )
    return Given(config, Request(gpus, per_node, work, lora=choice.lora, engine_dtype=servers.dtype), choice)


def weighed(model: Model, gpu: Gpu, run: Given) -> Outcome:
    """The one plan, or, where it does not fit, what it lacks. Raises LayoutError or ConfigError for what is illegal."""
    request, choice = run.request, run.choice
    check_layout(choice.parallel, model.shape)
    check_recompute(run.config.model, choice.parallel, model.shape)
    sizes = run.config.placement.sizes(run.config.rollout)
    check_divides(sizes, model.config)
    check_eight_bits(run.config.rollout, run.config.model.path, model.family, model.shape, sizes)
    trainer = trainer_memory(model, request, choice, run.config)
    beside = trainer if choice.colocated else None
    server = server_memory(model, gpu, request, choice.servers, beside, choice.share)
    _check_share(gpu, choice, server)
    if cards := run.config.reward_server.cards:
        fits(run.config, placed(run.config, ranks=0, cards=cards + 1), int(gpu.memory))
    memory = memory_of(request, gpu, choice, trainer, server)
    outcome = Outcome(layouts=1)
    if memory.lacking:
        outcome.refuse(choice, memory)
        return outcome
    crossing = choice.servers.tensor > request.per_node
    rollout = rollout_seconds(model, gpu, choice.servers, request.work, max(1, server.at_once_mean), crossing)
    rest = trainer_seconds(model, gpu, request, choice, memory)
    outcome.plans.append(Plan(choice, memory, with_rest({"rollout": rollout} | rest)))
    return outcome


def lacks(gpu: Gpu, choice: Choice, found: DryRun) -> int:
    """Bytes that a card is short of what a dry run found, with what no dry run counts; 0 where it fits."""
    beside = rates.CONTEXT + (rates.ASLEEP if choice.colocated else 0)
    return max(0, int(found.peaks[found.fullest].total) + beside - limit_of(gpu))


def _check_share(gpu: Gpu, choice: Choice, server: ServerMemory) -> None:
    """Raises ConfigError where ``placement.memory`` leaves too little of a card for what lies beside it."""
    usable = (1 - rates.HEADROOM / 2) * gpu.memory
    if server.total > usable:
        beside = server.total - server.parts["weights"] - server.parts["cache"]
        raise ConfigError(
            f"placement.memory = {choice.share:g}: with {gib(beside)} beside a server's weights and cache, "
            f"{gib(server.total)} of {gpu.name} would be taken, and {gib(int(usable))} are planned with: at most "
            f"{int(100 * (usable - beside) / gpu.memory) / 100:g}"
        )


def _servers(config: RunConfig, gpus: int, colocated: bool) -> Servers:
    """As many as the configuration says; else, colocated, as many as fill the GPUs, and apart one."""
    tensor = config.placement.sizes(config.rollout).cards
    named = len(config.rollout.servers) or config.rollout.local_servers
    if colocated and gpus % tensor:
        aside = f", with {own} set aside for reward_server," if (own := config.reward_server.cards) else ""
        raise ConfigError(f"{gpus} GPUs{aside} are no whole servers of placement.tensor = {tensor}")
    dtype = EIGHT_BITS if config.rollout.engine_dtype == EIGHT_BITS else ""
    return Servers(named or (gpus // tensor if colocated else 1), tensor, dtype)
