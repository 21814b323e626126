"""What a user gets wrong ends at once: exit status 2 and one line that says what to mend, and no rank is started.

What a run meets on its way is in test_faults.py, malformed input by the thousand in tests/fuzz. ``HELD_BY`` says which
test holds each kind: ``pytest --collect-only -k test_bad_input_is_held`` is the list.
"""

from __future__ import annotations

import ast
import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_gspo.config import load
from megatron_gspo.train.models import check_models

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart"
Refusal = Callable[..., str]


@pytest.fixture
def refusal(quickstart: Path, tmp_path: Path) -> Refusal:
    """Runs ``megatron-gspo train`` on the quickstart with further settings; returns its one line."""

    def run(*overrides: str, config: Path = QUICKSTART / "gspo.toml") -> str:
        settings = [
            f'model.path="{quickstart}/model"',
            f'data.path="{quickstart}/train.jsonl"',
            f'data.eval_path="{quickstart}/eval.jsonl"',
            f'train.run_dir="{tmp_path}/run"',
            'rollout.servers=["http://127.0.0.1:1"]',
            *overrides,
        ]
        command = [sys.executable, "-m", "megatron_gspo.cli", "train", str(config), *settings]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=QUICKSTART.parents[1])
        assert done.returncode == 2, done.stderr
        assert not done.stdout
        assert not (tmp_path / "run").exists(), "it has begun to write"
        (line,) = done.stderr.splitlines()
        assert line.startswith("error: ")
        return line

    return run


@pytest.fixture
def broken_model(quickstart: Path, tmp_path: Path) -> Path:
    """A copy of the model, to be broken."""
    return Path(shutil.copytree(quickstart / "model", tmp_path / "model"))


def test_a_directory_is_no_configuration(refusal: Refusal) -> None:
    assert refusal(config=QUICKSTART) == f"error: {QUICKSTART}: [Errno 21] Is a directory: '{QUICKSTART}'"


def test_a_mistyped_setting_is_named_with_what_was_meant(refusal: Refusal) -> None:
    assert "unknown setting train.sed (did you mean train.seed?)" in refusal("train.sed=1")


def test_a_file_is_no_model(refusal: Refusal, quickstart: Path) -> None:
    assert f"{quickstart}/train.jsonl" in refusal(f'model.path="{quickstart}/train.jsonl"')


def test_safetensors_that_were_cut_off_are_named(refusal: Refusal, broken_model: Path) -> None:
    weights = broken_model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    line = refusal(f'model.path="{broken_model}"')
    assert line.startswith(f"error: {weights}: ") and "not fully covered" in line


def test_another_architecture_is_refused_with_those_that_are_known(refusal: Refusal, broken_model: Path) -> None:
    config = broken_model / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"architectures": ["Gemma3ForCausalLM"]}))
    assert "Gemma3ForCausalLM is not supported (known: Qwen3ForCausalLM, " in refusal(f'model.path="{broken_model}"')


def test_dense_layers_that_the_engine_would_take_for_others_are_refused(refusal: Refusal, broken_model: Path) -> None:
    config = broken_model / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"mlp_only_layers": [0, 2]}))
    line = refusal(f'model.path="{broken_model}"')
    assert "has dense layers (0, 2; mlp_only_layers and decoder_sparse_step in config.json), and sglang makes" in line
    tuned = load(QUICKSTART / "sft.toml", [f'model.path="{broken_model}"'])
    check_models(tuned)  # supervised fine-tuning has no engine


@pytest.mark.parametrize("setting", ["data.path", "data.eval_path"])
def test_a_prompt_file_that_does_not_exist_is_named(refusal: Refusal, tmp_path: Path, setting: str) -> None:
    assert refusal(f'{setting}="{tmp_path}/none.jsonl"') == f"error: {tmp_path}/none.jsonl: no such data file"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("def f(:", "SyntaxError: invalid syntax (reward.py, line 1)"),
        ("raise RuntimeError('out of\\npaper')", "RuntimeError: out of paper"),
        ("import sys; sys.exit(0)", "SystemExit: 0"),
        ("def f(prompt): return 1.0", "cannot be called with (prompt, response) and the options none"),
    ],
)
def test_a_reward_that_cannot_be_had_says_why(refusal: Refusal, tmp_path: Path, source: str, said: str) -> None:
    reward = tmp_path / "reward.py"
    reward.write_text(source)
    line = refusal(f'reward.function="{reward}:f"')
    assert line.startswith(f"error: reward.function = '{reward}:f'") and said in line


