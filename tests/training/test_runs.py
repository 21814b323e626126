"""Whole runs, trainer ranks and a real SGLang server: what a person who starts one may rely on."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatron_gspo.config import RunConfig, load
from megatron_gspo.errors import DataError, EngineReplyError, RewardError, WeightError
from megatron_gspo.megatron.groups import make_groups
from megatron_gspo.megatron.policy import Policy
from megatron_gspo.report.metrics import COMPONENT, METRICS, PLACE, SUITE, row_of
from megatron_gspo.report.recorder import RunRecorder
from megatron_gspo.rollout.sglang.control import Servers
from megatron_gspo.runs.loop import train as train_with
from megatron_gspo.sync.base import METHODS
from megatron_gspo.train.assembly import Run, build_run
from megatron_gspo.train.batch import place
from megatron_gspo.train.collect import collect_rollouts, score
from megatron_gspo.train.inputs import load_inputs
from megatron_gspo.train.noise import measure_noise
from megatron_gspo.train.routing import Routing
from megatron_gspo.train.step import outer_step, pi_old_pass
from tests.pool import RankError, RankPool
from tests.training.conftest import QUICKSTART, MakeConfig

ENGINE_ROUTES = {name for name in METRICS if name.startswith(("route/engine_mismatch", "replay/"))}
"""What only a run that asks the engine for routes, or replays some, has (test_engine_routes.py)."""
REFERENCE = {"kl/ref_k1", "kl/ref_k3"}
"""What only a run with a reference has."""


def train(config: RunConfig) -> None:
    """A run as the command line starts it, on the pool's ranks."""
    warnings.simplefilter("ignore")
    train_with(config, RunRecorder)


