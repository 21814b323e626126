"""Megatron's DDP and distributed optimizer, and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_gspo.config import OptimizerConfig
from megatron_gspo.errors import NonFiniteError
from megatron_gspo.megatron.adamw import ShardedAdamW
from megatron_gspo.megatron.groups import Groups, device
from megatron_gspo.megatron.model import PolicyModel

_GRADIENTS = "get_main_grads_for_grad_norm"
_GRADIENTS = _GRADIENTS if hasattr(MegatronOptimizer, _GRADIENTS) else "get_grads_for_grad_norm"
"""0.16.1's name, and 0.19.2's, of what has a part's gradients without those that another rank has too."""
CLIP_EPS = 1e-6
"""Added to the norm that gradients are divided by, as Megatron and torch do."""


def make_room(model: torch.nn.Module) -> None:
    """Lets go of the memory of weights that are trained and have no values yet, before ``wrap_ddp``.

    DDP makes a buffer for weights and one for gradients, copies the weights into the first, and leaves each weight as a
    part of it. So a rank would hold its weights twice beside its gradients, which with optimizer states elsewhere is
    more than a step takes. Until then each weight is one zero, repeated by strides of 0.
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.new_zeros(()).expand(parameter.shape)


def wrap_ddp(
    model: PolicyModel, groups: Groups, *, overlap: bool = False, bucketed: bool = True
) -> DistributedDataParallel:
    """Gradients in contiguous ``main_grad`` buffers, summed (never averaged) over data-parallel ranks.

    Args:
        overlap: whether buckets of gradients are reduced while backward goes on, and buckets of weights gathered while
            what follows a step does: forward waits for the one that it needs next.
        bucketed: False for virtual stages behind the first, whose reductions Megatron keeps whole.
    """
    ddp = DistributedDataParallelConfig(
        # bf16 gradients are accumulated and reduced in fp32; elsewhere this would round float64.
        grad_reduce_in_fp32=model.config.params_dtype == torch.bfloat16,
        overlap_grad_reduce=overlap,
        overlap_param_gather=overlap,
        align_param_gather=overlap,  # forward starts no gathers: ``start_gathers`` has started all of them
        use_distributed_optimizer=True,
        average_in_collective=False,
    )
    return DistributedDataParallel(
        model.config, ddp, model, disable_bucketing=overlap and not bucketed, pg_collection=groups.megatron
    )


def set_schedule(models: Sequence[DistributedDataParallel], *, overlap: bool) -> None:
    """Tells Megatron's schedules when gradients may be reduced: with the last micro-batch, stage by stage."""
    config = models[0].config
    if overlap:
        no_sync, grad_sync = [model.no_sync for model in models], [model.start_grad_sync for model in models]
        config.no_sync_func = no_sync if len(models) > 1 else no_sync[0]
        config.grad_sync_func = grad_sync if len(models) > 1 else grad_sync[0]


def start_gathers(models: Sequence[DistributedDataParallel]) -> None:
    """Begins to gather every rank's new weights, those first that forward takes first; at once without overlap.

    All of them now, and not one after the other in the next forward as in Megatron's loop: what follows a step here is
    often no forward, and a gather that waits for one would leave a stage's weights old meanwhile. Collective.
    """
    for model in models:
        for group in (*reversed(model.bucket_groups), *reversed(model.expert_parallel_bucket_groups)):
            group.start_param_sync()


def finish_gathers(models: Sequence[torch.nn.Module]) -> None:
    """Waits for what ``start_gathers`` began; for weights that are read otherwise than by a module's forward."""
    for model in models:
        kinds = ("bucket_groups", "expert_parallel_bucket_groups")  # which a model that is not trained has none of
        for group in (group for kind in kinds for group in getattr(model, kind, ())):
            if group.param_gather_handle is not None:
                group.start_param_sync(force_sync=True)


