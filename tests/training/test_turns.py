"""Trainer and servers in turns: the order of calls, every call that fails once, and what is left behind."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_gspo.config import RolloutConfig, SyncConfig
from megatron_gspo.errors import ConfigError, EngineUnavailableError, MegatronGspoError, RolloutError, SyncError
from megatron_gspo.rollout.engine import Sampling, make_control, make_engine
from megatron_gspo.runs.loop import with_advice
from megatron_gspo.sync.base import make_weight_sync
from megatron_gspo.sync.peers import Peers
from megatron_gspo.train.models import check_served
from megatron_gspo.train.turns import Apart, Colocated
from megatron_gspo.types import Prompt, ServerAccess
from tests.training.sleeper import Sleeper
from tests.training.stand_in import VOCABULARY

ACCESS = ServerAccess(run="ab12")
SLEEP = [
    *("/pause_generation", "/flush_cache", "/update_weight_version"),
    *("/release_memory_occupation kv_cache+weights", "/update_weight_version"),
]
WAKE = ["/update_weight_version", "/resume_memory_occupation weights"]
PUSH = [
    *("/flush_cache", "/update_weight_version", "/begin_weight_update", "/update_weights_from_tensor"),
    *("/end_weight_update", "/flush_cache", "/update_weight_version"),
]
SERVE = [
    *("/update_weight_version", "/resume_memory_occupation kv_cache", "/flush_cache"),
    *("/update_weight_version", "/continue_generation"),
]
QUESTIONS = ("/server_info", "/model_info")
CALLS = 56
"""Of a run of one step, with questions: the order above, which the next step repeats."""


class Model:
    """Of a trainer: it computes only with its states, and only while the servers sleep."""

    def __init__(self, server: Sleeper) -> None:
        self.server, self.states = server, True

    def park(self) -> None:
        self.states = False

    def unpark(self) -> None:
        assert not self.server.awake, "the card is full"
        self.states = True

    def learn(self) -> None:
        assert self.states and not self.server.awake


class Trainer:
    """The outer loop's calls, as ``test_a_run_keeps_this_order`` sees them in a run."""

    def __init__(self, server: Sleeper, tmp_path: Path) -> None:
        self.server, self.model = server, Model(server)
        self.turns = Colocated(make_control("sglang", [server.url], 5.0))
        self.sync = make_weight_sync(
            SyncConfig(method="tensor", verify="off"),
            [server.url],
            Peers(),
            model_path=tmp_path,
            expected_names=["w"],
            access=ACCESS,
        )
        self.drawn: list[int] = []
        """Version that each response says it is of."""

    def run(self, steps: int = 2, skipped: tuple[int, ...] = ()) -> None:
        self.turns.begin()
        self.push(0)
        self.generate(0)  # an evaluation
        for number in range(steps):
            self.generate(number)
            if number not in skipped:
                self.turns.train([self.model])
                self.model.learn()
            self.push(number + 1)
            self.generate(number + 1)

    def push(self, version: int) -> None:
        self.turns.update([self.model])
        assert not self.model.states
        self.sync.push(iter([("w", torch.full((3,), float(version)))]), version)
        self.turns.serve(ACCESS.version_name(version))

    def generate(self, version: int) -> None:
        engine = make_engine([self.server.url], RolloutConfig(retries=0), vocab_size=VOCABULARY, access=ACCESS)
        sampling = Sampling(group_size=2, temperature=1.0, max_tokens=2, stop_token_ids=(0,), seed=1)

        async def draw() -> list[Any]:
            async with engine:
                return await engine.rollout_groups([Prompt("p", "", (1, 2), "")], sampling, weight_version=version)

        for rollout in asyncio.run(draw())[0]:
            assert rollout.weight_versions == (version,)
            self.drawn.append(version)


def orders(server: Sleeper) -> list[str]:
    return [path for path in server.calls if path not in QUESTIONS]


def test_two_steps_are_asked_in_this_order(tmp_path: Path) -> None:
    with Sleeper(tmp_path) as server:
        trainer = Trainer(server, tmp_path)
        trainer.run()
    turn = [*SLEEP, *WAKE, *PUSH, *SERVE, "/generate"]
    assert orders(server) == [*turn, "/generate", *turn, "/generate", *turn]
    assert server.wrongs == [] and server.version == "2-ab12" and server.received["w"][0] == 2.0
    assert trainer.drawn == [0] * 4 + [1] * 4 + [2] * 2


def test_a_step_without_training_leaves_servers_awake_and_they_are_pushed_to_as_they_are(tmp_path: Path) -> None:
    with Sleeper(tmp_path) as server:
        Trainer(server, tmp_path).run(steps=1, skipped=(0,))
    begin = [*SLEEP, *WAKE, *PUSH, *SERVE, "/generate"]
    assert orders(server) == [*begin, "/generate", *PUSH, "/generate"]
    assert server.wrongs == []


