"""What a run is made of, and how it is put together from a configuration."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch.distributed as dist

from megatron_gspo.config import RunConfig
from megatron_gspo.data.cursor import PromptOrder
from megatron_gspo.data.prompts import PromptSet
from megatron_gspo.data.tokenizer import Tokenizer, response_text
from megatron_gspo.errors import SyncError
from megatron_gspo.hf.carried import carried_names
from megatron_gspo.hf.checkpoint import HfReader
from megatron_gspo.megatron.checkpoint_files import is_distributed
from megatron_gspo.megatron.groups import Groups
from megatron_gspo.megatron.network import Network
from megatron_gspo.megatron.policy import Policy
from megatron_gspo.parallel.exchange import agree, gather_objects, together
from megatron_gspo.parallel.transfers import Transfers
from megatron_gspo.platforms import here
from megatron_gspo.rewards.references import ReferenceCheck
from megatron_gspo.rewards.registry import Reward
from megatron_gspo.rollout.engine import Engine, Sampling, make_control, make_engine
from megatron_gspo.suites.task import Task
from megatron_gspo.sync.base import NamedTensor, WeightSync, make_weight_sync
from megatron_gspo.sync.gap import with_router_noise
from megatron_gspo.sync.head import HEAD, with_head
from megatron_gspo.sync.peers import Peers
from megatron_gspo.train.engine_dtype import sent, sent_names
from megatron_gspo.train.engine_gate import EngineGate, make_gate
from megatron_gspo.train.fleet import Fleet
from megatron_gspo.train.inputs import Inputs, make_order
from megatron_gspo.train.learner import Learner, build_learner
from megatron_gspo.train.models import check_served, engine_holds_head
from megatron_gspo.train.turns import Apart, Colocated
from megatron_gspo.train.watch import Local, Watchman, another_server
from megatron_gspo.types import OPEN, Prompt, ServerAccess


@dataclass(frozen=True)
class Run(Learner):
    """One rank's view of a reinforcement-learning run; what changes lies in ``policy``, ``cursor`` and the servers."""

    tokenizer: Tokenizer
    prompts: PromptSet
    eval_prompts: PromptSet | None
    cursor: PromptOrder
    engine: Engine
    """Over all servers, which it shares with the other leaders."""
    sync: WeightSync
    fleet: Fleet
    """Which of them are there."""
    reward: Reward
    gate: EngineGate
    source_rewards: Mapping[str, Reward] = field(default_factory=dict)
    """Name of a source -> its reward, where there are sources."""
    references: Mapping[str, ReferenceCheck] | None = None
    """Name of a source ("" where there is one set of prompts) -> what is known of its reference answers; None when
    nobody looked."""
    access: ServerAccess = OPEN
    turns: Apart = field(default_factory=Apart)
    """Of trainer and servers on the same cards."""
    changed_names: frozenset[str] | None = None
    """With adapters, the tensors that a step can have changed: what a push sends once the servers have the others."""
    suites: tuple[Task, ...] = ()
    """Published evaluations."""
    notes: list[str] = field(default_factory=list)
    """What the recorder is to say after the step."""
    entering: Callable[[str], None] | None = None
    """Told of each phase of an outer step as it begins."""

    def reward_of(self, prompt: Prompt) -> Reward:
        """What grades the responses to a prompt."""
        return self.source_rewards.get(prompt.source, self.reward)

    @property
    def reward_names(self) -> str:
        """The rewards in use, quoted."""
        rewards = self.source_rewards.values() or (self.reward,)
        return ", ".join(dict.fromkeys(repr(reward.name) for reward in rewards))

    @property
    def seeded(self) -> bool:
        """Whether rollouts are drawn from seeds."""
        return self.config.rollout.is_seeded(on_gpu=here().device_type == "cuda")

    def push(self, version: int) -> None:
        """Puts the policy's weights onto the servers as ``version``, with the engine gap that is asked for; of a policy
        with adapters only what those change, once the servers have the rest. Collective.

        Raises SyncError.
        """
        self.turns.update(self.trained)
        self._reach()  # some may have been lost in the draw
        while self.fleet.up:
            names = None if self.sync.wants_all or self.turns.forgets else self.changed_names
            try:
                self._note(self.sync.push(self._outgoing(version, names), version, names and self._sent(names)))
                break
            except SyncError:
                if not self.fleet.outlives(self.fleet.up):
                    raise
                self._reach()
        self.turns.serve(self.access.version_name(version))

    def fill(self, version: int, urls: Sequence[str] | None = None) -> None:
        """As ``push``, to those servers alone that do not hold ``version``; ``urls``: as in ``WeightSync.fill``."""
        self._note(self.sync.fill(self._outgoing(version), version, urls))

    def ready(self, version: int) -> bool:
        """Whether a server can be asked for responses of ``version``. Those that have died are started again, those
        that have come back are sent the weights; the others are left out. Collective. Raises SyncError, and
        NoServerError where ``rollout.router`` is gone."""
        fleet = self.fleet
        empty = list(fleet.survey(self.access.version_name(version))) if fleet.survives else []
        while empty:
            wanted = [url for url in fleet.urls if url in fleet.up or url in empty]
            try:
                self.fill(version, wanted)
                fleet.fill(empty)
                break
            except SyncError:
                if not (gone := fleet.outlives(wanted)):
                    raise
                empty = [url for url in empty if url not in gone]
        self._reach()
        return bool(fleet.up)

    def _reach(self) -> None:
        """Weights go to the servers that are there."""
        if self.fleet.up:
            self.sync.reach(self.fleet.up)

    def _note(self, said: str) -> None:
        if said:
            self.notes.append(said)

    def _sent(self, names: Collection[str]) -> set[str]:
        return sent_names(self.config.rollout.engine_dtype, set(names), self.policy.family, self.policy.shape)

    def _outgoing(self, version: int, names: Collection[str] | None = None) -> Iterator[NamedTensor]:
        """What servers are sent; made as it is taken."""
        weights, config = self.policy.weights(copies=False, host=False, only=names), self.config
        if engine_holds_head(config.rollout.engine, self.policy.shape):
            weights = with_head(weights)
        if config.sync.router_noise:
            weights = with_router_noise(
                weights,
                self.policy.family.router_names(self.policy.shape),
                relative=config.sync.router_noise,
                seed=config.train.seed,
                version=version,
            )
        return sent(config.rollout.engine_dtype, weights, self.policy.family, self.policy.shape)

    def learn(self) -> None:
        """The trainer's turn: after the responses of an outer step, before what learns from them. Collective."""
        self.turns.train(self.trained)

    @property
    def trained(self) -> list[Network]:
        """What is trained."""
        return list(self.models.values())

    def sampling(self, outer_step: int) -> Sampling:
        """How this outer step's responses are drawn."""
        rollout = self.config.rollout
        return Sampling(
            group_size=rollout.group_size,
            temperature=rollout.temperature,
            max_tokens=rollout.max_response_tokens,
            stop_token_ids=self.tokenizer.stop_ids,
            seed=self.config.train.seed if self.seeded else None,
            outer_step=outer_step,
            routes=self.policy.shape.routes if self.config.replay.asks_for_routes(outer_step) else None,
        )


