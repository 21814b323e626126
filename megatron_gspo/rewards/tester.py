"""Runs a program in the sandbox against a problem's tests, and says how many it passes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from megatron_gspo.rewards.cases import Asserts, Call, Calls, Problem, Stdin
from megatron_gspo.rewards.dialect import imports_for, in_front
from megatron_gspo.rewards.harness import by_files, caller, checking, harness, judged, results_of
from megatron_gspo.rewards.inside.call import SYNTAX
from megatron_gspo.rewards.inside.values import decode, dumps, encode
from megatron_gspo.rewards.outputs import same_output, same_value
from megatron_gspo.sandbox import Limits, Outcome, Program, Sandbox, Verdict

T = TypeVar("T")
MIB = 2**20
LEAST_MEMORY = {"python": 512 * MIB}
"""What a language needs to start, and a thread with a stack of 256 MiB, which programs that recurse ask for: it is
address space, and counts here though little of it is used. Limits of problems are for other machines."""
OWN_LIMITS = Limits(wall_s=30.0, cpu_s=15.0, memory_bytes=1024 * MIB)
"""Of programs that a data file brings: checkers and asserts."""
OUT_OF_TIME = (128 + 27, 128 + 24)
"""Exit statuses of SIGPROF, by which the caller ends a call, and SIGXCPU."""
CHUNKS = (8, 32)
"""Calls of a function that share a process: few in the first one, which finds most programs that are wrong."""
MOST_CALLS = 5_000


@dataclass(frozen=True)
class Terms:
    """How programs are tried."""

    stop: bool = True
    """Ends at the first test that fails."""
    max_tests: int | None = 64
    time_factor: float = 1.0
    time_s: float = 6.0
    """Processor seconds of a test whose problem sets no limit."""
    memory_bytes: int = 512 * MIB
    total_s: float = 60.0
    """Seconds of all tests of one program, after which the rest count as failed."""


@dataclass(frozen=True)
class Report:
    """What became of a program."""

    kind: str
    """"passed", "wrong" or the verdict of the first test that was not passed; "unusable" for tests that cannot be
    run."""
    scores: tuple[float, ...] = ()
    """1 for a passed test, 0 for a failed one, and what a checker gives; those that were run, in order."""
    total: int = 0
    """Tests that there were to run."""
    detail: str = ""

    @property
    def share(self) -> float:
        """The part of the tests that it passed; tests that were not run are failed ones."""
        return sum(self.scores) / self.total if self.total else 0.0

    @property
    def graded(self) -> bool:
        """Whether it says something about the program."""
        return self.kind not in (Verdict.FAILED, "unusable")


@dataclass
class Tester:
    """Tries programs; one for each sandbox."""

    sandbox: Sandbox
    terms: Terms
    learnt: dict[Asserts, list[Any]] = field(default_factory=dict)
    """The calls that asserts make, which are the same for every program."""
    learning: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def report(self, language: str, source: str, problem: Problem, tolerance: float | None = None) -> Report:
        """Tries one program. Raises nothing of the program's."""
        source = in_front(problem.prefix, source)
        imports = imports_for(source) if problem.imports and language == "python" else ""
        if isinstance(problem.tests, Stdin):
            return await self._stdin(language, source, imports, problem, problem.tests, tolerance)
        if language != "python":
            return Report(Verdict.COMPILE, (), len(problem.tests), f"the tests call Python, the program is {language}")
        if isinstance(problem.tests, Calls):
            return await self._calls(source, imports, problem, problem.tests, tolerance)
        return await self._asserts(source, imports, problem, problem.tests)

    async def _stdin(
        self, language: str, source: str, imports: str, problem: Problem, tests: Stdin, tolerance: float | None
    ) -> Report:
        pairs = chosen(tests.pairs, self.terms.max_tests)
        source = in_front(f"{imports}\n", source) if imports else source
        program = Program(language, by_files(language, source) if tests.by_files else source)
        longest = max(len(expected) for _, expected in pairs)
        limits = self._limits(problem, language, output_bytes=max(MIB, 2 * longest + 2**16))
        trial = Trial(self.terms, len(pairs))

        def seen(at: int, outcome: Outcome) -> bool:
            right = tests.checker or same_output(tests, pairs[at][1], text(outcome.stdout), tolerance)
            return trial.add(outcome, 1.0 if right else 0.0)

        outcomes = await self.sandbox.run(program, [given.encode() for given, _ in pairs], limits, go_on=seen)
        if language == "python" and outcomes and is_syntax_error(outcomes[0]):
            return Report(Verdict.COMPILE, (), len(pairs), text(outcomes[0].stderr)[-200:])
        report = trial.report(outcomes)
        if not tests.checker or not trial.scores or not report.graded:
            return report
        return await self._checked(tests.checker, pairs, outcomes, report)

    async def _checked(
        self, checker: str, pairs: Sequence[tuple[str, str]], outcomes: list[Outcome], report: Report
    ) -> Report:
        """The report with what a checker says of each output that came in time."""
        ran = [at for at, outcome in enumerate(outcomes) if outcome.verdict is Verdict.OK]
        inputs = [judged(*pairs[at], text(outcomes[at].stdout)) for at in ran]
        scores: list[float] = []

        def seen(_: int, outcome: Outcome) -> bool:
            scores.append(checker_score(outcome))
            return not self.terms.stop or scores[-1] >= 1.0

        verdicts = await self.sandbox.run(checking(checker), inputs, OWN_LIMITS, go_on=seen) if inputs else []
        if any(verdict.verdict is Verdict.FAILED for verdict in verdicts):
            return Report(Verdict.FAILED, (), report.total, text(verdicts[-1].stderr))
        given = dict(zip(ran, [checker_score(verdict) for verdict in verdicts], strict=False))
        final = [given.get(at, 0.0) for at in range(len(outcomes))]
        first = next((at for at, score in enumerate(final) if score < 1.0), None)
        if first is None:
            return Report(report.kind, tuple(final), report.total, report.detail)
        kind = "wrong" if outcomes[first].verdict is Verdict.OK else str(outcomes[first].verdict)
        return Report(kind, tuple(final), report.total)

    async def _calls(
        self, source: str, imports: str, problem: Problem, tests: Calls, tolerance: float | None
    ) -> Report:
        calls = chosen(tests.calls, self.terms.max_tests)
        encoded = [[tests.name, encode(list(call.arguments)), {"dict": []}] for call in calls]
        trial = Trial(self.terms, len(calls))
        parts = chunks(len(calls), CHUNKS if self.terms.stop else CHUNKS[1:])

        def seen(at: int, outcome: Outcome) -> bool:
            part = parts[at]
            ready, results = results_of(outcome.stdout)
            kinds = [kind_of(outcome, ready, results, i) for i in range(len(part))]
            right = [
                not kind and returned(calls[j], results[i], tolerance)
                for i, (j, kind) in enumerate(zip(part, kinds, strict=True))
            ]
            return trial.add_all(outcome, [1.0 if good else 0.0 for good in right], kinds)

        outcomes = await self._called(source, imports, problem, [[encoded[i] for i in part] for part in parts], seen)
        return trial.report(outcomes)

    async def _asserts(self, source: str, imports: str, problem: Problem, tests: Asserts) -> Report:
        learnt = await self._learnt(tests)
        if isinstance(learnt, Report):
            return learnt
        usable = [at for at, calls in enumerate(learnt) if isinstance(calls, list)]
        usable = list(chosen(usable, self.terms.max_tests))
        calls = [call for at in usable for call in learnt[at]]
        if not calls or len(calls) > MOST_CALLS:
            return Report("unusable", (), len(tests), f"{learnt[0]!s:.200}" if not calls else f"{len(calls)} calls")
        (outcome,) = await self._called(source, imports, problem, [calls], None)
        ready, results = results_of(outcome.stdout)
        if outcome.verdict is Verdict.FAILED or not ready:
            return Report(kind_of(outcome, ready, results, 0), (), len(usable), text(outcome.stderr)[-200:])
        kinds = [kind_of(outcome, ready, results, i) for i in range(len(calls))]
        replay: dict[str, Any] = {"setup": tests.setup, "entry": tests.entry}
        replay |= {"checks": [tests.checks[at] for at in usable]}
        replay |= {
            "calls": [learnt[at] for at in usable],
            "results": dealt(results, [len(learnt[at]) for at in usable]),
        }
        answer = await self._own(harness("asserts"), replay)
        if isinstance(answer, Report):  # with stand-ins they have ended: what they choke on is what was returned
            spoilt = Report("wrong", (0.0,) * len(usable), len(usable), answer.detail)
            return spoilt if answer.kind == "unusable" else answer
        scores = tuple(1.0 if good else 0.0 for good in answer["passed"])
        failed = next((kind for kind in kinds if kind), "wrong")
        return Report("passed" if min(scores) == 1.0 else failed, scores, len(usable))

    async def _learnt(self, tests: Asserts) -> list[Any] | Report:
        """The calls of each of the checks; what cannot be called elsewhere is a text that says why."""
        async with self.learning:
            return await self._learn(tests)

    async def _learn(self, tests: Asserts) -> list[Any] | Report:
        if tests not in self.learnt:
            asked = {"setup": tests.setup, "entry": tests.entry, "checks": list(tests.checks)}
            answer = await self._own(harness("asserts"), asked)
            if isinstance(answer, Report):
                return answer
            self.learnt[tests] = answer["calls"]
            while len(self.learnt) > MOST_LEARNT:
                del self.learnt[next(iter(self.learnt))]
        return self.learnt[tests]

    async def _own(self, source: str, asked: dict[str, Any]) -> dict[str, Any] | Report:
        """What one of our programs says; a report where it did not end."""
        (outcome,) = await self.sandbox.run(Program("python", source), [dumps(asked)], OWN_LIMITS)
        if outcome.verdict is Verdict.OK:
            found: dict[str, Any] = json.loads(outcome.stdout)
            return found
        kind = Verdict.FAILED if outcome.verdict is Verdict.FAILED else "unusable"
        return Report(kind, (), 0, f"the tests ended with {outcome.verdict}: {text(outcome.stderr)[-200:]}")

    async def _called(
        self, source: str, imports: str, problem: Problem, parts: list[list[Any]], seen: Any
    ) -> list[Outcome]:
        """Calls of functions of a program, a process for each part."""
        limits = self._limits(problem, "python")
        seconds, most = limits.cpu_s, max(map(len, parts))
        together = Limits(
            wall_s=min(2 * seconds * most, self.terms.total_s) + START_S,
            cpu_s=min(seconds * most, self.terms.total_s) + START_S,
            memory_bytes=limits.memory_bytes,
            output_bytes=4 * MIB,
        )
        inputs = [caller(source, imports, part, seconds) for part in parts]
        return await self.sandbox.run(Program("python", harness("call")), inputs, together, go_on=seen)

    def _limits(self, problem: Problem, language: str, output_bytes: int = MIB) -> Limits:
        """Of one test."""
        cpu_s = (problem.time_s or self.terms.time_s) * self.terms.time_factor
        memory = max(problem.memory_bytes or self.terms.memory_bytes, LEAST_MEMORY.get(language, 0))
        return Limits(wall_s=2 * cpu_s + START_S, cpu_s=cpu_s, memory_bytes=memory, output_bytes=output_bytes)


