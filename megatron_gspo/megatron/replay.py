"""Routing Replay: recording what routers choose, and making them choose it again.

Every router of a policy has a ``LayerReplay`` where Megatron's ``RouterReplay`` would stand, and all of them ask the
policy's one ``Replay`` what to do. Only the selection is replayed: the gate's weights are the live scores of the
experts that were chosen then, so that the router keeps its gradient.

Which micro-batch a router is at is never inferred from the order of calls: ``Policy`` says so before each forward of a
stage, and a hook on the stage's output says so when its backward begins. All that a backward runs, a recompute of
whatever granularity included, belongs to the micro-batch of the output that it began with, in every schedule.

A router must not raise in the middle of a pass, where other ranks would wait for its stage: what goes wrong is noted,
the pass ends with live routes, and on leaving the phase the error is agreed over all ranks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.router_replay import RouterReplay
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_gspo.errors import ConfigError, ReplayError
from megatron_gspo.parallel.exchange import agree
from megatron_gspo.types import RouteShard

HOLDS = {torch.uint8: 2**8, torch.int16: 2**15, torch.uint16: 2**16, torch.int32: 2**31, torch.int64: 2**63}
"""Types that a route may have -> the experts that they can number."""


def route_dtype(experts: int) -> torch.dtype:
    """What an expert's number is stored as."""
    return torch.uint8 if experts <= HOLDS[torch.uint8] else torch.int16


