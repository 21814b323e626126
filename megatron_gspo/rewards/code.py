"""The response's program passes the problem's tests, run in a sandbox. docs/code-rewards.md."""

from __future__ import annotations

from collections import OrderedDict
from types import TracebackType
from typing import Literal, Self, get_args

from megatron_gspo.config import SandboxConfig
from megatron_gspo.errors import ConfigError
from megatron_gspo.rewards.cases import FORMATS, Problem, read_problem
from megatron_gspo.rewards.interface import RewardContext, Score, Ungraded
from megatron_gspo.rewards.outputs import stated_tolerance
from megatron_gspo.rewards.programs import TAGS, Extraction, program_of
from megatron_gspo.rewards.tester import MIB, Report, Terms, Tester
from megatron_gspo.sandbox import Sandbox, Verdict, open_sandbox
from megatron_gspo.types import Prompt, Rollout

Credit = Literal["all", "fraction"]
KINDS = ("wrong", *(str(verdict) for verdict in Verdict if verdict not in (Verdict.OK, Verdict.FAILED)))
"""Why a program failed: each is a component of the reward, 1 for the first test that was not passed."""
MOST = 1_000_000
"""Of each limit, in its own unit: the kernel takes none without end."""
READ_AT_ONCE = 32
"""Problems whose tests are kept: those of LiveCodeBench have up to 100 MB."""


class Code:
    """1 when the program passes every test, else 0; with ``credit = "fraction"`` the share of tests that it passes.

    ``tests``: the layout of the tests, of ``cases.FORMATS``, or "auto". ``language``: "python", "cpp", or "auto" for
    what the fence says. ``extraction``: where the program is ("fence", "whole", "fence_or_whole"). ``stop``: whether to
    end at the first test that fails; with ``credit = "fraction"`` all are run. ``max_tests``: tests that are run,
    spread evenly over the problem's; 0 for all. ``time_factor`` stretches the problem's limits, ``time_s`` and
    ``memory_mb`` stand in for those that it does not set, ``total_s`` is for all tests of a program together.
    ``tolerance``: of floating point numbers, "statement" for what the problem's text allows, or a number (0: none).

    A program that nobody could run (the sandbox has failed, tests that cannot be run) leaves its response ungraded.
    Raises ValueError for tests that cannot be read.
    """

    limits_itself = True
    """A program's turn in the sandbox may come late; its time is counted from there."""
    answers_are_responses = False
    sparing = False
    by_answer = False

    def __init__(
        self,
        context: RewardContext | None = None,
        *,
        tests: str = "auto",
        language: str = "python",
        extraction: Extraction = "fence",
        credit: Credit = "all",
        stop: bool = True,
        max_tests: int = 64,
        time_factor: float = 1.0,
        time_s: float = 6.0,
        memory_mb: int = 512,
        total_s: float = 60.0,
        tolerance: float | Literal["statement"] = "statement",
    ) -> None:
        _one_of("tests", tests, ("auto", *FORMATS))
        _one_of("language", language, ("auto", *TAGS))
        _one_of("extraction", extraction, get_args(Extraction))
        _one_of("credit", credit, get_args(Credit))
        numbers = {"time_factor": time_factor, "time_s": time_s, "memory_mb": memory_mb, "total_s": total_s}
        for name, value in numbers.items():
            _number(name, value, _is_number(value) and 0 < value <= MOST, f"above 0, and at most {MOST:,}")
        whole = isinstance(max_tests, int) and not isinstance(max_tests, bool) and max_tests >= 0
        _number("max_tests", max_tests, whole, "a whole number, 0 for all tests")
        if tolerance != "statement":
            _number("tolerance", tolerance, _is_number(tolerance) and 0 <= tolerance < 1, 'in [0, 1), or "statement"')
        self.tests, self.language, self.extraction, self.credit = tests, language, extraction, credit
        self.tolerance = tolerance
        self.terms = Terms(
            stop and credit == "all", max_tests or None, time_factor, time_s, int(memory_mb * MIB), total_s
        )
        self._config: SandboxConfig = (context and context.sandbox) or SandboxConfig()
        self._sandbox: Sandbox | None = None
        self._tester: Tester | None = None
        self._read: OrderedDict[str, tuple[Prompt, Problem]] = OrderedDict()

    async def __aenter__(self) -> Self:
        self._sandbox = await open_sandbox(self._config).__aenter__()
        learnt = self._tester.learnt if self._tester else {}
        self._tester = Tester(self._sandbox, self.terms, learnt)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._sandbox is not None:
            sandbox, self._sandbox = self._sandbox, None
            await sandbox.__aexit__(kind, error, traceback)

    async def __call__(self, prompt: Prompt, response: Rollout) -> Score | Ungraded:
        problem = self.problem(prompt)
        if response.text == prompt.answer:  # the tests themselves, as references are looked at: they are no program
            return self.score(None)
        found = program_of(prompt.text, response.text, problem.language or self.language, self.extraction)
        if found is None:
            return self.score(None)
        assert self._tester is not None, "called outside of its lifetime"
        tolerance = stated_tolerance(prompt.text) if self.tolerance == "statement" else self.tolerance or None
        report = await self._tester.report(*found, problem, tolerance)
        return self.score(report) if report.graded else Ungraded(f"{report.kind}: {report.detail}")

    def problem(self, prompt: Prompt) -> Problem:
        """The tests of a prompt. Raises ValueError where they cannot be read."""
        known = self._read.get(prompt.id)
        if known is None or known[0] is not prompt:
            row = {"prompt": prompt.text, **prompt.metadata, "answer": prompt.answer}
            problem = read_problem(row, self.tests)
            self._read[prompt.id] = known = (prompt, problem)
            while len(self._read) > READ_AT_ONCE:
                self._read.popitem(last=False)
        return known[1]

    def score(self, report: Report | None) -> Score:
        """The reward of a program, and its components; of None for a response without one."""
        passed = report is not None and report.kind == "passed"
        share = report.share if report else 0.0
        kind = report.kind if report else ""
        components = {
            "passed": share,
            "program": float(report is not None),
            "compiled": float(report is not None and kind != Verdict.COMPILE),
            **{name: float(kind == name) for name in KINDS},
        }
        return Score(share if self.credit == "fraction" else float(passed), components)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(name: str, value: object, sound: bool, what: str) -> None:
    if not sound:
        raise ConfigError(f'reward.options.{name} = {value!r} of "code" must be {what}')


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(f'reward.options.{name} = {value!r} of "code" is none of {", ".join(known)}')
