"""What may change when a run is resumed, and what would make it another experiment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from report_runs import make_config

from megatron_gspo.config import RunConfig
from megatron_gspo.errors import ConfigError, WeightError
from megatron_gspo.policy import checkpoint_files as files
from megatron_gspo.train.progress import fingerprint
from megatron_gspo.train.resume import FREE, _find, flat

PROMPTS = {"data.path": "a" * 16, "data.eval_path": "b" * 16}
VERSIONS = {"torch": "2.13.0"}


def identity(config: RunConfig, **others: Any) -> dict[str, Any]:
    return {"config": config.model_dump(mode="json"), "prompts": PROMPTS, "versions": VERSIONS} | others


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run whose last checkpoint follows outer step 4."""
    extra = {"outer_step": 4, "optimizer_step": 16, "cursor": {}, **identity(make_config(tmp_path / "run"))}
    publish(tmp_path / "run", extra)
    return tmp_path / "run"


def publish(run: Path, extra: dict[str, Any]) -> None:
    unfinished = run / "checkpoints" / "unfinished"
    files.make_empty(unfinished)
    files.publish(unfinished, unfinished.with_name("outer_00004"), {"step": 16, "model": {}, "extra": extra}, [])


def resume(run: Path, others: dict[str, Any] | None = None, **sections: dict[str, Any]) -> Any:
    train = sections.pop("train", {})
    config = make_config(run, train=train | {"resume": True}, **sections)
    return _find(config, identity(config, **(others or {})))


def test_an_unchanged_configuration_continues_and_notes_nothing(run: Path) -> None:
    found = resume(run)
    assert (found.directory.name, found.outer_steps, found.changes) == ("outer_00004", 4, {})
    assert found.describe() == "continues from outer_00004"


def test_layout_servers_length_and_checkpoints_may_change_and_are_noted(run: Path) -> None:
    found = resume(
        run,
        {"versions": {"torch": "2.13.1"}},
        parallel={"tensor": 1, "pipeline": 2},
        rollout={"servers": ["http://a:1"], "retries": 5},
        train={"outer_steps": 20, "checkpoint_every": 3, "microbatch_tokens": 8192},
        sync={"method": "disk"},
    )
    assert found.changes["parallel.tensor"] == (2, 1)
    assert found.changes["train.outer_steps"] == (12, 20)
    assert set(found.changes) == {
        "parallel.tensor", "parallel.pipeline", "rollout.servers", "rollout.retries", "train.outer_steps",
        "train.checkpoint_every", "train.microbatch_tokens", "sync.method", "torch",
    }  # fmt: skip
    assert "; changed: " in found.describe() and "train.outer_steps 12 -> 20" in found.describe()


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"train": {"seed": 3}}, "train.seed was 0 and is 3"),
        ({"train": {"prompts_per_step": 8}}, "train.prompts_per_step was 16 and is 8"),
        ({"algorithm": {"clip_low": 2e-3}}, "algorithm.clip_low was 0.001 and is 0.002"),
        ({"algorithm": {"name": "grpo"}}, "algorithm.name was 'gspo' and is 'grpo'"),
        ({"model": {"path": "another"}}, "model.path was 'checkpoints/tiny-qwen3-moe' and is 'another'"),
        ({"optimizer": {"lr": 1e-5}}, "optimizer.lr was 1e-06 and is 1e-05"),
        ({"rollout": {"group_size": 4}}, "rollout.group_size was 8 and is 4"),
        ({"reward": {"options": {"strict": True}}}, "reward.options was {} and is {'strict': True}"),
        ({"data": {"shuffle": False}}, "data.shuffle was True and is False"),
    ],
)
def test_what_would_be_another_experiment_is_refused_with_both_values_unless_it_is_named(
    run: Path, sections: dict[str, dict[str, Any]], said: str
) -> None:
    with pytest.raises(ConfigError, match="cannot be continued as the same experiment") as caught:
        resume(run, **sections)
    assert said in str(caught.value)
    name = said.split()[0]
    assert f'train.resume_changes = ["{name}"]' in str(caught.value)
    train = sections.get("train", {}) | {"resume_changes": [name]}
    found = resume(run, **{k: v for k, v in sections.items() if k != "train"}, train=train)
    assert set(found.changes) == {name}


def test_prompts_are_known_by_their_content_and_not_by_their_file(run: Path) -> None:
    assert set(resume(run, data={"path": "moved.jsonl"}).changes) == {"data.path"}
    other = {"prompts": PROMPTS | {"data.path": "c" * 16}}
    with pytest.raises(ConfigError, match=r"the prompts of data.path are others .*a{16} then, c{16} now"):
        resume(run, other)
    rows = [("line-1", (1, 2), "3", {}), ("line-2", (1,), "4", {})]
    assert fingerprint(rows) == fingerprint(list(rows))
    assert len({fingerprint(r) for r in (rows, rows[:1], rows[::-1], [rows[0], ("line-2", (1,), "5", {})])}) == 4


def test_fewer_outer_steps_than_are_done_are_refused(run: Path) -> None:
    with pytest.raises(ConfigError, match=r"train.outer_steps = 3, but .*outer_00004 has done 4 of them"):
        resume(run, train={"outer_steps": 3})


def test_a_latest_that_is_gone_is_named_with_what_is_there(run: Path) -> None:
    (run / "checkpoints" / "latest").write_text("outer_00008\n")
    with pytest.raises(WeightError, match=r"outer_00008: no such checkpoint; also there: outer_00004"):
        resume(run)


def test_a_checkpoint_of_no_run_is_refused(run: Path) -> None:
    publish(run, {"outer_step": 4})
    with pytest.raises(WeightError, match="its extra lacks config, cursor, optimizer_step, prompts, versions"):
        resume(run)


def test_every_setting_that_may_change_exists(run: Path) -> None:
    known = flat(make_config(run).model_dump())
    assert known.keys() | {name.partition(".")[0] for name in known} >= FREE
