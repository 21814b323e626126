"""torchrun over two hosts, a server on each: a rank that is killed costs the steps since the last checkpoint alone."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_gspo.config import RunConfig, load
from tests.cluster.hosts import Host, ranks_under, two_hosts, wait_until, why_not
from tests.cluster.runs import of_stand_ins, settings_of, undisturbed, undisturbed_with_stand_in
from tests.cluster.stand_in_server import python_of_stand_ins
from tests.pool import RankPool
from tests.training.conftest import QUICKSTART, ROOT
from tests.training.test_resume import assert_same_run, manifest_of

pytestmark = pytest.mark.timeout(600)
PORT = 29531
Hosts = tuple[Host, Host]


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    if reason := why_not():
        pytest.skip(f"two hosts are network namespaces: {reason}")
    with two_hosts() as made:
        yield made


def serve(host: Host, directory: Path, settings: list[str]) -> subprocess.Popen[str]:
    words = ["-m", "megatron_gspo.cli", "serve", str(QUICKSTART / "gspo.toml"), *settings, "rollout.local_servers=1"]
    return host.start([*words, "--host", host.address, "--node", host.name], directory / f"serve-{host.name}.log")


def start(hosts: Hosts, directory: Path, settings: list[str], *, elastic: bool) -> list[subprocess.Popen[str]]:
    """A rank on each host, by the script that the example has."""
    script = ROOT / "examples" / "qwen3_30b_a3b" / "train_torchrun.sh"
    started = []
    for number, host in enumerate(hosts):
        places = {"MASTER_ADDR": hosts[0].address, "MASTER_PORT": str(PORT), "LOCAL_ADDR": host.address}
        places |= {} if elastic else {"NODE_RANK": str(number)}
        words = [str(script), str(QUICKSTART / "gspo.toml"), *settings]
        started.append(
            host.start(words, directory / f"{host.name}.log", program="bash", NNODES="2", NPROC_PER_NODE="1", **places)
        )
    return started


def assert_it_goes_on(
    hosts: Hosts, directory: Path, settings: list[str], whole: RunConfig, *, elastic: bool, end: bool = True
) -> None:
    """Servers and ranks on two hosts; the rank of the second is killed after the first checkpoint."""
    run, servers = directory / "run", directory / "servers"
    more = [f'train.run_dir="{run}"', f'rollout.servers_from="{servers}"', "rollout.server_nodes=2"]
    settings = [*settings, *more]
    serving = [serve(host, directory, settings) for host in hosts]
    started = start(hosts, directory, settings, elastic=elastic)
    wait_until((run / "checkpoints" / "latest").exists, *started, *serving)
    (victim,) = ranks_under(started[1])
    victim.send_signal(signal.SIGKILL)
    ended = [process.wait(400) for process in started]
    assert ended == [0, 0], [(directory / f"{host.name}.log").read_text() for host in hosts]
    assert_same_run(load(QUICKSTART / "gspo.toml", settings), whole)
    assert [start["status"] for start in manifest_of(run)["starts"]][1:] == ["finished"]
    for host, process in zip(hosts, serving, strict=True):
        assert process.poll() is None
        assert "generate" in (servers / host.name / "sglang-0.log").read_text(), "the server of each host was asked"
        (servers / f"{host.name}.json").unlink()
    assert [process.wait(60) for process in serving] == [0, 0], "they end with their file"


@pytest.mark.parametrize(
    "elastic", [pytest.param(True, id="elastic"), pytest.param(False, id="static", marks=pytest.mark.slow_suite)]
)
def test_a_rank_killed_on_one_of_two_hosts_is_started_again_with_the_other_and_changes_no_bit(
    ranks: RankPool, hosts: Hosts, quickstart: Path, tmp_path: Path, elastic: bool
) -> None:
    shared = [*settings_of(quickstart), *of_stand_ins(tmp_path)]
    whole = undisturbed_with_stand_in(ranks, shared, tmp_path / "whole", quickstart / "model")
    python = python_of_stand_ins(tmp_path, ROOT)
    assert_it_goes_on(hosts, tmp_path, [*shared, f'rollout.server_python="{python}"'], whole, elastic=elastic)


@pytest.mark.slow_suite
def test_so_it_is_with_sglang_on_each_host(
    ranks: RankPool, hosts: Hosts, quickstart: Path, server: str, tmp_path: Path
) -> None:
    """Weights travel over gloo, from the first host to the servers of both."""
    shared = settings_of(quickstart)
    whole = undisturbed(ranks, shared, tmp_path / "whole", server)
    assert_it_goes_on(hosts, tmp_path, shared, whole, elastic=True)


@pytest.mark.slow_suite
def test_sigusr1_to_the_script_of_one_host_stops_the_ranks_of_both_after_saving(
    ranks: RankPool, hosts: Hosts, quickstart: Path, tmp_path: Path
) -> None:
    """torchrun takes what they end with for success, and starts none again."""
    shared = [*settings_of(quickstart), *of_stand_ins(tmp_path), "train.outer_steps=500"]
    run, servers = tmp_path / "run", tmp_path / "servers"
    more = [f'train.run_dir="{run}"', f'rollout.servers_from="{servers}"', "rollout.server_nodes=1"]
    settings = [*shared, *more, f'rollout.server_python="{python_of_stand_ins(tmp_path, ROOT)}"']
    serving = serve(hosts[1], tmp_path, settings)
    started = start(hosts, tmp_path, settings, elastic=True)
    wait_until((run / "checkpoints" / "latest").exists, *started, serving)
    os.kill(started[0].pid, signal.SIGUSR1)
    assert [process.wait(100) for process in started] == [75, 0]
    said = (tmp_path / f"{hosts[0].name}.log").read_text()
    assert "stopped by SIGUSR1 after outer step" in said and "Traceback" not in said
    assert manifest_of(run)["status"] == "stopped" and len(manifest_of(run)["starts"]) == 1
    serving.terminate()
    assert serving.wait(60) == 0 and not (servers / f"{hosts[1].name}.json").exists()
