"""Corrections for the engine gap in whole runs, against a stand-in that draws uniformly: no model's distribution."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from megatron_gspo.algorithm.objective import objective
from megatron_gspo.config import RunConfig, load
from megatron_gspo.errors import EngineMismatchError
from megatron_gspo.megatron.groups import make_groups, start_distributed
from megatron_gspo.megatron.policy import Policy
from megatron_gspo.parallel.exchange import gather_objects
from megatron_gspo.report.recorder import RunRecorder
from megatron_gspo.runs.loop import train
from megatron_gspo.train.assembly import build_run
from megatron_gspo.train.batch import place
from megatron_gspo.train.collect import collect_rollouts, score
from megatron_gspo.train.inputs import load_inputs
from megatron_gspo.train.routing import Routing
from megatron_gspo.train.settle import settle
from megatron_gspo.train.step import pi_old_pass
from megatron_gspo.types import Sample
from tests.pool import RankPool
from tests.training.conftest import QUICKSTART
from tests.training.stand_in import StandIn

pytestmark = pytest.mark.timeout(500)
Settings = Callable[..., list[str]]
ALONE = ("parallel.tensor=1", "parallel.expert=1")
GRPO = ('algorithm.name="grpo"', "algorithm.clip_low=0.2", "algorithm.clip_high=0.27")


@pytest.fixture
def settings(overrides: list[str], tmp_path: Path) -> Settings:
    def make(server: StandIn, *more: str) -> list[str]:
        own = [f'rollout.servers=["{server.url}"]', 'sync.method="disk"', f'sync.directory="{tmp_path}"']
        unchecked = ['sync.verify="off"', "rollout.max_engine_k3=0", "train.noise_floor_every=0", "eval.every=0"]
        return [
            *overrides,
            *own,
            *unchecked,
            *GRPO,
            "eval.every=0",
            "train.save_hf=false",
            "train.outer_steps=1",
            *more,
        ]

    return make


def run(settings: list[str]) -> None:
    train(load(QUICKSTART / "gspo.toml", settings), RunRecorder)


def first_line(path: Path) -> dict[str, float]:
    line: dict[str, float] = json.loads((path / "metrics.jsonl").read_text().splitlines()[0])
    return line


def test_the_corrected_step_is_the_same_over_tensor_pipeline_and_data_ranks(
    ranks: RankPool, settings: Settings, quickstart: Path, tmp_path: Path
) -> None:
    corrected = ['correction.rule="mask"', "correction.high=1.5", 'correction.denominator="shrink"']
    layouts = {
        "one": (1, ALONE),
        "tensor": (2, ("parallel.tensor=2", "parallel.expert=1")),
        "pipeline": (2, (*ALONE, "parallel.pipeline=2")),
        "data": (2, (*ALONE, "parallel.data=2")),
    }
    found = {}
    for name, (world, layout) in layouts.items():
        with StandIn(quickstart / "model") as server:
            place_of = f'train.run_dir="{tmp_path / name}"'
            ranks.run(world, run, settings(server, *corrected, *layout, place_of))
        found[name] = first_line(tmp_path / name)
    one = found.pop("one")
    assert 0.01 < one["correction/masked_tokens"] == one["correction/out_of_band"] < 0.99
    assert one["correction/ppl_engine"] == pytest.approx(13.0), "uniform over 13 tokens"
    names = [name for name in one if name.startswith("correction/")]
    for line in found.values():
        for name in (*names, "loss", "grad_norm"):
            assert line[name] == pytest.approx(one[name], rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("world", [1, 2])
def test_a_shrunk_denominator_is_that_of_responses_that_never_had_what_is_left_out(
    ranks: RankPool, settings: Settings, quickstart: Path, world: int
) -> None:
    with StandIn(quickstart / "model") as server:
        dropped = ['correction.rule="drop"', "correction.high=1.5", 'correction.denominator="shrink"']
        config = load(QUICKSTART / "gspo.toml", settings(server, *dropped, *ALONE, f"parallel.data={world}"))
        for settled, never, left in ranks.run(world, losses_of_both, config):
            assert 0 < left < 1
            assert settled == pytest.approx(never, rel=1e-6) and settled != 0


def losses_of_both(config: RunConfig) -> tuple[float, float, float]:
    """This rank's loss of the first mini-batch's settled shards, and of samples whose masks never had the tokens that
    are left out; and the share of these."""
    start_distributed()
    run = build_run(config, make_groups(config.parallel), load_inputs(config), config.rollout.servers)
    survivors, dropped = collect_rollouts(run, dict(enumerate(run.prompts.prompts[:4])), 0)
    samples = score(run, survivors, dropped).samples
    minibatches = place(samples, config, run.groups)
    minibatches = pi_old_pass(run, minibatches, Routing("off"))
    settled = settle(run, minibatches[0])
    kept = {}
    for minibatch in minibatches:
        for batch, shard in zip(minibatch.batches, settle(run, minibatch).minibatch.shards, strict=True):
            for index, key in enumerate(batch.samples):
                kept[key] = shard.mask_T[batch.mask_T & (batch.sequence_T == index)].numpy()
    kept = {key: mask for part in gather_objects(kept, run.groups.world) for key, mask in part.items()}
    reduced = place([s for s in (without(s, kept[s.group, s.sample]) for s in samples) if s], config, run.groups)
    plain = pi_old_pass(run, reduced, Routing("off"))
    return (
        total(run, settled.minibatch.shards),
        total(run, plain[0].shards),
        settled.metrics["correction/masked_tokens"],
    )


def without(sample: Sample, kept_R: np.ndarray) -> Sample | None:
    if not kept_R.any():
        return None
    trained = sample.trained.copy()
    trained[np.flatnonzero(trained)[~kept_R]] = False
    values = {"rollout_logprobs": sample.rollout_logprobs[kept_R], "token_advantages": sample.token_advantages[kept_R]}
    return replace(sample, trained=trained, **values)


def total(run: Any, shards: Sequence[Any]) -> float:
    """At pi_theta = pi_old, summed over all leaders."""
    losses = [objective(run.config.algorithm, s, s.old_logprobs_T, run.sequence_sum).loss_S.abs().sum() for s in shards]
    return float(sum(gather_objects(float(sum(losses)), run.groups.data)))


@pytest.mark.parametrize("more", [["correction.opsm=0.001"], ["correction.bypass=true"]])
def test_masking_by_the_policys_own_move_and_bypass_change_the_step_and_not_what_was_drawn(
    ranks: RankPool, settings: Settings, quickstart: Path, tmp_path: Path, more: list[str]
) -> None:
    fast = "optimizer.lr=3e-3"
    for name, changes in (("plain", []), ("changed", more)):
        with StandIn(quickstart / "model") as server:
            ranks.run(1, run, settings(server, *ALONE, fast, f'train.run_dir="{tmp_path / name}"', *changes))
    plain, changed = ((tmp_path / n / "metrics.jsonl").read_text().splitlines()[1] for n in ("plain", "changed"))
    before, after = json.loads(plain), json.loads(changed)
    assert before["reward/mean"] == after["reward/mean"] and before["grad_norm"] != after["grad_norm"]
    gaps = [json.loads((tmp_path / n / "metrics.jsonl").read_text().splitlines()[0]) for n in ("plain", "changed")]
    assert gaps[0]["kl/engine_k3"] == gaps[1]["kl/engine_k3"] > 0, "the gap that is reported is the trainer's own"


BYPASS = ("correction.bypass=true", "optimizer.lr=3e-3")


@pytest.mark.parametrize(("world", "noise"), [(1, 0), (2, 1)])
def test_bypass_without_a_pass_of_pi_old_trains_what_it_does_with_one(
    ranks: RankPool, settings: Settings, quickstart: Path, tmp_path: Path, world: int, noise: int
) -> None:
    layout = (*ALONE, f"parallel.pipeline={world}", f"train.noise_floor_every={noise}", *BYPASS)
    passes, lines, records = {}, {}, {}
    for name, drift_every in (("with", 1), ("without", 0)):
        own = (f'train.run_dir="{tmp_path / name}"', f"replay.drift_every={drift_every}")
        with StandIn(quickstart / "model") as server:
            passes[name] = ranks.run(world, passes_of_a_run, settings(server, *layout, *own))
        lines[name] = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        (file,) = (tmp_path / name / "rollouts").glob("*.jsonl")
        records[name] = [json.loads(line) for line in file.read_text().splitlines()]
    assert passes == {"with": [1 + noise] * world, "without": [2 * noise] * world}, "noise takes one of its own"
    (first, second), (first_without, second_without) = lines["with"], lines["without"]
    trained = [name for name in first if not name.startswith(("time/", "throughput/", "route/", "memory/"))]
    assert {"loss", "grad_norm", "ratio/mean", "kl/engine_k3"} < set(trained)
    assert [first_without[name] for name in trained] == [first[name] for name in trained]
    moved = [name for name in trained if not name.startswith("kl/engine_") and name in second]
    assert [second_without[name] for name in moved] == [second[name] for name in moved]
    assert second_without["kl/engine_k3"] != second["kl/engine_k3"] > 0
    assert any(record in records["with"] for record in records["without"]), "responses of the first mini-batch"
    assert [record["new_logprobs"] for record in records["without"]] == [
        record["new_logprobs"] for record in records["with"]
    ]


def passes_of_a_run(settings: list[str]) -> int:
    """How often the policy made a forward pass of its own."""
    with mock.patch.object(Policy, "logprobs", autospec=True, side_effect=Policy.logprobs) as logprobs:
        run(settings)
    return logprobs.call_count


def test_an_engine_that_is_not_the_trainers_stops_a_bypassing_run_before_its_weights_move(
    ranks: RankPool, settings: Settings, quickstart: Path, tmp_path: Path
) -> None:
    own = (f'train.run_dir="{tmp_path / "run"}"', "replay.drift_every=0", "rollout.max_engine_k3=1e-9")
    with StandIn(quickstart / "model") as server:
        assert ranks.run(1, stopped_with, settings(server, *ALONE, *BYPASS, *own)) == [0]
    assert not (tmp_path / "run" / "metrics.jsonl").read_text()


def stopped_with(settings: list[str]) -> int:
    """How many optimizer steps there were before the engine was found to be another."""
    refused = pytest.raises(EngineMismatchError, match="the engine's logprobs are not the trainer's")
    with refused, mock.patch.object(Policy, "step", autospec=True, side_effect=Policy.step) as step:
        run(settings)
    return step.call_count
