"""Faults of the optimizer step, each a context that every rank of a layout enters; see ``parity_faults``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch


def around_steps(change: Callable[[Any, int], None], after: Callable[[Any, int], None] | None = None) -> Any:
    """Calls ``change`` with the optimizer and the number of steps that it has taken before each step, and ``after``
    behind it."""
    from megatron_gspo.megatron.optimizer import Optimizer

    step, taken = Optimizer.step, [0]

    def other(self: Any, lr: float) -> float:
        change(self, taken[0])
        norm = step(self, lr)
        if after is not None:
            after(self, taken[0])
        taken[0] += 1
        return norm

    return mock.patch.object(Optimizer, "step", other)


def states(optimizer: Any) -> list[dict[str, torch.Tensor]]:
    """Adam's state of each of this rank's shards of parameters."""
    return [
        state
        for chained in optimizer.megatron.chained_optimizers
        for state in chained.optimizer.state.values()
        if state
    ]


@contextmanager
def everything_decays() -> Iterator[None]:
    """Weight decay of norms, from which Megatron exempts them only where its own scheduler runs."""

    def decay(self: Any, taken: int) -> None:
        for group in self.megatron.param_groups:
            group["wd_mult"] = 1.0

    with around_steps(decay):
        yield


@contextmanager
def gradients_are_clipped_by_twice_the_norm() -> Iterator[None]:
    from megatron_gspo.megatron import optimizer

    factor = optimizer.clip_factor
    with mock.patch.object(optimizer, "clip_factor", lambda norm, largest: factor(2 * norm, largest)):
        yield


@contextmanager
def the_norm_leaves_experts_out() -> Iterator[None]:
    from megatron_gspo.megatron.optimizer import Optimizer

    norm, parts = Optimizer.gradient_norm, Optimizer.parts

    def of_the_first(self: Any) -> float:
        with mock.patch.object(Optimizer, "parts", lambda self: parts(self)[:1]):
            return norm(self)

    with mock.patch.object(Optimizer, "gradient_norm", of_the_first):
        yield


@contextmanager
def data_rank_1_keeps_its_old_weights() -> Iterator[None]:
    from megatron.core import parallel_state

    from megatron_gspo.megatron.optimizer import finish_gathers

    before: list[torch.Tensor] = []

    def remember(self: Any, taken: int) -> None:
        before[:] = [p.detach().clone() for model in self.models for p in model.parameters()]

    def restore(self: Any, taken: int) -> None:
        finish_gathers(self.models)
        if parallel_state.get_data_parallel_rank() == 1:
            for model in self.models:
                for parameter, old in zip(model.parameters(), before, strict=True):
                    parameter.data.copy_(old)

    with knowing_models(), around_steps(remember, restore):
        yield


@contextmanager
def knowing_models() -> Iterator[None]:
    """The optimizer keeps the models that it was made for as ``models``."""
    from megatron_gspo.megatron.optimizer import Optimizer

    init = Optimizer.__init__

    def keep(self: Any, config: Any, models: Any, groups: Any) -> None:
        init(self, config, models, groups)
        self.models = models

    with mock.patch.object(Optimizer, "__init__", keep):
        yield


@contextmanager
def expert_weights_are_not_gathered() -> Iterator[None]:
    """After a step, each data rank has moved its own shard of the experts' bucket alone."""
    from megatron_gspo.megatron import network

    build = network.wrap_ddp

    def wrap(model: Any, groups: Any, **how: Any) -> Any:
        wrapped = build(model, groups, **how)
        for group in wrapped.expert_parallel_bucket_groups:
            group.start_param_sync = lambda *args, **kwargs: None
        return wrapped

    with mock.patch.object(network, "wrap_ddp", wrap):
        yield


@contextmanager
def moments_are_lost_before_the_second_step() -> Iterator[None]:
    def lose(self: Any, taken: int) -> None:
        for state in states(self) if taken else ():
            state["exp_avg"].zero_()
            state["exp_avg_sq"].zero_()

    with around_steps(lose):
        yield


@contextmanager
def bias_correction_begins_anew() -> Iterator[None]:
    def reset(self: Any, taken: int) -> None:
        for state in states(self) if taken else ():
            state["step"] = torch.zeros_like(state["step"])

    with around_steps(reset):
        yield


@contextmanager
def the_schedule_is_one_step_ahead() -> Iterator[None]:
    from megatron_gspo.megatron import network

    rate = network.learning_rate
    with mock.patch.object(network, "learning_rate", lambda config, step, total: rate(config, step + 1, total)):
        yield


@contextmanager
def betas_are_swapped() -> Iterator[None]:
    def swap(self: Any, taken: int) -> None:
        for group in self.megatron.param_groups if not taken else ():
            group["betas"] = group["betas"][::-1]

    with around_steps(swap):
        yield


@contextmanager
def eps_is_added_before_the_bias_correction() -> Iterator[None]:
    """sqrt(v) + eps, and then the correction of both, as if eps stood in the root's units."""

    def scale(self: Any, taken: int) -> None:
        for group in self.megatron.param_groups:
            group["eps"] = self.config.eps / (1 - group["betas"][1] ** (taken + 1)) ** 0.5

    with around_steps(scale):
        yield


@contextmanager
def a_sync_sends_the_weights_before_the_last_step() -> Iterator[None]:
    """What goes to the engine is a copy that is made too early; every rank's own weights are right."""
    from megatron_gspo.megatron.policy import Policy

    step, weights = Policy.step, Policy.weights
    early: list[Any] = []

    def other(self: Any, *args: Any) -> Any:
        early[:] = list(weights(self))
        return step(self, *args)

    with mock.patch.multiple(Policy, step=other, weights=lambda self, **_: iter(early)):
        yield
