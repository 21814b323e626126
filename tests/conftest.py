"""Settings of all tests."""

import contextlib
import signal

import pytest
from hypothesis import settings

# No deadline: a busy machine is not a wrong result. Derandomized: a failure on one machine fails on every other.
settings.register_profile("megatron_gspo", deadline=None, derandomize=True)
settings.load_profile("megatron_gspo")

# What runs in the background of a script is deaf to Ctrl-C, and so is what it starts: tests that press it would wait.
with contextlib.suppress(ValueError):  # not the main thread
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


TAKE_LONG = (
    "convert/test_verify.py::test_logits_are_those_of_transformers_at_every_layout[parallel1]",
    "goes_on_bitwise_from_a_checkpoint_of_the_same_layout[float64-TP2xPP2xEP2]",
    "convert/test_verify.py::test_logits_of_another_model_differ",
    "expert_ranks[tiny-glm4-moe]",
    "expert_ranks[tiny-mixtral]",
    "expert_ranks[tiny-moonlight]",
    "expert_ranks[tiny-olmoe]",
    "expert_ranks[tiny-qwen2-moe]",
    "distributed/test_megatron_faults.py::test_a_gradient_norm_counts_every_whole_gradient_once[tiny-deepseek-v3]",
    "distributed/test_parity.py::test_under_torchrun_the_world_checks",
    "distributed/test_parity.py::test_in_bfloat16_responses_that_a_near_tie_routes_otherwise",
    "rollout/test_families_served.py::test_every_method_fills_a_server_that_started_without_weights[glm4_moe]",
    "rollout/test_families_served.py::test_what_config_json_asks_else",
    "rollout/test_sglang.py::test_a_server_dies_with_its_killed_parent",
    "training/test_bad_input.py::test_a_reward_that_cannot_be_had_says_why[raise",
    "training/test_bad_input.py::test_a_reward_that_cannot_be_had_says_why[import",
    "training/test_bad_input.py::test_a_reward_that_cannot_be_had_says_why[def f(prompt)",
    "training/test_compare.py::test_a_comparison_that_was_stopped",
    "training/test_converted.py::test_reinforcement_learning_starts_from_a_converted_checkpoint",
    "training/test_eval.py::test_eval_repeats_what_training_measured",
    "training/test_group_work.py::test_two_leaders_give_the_credit_that_one_does[centred]",
    "training/test_group_work.py::test_two_leaders_give_the_credit_that_one_does[leave-one-out]",
    "training/test_resume.py::test_sigterm_saves_after_the_outer_step",
    "training/test_runs.py::test_a_run_is_the_same_whichever_way_its_weights_travel",
    "training/test_runs.py::test_the_same_configuration_takes_the_same_first_step_at_every_layout",
    "unit/test_bench.py::test_bench_logprobs_prints_every_head",
    # What the objectives of `parity` show of every loss, by whole steps.
    "test_every_loss_gives_the_step_of_one_process[g",
    "test_every_loss_trains_and_gspo_token_takes_gspos_steps",
    # Of each kind of layout some stay.
    *(
        f"test_a_gspo_step_is_that_of_one_process[{layout}]"
        for layout in (
            *("PP2", "DP2", "TP2xEP2", "TP2xPP2", "TP2xDP2xEP4", "TP2xPP2xDP2xEP2", "CP4", "TP2xCP2", "CP2xPP2"),
            *("CP2xDP2", "TP2xCP2xEP2", "CP2xDP2xEP4", "PP2xVPP2", "PP2xVPP2xDP2xEP2", "PP3", "TP2xETP2", "DP2xETP2"),
        )
    ),
    "test_splitting_and_packing_cannot_change_a_step[two-",
    "test_splitting_and_packing_cannot_change_a_step[four-",
    "test_splitting_and_packing_cannot_change_a_step[one micro-batch-",
    "training_forward[DP2-",
    "training_forward[PP2xVPP2-float32",
    "training_forward[TP2xCP2-float32",
    "training_forward[TP2xPP2xEP2-float64",
    "test_every_shape_of_the_family_is_computed[dense layers between]",
    "test_every_shape_of_the_family_is_computed[one expert a token]",
    "test_every_shape_of_the_family_is_computed[tied embeddings]",
    "gives_the_files_bytes_back[mixture-bfloat16]",
    "gives_the_files_bytes_back[tied dense-float32]",
    "that_replays_them[DP2]",
    "that_replays_them[TP2]",
    "that_replays_them[TP2xPP2xEP2+recompute]",
    "a_checkpoint_of_the_same_layout[float32-TP2xEP2]",
    "a_checkpoint_of_the_same_layout[bfloat16-PP2]",
    "same_at_another_layout[DP2-TP1]",
    "same_at_another_layout[TP1-EP2]",
    "same_at_another_layout[TP2-TP1]",
    "same_at_another_layout[TP2xEP2-PP2]",
    "by_their_place_in_the_whole[TP2xETP2-PP3]",
    "by_their_place_in_the_whole[DP2xETP2-PP2xVPP2]",
    "training/test_group_work.py::test_two_leaders_give_the_credit_that_one_does[batch]",
    "training/test_critic_runs.py::test_a_kl_to_the_reference_is_taken_off_rewards_before_credit_is_given[batch]",
    "training/test_faults.py::test_an_engine_that_becomes_another_one_is_warned_of_or_ends_the_run[warn]",
    "training/test_restarts.py::test_a_killed_rank_costs_the_steps_since_the_last_checkpoint_and_no_bit",
    "training/test_stopped_rank.py::test_a_stopped_rank_ends_the_run_and_is_named_with_its_phase",
    "rollout/test_families_served.py::test_every_method_fills_a_server_that_started_without_weights[qwen2_moe]",
    "distributed/test_parity.py::test_a_fault_fails_the_columns_that_it_reaches_and_is_named[losses_are_doubled]",
    "distributed/test_megatron_faults.py::test_a_gradient_norm_counts_every_whole_gradient_once[tiny-glm4-moe]",
)
"""Parts of the names of tests that take more than 15 seconds and have a shorter neighbour: for `make test-slow`."""


@pytest.hookimpl(tryfirst=True)  # before pytest deselects by marker
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if any(name in item.nodeid for name in TAKE_LONG):
            item.add_marker(pytest.mark.slow_suite)
