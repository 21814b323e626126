"""Rewards from other servers: judges and remote ones, and what they do when these refuse, hang, break off or lie."""

from __future__ import annotations

import asyncio
import gzip
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_gspo.config import RewardConfig
from megatron_gspo.errors import ConfigError, RewardError
from megatron_gspo.rewards import Reward, asking, resolve_reward, score_groups
from megatron_gspo.rewards.registry import check_reward
from tests.unit.answering import BREAK, HANG, Answer, Asked, answering
from tests.unit.asked_cases import group, score


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "LONGEST_WAIT_S", 0.02)


def remote(asked: Asked, timeout_s: float = 10.0, **options: Any) -> Reward:
    return resolve_reward(RewardConfig(function="remote", options={"url": asked.url, **options}, timeout_s=timeout_s))


# Remote rewards


def test_connections_live_as_long_as_a_scoring() -> None:
    with answering(lambda body, number: Answer([1])) as asked:
        reward: Any = remote(asked)
        sessions = []

        async def scored() -> None:
            for _ in range(2):
                task = asyncio.create_task(score_groups(reward, [group("42")]))
                while reward.function._service._session is None:
                    await asyncio.sleep(0)
                sessions.append(reward.function._service._session)
                await task

        asyncio.run(scored())
    assert len(set(sessions)) == 2 and all(session.closed for session in sessions)


def test_a_group_is_posted_whole_and_gets_what_is_answered() -> None:
    entries = [1, {"reward": 0.25, "components": {"style": 7}}, {"ungraded": "no licence"}]
    with answering(lambda body, number: Answer({"rewards": entries})) as asked:
        (found,) = score(remote(asked), group("a", "b", "c"))
    assert found.rewards_G[:2].tolist() == [1.0, 0.25] and found.ungraded_G == ("", "", "no licence")
    assert found.components_G == ({}, {"style": 7.0}, {})
    assert asked.bodies == [
        {
            "prompt_id": "line-1",
            "prompt": "<user>6*7?<end>",
            "turns": [{"role": "user", "content": "6*7?"}],
            "answer": "42",
            "metadata": {"level": 3},
            "ids": ["line-1/0", "line-1/1", "line-1/2"],
            "responses": ["a", "b", "c"],
            "finish_reasons": ["stop"] * 3,
        }
    ]


def test_a_server_that_comes_back_is_asked_again_and_one_that_does_not_leaves_the_group_ungraded() -> None:
    said: dict[int, Answer | str] = {
        0: Answer(b"busy", 503),
        1: Answer(b"slowly", 429, {"Retry-After": "0"}),
        2: BREAK,
        3: Answer(b"{oh", 200),
    }
    with answering(lambda body, number: said.get(number, Answer([0.5]))) as asked:
        (found,) = score(remote(asked), group("a"))
    assert found.rewards_G.tolist() == [0.5] and len(asked.bodies) == 5
    with answering(lambda body, number: Answer(b"no room", 507)) as asked:
        (found,) = score(remote(asked, retries=2), group("a", "b"))
    assert len(asked.bodies) == 3 and np.isnan(found.rewards_G).all()
    assert all("HTTP 507: no room (asked 3 times)" in reason for reason in found.ungraded_G)


def test_a_server_that_is_gone_or_hangs_leaves_the_group_ungraded_in_bounded_time() -> None:
    with answering(lambda body, number: HANG) as asked:
        start = time.monotonic()
        options = {"url": asked.url, "timeout_s": 0.2, "retries": 1}
        (found,) = score(resolve_reward(RewardConfig(function="remote", options=options)), group("a"))
        assert "timed out after 0.2 s (asked 2 times)" in found.ungraded_G[0]
        (late,) = score(remote(asked, timeout_s=0.3, retries=9), group("a"))
        assert late.ungraded_G == ("the reward gave no answer within 0.3 s (reward.timeout_s)",)
        assert time.monotonic() - start < 25
    (gone,) = score(remote(asked, retries=1), group("a"))  # nobody listens any more
    assert "Connect" in gone.ungraded_G[0] and "asked 2 times" in gone.ungraded_G[0]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ([0.5], "answered 1 rewards for 2 responses"),
        ([0.5] * 3, "answered 3 rewards for 2 responses"),
        ({"reward": 1}, "answered {'reward': 1} for 2 responses"),
        ("yes", "answered 'yes'"),
        (None, "answered None"),
    ],
)
def test_an_answer_that_is_none_leaves_the_group_ungraded(body: Any, reason: str) -> None:
    with answering(lambda asked, number: Answer(body)) as asked:
        (found,) = score(remote(asked), group("a", "b"))
    assert all(reason in why for why in found.ungraded_G) and len(found.ungraded_G) == 2


@pytest.mark.parametrize("entry", [1.5, -0.1, "1", None, {"reward": 7}, {}, {"reward": 0.5, "components": {"A": 1}}])
def test_a_lying_answer_is_an_error(entry: Any) -> None:
    with (
        answering(lambda body, number: Answer([entry])) as asked,
        pytest.raises(RewardError, match="'remote' returned"),
    ):
        score(remote(asked), group("a"))


