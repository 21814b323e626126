"""``python -m tests.chaos``: faults on short runs, until so many have struck; then whether a single bit was changed."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections import Counter, deque
from pathlib import Path
from typing import Self

from tests.chaos.faults import SERVERS, Fault, draw
from tests.chaos.harness import ROOT, Disturbed, HangError, Outcome, leftovers, results, settings, small_disk
from tests.chaos.servers import RealServers, StandIns

SYNCS = ("disk",)
"""Bytes of files are a function of the weights; what goes over HTTP is pickles, whose bytes are not."""
A_RUN = 4
"""Faults, at most."""
REAL = ('correction.rule="off"', "rollout.timeout_s=60", "sync.timeout_s=60")
"""An engine's logprobs repeat but for their last digits, and must not enter the weights."""


def main() -> int:
    """1 when a run hung or came out otherwise."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--seed", type=int, default=17)
    parser.add_argument("--skip", type=int, default=0, help="of the seed's faults, to do the list in pieces")
    parser.add_argument("--keep", type=Path, help="where what the runs wrote stays, for reading")
    parser.add_argument("--real", type=int, default=0, help="of the faults, the last so many: with real servers")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="chaos-", dir="/tmp") as temporary:
        return strike(options, (options.keep or Path(temporary)).absolute())


def strike(options: argparse.Namespace, work: Path) -> int:
    """All faults, run after run."""
    quickstart = prepare(work / "quickstart")
    with small_disk(work / "try") as can_fill:
        pass
    without = frozenset() if can_fill else frozenset({"fill the disk"})
    if without:
        print("not root: no small disk can be mounted, and none is filled")
    faults = draw(options.seed, options.skip + options.faults, without=without)[options.skip :]
    first = len(faults) - options.real
    done = [Struck(work, quickstart, real=False).by(faults[:first])] if first > 0 else []
    done += [Struck(work, quickstart, real=True).by(faults[max(first, 0) :])] if options.real else []
    return max(each.report() for each in done)


class Struck:
    """Runs with servers of one sort, until a list of faults is used up."""

    def __init__(self, work: Path, quickstart: Path, *, real: bool) -> None:
        self._work, self._quickstart, self._real = work / ("real" if real else "stand-in"), quickstart, real
        self._syncs = SYNCS[-1:] if real else SYNCS
        self._struck: list[Fault] = []
        self._wrong: list[str] = []
        self._runs = self._starts = 0
        self._began = time.monotonic()

    def by(self, faults: list[Fault]) -> Self:
        """Run after run, each held against one that nobody disturbs."""
        left = deque(faults)
        undisturbed = {sync: self._run(f"undisturbed-{sync}", sync, deque())[0] for sync in self._syncs}
        while left:
            sync = self._syncs[self._runs % len(self._syncs)]
            now = deque([left.popleft() for _ in range(min(A_RUN, len(left)))])
            name = f"run-{self._runs:03d}"
            print(f"{name} ({sync})", flush=True)
            try:
                found, outcome = self._run(name, sync, now)
                self._wrong += compare(name, found, undisturbed[sync])
                self._struck += outcome.struck
                self._starts += len(outcome.statuses)
            except HangError as error:
                self._wrong.append(f"{name} hung: {error}")
            left.extendleft(reversed(now))
            self._runs += 1
        return self

    def _run(self, name: str, sync: str, faults: deque[Fault]) -> tuple[dict[str, object], Outcome]:
        place = self._work / name / "disk"
        model = self._quickstart / "model"
        servers = RealServers(model, 1, self._work / name / "logs") if self._real else StandIns(model, SERVERS)
        more = REAL if self._real else ()
        with small_disk(place), servers.running():
            overrides = settings(place, self._quickstart, servers.urls, sync, *more)
            outcome = Disturbed(place, overrides, servers, say).finish(faults)
            self._wrong += [f"{name} left {path}" for path in leftovers(place)]
            return results(place / "run", real=self._real), outcome

    def report(self) -> int:
        """Says what was done, and what came of it; 1 when something was wrong."""
        kinds, moments = Counter(each.kind for each in self._struck), Counter(each.moment for each in self._struck)
        sort = "real servers" if self._real else "stand-ins"
        seconds = time.monotonic() - self._began
        print(f"{sort}: {len(self._struck)} faults in {self._runs} runs ({self._starts} starts) in {seconds:.0f} s")
        for counted in (kinds, moments):
            print("  " + ", ".join(f"{count} {name}" for name, count in counted.most_common()))
        for line in self._wrong:
            print(f"WRONG: {line}")
        print(f"  {len(self._wrong)} wrong" if self._wrong else "  every run has the results of the undisturbed one")
        return 1 if self._wrong else 0


def prepare(directory: Path) -> Path:
    """The quickstart's model and prompts."""
    command = [sys.executable, str(ROOT / "examples" / "quickstart" / "prepare.py"), str(directory)]
    sizes = ["--sft-examples", "64", "--train-prompts", "64", "--eval-prompts", "16"]
    subprocess.run([*command, *sizes], check=True, stdout=subprocess.DEVNULL)
    return directory


def compare(what: str, found: dict[str, object], wanted: dict[str, object]) -> list[str]:
    """A line for each result that is another, or is missing."""
    names = [name for name in sorted(found.keys() | wanted.keys()) if found.get(name) != wanted.get(name)]
    return [f"{what}: {name} is not that of the undisturbed run" for name in names]


def say(line: str) -> None:
    """At once, so that a run can be watched."""
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
