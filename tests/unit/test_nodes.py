"""What ``serve`` starts on a node: by the configuration, by what else is on the node, and over several nodes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from report_runs import make_config

from megatron_gspo.cli import main
from megatron_gspo.commands.serve import spread_of
from megatron_gspo.errors import ConfigError
from megatron_gspo.rollout.sglang.arguments import server_arguments, server_environment
from megatron_gspo.runs.nodes import Node, Spread, as_started, placed_on
from megatron_gspo.runs.rank import check_restarts
from megatron_gspo.supervise import STORE

SPREAD = Spread(nodes=2, rank=1, address="10.0.0.1:20000")


def config_of(tmp_path: Path, **sections: dict[str, object]):
    return as_started(make_config(tmp_path / "run", **sections))


def test_a_server_over_two_nodes_takes_half_of_its_cards_on_each(tmp_path: Path) -> None:
    config = config_of(tmp_path, placement={"tensor": 16})
    placement = placed_on(config, Node("b", "10.0.0.2", spread=SPREAD), cards=8)
    assert placement.first_cards == (0,) and placement.sizes.tensor == 16
    words = server_arguments(
        config.rollout, "model", 20001, device="cuda", dtype="bfloat16", host="10.0.0.2", placed=placement.server_args
    )
    line = " ".join(words)
    assert "--host 10.0.0.2 --port 20001" in line and "--base-gpu-id 0" in line
    assert "--tp-size 16 " in line and "--nnodes 2 --node-rank 1 --dist-init-addr 10.0.0.1:20000" in line


@pytest.mark.parametrize(
    ("placement", "node", "cards"),
    [
        ({"tensor": 16}, Node("b", "h", spread=SPREAD), 4),  # more than a node has
        ({"tensor": 1}, Node("b", "h", spread=SPREAD), 8),  # not the same number on each
        ({"tensor": 16}, Node("b", "h", ranks=8, spread=SPREAD), 8),  # beside a trainer
    ],
)
def test_a_server_that_does_not_lie_evenly_on_its_nodes_is_refused(
    tmp_path: Path, placement: dict[str, object], node: Node, cards: int
) -> None:
    with pytest.raises(ConfigError, match="--nnodes 2: a server of"):
        placed_on(config_of(tmp_path, placement=placement), node, cards)


def test_a_server_for_other_nodes_may_talk_to_them_and_one_for_this_machine_keeps_to_loopback() -> None:
    assert server_environment({}, "cpu")["GLOO_SOCKET_IFNAME"] == "lo"
    assert "GLOO_SOCKET_IFNAME" not in server_environment({}, "cpu", host="10.0.0.2")


def test_the_parts_of_a_server_over_several_nodes_are_given_together() -> None:
    def given(*values: object) -> SimpleNamespace:
        return SimpleNamespace(**dict(zip(("nnodes", "node_rank", "dist_init_addr"), values, strict=True)))

    assert spread_of(given(None, None, None)) is None
    assert spread_of(given(2, 1, "10.0.0.1:20000")) == SPREAD
    for wrong in (given(2, None, "h:1"), given(2, 2, "h:1"), given(2, 1, None)):
        with pytest.raises(ConfigError, match="all three are needed"):
            spread_of(wrong)


def test_serve_without_a_directory_says_what_to_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "examples/quickstart/gspo.toml", "--host", "127.0.0.1"]) == 2
    assert "rollout.servers_from is empty: name the directory" in capsys.readouterr().err


def test_torchrun_may_start_only_ranks_again_that_would_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(tmp_path / "run", train={"overwrite": True})
    check_restarts(config)
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    with pytest.raises(ConfigError, match=r"would replace what the run has written: add train\.resume=true"):
        check_restarts(config)
    check_restarts(make_config(tmp_path / "run", train={"resume": True}))
    monkeypatch.setenv(STORE, "store")  # ranks that `megatron-gspo train` starts
    check_restarts(config)
