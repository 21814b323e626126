"""How pipeline stages talk: Megatron's communicator, with its exchange of shapes mended for two stages."""

from __future__ import annotations

import torch
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator, _p2p_ops
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_gspo.policy.groups import Groups, device


def stage_communicator(groups: Groups, config: TransformerConfig) -> P2PCommunicator | None:
    """What a schedule sends activations and gradients through; None without a pipeline."""
    if groups.pipeline.size() == 1:
        return None
    kind = TwoStageCommunicator if groups.pipeline.size() == 2 else P2PCommunicator
    return kind(pp_group=groups.pipeline, config=config)


class TwoStageCommunicator(P2PCommunicator):
    """Of two stages, the next one is also the previous one.

    Before micro-batches of uneven length, Megatron exchanges shapes: it sends (to the previous stage, to the next) and
    receives (from the previous, from the next). Two ranks tell their messages apart by order alone, so where both send
    twice, as virtual stages do, each takes an activation's shape for a gradient's and the other way about (0.16.1 and
    0.19.2; gloo then ends the process). The tensors themselves go in a right order, and here shapes go with them.
    """

    def _communicate_shapes(
        self,
        tensor_send_next: torch.Tensor | None,
        tensor_send_prev: torch.Tensor | None,
        recv_prev: bool,
        recv_next: bool,
    ) -> tuple[list[int], list[int]]:
        from_prev, from_next = (torch.zeros(3, dtype=torch.int64, device=device()) for _ in range(2))
        requests = _p2p_ops(
            tensor_send_prev=_shape(tensor_send_prev),
            tensor_recv_prev=from_prev if recv_prev else None,
            tensor_send_next=_shape(tensor_send_next),
            tensor_recv_next=from_next if recv_next else None,
            group=self.pp_group,
            prev_pipeline_rank=self.prev_rank,
            next_pipeline_rank=self.next_rank,
        )
        for request in requests.values():
            request.wait()
        return from_prev.tolist(), from_next.tolist()


def _shape(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else torch.tensor(tensor.shape, dtype=torch.int64, device=device())
