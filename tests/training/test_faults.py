"""Whole runs that meet a fault on the way: each ends at once, on every rank, with one line and the right class.

The server is a stand-in (stand_in.py): a real one will not lie, die or hang when it is told to.
"""

from __future__ import annotations

import json
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from megatron_gspo.config import load
from megatron_gspo.errors import MegatronGspoError, UserError
from megatron_gspo.megatron import checkpoint_files
from megatron_gspo.report import rundir
from megatron_gspo.report.recorder import RunRecorder
from megatron_gspo.report.status import summarise
from megatron_gspo.runs.loop import train
from tests.pool import RankPool
from tests.training.conftest import QUICKSTART, ROOT
from tests.training.stand_in import StandIn

pytestmark = pytest.mark.timeout(500)
Settings = Callable[..., list[str]]
UNCHECKED = ['sync.verify="off"', "rollout.max_engine_k3=0"]
"""A stand-in draws from no model, and has no weights to hash."""


@pytest.fixture
def settings(overrides: list[str], tmp_path: Path) -> Settings:
    """The cut quickstart against a stand-in, without evaluation, with its weights through files."""

    def make(server: StandIn, *more: str) -> list[str]:
        own = [f'rollout.servers=["{server.url}"]', 'sync.method="disk"', f'sync.directory="{tmp_path}"']
        return [*overrides, *own, "eval.every=0", "train.save_hf=false", "rollout.retries=0", *UNCHECKED, *more]

    return make


def ending(settings: list[str], prepare: Callable[[], Any] = lambda: None) -> str:
    """How a run ends on one rank: the exit status, the class and the line; "finished" for one that does."""
    warnings.simplefilter("ignore")
    prepare()
    try:
        train(load(QUICKSTART / "gspo.toml", settings), RunRecorder)
    except MegatronGspoError as error:
        return f"{2 if isinstance(error, UserError) else 1} {type(error).__name__}: {' '.join(str(error).split())}"
    return "finished"


def endings(ranks: RankPool, settings: list[str], *prepare: Callable[[], Any]) -> str:
    """The ending that both ranks agree on."""
    (said,) = set(ranks.run(2, ending, settings, *prepare))
    assert "Traceback" not in said
    return str(said)


def metrics(tmp_path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]


def test_a_run_against_the_stand_in_finishes(ranks: RankPool, settings: Settings, quickstart: Path) -> None:
    """Else the tests below would show nothing."""
    with StandIn(quickstart / "model") as server:
        assert endings(ranks, settings(server)) == "finished"
        assert server.version.startswith("2-") and server.answered == 2 * 4 * 8


# ------------------------------------------------------------------------------------------------------- the server

LATER = 32
"""Requests to ``/generate`` after which a fault begins: with the second outer step of 4 prompts of 8 responses."""


def from_later_on(change: Callable[[dict[str, Any]], Any]) -> Callable[..., Any]:
    return lambda reply, request, count: reply if count < LATER else change(reply)


def without_stopping(reply: dict[str, Any]) -> dict[str, Any]:
    return reply | {"output_ids": reply["output_ids"] + reply["output_ids"]}


