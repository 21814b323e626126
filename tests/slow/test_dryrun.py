"""Dry runs of the models that people train, and two depths against all layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_gspo.config import RunConfig
from megatron_gspo.dryrun import DryRun, verify
from tests.unit.test_dryrun import SIZES, configured

pytestmark = pytest.mark.slow_suite

COMMON = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "norm_topk_prob": True,
}
SMALLER = {"hidden_size": 2048, "intermediate_size": 6144, "num_attention_heads": 32, "moe_intermediate_size": 768}
LARGER = {"hidden_size": 4096, "intermediate_size": 12288, "num_attention_heads": 64, "moe_intermediate_size": 1536}
MODELS = {
    "Qwen3-30B-A3B": {**COMMON, **SMALLER, "num_hidden_layers": 48},
    "Qwen3-235B-A22B": {**COMMON, **LARGER, "num_hidden_layers": 94},
    "twelve layers of Qwen3-30B-A3B": {**COMMON, **SMALLER, "num_hidden_layers": 12},
}
ROWS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "8 GPUs": ("Qwen3-30B-A3B", 8, {"parallel": {"expert": 8, "data": 8}, "optimizer": {"offload": True}}),
    "16 GPUs": ("Qwen3-30B-A3B", 16, {"parallel": {"expert": 8, "data": 16}}),
    "32 GPUs": ("Qwen3-30B-A3B", 32, {"parallel": {"expert": 8, "data": 32}}),
    "64 GPUs": ("Qwen3-30B-A3B", 64, {"parallel": {"expert": 8, "data": 64}}),
    "128 GPUs": ("Qwen3-235B-A22B", 128, {"parallel": {"tensor": 2, "pipeline": 8, "expert": 16, "data": 8}}),
}
"""The table of docs/dryrun.md."""


def dry(directory: Path, model: str, gpus: int, sections: dict[str, Any], **settings: Any) -> DryRun:
    (directory / "config.json").write_text(json.dumps(MODELS[model]))
    plain: dict[str, Any] = {
        "model": {"path": "model", "dtype": "bfloat16", "recompute": "full"},
        "data": {"path": "data"},
        "train": {"run_dir": "run", "microbatch_tokens": 8192, "prompts_per_step": 128},
        "rollout": {"max_prompt_tokens": 1024, "max_response_tokens": 7168, "group_size": 16},
    }
    return verify(RunConfig(**plain, **sections), directory / "config.json", gpus, **settings)


@pytest.mark.parametrize("row", ROWS)
def test_doctor_agrees_with_a_dry_run_of_a_model_at_full_size(row: str, tmp_path: Path) -> None:
    model, gpus, sections = ROWS[row]
    found = dry(tmp_path, model, gpus, sections)
    for name, peak in found.peaks.items():
        assert found.estimate[name] == pytest.approx(peak.total, rel=0.05)
        assert peak.total < 64 * 2**30  # of 80 GB, with what a dry run leaves out


FULL = {"model": {"recompute": "full"}}
DENSE = {"architectures": ["Qwen3ForCausalLM"], "tie_word_embeddings": True, "num_hidden_layers": 4}
PPO = {"name": "ppo", "credit": "gae"}
SHARED = {"architectures": ["Qwen2MoeForCausalLM"], "shared_expert_intermediate_size": 512}
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dense layers, a tied head": (DENSE, {}),
    "dense layers, recomputed": (DENSE, FULL),
    "dense layers over tensor ranks": (DENSE, {"parallel": {"tensor": 2}}),
    "virtual stages": (DENSE, {"parallel": {"pipeline": 2, "virtual_pipeline": 2}}),
    "virtual stages of unlike length": (
        {"num_hidden_layers": 11},
        {"parallel": {"pipeline": 2, "virtual_pipeline": 3, "stage_layers": [2, 2, 2, 2, 2, 1]}},
    ),
    "every second layer dense": ({"decoder_sparse_step": 2, "num_hidden_layers": 4}, FULL),
    "a shared expert": (SHARED, FULL),
    "experts made again alone": ({}, {"model": {"recompute": "selective"}}),
    "expert-tensor ranks": ({}, {**FULL, "parallel": {"tensor": 2, "expert_tensor": 2, "expert": 2, "data": 2}}),
    "narrow moments": ({}, {**FULL, "optimizer": {"state_dtype": "bfloat16"}}),
    "narrow moments on the host": ({}, {**FULL, "optimizer": {"state_dtype": "bfloat16", "offload": True}}),
    "no overlap": ({}, {**FULL, "parallel": {"overlap": False, "expert": 2, "data": 2}}),
    "a reference": ({}, {**FULL, "algorithm": {"kl_loss_coef": 0.1}}),
    "a critic": ({}, {**FULL, "algorithm": PPO}),
    "a critic with its states on the host": (
        {"num_hidden_layers": 4},
        {**FULL, "algorithm": PPO, "optimizer": {"offload": True}, "critic": {"offload": True}},
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_doctor_agrees_with_a_dry_run_of_a_small_layout(variant: str, tmp_path: Path) -> None:
    sizes, sections = VARIANTS[variant]
    (tmp_path / "config.json").write_text(json.dumps({**SIZES, **sizes}))
    config = configured(**sections)
    found = verify(config, tmp_path, config.parallel.world_size())
    for name, peak in found.peaks.items():
        assert found.estimate[name] == pytest.approx(peak.total, rel=0.05)


def test_two_depths_stand_for_all_layers(tmp_path: Path) -> None:
    sections = {"parallel": {"expert": 8, "data": 8}}
    few, all_layers = (
        dry(tmp_path, "twelve layers of Qwen3-30B-A3B", 8, sections, full_depth=whole) for whole in (False, True)
    )
    assert (few.full_depth, all_layers.full_depth) == (False, True)
    one, other = few.ranks["all ranks"], all_layers.ranks["all ranks"]
    assert one.flops == pytest.approx(other.flops, rel=1e-9)
    assert one.peak.total == pytest.approx(other.peak.total, rel=0.005)
    assert one.peak.moment == other.peak.moment
    assert {(c.kind, c.group): c.bytes for c in one.collectives} == pytest.approx(
        {(c.kind, c.group): c.bytes for c in other.collectives}, rel=0.02
    )
