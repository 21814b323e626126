"""``doctor`` names the setting that is at fault, and a value that would do; and lays ranks out on nodes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

import numpy as np
import pytest

from megatron_gspo.cli import main
from megatron_gspo.config import load
from megatron_gspo.doctor import disk
from megatron_gspo.doctor.machine import Machine
from megatron_gspo.doctor.nodes import nodes_of
from megatron_gspo.errors import ConfigError
from tests.unit.doctor_cases import Case

GIB = 2**30
TAKEN = re.compile(r" = ([\d.]+) GiB of ")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def have(cores: int = 64, memory: int = 1000, gpus: int = 0) -> None:
        found = Machine(cores=cores, free_memory=memory * GIB, gpus=((80 * GIB, 80 * GIB),) * gpus)
        monkeypatch.setattr("megatron_gspo.doctor.facts.look_at_machine", lambda: found)

    return have


# ------------------------------------------------------------------------------------------ limits of lengths


@pytest.mark.parametrize(
    ("prompt", "response", "fix"),
    [
        (100, 16, "rollout.max_prompt_tokens = 13 (the longest prompt)"),
        (1024, 49, "rollout.max_prompt_tokens = 13 (the longest prompt)"),
        (13, 60, "rollout.max_response_tokens = 49"),
        (1024, 1024, "rollout.max_prompt_tokens = 13 (the longest prompt) and rollout.max_response_tokens = 49"),
    ],
)
def test_of_two_limits_that_exceed_the_positions_the_one_at_fault_is_named(
    case: Case, prompt: int, response: int, fix: str
) -> None:
    """The model has 64 positions, of which SGLang keeps two, and every prompt 13 tokens: a prompt limit above that
    gives nothing."""
    limits = [f"rollout.max_prompt_tokens={prompt}", f"rollout.max_response_tokens={response}"]
    check = case.check("settings", *limits)
    assert (check.status, check.fix) == ("error", fix)
    assert case.check("settings", *(word.replace(" = ", "=").split(" (")[0] for word in fix.split(" and ")), *(
        limit for limit in limits if limit.partition("=")[0] not in fix
    )).status == "ok", "what it says to set does"  # fmt: skip


@pytest.mark.parametrize(("response", "status"), [(49, "ok"), (50, "warning"), (51, "warning"), (52, "error")])
def test_the_last_positions_are_the_engines(case: Case, response: int, status: str) -> None:
    check = case.check("settings", f"rollout.max_response_tokens={response}")
    assert check.status == status
    if status != "ok":
        assert check.fix == "rollout.max_response_tokens = 49"
    supervised = case.check(
        "settings", f"rollout.max_response_tokens={response}", 'algorithm.name="sft"', 'data.eval_path=""'
    )
    assert (supervised.status == "error") == (status == "error"), "fine-tuning has no engine"


def test_prompts_that_leave_no_room_at_all_are_the_cause_themselves(case: Case) -> None:
    case.change_config(max_position_embeddings=13)
    check = case.check("settings")
    assert check.status == "error" and check.fix.startswith("data.path: its longest prompt has 13 tokens")


@pytest.mark.parametrize("skip", ["true", "false"])
def test_a_prompt_limit_below_every_prompt_is_an_error_that_skipping_does_not_mend(case: Case, skip: str) -> None:
    for name in ("prompts", "eval prompts"):
        check = case.check(name, "rollout.max_prompt_tokens=12", f"data.skip_bad={skip}")
        assert (check.status, check.fix) == ("error", "rollout.max_prompt_tokens = 13")


def test_too_few_prompts_left_after_skipping_are_an_error(case: Case) -> None:
    rows = [{"prompt": "1" * length, "answer": "1"} for length in [5] * 20 + [9] * 580]
    (case.root / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    check = case.check("prompts", "rollout.max_prompt_tokens=8", "data.skip_bad=true")
    assert (check.status, check.fix) == ("error", "rollout.max_prompt_tokens = 9")
    assert "580 are skipped, and the 20 that are left are fewer than train.prompts_per_step = 32" in check.detail
    fewer = case.check("prompts", "rollout.max_prompt_tokens=8", "data.skip_bad=true", "train.prompts_per_step=20")
    assert fewer.status == "warning"


@pytest.mark.parametrize("limit", [1, 8, 12])
def test_a_response_limit_below_the_reference_answers_is_named(case: Case, limit: int) -> None:
    """They have 12 tokens, and one more ends them."""
    check = case.check("prompts", f"rollout.max_response_tokens={limit}")
    assert (check.status, check.fix) == ("warning", "rollout.max_response_tokens = 13 or more")
    assert f"rollout.max_response_tokens = {limit}: 256 of 256 reference answers" in check.detail
    assert case.check("prompts", "rollout.max_response_tokens=13").status == "ok"


def test_a_response_of_one_token_is_said_to_be_none_where_no_reference_says_it(case: Case) -> None:
    rows = [{"prompt": f"{number:012d}="} for number in range(600)]
    (case.root / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    check = case.check("prompts", "rollout.max_response_tokens=1")
    assert check.status == "warning" and "a response is one token" in check.detail
    assert check.fix.startswith("rollout.max_response_tokens: ")


# ---------------------------------------------------------------------------------------- numbers that do not fit


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["rollout.group_size=1"], "one alone has advantage 0"),
        (["rollout.temperature=0"], "at 0 all responses of a group are the same"),
        (["train.prompts_per_step=30"], "28 or 32 prompts would do, or train.minibatches = 3"),
        (["train.prompts_per_step=3"], "; 4 prompts would do, or train.minibatches = 3"),
        (
            ["optimizer.warmup_steps=8", "train.outer_steps=2"],
            "8 optimizer steps (train.outer_steps x train.minibatches)",
        ),
    ],
)
def test_a_refused_setting_says_why_and_what_would_do(case: Case, overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load(case.config, overrides)
    assert said in str(refused.value) and overrides[0].partition("=")[0] in str(refused.value)


@pytest.mark.parametrize(
    ("overrides", "ranks", "fix"),
    [
        (["parallel.tensor=3"], None, "parallel.tensor = 1 or 2"),
        (["parallel.expert=3"], None, "parallel.expert = 1 or 2 or 4"),
        (["parallel.expert_tensor=3"], None, "parallel.expert_tensor = 1 or 2 or 4"),
        (["parallel.tensor=2"], 3, "--ranks: a multiple of 2 (tensor x pipeline x context), or one of these"),
        (["parallel.tensor=2", "parallel.data=2"], 6, "--ranks 4, or parallel.data"),
        (["parallel.pipeline=8"], None, "parallel.pipeline"),
        (["parallel.stage_layers=[1]"], None, "parallel.stage_layers"),
    ],
)
def test_a_layout_that_does_not_hold_says_what_of_it_and_what_would_do(
    case: Case, overrides: list[str], ranks: int | None, fix: str
) -> None:
    check = case.check("layout", *overrides, ranks=ranks)
    assert (check.status, check.fix) == ("error", fix)


def test_a_limit_on_prompts_is_the_cause_of_too_few(case: Case) -> None:
    check = case.check("prompts", "data.limit=20")
    assert check.fix == "data.limit = 32 or more (the file has 600 rows), or train.prompts_per_step <= 20"
    check = case.check("prompts", "train.prompts_per_step=700")
    assert check.fix == "train.prompts_per_step <= 600, or more prompts in data.path"


def test_few_held_out_prompts_are_the_settings_doing_or_the_files(case: Case) -> None:
    assert case.check("eval prompts", "eval.prompts=64").fix == "eval.prompts = 512"
    path = case.root / "eval.jsonl"
    path.write_text("".join(line + "\n" for line in path.read_text().splitlines()[:100]))
    assert case.check("eval prompts").fix == "a data.eval_path of 512 prompts"
    assert (
        case.check("eval prompts", "eval.prompts=64").fix == "eval.prompts = 512, and a data.eval_path of 512 prompts"
    )


@pytest.mark.parametrize("name", ["prompt_field", "answer_field"])
def test_a_field_that_is_not_there_is_the_setting_that_names_it(case: Case, name: str) -> None:
    for entry in ("prompts", "eval prompts"):
        check = case.check(entry, f"data.{name}=other")
        assert (check.status, check.fix) == ("error", f"data.{name}")
        assert "line 1: the field 'other' is missing" in check.detail


def test_references_of_which_not_one_is_usable_are_another_field_or_another_rewards(case: Case) -> None:
    rows = [{"prompt": f"{number:012d}=", "answer": "no number"} for number in range(600)]
    (case.root / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for skip in ("true", "false"):
        check = case.check("reward", 'reward.function="arithmetic"', f"data.skip_bad={skip}")
        assert check.status == "error" and "not one is usable" in check.detail
        assert check.fix.startswith("data.answer_field") and "reward.function (now 'arithmetic')" in check.fix


# ------------------------------------------------------------------------------------- what takes memory and disk


def test_memory_that_servers_take_is_theirs(case: Case, machine) -> None:
    machine(memory=100)
    check = case.check("memory", "rollout.local_servers=64")
    assert check.status == "error" and check.fix.startswith("local servers are most of it: fewer rollout.local_servers")
    machine(memory=8)
    check = case.check("memory", "rollout.local_servers=1", "parallel.data=64")
    assert check.status == "error" and check.fix.startswith("ranks' processes are most of it: fewer ranks")


def test_a_disk_that_fills_with_exports_is_not_the_checkpoints_fault(case: Case, monkeypatch) -> None:
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 60 * 2**20}))
    many = case.check("disk", "train.save_hf_every=1", "train.outer_steps=1000")
    assert many.status == "error" and many.fix.startswith("a larger train.save_hf_every")
    kept = case.check("disk", "train.keep_every=10", "train.outer_steps=1000")
    assert kept.status == "error" and kept.fix.startswith("a larger train.keep_every")
    last = case.check("disk", "train.keep_last=50", "train.outer_steps=1000")
    assert last.status == "error" and last.fix.startswith("a smaller train.keep_last")


# ------------------------------------------------------------------------------------------------------- nodes


def on_nodes(case: Case, *overrides: str, ranks: int, per_node: int | None) -> dict[str, list[tuple[str, str, str]]]:
    from megatron_gspo.doctor.catalog import CHECKS
    from megatron_gspo.doctor.check import examine
    from megatron_gspo.doctor.facts import Facts

    facts = Facts(case.config, [*case.overrides, *overrides], ranks, per_node)
    found: dict[str, list[tuple[str, str, str]]] = {}
    for check in examine(facts, CHECKS):
        found.setdefault(check.name, []).append((check.status, check.detail, check.fix))
    return found


@pytest.mark.parametrize(
    ("block", "ranks", "per_node"), [(4, 32, 8), (16, 32, 8), (3, 24, 8), (6, 36, 8), (1, 5, 2), (8, 24, 3)]
)
def test_the_nodes_that_a_group_reaches_are_counted_as_its_ranks_lie(block: int, ranks: int, per_node: int) -> None:
    groups = np.arange(ranks).reshape(-1, block)
    assert nodes_of(block, ranks, per_node) == max(len(set((group // per_node).tolist())) for group in groups)


def test_a_tensor_parallel_group_over_two_nodes_is_warned_of_and_one_within_is_not(case: Case, machine) -> None:
    machine()
    case.change_config(num_attention_heads=16, num_key_value_heads=16)
    tensors = {size: on_nodes(case, f"parallel.tensor={size}", ranks=32, per_node=8)["layout"] for size in (8, 16)}
    assert [status for status, _, _ in tensors[8]] == ["ok", "ok"]
    assert tensors[8][1][1] == "32 ranks on 4 nodes of 8: over the network go gradients"
    assert tensors[16][2] == (
        "warning",
        "parallel.tensor = 16 reaches over 2 nodes of 8 ranks: the sums in every layer cross the network",
        "parallel.tensor: 1, 2, 4 or 8",
    )
    one = on_nodes(case, "parallel.tensor=16", ranks=32, per_node=32)["layout"]
    assert [status for status, _, _ in one] == ["ok"], "one node has no network between its ranks"


def test_what_else_crosses_the_network_is_said(case: Case, machine) -> None:
    machine()
    settings = ("parallel.tensor=2", "parallel.context=8", "parallel.expert=16")
    _, (status, detail, _) = on_nodes(case, *settings, ranks=32, per_node=8)["layout"]
    assert status == "ok" and detail == (
        "32 ranks on 4 nodes of 8: over the network go gradients, keys and values of attention (context 8), tokens on "
        "their way to experts (expert 16)"
    )


def test_each_node_has_its_own_ranks_to_hold_and_no_servers_of_another(case: Case, machine) -> None:
    machine(memory=1000)
    spread, alone = on_nodes(case, ranks=32, per_node=8), on_nodes(case, ranks=8, per_node=8)
    assert "; on each node 8 ranks x " in spread["memory"][0][1] and "; 8 ranks x " in alone["memory"][0][1]
    total, of_one = (float(TAKEN.search(found["memory"][0][1])[1]) for found in (spread, alone))
    assert 0.9 * of_one < total <= of_one, "what another node holds is not held here"
    assert [fix for status, _, fix in spread["settings"] if status == "error"] == [
        "start servers with `megatron-gspo serve`, and name them in rollout.servers_from"
    ]
    assert alone["settings"][0][0] == "ok"
    assert "it must be one directory for all of them" in spread["run directory"][0][1]
    assert "8 ranks, 4 servers on each of 4 machines like this one" in spread["devices"][0][1]


def test_nodes_of_gpus_are_as_large_as_this_one_unless_said(case: Case, machine) -> None:
    machine(gpus=4)
    found = on_nodes(case, ranks=32, per_node=None)
    assert "on 8 nodes of 4" in found["layout"][1][1]
    status, detail, fix = on_nodes(case, ranks=32, per_node=8)["devices"][0]
    assert (status, fix) == ("error", "--ranks-per-node 4") and "8 ranks, 4 GPUs" in detail


def test_nodes_that_are_not_full_are_warned_of(case: Case, machine) -> None:
    machine()
    _, (status, detail, fix) = on_nodes(case, ranks=30, per_node=8)["devices"]
    assert (status, fix) == ("warning", "--ranks 24 or 32, or another --ranks-per-node")
    assert detail == "30 ranks on nodes of 8: the last one has 6 ranks"


def test_the_command_takes_ranks_per_node(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    servers = 'rollout.servers=["http://127.0.0.1:1"]'
    assert main(["doctor", str(case.config), "--ranks", "32", "--ranks-per-node", "8", servers]) == 2
    assert "32 ranks on 4 nodes of 8: over the network go gradients" in capsys.readouterr().out
    assert main(["doctor", str(case.config), "--ranks-per-node", "0"]) == 2
    assert capsys.readouterr().err == "error: --ranks-per-node = 0: the number of ranks is at least 1\n"


def test_tests_of_a_program_are_not_measured_as_a_response(case: Case) -> None:
    tests = json.dumps({"inputs": ["1"] * 9, "outputs": ["2"] * 9})  # no text for a tokenizer of digits
    rows = [{"prompt": f"{number:012d}=", "answer": tests} for number in range(600)]
    (case.root / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert case.check("prompts", 'reward.function="code"').status == "ok"
    assert case.check("reward", 'reward.function="code"').status == "ok"
    parts = '[{function="code",weight=1.0},{function="repetition",weight=-0.1}]'
    assert case.check("prompts", 'reward.function="weighted"', f"reward.options={{parts={parts}}}").status == "ok"
    assert case.check("prompts", 'reward.function="exact"').status == "error"
