"""Whole runs whose servers die and come back: the weights in the end are those of the run that nothing happened to."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from megatron_gspo.megatron import checkpoint_files
from megatron_gspo.train import watch
from tests.pool import RankPool
from tests.training.stand_in import Mortal
from tests.training.test_faults import UNCHECKED, ending, weights_and_lines

pytestmark = pytest.mark.timeout(500)
RESPONSES = 4 * 8
"""Of an outer step."""
Settings = Callable[..., list[str]]


@pytest.fixture
def settings(overrides: list[str], tmp_path: Path) -> Settings:
    """The cut quickstart with three outer steps and two leaders, against two stand-ins."""

    def make(name: str, servers: tuple[Mortal, Mortal], *more: str) -> list[str]:
        urls = json.dumps([server.url for server in servers])
        own = [f"rollout.servers={urls}", 'sync.method="tensor"', f'train.run_dir="{tmp_path}/{name}"']
        layout = ["parallel.tensor=1", "parallel.expert=1", "train.outer_steps=3", "train.noise_floor_every=0"]
        few = ["eval.every=0", "train.save_hf=false", "rollout.retries=0", "train.checkpoint_every=0"]
        return [*overrides, *own, *layout, *few, *UNCHECKED, *more]

    return make


@contextmanager
def two(model: Path) -> Iterator[tuple[Mortal, Mortal]]:
    with Mortal(model) as one, Mortal(model) as other:
        yield one, other


def result(run: Path) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """Hashes of the weights, and metrics without what servers went through."""
    weights, lines = weights_and_lines(run)
    return weights, [{k: v for k, v in line.items() if not k.startswith("servers/")} for line in lines]


def servers_of(run: Path) -> list[dict[str, float]]:
    """``servers/*`` by outer step."""
    _, lines = weights_and_lines(run)
    found = {line["outer_step"]: {k[8:]: v for k, v in line.items() if k.startswith("servers/")} for line in lines}
    return [found[step] for step in sorted(found)]


Result = tuple[dict[str, str], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def kept() -> dict[str, Result]:
    return {}


@pytest.fixture
def plain(kept: dict[str, Result], ranks: RankPool, settings: Settings, quickstart: Path, tmp_path: Path) -> Result:
    """Of the run that nothing happens to, whose servers are asked for as much; made once."""
    if not kept:
        with two(quickstart / "model") as servers:
            assert set(ranks.run(2, ending, settings("plain", servers))) == {"finished"}
            assert [server.answered for server in servers] == [3 * RESPONSES // 2] * 2
        quiet = {"up": 2.0, "lost": 0.0, "returned": 0.0, "restarted": 0.0, "moved": 0.0, "resubmitted": 0.0}
        assert servers_of(tmp_path / "plain") == [quiet] * 3
        kept["result"] = result(tmp_path / "plain")
    return kept["result"]


def test_servers_that_die_in_a_draw_and_in_a_push_change_no_bit(
    ranks: RankPool, settings: Settings, quickstart: Path, tmp_path: Path, plain: Result
) -> None:
    """One dies in the second draw and is back, without weights, for the third; the other dies in the push before it."""
    with two(quickstart / "model") as servers:
        one, other = servers
        other.dies_at = lambda path, body: (
            path == "/generate" and other.version.startswith("1-") and other.answered >= RESPONSES // 2 + 8
        )
        other.comes_back_at = lambda: one.dead
        one.dies_at = lambda path, body: path == "/update_weights_from_tensor" and one.version.startswith("2-")
        assert set(ranks.run(2, ending, settings("hurt", servers))) == {"finished"}
        assert other.unfilled == one.unfilled == []
        assert other.version.startswith("3-")
        assert other.answered == RESPONSES // 2 + 8 + RESPONSES, "all of the third step's come from it"
    assert result(tmp_path / "hurt") == plain
    first, second, third = servers_of(tmp_path / "hurt")
    assert (first["lost"], second["lost"], second["up"], second["moved"]) == (0, 1, 1, 1)
    assert (third["lost"], third["returned"], third["up"]) == (1, 1, 1)


def test_without_any_server_a_run_is_saved_waits_and_goes_on_with_the_same_numbers(
    ranks: RankPool, settings: Settings, quickstart: Path, tmp_path: Path, plain: Result
) -> None:
    saved = tmp_path / "waits" / "checkpoints" / "outer_00001"
    with two(quickstart / "model") as servers:
        one = servers[0]
        for server in servers:
            server.dies_at = lambda path, body, server=server: (
                path == "/generate" and server.version.startswith("1-") and server.answered >= RESPONSES // 2 + 8
            )
        one.comes_back_at = saved.exists
        assert set(ranks.run(2, ending, settings("waits", servers))) == {"finished"}
        assert one.unfilled == [] and one.version.startswith("3-")
    assert result(tmp_path / "waits") == plain
    assert checkpoint_files.read_header(saved)["extra"]["cursor"]["position"] == 4, "what the half draw took is undone"
    assert servers_of(tmp_path / "waits")[2]["up"] == 1


def test_when_no_server_returns_in_time_the_run_ends_with_one_line_and_can_go_on(
    ranks: RankPool, settings: Settings, quickstart: Path, tmp_path: Path
) -> None:
    with two(quickstart / "model") as servers:
        for server in servers:
            server.dies_at = lambda path, body, server=server: path == "/generate" and server.version.startswith("1-")
        (said,) = set(ranks.run(2, ending, settings("ends", servers, "rollout.wait_for_servers_s=1")))
        for server in servers:
            server.dead, server.dies_at = False, lambda path, body: False
        assert re.search(
            r"^1 EngineUnavailableError: no rollout server is left \(http://\S+/generate failed 1 times, .*\); "
            r"outer step 1 is saved, and none has returned within rollout.wait_for_servers_s = 1 s; "
            r"train.resume = true continues$",
            said,
        ), said
        again = settings("ends", servers, "train.resume=true", "train.overwrite=false")
        assert set(ranks.run(2, ending, again)) == {"finished"}


def test_a_server_that_hangs_in_a_push_is_left_out_long_before_the_timeout_and_changes_no_bit(
    ranks: RankPool, settings: Settings, quickstart: Path, tmp_path: Path, plain: Result
) -> None:
    """Its process is stopped, as it were: it takes connections and says nothing."""
    with two(quickstart / "model") as servers:
        one = servers[0]
        one.hangs, one.dies_at = (
            True,
            lambda path, body: path == "/update_weights_from_tensor" and one.version.startswith("2-"),
        )
        quick = ["rollout.health_every_s=1.0"]
        assert set(ranks.run(2, ending, settings("hangs", servers, *quick), look_briefly)) == {"finished"}
        assert one.unfilled == []
    assert result(tmp_path / "hangs") == plain
    assert sum(line["lost"] for line in servers_of(tmp_path / "hangs")) == 1


def look_briefly() -> None:
    watch.ANSWER_S, watch.GENERATE_S = 5.0, 1.0  # the sound one answers in time, on a busy machine too