def metrics_of(config: RunConfig) -> list[dict[str, float]]:
    lines = (Path(config.train.run_dir) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def steps_of(config: RunConfig) -> list[dict[str, float]]:
    """The lines of optimizer steps, without what depends on the clock."""
    return [
        {name: value for name, value in line.items() if not name.startswith(("time/", "tokens_per_s"))}
        for line in metrics_of(config)
        if line["step"] >= 0
    ]


def weights_of(config: RunConfig) -> dict[str, torch.Tensor]:
    directory = Path(config.train.run_dir) / "hf"
    return {
        name: tensor for file in sorted(directory.glob("*.safetensors")) for name, tensor in load_file(file).items()
    }


def responses_of(config: RunConfig) -> list[dict[str, Any]]:
    files = sorted((Path(config.train.run_dir) / "rollouts").glob("*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def test_a_seed_repeats_a_whole_run_token_for_token_and_weight_for_weight(
    ranks: RankPool, make_config: MakeConfig, tmp_path: Path
) -> None:
    first, second, other = (
        make_config(f'train.run_dir="{tmp_path}/{name}"', f"train.seed={seed}")
        for name, seed in (("first", 1), ("second", 1), ("other", 2))
    )
    for config in (first, second, other):
        ranks.run(2, train, config)
    assert [r["response"] for r in responses_of(first)] == [r["response"] for r in responses_of(second)]
    assert [r["response"] for r in responses_of(first)] != [r["response"] for r in responses_of(other)]
    one, two, three = map(weights_of, (first, second, other))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not all(torch.equal(one[name], three[name]) for name in one)
    initial = load_file(Path(first.model.path) / "model.safetensors")
    moved = [name for name in one if not torch.equal(initial[name], one[name])]
    assert len(moved) > 0.9 * len(one)  # an expert that no token chose stays


def test_the_first_minibatch_clips_exactly_nothing_and_the_engine_agrees_with_the_trainer(
    ranks: RankPool, make_config: MakeConfig
) -> None:
    config = make_config("optimizer.lr=3e-3", "eval.samples=2")
    ranks.run(2, train, config)
    steps = steps_of(config)
    assert [(line["outer_step"], line["minibatch"]) for line in steps] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    for line in steps:
        fresh = line["minibatch"] == 0
        assert (line["ratio/p01"] == line["ratio/p99"] == 1.0) == fresh
        assert (line["clip/frac_tokens"] == 0.0) == fresh
        assert abs(line["kl/engine_k3"]) < 1e-9  # after a sync of weights that have moved
        assert line["grad_norm"] > 0
    written = {name for line in metrics_of(config) for name in line} - set(PLACE)
    optional = ("correction/", "dynamic/", "critic/", "source/", "curriculum/", SUITE)
    asked_for = {name for name in METRICS if name.startswith(optional)}
    asked_for |= {"data/skipped", "reward/kl_penalty", COMPONENT}
    expected = set(METRICS) - ENGINE_ROUTES - REFERENCE - asked_for
    assert {row_of(name) for name in written} == expected, "docs/metrics.md says what is there"


def test_r2_takes_the_first_minibatch_as_without_and_the_second_by_the_routes_of_the_first(
    ranks: RankPool, make_config: MakeConfig, tmp_path: Path
) -> None:
    settings = ("optimizer.lr=3e-3", "train.outer_steps=1")
    off, r2 = (
        make_config(*settings, f"replay.mode={mode}", f'train.run_dir="{tmp_path}/{mode}"') for mode in ("off", "r2")
    )
    for config in (off, r2):
        ranks.run(2, train, config)
    (first_off, second_off), (first_r2, second_r2) = (
        [{name: value for name, value in line.items() if not name.startswith("kl/engine")} for line in steps_of(config)]
        for config in (off, r2)  # the server's last bits depend on what it has cached
    )
    assert first_r2 == first_off | {"replay/coverage": 1.0}
    assert second_off["expert/load_max"] != second_r2["expert/load_max"], "routers moved, and nothing was replayed"
    assert second_off["ratio/abs_log_mean"] != second_r2["ratio/abs_log_mean"]


def test_the_same_configuration_takes_the_same_first_step_at_every_layout(
    ranks: RankPool, make_config: MakeConfig, tmp_path: Path
) -> None:
    layouts = {
        "one": "parallel={}",
        "tensor-expert": "parallel={tensor=2, expert=2}",
        "all": "parallel={tensor=2, pipeline=2, expert=2}",
        "data": "parallel={data=2, expert=2}",
        "context": "parallel={context=2, expert=2}",
        "tensor-context-pipeline": "parallel={tensor=2, context=2, pipeline=2}",
    }
    steps, read = {}, {}
    for name, layout in layouts.items():
        key, _, value = layout.partition("=")
        settings = [f"{key}.{item.strip()}" for item in value.strip("{}").split(",") if item]
        reset = ["parallel.tensor=1", "parallel.expert=1"]
        config = make_config(*reset, *settings, f'train.run_dir="{tmp_path}/{name}"', "train.outer_steps=1")
        ranks.run(config.parallel.world_size(), train, config)
        steps[name] = steps_of(config)
        read[name] = {(r["prompt_id"], r["sample"]): r for r in responses_of(config)}
    for name in layouts:
        for ours, reference in zip(steps[name], steps["one"], strict=True):
            for metric in ("reward/mean", "loss", "grad_norm", "entropy", "length/mean"):
                assert ours[metric] == pytest.approx(reference[metric], rel=2e-4, abs=1e-7), (name, metric)
            assert ours["expert/load_max"] == pytest.approx(reference["expert/load_max"], rel=2e-3), name
            assert 1 < ours["expert/load_max"] < 16
        assert read[name]
        for key in read[name].keys() & read["one"].keys():  # the first of two data ranks has others to show
            ours, reference = read[name][key], read["one"][key]
            assert ours["tokens"] == reference["tokens"]
            for field in ("old_logprobs", "new_logprobs"):
                assert ours[field] == pytest.approx(reference[field], abs=1e-4), (name, key, field)


def test_every_loss_trains_and_gspo_token_takes_gspos_steps(
    ranks: RankPool, make_config: MakeConfig, tmp_path: Path
) -> None:
    steps = {}
    for name in ("gspo", "gspo-token", "grpo", "ppo"):
        clip = [] if name.startswith("gspo") else ["algorithm.clip_low=0.2", "algorithm.clip_high=0.2"]
        settings = [f'algorithm.name="{name}"', f'train.run_dir="{tmp_path}/{name}"', "train.outer_steps=1", *clip]
        config = make_config(*settings, "eval.every=0")
        ranks.run(2, train, config)
        steps[name] = steps_of(config)
    for ours, reference in zip(steps["gspo-token"], steps["gspo"], strict=True):
        for metric in ("loss", "grad_norm", "clip/frac_tokens", "ratio/p05", "entropy"):
            assert ours[metric] == pytest.approx(reference[metric], rel=1e-4, abs=1e-7), metric
    assert steps["grpo"][1]["grad_norm"] != pytest.approx(steps["gspo"][1]["grad_norm"], rel=1e-2)


def test_a_kl_to_the_reference_is_zero_at_first_and_then_pulls_back(ranks: RankPool, make_config: MakeConfig) -> None:
    config = make_config("algorithm.kl_loss_coef=1e6", "train.outer_steps=1", "eval.every=0", "optimizer.lr=1e-4")
    ranks.run(2, train, config)
    first, second = steps_of(config)
    assert abs(first["loss"]) < 1e-3  # the policy is its own reference: no KL, and advantages sum to nothing
    assert second["loss"] > 1  # one step away, the KL is all there is
    assert (first["kl/ref_k1"], first["kl/ref_k3"]) == (0.0, 0.0), "two forward passes of the same weights"
    assert second["loss"] == pytest.approx(1e6 * second["kl/ref_k3"], rel=0.5), "weighed by response, and by the ratio"


def test_what_a_run_leaves_behind_loads_in_transformers_and_gives_the_same_logprobs(
    ranks: RankPool, make_config: MakeConfig
) -> None:
    config = make_config()
    ranks.run(2, train, config)
    directory = Path(config.train.run_dir)
    assert {"config.toml", "manifest.json", "metrics.jsonl", "report.html", "checkpoints", "hf"} <= {
        path.name for path in directory.iterdir()
    }
    manifest = json.loads((directory / "manifest.json").read_text())
    assert manifest["versions"]["sglang"] == "0.5.23"
    assert manifest["status"] == "finished"
    model = AutoModelForCausalLM.from_pretrained(directory / "hf", dtype=torch.float32)
    (logprobs,) = ranks.run(1, logprobs_of, config, str(directory / "hf"), list(range(10)))
    logits = model(torch.tensor([list(range(10))])).logits[0, :-1].double()
    expected = logits.log_softmax(-1).gather(1, torch.arange(1, 10)[:, None])[:, 0]
    assert np.abs(logprobs - expected.detach().numpy()).max() < 1e-5


def logprobs_of(config: RunConfig, path: str, tokens: list[int]) -> np.ndarray:
    """The trainer's logprobs of a token sequence under the weights at ``path``, on one rank."""
    from megatron_gspo.batching.packing import pack
    from megatron_gspo.types import PlacedSample

    single = config.model_copy(update={"parallel": type(config.parallel)()})
    policy = Policy(single, make_groups(single.parallel), path=path, trainable=False)
    zeros = np.zeros(len(tokens) - 1)
    rest = {"rollout_logprobs": zeros, "advantage": 0.0, "token_advantages": zeros, "weight": 1.0}
    sample = PlacedSample.of_response(np.array(tokens[:1]), np.array(tokens[1:]), group=0, sample=0, **rest)
    batch = pack([sample], loss_dtype=torch.float32)
    ((logprobs, _),) = policy.logprobs([batch])
    return logprobs[batch.mask_T].numpy()


def test_a_skipped_sync_is_noticed_by_the_version_and_made_up_for(ranks: RankPool, make_config: MakeConfig) -> None:
    one = ("parallel.tensor=1", "parallel.expert=1")
    (gap,) = ranks.run(1, step_without_sync, make_config(*one))
    assert gap < 1e-9
    with pytest.raises(RankError, match="the server missed a weight sync"):
        ranks.run(1, step_without_sync, make_config(*one, 'rollout.on_server_loss="error"'))


def step_without_sync(config: RunConfig) -> float:
    """kl/engine_k3 of the outer step behind it."""
    run = _run(config)
    with mock.patch.object(run.sync, "push", return_value=""):
        outer_step(run, 0, first_step=0)
    reports, _ = outer_step(run, 1, first_step=2)
    return reports[0].metrics["kl/engine_k3"]


def test_a_server_that_has_lost_its_weights_is_filled_and_one_that_holds_them_is_left_alone(
    ranks: RankPool, make_config: MakeConfig
) -> None:
    config = make_config("parallel.tensor=1", "parallel.expert=1")
    ((lost, kept, gap),) = ranks.run(1, step_after_a_restart, config)
    [said] = lost
    assert said.startswith(f"weights of version 1 went to {config.rollout.servers[0]}; the sync reached each of")
    assert kept == []
    assert gap < 1e-9


def step_after_a_restart(config: RunConfig) -> tuple[list[str], list[str], float]:
    """What is noted when the server has forgotten its version, and when not; kl/engine_k3 afterwards."""
    run = _run(config)
    outer_step(run, 0, first_step=0)
    run.notes.clear()
    Servers(config.rollout.servers).set_version("0")
    run.fill(1)
    lost = [*run.notes]
    run.notes.clear()
    run.fill(1)
    kept = [*run.notes]
    reports, _ = outer_step(run, 1, first_step=2)
    return lost, kept, reports[0].metrics["kl/engine_k3"]


def test_a_sync_that_moves_the_version_and_not_the_weights_is_noticed_by_k3(
    ranks: RankPool, make_config: MakeConfig
) -> None:
    config = make_config("parallel.tensor=1", "parallel.expert=1", "optimizer.lr=3e-3")
    ((synced, stale),) = ranks.run(1, engine_gap_after_sync, config)
    assert synced < 1e-9
    assert stale > 1e-6


def engine_gap_after_sync(config: RunConfig) -> tuple[float, float]:
    """kl/engine_k3 after an honest sync, and after one that sent the weights of an outer step before."""
    run = _run(config)
    outer_step(run, 0, first_step=0)
    old = [(name, tensor.clone()) for name, tensor in run.policy.weights()]
    reports, _ = outer_step(run, 1, first_step=2)
    synced = reports[0].metrics["kl/engine_k3"]
    run.sync.push(iter(old), 2)
    reports, _ = outer_step(run, 2, first_step=4)
    return synced, reports[0].metrics["kl/engine_k3"]


def _run(config: RunConfig) -> Run:
    run = build_run(config, make_groups(config.parallel), load_inputs(config), config.rollout.servers)
    run.sync.push(run.policy.weights(), 0)
    return run


def test_the_noise_floor_is_rounding_at_equal_weights_and_sees_a_difference_that_is_none(
    ranks: RankPool, make_config: MakeConfig
) -> None:
    for floor, moved in ranks.run(2, noise_at_equal_and_at_moved_weights, make_config()):
        assert floor["noise/abs_log_ratio_p99"] < 1e-6
        assert moved["noise/abs_log_ratio_p50"] > 1e-5


def noise_at_equal_and_at_moved_weights(config: RunConfig) -> tuple[dict[str, float], dict[str, float]]:
    run = _run(config)
    survivors, dropped = collect_rollouts(run, dict(enumerate(run.prompts.prompts[: config.train.prompts_per_step])), 0)
    minibatches = place(score(run, survivors, dropped).samples, config, run.groups)
    first = pi_old_pass(run, minibatches, Routing("off"))[0]
    floor = measure_noise(run, first, 0)
    with torch.no_grad():
        for parameter in run.policy.chunks[0].parameters():
            parameter.mul_(1.01)
    return floor, measure_noise(run, first, 0)


def test_a_run_is_the_same_whichever_way_its_weights_travel(
    ranks: RankPool, make_config: MakeConfig, tmp_path: Path
) -> None:
    responses = []
    for method in METHODS:
        config = make_config(f'sync.method="{method}"', f'train.run_dir="{tmp_path}/{method}"')
        ranks.run(2, train, config)
        responses.append([record["response"] for record in responses_of(config)])
        assert max(line["kl/engine_k3"] for line in steps_of(config)) < 1e-9
    assert all(response == responses[0] for response in responses)


def test_a_reward_outside_its_range_stops_every_rank_with_the_response_named(
    ranks: RankPool, make_config: MakeConfig
) -> None:
    reward = f"{Path(__file__).with_name('rewards.py')}:share_of_odd_tokens_then_fails"
    with pytest.raises(RankError, match=rf"{RewardError.__name__}.*1\.5"):
        ranks.run(2, train, make_config(f'reward.function="{reward}"'))


def test_a_tensor_that_one_stage_misses_is_named_on_every_rank(
    ranks: RankPool, quickstart: Path, overrides: list[str], tmp_path: Path
) -> None:
    tensors = load_file(quickstart / "model" / "model.safetensors")
    del tensors["model.norm.weight"]  # read by the last stage alone
    shutil.copytree(quickstart / "model", tmp_path / "model")
    save_file(tensors, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    layout = ["parallel.tensor=1", "parallel.expert=1", "parallel.pipeline=2"]
    config = load(QUICKSTART / "gspo.toml", [*overrides, *layout, f'model.path="{tmp_path}/model"'])
    assert all("no tensor model.norm.weight" in message for message in ranks.run(2, error_of_loading, config))


def error_of_loading(config: RunConfig) -> str:
    try:
        Policy(config, make_groups(config.parallel))
    except WeightError as error:
        return str(error)
    return "no error"


def test_a_mistake_in_the_data_leaves_the_run_before_it_alone(
    ranks: RankPool, overrides: list[str], tmp_path: Path
) -> None:
    kept = tmp_path / "run" / "checkpoints" / "kept"
    kept.mkdir(parents=True)
    (tmp_path / "run" / "config.toml").write_text("")
    config = load(QUICKSTART / "gspo.toml", [*overrides, "train.overwrite=true", 'data.path="nowhere.jsonl"'])
    with pytest.raises(RankError, match=DataError.__name__):
        ranks.run(2, train, config)
    assert kept.exists()


def test_a_failure_on_one_leader_reaches_every_rank(ranks: RankPool, make_config: MakeConfig) -> None:
    config = make_config("parallel.tensor=1", "parallel.expert=1", "parallel.data=2")
    assert all(ranks.run(2, collect_with_one_leader_failing, config))


def collect_with_one_leader_failing(config: RunConfig) -> bool:
    run = _run(config)
    prompts = dict(enumerate(run.prompts.prompts[:4]))
    if run.groups.data_rank == 1:
        run.engine.rollout_groups = mock.AsyncMock(side_effect=EngineReplyError("half a JSON"))
    try:
        collect_rollouts(run, prompts, 0)
    except EngineReplyError as error:
        return "half a JSON" in str(error)
    return False