START_S = 1.0
"""Seconds that a process may take before its program runs."""
MOST_LEARNT = 4_096


@dataclass
class Trial:
    """Counts what becomes of the tests while they run."""

    terms: Terms
    total: int
    scores: list[float] = field(default_factory=list)
    kind: str = ""
    """Of the first test that failed."""
    spent_s: float = 0.0

    def add(self, outcome: Outcome, score: float) -> bool:
        """One test's outcome, and its score if the program ended well. Returns whether to go on."""
        ended = outcome.verdict is Verdict.OK
        return self.add_all(outcome, [score if ended else 0.0], ["" if ended else str(outcome.verdict)])

    def add_all(self, outcome: Outcome, scores: list[float], kinds: list[str]) -> bool:
        """The tests of one run, with why each did not end ("" for those that did). Returns whether to go on."""
        for score, kind in zip(scores, kinds, strict=True):
            self.scores.append(score)
            if score < 1.0 and not self.kind:
                self.kind = kind or "wrong"
        self.spent_s += outcome.wall_s
        if outcome.verdict in (Verdict.FAILED, Verdict.COMPILE):
            return False
        if self.spent_s > self.terms.total_s and len(self.scores) < self.total:
            self.kind = self.kind or Verdict.TIME
            return False
        return not (self.kind and self.terms.stop)

    def report(self, outcomes: Sequence[Outcome]) -> Report:
        """What the sandbox could not do comes before anything else; then what the compiler said."""
        for verdict in (Verdict.FAILED, Verdict.COMPILE):
            for outcome in outcomes:
                if outcome.verdict is verdict:
                    return Report(str(verdict), (), self.total, text(outcome.stderr)[-200:])
        return Report(self.kind or "passed", tuple(self.scores), self.total)