def test_numbers_that_json_does_not_have_are_an_error_and_an_endless_answer_is_cut() -> None:
    with answering(lambda body, number: Answer(b"[NaN]")) as asked, pytest.raises(RewardError, match="nan, outside"):
        score(remote(asked), group("a"))
    big = b"[" + b"0," * (asking.MOST_BYTES // 2 + 1) + b"0]"
    with answering(lambda body, number: Answer(big)) as asked:
        (found,) = score(remote(asked, retries=0), group("a"))
    assert "goes on after 4194304 bytes" in found.ungraded_G[0]


def test_a_range_that_is_declared_holds() -> None:
    with answering(lambda body, number: Answer([-3.5])) as asked:
        (found,) = score(remote(asked, low=-4, high=2), group("a"))
        assert found.rewards_G.tolist() == [-3.5]
        assert score(remote(asked, low="-inf", high="inf"), group("a"))[0].rewards_G.tolist() == [-3.5]


def test_a_refusal_without_a_text_ends_with_its_status() -> None:
    with answering(lambda body, number: Answer(b"", 404)) as asked, pytest.raises(RewardError, match=r"HTTP 404$"):
        score(remote(asked), group("a"))


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_wrong_key_or_address_ends_the_scoring_at_once(status: int) -> None:
    with (
        answering(lambda body, number: Answer(b"no", status)) as asked,
        pytest.raises(RewardError, match=f"^http://127.*HTTP {status}"),
    ):
        score(remote(asked), group("a"))
    assert len(asked.bodies) == 1


def test_a_redirect_is_not_followed_and_a_compressed_answer_not_unpacked() -> None:
    with answering(lambda body, number: Answer([1.0])) as elsewhere:
        with answering(lambda body, number: Answer(b"", 307, {"Location": elsewhere.url})) as asked:
            (found,) = score(remote(asked), group("a"))
        assert "HTTP 307" in found.ungraded_G[0] and not elsewhere.bodies
    packed = Answer(gzip.compress(b"[1.0]"), 200, {"Content-Encoding": "gzip"})
    with answering(lambda body, number: packed) as asked:
        (found,) = score(remote(asked, retries=0), group("a"))
    assert len(found.graded) == 0


def test_what_a_server_says_is_one_line_without_control_characters() -> None:
    with answering(lambda body, number: Answer([{"ungraded": "a\n\x1b[31mb\u202e"}])) as asked:
        (found,) = score(remote(asked), group("a"))
    assert found.ungraded_G == ("a ?[31mb?",)


def test_waits_double_and_a_server_may_ask_for_more(monkeypatch: pytest.MonkeyPatch) -> None:
    service = asking.Service(["http://h"], backoff_s=0.001)
    monkeypatch.setattr(asking, "LONGEST_WAIT_S", 30.0)
    waits = [[service._pause(number, None) for _ in range(50)] for number in range(4)]
    for number, found in enumerate(waits):
        assert 0.0005 * 2**number <= min(found) < max(found) <= 0.0015 * 2**number
    assert service._pause(0, "7") == 7 and service._pause(0, "600") == 30 and service._pause(0, "soon") < 0.01


def test_what_only_this_question_is_refused_for_is_not_asked_again() -> None:
    with answering(lambda body, number: Answer(b"too long", 400)) as asked:
        (found,) = score(remote(asked), group("a"))
    assert "HTTP 400: too long" in found.ungraded_G[0] and len(asked.bodies) == 1


def test_keys_come_from_a_variable_or_a_private_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "key"
    file.write_text("from-file\n")
    file.chmod(0o600)
    monkeypatch.setenv("JUDGE_KEY", "from-variable")
    with answering(lambda body, number: Answer([1])) as asked:
        score(remote(asked, key_variable="JUDGE_KEY"), group("a"))
        score(remote(asked, key_file=str(file)), group("a"))
        score(remote(asked), group("a"))
    assert asked.keys == ["Bearer from-variable", "Bearer from-file", None]
    file.chmod(0o644)
    for options, message in (
        ({"key_variable": "NO_SUCH_KEY"}, "NO_SUCH_KEY, which is to hold a key, is not set"),
        ({"key_file": str(file)}, "has mode 0644"),
        ({"key_variable": "JUDGE_KEY", "key_file": str(file)}, "named twice"),
        ({"key": "secret"}, "unexpected keyword argument 'key'"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_reward(RewardConfig(function="remote", options={"url": asked.url, **options}))


@pytest.mark.parametrize("url", ["", [], "localhost:80", "ftp://h/x", "http://u:secret@h/", "http:///x", 7, [None]])
def test_a_url_that_is_none_is_refused_and_not_shown(url: Any) -> None:
    with pytest.raises(ConfigError, match=r"'remote'.*(url)") as caught:
        check_reward(RewardConfig(function="remote", options={"url": url}))
    assert "secret" not in str(caught.value)


def test_several_servers_are_asked_in_turn_and_the_next_one_after_a_failure() -> None:
    with (
        answering(lambda body, number: Answer([0.0])) as first,
        answering(lambda body, number: Answer([1.0])) as second,
        answering(lambda body, number: BREAK) as broken,
    ):
        urls = [first.url, second.url, broken.url]
        reward = resolve_reward(RewardConfig(function="remote", options={"url": urls}))
        score(reward, *[group("a") for _ in range(12)])
    assert len(broken.bodies) == 4 and len(first.bodies) + len(second.bodies) == 12
    assert min(len(first.bodies), len(second.bodies)) >= 4
