"""Megatron's DDP and distributed optimizer, and the learning-rate schedule."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig

from megatron_gspo.config import OptimizerConfig
from megatron_gspo.errors import NonFiniteError
from megatron_gspo.megatron import cpu
from megatron_gspo.megatron.groups import Groups
from megatron_gspo.megatron.model import PolicyModel


def wrap_ddp(model: PolicyModel, groups: Groups) -> DistributedDataParallel:
    """Gradients in contiguous ``main_grad`` buffers, summed (never averaged) over data-parallel ranks."""
    ddp = DistributedDataParallelConfig(
        # bf16 gradients are accumulated and reduced in fp32; elsewhere this would round float64.
        grad_reduce_in_fp32=model.config.params_dtype == torch.bfloat16,
        overlap_grad_reduce=False,
        use_distributed_optimizer=True,
        average_in_collective=False,
    )
    return DistributedDataParallel(model.config, ddp, model, pg_collection=groups.megatron)


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
        self.config = config
        self._double = dtype == torch.float64
        with self._precision():
            self.megatron: MegatronOptimizer = get_megatron_optimizer(
                settings,
                list(models),
                use_gloo_process_groups=False,  # Megatron refuses it beside groups that are passed
                pg_collection=groups.megatron,
            )

    def step(self, lr: float) -> float:
        """One AdamW step; returns the gradient norm before clipping, over all ranks.

        Raises NonFiniteError on every rank, before anything moves, when the norm is not finite.
        """
        for group in self.megatron.param_groups:
            group["lr"] = lr
            # Megatron leaves this to its own scheduler; without it, norms decay like matrices.
            group["weight_decay"] = self.config.weight_decay * group["wd_mult"]
        with self._precision():
            self.megatron.prepare_grads()
            norm = float(self.megatron.get_grad_norm())
            if not math.isfinite(norm):
                raise NonFiniteError(f"gradient norm = {norm}: no step was taken; the weights are as they were")
            self.megatron.step()
        return norm

    def _precision(self) -> contextlib.AbstractContextManager[None]:
        """Megatron casts gradients with ``Tensor.float``; a float64 run keeps float64."""
        return cpu.keep_float64() if self._double else contextlib.nullcontext()


def learning_rate(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """The learning rate of an optimizer step, counted from 0: linear warm-up, then the schedule down to min_lr."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = min(1.0, (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps))
    shape = 1.0 - progress if config.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.min_lr + (config.lr - config.min_lr) * shape
