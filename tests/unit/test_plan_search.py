"""``plan``: what it proposes is legal, fits, and is a configuration."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_gspo.cli import main
from megatron_gspo.config import ParallelConfig, RunConfig, load, parse
from megatron_gspo.config.servers import server_sizes
from megatron_gspo.doctor.catalog import CHECKS
from megatron_gspo.doctor.check import examine
from megatron_gspo.doctor.estimate import estimate
from megatron_gspo.doctor.facts import Facts
from megatron_gspo.doctor.machine import Machine
from megatron_gspo.hf.layout import check_layout, check_recompute
from megatron_gspo.plan.advice import to_fit, with_fewer
from megatron_gspo.plan.candidates import balanced, splits
from megatron_gspo.plan.memory import FEW, PLANNED, limit_of, server_memory, trainer_memory
from megatron_gspo.plan.models import Model, _model, find_model
from megatron_gspo.plan.rates import GPUS, HOST_NODE
from megatron_gspo.plan.search import Outcome, search
from megatron_gspo.plan.serving import Servers
from megatron_gspo.plan.settings import Choice, Request, config_of, tree_of, written
from megatron_gspo.plan.show import record, text_of
from megatron_gspo.plan.workload import Workload
from megatron_gspo.rollout.sglang.cards import check_divides

H100 = GPUS["h100-80"]
GIB = 2**30
WORK = Workload(64, 16, 1024, 7168, 256, 3584, 4)
EIGHT = Request(8, 8, WORK)


@pytest.fixture(scope="module")
def moe() -> Model:
    return find_model("qwen3-30b-a3b")


@pytest.fixture(scope="module")
def on_eight(moe: Model) -> Outcome:
    return search(moe, H100, EIGHT)


def assert_sound(model: Model, gpus: int, request: Request, outcome: Outcome) -> None:
    """Each plan is one that the configuration, the model, the servers and the cards take."""
    for plan in outcome.plans:
        choice, memory = plan.choice, plan.memory
        config = config_of(model, request, choice)
        check_layout(config.parallel, model.shape)
        check_recompute(config.model, config.parallel, model.shape)
        check_divides(server_sizes(["--tp-size", str(choice.servers.tensor)]), model.config)
        assert config.parallel.data_size(choice.gpus) * choice.parallel.tensor * choice.parallel.pipeline > 0
        assert choice.servers.gpus + (0 if choice.colocated else choice.gpus) == gpus
        assert choice.gpus == gpus or not choice.colocated
        assert memory.trainer.total <= memory.limit and memory.server.total <= request_card(request)
        assert memory.server.at_once >= FEW and memory.host <= HOST_NODE
        assert 0 < plan.step.low < plan.step.mid < plan.step.high


def request_card(request: Request) -> int:
    return H100.memory


def test_qwen3_30b_on_eight_cards_trains_beside_its_servers_with_states_in_host_memory(on_eight: Outcome, moe: Model):
    """57 GiB of weights and 71.5 GiB of states on 80: colocated, and the optimizer's 42.7 GiB a rank on the host."""
    assert_sound(moe, 8, EIGHT, on_eight)
    best = on_eight.plans[0]
    assert best.choice.colocated and best.choice.offload and not best.choice.lora
    assert best.choice.parallel.expert == 8
    assert best.memory.trainer.offloaded == pytest.approx(42.7 * GIB, rel=0.02)
    assert [plan.step.mid for plan in on_eight.plans] == sorted(plan.step.mid for plan in on_eight.plans)
    assert on_eight.layouts == len(on_eight.plans) + on_eight.slower + sum(on_eight.lacking.values())


def test_memory_of_a_trainer_is_the_doctors_estimate(moe: Model):
    """At EP8 on eight ranks: 9.6 + 19.2 + 42.7 GiB (docs/gpu.md), by the sum that ``doctor`` does for a GPU."""
    choice = Choice(ParallelConfig(expert=8, data=8), 8, Servers(1, 8), True, 8192, "full")
    parts = trainer_memory(moe, EIGHT, choice).parts
    needed = estimate(config_of(moe, EIGHT, choice), moe.shape, moe.every, data_size=8, stage=0, machine=PLANNED)
    assert {name: parts[name] for name in ("weights", "gradients", "optimizer", "activations", "logprobs")} == {
        name: getattr(needed, name) for name in ("weights", "gradients", "optimizer", "activations", "logprobs")
    }
    assert [round(parts[name] / GIB, 1) for name in ("weights", "gradients", "optimizer")] == [9.6, 19.2, 42.7]