def is_syntax_error(outcome: Outcome) -> bool:
    """Whether Python has refused a program. No traceback stands over that, as over one that the program raises."""
    words = text(outcome.stderr)
    last = words.strip().rpartition("\n")[2]
    refused = last.startswith(("SyntaxError:", "IndentationError:", "TabError:"))
    return outcome.verdict is Verdict.CRASHED and refused and not words.startswith("Traceback")


def kind_of(outcome: Outcome, ready: bool, results: list[dict[str, Any]], at: int) -> str:
    """Why a call returned nothing; "" where it returned something."""
    if at < len(results):
        raised = results[at].get("raised")
        if raised is None:
            return ""
        return str(Verdict.MEMORY if raised == "MemoryError" else Verdict.CRASHED)
    if outcome.verdict is Verdict.CRASHED and outcome.status == SYNTAX and not ready:
        return str(Verdict.COMPILE)
    if outcome.verdict is Verdict.CRASHED and outcome.status in OUT_OF_TIME:
        return str(Verdict.TIME)
    return str(Verdict.CRASHED if outcome.verdict is Verdict.OK else outcome.verdict)


def returned(call: Call, result: dict[str, Any], tolerance: float | None) -> bool:
    """Whether a result is what a call should return."""
    try:
        if most_items(result["ok"]) > most_items(encode(call.expected)):
            return False
        found = decode(result["ok"])
    except (KeyError, ValueError, TypeError, ArithmeticError, RecursionError):
        return False
    if same_value(call.expected, found, tolerance):
        return True
    wrapped = call.either and isinstance(call.expected, list) and len(call.expected) > 0
    return wrapped and same_value(call.expected[0], found, tolerance)


