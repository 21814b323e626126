"""A Megatron model over ranks: passes through a head, gradients, optimizer steps, and its weights as a stream.

A policy (``megatron.policy``) and a critic (``megatron.critic``) are one, each with a head of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch.profiler import record_function

from megatron_gspo.config import LoraConfig, OptimizerConfig, RunConfig
from megatron_gspo.errors import BatchError
from megatron_gspo.hf.checkpoint import HfReader
from megatron_gspo.hf.digest import weights_digest
from megatron_gspo.hf.family import Family, ModelShape
from megatron_gspo.hf.layout import check_layout, check_recompute
from megatron_gspo.hf.peft import open_adapters
from megatron_gspo.hf.weights import NamedRule
from megatron_gspo.megatron.checkpoint import load_weights_of
from megatron_gspo.megatron.checkpoint_files import is_distributed
from megatron_gspo.megatron.export import complete_gradients, gradient_of, stream_tensors, stream_weights
from megatron_gspo.megatron.groups import Groups
from megatron_gspo.megatron.heads import Head
from megatron_gspo.megatron.load import ExpertLoad
from megatron_gspo.megatron.lora import Lora, fill_adapters, mark_adapters, sum_shared_gradients
from megatron_gspo.megatron.model import Own, PolicyModel, build_chunks, load_weights
from megatron_gspo.megatron.optimizer import (
    Optimizer,
    finish_gathers,
    learning_rate,
    make_room,
    set_schedule,
    wrap_ddp,
)
from megatron_gspo.megatron.pipeline import stage_communicator
from megatron_gspo.megatron.replay import Replay
from megatron_gspo.parallel.exchange import broadcast_object, gather_objects, together
from megatron_gspo.platforms import release_unused
from megatron_gspo.types import PackedBatch

Objective = Callable[..., torch.Tensor]
"""(micro-batch index, each row [T_local] that the head gives) -> scalar: the micro-batch's part of the mini-batch's
globally normalised loss. Called on the last pipeline stage only; must not raise (other ranks would wait)."""


class Network:
    """This rank's share of a model, and the collective operations on the whole.

    ``chunks`` are its virtual pipeline stages in the model's order (one, without virtual stages); ``modules`` are the
    same as they are run, under DDP where the model is trained.

    Every method is collective: all ranks of the layout call it with the same number of micro-batches.
    """

    def __init__(
        self,
        config: RunConfig,
        groups: Groups,
        directory: Path,
        model: tuple[Family, ModelShape],
        head: Head,
        optimizer: OptimizerConfig | None,
        *,
        valued: bool = False,
        lora: LoraConfig | None = None,
    ) -> None:
        """Builds the model and loads this rank's weights from ``directory``.

        Args:
            head: what a pass gives, unless it names another.
            optimizer: its settings; None for a model that is not trained.
            valued: whether it has the parameters of a value head, in the place of those over the vocabulary.
            lora: its adapters, which are then all that is trained; None, or of rank 0, for none.
        Raises:
            ConfigError, LayoutError or WeightError.
        """
        self.config, self.groups, self.head, self.valued = config, groups, head, valued
        self.family, self.shape = model
        check_layout(config.parallel, self.shape)
        check_recompute(config.model, config.parallel, self.shape)
        self.chunks = build_chunks(
            config.model,
            config.parallel,
            self.family,
            self.shape,
            groups,
            deterministic=config.train.deterministic,
            valued=valued,
        )
        self.optimizer: Optimizer | None = None
        self.replay = Replay(self.chunks, groups.world)
        self.modules: Sequence[torch.nn.Module] = self.chunks
        self.adapters_header: dict[str, Any] | None = None
        """What a checkpoint says of its adapters; None without any."""
        self.expert_load = ExpertLoad(self.chunks)
        adapted = lora is not None and lora.rank > 0
        if adapted or optimizer is None:
            self._load(directory)
        if lora is not None and adapted:
            self._adapt(lora, directory)
        if optimizer is not None:
            self._wrap(empty=not adapted)
            if not adapted:
                self._load(directory)
            self.optimizer = Optimizer(optimizer, self.modules, groups)
        for module in self.modules:
            module.train()

    def _wrap(self, *, empty: bool) -> None:
        """Puts the chunks under DDP. ``empty``: their weights have no values yet, and get them where they lie then."""
        for chunk in self.chunks if empty else ():
            make_room(chunk)
        overlap = self.config.parallel.overlap
        wrapped = [wrap_ddp(chunk, self.groups, overlap=overlap, bucketed=not i) for i, chunk in enumerate(self.chunks)]
        set_schedule(wrapped, overlap=overlap)
        self.modules = wrapped
        self.chunks[0].config.finalize_model_grads_func = _finalize_gradients

    @torch.no_grad()
    def outputs(self, batches: Sequence[PackedBatch], head: Head | None = None) -> list[torch.Tensor]:
        """What the head gives of each micro-batch, the tokens of ``groups.shard``; empty but on the last stage."""
        results: list[torch.Tensor] = []

        def keep(index: int, output: torch.Tensor) -> torch.Tensor:
            results.append(output)
            return output.new_zeros(())

        self._run(batches, keep, head or self.head, forward_only=True)
        return results

    @torch.no_grad()
    def evaluate(self, batches: Sequence[PackedBatch], objective: Objective) -> None:
        """Calls the objective as ``gradients`` does, and differentiates nothing."""
        self.expert_load.start()
        self._run(batches, lambda index, output: objective(index, *output), self.head, forward_only=True)

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
        self._run(batches, lambda index, output: objective(index, *output), self.head, forward_only=False)

    def step(self, step: int, total_steps: int) -> tuple[float, float]:
        """One optimizer step on the accumulated gradients; returns (gradient norm before clipping, learning rate)."""
        optimizer = self._trained()
        lr = learning_rate(optimizer.config, step, total_steps)
        with record_function("model: optimizer step"):
            return optimizer.step(lr), lr

    def park(self) -> None:
        """Leaves the device to others: gradients are freed, optimizer states go to host memory. Weights stay, to be
        read, evaluated and sent; nothing is trained until ``unpark``. (Not run on a GPU yet.)"""
        finish_gathers(self.modules)
        if self.optimizer is not None:
            self.optimizer.park()
        release_unused()

    def unpark(self) -> None:
        """Brings back what ``park`` moved; gradients are zero."""
        if self.optimizer is not None:
            self.optimizer.unpark()

    def weights(
        self, *, copies: bool = True, host: bool = True, only: Collection[str] | None = None
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """The model in Hugging Face names, adapters merged, one tensor at a time, each on the one rank that owns it.

        Every rank must exhaust the iterator: making a tensor gathers it over tensor ranks. ``copies = False`` is for
        who is done with a tensor before the next optimizer step, which moves what is a view. ``host = False`` leaves
        tensors in the memory where the model is. ``only``: of these names, the same on every rank.
        """
        finish_gathers(self.modules)
        return stream_weights(self.chunks, self.family, copies=copies, host=host, only=only)

    def trained_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """What training changes, streamed as ``weights`` is: the adapters where there are any, else the model."""
        finish_gathers(self.modules)
        return stream_tensors(self.chunks, self._trained_rules)

    @property
    def adapted(self) -> bool:
        """Whether adapters are all that is trained of it."""
        return self.chunks[0].lora is not None

    def adapted_names(self) -> set[str]:
        """Hugging Face names of the weights of this rank that adapters change."""
        return {name for chunk in self.chunks if chunk.lora is not None for name in chunk.lora.by_weight}

    @contextmanager
    def without_adapters(self) -> Iterator[None]:
        """Within it passes are those of the model that training began with."""
        with ExitStack() as stack:
            for chunk in self.chunks:
                if chunk.lora is not None:
                    stack.enter_context(chunk.lora.off())
            yield

    def trained_parameters(self) -> int:
        """Of the whole model, each once: what an optimizer moves. Collective."""
        mine = sum(tensor.numel() for _, tensor in self.trained_weights())
        return sum(gather_objects(mine, self.groups.world))

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps beside its tensors."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what ``state_dict`` gave."""

    def names(self) -> set[str]:
        """Hugging Face names of what this rank holds a share of."""
        named = (rule for chunk in self.chunks for _, rule in chunk.rules(self.family))
        return {name for rule in named for name in rule.hf_names}

    def named_gradients(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The accumulated gradients in Hugging Face names, streamed as ``weights`` is."""
        for module in self.modules:
            complete_gradients(module)
        return stream_tensors(self.chunks, self._trained_rules, gradient_of)

    def _trained_rules(self, chunk: PolicyModel) -> Iterator[tuple[Own, NamedRule]]:
        return chunk.trained_rules(self.family)

    def _adapt(self, lora: LoraConfig, directory: Path) -> None:
        """Puts adapters onto every stage of what was loaded from ``directory``. Collective."""

        def fill() -> None:
            reader = open_adapters(Path(lora.path), self.family, self.shape, lora) if lora.path else None
            for chunk in self.chunks:
                fill_adapters(chunk, reader, self.config.train.seed)

        for chunk in self.chunks:
            chunk.lora = Lora(chunk, self.family, lora)
            mark_adapters(chunk)
        together(fill, self.groups.world)
        digest = together(lambda: weights_digest(directory) if dist.get_rank() == 0 else None, self.groups.world)
        kept = lora.model_dump(mode="json", exclude={"path"})
        self.adapters_header = kept | {
            "model": str(directory),
            "weights": broadcast_object(digest, 0, self.groups.world),
        }

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
        assert self.optimizer is not None, "this model was built without an optimizer"
        return self.optimizer

    def _run(
        self,
        batches: Sequence[PackedBatch],
        loss: Callable[[int, torch.Tensor], torch.Tensor],
        head: Head,
        *,
        forward_only: bool,
    ) -> None:
        """``loss``: (micro-batch index, what the head gives of it) -> scalar; called on the last stage only."""
        if len(batches) % self.config.parallel.microbatch_multiple:
            raise BatchError(
                f"{len(batches)} micro-batches over parallel.pipeline = {self.config.parallel.pipeline} with virtual "
                f"stages: their number must be a multiple of the stages; fill up with dummy_batch"
            )

        def when_gathered(model: PolicyModel, labels_T: torch.Tensor, hidden_TH: torch.Tensor) -> torch.Tensor:
            finish_gathers(self.modules)  # a head reads parameters whose module's forward, which would wait, is not run
            return head(model, labels_T, hidden_TH)

        def forward_step(
            stream: Iterator[tuple[int, PackedBatch]], module: torch.nn.Module
        ) -> tuple[torch.Tensor, Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, dict[str, float]]]]:
            index, batch = next(stream)
            self.replay.at(index, backward=False)
            output = module(batch, when_gathered)
            if output.requires_grad:  # called when the backward of this micro-batch begins, before any recompute in it
                output.register_hook(lambda _: self.replay.at(index, backward=True))

            def loss_of(output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, float]]:
                return loss(index, output), torch.zeros((), dtype=torch.int), {}

            return output, loss_of

        tokens = [batch.num_tokens // self.groups.shard.size for batch in batches]
        kind = record_function("model: forward" if forward_only else "model: forward and backward")
        with kind, self.replay.running(tokens, backward=not forward_only):
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
    sum_shared_gradients(modules)
