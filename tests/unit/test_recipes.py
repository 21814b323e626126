"""The recipes of ``examples/``: what they say of a run is what the run would be."""

from __future__ import annotations

import json
import re
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from megatron_gspo.config import load
from megatron_gspo.doctor.tensors import tensors_of
from megatron_gspo.hf.catalog import model_of
from megatron_gspo.hf.layout import check_layout, check_recompute
from megatron_gspo.plan.models import find_model
from tests.unit.meta_models import Job, Saved, places, saved
from tests.unit.recipes import FOLDERS, HEAD, TOMLS, Row, cut, name_of, rows, world_of

Shapes = dict[str, tuple[int, ...]]
MODELS = ("qwen3-30b-a3b", "qwen3-235b-a22b", "moonlight-16b-a3b", "qwen3-0.6b")


@cache
def by_transformers(frozen: str) -> Shapes:
    """What transformers' own model of a config.json saves: its names of the file, experts one by one."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.core_model_loading import revert_weight_conversion

    config = AutoConfig.for_model(**json.loads(frozen))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tensors = revert_weight_conversion(model, model.state_dict())
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]  # saved once, as the embedding
    return shapes


def theirs(config: dict[str, Any]) -> Shapes:
    return by_transformers(json.dumps(config, sort_keys=True))


def test_every_directory_has_its_recipe() -> None:
    assert {path.parent.name for path in TOMLS} == set(FOLDERS)
    assert {name_of(path) for path in TOMLS} >= {f"{folder}/gspo" for folder in FOLDERS}
    assert {path.stem for path in TOMLS if path.parent.name == "qwen3_30b_a3b"} == {"gspo", "grpo_r2", "gspo_r3"}


@pytest.mark.parametrize("path", TOMLS, ids=name_of)
def test_a_recipe_has_the_papers_settings_and_a_layout_of_its_model(path: Path) -> None:
    config, model = load(path), find_model(load(path).model.path)
    assert config.train.minibatches == 4 and config.train.prompts_per_step % 4 == 0
    algorithm = config.algorithm
    clip = (algorithm.clip_low, algorithm.clip_high)  # type: ignore[attr-defined]
    assert clip == {"gspo": (3e-4, 4e-4), "grpo": (0.2, 0.27)}[algorithm.name]
    assert config.replay.mode == {"gspo_r3": "r3", "grpo_r2": "r2"}.get(path.stem, "off")
    check_layout(config.parallel, model.shape)
    check_recompute(config.model, config.parallel, model.shape)
    longest = config.rollout.max_prompt_tokens + config.rollout.max_response_tokens
    assert longest <= config.train.microbatch_tokens and longest + 2 <= model.shape.max_positions
    assert config.eval.samples == 32


def test_recipes_of_a_directory_differ_in_what_they_compare_alone() -> None:
    plain, r3, r2 = (
        load(path).model_dump(exclude={"train": {"run_dir"}, "replay": ..., "algorithm": ...})
        for path in TOMLS[[name_of(path) for path in TOMLS].index("qwen3_30b_a3b/grpo_r2") :][:3]
    )
    assert plain == r3 == r2


@pytest.mark.parametrize("name", MODELS)
def test_tensors_at_full_size_are_those_that_transformers_saves(name: str) -> None:
    model = find_model(name)
    ours = {tensor.name: tensor.shape for tensor in tensors_of(model.family, model.shape)}
    assert ours == theirs(dict(model.config))


def jobs(*, whole: bool) -> dict[str, Job]:
    """One for each distinct layout."""
    found: dict[str, Job] = {}
    for path in TOMLS:
        run, config, world = load(path), dict(find_model(load(path).model.path).config), world_of(path.parent.name)
        if not whole:
            config, run, world = cut(config, run, world)
        if run.parallel not in [job.config.parallel for job in found.values() if job.model == config]:
            found[name_of(path)] = Job(run, config, world)
    return found


def assert_whole(job: Job, tensors: Saved) -> None:
    """Each tensor once, as transformers has it, and as the table has it that sums and converters read."""
    assert not [name for name, count in Counter(name for name, _ in tensors).items() if count > 1]
    assert dict(tensors) == theirs(job.model)
    assert dict(tensors) == {tensor.name: tensor.shape for tensor in tensors_of(*model_of(job.model, "config.json"))}


@pytest.fixture(scope="module")
def built() -> dict[str, tuple[Job, Saved]]:
    wanted = jobs(whole=False)
    return {name: (job, found) for (name, job), found in zip(wanted.items(), saved(list(wanted.values())), strict=True)}


def test_what_every_rank_of_a_recipe_would_save_is_together_what_transformers_saves(built: Any) -> None:
    """Of few layers, experts and stages; ``tests/slow/test_recipes.py`` has all of them."""
    assert set(built) >= {"qwen3_30b_a3b/grpo_r2", "qwen3_235b_a22b/gspo", "moonlight_16b_a3b/gspo", "qwen3_0_6b/gspo"}
    for job, tensors in built.values():
        assert_whole(job, tensors)


def test_a_rank_that_is_left_out_is_missed(built: Any) -> None:
    job, tensors = built["qwen3_235b_a22b/gspo"]
    ranks = len(places(job.config.parallel, job.world))
    assert ranks == 3 * 8  # stages, and expert ranks of which tensor ranks are a part
    experts = [name for name, _ in tensors if ".experts.3." in name]
    assert experts and all(job.model["num_experts"] > 3 for _ in experts)
    with pytest.raises(AssertionError):
        assert_whole(job, [(name, shape) for name, shape in tensors if ".experts.3." not in name])
    with pytest.raises(AssertionError):
        assert_whole(job, [*tensors, tensors[0]])


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_readmes_table_is_what_plan_says_and_fits(folder: str) -> None:
    table = list(rows(folder))
    assert len(table) >= 4 and any(not row.settings for row, _ in table)
    for row, line in table:
        assert line == row.text(), "run: python -m tests.unit.recipes"
    readme = (Path(table[0][0].toml).parent / "README.md").read_text(encoding="utf-8")
    assert HEAD in readme and not re.search(r"^(HEAD|VERIFY)|NOFIT", readme, re.MULTILINE)


def test_what_does_not_fit_is_no_row() -> None:
    toml = next(path for path in TOMLS if name_of(path) == "qwen3_30b_a3b/gspo")
    with pytest.raises(AssertionError, match=r"lacks \{'training': 1\}"):
        Row(toml, 8, "h100-80", ()).text()
