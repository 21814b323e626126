"""The policy: a model over ranks that gives logprobs, takes optimizer steps and streams its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_gspo.config import RunConfig
from megatron_gspo.errors import BatchError
from megatron_gspo.hf.catalog import read_model
from megatron_gspo.hf.checkpoint import HfReader
from megatron_gspo.hf.layout import check_layout, check_recompute, check_replay
from megatron_gspo.parallel.exchange import together
from megatron_gspo.policy.checkpoint import load_weights_of
from megatron_gspo.policy.checkpoint_files import is_distributed
from megatron_gspo.policy.export import complete_gradients, gradient_of, stream_tensors
from megatron_gspo.policy.groups import Groups
from megatron_gspo.policy.load import ExpertLoad
from megatron_gspo.policy.model import build_chunks, load_weights
from megatron_gspo.policy.optimizer import Optimizer, learning_rate, wrap_ddp
from megatron_gspo.policy.pipeline import stage_communicator
from megatron_gspo.policy.replay import Replay
from megatron_gspo.types import PackedBatch

Objective = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]
"""(micro-batch index, logprobs [T_local], entropy [T_local]) -> scalar: the micro-batch's part of the mini-batch's
globally normalised loss. Called on the last pipeline stage only; must not raise (other ranks would wait)."""


class Policy:
    """This rank's share of the model, and the collective operations on the whole.

    ``chunks`` are its virtual pipeline stages in the model's order (one, without virtual stages); ``modules`` are the
    same as they are run, under DDP where the policy is trained.

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
        check_recompute(config.model, self.shape)
        if trainable:
            check_replay(config.replay, self.shape)
        self.chunks = build_chunks(
            config.model, config.parallel, self.family, self.shape, groups, deterministic=config.train.deterministic
        )
        self.temperature = config.rollout.temperature if config.algorithm.draws_responses else 1.0
        self.optimizer: Optimizer | None = None
        self.replay = Replay(self.chunks, groups.world)
        self._load(Path(directory))
        self.expert_load = ExpertLoad(self.chunks)
        self.modules: Sequence[torch.nn.Module] = self.chunks
        if trainable:
            self.modules = [wrap_ddp(chunk, groups) for chunk in self.chunks]
            self.optimizer = Optimizer(config.optimizer, self.modules, groups)
            self.chunks[0].config.finalize_model_grads_func = _finalize_gradients
        for module in self.modules:
            module.train()

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
        for module in self.modules:
            module.zero_grad_buffer()  # type: ignore[operator]
        self._trained().megatron.zero_grad()
        self.expert_load.start()
        self._run(batches, objective, forward_only=False)

    def step(self, step: int, total_steps: int) -> tuple[float, float]:
        """One optimizer step on the accumulated gradients; returns (gradient norm before clipping, learning rate)."""
        lr = learning_rate(self.config.optimizer, step, total_steps)
        return self._trained().step(lr), lr

    def weights(self, *, copies: bool = True) -> Iterator[tuple[str, torch.Tensor]]:
        """The model in Hugging Face names, one tensor at a time, each on the one rank that owns it.

        Every rank must exhaust the iterator: making a tensor gathers it over tensor ranks. ``copies = False`` is for
        who is done with a tensor before the next optimizer step, which moves what is a view on a CPU.
        """
        return stream_tensors(self.chunks, self.family, copies=copies)

    def names(self) -> set[str]:
        """Hugging Face names of what this rank holds a share of."""
        named = (rule for chunk in self.chunks for _, rule in chunk.rules(self.family))
        return {name for rule in named for name in rule.hf_names}

    def named_gradients(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The accumulated gradients in Hugging Face names, streamed as ``weights`` is."""
        for module in self.modules:
            complete_gradients(module)
        return stream_tensors(self.chunks, self.family, gradient_of)

    def _load(self, directory: Path) -> None:
        """Fills the chunks from safetensors, or from a distributed checkpoint beside ``config.json``. Collective."""
        if is_distributed(directory):
            load_weights_of(self, directory)
            return
        together(lambda: self._read(HfReader(directory)), self.groups.world)  # what is wrong may be so on one stage

    def _read(self, reader: HfReader) -> None:
        for chunk in self.chunks:
            load_weights(chunk, self.family, reader)

    def _trained(self) -> Optimizer:
        assert self.optimizer is not None, "this policy was built with trainable=False"
        return self.optimizer

    def _run(self, batches: Sequence[PackedBatch], objective: Objective, *, forward_only: bool) -> None:
        if len(batches) % self.config.parallel.microbatch_multiple:
            raise BatchError(
                f"{len(batches)} micro-batches over parallel.pipeline = {self.config.parallel.pipeline} with virtual "
                f"stages: their number must be a multiple of the stages; fill up with dummy_batch"
            )

        def forward_step(
            stream: Iterator[tuple[int, PackedBatch]], module: torch.nn.Module
        ) -> tuple[torch.Tensor, Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, dict[str, float]]]]:
            index, batch = next(stream)
            self.replay.at(index, backward=False)
            output = module(batch, self.temperature)
            if output.requires_grad:  # called when the backward of this micro-batch begins, before any recompute in it
                output.register_hook(lambda _: self.replay.at(index, backward=True))

            def loss_of(output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, float]]:
                return objective(index, output[0], output[1]), torch.zeros((), dtype=torch.int), {}

            return output, loss_of

        tokens = [batch.num_tokens // self.groups.shard.size for batch in batches]
        with self.replay.running(tokens, backward=not forward_only):
            get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=[iter(enumerate(batches)) for _ in self.modules],
                model=list(self.modules),
                num_microbatches=len(batches),
                seq_length=0,  # StageCommunicator knows the shapes
                micro_batch_size=1,
                forward_only=forward_only,
                pg_collection=self.groups.megatron,
                p2p_communicator=stage_communicator(self.groups, self.chunks[0].config, batches),
            )


def _finalize_gradients(modules: list[torch.nn.Module], num_tokens: object = None, **kwargs: object) -> None:
    """Megatron's reductions without its division by a token count: the loss is normalised already."""
    finalize_model_grads(modules, None, **kwargs)
