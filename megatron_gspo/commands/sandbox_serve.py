"""``megatron-gspo sandbox serve``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

SUMMARY = "run programs for clients that have the key"
EXAMPLE = "megatron-gspo sandbox serve --host 10.0.0.9 --port 8700 --key-file sandbox.key"
DOCS = "docs/sandbox.md"
MORE = (
    'Lends the sandbox of this machine to trainers with sandbox.backend = "server", this address in sandbox.servers '
    "and the same key in sandbox.key_file. Stays until SIGTERM: exit status 0. HTTP is not encrypted."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="of this machine, where clients reach it (default 127.0.0.1: this machine alone)",
    )
    parser.add_argument("--port", type=int, default=0, help="default: a free one, which it says")
    parser.add_argument(
        "--key-file",
        type=Path,
        default=Path("sandbox.key"),
        metavar="FILE",
        help="holds the key, for its owner alone; made where it is missing (default: %(default)s)",
    )


def run(options: argparse.Namespace) -> int:
    """Runs the command; returns the exit status."""
    import asyncio

    from megatron_gspo.commands.sandbox import configured
    from megatron_gspo.errors import ConfigError
    from megatron_gspo.sandbox.local import LocalSandbox
    from megatron_gspo.sandbox.server import serve, shared_key

    config = configured(options.settings)
    if config.backend != "bubblewrap":
        raise ConfigError(f'sandbox.backend = "{config.backend}": what is served runs behind "bubblewrap" alone')

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    key = shared_key(options.key_file)
    asyncio.run(serve(LocalSandbox(config), options.host, options.port, key, say))
    return 0
