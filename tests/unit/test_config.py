"""The configuration: what it accepts, what it refuses, and in which words."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_gspo.algorithm.base import make_algorithm
from megatron_gspo.algorithm.catalog import policy_losses
from megatron_gspo.config import ParallelConfig, RunConfig, dump, load, parse
from megatron_gspo.errors import ConfigError, LayoutError
from megatron_gspo.hf.family import ModelShape
from megatron_gspo.hf.layout import check_layout
from megatron_gspo.hf.qwen3_moe import shape

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*/*.toml"))


def tree(**sections: dict[str, Any]) -> dict[str, Any]:
    """The smallest configuration, with further settings."""
    smallest = {"model": {"path": "model"}, "data": {"path": "prompts.jsonl"}, "train": {"run_dir": "run"}}
    return {name: smallest.get(name, {}) | sections.get(name, {}) for name in smallest | sections}


def toml(path: Path, text: str = "") -> Path:
    path.write_text('[model]\npath = "m"\n[data]\npath = "d"\n[train]\nrun_dir = "r"\n' + text)
    return path


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_example_is_a_valid_configuration(path: Path) -> None:
    assert load(path).train.run_dir


def test_what_is_dumped_loads_to_the_same_configuration(tmp_path: Path) -> None:
    config = parse(tree(algorithm={"name": "grpo", "clip_high": 0.3}, reward={"options": {"format_reward": 0.1}}))
    (tmp_path / "c.toml").write_text(dump(config))
    assert load(tmp_path / "c.toml") == config


def test_the_clip_ranges_are_the_papers_unless_they_are_set() -> None:
    assert make_algorithm("gspo").clip_range() == (3e-4, 4e-4)
    assert make_algorithm("gspo-token").clip_range() == (3e-4, 4e-4)
    assert make_algorithm("grpo").clip_range() == (0.2, 0.27)
    assert make_algorithm("gspo", clip_low=1e-3).clip_range() == (1e-3, 4e-4)


def test_every_loss_of_the_catalog_can_be_named() -> None:
    for name in policy_losses():
        settings = {"name": name} | ({"reference": "teacher"} if name == "distill" else {})
        assert parse(tree(algorithm=settings)).algorithm.name == name
    with pytest.raises(ConfigError, match=r"learns from algorithm\.reference, and there is none"):
        parse(tree(algorithm={"name": "distill"}))


@pytest.mark.parametrize("name", ["gspo", "gspo-token"])
def test_a_ppo_sized_clip_range_for_a_sequence_ratio_needs_to_be_asked_for(name: str) -> None:
    wide = {"name": name, "clip_low": 0.2, "clip_high": 0.2}
    with pytest.raises(ConfigError, match=r"clip_low = 0\.2, clip_high = 0\.2 .*allow_wide_clip"):
        parse(tree(algorithm=wide))
    assert parse(tree(algorithm=wide | {"allow_wide_clip": True})).algorithm.clip_range() == (0.2, 0.2)
    assert parse(tree(algorithm={"name": "grpo", "clip_low": 0.2})).algorithm.clip_range()[0] == 0.2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train": {"mini_batches": 4}}, r"unknown setting train\.mini_batches \(did you mean train\.minibatches\?\)"),
        ({"trian": {"seed": 1}}, r"unknown setting trian \(did you mean train\?\)"),
        ({"optimizer": {"lr": -1.0}}, r"optimizer\.lr = -1\.0: .*greater than 0"),
        ({"optimizer": {"lr": float("nan")}}, r"optimizer\.lr"),
        ({"optimizer": {"betas": [0.9, 1.0]}}, r"optimizer\.betas\.1 = 1\.0: .*less than 1"),
        ({"rollout": {"group_size": 1}}, r"rollout\.group_size = 1, .* one alone has advantage 0: use 2 or more"),
        ({"rollout": {"top_p": 0.9}}, r"top_p = 0\.9: .*only 1 is accepted"),
        ({"rollout": {"top_k": 50}}, r"top_k = 50"),
        ({"rollout": {"temperature": 0.0}}, r"rollout\.temperature = 0\.0"),
        ({"algorithm": {"name": "reinforce"}}, r'algorithm: name = "reinforce" is no algorithm \(known: gspo,'),
        ({"algorithm": {"clip_low": 1.5}}, r"algorithm\.clip_low = 1\.5: .*less than 1"),
        ({"algorithm": {"aggregation": "token-mean"}}, r"gspo has one term per sequence"),
        ({"train": {"minibatches": 3}}, r"prompts_per_step = 16 .*minibatches = 3.*16 / 3 = 5\.333"),
        ({"train": {"microbatch_tokens": 1500}}, r"1024 \+ max_response_tokens 1024 = 2048 does not fit .* 1500"),
        (
            {
                "rollout": {"max_prompt_tokens": 10, "max_response_tokens": 7},
                "train": {"microbatch_tokens": 19},
                "parallel": {"context": 2},
            },
            r"= 17, padded to 20 for parallel.context = 2, does not fit .* 19: raise it to at least 20",
        ),
        ({"optimizer": {"lr": 1e-3, "min_lr": 1e-2}}, r"min_lr = 0\.01 is above .*lr = 0\.001"),
        ({"optimizer": {"warmup_steps": 400}}, r"warmup_steps = 400 leaves nothing of the run's 400 optimizer steps"),
        ({"algorithm": {"reference": "ref"}}, r"neither algorithm.kl_loss_coef nor algorithm.kl_reward_coef uses it"),
        ({"model": {"path": "run/hf"}}, r"model\.path = run/hf lies in train\.run_dir = run"),
        ({"data": {"eval_path": "./run/../run/eval.jsonl"}}, r"data\.eval_path = .* lies in train\.run_dir"),
        (
            {"algorithm": {"name": "sft"}, "replay": {"mode": "r2"}},
            r"replay\.mode = 'r2' is about the routes of rollouts, and sft has none",
        ),
        ({"replay": {"min_coverage": 1.5}}, r"min_coverage = 1\.5: input should be less than or equal to 1"),
        (
            {"rollout": {"servers": ["127.0.0.1:1"]}},
            r"rollout\.servers\.0: '127\.0\.0\.1:1' is no server: write http://HOST:PORT",
        ),
        ({"rollout": {"servers": ["http://a:99999"]}}, r"rollout\.servers\.0: Port out of range"),
        ({"rollout": {"servers": ["http://["]}}, r"rollout\.servers\.0: Invalid IPv6 URL"),
        ({"train": {"outer_steps": True}}, r"train\.outer_steps = True: input should be a valid integer"),
        ({"train": {"outer_steps": 3.0}}, r"train\.outer_steps = 3\.0: input should be a valid integer"),
        ({"train": {"overwrite": 1}}, r"train\.overwrite = 1: input should be a valid boolean"),
        ({"optimizer": {"lr": "1e-6"}}, r"optimizer\.lr = '1e-6': input should be a valid number"),
        ({"rollout": {"server_args": "--tp 2"}}, r"rollout\.server_args = '--tp 2': input should be a valid list"),
        ({"train": {"seed": 2**63}}, r"train\.seed = 9223372036854775808"),
        ({"model": {"dtype": "fp8"}}, r"model\.dtype = 'fp8'"),
        ({"train": {"outer_steps": 10**18}}, r"outer_steps = 10{18}: input should be less than or equal to 2147483647"),
        ({"rollout": {"retries": 2**31}}, r"retries = 2147483648: input should be less than or equal to 2147483647"),
        ({"rollout": {"timeout_s": 1e308}}, r"timeout_s = 1e\+308: input should be less than or equal to 1000000000"),
        ({"rollout": {"temperature": 1e-7}}, r"temperature = 1e-07: input should be greater than .* \(at 0 all resp"),
        ({"sync": {"directory": "a\0b"}}, r"sync\.directory holds a NUL character"),
        ({"rollout": {"server_args": ["--tp\0"]}}, r"rollout\.server_args\.0 holds a NUL character"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_wrong_setting_is_one_line_with_its_value(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parse(tree(**settings))
    assert "\n" not in str(caught.value)


def test_context_ranks_multiply_the_world_and_can_hold_experts() -> None:
    layout = parse(tree(parallel={"tensor": 2, "context": 2, "pipeline": 2, "expert": 4})).parallel
    assert (layout.world_size(), layout.data_size(16)) == (8, 2)


def test_a_layout_that_does_not_fill_the_world_shows_the_product() -> None:
    layout = ParallelConfig(tensor=2, pipeline=2, data=3)
    with pytest.raises(LayoutError, match=r"tensor 2 x pipeline 2 x context 1 x data 3 = 12 ranks, .* world has 8"):
        layout.data_size(8)
    assert layout.data_size(12) == 3


def test_experts_must_divide_the_ranks_of_a_stage() -> None:
    with pytest.raises(LayoutError, match=r"expert 4 x expert_tensor 1 = 4 does not divide tensor 2 .*data 1 = 2"):
        parse(tree(parallel={"tensor": 2, "expert": 4, "data": 1}))


def test_a_layout_by_itself_takes_the_fewest_ranks_that_hold_the_experts() -> None:
    assert ParallelConfig(tensor=2, expert=2).world_size() == 2
    assert ParallelConfig(tensor=2, expert=4).world_size() == 4
    assert ParallelConfig(tensor=2, pipeline=2, expert=2).world_size() == 4
    assert ParallelConfig(expert=4).world_size() == 4


def tiny_shape() -> ModelShape:
    return shape(
        {
            "architectures": ["Qwen3MoeForCausalLM"],
            "num_hidden_layers": 6,
            "hidden_size": 64,
            "vocab_size": 100,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "intermediate_size": 128,
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
        }
    )


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"tensor": 8}, r"4 key-value heads / parallel\.tensor 8 = 0\.5"),
        ({"tensor": 3}, r"8 attention heads / parallel\.tensor 3 = 2\.66667"),
        ({"pipeline": 8}, r"6 layers over pipeline 8 x virtual_pipeline 1 = 8 stages"),
        ({"expert": 4}, r"6 experts / parallel\.expert 4 = 1\.5"),
    ],
)
def test_a_layout_that_does_not_divide_the_model_shows_the_division(layout: dict[str, int], message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        check_layout(ParallelConfig(**layout), tiny_shape())


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train": {"minibatches": 2**31 - 1, "prompts_per_step": 2**31 - 3}}, r"or train\.minibatches = 2147483645"),
        ({"train": {"minibatches": 10, "prompts_per_step": 12}}, r"10 or 20 prompts would do, or .*minibatches = 6$"),
        ({"train": {"minibatches": 7, "prompts_per_step": 11}}, r"7 or 14 prompts would do, or .*minibatches = 1$"),
    ],
)
def test_what_would_divide_is_found_at_once_however_large_the_numbers(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(tree(**settings))


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("expert", "tensor", "data"), [(2**31 - 1, 1, 2**31 - 1), (12, 8, 3), (8, 2, 4), (1, 4, 1)])
def test_the_fewest_data_ranks_that_hold_the_experts(expert: int, tensor: int, data: int) -> None:
    assert ParallelConfig(expert=expert, tensor=tensor).data_size() == data


def test_overrides_replace_what_the_file_says(tmp_path: Path) -> None:
    path = toml(tmp_path / "c.toml", "seed = 3\n")
    overrides = ["train.seed=7", "algorithm.name=grpo", "optimizer.betas=[0.8, 0.9]", 'rollout.servers=["http://a:1"]']
    config = load(path, [*overrides, "reward.options.format_reward=0.1"])
    assert (config.train.seed, config.algorithm.name, config.optimizer.betas) == (7, "grpo", (0.8, 0.9))
    assert config.rollout.servers == ("http://a:1",)
    assert config.reward.options == {"format_reward": 0.1}


@pytest.mark.parametrize("override", ["seed=1", "train.seed", "=", "train.=1", ".seed=1", "model.path.x=1"])
def test_an_override_that_is_none_is_one_clear_line(tmp_path: Path, override: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(toml(tmp_path / "c.toml"), [override])
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_configuration_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.toml: no such configuration file"):
        load(tmp_path / "nowhere.toml")
    (tmp_path / "broken.toml").write_text("[train\n")
    with pytest.raises(ConfigError, match=r"broken\.toml: "):
        load(tmp_path / "broken.toml")
    (tmp_path / "flat.toml").write_text("train = 3\n")
    with pytest.raises(ConfigError, match=r"train is not a section"):
        load(tmp_path / "flat.toml", ["train.seed=1"])
    with pytest.raises(ConfigError, match=r"flat\.toml: model is missing"):
        load(tmp_path / "flat.toml")


@pytest.mark.parametrize(
    ("prompts", "asked", "cores", "cards", "servers"),
    [
        (32, None, 2, 0, 2),  # 256 responses
        (32, None, 64, 0, 4),
        (4, None, 64, 0, 1),
        (1024, None, 64, 0, 8),
        (1024, None, 64, 4, 3),  # those that one rank leaves
        (4, 3, 2, 0, 3),
        (4, 3, 2, 4, 3),
    ],
)
def test_local_servers_follow_cores_or_cards_unless_the_user_says_how_many(
    prompts: int, asked: int | None, cores: int, cards: int, servers: int
) -> None:
    known = {"model": {"path": "m"}, "data": {"path": "d"}, "train": {"run_dir": "r", "prompts_per_step": prompts}}
    config = RunConfig.model_validate(known | {"rollout": {"local_servers": asked, "group_size": 8}})
    assert len(config.placed(ranks=1, cards=cards, cores=cores).first_cards) == servers


def test_every_setting_has_a_docstring() -> None:
    for section in RunConfig.model_fields.values():
        for name, field in section.annotation.model_fields.items():  # type: ignore[union-attr]
            assert field.description, f"{section.annotation}.{name}"


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "megatron_gspo.cli", *arguments]
    return subprocess.run(line, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("algorithm.clip_low=0.2", "allow_wide_clip"),
        ("parallel.tensor=3", "4 attention heads / parallel.tensor 3"),
        ("train.sed=1", "did you mean train.seed?"),
        ("model.path=nowhere", "nowhere/config.json: not found"),
    ],
)
def test_the_command_line_answers_a_mistake_with_one_line_and_exit_status_2(
    tmp_path: Path, override: str, message: str
) -> None:
    from tests.oracle import make_tiny_qwen3_moe

    make_tiny_qwen3_moe(tmp_path / "model", seed=0)
    path = toml(tmp_path / "c.toml")
    short = ("rollout.max_prompt_tokens=64", "rollout.max_response_tokens=64")
    done = command("train", str(path), f"model.path={tmp_path}/model", *short, override)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_help_shows_an_example() -> None:
    for name in ("train", "report", "status"):
        done = command(name, "--help")
        assert done.returncode == 0
        assert f"example: megatron-gspo {name}" in done.stdout


def test_resuming_and_replacing_a_run_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match=r"resume = true .* overwrite = true .*: set train\.overwrite = false"):
        parse(tree(train={"resume": True, "overwrite": True}))