def build_run(
    config: RunConfig,
    groups: Groups,
    inputs: Inputs,
    urls: tuple[str, ...],
    access: ServerAccess = OPEN,
    *,
    colocated: bool = False,
    local: Local | None = None,
) -> Run:
    """Loads model and weights and connects to the servers, which sleep first where they are ``colocated``. ``local``:
    those that the first rank has started. Collective. Raises UserError for what the user can mend."""
    if colocated:  # one that was lost may hold memory that the trainer counts on, or would have to take it again
        config = config.model_copy(update={"rollout": config.rollout.model_copy(update={"on_server_loss": "error"})})
    turns = take_turns(config, groups, urls, access) if colocated else Apart()
    turns.begin()
    learner = build_learner(config, groups)
    policy = learner.policy
    run = Run(
        **vars(learner),
        tokenizer=inputs.tokenizer,
        prompts=inputs.prompts,
        eval_prompts=inputs.eval_prompts,
        cursor=make_order(config, inputs),
        engine=make_engine(
            urls,
            config.rollout,
            vocab_size=policy.shape.vocab_size,
            decode=response_text(inputs.tokenizer, special_tokens=config.reward.special_tokens),
            access=access,
            leaders=groups.data_size,
        ),
        fleet=make_fleet(config, groups, urls, access, local),
        sync=make_weight_sync(
            config.sync,
            urls,
            make_peers(groups),
            model_path=config.model.path,
            expected_names=expected_names(config, policy),
            access=access,
            shared=config.rollout.named,
            engine=config.rollout.engine,
            health_every_s=config.rollout.health_every_s,
        ),
        reward=inputs.reward,
        gate=make_gate(config),
        source_rewards=inputs.source_rewards,
        references=inputs.references,
        suites=inputs.suites,
        access=access,
        turns=turns,
        changed_names=changed_names(config, policy),
    )
    connect(run, urls, access, awake=not colocated)
    return run


