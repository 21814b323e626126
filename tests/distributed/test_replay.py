"""Routing Replay: what was recorded is what is used, in every layout and recompute mode, or the step fails by name.

Routes that are replayed here are never those that routers would choose by themselves, which would prove nothing; only
the first tests replay a record at the weights that it was made with, and there nothing may change, to the last bit.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from megatron.core.transformer.moe.router_replay import RouterReplay

from megatron_gspo.errors import ConfigError, ReplayError
from megatron_gspo.megatron.replay import Replay
from megatron_gspo.parity.check import compare_transformers
from megatron_gspo.types import RouteShard
from tests import oracle
from tests.distributed import steps
from tests.distributed.steps import LAYOUTS, Case
from tests.distributed.test_parity import Bench, bench
from tests.pool import RankPool

pytestmark = pytest.mark.distributed

MICROBATCHES = [[0, 1], [2, 3, 4], [], [5, 6]]
"""A plan of one data-parallel rank; the third is a dummy."""


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A dense layer, then three of 8 experts, top-2."""
    return steps.straddling_case(str(oracle.make_tiny_qwen3_moe(tmp_path_factory.mktemp("moe"), mlp_only_layers=[0])))


@pytest.fixture(scope="module")
def random_routes(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return bench(tmp_path_factory.mktemp("replay"), replay=True)


# -------------------------------------------------------------------------------- R2 before the first update is nothing


def passes(case: Case, parallel: dict[str, int], noise: float = 0.0) -> dict[str, Any]:
    """Old logprobs, then logprobs and gradients with their routes replayed and without, perhaps at noised routers."""
    policy, groups = steps.make_policy(case, parallel)
    batches = [steps.pack_samples(case, part, groups.shard) for part in MICROBATCHES]
    with policy.replay.record() as recorded:
        old = [logprobs for logprobs, _ in policy.logprobs(batches)]
    generator = torch.Generator().manual_seed(groups.pipeline.rank())  # tensor ranks hold the same router
    with torch.no_grad():
        for chunk in policy.chunks:
            for name, weight in chunk.named_parameters():
                if name.endswith("router.weight"):
                    weight.mul_(1 + noise * torch.randn(weight.shape, generator=generator, dtype=weight.dtype))
    results: dict[str, Any] = {"old": old, "layers": policy.replay.layers}
    for name, routes in (("live", None), ("replayed", recorded)):
        logprobs: dict[int, torch.Tensor] = {}

        def objective(index: int, logprobs_T: torch.Tensor, entropy_T: torch.Tensor) -> torch.Tensor:
            logprobs[index] = logprobs_T.detach()  # noqa: B023  # called within this turn
            return (logprobs_T * (batches[index].weights_S > 0).any()).sum()

        with policy.replay.replay(routes) as live:
            policy.gradients(batches, objective)
        results[name] = {
            "logprobs": [logprobs[index] for index in sorted(logprobs)],
            "gradients": dict(policy.named_gradients()),
            "changed": share_changed(recorded, live),
        }
    return results


def share_changed(a: Sequence[RouteShard], b: Sequence[RouteShard]) -> float:
    """Of the rows of all layers and micro-batches, those that differ in order or choice."""
    rows = [(x.experts_LTK != y.experts_LTK).any(-1).flatten() for x, y in zip(a, b, strict=True)]
    return float(torch.cat(rows).double().mean()) if torch.cat(rows).numel() else 0.0


@pytest.mark.parametrize(
    ("layout", "settings"),
    [
        ("TP2xPP2xEP2", {"recompute": "full"}),
        (
            "PP2",
            {"recompute": "full", "recompute_method": "block"},
        ),  # of each stage the first layer's router runs again
        ("PP2xVPP2", {"recompute": "selective", "recompute_modules": ("core_attn", "mlp")}),  # no router runs again
        ("CP2xEP2", {}),
    ],
)
def test_in_the_first_minibatch_r2_changes_nothing_to_the_last_bit(
    ranks: RankPool, case: Case, layout: str, settings: dict[str, Any]
) -> None:
    world, parallel = LAYOUTS[layout]
    routers = 0
    for part in ranks.run(world, passes, replace(case, **settings), parallel):
        assert part["replayed"]["changed"] == part["live"]["changed"] == 0.0
        for old, live, replayed in zip(
            part["old"], part["live"]["logprobs"], part["replayed"]["logprobs"], strict=True
        ):
            assert torch.equal(old, live)
            assert torch.equal(old, replayed)
        assert part["live"]["gradients"].keys() == part["replayed"]["gradients"].keys()
        for name, gradient in part["live"]["gradients"].items():
            assert torch.equal(gradient, part["replayed"]["gradients"][name]), name
            routers += name.endswith("gate.weight") and bool(gradient.abs().max() > 0)
    assert routers == 3, "each router's weight has a gradient, on the one rank that owns it"


def test_with_routers_noised_replay_restores_what_the_routes_had_moved(ranks: RankPool, case: Case) -> None:
    (part,) = ranks.run(1, passes, case, {}, 0.01)
    assert part["replayed"]["changed"] > 0.01, "noise moved no route"
    off_live, off_replayed = (
        max(float((new - old).abs().max()) for new, old in zip(part[name]["logprobs"], part["old"], strict=True))
        for name in ("live", "replayed")
    )
    assert off_live > 5 * off_replayed > 0.0, "the gate's weights are the live scores, and they have moved"


@contextmanager
def routers_choose_the_least() -> Iterator[None]:
    """The K experts of the smallest logits: every live choice is another one."""
    topk = torch.topk

    def least(scores: torch.Tensor, k: int, *args: Any, **kwargs: Any) -> Any:
        values, indices = topk(-scores, k, *args, **kwargs)
        return -values, indices

    with mock.patch.object(torch, "topk", least):
        yield


def logprobs_under_other_choices(case: Case) -> tuple[list[float], list[bool], float, int]:
    policy, groups = steps.make_policy(case, {})
    batches = [steps.pack_samples(case, part, groups.shard) for part in MICROBATCHES]
    with policy.replay.record() as recorded:
        old = [logprobs for logprobs, _ in policy.logprobs(batches)]
    with routers_choose_the_least():
        live = [logprobs for logprobs, _ in policy.logprobs(batches)]
        with policy.replay.replay(recorded) as chosen:
            replayed = [logprobs for logprobs, _ in policy.logprobs(batches)]
    moved = [float((a - b).abs().max()) for a, b in zip(old, live, strict=True)]
    restored = [torch.equal(a, b) for a, b in zip(old, replayed, strict=True)]
    largest = max(int(shard.experts_LTK.max()) for shard in recorded)
    return moved, restored, share_changed(recorded, chosen), largest


@pytest.mark.parametrize("experts", [8, 300])
def test_with_every_live_choice_another_replay_restores_the_logprobs_to_the_last_bit(
    ranks: RankPool, case: Case, tmp_path: Path, experts: int
) -> None:
    if experts > 8:
        case = replace(case, path=str(oracle.make_tiny_qwen3_moe(tmp_path, num_experts=experts)))
    ((moved, restored, changed, largest),) = ranks.run(1, logprobs_under_other_choices, case)
    assert min(moved) > 1e-3
    assert restored == [True] * 4
    assert changed == 1.0, "the live choice is kept beside the replayed one"
    assert (largest > 255) == (experts > 256), "a number above 255 does not fit into a byte"


# ----------------------------------------------------------------------------------------- routes that are not the live


@pytest.mark.parametrize(
    "layout",
    [
        "TP1+recompute",
        "TP2",
        "DP2",
        "EP2+recompute-selective",
        "CP2",
        "PP2+recompute-selective",
        "TP2xPP2xEP2+recompute",
        "TP2xCP2xPP2xVPP2+recompute",
    ],
)
def test_replayed_routes_give_the_step_of_one_process_that_replays_them(random_routes: Bench, layout: str) -> None:
    """Used routes, logprobs, every gradient and the update, with routes that are random by token and layer."""
    row = random_routes.row(layout)
    assert (row.verdict, row.reason) == ("held", "")
    assert row.columns["gradients"].error < 1e-11


def test_the_routes_that_were_used_are_those_that_were_given(random_routes: Bench) -> None:
    """Read off the routers' outputs by hooks of their own; the last token of a response has none and routes live."""
    reference = random_routes.reference
    case = reference.case
    given = np.ones(case.tokens, dtype=bool)
    given[case.starts[1:] - 1] = False
    assert set(reference.routing.experts) == {1, 2, 3}, "layer 0 is dense"
    for layer, used in reference.routing.experts.items():
        routes = np.sort(case.routes(layer, 8, 2), axis=1)
        assert (used[given] == routes[given]).all()
        assert (used[~given] != routes[~given]).any()
        assert np.isinf(reference.routing.margins[layer][given]).all()
    for step in reference.steps:
        gates = {name for name in step.names if name.endswith("gate.weight")}
        assert len(gates) == 3
        assert not gates & set(step.idle)


def test_transformers_with_the_same_routes_gives_the_same_step(random_routes: Bench) -> None:
    row = compare_transformers(random_routes.reference, random_routes.ranks, random_routes.directory)
    assert row.verdict == "held"
    assert row.columns["gradients"].error < 1e-5


# --------------------------------------------------------------------- what goes wrong without a word, made to go wrong


@contextmanager
def backward_is_not_announced() -> Iterator[None]:
    """Recompute uses the routes of whichever micro-batch ran forward last."""
    at = Replay.at

    def forward_only(self: Replay, microbatch: int, *, backward: bool) -> None:
        if not backward:
            at(self, microbatch, backward=False)

    with mock.patch.object(Replay, "at", forward_only):
        yield


@contextmanager
def nothing_is_noted() -> Iterator[None]:
    with mock.patch.object(Replay, "_note", return_value=None):
        yield


@contextmanager
def recompute_takes_other_routes_unnoted() -> Iterator[None]:
    with backward_is_not_announced(), nothing_is_noted():
        yield


@contextmanager
def a_choice_is_not_harvested() -> Iterator[None]:
    """Of layer 2 in micro-batch 1: what the last micro-batch's record alone would leave."""
    keep = Replay.keep

    def lossy(self: Replay, layer: int, experts_TK: torch.Tensor) -> None:
        if (layer, self._at) != (2, (1, False)):
            keep(self, layer, experts_TK)

    with mock.patch.object(Replay, "keep", lossy):
        yield


def binding(bind: Callable[[Any], None]) -> Any:
    """Does something to each MoE layer after its router was bound."""
    own = Replay._bind

    def bound(self: Replay, module: Any, first: int) -> None:
        own(self, module, first)
        bind(module)

    return mock.patch.object(Replay, "_bind", bound)


@contextmanager
def routers_are_orphaned() -> Iterator[None]:
    """Their replay is Megatron's, of another model: replayed nothing, without a word."""

    def orphan(module: Any) -> None:
        module.router.router_replay = RouterReplay()

    with binding(orphan):
        yield


@contextmanager
def a_router_is_sinkhorn() -> Iterator[None]:
    """Which chooses without asking; no check of Megatron's says so."""

    def balance(module: Any) -> None:
        module.router.routing_type = "sinkhorn"

    with binding(balance):
        yield


@contextmanager
def routes_are_dealt_one_token_late() -> Iterator[None]:
    from megatron_gspo.train import routing

    lay_out = routing.lay_out

    def late(*args: Any) -> Any:
        experts_TLK, present_T = lay_out(*args)
        experts_TLK[present_T] = np.roll(experts_TLK[present_T], 1, axis=0)
        return experts_TLK, present_T

    with mock.patch.object(routing, "lay_out", late):
        yield


def test_engine_routes_that_reach_another_token_are_routed_otherwise(random_routes: Bench) -> None:
    row = random_routes.row("TP2", routes_are_dealt_one_token_late)
    assert row.verdict == "failed"
    assert len(row.route_flips) == len(random_routes.reference.case.samples)
    assert row.columns["gradients"].error > 0.1


@pytest.mark.parametrize(
    ("fault", "layout", "message"),
    [
        (
            backward_is_not_announced,
            "PP2+recompute",
            r"layer \d routed \d+ tokens in forward where micro-batch \d, with \d+, was expected",
        ),
        (a_choice_is_not_harvested, "PP2", "layer 2, micro-batch 1: the live choice of its "),
        (routers_are_orphaned, "TP2", "layer 1, micro-batch 0: its routes were used 0 times in forward and not 1"),
        (a_router_is_sinkhorn, "TP1", "layer 1, micro-batch 0: its routes were used 0 times in forward and not 1"),
    ],
    ids=lambda value: getattr(value, "__name__", "") or (value if value[0].isupper() else "named"),
)
def test_a_silent_failure_is_named_by_layer_and_microbatch(
    random_routes: Bench, fault: Callable[[], Any], layout: str, message: str
) -> None:
    row = random_routes.row(layout, fault)
    assert row.verdict == "failed"
    assert re.search(message, row.reason), row.reason


def test_unnoted_a_recompute_with_other_routes_is_wrong_in_the_gradients_alone(random_routes: Bench) -> None:
    row = random_routes.row("PP2+recompute", recompute_takes_other_routes_unnoted)
    assert row.verdict == "failed"
    assert row.columns["gradients"].error > 0.1
    assert row.columns["logprobs"].error < 1e-12
    assert random_routes.row("TP1+recompute-selective", nothing_is_noted).verdict == "held"


# ------------------------------------------------------------------------------------------------- what is not accepted


def refusals(case: Case) -> dict[str, str]:
    """What each broken record is refused with; and that a good one is still taken after it."""
    policy, groups = steps.make_policy(case, {})
    batches = [steps.pack_samples(case, part, groups.shard) for part in MICROBATCHES]
    with policy.replay.record() as recorded:
        policy.logprobs(batches)

    def broken(change: Callable[[RouteShard], RouteShard]) -> list[RouteShard]:
        return [recorded[0], change(recorded[1]), *recorded[2:]]

    def with_row(*row: int, dtype: torch.dtype = torch.uint8) -> Callable[[RouteShard], RouteShard]:
        def change(shard: RouteShard) -> RouteShard:
            experts_LTK = shard.experts_LTK.to(dtype, copy=True)
            experts_LTK[2, 5] = torch.tensor(row, dtype=dtype)
            return replace(shard, experts_LTK=experts_LTK)

        return change

    def absent(shard: RouteShard) -> RouteShard:
        present_T = shard.present_T.clone()
        present_T[5] = False
        return replace(with_row(3, 3)(shard), present_T=present_T)

    found: dict[str, str] = {}

    def attempt(name: str, routes: Sequence[RouteShard] | None, times: int = 1) -> None:
        try:
            with policy.replay.replay(routes):
                for _ in range(times):
                    policy.logprobs(batches)
            found[name] = "accepted"
        except ReplayError as error:
            found[name] = str(error)

    attempt("twice", broken(with_row(3, 3)))
    attempt("beyond", broken(with_row(3, 8)))
    attempt("negative", broken(with_row(3, -1, dtype=torch.int16)))
    attempt("absent", broken(absent))
    attempt("layers", broken(lambda shard: replace(shard, layers=(0, 1, 2))))
    attempt("tokens", broken(lambda shard: replace(shard, experts_LTK=shard.experts_LTK[:, 1:])))
    attempt("wider", broken(lambda shard: replace(shard, experts_LTK=shard.experts_LTK.to(torch.uint16))))
    attempt("fewer", recorded[1:])
    attempt("no pass", recorded, times=0)
    attempt("two passes", recorded, times=2)
    attempt("nested", None)
    try:
        with policy.replay.record(), policy.replay.record():
            pass
    except ReplayError as error:
        found["nested"] = str(error)
    policy.replay._experts = 300  # as if the model had so many: these numbers have wrapped
    attempt("wrapped", recorded)
    policy.replay._experts = 8
    attempt("good", recorded)
    return found


def test_routes_that_are_not_this_ranks_are_refused_by_what_is_wrong(ranks: RankPool, case: Case) -> None:
    (found,) = ranks.run(1, refusals, case)
    token = "micro-batch 1: layer 3, token 5 of this rank: "
    assert found.pop("twice") == token + "[3, 3] are not 2 different experts of 8"
    assert found.pop("beyond") == token + "[3, 8] are not 2 different experts of 8"
    assert found.pop("negative") == token + "[3, -1] are not 2 different experts of 8"
    assert found.pop("layers") == (
        "micro-batch 1: routes of layers [0, 1, 2], and this rank has the MoE layers [1, 2, 3]"
    )
    assert found.pop("tokens").startswith("micro-batch 1: routes [3, ")
    assert found.pop("fewer") == "routes of 3 micro-batches to replay in 4"
    assert found.pop("no pass") == "a phase holds one pass over micro-batches, and this one held 0"
    assert found.pop("two passes") == "a phase holds one pass over micro-batches, and this one held 2"
    assert found.pop("nested") == "a phase of replay was begun within another one"
    assert found.pop("wrapped") == (
        "micro-batch 0: torch.uint8 cannot hold the numbers of 300 experts: they have wrapped"
    )
    assert found == dict.fromkeys(("absent", "wider", "good"), "accepted")


def error_of_one_rank(case: Case, parallel: dict[str, int]) -> str:
    """Rank 1 alone has a bad route; every rank must raise before it could step."""
    policy, groups = steps.make_policy(case, parallel)
    batches = [steps.pack_samples(case, part, groups.shard) for part in MICROBATCHES]
    with policy.replay.record() as recorded:
        policy.logprobs(batches)
    if groups.tensor.rank() == 1:
        recorded[0].experts_LTK[0, 0] = 1
    with pytest.raises(ReplayError) as error, policy.replay.replay(recorded):
        policy.gradients(batches, lambda index, logprobs_T, entropy_T: logprobs_T.sum())
    return str(error.value)


def test_a_bad_route_of_one_rank_stops_every_rank(ranks: RankPool, case: Case) -> None:
    messages = ranks.run(2, error_of_one_rank, case, LAYOUTS["TP2"][1])
    assert set(messages) == {
        "rank 1: micro-batch 0: layer 1, token 0 of this rank: [1, 1] are not 2 different experts of 8"
    }


def bindings(case: Case) -> tuple[int, list[tuple[int, ...]], dict[str, str]]:
    """Megatron's list of routers after two policies; their layers; and settings that are refused."""
    policies = [steps.make_policy(case, {})[0] for _ in range(2)]
    config = policies[0].chunks[0].config
    refused = {}
    for name, value in {
        "moe_router_fusion": True,
        "moe_router_load_balancing_type": "sinkhorn",
        "moe_aux_loss_coeff": 1e-3,
        "moe_expert_capacity_factor": 1.0,
        "moe_router_force_load_balancing": True,
        "mtp_num_layers": 1,
        "overlap_moe_expert_parallel_comm": True,
        "cuda_graph_impl": "local",
    }.items():
        with mock.patch.object(config, name, value):
            try:
                Replay(policies[0].chunks, policies[0].groups.world)
                refused[name] = "accepted"
            except ConfigError as error:
                refused[name] = str(error)
    return len(RouterReplay.global_router_replay_instances), [p.replay.layers for p in policies], refused


def test_routers_are_bound_by_layer_in_no_global_list_and_what_would_ignore_replay_is_refused(
    ranks: RankPool, case: Case
) -> None:
    ((listed, layers, refused),) = ranks.run(1, bindings, case)
    assert listed == 0
    assert layers == [(1, 2, 3), (1, 2, 3)]
    for name, message in refused.items():
        assert message.startswith(f"{name} = "), message
        assert " cannot go with a record of routes: " in message