def meta(**changes: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda reply: reply | {"meta_info": reply["meta_info"] | changes}


def first_logprob(value: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def change(reply: dict[str, Any]) -> dict[str, Any]:
        (_, token, text), *others = reply["meta_info"]["output_token_logprobs"]
        return meta(output_token_logprobs=[[value, token, text], *others])(reply)

    return change


GARBAGE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "half a JSON": (lambda reply: json.dumps(reply)[:40].encode(), "EngineReplyError.*broken JSON"),
    "NaN logprobs": (first_logprob(float("nan")), "EngineReplyError.*token 0 .*is nan"),
}
"""What every other lie is called is in tests/rollout/test_replies.py and test_client_faults.py."""


@pytest.mark.parametrize("kind", GARBAGE)
def test_a_server_that_begins_to_answer_garbage_ends_the_run_before_a_step_on_it(
    ranks: RankPool, settings: Settings, quickstart: Path, tmp_path: Path, kind: str
) -> None:
    change, said = GARBAGE[kind]
    with StandIn(quickstart / "model", from_later_on(change)) as server:
        ended = endings(ranks, settings(server))
    assert re.search(rf"^1 {said}", ended), ended
    assert {line["outer_step"] for line in metrics(tmp_path)} == {0}
    assert summarise(tmp_path / "run")["status"] == "failed"


def of_another_model(reply: dict[str, Any]) -> dict[str, Any]:
    """The same tokens, each e^3 times less probable."""
    entries = [[value - 3.0, token, text] for value, token, text in reply["meta_info"]["output_token_logprobs"]]
    return meta(output_token_logprobs=entries)(reply)


def test_an_engine_of_another_model_ends_the_run_before_it_learns(
    ranks: RankPool, settings: Settings, quickstart: Path, tmp_path: Path
) -> None:
    with StandIn(quickstart / "model", lambda reply, request, count: of_another_model(reply)) as server:
        ended = endings(ranks, settings(server, "rollout.max_engine_k3=1"))
    said = r"^1 EngineMismatchError: outer step 1: .*k3 is 1\d nats per token over \d+ tokens"
    assert re.search(said, ended), ended
    assert metrics(tmp_path) == []


@pytest.mark.parametrize("then", ["warn", "stop"])
def test_an_engine_that_becomes_another_one_is_warned_of_or_ends_the_run(
    ranks: RankPool, settings: Settings, quickstart: Path, tmp_path: Path, then: str
) -> None:
    more = ["rollout.max_engine_k3=1", f'rollout.on_engine_drift="{then}"']
    with StandIn(quickstart / "model", from_later_on(of_another_model)) as server:
        ended = endings(ranks, settings(server, *more))
    assert ended == "finished" if then == "warn" else ended.startswith("1 EngineMismatchError: outer step 2: "), ended
    assert {line["outer_step"] for line in metrics(tmp_path)} == ({0, 1} if then == "warn" else {0})


def test_a_server_that_dies_in_the_run_is_named(ranks: RankPool, settings: Settings, quickstart: Path) -> None:
    def die(reply: dict[str, Any], request: dict[str, Any], count: int) -> Any:
        if count >= LATER:
            server.die()
        return reply if count < LATER else None

    with StandIn(quickstart / "model", die) as server:
        ended = endings(ranks, settings(server, "rollout.retries=1", 'rollout.on_server_loss="error"'))
    assert re.search(rf"^1 EngineUnavailableError: {server.url}/generate failed 2 times", ended), ended


def test_a_server_that_hangs_is_given_up(ranks: RankPool, settings: Settings, quickstart: Path) -> None:
    with StandIn(quickstart / "model", lambda reply, request, count: time.sleep(300)) as server:
        ended = endings(ranks, settings(server, "rollout.timeout_s=0.5", "rollout.wait_for_servers_s=0"))
    said = r"^1 EngineUnavailableError: no rollout server is left \(.* did not answer within rollout.timeout_s = 0.5 s"
    assert re.search(said + r".*; nothing is done yet that could be saved", ended), ended


def test_a_server_of_another_model_is_refused_with_both_values(
    ranks: RankPool, settings: Settings, quickstart: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    config = json.loads((quickstart / "model" / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 6}))
    with StandIn(other) as server:
        ended = endings(ranks, settings(server))
    assert re.search(r"^2 ConfigError: .* holds another model .*num_hidden_layers = 6, model.path has 4", ended), ended
    assert server.answered == 0


def aborted(reply: dict[str, Any]) -> dict[str, Any]:
    nothing = meta(finish_reason={"type": "abort"}, completion_tokens=0, output_token_logprobs=[])
    return nothing(reply | {"output_ids": []})


def truncated(reply: dict[str, Any]) -> dict[str, Any]:
    ids = [1] * 16
    logprobs = [[-1.0, token, None] for token in ids]
    whole = meta(output_token_logprobs=logprobs, completion_tokens=16, finish_reason={"type": "length", "length": 16})
    return whole(reply | {"output_ids": ids})


@pytest.mark.parametrize("fail", [aborted, truncated])
def test_when_all_responses_of_a_step_fail_the_run_ends_and_counts_them_by_kind(
    ranks: RankPool, settings: Settings, quickstart: Path, fail: Callable[[dict[str, Any]], Any]
) -> None:
    with StandIn(quickstart / "model", from_later_on(fail)) as server:
        ended = endings(ranks, settings(server, 'rollout.on_truncated="drop"'))
    counts = f"32 responses, 32 {fail.__name__}, 4 groups"
    hint = '(rollout.on_empty_step = "skip" would go on with the next prompts)'
    assert ended == f"1 RolloutError: outer step 2: no group has two responses left; dropped: {counts} {hint}"


def failing_in(*versions: str) -> Callable[..., Any]:
    """Every response of the outer steps of those weight versions is aborted."""

    def answer(reply: dict[str, Any], request: dict[str, Any], count: int) -> Any:
        return aborted(reply) if reply["meta_info"]["weight_version"].split("-")[0] in versions else reply

    return answer


def weights_and_lines(run: Path) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """Hashes of the last checkpoint's tensors, and the metrics without clocks."""
    last = checkpoint_files.latest_in(run / "checkpoints")
    assert last is not None
    hashes = {entry["name"]: entry["sha256"] for entry in checkpoint_files.read_header(last)["files"]}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    clocks = ("time/", "tokens_per_s")
    return (
        {name: value for name, value in hashes.items() if name.endswith(".distcp")},
        [{name: value for name, value in line.items() if not name.startswith(clocks)} for line in lines],
    )


def test_an_empty_step_is_skipped_where_that_is_asked_for_and_a_resumed_run_is_the_one_that_was_not(
    ranks: RankPool, settings: Settings, quickstart: Path, tmp_path: Path
) -> None:
    """Outer steps 1 and 2 of 4 have nothing; the run that is resumed was cut between them."""
    more = ['rollout.on_empty_step="skip"', "train.outer_steps=4", "train.checkpoint_every=2", "train.keep_last=9"]
    with StandIn(quickstart / "model", failing_in("1", "2")) as server:
        assert endings(ranks, settings(server, *more)) == "finished"
        weights, lines = weights_and_lines(tmp_path / "run")
        assert [(line["outer_step"], line["step"], line["step/skipped"]) for line in lines] == [
            (0, 0, 0.0), (0, 1, 0.0), (1, 2, 1.0), (2, 2, 1.0), (3, 2, 0.0), (3, 3, 0.0),
        ]  # fmt: skip
        assert (lines[2]["dropped/aborted"], "loss" in lines[2]) == (32.0, False)
        header = checkpoint_files.read_header(tmp_path / "run" / "checkpoints" / "outer_00002")
        assert (header["extra"]["optimizer_step"], header["extra"]["empty_steps"]) == (2, 1)
        (tmp_path / "run" / "checkpoints" / "latest").write_text("outer_00002\n")
        assert endings(ranks, settings(server, *more, "train.resume=true", "train.overwrite=false")) == "finished"
        assert weights_and_lines(tmp_path / "run") == (weights, lines)
        most = [*more, "train.overwrite=true", "rollout.max_empty_steps=2"]
        ended = endings(ranks, settings(server, *most))
    assert ended == (
        "1 RolloutError: outer step 3: no group has two responses left; dropped: 32 responses, 32 aborted, 4 groups, "
        "as in the 2 outer steps up to here (rollout.max_empty_steps = 2)"
    )
    assert len(metrics(tmp_path)) == 4


def test_some_failing_responses_are_dropped_and_counted_by_kind(
    ranks: RankPool, settings: Settings, quickstart: Path, tmp_path: Path
) -> None:
    """Every eighth request is aborted: what is left of its group is trained on."""

    def abort(reply: dict[str, Any], request: dict[str, Any], count: int) -> Any:
        return reply if count % 8 else aborted(reply)

    with StandIn(quickstart / "model", abort) as server:
        assert endings(ranks, settings(server)) == "finished"
    for line in metrics(tmp_path):
        assert (line["dropped/responses"], line["dropped/aborted"], line["dropped/groups"]) == (4, 4, 0)


# ------------------------------------------------------------------------------------------------ rewards and disks


def reward(name: str) -> str:
    return f'reward.function="{Path(__file__).with_name("rewards.py")}:{name}"'


def test_a_process_whose_reward_hangs_ends_with_one_line(settings: Settings, quickstart: Path, tmp_path: Path) -> None:
    """A thread cannot be killed; it must not keep the process either. (A reward outside [0, 1]: test_runs.py.)"""
    with StandIn(quickstart / "model") as server:
        own = settings(server, reward("sleeps"), "reward.timeout_s=0.5", "parallel.tensor=1", "parallel.expert=1")
        command = [sys.executable, "-m", "megatron_gspo.cli", "train", str(QUICKSTART / "gspo.toml"), *own]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT, env=environment)
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert len(errors) == 1 and "gave no answer within 0.5 s" in errors[0]
    assert "Traceback" not in done.stderr


