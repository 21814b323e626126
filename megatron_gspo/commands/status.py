"""``megatron-gspo status``."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SUMMARY = "say how a run is doing"
EXAMPLE = "megatron-gspo status runs/quickstart --watch"
DOCS = "docs/metrics.md"
MORE = (
    "While the run goes on, its servers are asked for their health and weight version. Exit status 0;\n"
    "with --watch, which ends with the run, 1 if the run failed or was killed, and 130 after Ctrl-C."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("path", type=Path, metavar="RUN", help="run directory")
    parser.add_argument("--watch", action="store_true", help="go on until the run ends; piped: a line at each change")
    parser.add_argument("--interval", type=_seconds, default=2.0, metavar="SECONDS", help="between looks (default 2)")
    parser.add_argument(
        "--healthy", action="store_true", help="exit status 1 unless the run goes on with every rank, or is finished"
    )
    parser.add_argument("--json", action="store_true", help="print JSON; with --watch one object a line")


def run(options: argparse.Namespace) -> int:
    """Runs the command; returns the exit status."""
    import json

    from megatron_gspo.report.status import format_line, format_status, is_healthy

    if not options.watch:
        summary = look(options.path)
        print(json.dumps(summary, indent=2) if options.json else format_status(summary))
        return int(options.healthy and not is_healthy(summary))
    summaries = watch(options.path, options.interval)
    if sys.stdout.isatty() and not options.json:
        last = _show_in_place(summaries)
    else:
        last = _print_changes(summaries, json.dumps if options.json else format_line)
    return 0 if last["status"] == "finished" else 1


def look(path: Path) -> dict[str, Any]:
    """The summary of a run; while it goes on, with what its servers say now. Raises DataError if it is no run."""
    from megatron_gspo.report.status import summarise
    from megatron_gspo.rollout.sglang.probe import find_key, probe

    summary = summarise(path)
    if summary["status"] == "running":
        states = probe([server["url"] for server in summary["servers"]], key=key_of(path))
        summary["servers"] = [
            {"url": state.url, "error": state.error, "weight_version": state.weight_version} for state in states
        ]
        states = probe([server["url"] for server in summary["reward_servers"]], key=find_key(path / "reward_servers"))
        summary["reward_servers"] = [{"url": state.url, "error": state.error} for state in states]
    return summary


def key_of(run: Path) -> str:
    """Of the servers of a run: its own, or those that ``serve`` has started for it."""
    from megatron_gspo.report.rundir import RunDirectory
    from megatron_gspo.rollout.addresses import find_key as shared_key
    from megatron_gspo.rollout.sglang.probe import find_key

    config = RunDirectory(run).config()
    named = config.rollout.servers_from if config else ""
    return shared_key(Path(named)) if named else find_key(run / "servers")


def watch(path: Path, interval: float) -> Iterator[dict[str, Any]]:
    """Looks every ``interval`` seconds, the last time at a run that has ended."""
    from megatron_gspo.report.liveness import OVER

    while True:
        summary = look(path)
        yield summary
        if summary["status"] in OVER:
            return
        time.sleep(interval)


def _show_in_place(summaries: Iterator[dict[str, Any]]) -> dict[str, Any]:
    from rich.live import Live
    from rich.text import Text

    from megatron_gspo.report.status import format_status

    summary: dict[str, Any] = {}
    with Live(auto_refresh=False) as live:
        for summary in summaries:
            live.update(Text(format_status(summary)), refresh=True)
    return summary


def _print_changes(summaries: Iterator[dict[str, Any]], line_of: Any) -> dict[str, Any]:
    """Prints a summary when something in it has changed; the passing of time is no change."""
    summary, known = {}, None
    for summary in summaries:
        states = [(entry["rank"], entry["state"]) for entry in summary["ranks"]]
        content = {name: value for name, value in summary.items() if name not in ("silent_s", "ranks")}
        content["ranks"] = states
        if content != known:
            print(line_of(summary), flush=True)
        known = content
    return summary


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no time to wait")
    return value
