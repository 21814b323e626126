"""``eval``: what its arguments name, and what it refuses before anything is started."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import get_args
from unittest import mock

import numpy as np
import pytest
from report_runs import make_config

from megatron_gspo.cli import main
from megatron_gspo.commands.eval import FORMATS
from megatron_gspo.config import DataConfig
from megatron_gspo.errors import ConfigError, EngineUnavailableError, RewardError
from megatron_gspo.evaluation.examine import check_served, read_questions
from megatron_gspo.evaluation.lengths import fitting
from megatron_gspo.evaluation.subject import Subject, of_model, of_run
from megatron_gspo.report.evaluation import fingerprint, statistics
from megatron_gspo.report.evaluation_files import EvaluationDirectory, restored
from megatron_gspo.report.rundir import RunDirectory
from megatron_gspo.rewards.registry import Reward
from megatron_gspo.rollout.sglang.probe import ServerState
from megatron_gspo.train.grade import Graded, evaluation_sampling, grade
from megatron_gspo.types import FinishReason, Prompt, Rollout
from tests.unit.doctor_cases import prepare

Captured = pytest.CaptureFixture[str]


def refusal(capsys: Captured, *arguments: object) -> str:
    assert main(["eval", *map(str, arguments)]) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert not captured.out
    return line


def hf_directory(path: Path, **settings: object) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(settings))
    return path


def run_with(path: Path, *checkpoints: str, latest: str = "", status: str = "finished") -> RunDirectory:
    """A run directory without weights."""
    run = RunDirectory.create(make_config(path))
    run.write_manifest({"status": status})
    hf_directory(path / "hf")
    for name in checkpoints:
        (run.checkpoints / name).mkdir()
        (run.checkpoints / name / "checkpoint.json").touch()
    if latest:
        (run.checkpoints / "latest").write_text(f"{latest}\n")
    return run


def make_rollout(tokens: int, finish: FinishReason = "stop", sample: int = 0) -> Rollout:
    prompt = Prompt("p", "1+1=", (1,), "2")
    ids, logprobs = np.full(tokens, 3, dtype=np.int32), np.zeros(tokens, dtype=np.float32)
    return Rollout(prompt, sample, ids, logprobs, finish, (0,), text="2\u2028")


def test_a_bare_model_needs_prompts_and_a_reward(tmp_path: Path, capsys: Captured) -> None:
    model = hf_directory(tmp_path / "model")
    expected = f"error: {model} is a Hugging Face directory: it needs --prompts FILE and --reward NAME, or --suite"
    assert refusal(capsys, model) == refusal(capsys, model, "--prompts", "a.jsonl") == expected


def test_what_is_nothing_that_can_be_evaluated_is_said(tmp_path: Path, capsys: Captured) -> None:
    assert refusal(capsys, tmp_path / "none").endswith("none: no such configuration, run or Hugging Face directory")
    assert "neither a run (config.toml) nor a Hugging Face directory (config.json)" in refusal(capsys, tmp_path)
    assert "is no run directory, which has checkpoints" in refusal(
        capsys, hf_directory(tmp_path / "m"), "--checkpoint", "a"
    )


def test_an_option_out_of_range_is_the_setting_that_it_stands_for(tmp_path: Path, capsys: Captured) -> None:
    run = run_with(tmp_path / "run").path
    assert "eval.prompts = 0: " in refusal(capsys, run, "--limit", "0")
    assert "rollout.temperature = 0.0: " in refusal(capsys, run, "--temperature", "0")
    assert "eval.samples = 'many': " in refusal(capsys, run, "eval.samples=many")
    assert "--samples 4 with --greedy" in refusal(capsys, run, "--samples", "4", "--greedy")


def test_settings_may_stand_behind_options_and_nothing_else_may(tmp_path: Path, capsys: Captured) -> None:
    run = run_with(tmp_path / "run").path
    assert "unknown setting eval.smaples" in refusal(capsys, run, "--samples", "2", "eval.smaples=3")
    with pytest.raises(SystemExit, match="2"):
        main(["eval", str(run), "--samples", "2", "--smaples=3"])


def test_a_finished_run_is_its_hugging_face_directory_and_one_that_is_not_its_latest_checkpoint(tmp_path: Path) -> None:
    finished = run_with(tmp_path / "finished", "outer_00009").path
    assert of_run(finished, [], checkpoint=None, finished=True).model == finished / "hf"
    going = run_with(tmp_path / "going", "outer_00009", "outer_00010", latest="outer_00009", status="running").path
    subject = of_run(going, [], checkpoint=None, finished=False)
    assert (subject.model, subject.checkpoint) == (None, going / "checkpoints" / "outer_00009")
    assert of_run(going, [], checkpoint="outer_00010", finished=True).checkpoint == going / "checkpoints/outer_00010"
    (going / "checkpoints" / "latest").unlink()
    assert of_run(going, [], checkpoint="latest", finished=True).checkpoint == going / "checkpoints/outer_00010"


def test_a_checkpoint_that_is_not_there_is_named_with_those_that_are(tmp_path: Path, capsys: Captured) -> None:
    run = run_with(tmp_path / "run", "outer_00001", "outer_00002", "outer_00003.unfinished").path
    line = refusal(capsys, run, "--checkpoint", "outer_00003")
    assert line.endswith("no checkpoint 'outer_00003' (there: outer_00001, outer_00002)")
    assert "no checkpoint '../hf'" in refusal(capsys, run, "--checkpoint", "../hf")


def test_servers_of_a_reward_that_is_not_asked_are_neither_started_nor_a_mistake(tmp_path: Path) -> None:
    """A run with a judge of its own, asked with another reward, and with suites, which have theirs."""
    run = run_with(tmp_path / "run").path
    own = ['reward_server.model="judge"', 'reward_server.kind="judge"', 'reward.function="judge"', "reward.options={}"]

    def served(*overrides: str, suites: bool = False) -> str:
        subject = of_run(run, [*own, *overrides], checkpoint=None, finished=True, suites=suites)
        return subject.config.reward_server.model

    assert served() == "judge" and served(suites=True) == ""
    assert served('reward.function="gsm8k"') == "" and served('reward.function="mine.py:reward"') == "judge"


def test_a_longer_response_than_training_packs_and_prompts_within_the_run_are_no_mistake(tmp_path: Path) -> None:
    run = run_with(tmp_path / "run").path
    overrides = ["rollout.max_response_tokens=100_000", f'data.eval_path="{run}/mine.jsonl"']
    config = of_run(run, overrides, checkpoint=None, finished=True).config
    assert config.rollout.max_response_tokens == 100_000


@pytest.mark.parametrize(
    ("stored", "dtype"), [({"dtype": "bfloat16"}, "bfloat16"), ({"torch_dtype": "float16"}, "float32"), ({}, "float32")]
)
def test_a_bare_model_is_served_in_its_own_dtype(tmp_path: Path, stored: dict[str, str], dtype: str) -> None:
    model = hf_directory(tmp_path / "model", **stored)
    subject = of_model(model, ['data.eval_path="a.jsonl"', 'reward.function="exact"'])
    assert subject.config.model.dtype == dtype


def test_servers_must_hold_what_is_evaluated(tmp_path: Path) -> None:
    model, other = hf_directory(tmp_path / "model"), hf_directory(tmp_path / "other")
    assert check_served([ServerState("http://a", None, str(model), "0")], model) is None
    note = check_served([ServerState("http://a", None, "/elsewhere/model", "0")], model)
    assert note is not None and "was not checked" in note
    for state in (
        ServerState("http://a", None, str(other), "0"),
        ServerState("http://a", None, str(model), "5"),
        ServerState("http://a", None, str(model), "default"),
    ):
        with pytest.raises(ConfigError, match=r"http://a serves .* or let one be started: rollout.servers=\[\]"):
            check_served([ServerState("http://b", None, str(model), "0"), state], model)
    with pytest.raises(EngineUnavailableError, match="http://a cannot be asked what it serves: refused"):
        check_served([ServerState("http://a", "refused")], model)


def test_a_directory_with_other_files_is_not_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="exists and is not an empty directory"):
        EvaluationDirectory(tmp_path, {})
    begun = tmp_path / "begun"
    with EvaluationDirectory(begun, {"k": 1}) as out:
        out.drawn([make_rollout(2)])
    (begun / "mine.txt").write_text("")
    with pytest.raises(ConfigError, match=r"holds mine.txt, which is no part of an evaluation"):
        EvaluationDirectory(begun, {"k": 1})


def test_an_early_failure_leaves_nothing_and_a_late_one_what_had_arrived(tmp_path: Path) -> None:
    with pytest.raises(RewardError, match="jammed"), EvaluationDirectory(tmp_path / "early", {}):
        raise RewardError("jammed")
    assert not (tmp_path / "early").exists()

    def draw_and_fail() -> None:
        with EvaluationDirectory(tmp_path / "late", {"k": 1}) as out:
            out.drawn([make_rollout(2)])
            raise RewardError("jammed")

    with pytest.raises(RewardError, match=r"jammed \(no result; the 1 responses that had arrived are in .*late, and"):
        draw_and_fail()
    line = (tmp_path / "late/responses.jsonl").read_text().removesuffix("\n")
    kept = {"token_ids": [3, 3], "finish_reason": "stop", "text": "2\u2028"}
    assert json.loads(line) == {"prompt_id": "p", "samples": [kept]}


def test_an_evaluation_takes_up_what_was_whole_and_no_other_one_s(tmp_path: Path) -> None:
    with EvaluationDirectory(tmp_path / "out", {"k": 2, "model": {"sha256": "a"}}) as out:
        out.drawn([make_rollout(2, sample=0), make_rollout(0, "abort", sample=1)])
        out.judged(Graded(make_rollout(2).prompt, (make_rollout(2), make_rollout(0, "abort", 1)), np.array([1.0, 0.0])))
    with (tmp_path / "out/responses.jsonl").open("a") as file:
        file.write('{"prompt_id": "q", "samp')
    again = EvaluationDirectory(tmp_path / "out", {"model": {"sha256": "a"}, "k": 2})
    prompt = make_rollout(1).prompt
    group = restored(again.before, prompt, 2)
    assert group is not None and [rollout.finish_reason for rollout in group] == ["stop", "abort"]
    assert group[0].response_ids.tolist() == [3, 3] and np.isnan(group[0].rollout_logprobs).all()
    assert (
        again.before.verdicts == {"p": [{"reward": 1.0}, {"reward": 0.0}]} and restored(again.before, prompt, 3) is None
    )
    with pytest.raises(ConfigError, match=r"being written by another process"):
        EvaluationDirectory(tmp_path / "out", {"k": 2, "model": {"sha256": "a"}})
    again.close()
    with pytest.raises(ConfigError, match=r"was begun otherwise \(k, model.sha256\): name another"):
        EvaluationDirectory(tmp_path / "out", {"k": 1, "model": {"sha256": "b"}})
    with EvaluationDirectory(tmp_path / "out", {"k": 2, "model": {"sha256": "a"}}) as out:
        out.finish([Graded(prompt, tuple(group), np.array([1.0, np.nan]))], {"result": 1}, {"seconds": 2.0})
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *("clock.json", "result.json", "samples.jsonl", "settings.json"),
    ]
    assert json.loads((tmp_path / "out/clock.json").read_text()) == {"seconds": 2.0, "starts": 3}
    with pytest.raises(ConfigError, match="holds an evaluation that is done: name another"):
        EvaluationDirectory(tmp_path / "out", {"k": 2, "model": {"sha256": "a"}})


def test_what_the_server_gave_up_on_is_wrong_and_no_reward_is_asked(tmp_path: Path) -> None:
    group = [make_rollout(2, "stop", 0), make_rollout(0, "abort", 1), make_rollout(3, "abort", 2)]
    engine = mock.MagicMock(rollout_groups=mock.AsyncMock(return_value=[group, group[1:], group[:1]]))
    asked = []

    def reward(prompt: Prompt, response: Rollout) -> float:
        asked.append(response.sample)
        return 1.0

    sampling = evaluation_sampling(make_config(tmp_path), (0,), seeded=False)
    prompts = [group[0].prompt] * 3
    graded = asyncio.run(grade(engine, Reward("always", reward), prompts, sampling, weight_version=0))
    assert [answers.rewards_K.tolist() for answers in graded] == [[1.0, 0.0, 0.0], [0.0, 0.0], [1.0]]
    assert asked == [0, 0]


def test_evaluation_draws_with_seeds_of_its_own_that_never_change(tmp_path: Path) -> None:
    config = make_config(tmp_path, eval={"samples": 4}, train={"seed": 7})
    sampled = evaluation_sampling(config, (0,), seeded=True)
    assert (sampled.seed, sampled.outer_step, sampled.group_size, sampled.greedy) == (7, -1, 4, False)
    greedy = evaluation_sampling(config, (0,), seeded=True, greedy=True)
    assert (greedy.group_size, greedy.greedy) == (1, True)


def test_truncated_and_aborted_responses_are_counted(tmp_path: Path) -> None:
    group = [make_rollout(4, "length", 0), make_rollout(2, "stop", 1), make_rollout(0, "abort", 2)]
    rewards = ([0.0, 1.0, 0.0], [1.0, 1.0, 0.0])
    found = statistics([Graded(group[0].prompt, tuple(group), np.array(rewards_K)) for rewards_K in rewards])
    assert (found["prompts"], found["samples"], found["aborted"]) == (2, 3, 2)
    assert found["truncated"] == pytest.approx(1 / 3)
    assert found["tokens"] == {"mean": 2.0, "median": 2.0, "max": 4}
    assert found["estimates"]["accuracy"]["value"] == pytest.approx(0.5)


def test_a_model_is_known_by_every_byte_of_its_weights(tmp_path: Path) -> None:
    model = hf_directory(tmp_path / "model")
    (model / "model.safetensors").write_bytes(bytes(1000))
    before = fingerprint(model)
    assert (before["files"], before["bytes"]) == (2, 1002)
    (model / "notes.txt").write_text("no weights")
    assert fingerprint(model) == before
    (model / "model.safetensors").write_bytes(bytes(500) + b"\1" + bytes(499))
    assert fingerprint(model)["sha256"] != before["sha256"]


# --------------------------------------------------------------------------------------------- limits that fit


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 64 positions, and prompts of 13 tokens, the last one of 20."""
    directory = tmp_path_factory.mktemp("tiny")
    prepare().write_model(directory / "model", seed=0)
    rows = [{"prompt": f"{number:012d}=", "answer": "1"} for number in range(8)] + [{"prompt": "1" * 20, "answer": "1"}]
    (directory / "held-out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


def subject_of(tiny: Path, *more: str) -> Subject:
    asked = [f'data.eval_path="{tiny}/held-out.jsonl"', 'reward.function="exact"', *more]
    return fitting(of_model(tiny / "model", asked))


def lengths(subject: Subject) -> tuple[int, int]:
    """The limits, as the servers and the questions have them."""
    questions = read_questions(subject, greedy=False)
    rollout = subject.config.rollout
    assert questions.sampling.max_tokens == rollout.max_response_tokens
    return rollout.max_prompt_tokens, rollout.max_response_tokens


def test_a_bare_model_gets_limits_that_fit_it_and_its_prompts(tiny: Path) -> None:
    """The defaults, 1,024 and 1,024, are no more than numbers; SGLang keeps two of a model's positions."""
    assert lengths(subject_of(tiny)) == (20, 64 - 20 - 2)
    assert lengths(subject_of(tiny, "eval.prompts=8")) == (13, 64 - 13 - 2)
    assert lengths(subject_of(tiny, "rollout.max_response_tokens=7")) == (20, 7)
    assert lengths(subject_of(tiny, "rollout.max_prompt_tokens=30")) == (30, 64 - 20 - 2)
    config = json.loads((tiny / "model" / "config.json").read_text())
    for positions, room in ((100_000, 1024), (1000, 1000 - 20 - 2)):
        (tiny / "model" / "config.json").write_text(json.dumps(config | {"max_position_embeddings": positions}))
        assert lengths(subject_of(tiny)) == (20, room), "no more than the default"
    (tiny / "model" / "config.json").write_text(json.dumps(config))


def test_limits_that_do_not_fit_are_refused_with_what_would(tiny: Path, capsys: Captured) -> None:
    arguments = [tiny / "model", "--prompts", tiny / "held-out.jsonl", "--reward", "exact"]
    line = refusal(capsys, *arguments, "--max-tokens", "43")
    assert "rollout.max_response_tokens = 43 (--max-tokens): the longest prompt of " in line
    assert line.endswith("has 20 tokens, and max_position_embeddings = 64, of which sglang keeps 2: at most 42")
    (tiny / "long.jsonl").write_text(json.dumps({"prompt": "1" * 70, "answer": "1"}) + "\n")
    line = refusal(capsys, tiny / "model", "--prompts", tiny / "long.jsonl", "--reward", "exact")
    assert "its longest prompt has 70 tokens" in line and "nothing is left for a response" in line
    assert line.endswith("rollout.max_prompt_tokens=31 with data.skip_bad=true would leave longer prompts out")


def test_the_way_out_that_a_refusal_names_is_one(tiny: Path) -> None:
    rows = [{"prompt": "1" * length, "answer": "1"} for length in (70, 12, 31)]
    (tiny / "mixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = [f'data.eval_path="{tiny}/mixed.jsonl"', "rollout.max_prompt_tokens=31", "data.skip_bad=true"]
    subject = subject_of(tiny, *more)
    assert len(read_questions(subject, greedy=False).prompts) == 2
    assert lengths(subject) == (31, 64 - 31 - 2)


def test_a_configuration_keeps_its_own_limits(tmp_path: Path) -> None:
    run = run_with(tmp_path / "run").path
    subject = of_run(run, [], checkpoint=None, finished=True)
    assert subject.open_limits == frozenset() and fitting(subject) is subject


def test_every_format_of_prompt_files_can_be_named() -> None:
    assert get_args(DataConfig.model_fields["format"].annotation) == FORMATS
