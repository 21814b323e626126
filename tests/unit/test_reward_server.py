"""``[reward_server]``: who asks it, where it lies, and how its servers are looked after."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_gspo.config import RewardConfig, RewardServerConfig, RunConfig, parse
from megatron_gspo.errors import ConfigError, RewardError
from megatron_gspo.plan.given import given
from megatron_gspo.rewards import asking
from megatron_gspo.rewards.asking import NoAnswerError, Service
from megatron_gspo.rewards.interface import RewardContext, RewardServers
from megatron_gspo.rewards.registry import check_reward, resolve_reward
from megatron_gspo.rollout.sglang.arguments import server_arguments
from megatron_gspo.rollout.sglang.purpose import GRADES, PURPOSES, SCORES
from megatron_gspo.runs import reward_serving
from megatron_gspo.runs.reward_serving import Guard, as_rollouts, placed
from megatron_gspo.train.reward import check_reward_server
from tests.unit.answering import BREAK, Answer, answering
from tests.unit.asked_cases import group, score
from tests.unit.doctor_cases import Case, prepare

Make = Callable[..., RunConfig]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A configuration with ``[reward_server]`` settings and a reward."""

    def config(server: dict[str, Any], reward: dict[str, Any] | None = None, **sections: Any) -> RunConfig:
        tree = {
            "model": {"path": "m"},
            "data": {"path": "d"},
            "train": {"run_dir": str(tmp_path / "run"), "microbatch_tokens": 4096},
            "reward": reward or {"function": "reward_model"},
            "reward_server": server,
            **sections,
        }
        return parse(tree, "a test", [])

    return config


def a_model(directory: Path, architecture: str) -> str:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps({"architectures": [architecture]}))
    return str(directory)


def context(kind: str, model: str = "m", *urls: str, **settings: Any) -> RewardContext:
    server = RewardServerConfig(model=model, kind=kind, **settings)
    return RewardContext(server=server, servers=RewardServers(urls, "the-key") if urls else None)


# Who asks


def test_a_judge_without_a_url_asks_what_the_run_has_started_with_its_key() -> None:
    said = {"choices": [{"message": {"content": "[[7]]"}}], "usage": {"prompt_tokens": 1, "completion_tokens": 1}}
    with answering(lambda body, number: Answer(said)) as asked:
        reward = resolve_reward(RewardConfig(function="judge"), context("judge", "m", asked.url))
        (found,) = score(reward, group("42"))
    assert found.rewards_G.tolist() == [0.7]
    assert asked.paths == ["/v1/chat/completions"] and asked.keys == ["Bearer the-key"]
    assert asked.bodies[0]["model"] == "judge"
    assert reward.untimed, "while its server is started again it waits longer than reward.timeout_s"