def test_adapters_have_gradients_and_states_and_the_base_has_none(moe: Model):
    """Rank 16 at EP8: 16 (rows + columns) of each matrix; the experts' are shared out, attention's are not."""
    choice = Choice(ParallelConfig(expert=8, data=8), 8, Servers(1, 8), True, 8192, "full", lora=16)
    held = trainer_memory(moe, replace(EIGHT, lora=16), choice)
    attention = (2048 + 4096) * 2 + (2048 + 512) * 2
    experts = 16 * 3 * (2048 + 768)
    assert held.elements.dense == 48 * 16 * attention and held.elements.expert == 48 * 16 * experts
    assert held.parts["gradients"] == 4 * held.elements.total
    assert held.states == 12 * (held.elements.dense // 8 + held.elements.expert)
    full = trainer_memory(moe, EIGHT, replace(choice, lora=0))
    assert held.parts["weights"] == full.parts["weights"] + 2 * held.elements.total
    assert held.total < full.total / 2


def test_a_server_beside_a_trainer_has_what_the_trainers_weights_leave(moe: Model):
    choice = Choice(ParallelConfig(expert=8, data=8), 8, Servers(2, 4), True, 8192, "full")
    trainer = trainer_memory(moe, EIGHT, choice)
    beside, alone = (server_memory(moe, H100, EIGHT, Servers(2, 4), held) for held in (trainer, None))
    assert beside.parts["trainer's weights"] == trainer.parts["weights"] and "trainer's weights" not in alone.parts
    assert beside.parts["weights"] == alone.parts["weights"] == moe.parameters * 2 // 4
    assert beside.parts["cache"] < alone.parts["cache"] and beside.share < alone.share == 0.8
    assert trainer.moved == trainer.parts["gradients"] + trainer.parts["optimizer"]


def test_apart_is_proposed_where_it_is_asked_for():
    model, request = find_model("qwen3-1.7b"), Request(8, 8, WORK, placement="apart")
    outcome = search(model, H100, request)
    assert outcome.plans and not any(plan.choice.colocated for plan in outcome.plans)
    assert_sound(model, 8, request, outcome)
    assert {gpus + served for gpus, served, _ in splits(Request(32, 8, WORK, placement="apart"))} == {32}
    both = search(model, H100, Request(8, 8, WORK))
    assert {plan.choice.colocated for plan in both.best(3)} == {True, False}


def test_a_pipelines_last_stage_has_fewer_layers_for_the_head(moe: Model):
    assert balanced(moe, 8) == (7, 7, 7, 7, 7, 6, 6, 1) and sum(balanced(moe, 8) or ()) == 48
    assert balanced(moe, 1) is None
    assert all(sum(found) == 48 for stages in (2, 4, 16, 32) if (found := balanced(moe, stages)))


CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "head_dim": 64,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "norm_topk_prob": True,
    "tie_word_embeddings": False,
}


@st.composite
def models(draw: st.DrawFn) -> Model:
    groups = draw(st.sampled_from([1, 2, 3, 4, 8]))
    experts = draw(st.sampled_from([6, 8, 20, 64]))
    config = CONFIG | {
        "hidden_size": draw(st.sampled_from([512, 1000, 2048])),
        "intermediate_size": draw(st.sampled_from([768, 1001, 4096])),
        "moe_intermediate_size": draw(st.sampled_from([192, 250, 768])),
        "num_hidden_layers": draw(st.integers(1, 13)),
        "num_key_value_heads": groups,
        "num_attention_heads": groups * draw(st.sampled_from([1, 2, 5])),
        "num_experts": experts,
        "num_experts_per_tok": draw(st.integers(1, 6)),
        "vocab_size": draw(st.sampled_from([1000, 32_001])),
        "mlp_only_layers": draw(st.sampled_from([[], [0]])),
    }
    return _model("drawn", "drawn", config)


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(models(), st.sampled_from([1, 2, 4, 6, 8, 16]), st.booleans(), st.sampled_from([0, 8]))
def test_every_proposal_for_any_model_is_legal_and_fits(model: Model, gpus: int, long: bool, lora: int):
    work = Workload(8, 4, 100, 20_000 if long else 900, 50, 400, 2)
    request = Request(gpus, 8, work, lora=lora)
    outcome = search(model, H100, request)
    assert outcome.plans
    assert_sound(model, gpus, request, outcome)


def test_more_memory_never_makes_the_best_plan_slower():
    model = find_model("qwen3-8b")
    times = []
    for gib in (70, 140):
        outcome = search(model, replace(H100, memory_gib=gib), EIGHT)
        times.append(outcome.plans[0].step.mid)
    assert times == sorted(times, reverse=True)


# ------------------------------------------------------------------------------------------ configurations


def test_where_servers_lie_and_adapters_are_written(moe: Model, on_eight: Outcome):
    choice = replace(on_eight.plans[0].choice, lora=16)
    tree = tree_of(moe, EIGHT, choice)
    assert tree["placement"] == {"mode": "colocated", "tensor": choice.servers.tensor, "memory": choice.share}
    assert tree["lora"] == {"rank": 16} and tree["rollout"]["local_servers"] == choice.servers.count
    RunConfig.model_validate(tree)


