"""The root of the configuration, and what its sections must be to each other."""

from __future__ import annotations

import math
import os
from pathlib import Path

from pydantic import Field, SerializeAsAny, model_validator

from megatron_gspo.algorithm.base import ALONE, Algorithm, make_algorithm
from megatron_gspo.algorithm.correction import Correction
from megatron_gspo.batching.planning import padded_length
from megatron_gspo.config.layout import ParallelConfig
from megatron_gspo.config.lora import LoraConfig
from megatron_gspo.config.placement import Placement, PlacementConfig
from megatron_gspo.config.reward_server import RewardServerConfig
from megatron_gspo.config.rollouts import EIGHT_BITS, EvalConfig, ReplayConfig, RewardConfig, RolloutConfig, SyncConfig
from megatron_gspo.config.sandbox import SandboxConfig
from megatron_gspo.config.training import CriticConfig, DataConfig, ModelConfig, OptimizerConfig, TrainConfig
from megatron_gspo.errors import ConfigError
from megatron_gspo.section import Section

RESPONSES_A_SERVER = 64
"""On a CPU, of an outer step: fewer do not make up for another server's start, and for its memory."""
MOST_SERVERS = 8


class RunConfig(Section):
    """The root: one section a concern."""

    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    algorithm: SerializeAsAny[Algorithm] = Field(default_factory=make_algorithm)
    correction: Correction = Correction()
    lora: LoraConfig = LoraConfig()
    parallel: ParallelConfig = ParallelConfig()
    placement: PlacementConfig = PlacementConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    critic: CriticConfig = CriticConfig()
    rollout: RolloutConfig = RolloutConfig()
    sync: SyncConfig = SyncConfig()
    reward: RewardConfig = RewardConfig()
    reward_server: RewardServerConfig = RewardServerConfig()
    sandbox: SandboxConfig = SandboxConfig()
    eval: EvalConfig = EvalConfig()
    replay: ReplayConfig = ReplayConfig()

    @property
    def minibatches(self) -> int:
        """Optimizer steps per outer step: 1 for sft."""
        return self.train.minibatches if self.algorithm.draws_responses else 1

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run."""
        return self.train.outer_steps * self.minibatches

    def placed(self, *, ranks: int, cards: int, cores: int) -> Placement:
        """Where trainer and servers lie on a machine with so many ranks, GPUs and cores; the last GPUs are for
        ``reward_server``. Raises ConfigError."""
        left = self.cards_left(ranks=ranks, cards=cards)
        return self.placement.resolved(self.rollout, ranks=ranks, cards=left, cpu_servers=self._cpu_servers(cores))

    def cards_left(self, *, ranks: int, cards: int) -> int:
        """Of so many GPUs, those that ``reward_server`` does not take. Raises ConfigError for fewer than are needed."""
        own = self.reward_server
        if not own.cards:
            return cards
        left = cards - own.cards if cards else 0
        if cards and left < max(ranks, 0 if self.rollout.named else 1):
            raise ConfigError(
                f"reward_server: {own.count} server(s) of {own.tensor} card(s) and {ranks} rank(s) need more than the "
                f"{cards} card(s) of this machine: fewer of them, or start the servers elsewhere and name them in the "
                f"reward's url"
            )
        return left

    def _cpu_servers(self, cores: int) -> int:
        """``rollout.local_servers`` with its default filled in, for a machine of so many cores."""
        if self.rollout.local_servers is not None:
            return self.rollout.local_servers
        responses = self.train.prompts_per_step * self.rollout.group_size
        return max(1, min(cores, MOST_SERVERS, responses // RESPONSES_A_SERVER))

    @property
    def reference_is_base(self) -> bool:
        """Whether the reference, if the algorithm uses one, is the policy without its adapters."""
        path = self.algorithm.reference or self.model.path
        return bool(self.lora.rank) and os.path.realpath(path) == os.path.realpath(self.model.path)

    @property
    def engine_k3_limit(self) -> float | None:
        """``rollout.max_engine_k3`` with its default filled in, nats per token; None where nothing is compared.

        At equal weights an engine in float32 is some 1e-13 off, and a token whose router was at a tie may be more; one
        in bfloat16, whose routers choose other experts for some tokens, 1e-3 to 1e-2. One that ignores a setting of
        the model is 0.1 to 5 off. A small model of random weights is 0.01 off in bfloat16 and 0.08 in fp8,
        and 1 and more where eight bits have lost their scales (docs/fp8.md).
        """
        if self.rollout.max_engine_k3 is not None:
            return self.rollout.max_engine_k3 or None
        if self.rollout.engine_dtype == EIGHT_BITS:
            return 0.3
        exact = (self.rollout.engine_dtype or self.model.dtype) in ("float32", "float64") and not self.sync.router_noise
        return 1e-3 if exact else 0.1

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        prompts, minibatches = self.train.prompts_per_step, self.train.minibatches
        if self.algorithm.draws_responses and prompts % minibatches:
            below, above = prompts // minibatches * minibatches, -(-prompts // minibatches) * minibatches
            fewer = _divisor_below(prompts, minibatches)
            raise ValueError(
                f"train.prompts_per_step = {prompts} is not a multiple of train.minibatches = {minibatches}: "
                f"a mini-batch is made of whole groups ({prompts} / {minibatches} = {prompts / minibatches:g}); "
                f"{f'{below} or {above}' if below else above} prompts would do, or train.minibatches = {fewer}"
            )
        if self.optimizer.min_lr > self.optimizer.lr:
            raise ValueError(
                f"optimizer.min_lr = {self.optimizer.min_lr:g} is above optimizer.lr = {self.optimizer.lr:g}"
            )
        warmup, total = self.optimizer.warmup_steps, self.total_steps
        if warmup >= total:
            made_of = "train.outer_steps" + (" x train.minibatches" if self.algorithm.draws_responses else "")
            raise ValueError(
                f"optimizer.warmup_steps = {warmup} leaves nothing of the run's {total} optimizer steps ({made_of})"
            )
        algorithm = self.algorithm
        if algorithm.reference and algorithm.draws_responses and not algorithm.uses_reference:
            raise ValueError(
                "algorithm.reference is set, and neither algorithm.kl_loss_coef nor algorithm.kl_reward_coef uses it"
            )
        self._check_credit()
        if not self.algorithm.draws_responses and (self.replay.mode != "off" or self.replay.engine_routes_every):
            name = "mode" if self.replay.mode != "off" else "engine_routes_every"
            raise ValueError(
                f"replay.{name} = {getattr(self.replay, name)!r} is about the routes of rollouts, and "
                f"{self.algorithm.name} has none: remove it"
            )
        if not self.algorithm.draws_responses and (self.data.sources or self.data.curriculum != "off"):
            name = "sources" if self.data.sources else "curriculum"
            raise ValueError(
                f"data.{name} is about the prompts of rollouts, and {self.algorithm.name} has none: remove it"
            )
        if not self.algorithm.draws_responses and self.eval.suites:
            raise ValueError(
                f"eval.suites = {list(self.eval.suites)}: {self.algorithm.name} starts no servers that could be asked: "
                f"remove it, and ask what was trained with `megatron-gspo eval RUN --suite NAME --data DIR`"
            )
        if not self.algorithm.draws_responses and self.reward_server.model:
            raise ValueError(
                f"reward_server.model is for what grades responses, and {self.algorithm.name} draws none: remove it"
            )
        if not self.algorithm.draws_responses and self.correction != Correction():
            raise ValueError(
                f"correction is about the engine that draws responses, and {self.algorithm.name} has none: remove it"
            )
        if self.rollout.router and self.replay.uses_engine_routes:
            name = 'mode = "r3"' if self.replay.mode == "r3" else "engine_routes_every"
            raise ValueError(
                f"replay.{name} asks for the engine's routes, and SGLang's router does not pass that on: leave "
                f"rollout.router empty, and the run spreads its requests over rollout.servers itself"
            )
        self._check_paths()
        self.placement.check_args(self.rollout.server_args)
        prompt, response = self.rollout.max_prompt_tokens, self.rollout.max_response_tokens
        longest = padded_length(prompt + response, self.parallel.context)
        if self.train.oversize == "error" and longest > self.train.microbatch_tokens:
            padded = f", padded to {longest} for parallel.context = {self.parallel.context},"
            raise ValueError(
                f"rollout.max_prompt_tokens {prompt} + max_response_tokens {response} = {prompt + response}"
                f"{padded if longest > prompt + response else ''} does not fit into train.microbatch_tokens = "
                f'{self.train.microbatch_tokens}: raise it to at least {longest}, or set train.oversize = "own"'
            )
        return self

    def _check_credit(self) -> None:
        algorithm = self.algorithm
        if not algorithm.uses_critic and self.critic != CriticConfig():
            given, plain = self.critic.model_dump(), CriticConfig().model_dump()
            changed = next(name for name in plain if given[name] != plain[name])
            raise ValueError(
                f"critic.{changed} = {given[changed]!r} has no effect: there is a critic with "
                f'algorithm.credit = "gae", and it is "{algorithm.credit}"'
            )
        if algorithm.kl_reward_coef and not algorithm.uses_critic and self.rollout.on_truncated == "mask":
            raise ValueError(
                "algorithm.kl_reward_coef gives credit once a group has its logprobs, and rollout.on_truncated "
                '= "mask" keeps truncated responses out of that: use "keep", "zero" or "drop", or algorithm.credit = '
                '"gae"'
            )
        if algorithm.needs_reference and not algorithm.reference:
            raise ValueError(
                f'algorithm.name = "{algorithm.name}" learns from algorithm.reference, and there is none: name the '
                f"directory of the teacher, a model of the same tokenizer"
            )
        if self.critic.min_lr > self.critic.lr:
            raise ValueError(f"critic.min_lr = {self.critic.min_lr:g} is above critic.lr = {self.critic.lr:g}")
        if algorithm.draws_responses and self.rollout.group_size < 2 and algorithm.credit not in ALONE:
            raise ValueError(
                f'rollout.group_size = {self.rollout.group_size}, and algorithm.credit = "{algorithm.credit}" holds a '
                f"response against the others of its group: one alone has advantage 0: use 2 or more"
            )

    def _check_paths(self) -> None:
        """A run directory is replaced under ``train.overwrite``, so nothing that the run reads may lie in it."""
        run = Path(os.path.realpath(self.train.run_dir))  # Path.resolve raises for links in a circle
        inputs = {
            "model.path": self.model.path,
            "algorithm.reference": self.algorithm.reference,
            "critic.path": self.critic.path,
            "lora.path": self.lora.path,
            "reward_server.model": self.reward_server.model,
            **self.data.paths,
            "data.eval_path": self.data.eval_path,
        }
        for name, path in inputs.items():
            real = Path(os.path.realpath(path))
            if path and (run == real or run in real.parents):
                raise ValueError(
                    f"{name} = {path} lies in train.run_dir = {self.train.run_dir}: name another directory"
                )


def _divisor_below(number: int, bound: int) -> int:
    """The largest divisor of ``number`` below ``bound``, in as many steps as its square root has."""
    small = [count for count in range(1, math.isqrt(number) + 1) if number % count == 0]
    return max(count for one in small for count in (one, number // one) if count < bound)
