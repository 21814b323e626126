"""Damaged directories of adapters, and settings of adapters and of eight bits. What is accepted means what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from megatron_gspo.config import LoraConfig, PlacementConfig
from megatron_gspo.config.servers import server_sizes
from megatron_gspo.errors import ConfigError, UserError
from megatron_gspo.hf.catalog import read_model
from megatron_gspo.hf.fp8 import WRITTEN
from megatron_gspo.hf.lora import lora_targets, matches
from megatron_gspo.hf.peft import CONFIG, adapter_config, check_adapters
from megatron_gspo.hf.quantisation import without_quantization
from tests.fuzz.mutations import (
    BYTE_MUTATIONS,
    HANG_S,
    MUTATIONS,
    VALUES,
    as_json,
    assert_says,
    fuzz,
    mutated,
    mutated_bytes,
)
from tests.unit.doctor_cases import prepare

pytestmark = pytest.mark.timeout(HANG_S)

LORA = LoraConfig(rank=4, alpha=8.0)
HARMLESS = {"base_model_name_or_path", "task_type", "inference_mode", "init_lora_weights", "lora_dropout"}
"""Of adapter_config.json: what says nothing of what the tensors mean, and how they were trained."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory = tmp_path_factory.mktemp("model") / "model"
    prepare().write_model(directory, seed=0)
    return read_model(directory)


def check(directory: Path, model: Any, sound: dict[str, Any]) -> None:
    """What is accepted differs from the sound one in nothing that changes what its tensors mean. A name that PEFT does
    not have says nothing."""
    try:
        check_adapters(directory, *model, LORA)
    except UserError as error:
        assert_says(error, "lora.path")
        return
    given_ = json.loads((directory / CONFIG).read_bytes())
    for name in (sound.keys() | given_.keys() & set(FIELDS)) - HARMLESS:
        ours, theirs = sound.get(name), given_.get(name)
        if isinstance(theirs, list) and isinstance(ours, list):
            ours, theirs = sorted(ours), sorted(theirs)
        same = theirs == ours and isinstance(theirs, bool) == isinstance(ours, bool)
        assert same or (not ours and not theirs) or name not in given_ or name.endswith("_"), (name, ours, theirs)


FIELDS = (
    *("r", "lora_alpha", "use_rslora", "target_modules", "target_parameters", "bias", "fan_in_fan_out", "peft_type"),
    *("layers_to_transform", "layer_replication", "exclude_modules", "rank_pattern", "alpha_pattern"),
    *("modules_to_save", "use_dora", "lora_bias", "trainable_token_indices", "use_qalora"),
)


@fuzz(300)
@given(st.sampled_from(FIELDS), VALUES)
@example("fan_in_fan_out", True)
@example("bias", "all")
@example("r", 4.0)
@example("layers_to_transform", [0])
@example("target_modules", "all-linear")
def test_any_field_of_adapter_config_is_followed_or_refused(tmp_path: Path, model: Any, name: str, value: Any) -> None:
    sound = adapter_config(*model, LORA, "base")
    (tmp_path / CONFIG).write_bytes(as_json(sound | {name: value}))
    check(tmp_path, model, sound)


@fuzz(150)
@given(MUTATIONS, st.one_of(st.none(), BYTE_MUTATIONS))
def test_a_damaged_adapter_config_is_followed_or_refused(
    tmp_path: Path, model: Any, mutations: list[Any], bytes_: list[Any] | None
) -> None:
    sound = adapter_config(*model, LORA, "base")
    content = as_json(sound if bytes_ else mutated(sound, mutations))
    (tmp_path / CONFIG).write_bytes(mutated_bytes(content, bytes_) if bytes_ else content)
    check(tmp_path, model, sound)


@fuzz(150)
@given(
    st.lists(st.one_of(st.text(max_size=12), st.sampled_from(["q_proj", "all-linear", "experts.up_proj", ".*", "("])))
)
def test_targets_are_matrices_of_the_model_or_refused(model: Any, targets: list[str]) -> None:
    try:
        found = lora_targets(*model, LoraConfig(rank=4, targets=tuple(targets)))
    except (UserError, ValueError) as error:
        assert_says(error)
        return
    named = [name for name in targets if name != "all-linear"]
    assert found and all(any(matches(target.weight, name) for target in found) for name in named)


@fuzz(200)
@given(MUTATIONS, st.booleans())
def test_eight_bits_are_those_that_are_read_or_refused(mutations: list[Any], whole: bool) -> None:
    """Nothing but blocks of 128 x 128 of float8_e4m3fn comes through as weights that were read."""
    settings = mutated({"quantization_config": WRITTEN}, mutations)
    config = settings if whole and isinstance(settings, dict) else {"quantization_config": settings}
    try:
        left = without_quantization({"hidden_size": 8, **config})
    except ConfigError as error:
        assert_says(error, "quantization_config")
        return
    given_ = config.get("quantization_config") or config.get("compression_config")
    assert left["hidden_size"] == config.get("hidden_size", 8)
    assert not given_ or all(given_.get(name) == WRITTEN[name] for name in ("quant_method", "weight_block_size"))


WORDS = ["--tp-size", "--tp", "--dp-size=2", "--pp", "--ep", "--base-gpu-id", "--mem-fraction-static", "2", "0", "-1"]


@fuzz(150)
@given(st.lists(st.one_of(st.sampled_from([*WORDS, "1.5", "--tp=x", "--attn-dp-size", "0.9"]), st.text(max_size=6))))
def test_a_servers_command_line_says_sizes_or_is_refused(words: list[str]) -> None:
    try:
        sizes = server_sizes(words)
    except ConfigError as error:
        assert_says(error, "rollout.server_args")
        return
    for value in (sizes.tensor, sizes.pipeline, sizes.data, sizes.attention_data, sizes.expert, sizes.step):
        assert type(value) is int and value >= 1
    assert sizes.cards >= 1


@fuzz(150)
@given(st.dictionaries(st.sampled_from(sorted(PlacementConfig.model_fields)), VALUES, min_size=1, max_size=3))
def test_a_placement_is_what_was_written_or_refused(values: dict[str, Any]) -> None:
    try:
        config = PlacementConfig(**values)
    except (ConfigError, ValueError) as error:
        assert str(error).strip()
        return
    for name, value in values.items():
        accepted = getattr(config, name)
        assert accepted == (tuple(value) if isinstance(accepted, tuple) else value)
        assert isinstance(accepted, bool) == isinstance(value, bool)
