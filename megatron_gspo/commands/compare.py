"""``megatron-gspo compare``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_gspo.compare.plan import Plan, Request
    from megatron_gspo.compare.run import Outcome

SUMMARY = "train the same prompts and seeds with several losses and replay modes, and compare"
EXAMPLE = "megatron-gspo compare CONFIG.toml --losses grpo,gspo --replay off,r2,r3 --seeds 4 --out comparisons/first"
DOCS = "docs/comparison.md"
MORE = """
Runs a matrix of arms (loss x replay mode) and seeds. A cell is an ordinary run in OUT/cells/ARM/seed_000; a seed has
the same prompts, sampling seeds and cold start in every arm. Start the same command again to finish an interrupted
comparison, or with more seeds to extend it: finished cells stay. Ends in OUT/report.html and OUT/comparison.json.
Exit status: 1 when a cell failed, 2 for a mistake in what was asked, 130 when it was stopped."""
STOPPED = 130


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("config", nargs="?", type=Path, metavar="CONFIG", help="TOML file of what all cells share")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="[LOSS:]section.key=value",
        help="settings that replace the file's, in every arm or in those of one loss (gspo:algorithm.clip_low=1e-3)",
    )  # fmt: skip
    parser.add_argument("--losses", type=_names, default=("grpo", "gspo"), metavar="A,B", help="default: grpo,gspo")
    parser.add_argument("--replay", type=_names, default=("off",), metavar="A,B", help="off, r2, r3 (default: off)")
    parser.add_argument("--seeds", type=int, default=4, metavar="N", help="runs of each arm (default: %(default)s)")
    parser.add_argument("--first-seed", type=int, default=0, metavar="S", help="seeds S ... S+N-1 (default: 0)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the comparison is kept")
    parser.add_argument(
        "--cold-start", nargs="+", default=[], metavar="HF_DIR", action="extend",
        help="starting models, seed i from the i-th, round and round (default: model.path)",
    )  # fmt: skip
    parser.add_argument(
        "--dense-twin", nargs="+", default=[], metavar="HF_DIR", action="extend",
        help="dense models to run every loss on as well, as a control: arms LOSS-dense",
    )  # fmt: skip
    parser.add_argument(
        "--sweep", default="", metavar="SETTING=A:B:N",
        help="each arm at N values from A to B, spaced in the log: where do half of its runs collapse? "
        "(optimizer.lr=5e-4:3e-3:6)",
    )  # fmt: skip
    parser.add_argument("--jobs", type=int, metavar="J", help="cells at a time (default: as many as the cores hold)")
    parser.add_argument("--json", action="store_true", help="print the outcome as JSON")
    parser.set_defaults(watched=lambda options: "the comparison")
    parser.add_argument("--redraw", type=Path, metavar="DIR", help="only draw DIR's page again, from its JSON files")


def run(options: argparse.Namespace) -> int:
    """Runs the command; returns the exit status."""
    from megatron_gspo.quiet import mute

    if options.redraw is not None:
        return _redraw(options)
    mute()
    request = _request(options)
    from megatron_gspo.compare.directory import open_directory
    from megatron_gspo.compare.plan import check_cells, make_plan
    from megatron_gspo.compare.run import Stop, choose_jobs, run_plan, stopping_on_signals

    plan = make_plan(request)
    check_cells(plan)
    device = _device()
    jobs = choose_jobs(options.jobs, plan, device)
    stop = Stop()
    with open_directory(plan), Progress(plan, jobs) as progress, stopping_on_signals(stop, progress.say):
        run_plan(plan, jobs, device, progress.ended, stop, progress.say)
        return _finish(plan, progress.failed, stopped=stop.asked, as_json=options.json)


def _request(options: argparse.Namespace) -> Request:
    from megatron_gspo.compare.plan import Request
    from megatron_gspo.errors import ConfigError

    if options.config is None or options.out is None:
        raise ConfigError("name a configuration and --out DIR, or --redraw DIR")
    words = [*options.cold_start, *options.dense_twin]  # argparse gives them the settings that follow them too
    settings = [word for word in words if "=" in word]
    return Request(
        config=options.config,
        out=options.out,
        losses=options.losses,
        replay=options.replay,
        seeds=options.seeds,
        first_seed=options.first_seed,
        cold_starts=tuple(word for word in options.cold_start if word not in settings),
        dense_twins=tuple(word for word in options.dense_twin if word not in settings),
        overrides=(*options.overrides, *settings),
        sweep=options.sweep,
    )


def _redraw(options: argparse.Namespace) -> int:
    from megatron_gspo.errors import ConfigError
    from megatron_gspo.report.comparison import draw

    if not (options.redraw / "compare.json").is_file():
        raise ConfigError(f"--redraw {options.redraw}: no comparison (no compare.json in it)")
    draw(options.redraw)
    print(options.redraw / "report.html")
    return 0


def _finish(plan: Plan, failed: list[Outcome], *, stopped: bool, as_json: bool) -> int:
    """Draws what there is, and says how it ended; returns the exit status."""
    import json

    from megatron_gspo.report.comparison import draw

    finished = sum(cell.finished for cell in plan.cells)
    if finished:
        draw(plan.out)
    result = {
        "out": str(plan.out),
        "cells": len(plan.cells),
        "finished": finished,
        "failed": [outcome.as_record() for outcome in failed],
        "report": str(plan.out / "report.html") if finished else None,
    }
    for outcome in failed:
        print(f"error: {outcome.cell.name}: {outcome.error}", file=sys.stderr)
    if as_json:
        print(json.dumps(result, indent=2))
    elif finished:
        print(f"{finished} of {len(plan.cells)} cells: {result['report']}")
    if stopped:
        print("stopped: the same command finishes the rest", file=sys.stderr)
        return STOPPED
    return 1 if failed else 0


class Progress:
    """Cells on the terminal: a line each, and below it a bar with the time that is left."""

    def __init__(self, plan: Plan, jobs: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as Bars

        self.failed: list[Outcome] = []
        self._total, self._done = len(plan.cells), sum(cell.finished for cell in plan.cells)
        self._jobs, self._seconds = jobs, list[float]()
        self._console = Console(file=sys.stderr, highlight=False)
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
        self._bars = Bars(*columns, console=self._console, transient=True, disable=not self._console.is_terminal)
        self._task = self._bars.add_task("", total=self._total, completed=self._done)
        already = f", {self._done} of them finished already" if self._done else ""
        arms = ", ".join(arm.name for arm in plan.arms)
        self.say(f"{self._total} cells{already}, {jobs} at a time; arms {arms}; writes {plan.out}")

    def __enter__(self) -> Progress:
        self._bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bars.stop()

    def say(self, text: str) -> None:
        """A line above the bar."""
        self._console.print(text, markup=False, soft_wrap=True)

    def ended(self, outcome: Outcome) -> None:
        """Called by workers, for every cell that has ended."""
        if outcome.error:
            self.failed.append(outcome)
            self.say(f"     {outcome.cell.name}: {outcome.error}")
            return
        self._done += 1
        self._seconds.append(outcome.seconds)
        left = sum(self._seconds) / len(self._seconds) * (self._total - self._done) / self._jobs
        self.say(f"{self._done:4}/{self._total} {outcome.cell.name}: {outcome.seconds:.1f} s, {_clock(left)} left")
        self._bars.update(self._task, completed=self._done, description=f"{_clock(left)} left")


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"


def _device() -> str:
    from megatron_gspo.platforms import here

    return here().device_type


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(","))