def test_a_run_of_one_step_makes_as_many_calls_as_are_made_to_fail_below(tmp_path: Path) -> None:
    with Sleeper(tmp_path) as server:
        Trainer(server, tmp_path).run(steps=1)
    assert len(server.calls) == CALLS


def ends(trainer: Trainer) -> bool:
    """Whether a run of one step ends with an error of ours."""
    try:
        trainer.run(steps=1)
    except (SyncError, RolloutError):
        return True
    return False


@pytest.mark.parametrize("how", ["refused", "unheard", "unsaid"])
@pytest.mark.parametrize("number", range(CALLS))
def test_a_call_that_fails_ends_the_run_and_no_server_answers_with_other_weights(
    number: int, how: str, tmp_path: Path
) -> None:
    with Sleeper(tmp_path, fault=(number, how)) as server:
        trainer = Trainer(server, tmp_path)
        if not ends(trainer):
            assert server.calls[number : number + 2] == ["/server_info"] * 2, "a question is asked again"
            return
        with pytest.raises(SyncError):  # whoever caught it asks for nothing more that could kill a server
            trainer.run(steps=1)
        for version in range(3):
            try:
                trainer.generate(version)
            except MegatronGspoError:
                continue
            assert server.filled and server.received["w"][0] == version
    assert server.wrongs == []


# ---------------------------------------------------------------------------------------- what is found at a start


class Left:
    """Servers with these weight versions, which remember what they are asked."""

    urls = ("http://a", "http://b")

    def __init__(self, *versions: str, **info: Any) -> None:
        self.found, self.info = list(versions), {"device": "cuda", "enable_memory_saver": True} | info
        self.asked: list[str] = []

    def infos(self) -> list[dict[str, Any]]:
        return [self.info] * 2

    def versions(self) -> list[str]:
        return self.found

    def __getattr__(self, name: str) -> Any:
        return lambda *args: self.asked.append(name)


def test_servers_that_a_run_left_asleep_are_not_sent_to_sleep_again() -> None:
    asleep = Left("7-ff01-asleep", "7-ff01-asleep")
    Colocated(asleep).begin()  # type: ignore[arg-type]
    assert asleep.asked == []
    awake = Left("7-ff01", "7-ff01")
    Colocated(awake).begin()  # type: ignore[arg-type]
    assert awake.asked == ["pause", "flush_when_idle", "set_version", "sleep", "set_version"]


@pytest.mark.parametrize("versions", [("7-turning", "7-turning"), ("7-asleep", "7"), ("7", "7-turning")])
def test_servers_of_which_nobody_knows_whether_they_sleep_are_refused(versions: tuple[str, str]) -> None:
    left = Left(*versions)
    with pytest.raises(SyncError, match="half asleep: start it again"):
        Colocated(left).begin()  # type: ignore[arg-type]
    assert left.asked == []


def test_a_server_on_a_gpu_without_a_memory_saver_cannot_take_turns() -> None:
    with pytest.raises(ConfigError, match=r"http://a was started without --enable-memory-saver"):
        Colocated(Left("0", "0", enable_memory_saver=False)).begin()  # type: ignore[arg-type]
    Colocated(Left("0", "0", enable_memory_saver=False, device="cpu")).begin()  # type: ignore[arg-type]


def test_a_run_apart_refuses_a_server_that_another_has_left_asleep(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with Sleeper(tmp_path, asleep=True) as server:
        for mark in ("asleep", "turning"):
            server.version = f"3-ff01-{mark}"
            with pytest.raises(ConfigError, match=rf"left asleep \(weight version 3-ff01-{mark}\)"):
                check_served([server.url], str(tmp_path))
            check_served([server.url], str(tmp_path), awake=False)
    assert "/health" not in server.calls, "it would generate"


def test_the_loss_of_a_server_that_takes_turns_says_how_to_go_on_and_keeps_its_kind() -> None:
    shared: Any = SimpleNamespace(turns=Colocated(None))
    apart: Any = SimpleNamespace(turns=Apart())
    lost = EngineUnavailableError("http://a/generate failed 4 times")
    said = with_advice(lost, shared)
    assert type(said) is EngineUnavailableError and str(said).startswith(
        "http://a/generate failed 4 times; servers that"
    )
    assert "train.resume = true goes on from the last checkpoint" in str(said)
    assert with_advice(lost, apart) is lost
    known = SyncError("start the run again (train.resume = true)")
    assert with_advice(known, shared) is known, "it is said once"