class LayerReplay(RouterReplay):
    """One router's top-k: live, and beside it what is replayed. Bound to its router by layer, and in no global list.

    The live choice is sorted from the largest score down in every pass. 0.19.2 leaves it in any order where there is
    no gradient (moe_utils.py), and the softmax over it then adds up in another order than in training: the pi_old
    pass, and the first pass under recompute, would differ in last bits.
    """

    def __init__(self, layer: int, replay: Replay) -> None:
        super().__init__()
        # Megatron lists every instance for good, and its class methods speak to all of them.
        RouterReplay.global_router_replay_instances.remove(self)
        self.layer, self._replay = layer, replay

    def get_replay_topk(
        self,
        scores: torch.Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: Callable[..., tuple[torch.Tensor, torch.Tensor]] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(scores [T_local, K], experts [T_local, K] int64) of the experts that this pass uses."""
        assert default_compute_topk is not None
        target = self._replay.called(self.layer, len(scores))
        with torch.enable_grad():
            live = scores if target is None else scores.detach()
            live_scores, live_experts = default_compute_topk(live, topk, num_groups, group_topk)
        self._replay.keep(self.layer, live_experts)
        if target is None:
            return live_scores, live_experts
        experts_TK, present_T = target
        present_T, experts_TK = present_T.to(scores.device), experts_TK.to(scores.device, torch.int64)
        chosen = torch.where(present_T[:, None], experts_TK, live_experts)
        return scores.gather(1, chosen), chosen


class Replay:
    """The routers of one rank's share of a policy, and the phase that they are in.

    A phase holds exactly one pass of the policy, ``logprobs`` or ``gradients``:

        with policy.replay.record() as live:              # routers choose for themselves
            policy.logprobs(batches)
        with policy.replay.replay(routes) as live:        # routers choose what ``routes`` says
            policy.gradients(batches, objective)

    Either way ``live[i]`` is then what this rank's routers would choose by themselves in micro-batch i, one
    ``RouteShard`` a micro-batch. In record it is what they chose; recorded routes replayed at the same weights
    change nothing, to the last bit.

    Leaving a phase raises ReplayError, on every rank, when on any of them a router was not asked exactly once for
    each micro-batch in forward and once in recompute (where its module is recomputed), or when ``routes`` are not
    this rank's: other layers, tokens or micro-batches, an expert out of range or twice in a row.
    """

    def __init__(self, chunks: Sequence[torch.nn.Module], world: dist.ProcessGroup) -> None:
        """Gives every router of ``chunks`` its ``LayerReplay``. Raises ConfigError where replay would be ignored."""
        self._world = world
        self._recomputed: dict[int, bool] = {}
        """Layer -> whether backward runs its router again."""
        self._topk, self._experts = 0, 0
        for chunk in chunks:
            for module in chunk.modules():
                if isinstance(module, MoELayer):
                    self._bind(module, chunk.layer_offset)  # type: ignore[arg-type]
        self.layers = tuple(self._recomputed)
        self._open = False
        self._routes: Sequence[RouteShard] | None = None
        self._live: list[RouteShard] = []
        self._fault: ReplayError | None = None
        self._passes = 0
        self._at: tuple[int, bool] | None = None
        """(micro-batch, whether it is in backward) while a pass runs."""
        self._calls: Counter[tuple[int, int, bool]] = Counter()
        """(micro-batch, layer, in backward) -> how often its router was asked."""
        self._kept: dict[tuple[int, int], torch.Tensor] = {}
        """(micro-batch, layer) -> [T_local, K] live choice."""

    def _bind(self, module: MoELayer, first: int) -> None:
        """``first``: number of the first layer of its virtual stage."""
        router, config = module.router, module.config
        refuse_unreplayable(config)
        layer = router.layer_number - 1
        if not isinstance(router, TopKRouter) or (self._recomputed and layer <= max(self._recomputed)):
            raise ConfigError(
                f"{type(router).__name__} of layer {layer}: replay needs one TopKRouter a layer, in order"
            )
        router.router_replay = LayerReplay(layer, self)
        self._recomputed[layer] = module.moe_layer_recompute or _runs_again(config, layer - first)
        self._topk, self._experts = router.topk, config.num_moe_experts

    # ---------------------------------------------------------------------------------------------------------- phases

    def record(self) -> AbstractContextManager[list[RouteShard]]:
        """A phase in which routers choose for themselves. Collective."""
        return self.replay(None)

    @contextmanager
    def replay(self, routes: Sequence[RouteShard] | None) -> Iterator[list[RouteShard]]:
        """A phase in which they choose what ``routes`` says, one an entry of the pass's micro-batches. Collective.

        None is ``record``. Yields the list of live choices, which is filled when the pass has ended.
        """
        if self._open:
            raise ReplayError("a phase of replay was begun within another one")
        self._open, self._routes, self._live, self._passes, self._fault = True, routes, [], 0, None
        try:
            yield self._live
            if self._passes != 1:
                self._note(f"a phase holds one pass over micro-batches, and this one held {self._passes}")
            agree(self._fault, self._world)
        finally:
            self._open, self._routes, self._live = False, None, []

    @contextmanager
    def running(self, tokens: Sequence[int], *, backward: bool) -> Iterator[None]:
        """Around a pass over micro-batches of ``tokens`` rows each on this rank; outside of a phase, nothing."""
        if not self._open:
            yield
            return
        self._passes += 1
        self._calls.clear()
        self._kept.clear()
        try:
            self._check_routes(tokens)
            yield
            self._check_calls(len(tokens), backward)
            self._harvest(tokens)
        finally:
            self._at = None
            self._kept.clear()

    def at(self, microbatch: int, *, backward: bool) -> None:
        """Says which micro-batch the routers are at until they are told otherwise."""
        self._at = (microbatch, backward)

    # --------------------------------------------------------------------------------------------- what routers call

    def called(self, layer: int, rows: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Counts a router's call; ([rows, K] experts, [rows] present) to replay, None to route live."""
        if not self._open:
            return None
        if self._at is None:
            self._note(f"layer {layer} routed outside of a pass")
            return None
        microbatch, backward = self._at
        self._calls[microbatch, layer, backward] += 1
        if self._routes is None:
            return None
        shard = self._routes[microbatch]
        if len(shard.present_T) != rows:
            self._note(
                f"layer {layer} routed {rows} tokens in {'recompute' if backward else 'forward'} where micro-batch "
                f"{microbatch}, with {len(shard.present_T)}, was expected"
            )
            return None
        return shard.experts_LTK[self.layers.index(layer)], shard.present_T

    def keep(self, layer: int, experts_TK: torch.Tensor) -> None:
        """Harvests a live choice of a forward pass."""
        if self._open and self._at is not None and not self._at[1]:
            self._kept[self._at[0], layer] = experts_TK.to(route_dtype(self._experts))

    # ------------------------------------------------------------------------------------------------------ checks

    def _check_routes(self, tokens: Sequence[int]) -> None:
        """Sets aside routes that are not of these micro-batches, before a router could take them."""
        if self._routes is None:
            return
        if len(self._routes) != len(tokens):
            self._note(f"routes of {len(self._routes)} micro-batches to replay in {len(tokens)}")
            self._routes = None
            return
        for microbatch, (shard, rows) in enumerate(zip(self._routes, tokens, strict=True)):
            problem = self._problem(shard, rows)
            if problem:
                self._note(f"micro-batch {microbatch}: {problem}")
                self._routes = None
                return

    def _problem(self, shard: RouteShard, rows: int) -> str:
        """What is wrong with a micro-batch's routes; empty for nothing."""
        if shard.layers != self.layers:
            return f"routes of layers {list(shard.layers)}, and this rank has the MoE layers {list(self.layers)}"
        if not self.layers:
            return ""
        expected = (len(self.layers), rows, self._topk)
        if tuple(shard.experts_LTK.shape) != expected or tuple(shard.present_T.shape) != (rows,):
            return (
                f"routes {list(shard.experts_LTK.shape)} with {list(shard.present_T.shape)} present, where this rank's "
                f"[layers, tokens, top-k] are {list(expected)}"
            )
        if HOLDS.get(shard.experts_LTK.dtype, 0) < self._experts:
            return f"{shard.experts_LTK.dtype} cannot hold the numbers of {self._experts} experts: they have wrapped"
        sorted_LTK = shard.experts_LTK.long().sort(dim=-1).values
        beyond_LT = (sorted_LTK[..., 0] < 0) | (sorted_LTK[..., -1] >= self._experts)
        twice_LT = (sorted_LTK.diff(dim=-1) == 0).any(dim=-1)
        wrong_LT = (beyond_LT | twice_LT) & shard.present_T
        if not wrong_LT.any():
            return ""
        layer, token = wrong_LT.nonzero()[0].tolist()
        return (
            f"layer {self.layers[layer]}, token {token} of this rank: {shard.experts_LTK[layer, token].tolist()} are "
            f"not {self._topk} different experts of {self._experts}"
        )

    def _check_calls(self, microbatches: int, backward: bool) -> None:
        for microbatch in range(microbatches):
            for layer, recomputed in self._recomputed.items():
                for again, expected in ((False, 1), (True, int(backward and recomputed))):
                    calls = self._calls[microbatch, layer, again]
                    if calls != expected:
                        self._note(
                            f"layer {layer}, micro-batch {microbatch}: its routes were used {calls} times in "
                            f"{'recompute' if again else 'forward'} and not {expected}"
                        )

    def _harvest(self, tokens: Sequence[int]) -> None:
        nothing = torch.empty(0, self._topk, dtype=route_dtype(self._experts))
        for microbatch, rows in enumerate(tokens):
            kept = {layer: self._kept.get((microbatch, layer), nothing) for layer in self.layers}
            for layer, choice in kept.items():
                if len(choice) != rows:
                    self._note(
                        f"layer {layer}, micro-batch {microbatch}: the live choice of its {rows} tokens was lost"
                    )
                    return
            experts_LTK = torch.stack(list(kept.values())) if kept else nothing.new_empty(0, rows, self._topk)
            present_T = torch.ones(rows, dtype=torch.bool, device=experts_LTK.device)
            self._live.append(RouteShard(self.layers, experts_LTK, present_T))

    def _note(self, text: str) -> None:
        """The first thing that went wrong is what is told."""
        self._fault = self._fault or ReplayError(text)


def _runs_again(config: TransformerConfig, place: int) -> bool:
    """Whether backward runs the layer at a place of its virtual stage again, as a whole."""
    if config.recompute_granularity != "full":
        return False
    return config.recompute_method == "uniform" or place < config.recompute_num_layers


def refuse_unreplayable(config: TransformerConfig) -> None:
    """Raises ConfigError naming a setting of Megatron's under which a replayed choice would not be what is used."""
    balancing = config.moe_router_load_balancing_type
    balancings = balancing if isinstance(balancing, list) else [balancing]
    reasons = {
        "moe_router_fusion": config.moe_router_fusion and "its kernel chooses experts without asking",
        "moe_router_load_balancing_type": {"sinkhorn", "quantile_balancing"} & set(balancings)
        and f"{balancing} chooses experts without asking",
        "moe_aux_loss_coeff": config.moe_aux_loss_coeff and "the auxiliary loss counts a top-k of its own",
        "moe_expert_capacity_factor": config.moe_expert_capacity_factor and "tokens are dropped after the choice",
        "moe_router_force_load_balancing": config.moe_router_force_load_balancing and "logits are drawn at random",
        "moe_router_force_biased": getattr(config, "moe_router_force_biased", None) is not None
        and "logits are drawn at random",
        "mtp_num_layers": config.mtp_num_layers and "multi-token-prediction layers reuse layer numbers",
        "overlap_moe_expert_parallel_comm": config.overlap_moe_expert_parallel_comm
        and "a forward runs within the backward of another micro-batch",
        "cuda_graph_impl": config.cuda_graph_impl != "none" and "a graph runs without asking",
    }
    for name, reason in reasons.items():
        if reason:
            raise ConfigError(f"{name} = {getattr(config, name)!r} cannot go with a record of routes: {reason}")