def test_a_written_plan_is_a_configuration_that_loads_to_what_was_chosen(moe: Model, on_eight: Outcome, tmp_path: Path):
    for plan in on_eight.best(3):
        path = tmp_path / "plan.toml"
        path.write_text(written(moe, EIGHT, plan.choice))
        config = load(path)
        assert config == config_of(moe, EIGHT, plan.choice)
        assert config.optimizer.offload == plan.choice.offload
        assert config.parallel.data_size(plan.choice.gpus) == plan.choice.parallel.data
        assert (config.train.prompts_per_step, config.rollout.group_size) == (64, 16)
        assert config.model.recompute == plan.choice.recompute


def test_doctor_accepts_a_written_plan_but_for_its_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """On a machine of the planned kind and its kernels: layout, placement, memory and settings."""
    model, request = find_model("qwen3-1.7b"), Request(8, 8, WORK, placement="apart")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(dict(model.config)))
    model = replace(model, path=str(tmp_path / "model"))
    plan = search(model, H100, request).plans[0]
    path = tmp_path / "plan.toml"
    path.write_text(written(model, request, plan.choice))
    machine = Machine(64, 2000 * GIB, ((H100.memory, H100.memory),) * 8, "13.0")
    monkeypatch.setattr("megatron_gspo.doctor.facts.look_at_machine", lambda: machine)
    monkeypatch.setattr("megatron_gspo.kernels.choice.Machine.here", lambda: PLANNED)
    facts = Facts(path, [], plan.choice.gpus)
    checks = examine(facts, [entry for entry in CHECKS if entry.name in ("layout", "placement", "memory", "settings")])
    assert [check.detail for check in checks if check.status == "error"] == []
    assert len(checks) > 3


# -------------------------------------------------------------------------------------------------- advice


def test_what_does_not_fit_says_the_nearest_and_what_would_mend_it(moe: Model):
    request = Request(2, 8, WORK)
    outcome = search(moe, H100, request)
    assert outcome.plans == [] and outcome.nearest is not None
    assert outcome.nearest.memory.needed > limit_of(H100)
    changes = to_fit(moe, H100, request)
    assert "--lora 32" in [change.options for change in changes]
    text = text_of(moe, H100, request, outcome, changes, 3)
    assert "Nothing fits: the nearest, " in text and "GiB of 71.6 GiB" in text and "--lora 32" in text


def test_fewer_cards_are_proposed_with_what_they_take(moe: Model):
    fewer = {change.options: change.plan.choice for change in with_fewer(moe, H100, EIGHT)}
    assert "--gpus 4" in fewer and fewer["--gpus 2 --lora 32"].lora == 32
    assert all(choice.gpus < 8 for choice in fewer.values())


def test_a_record_holds_bytes_seconds_and_a_configuration(moe: Model, on_eight: Outcome):
    found: dict[str, Any] = json.loads(json.dumps(record(moe, H100, EIGHT, on_eight, [], 2)))
    plan = found["plans"][0]
    assert len(found["plans"]) == 2 and found["measured"] is False
    assert sum(plan["shares"].values()) == pytest.approx(1, abs=1e-3)
    assert sum(part["mid"] for part in plan["parts"].values()) == pytest.approx(plan["seconds"]["mid"], abs=0.1)
    import tomllib

    assert parse(tomllib.loads(plan["config"])).optimizer.offload


def test_the_command_writes_and_prints(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    path = tmp_path / "plan.toml"
    words = ["plan", "qwen3-0.6b", "--gpus", "2", "--top", "1", "--response-tokens", "1024", "--write", str(path)]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert out.startswith("qwen3-0.6b, 0.6 B parameters") and "1. " in out and "Sums, not measurements" in out
    assert load(path).parallel.data_size(2) in (1, 2)
    assert main([*words[:-2], "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["layouts"]["fit"] > 0
    assert main(["plan", "--published"]) == 0
    assert "decoding: off by a factor of" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["qwen3-0.6b", "--gpu", "h100"], "--gpu h100: known are a100-80"),
        (["qwen3-0.6b", "--gpus", "0"], "--gpus 0: at least 1"),
        (["qwen3-0.6b", "--gpus", "12"], "--gpus 12 are no whole nodes of --gpus-per-node 8"),
        (["qwen3-0.6b", "--prompts", "6"], "--prompts 6 is not a multiple of --minibatches 4"),
        (
            ["qwen3-0.6b", "--mean-response", "9000"],
            "9000: above 0, and at most --response-tokens 7168",
        ),
        (["qwen3-0.6", "--gpus", "2"], "did you mean qwen3-0.6b?"),
    ],
)
def test_what_cannot_be_asked_is_one_line(words: list[str], said: str, capsys: pytest.CaptureFixture[str]):
    assert main(["plan", *words]) == 2
    assert said in capsys.readouterr().err
