"""``megatron-gspo sandbox check``."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_gspo.config.sandbox import SandboxConfig

SUMMARY = "run a program of each language, and say what holds it"
EXAMPLE = "megatron-gspo sandbox check sandbox.python=/usr/bin/python3"
DOCS = "docs/sandbox.md"
MORE = "Exit status 0 when all of them work, 1 when one does not, 2 where no program can be run as the settings say."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command: settings alone."""


def run(options: argparse.Namespace) -> int:
    """Runs the command; returns the exit status."""
    import asyncio

    from megatron_gspo.commands.sandbox import configured

    return asyncio.run(_check(configured(options.settings)))


async def _check(config: SandboxConfig) -> int:
    from megatron_gspo.sandbox import Limits, Program, Verdict, open_sandbox
    from megatron_gspo.sandbox.checks import described
    from megatron_gspo.sandbox.languages import LANGUAGES

    status = 0
    async with open_sandbox(config) as sandbox:
        print("\n".join(described(config)))
        for name, language in LANGUAGES.items():
            (outcome,) = await sandbox.run(Program(name, language.sample), [b""], Limits())
            if outcome.verdict is Verdict.OK and outcome.stdout == b"42\n":
                print(f"{name}: works")
            else:
                words = " ".join(outcome.stderr.decode(errors="replace").split())[:300]
                print(f"{name}: {outcome.verdict}, status {outcome.status}: {words}")
                status = 1
    return status
