"""What may change when a run is resumed, and what would make it another experiment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from report_runs import make_config

from megatron_gspo.algorithm.base import make_algorithm
from megatron_gspo.config import RunConfig
from megatron_gspo.config.reference import algorithms_with, settings
from megatron_gspo.data.cursor import PromptCursor
from megatron_gspo.errors import ConfigError, DataError, WeightError
from megatron_gspo.hf.digest import files_digest
from megatron_gspo.megatron import checkpoint_files as files
from megatron_gspo.runs.experiment import RULES, TABLE, contents, flat
from megatron_gspo.runs.resume import CONTENTS, _find
from megatron_gspo.train.progress import Progress, fingerprint

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


def test_every_setting_stands_once_in_the_table(run: Path) -> None:
    """A new setting has no entry, and this fails until somebody has thought about it."""
    named = [name for _, _, names in TABLE for name in names]
    every = [setting.key for section in RunConfig.model_fields for setting in settings(section)]
    assert sorted(named) == sorted(every) == sorted(RULES)
    assert flat(make_config(run).model_dump()).keys() <= RULES.keys()


def other(value: Any, name: str = "") -> Any:
    """Another value of the same kind; ``_find`` validates nothing but that sources are tables."""
    if isinstance(value, list) and name == "data.sources":
        return [*value, {"name": "more", "path": "more.jsonl", "weight": 1.0}]
    return not value if isinstance(value, bool) else value + 1 if isinstance(value, (int, float)) else f"not {value}"


@pytest.mark.parametrize("name", RULES)
def test_each_setting_is_refused_or_noted_as_its_rule_says(run: Path, name: str) -> None:
    """With a cosine schedule and an evaluation, in which everything that may alter a number does."""
    base = make_config(run, optimizer={"schedule": "cosine"}, train={"resume": True})
    section, _, key = name.partition(".")
    then, now = identity(base), identity(base)
    if section == "algorithm":
        for each in (then, now):
            each["config"]["algorithm"] = make_algorithm(algorithms_with(key)[0]).model_dump(mode="json")
    extra = {"outer_step": 4, "optimizer_step": 16, "cursor": {}, **then}
    publish(run, extra)
    now["config"][section][key] = other(now["config"][section][key], name)
    if not RULES[name].alters(flat(extra["config"]), flat(now["config"])):
        assert set(_find(base, now).changes) == {name} - {"train.resume", "train.resume_changes"}
        return
    with pytest.raises(ConfigError, match="cannot be continued") as caught:
        _find(base, now)
    assert f"{name} was" in str(caught.value) and RULES[name].reason in str(caught.value)
    accepted = base.model_copy(update={"train": base.train.model_copy(update={"resume_changes": (name,)})})
    found = _find(accepted, now)
    assert found.accepted == (name,) and f"({RULES[name].reason})" in found.describe()


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("outer_steps", [11, 20])
def test_more_or_fewer_outer_steps_stretch_a_decaying_schedule_and_are_refused(
    run: Path, schedule: str, outer_steps: int
) -> None:
    base = make_config(run, optimizer={"schedule": schedule})
    publish(run, {"outer_step": 4, "optimizer_step": 16, "cursor": {}, **identity(base)})
    sections: dict[str, Any] = {"optimizer": {"schedule": schedule}}
    with pytest.raises(ConfigError, match=rf"outer_steps was 12 and is {outer_steps} \(the schedule decays"):
        resume(run, train={"outer_steps": outer_steps}, **sections)
    accepted = {"outer_steps": outer_steps, "resume_changes": ["train.outer_steps"]}
    assert "every learning rate from here on is another" in resume(run, train=accepted, **sections).describe()


def test_a_default_that_is_written_out_changes_nothing(run: Path) -> None:
    found = resume(run, rollout={"engine_dtype": "float32"}, algorithm={"clip_low": 1e-3, "clip_high": 1.33e-3})
    assert "rollout.engine_dtype" in found.changes and not found.accepted


def test_a_setting_that_the_checkpoints_version_lacked_had_its_default(run: Path) -> None:
    extra = {"outer_step": 4, "optimizer_step": 16, "cursor": {}, **identity(make_config(run))}
    del extra["config"]["sync"]["router_noise"], extra["config"]["rollout"]["on_empty_step"]
    publish(run, extra)
    assert resume(run).changes == {}
    assert resume(run, rollout={"on_empty_step": "skip"}).changes == {"rollout.on_empty_step": ("error", "skip")}
    with pytest.raises(ConfigError, match=r"sync\.router_noise was 0\.0 and is 0\.1"):
        resume(run, sync={"router_noise": 0.1})


def test_a_name_in_resume_changes_that_is_no_setting_is_refused(run: Path) -> None:
    with pytest.raises(ConfigError, match=r'"optimizer\.lrate" is no setting \(did you mean optimizer\.lr\?\)'):
        resume(run, train={"resume_changes": ["optimizer.lrate"]})


@pytest.mark.parametrize("name", ["model.path", "rollout.stop_tokens", "algorithm.reference", "reward.function"])
def test_what_a_setting_names_is_compared_by_its_content(run: Path, name: str) -> None:
    there = {"contents": dict.fromkeys(CONTENTS, "a" * 16)}
    publish(run, {"outer_step": 4, "optimizer_step": 16, "cursor": {}, **identity(make_config(run)), **there})
    assert resume(run, there).changes == {}
    now = {"contents": there["contents"] | {name: "c" * 16}}
    with pytest.raises(
        ConfigError, match=rf"\(of {name}\) is not what it was trained with \(sha256 a{{16}} then, c{{16}}"
    ):
        resume(run, now)
    accepted = resume(run, now, train={"resume_changes": [name]})
    assert accepted.changes == {f"content of {name}": ("a" * 16, "c" * 16)}


def test_a_checkpoint_without_contents_is_resumed(run: Path) -> None:
    """One of a version that did not keep them."""
    assert resume(run, {"contents": {"model.path": "c" * 16}}).changes == {}


def test_an_evaluation_may_be_added_and_its_prompts_may_not_become_others(run: Path) -> None:
    nothing = {"prompts": PROMPTS | {"data.eval_path": fingerprint(())}}
    assert set(resume(run, nothing).changes) == {"content of data.eval_path"}
    others = {"prompts": PROMPTS | {"data.eval_path": "c" * 16}}
    with pytest.raises(ConfigError, match=r"data\.eval_path \(the first eval\.prompts of them\) are others"):
        resume(run, others)


def test_contents_are_those_of_tokenizer_reward_and_reference(tmp_path: Path) -> None:
    model, reward = tmp_path / "model", tmp_path / "reward.py"
    model.mkdir()
    for file, text in (("tokenizer.json", "a"), ("config.json", "{}"), ("model.safetensors", "w")):
        (model / file).write_text(text)
    reward.write_text("def f(prompt, response): return 1.0")

    def hashes(**algorithm: Any) -> dict[str, str]:
        return contents(
            make_config(
                tmp_path / "run",
                model={"path": str(model)},
                reward={"function": f"{reward}:f"},
                algorithm=algorithm,
            )
        )

    first, kl = hashes(), hashes(kl_loss_coef=0.1)
    assert set(first) == {"model.path", "rollout.stop_tokens", "reward.function"} and set(kl) == {
        *first,
        "algorithm.reference",
    }
    for path, changed in ((model / "tokenizer.json", "model.path"), (reward, "reward.function")):
        path.write_text(path.read_text() + " ")
        assert {name for name, value in hashes().items() if value != first[name]} == {changed}
        first = hashes()
    for text, changed in (('{"rope": 1}', set()), ('{"eos_token_id": [0, 3]}', {"rollout.stop_tokens"})):
        (model / "config.json").write_text(text)
        assert {name for name, value in hashes().items() if value != first[name]} == changed
    first = hashes()
    kl = hashes(kl_loss_coef=0.1)
    (model / "model.safetensors").write_text("x")
    assert hashes() == first and hashes(kl_loss_coef=0.1)["algorithm.reference"] != kl["algorithm.reference"]


def test_the_hash_of_a_large_file_sees_its_size_its_ends_and_a_change_everywhere(tmp_path: Path) -> None:
    content = bytearray(9 * 1024**2)
    seen = set()
    for change in (lambda: None, lambda: content.append(0), lambda: content.__setitem__(0, 1)):
        change()
        (tmp_path / "a").write_bytes(content)
        seen.add(files_digest([tmp_path / "a"]))
    content[-1] ^= 1
    (tmp_path / "a").write_bytes(content)
    (tmp_path / "b").write_bytes(bytes(byte ^ 1 for byte in content[: 9 * 1024**2]))
    assert len(seen | {files_digest([tmp_path / "a"]), files_digest([tmp_path / "b"])}) == 5


def test_another_order_of_the_prompts_begins_anew_where_it_was_accepted() -> None:
    before, after = Progress(PromptCursor(8, 0)), Progress(PromptCursor(8, 1))
    before.cursor.take(5)
    before.outer_steps, before.optimizer_steps, before.empty_steps = 2, 7, 1
    with pytest.raises(DataError, match="seed = 0, this run has 1"):
        after.load_state_dict(before.state_dict())
    after.load_state_dict(before.state_dict(), ["train.seed"])
    assert (after.cursor.position, after.outer_steps, after.optimizer_steps, after.empty_steps) == (0, 2, 7, 1)
    same = Progress(PromptCursor(8, 0))
    same.load_state_dict({k: v for k, v in before.state_dict().items() if k != "empty_steps"}, ["train.seed"])
    assert (same.cursor.position, same.empty_steps) == (5, 0), "as a checkpoint of an older version has it"


def test_the_documentation_names_every_setting_that_may_not_change() -> None:
    page = (Path(__file__).parents[2] / "docs" / "resume.md").read_text(encoding="utf-8")
    altering = [name for name, rule in RULES.items() if rule.alters is not RULES["parallel.tensor"].alters]
    assert len(altering) > 30
    assert [name for name in altering if f"`{name}`" not in page] == []


@pytest.mark.parametrize("change", [{"cursor": {}}, {"cursor": None}, {"cursor": [1]}, {"outer_step": ...}])
def test_a_state_that_was_changed_by_hand_is_one_clear_line(change: dict[str, Any]) -> None:
    state = Progress(PromptCursor(8, 0)).state_dict() | change
    state = {name: value for name, value in state.items() if value is not ...}
    with pytest.raises(DataError, match="where the checkpoint's run stood cannot be read"):
        Progress(PromptCursor(8, 0)).load_state_dict(state)
