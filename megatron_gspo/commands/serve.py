"""``megatron-gspo serve``."""

from __future__ import annotations

import argparse
import os
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_gspo.runs.nodes import Spread

SUMMARY = "start this node's rollout servers, for trainers on this node and on others"
EXAMPLE = "megatron-gspo serve examples/qwen3_30b_a3b/gspo.toml rollout.servers_from=shared/servers --host 10.0.0.7"
DOCS = "docs/cluster.md"
MORE = (
    "Says where they are in a file of the directory rollout.servers_from, which `train` with the same setting reads, "
    "and stays until SIGTERM, or until that file is removed: exit status 0. A server that dies ends it: 1.\n\n"
    "The key that every request carries is that of $MEGATRON_GSPO_SERVER_KEY, or lies in that directory."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("config", type=Path, help="TOML file")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="section.key=value", help="settings that replace the file's"
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="of this node, where others reach it (default 127.0.0.1: this machine alone)",
    )
    parser.add_argument("--port", type=int, help="of the first server; the next ones follow (default: free ones)")
    parser.add_argument("--node", metavar="NAME", help="of this node's file (default: the host's name)")
    parser.add_argument("--ranks", type=int, default=0, help="trainer ranks on this node's GPUs (default 0)")
    spread = parser.add_argument_group("a server over several nodes", "each of which runs this command")
    spread.add_argument("--nnodes", type=int, metavar="N", help="nodes of the server")
    spread.add_argument("--node-rank", type=int, metavar="R", help="of this node, from 0, which answers requests")
    spread.add_argument("--dist-init-addr", metavar="HOST:PORT", help="of node 0, where they meet")


def run(options: argparse.Namespace) -> int:
    """Runs the command; returns the exit status."""
    from megatron_gspo.config import load
    from megatron_gspo.config.inputs import check_inputs
    from megatron_gspo.errors import ConfigError
    from megatron_gspo.runs.nodes import Node, as_started, serve
    from megatron_gspo.train.models import check_models

    config = load(options.config, options.overrides)
    if not config.rollout.servers_from:
        raise ConfigError("rollout.servers_from is empty: name the directory in which trainers look for these servers")
    check_inputs(config, options.config, ("model.path",))
    check_models(as_started(config))
    name = options.node or os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    node = Node(name, options.host, options.ranks, options.port, spread_of(options))
    serve(config, node, lambda line: print(line, file=sys.stderr, flush=True))
    return 0


def spread_of(options: argparse.Namespace) -> Spread | None:
    """The part of this node in a server of several; None where there is none. Raises ConfigError."""
    from megatron_gspo.errors import ConfigError
    from megatron_gspo.runs.nodes import Spread

    given = (options.nnodes, options.node_rank, options.dist_init_addr)
    if given == (None, None, None):
        return None
    if None in given or not 0 <= options.node_rank < options.nnodes:
        raise ConfigError(
            f"--nnodes {options.nnodes} --node-rank {options.node_rank} --dist-init-addr {options.dist_init_addr}: all "
            f"three are needed, with a rank from 0 to N - 1"
        )
    return Spread(*given)
