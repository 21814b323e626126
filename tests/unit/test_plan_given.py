"""``plan RUN.toml``: the run is weighed as it stands, by the sums that a search uses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_gspo.cli import main
from megatron_gspo.commands import plan as command
from megatron_gspo.config import load
from megatron_gspo.dryrun.result import DryRun, Moment, Peak, Rank
from megatron_gspo.errors import ConfigError, LayoutError
from megatron_gspo.plan import rates
from megatron_gspo.plan.given import given, lacks, weighed
from megatron_gspo.plan.memory import limit_of
from megatron_gspo.plan.models import find_model
from megatron_gspo.plan.search import search
from megatron_gspo.plan.settings import Request, written
from megatron_gspo.plan.workload import Workload
from tests.unit.recipes import ROOT

GSPO = str(ROOT / "examples/qwen3_30b_a3b/gspo.toml")
SFT = str(ROOT / "examples/quickstart/sft.toml")
H100 = rates.GPUS["h100-80"]
WORK = Workload(8, 8, 256, 768, 64, 384, 4)


def test_a_plan_of_a_search_weighs_the_same_when_it_is_given(tmp_path: Path) -> None:
    """Written as a configuration and read back: layout, memory and time."""
    model = find_model("qwen3-0.6b")
    request = Request(2, 8, WORK)
    best = search(model, H100, request).plans[0]
    path = tmp_path / "plan.toml"
    path.write_text(written(model, request, best.choice))
    (again,) = weighed(model, H100, given(load(path), 2, 8)).plans
    assert again.choice == best.choice
    assert again.memory.trainer == best.memory.trainer
    assert again.memory.server.parts == pytest.approx(best.memory.server.parts, rel=0.01)  # shares have two digits
    assert again.step.mid == pytest.approx(best.step.mid, rel=0.01)


def test_a_base_and_an_instruct_model_have_the_sizes_of_their_name() -> None:
    for name in ("models/Qwen3-30B-A3B-Base", "moonshotai/Moonlight-16B-A3B-Instruct"):
        assert find_model(name).config == find_model(name.rpartition("-")[0]).config
    with pytest.raises(ConfigError, match=r"Qwen3-30B-A3B-Basis: no directory"):
        find_model("models/Qwen3-30B-A3B-Basis")


@pytest.mark.parametrize(
    ("settings", "colocated", "ranks", "servers"),
    [
        ([], True, 16, 4),
        (['placement.mode="auto"'], True, 16, 4),
        (['placement.mode="apart"', "rollout.local_servers=2"], False, 8, 2),
        (['placement.mode="auto"', 'rollout.servers=["http://a:1", "http://b:1"]'], False, 8, 2),
        (['rollout.servers=["http://a:1", "http://b:1"]'], True, 16, 2),
    ],
)
def test_servers_are_those_that_the_run_would_have(
    settings: list[str], colocated: bool, ranks: int, servers: int
) -> None:
    choice = given(load(GSPO, settings), 16, 8).choice
    assert (choice.colocated, choice.gpus, choice.servers.count) == (colocated, ranks, servers)
    assert choice.parallel.data_size(ranks) == ranks // 4


def test_what_is_no_run_on_these_cards_is_said(tmp_path: Path) -> None:
    with pytest.raises(LayoutError, match="= 4 ranks, but the world has 6"):
        given(load(GSPO, ["placement.tensor=2", "parallel.expert=1"]), 6, 8)
    with pytest.raises(ConfigError, match=r"2 GPUs are no whole servers of placement\.tensor = 4"):
        given(load(GSPO), 2, 8)
    with pytest.raises(ConfigError, match=r"7 GPUs, with 1 set aside for reward_server, are no whole servers of"):
        given(load(GSPO, ['reward_server.model="m"']), 8, 8)
    with pytest.raises(ConfigError, match="4 servers of 4 GPUs leave none of 16 for the trainer"):
        given(load(GSPO, ['placement.mode="apart"', "rollout.local_servers=4"]), 16, 8)
    with pytest.raises(ConfigError, match=r'algorithm\.name = "sft": a plan is of training with rollouts'):
        given(load(SFT), 16, 8)
    with pytest.raises(ConfigError, match=r"placement\.memory = 0\.8: .* planned with: at most 0\.7"):
        weighed(find_model("qwen3-30b-a3b"), H100, given(load(GSPO, ["placement.memory=0.8"]), 16, 8))


def test_servers_that_would_not_start_are_no_plan() -> None:
    """Of 768 columns of an expert a rank of four has 192, which are no whole blocks; 32 heads are not 3 x anything."""
    model = find_model("qwen3-30b-a3b")
    with pytest.raises(ConfigError, match=r'engine_dtype = "fp8" needs .* with 4 tensor rank\(s\), .*use a smaller'):
        weighed(model, H100, given(load(GSPO, ['rollout.engine_dtype="fp8"']), 16, 8))
    with pytest.raises(ConfigError, match=r"the size of a local server \(placement, rollout\.server_args\)"):
        weighed(model, H100, given(load(GSPO, ["placement.tensor=3", "parallel.expert=4"]), 12, 12))


def test_a_model_that_no_server_takes_in_eight_bits_is_named_and_not_said_to_be_too_large(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = find_model("qwen3-0.6b").config | {"intermediate_size": 3000}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["plan", str(tmp_path), "--gpus", "1", "--fp8-rollouts"]) == 2
    assert "--fp8-rollouts needs matrices of whole blocks of 128, and mlp.gate_proj" in capsys.readouterr().err


PPO = ('algorithm.name="ppo"', 'algorithm.credit="gae"', "algorithm.clip_low=0.2", "algorithm.clip_high=0.2")


def test_a_critic_is_counted_on_the_card_on_the_host_and_in_time() -> None:
    model, plans = find_model("qwen3-30b-a3b"), []
    for settings in ([], [*PPO], [*PPO, "critic.offload=true"], [*PPO, "critic.epochs=2"]):
        run = given(load(GSPO, ["optimizer.offload=true", *settings]), 64, 8)
        plans.append(weighed(model, H100, run).plans[0])
    none, here, away, _ = (plan.memory.trainer for plan in plans)
    assert "critic" in here.parts and "critic" not in {name for name, size in none.parts.items() if size}
    head = model.matrices.head // 4  # over four tensor ranks; the critic has none
    assert here.parts["critic"] == pytest.approx(6 * (none.elements.total - head), rel=1e-3)
    assert away.parts["critic"] == here.parts["critic"] and "critic states" not in away.parts
    assert away.offloaded - here.offloaded == here.parts["critic states"] > 0
    assert here.stays - none.stays == here.parts["critic"] // 3, "bfloat16 weights beside float32 gradients"
    once, twice = (plans[number].seconds for number in (1, 3))
    assert "critic" not in plans[0].seconds and once["critic"].mid > once["pi_old"].mid
    assert twice["critic"].mid - once["critic"].mid == pytest.approx(once["critic"].mid - once["pi_old"].mid)


def test_servers_of_eight_bits_hold_and_send_half_as_much() -> None:
    model = find_model("qwen3-30b-a3b")
    wide, narrow = (
        weighed(model, H100, given(load(GSPO, ["placement.tensor=2", *settings]), 16, 8)).plans[0]
        for settings in ([], ['rollout.engine_dtype="fp8"'])
    )
    weights = [plan.memory.server.parts["weights"] for plan in (wide, narrow)]
    assert weights[1] / weights[0] == pytest.approx(0.51, abs=0.01), "embedding and head stay as they are"
    assert narrow.memory.server.at_once > wide.memory.server.at_once
    assert narrow.seconds["sync"].mid / wide.seconds["sync"].mid == pytest.approx(0.51, abs=0.01)
    assert narrow.seconds["rollout"].mid < wide.seconds["rollout"].mid


def test_the_command_weighs_a_file_with_its_settings(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", GSPO, "optimizer.offload=true", "--gpus", "8"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("qwen3-30b-a3b, 30.5 B parameters") and "1. TP4 EP8 DP2; colocated" in said
    assert "optimizer states in host memory" in said and "2. " not in said
    assert main(["plan", GSPO, "--gpus", "8"]) == 2
    said = capsys.readouterr().out
    assert "Nothing fits: the nearest, TP4 EP8 DP2, needs 81.3 GiB of 71.6 GiB" in said
    assert "No single change" not in said, "none was tried"
    assert main(["plan", GSPO, "--gpus", "16", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["plans"][0]["layout"] == "TP4 EP8 DP4"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([GSPO, "--prompts", "8"], "--prompts: "),
        ([GSPO, "--write", "x.toml"], "--write: "),
        ([GSPO, "--gpus", "0"], "--gpus 0: at least 1"),
        ([GSPO, "train.prompt_per_step=8"], "did you mean"),
        (["qwen3-0.6b", "train.seed=1"], "train.seed=1 replaces a setting of a TOML file, and qwen3-0.6b is none"),
        (["no.toml"], "no.toml: "),
    ],
)
def test_what_a_file_says_is_not_asked_twice(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *words]) == 2
    assert said in capsys.readouterr().err


def dry(total: float) -> DryRun:
    moment = Moment("train", "layers")
    return DryRun(
        {"all ranks": Rank({moment: Peak({"weights": total}, moment)}, (), 1.0)}, {"all ranks": total}, 1, False
    )


def test_verify_fails_where_what_was_counted_does_not_fit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    room = limit_of(H100) - rates.CONTEXT - rates.ASLEEP
    choice = given(load(GSPO), 16, 8).choice
    assert (lacks(H100, choice, dry(room)), lacks(H100, choice, dry(room + 1))) == (0, 1)
    for total, status, verdict in ((room, 0, "fits into 71.6 GiB"), (room + 2**30, 2, "is 1 GiB more than 71.6 GiB")):
        monkeypatch.setattr(command, "_dry_run", lambda *_, total=total: dry(total))
        assert main(["plan", GSPO, "--gpus", "16", "--verify"]) == status
        assert f"3 GiB of context and 2 GiB of a sleeping server, {verdict} (90% of a card" in capsys.readouterr().out