def with_bad_references(quickstart: Path, tmp_path: Path, *lines: int) -> str:
    """The training prompts, 16 of them, with answers in these lines that the reward refuses."""
    rows = [json.loads(row) for row in (quickstart / "train.jsonl").read_text().splitlines()[:16]]
    for line in lines:
        rows[line - 1]["answer"] = "none"
    (tmp_path / "bad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f'data.path="{tmp_path}/bad.jsonl"'


def test_a_reference_that_the_reward_refuses_is_skipped_or_ends_the_run_before_it_begins(
    ranks: RankPool, settings: Settings, quickstart: Path, tmp_path: Path
) -> None:
    more = [with_bad_references(quickstart, tmp_path, 5, 13), reward("share_of_even_tokens_of_an_answer")]
    with StandIn(quickstart / "model") as server:
        said = endings(ranks, settings(server, *more))
        assert re.search(r"^2 DataError: .*bad.jsonl, line 5: the reference answer cannot be graded.*line-5", said)
        assert server.answered == 0 and not (tmp_path / "run").exists()
        assert endings(ranks, settings(server, *more, "data.skip_bad=true", "train.outer_steps=4")) == "finished"
    assert sum(line["data/skipped"] for line in metrics(tmp_path) if line["minibatch"] == 0) == 2
    responses = [json.loads(line) for path in (tmp_path / "run" / "rollouts").iterdir() for line in path.open()]
    assert responses and not {"line-5", "line-13"} & {response["prompt_id"] for response in responses}


def fill_the_disk_under_metrics() -> None:
    """The kernel's own "no space left", at the first line."""

    def on_full(self: Any, path: Path) -> None:
        self._file = open("/dev/full", "a")  # noqa: SIM115

    rundir.MetricsWriter.__init__ = on_full  # type: ignore[method-assign]  # in a forked rank, which ends with the call


def forbid_large_files() -> None:
    """Files end at 100 kB: metrics fit, and a rank's share of a checkpoint (2.7 MB) does not."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


def test_a_disk_that_is_full_when_metrics_are_written_ends_the_run(
    ranks: RankPool, settings: Settings, quickstart: Path
) -> None:
    with StandIn(quickstart / "model") as server:
        ended = endings(ranks, settings(server), fill_the_disk_under_metrics)
    said = r"^1 WriteError: .*/run: what the run records cannot be written: .*No space left on device \(.* free at .*\)"
    assert re.search(said + ": make room, then train.resume = true continues", ended), ended


def test_a_disk_that_is_full_when_a_checkpoint_is_saved_ends_the_run_and_leaves_no_half_one(
    ranks: RankPool, settings: Settings, quickstart: Path, tmp_path: Path
) -> None:
    """Weights go over HTTP, so that the checkpoint is the first large file; an export is on its way in a thread."""
    more = ('sync.method="tensor"', "train.checkpoint_every=1", "train.save_hf_every=1")
    with StandIn(quickstart / "model") as server:
        ended = endings(ranks, settings(server, *more), forbid_large_files)
    said = r"^1 WriteError: .*outer_00001: the (checkpoint|export) cannot be written: .*File too large"
    assert re.search(said, ended), ended
    assert not [*(tmp_path / "run" / "checkpoints").iterdir(), *(tmp_path / "run" / "exports").iterdir()]
    assert {line["outer_step"] for line in metrics(tmp_path)} == {0}


def test_a_checkpoint_that_was_altered_is_not_resumed_from(
    ranks: RankPool, settings: Settings, quickstart: Path, tmp_path: Path
) -> None:
    with StandIn(quickstart / "model") as server:
        assert endings(ranks, settings(server, "train.outer_steps=1")) == "finished"
        directory = tmp_path / "run" / "checkpoints" / "outer_00001"
        shard = max(directory.glob("*.distcp"), key=lambda path: path.stat().st_size)
        content = bytearray(shard.read_bytes())
        content[random.Random(0).randrange(len(content))] ^= 1
        shard.write_bytes(content)
        resumed = settings(server, "train.resume=true", "train.overwrite=false")
        ended = endings(ranks, resumed)
    assert re.search(rf"^2 WeightError: .*outer_00001: the checkpoint is damaged: {shard.name}: it was altered", ended)
    assert len(metrics(tmp_path)) == 2
    assert checkpoint_files.latest_in(directory.parent) == directory


# --------------------------------------------------------------------------------------------------- prompts, models


def test_a_prompt_of_two_epochs_in_one_step_is_answered_anew(
    ranks: RankPool, settings: Settings, quickstart: Path, tmp_path: Path
) -> None:
    """Five prompts, four a step: the second step holds one of the first epoch and three of the next one."""
    seeds: dict[str, list[int]] = {}

    def note(reply: dict[str, Any], request: dict[str, Any], count: int) -> Any:
        seeds.setdefault(str(request["input_ids"]), []).append(request["sampling_params"]["sampling_seed"])
        return reply

    with StandIn(quickstart / "model", note) as server:
        more = ["data.limit=5", "train.outer_steps=4", "train.minibatches=1", "train.noise_floor_every=0"]
        assert endings(ranks, settings(server, *more)) == "finished"
    drawn = [seed for of_prompt in seeds.values() for seed in of_prompt]
    assert len(seeds) == 5 and len(drawn) == 4 * 4 * 8
    assert len(set(drawn)) == len(drawn)


def test_a_reference_that_is_missing_or_of_another_vocabulary_names_its_setting(
    ranks: RankPool, settings: Settings, quickstart: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    with StandIn(quickstart / "model") as server:
        kl = settings(server, "algorithm.kl_loss_coef=0.1", f'algorithm.reference="{other}"')
        assert f"2 ConfigError: algorithm.reference: {other}/config.json: not found" in endings(ranks, kl)
        shutil.copytree(quickstart / "model", other)
        config = json.loads((other / "config.json").read_text())
        (other / "config.json").write_text(json.dumps(config | {"vocab_size": 14}))
        assert "has a vocabulary of 14, model.path one of 13" in endings(ranks, kl)


def test_responses_that_outgrow_the_models_positions_are_refused(
    ranks: RankPool, settings: Settings, quickstart: Path
) -> None:
    with StandIn(quickstart / "model") as server:
        ended = endings(ranks, settings(server, "rollout.max_response_tokens=52"))
    assert "13 + max_response_tokens 52 = 65, above max_position_embeddings = 64" in ended


def test_a_tokenizer_of_another_model_is_refused(
    ranks: RankPool, settings: Settings, quickstart: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(quickstart / "model", tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"vocab_size": 9}))
    with StandIn(model) as server:
        ended = endings(ranks, settings(server, f'model.path="{model}"'))
    assert re.search(r"^2 DataError: .*highest id is 12, but config.vocab_size = 9 .*another model's tokenizer", ended)


def test_rewards_a_token_under_gspo_are_warned_of_once(settings: Settings) -> None:
    from megatron_gspo.train import collect

    collect.warn_once.cache_clear()
    with mock.patch("builtins.print") as printed:
        for _ in range(3):
            collect.warn_once("reward x gives one value a token")
    assert printed.call_count == 1