def most_items(tree: Any) -> int:
    """Items of the largest dictionary or set in an encoded value, which is built here: keys of one hash take quadratic
    time, and a program may choose its own."""
    if isinstance(tree, list):
        return max(map(most_items, tree), default=0)
    if not isinstance(tree, dict):
        return 0
    hashed = [len(inside) for kind, inside in tree.items() if kind in ("dict", "set", "frozenset")]
    return max([*hashed, *map(most_items, tree.values())], default=0)


def checker_score(outcome: Outcome) -> float:
    """The number in [0, 1] that a checker printed last; 0 where it printed none or did not end well."""
    words = text(outcome.stdout).split()
    try:
        score = float(words[-1]) if outcome.verdict is Verdict.OK and words else 0.0
    except ValueError:
        return 0.0
    return min(score, 1.0) if score > 0 else 0.0


def chosen(tests: Sequence[T], most: int | None) -> Sequence[T]:
    """At most so many tests, spread evenly from the first to the last."""
    if most is None or len(tests) <= most:
        return tests
    return [tests[round(i * (len(tests) - 1) / max(1, most - 1))] for i in range(most)]


def chunks(count: int, sizes: Sequence[int]) -> list[range]:
    """``count`` tests in parts of these sizes, the last of which repeats."""
    parts: list[range] = []
    start = 0
    while start < count:
        size = sizes[min(len(parts), len(sizes) - 1)]
        parts.append(range(start, min(count, start + size)))
        start += size
    return parts


def dealt(results: list[dict[str, Any]], counts: Sequence[int]) -> list[list[dict[str, Any]]]:
    """Results in parts of these lengths; the last ones are shorter where results are missing."""
    parts, at = [], 0
    for count in counts:
        parts.append(results[at : at + count])
        at += count
    return parts


def text(output: bytes) -> str:
    """An output as text; what is no UTF-8 is replaced."""
    return output.decode("utf-8", errors="replace")