def test_a_layout_shows_the_division_that_fails(refusal: Refusal) -> None:
    assert refusal("parallel.tensor=3", "parallel.expert=1") == (
        "error: 4 attention heads / parallel.tensor 3 = 1.33333: it must divide"
    )


@pytest.mark.parametrize(
    "variables", [{"RANK": "0"}, {"RANK": "x", "WORLD_SIZE": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}]
)
def test_a_rank_that_is_not_torchruns_is_refused(variables: dict[str, str]) -> None:
    for arguments in (["train", str(QUICKSTART / "gspo.toml")], ["parity", "--layouts", "TP2"]):
        command = [sys.executable, "-m", "megatron_gspo.cli", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=250, env=os.environ | variables)
        assert done.returncode == 2
        (line,) = done.stderr.splitlines()
        assert "are not torchrun's: unset RANK" in line


FAULTS, REPLIES, CLIENT = "training/test_faults.py", "rollout/test_replies.py", "rollout/test_client_faults.py"
PROMPTS, CONFIG, HERE = "unit/test_data_prompts.py", "unit/test_config.py", "training/test_bad_input.py"
MODELS, SCORING = "fuzz/test_model_directories.py", "unit/test_rewards_scoring.py"
HELD_BY: dict[str, list[tuple[str, str]]] = {
    "an unknown setting": [
        (HERE, "test_a_mistyped_setting_is_named_with_what_was_meant"),
        ("fuzz/test_configurations.py", "test_a_mutated_tree_of_settings_is_what_was_written_or_one_line"),
    ],
    "a setting out of range": [
        (CONFIG, "test_a_wrong_setting_is_one_line_with_its_value"),
        ("fuzz/test_configurations.py", "test_any_value_of_any_setting_is_taken_as_it_is_or_refused"),
    ],
    "a layout that cannot be": [
        (HERE, "test_a_layout_shows_the_division_that_fails"),
        (CONFIG, "test_a_layout_that_does_not_fill_the_world_shows_the_product"),
    ],
    "a malformed prompt line": [
        (PROMPTS, "test_a_bad_row_is_named_or_skipped_and_counted"),
        ("fuzz/test_prompt_lines.py", "test_mutated_objects_are_the_prompts_that_they_say_or_are_named"),
        ("fuzz/test_prompt_lines.py", "test_mutated_bytes_are_the_prompts_that_they_say_or_are_named"),
    ],
    "a prompt far down a long file that is malformed": [
        ("unit/test_data_long.py", "test_a_bad_row_far_down_is_found_when_it_is_drawn"),
        ("distributed/test_draw.py", "test_the_next_of_the_order_stands_in_for_a_bad_one"),
    ],
    "a data file of another kind, broken or unknown": [
        ("unit/test_data_formats.py", "test_a_file_that_cannot_be_read_says_why"),
        ("unit/test_data_formats.py", "test_a_shard_that_is_missing_and_a_directory_without_data_are_refused"),
    ],
    "a reference answer that the reward cannot use": [
        ("unit/test_doctor.py", "test_a_reference_that_the_reward_cannot_use_is_named_by_its_line"),
        (FAULTS, "test_a_reference_that_the_reward_refuses_is_skipped_or_ends_the_run"),
    ],
    "an empty prompt file": [(PROMPTS, "test_a_file_without_a_usable_row_is_an_error_even_when_skipping")],
    "a prompt longer than the limit": [(PROMPTS, "test_a_bad_row_is_named_or_skipped_and_counted")],
    "a response longer than the model's positions": [
        (FAULTS, "test_responses_that_outgrow_the_models_positions_are_refused")
    ],
    "a truncated safetensors file": [
        (HERE, "test_safetensors_that_were_cut_off_are_named"),
        (MODELS, "test_any_bytes_of_safetensors_are_read_as_they_are_or_refused"),
    ],
    "a mis-shaped tensor": [
        ("distributed/test_policy.py", "test_a_tensor_that_is_missing_or_misshapen_is_named"),
        (MODELS, "test_a_header_of_safetensors_is_followed_or_refused"),
    ],
    "weights that are no floating-point numbers": [
        (MODELS, "test_weights_in_eight_bits_are_refused_where_their_scales_would_be_lost")
    ],
    "a tokenizer that does not match the vocabulary": [(FAULTS, "test_a_tokenizer_of_another_model_is_refused")],
    "a reference that cannot be one": [
        (FAULTS, "test_a_reference_that_is_missing_or_of_another_vocabulary_names_its_setting")
    ],
    "a checkpoint with a missing file": [
        ("unit/test_checkpoint_files.py", "test_damage_names_the_file_and_the_checkpoint_before_it"),
        ("training/test_resume.py", "test_another_experiment_and_a_damaged_checkpoint_are_refused_in_one_line"),
    ],
    "a checkpoint with an altered file": [
        (FAULTS, "test_a_checkpoint_that_was_altered_is_not_resumed_from"),
        ("fuzz/test_checkpoint_folders.py", "test_bytes_that_change_are_noticed"),
    ],
    "a server that is down": [
        (CLIENT, "test_no_server_and_a_server_that_is_not_there_are_errors_on_entry"),
        (FAULTS, "test_a_server_that_dies_in_the_run_is_named"),
        ("rollout/test_sglang.py", "test_a_server_dies_with_its_killed_parent_and_rollouts_in_flight_name_it"),
    ],
    "a server that will not start": [
        (
            "rollout/test_launcher.py",
            "test_a_server_that_exits_is_reported_in_one_line_with_its_log_and_what_stands_last_in_it",
        )
    ],
    "a server that is slow": [(FAULTS, "test_a_server_that_hangs_is_given_up")],
    "a server that answers wrong counts, NaN logprobs, ids out of range": [
        (REPLIES, "test_a_malformed_reply_is_refused_with_its_values"),
        (FAULTS, "test_a_server_that_begins_to_answer_garbage_ends_the_run_before_a_step_on_it"),
        ("fuzz/test_server_replies.py", "test_a_mutated_reply_is_what_it_says_or_is_refused"),
    ],
    "a server that answers half a JSON": [
        (CLIENT, "test_a_broken_reply_is_an_error_at_once_and_names_the_server"),
        ("fuzz/test_server_replies.py", "test_mutated_bytes_of_an_answer_are_what_they_say_or_are_refused"),
    ],
    "a server of another model": [(FAULTS, "test_a_server_of_another_model_is_refused_with_both_values")],
    "a server of other weights": [("training/test_runs.py", "test_a_skipped_sync_is_noticed_by_the_version")],
    "an empty response": [("rollout/test_policies.py", "test_each_response_is_counted_once_under_its_first_reason")],
    "a reward outside [0, 1]": [
        (SCORING, "test_an_unusable_value_names_prompt_sample_and_value"),
        ("training/test_runs.py", "test_a_reward_outside_its_range_stops_every_rank_with_the_response_named"),
    ],
    "a reward that raises": [(SCORING, "test_a_raising_function_names_the_response_and_keeps_its_error")],
    "a reward that hangs": [
        (SCORING, "test_a_hanging_function_is_given_up_in_time"),
        (FAULTS, "test_a_process_whose_reward_hangs_ends_with_one_line"),
    ],
    "all responses of a step failing": [
        (FAULTS, "test_when_all_responses_of_a_step_fail_the_run_ends_and_counts_them_by_kind")
    ],
    "a disk that fills up under metrics": [(FAULTS, "test_a_disk_that_is_full_when_metrics_are_written_ends_the_run")],
    "a disk that fills up under a checkpoint": [
        (FAULTS, "test_a_disk_that_is_full_when_a_checkpoint_is_saved_ends_the_run_and_leaves_no_half_one"),
        (
            "distributed/test_checkpoint.py",
            "test_a_disk_that_is_full_on_one_rank_is_one_error_on_all",
        ),
    ],
    "a run directory that exists": [
        ("unit/test_report_rundir.py", "test_an_existing_run_is_refused_and_stays_whole"),
        ("unit/test_report_rundir.py", "test_overwrite_does_not_remove_what_is_not_a_run"),
    ],
    "a RANK that is not torchrun's": [(HERE, "test_a_rank_that_is_not_torchruns_is_refused")],
}
"""Kind of bad input -> (file, the beginning of the name) of the tests that hold it."""


@functools.cache
def names_in(file: str) -> tuple[str, ...]:
    tree = ast.parse((Path(__file__).parents[1] / file).read_text())
    return tuple(node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


@pytest.mark.parametrize("kind", HELD_BY)
def test_bad_input_is_held(kind: str) -> None:
    for file, name in HELD_BY[kind]:
        assert any(found.startswith(name) for found in names_in(file)), f"{file} has no {name}"