class Optimizer:
    """AdamW over sharded states; refuses to move on a gradient that is not finite."""

    def __init__(self, config: OptimizerConfig, models: Sequence[DistributedDataParallel], groups: Groups) -> None:
        dtype = models[0].config.params_dtype
        settings = MegatronOptimizerConfig(
            optimizer="adam",
            lr=config.lr,
            min_lr=config.min_lr,
            weight_decay=config.weight_decay,
            adam_beta1=config.betas[0],
            adam_beta2=config.betas[1],
            adam_eps=config.eps,
            clip_grad=config.clip_grad,
            bf16=dtype == torch.bfloat16,
            params_dtype=dtype,
            use_distributed_optimizer=True,
        )
        # Says that the inner optimizer has master weights of its own. Megatron's setting of that name asks for
        # Transformer Engine's.
        settings.use_precision_aware_optimizer_no_fp8_or_ds_fp8 = True
        self.config, self._models = config, models
        self.megatron: MegatronOptimizer = get_megatron_optimizer(
            settings,
            list(models),
            use_gloo_process_groups=False,  # refused beside ``pg_collection``; they are for checkpoints of Megatron's
            pg_collection=groups.megatron,
        )
        for part in self.parts():
            for group in part.optimizer.param_groups:
                group |= {"betas": tuple(config.betas), "eps": config.eps}
            part.optimizer = ShardedAdamW(
                part.optimizer.param_groups,
                moments=torch.bfloat16 if config.state_dtype == "bfloat16" else None,
                on_host=config.offload,
            )

    def parts(self) -> list[DistributedOptimizer]:
        """Of dense parameters and, where there are experts, of those."""
        return [part for part in self.megatron.chained_optimizers if not part.is_stub_optimizer]

    def step(self, lr: float) -> float:
        """One AdamW step; returns the gradient norm before clipping, over all ranks. Collective.

        Weights may still be on their way to other ranks when it returns (``finish_gathers``).
        Raises NonFiniteError on every rank, before anything moves, when the norm is not finite.
        """
        finish_gathers(self._models)
        self.megatron.prepare_grads()
        norm = self.gradient_norm()
        if not math.isfinite(norm):
            raise NonFiniteError(f"gradient norm = {norm}: no step was taken; the weights are as they were")
        for part in self.parts():
            for group in part.optimizer.param_groups:
                # Megatron leaves weight decay to its own scheduler; without it, norms decay like matrices.
                group |= {"lr": lr, "weight_decay": self.config.weight_decay * group["wd_mult"]}
            part.optimizer.scale = clip_factor(norm, self.config.clip_grad)
            part.optimizer.step()
        start_gathers(self._models)
        return norm

    def park(self) -> None:
        """Frees the gradients, and moves the states to host memory; no step until ``unpark``."""
        for buffer in self._buffers():
            buffer.offload_to_cpu(move_params=False)  # which keeps no copy of a gradient
        for part in self.parts():
            part.optimizer.park()

    def unpark(self) -> None:
        """Gradients of zero, and the states as they were."""
        for buffer in self._buffers():
            buffer.reload_from_cpu(move_params=False)
        for part in self.parts():
            part.optimizer.unpark()

    def _buffers(self) -> list[Any]:
        return [buffer for model in self._models for buffer in (*model.buffers, *model.expert_parallel_buffers)]

    @torch.no_grad()
    def gradient_norm(self) -> float:
        """Of all gradients, each once, over all ranks. Collective."""
        found = [gradient for part in self.parts() for gradient in getattr(part, _GRADIENTS)()]
        total = torch.zeros((), dtype=torch.float64, device=device())
        if found:
            total += torch.stack(torch._foreach_norm(found)).double().square().sum()
        dist.all_reduce(total, group=self.megatron.get_grad_stats_parallel_group())
        return float(total.sqrt())


def clip_factor(norm: float, largest: float) -> float:
    """What gradients of such a norm are multiplied by; ``largest`` = 0 clips nothing."""
    return min(1.0, largest / (norm + CLIP_EPS)) if largest else 1.0


def learning_rate(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """The learning rate of an optimizer step, counted from 0: linear warm-up, then the schedule down to min_lr."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = min(1.0, (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps))
    shape = 1.0 - progress if config.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.min_lr + (config.lr - config.min_lr) * shape
