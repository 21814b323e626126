"""How pipeline stages talk: Megatron's communicator, told the shapes that Megatron would ask for by message."""

from __future__ import annotations

from collections.abc import Sequence

from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import get_schedule_table
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_gspo.megatron.groups import Groups
from megatron_gspo.types import PackedBatch


def stage_communicator(
    groups: Groups, config: TransformerConfig, batches: Sequence[PackedBatch]
) -> P2PCommunicator | None:
    """What one run of a schedule over ``batches`` sends activations and gradients through; None without a pipeline."""
    return None if groups.pipeline.size() == 1 else StageCommunicator(groups, config, batches)


class StageCommunicator(P2PCommunicator):
    """Knows the shape of everything that this stage receives: every stage holds the micro-batches themselves.

    Megatron sends the shape of a micro-batch of uneven length ahead of the tensor. With virtual stages that goes wrong
    (0.16.1 and 0.19.2): of two stages the next one is also the previous one, and each takes an activation's shape for a
    gradient's and the other way about; and with no more micro-batches than stages, one rank waits for its shape to be
    received while the other waits for its tensor. Nothing of that can happen to a message that is not sent, and a GPU
    need not be waited for.
    """

    def __init__(self, groups: Groups, config: TransformerConfig, batches: Sequence[PackedBatch]) -> None:
        super().__init__(pp_group=groups.pipeline, config=config)
        chunks = config.virtual_pipeline_model_parallel_size or 1
        table = get_schedule_table(len(batches), chunks, config.microbatch_group_size_per_vp_stage)
        shapes = [[batch.num_tokens // groups.shard.size, 1, config.hidden_size] for batch in batches]
        # The table's chunks count from the first one in forward and from the last one in backward; a pass starts in
        # chunk 0 of the stage that leads it, which receives nothing for it.
        self._activations = iter([shapes[i] for i, chunk in table if chunk or not groups.is_first_stage])
        self._gradients = iter([shapes[i] for i, chunk in table if chunk or not groups.is_last_stage])

    def _communicate_shapes(
        self, tensor_send_next: object, tensor_send_prev: object, recv_prev: bool, recv_next: bool
    ) -> tuple[list[int], list[int]]:
        """(shape of the activation, shape of the gradient) that come next; zeros where none is to come."""
        nothing = [0, 0, 0]
        return (
            next(self._activations) if recv_prev else nothing,
            next(self._gradients) if recv_next else nothing,
        )
