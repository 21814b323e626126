"""The policy: a model over ranks that gives logprobs, takes optimizer steps and streams its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_gspo.config import RunConfig
from megatron_gspo.errors import WeightError
from megatron_gspo.hf.catalog import read_model
from megatron_gspo.hf.checkpoint import HfReader
from megatron_gspo.hf.layout import check_layout
from megatron_gspo.parallel.exchange import agree
from megatron_gspo.policy.export import complete_gradients, gradient_of, stream_tensors
from megatron_gspo.policy.groups import Groups
from megatron_gspo.policy.load import ExpertLoad
from megatron_gspo.policy.model import build_model, load_weights
from megatron_gspo.policy.optimizer import Optimizer, learning_rate, wrap_ddp
from megatron_gspo.types import PackedBatch

Objective = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]
"""(micro-batch index, logprobs [T_local], entropy [T_local]) -> scalar: the micro-batch's part of the mini-batch's
globally normalised loss. Called on the last pipeline stage only; must not raise (other ranks would wait)."""


class Policy:
    """This rank's share of the model, and the collective operations on the whole.

    Every method is collective: all ranks of the layout call it with the same number of micro-batches.
    """

    def __init__(self, config: RunConfig, groups: Groups, *, path: str | None = None, trainable: bool = True) -> None:
        """Builds the model at ``path`` (default ``model.path``) and loads this rank's weights.

        Raises ConfigError, LayoutError or WeightError.
        """
        self.config, self.groups = config, groups
        directory = path or config.model.path
        self.family, self.shape = read_model(directory)
        check_layout(config.parallel, self.shape)
        self.model = build_model(
            config.model, self.family, self.shape, groups, deterministic=config.train.deterministic
        )
        self.temperature = 1.0 if config.algorithm.name == "sft" else config.rollout.temperature
        error: Exception | None = None
        try:
            load_weights(self.model, self.family, HfReader(directory))
        except WeightError as caught:  # perhaps on one stage only
            error = caught
        agree(error, groups.world)
        self.optimizer: Optimizer | None = None
        self.expert_load = ExpertLoad(self.model)
        self.module: torch.nn.Module = self.model
        if trainable:
            self.module = wrap_ddp(self.model, groups)
            self.optimizer = Optimizer(config.optimizer, self.module, groups)
            self.model.config.finalize_model_grads_func = _finalize_gradients
        self.module.train()

    @torch.no_grad()
    def logprobs(self, batches: Sequence[PackedBatch]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(logprobs, entropy) of each micro-batch, the tokens of ``groups.shard``; empty but on the last stage."""
        results: list[tuple[torch.Tensor, torch.Tensor]] = []

        def keep(index: int, logprobs: torch.Tensor, entropy: torch.Tensor) -> torch.Tensor:
            results.append((logprobs, entropy))
            return logprobs.new_zeros(())

        self._run(batches, keep, forward_only=True)
        return results

    def gradients(self, batches: Sequence[PackedBatch], objective: Objective) -> None:
        """Accumulates the gradient of the sum of the objective over micro-batches and data-parallel ranks.

        The objective is the same number on every rank of ``groups.token``, each of which differentiates it by its own
        tokens; the parts meet in Megatron's reductions.

        What Megatron would scale is not scaled: with ``calculate_per_token_loss`` the schedule divides by no
        micro-batch count and multiplies by no context size, DDP divides by no data-parallel size, and
        ``_finalize_gradients`` names no token count to divide by. So a loss that is normalised over the whole
        mini-batch gives the gradient of one process.
        """
        self.module.zero_grad_buffer()  # type: ignore[operator]
        self._trained().megatron.zero_grad()
        self.expert_load.start()
        self._run(batches, objective, forward_only=False)

    def step(self, step: int, total_steps: int) -> tuple[float, float]:
        """One optimizer step on the accumulated gradients; returns (gradient norm before clipping, learning rate)."""
        lr = learning_rate(self.config.optimizer, step, total_steps)
        return self._trained().step(lr), lr

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The model in Hugging Face names, one tensor at a time, each on the one rank that owns it.

        Every rank must exhaust the iterator: making a tensor gathers it over tensor ranks.
        """
        return stream_tensors(self.model, self.family)

    def named_gradients(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The accumulated gradients in Hugging Face names, streamed as ``weights`` is."""
        complete_gradients(self.module)
        return stream_tensors(self.model, self.family, gradient_of)

    def _trained(self) -> Optimizer:
        assert self.optimizer is not None, "this policy was built with trainable=False"
        return self.optimizer

    def _run(self, batches: Sequence[PackedBatch], objective: Objective, *, forward_only: bool) -> None:
        def forward_step(
            stream: Iterator[tuple[int, PackedBatch]], module: torch.nn.Module
        ) -> tuple[torch.Tensor, Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, dict[str, float]]]]:
            index, batch = next(stream)
            output = module(batch, self.temperature)

            def loss_of(output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, float]]:
                return objective(index, output[0], output[1]), torch.zeros((), dtype=torch.int), {}

            return output, loss_of

        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(enumerate(batches)),
            model=[self.module],
            num_microbatches=len(batches),
            seq_length=0,  # shapes travel with the tensors
            micro_batch_size=1,
            forward_only=forward_only,
            pg_collection=self.groups.megatron,
            p2p_communicator=self._p2p(),
        )

    def _p2p(self) -> object | None:
        if self.groups.pipeline.size() == 1:
            return None
        from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

        return P2PCommunicator(pp_group=self.groups.pipeline, config=self.model.config)


def _finalize_gradients(modules: list[torch.nn.Module], num_tokens: object = None, **kwargs: object) -> None:
    """Megatron's reductions without its division by a token count: the loss is normalised already."""
    finalize_model_grads(modules, None, **kwargs)