def take_turns(config: RunConfig, groups: Groups, urls: tuple[str, ...], access: ServerAccess) -> Colocated:
    """Turns with the servers at ``urls``, which the first rank asks."""
    first = dist.get_rank() == 0
    every_s, timeout_s = config.rollout.health_every_s, config.sync.timeout_s
    control = make_control(config.rollout.engine, urls, timeout_s, access.key, every_s) if first else None
    return Colocated(control, functools.partial(together, group=groups.world))


def expected_names(config: RunConfig, policy: Policy) -> set[str]:
    """The tensors that a sync must send: those of the checkpoint, without layers that nothing here computes. A tied
    head, stored there or not, is sent to an engine that holds one of its own; eight bits with their scales.
    Collective."""
    if is_distributed(Path(config.model.path)):
        names = set().union(*gather_objects(policy.names(), policy.groups.world))
    else:
        names = set(HfReader(config.model.path).names())
        names -= set(carried_names(names, policy.shape))
    if policy.shape.tied_embeddings:
        names -= {HEAD}
    names |= {HEAD} if engine_holds_head(config.rollout.engine, policy.shape) else set()
    return sent_names(config.rollout.engine_dtype, names, policy.family, policy.shape)


def changed_names(config: RunConfig, policy: Policy) -> frozenset[str] | None:
    """What servers that have all tensors must be sent after a step: those with adapters, and what noise is put on; None
    where every tensor is trained. Collective."""
    if not policy.adapted:
        return None
    noisy = policy.family.router_names(policy.shape) if config.sync.router_noise else frozenset()
    return noisy.union(*gather_objects(policy.adapted_names(), policy.groups.world))


def connect(run: Run, urls: Sequence[str], access: ServerAccess, *, awake: bool = True) -> None:
    """Each leader says hello to the servers: one of another model, or asleep where it should be ``awake``, is found
    before anything is trained. One that is down is left out, unless there is no other. Collective."""
    error: Exception | None = None
    if run.groups.is_leader:
        try:
            asyncio.run(_enter_and_leave(run.engine))
            if dist.get_rank() == 0:
                check_served(urls, run.config.model.path, access.key, run.config.rollout.engine_dtype, awake=awake)
        except Exception as caught:
            error = caught
    agree(error, run.groups.world)
    run.fleet.hear(run.engine)
    run.sync.reach(run.fleet.up)


async def _enter_and_leave(engine: Engine) -> None:
    async with engine:
        pass


def make_fleet(
    config: RunConfig,
    groups: Groups,
    urls: Sequence[str],
    access: ServerAccess,
    local: Local | None,
) -> Fleet:
    """The servers, at which the first rank looks."""
    rollout, key = config.rollout, access.key
    seeded = rollout.is_seeded(on_gpu=here().device_type == "cuda")

    def unfit(url: str) -> str:
        check = functools.partial(check_served, [url], config.model.path, key, rollout.engine_dtype)
        return another_server(check, seeded=seeded, url=url, key=key)

    first = dist.get_rank() == 0
    watch = Watchman(urls, key, access.run, local=local, router=rollout.router, unfit=unfit) if first else None
    return Fleet(urls, groups.world, watch, survives=rollout.on_server_loss == "continue")


def make_peers(groups: Groups) -> Peers:
    """All trainer ranks, for weight sync."""
    way = Transfers(groups.world)
    return Peers(
        dist.get_rank(),
        dist.get_world_size(),
        functools.partial(gather_objects, group=groups.world),
        send=way.send,
        receive=way.receive,
        broadcast=way.broadcast,
    )