@pytest.mark.parametrize(
    ("function", "options", "given", "said"),
    [
        ("judge", {}, RewardContext(), r"'judge' needs url, .*; or reward_server\.model"),
        ("judge", {}, context("reward_model"), r'asks what reward_server\.kind = "judge" serves, and it is "reward'),
        ("judge_ranking", {"model": "x"}, context("judge"), "model is about the server at url, and no url is given"),
        ("judge", {"key_file": "x"}, context("judge"), "key_file is about the server at url"),
        ("reward_model", {}, context("reward_model", "/nowhere"), r"reward_server\.model = '/nowhere' is no directory"),
        ("weighted", {"parts": [{"function": "judge"}]}, context("reward_model"), r'reward_server\.kind = "judge"'),
    ],
)
def test_what_nobody_could_ask_is_refused_before_anything_is_started(
    function: str, options: dict[str, Any], given: RewardContext, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        check_reward(RewardConfig(function=function, options=options), given)


def test_before_its_servers_are_started_a_reward_is_made_and_asks_nobody() -> None:
    config = RewardConfig(function="judge")
    check_reward(config, context("judge"))
    with pytest.raises(RewardError, match=r"the servers of \[reward_server\] are not started yet"):
        score(resolve_reward(config, context("judge")), group("42"))


def test_a_directory_of_the_other_kind_and_servers_that_nobody_asks_are_refused(make: Make, tmp_path: Path) -> None:
    scores = a_model(tmp_path / "scores", "Qwen3ForSequenceClassification")
    talks = a_model(tmp_path / "talks", "Qwen3ForCausalLM")
    check_reward_server(make({"model": scores}))
    check_reward_server(make({"model": talks, "kind": "judge"}, {"function": "judge"}))
    check_reward_server(make({"model": scores}, {"function": "mine.py:reward"}))  # it may: context.servers
    for server, said in (
        ({"model": talks}, r'is a Qwen3ForCausalLM, and reward_server\.kind = "reward_model": .* kind = "judge"'),
        ({"model": scores, "kind": "judge"}, r'kind = "reward_model"'),
        ({"model": "/nowhere"}, r"reward_server\.model: /nowhere/config\.json: not found"),
    ):
        with pytest.raises(ConfigError, match=said):
            check_reward_server(make(server))
    with pytest.raises(ConfigError, match="and no reward asks it: gsm8k"):
        check_reward_server(make({"model": scores}, {"function": "gsm8k"}))
    elsewhere = {"function": "reward_model", "options": {"url": "http://h:1", "model": scores}}
    with pytest.raises(ConfigError, match="and no reward asks it: reward_model"):
        check_reward_server(make({"model": scores}, elsewhere))
    with pytest.raises(ConfigError, match="sft draws none"):
        make({"model": scores}, algorithm={"name": "sft"})


# Where it lies


def test_it_has_the_last_cards_and_neither_ranks_nor_rollout_servers_get_them(make: Make) -> None:
    config = make({"model": "m", "count": 2, "tensor": 2, "memory": 0.6, "args": ["--context-length", "9"]})
    own = placed(config, ranks=2, cards=8)
    assert (own.first_cards, sorted(own.cards), own.share) == ((4, 6), [4, 5, 6, 7], 0.6)
    assert own.server_args == ("--mem-fraction-static", "0.6", "--tp-size", "2")
    rollouts = config.placed(ranks=2, cards=8, cores=4)
    assert sorted(rollouts.cards) == [2, 3] and not rollouts.colocated
    assert config.placed(ranks=4, cards=8, cores=4).colocated, "nothing is left for servers of their own"
    with pytest.raises(ConfigError, match=r"2 server\(s\) of 2 card\(s\) and 5 rank\(s\) need more than the 8 card"):
        config.placed(ranks=5, cards=8, cores=4)
    on_cpu = placed(config, ranks=2, cards=0)
    assert on_cpu.first_cards == (0, 0) and on_cpu.server_args == ("--tp-size", "2")
    assert make({}).placed(ranks=2, cards=8, cores=4).cards == frozenset(range(2, 8))
    assert make({}).cards_left(ranks=4, cards=1) == 1, "without one, what lacks cards is not its doing"


def test_a_scorer_takes_tokens_and_a_judge_has_its_own_tokenizer(make: Make) -> None:
    config = make({"model": "m", "args": ["--context-length", "9"], "start_s": 7.0, "restarts": 2})
    rollout = as_rollouts(config)
    assert (rollout.server_start_s, rollout.server_restarts, rollout.local_servers) == (7.0, 2, 1)
    words = {
        kind: server_arguments(rollout, "m", 1, device="cpu", dtype="float32", purpose=purpose)
        for kind, purpose in PURPOSES.items()
    }
    assert words["reward_model"][-2:] == words["judge"][-2:] == ["--context-length", "9"]
    assert {"--is-embedding", "--skip-tokenizer-init"} <= set(words["reward_model"])
    assert not {"--is-embedding", "--skip-tokenizer-init"} & set(words["judge"])
    assert words["judge"][words["judge"].index("--served-model-name") + 1] == "judge"
    assert not any("--enable-deterministic-inference" in each for each in words.values())
    assert (SCORES.settings, GRADES.settings) == ("reward_server.", "reward_server.")


def test_doctor_looks_at_its_directory_and_counts_its_memory_and_asks_nobody(tmp_path: Path) -> None:
    root = tmp_path / "case"
    root.mkdir()
    prepare().write_model(root / "model", seed=0)
    case = Case(root).write()
    scores = tmp_path / "scores"
    shutil.copytree(root / "model", scores)
    config = json.loads((scores / "config.json").read_text())
    (scores / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForSequenceClassification"]}))
    (scores / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    asked = ['reward.function="reward_model"', f'reward_server.model="{scores}"']
    found = case.check("reward server", *asked)
    assert found.status == "ok" and f"1 server of {scores} (reward_model), weights " in found.detail
    assert "and not asked now" in case.check("reward", *asked).detail
    one, two = (case.check("memory", *asked, f"reward_server.count={count}").detail for count in (1, 2))
    assert " + 1 reward server x 2." in one and " + 2 reward servers x 2." in two
    assert "none is started" in case.check("reward server").detail
    wrong = case.check("reward server", *asked, 'reward_server.kind="judge"')
    assert wrong.status == "error" and wrong.fix == "[reward_server]"
    (scores / "chat_template.jinja").unlink()
    assert "has no chat template" in case.check("reward server", *asked).detail


def test_a_plan_sets_its_cards_aside(make: Make) -> None:
    plain = make({}, {"function": "gsm8k"}, placement={"mode": "colocated"})
    own = make({"model": "m", "count": 2, "tensor": 2}, placement={"mode": "colocated"})
    assert given(plain, 8, 8).request.gpus == 8
    assert given(own, 8, 8).request.gpus == given(own, 8, 8).choice.gpus == 4
    with pytest.raises(ConfigError, match="4 GPUs for it leave none of 4"):
        given(own, 4, 8)


# How it is looked after


class Local:
    """Servers that notes what it is asked to mend."""

    def __init__(self, *urls: str) -> None:
        self.urls, self.said, self.asked = urls, [], []
        self.gone: dict[str, str] = {}

    def mend(self, silent: Any = ()) -> dict[str, str]:
        self.asked.append(list(silent))
        self.said += [f"{url} is started again" for url in silent]
        return self.gone | dict.fromkeys(silent, "silent")


def test_one_that_answers_nothing_three_times_in_a_row_is_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    deaf, local, said = {"a": True, "b": False}, Local("a", "b"), list[str]()
    monkeypatch.setattr(reward_serving, "_answers", lambda url: not deaf[url])
    guard = Guard(local, said.append)  # type: ignore[arg-type]
    guard.look(), guard.look()
    deaf["a"] = False
    guard.look()
    deaf["a"] = True
    for _ in range(3):
        guard.look()
    assert local.asked == [[]] * 6 and said == [], "two, and one that it answered"
    guard.look()
    assert local.asked[-1] == ["a"] and said == ["a is started again"]
    guard.look()
    assert local.asked[-1] == [], "it is counted anew"


def test_the_guard_ends_with_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    looked = threading.Event()
    monkeypatch.setattr(reward_serving, "LOOK_S", 0.01)
    local = Local()
    monkeypatch.setattr(local, "mend", lambda silent=(): looked.set() or {})
    with Guard(local, print) as guard:  # type: ignore[arg-type]
        assert looked.wait(60)
    assert not guard._thread.is_alive()


def test_a_look_that_fails_is_said_once_and_the_next_one_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reward_serving, "LOOK_S", 0.001)
    enough, said, looks = threading.Event(), list[str](), list[int]()

    def mend(silent: Any = ()) -> dict[str, str]:
        looks.append(1)
        if len(looks) > 5:
            enough.set()
            return {}
        raise OSError("No space left on device")

    local = Local()
    monkeypatch.setattr(local, "mend", mend)
    with Guard(local, said.append):  # type: ignore[arg-type]
        assert enough.wait(60)
    assert said == ["warning: reward servers are not looked after: OSError: No space left on device"]


def asked_once(service: Service) -> Any:
    async def ask() -> Any:
        async with service:
            return await service.ask({})

    return asyncio.run(ask())


def test_a_question_that_has_lost_its_server_waits_until_it_is_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "LOST_WAIT_S", 0.01)
    with answering(lambda body, number: BREAK if number < 12 else Answer([1])) as asked:
        assert asked_once(Service([asked.url], retries=0, patience_s=30.0)) == [1]
        assert len(asked.bodies) == 13
    with answering(lambda body, number: BREAK) as asked:
        with pytest.raises(NoAnswerError, match="ServerDisconnectedError"):
            asked_once(Service([asked.url], retries=1, backoff_s=0.01, patience_s=2.0))
        assert len(asked.bodies) > 5
    with answering(lambda body, number: BREAK) as asked, pytest.raises(NoAnswerError, match="asked 2 times"):
        asked_once(Service([asked.url], retries=1, backoff_s=0.01))
    busy = pytest.raises(NoAnswerError, match=r"HTTP 503: busy \(asked 2 times\)")
    with answering(lambda body, number: Answer(b"busy", 503)) as asked, busy:
        asked_once(Service([asked.url], retries=1, backoff_s=0.01, patience_s=30.0))
