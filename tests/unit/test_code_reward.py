"""Programs, run in the real sandbox, get the verdicts that they deserve; what a whole reward makes of them."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, Self

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from megatron_gspo.config import RewardConfig, SandboxConfig
from megatron_gspo.errors import ConfigError, RewardError
from megatron_gspo.rewards import Reward, resolve_reward, score_groups
from megatron_gspo.rewards import code as code_reward
from megatron_gspo.rewards.cases import Call, read_problem
from megatron_gspo.rewards.code import KINDS, Code
from megatron_gspo.rewards.harness import caller, harness, results_of
from megatron_gspo.rewards.references import ReferenceCheck
from megatron_gspo.rewards.tester import OUT_OF_TIME, Report, Terms, Tester, checker_score, chosen, chunks, returned
from megatron_gspo.sandbox import Limits, Outcome, Program, Verdict, open_sandbox
from megatron_gspo.types import Prompt, Rollout
from tests.unit import code_cases as rows

CPP = "#include <iostream>\nint main() { long a, b; std::cin >> a >> b; std::cout << a + b << '\\n'; }\n"
CPP_FILES = (
    '#include <cstdio>\nint main() { freopen("input.txt", "r", stdin); freopen("output.txt", "w", stdout);\n'
    'int a, b; scanf("%d %d", &a, &b); printf("%d", a + b); }\n'
)
OTHERS = [
    ("cpp right", rows.CODEFORCES_FILES | {"input_mode": "stdio"}, CPP, "passed"),
    ("cpp does not compile", rows.CODEFORCES_FILES | {"input_mode": "stdio"}, CPP.replace(";", ""), "compile_error"),
    ("cpp files", rows.CODEFORCES_FILES, CPP_FILES, "passed"),
    ("cpp for a function of Python", rows.APPS_CALL, CPP, "compile_error"),
    ("stdin never ends", rows.APPS_STDIN, "while True:\n    pass\n", "time"),
    ("call never ends", rows.APPS_CALL, "def add(a, b):\n    while True:\n        pass\n", "time"),
    ("takes all memory", rows.APPS_CALL, "def add(a, b):\n    return [0] * 10**10\n", "memory"),
    ("writes without end", rows.APPS_STDIN, "while True:\n    print('a' * 9999)\n", "output"),
]
KINDS_OF_VALUES = ("int", "bytes", "complex", "dict", "tuple", "set", "frozenset", "opaque")
TERMS = Terms(time_s=0.5, total_s=20.0)


def programs() -> list[tuple[str, rows.Fields, str, str]]:
    return [*rows.PROGRAMS, *rows.UNUSUAL, *rows.CHEATS, *OTHERS]


async def tried() -> dict[str, Report]:
    """Every program, in one sandbox."""
    async with open_sandbox(SandboxConfig()) as sandbox:
        tester = Tester(sandbox, TERMS)

        async def one(name: str, row: rows.Fields, source: str) -> tuple[str, Report]:
            language = "cpp" if name.startswith("cpp") else "python"
            return name, await tester.report(language, source, read_problem(row))

        return dict(await asyncio.gather(*(one(name, row, source) for name, row, source, _ in programs())))


@pytest.fixture(scope="module")
def reports() -> dict[str, Report]:
    try:
        return asyncio.run(tried())
    except ConfigError as error:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(str(error))


@pytest.mark.parametrize(("name", "verdict"), [(name, verdict) for name, _, _, verdict in programs()])
def test_a_program_gets_the_verdict_that_it_deserves(name: str, verdict: str, reports: dict[str, Report]) -> None:
    report = reports[name]
    assert report.kind == verdict, report
    assert (report.share == 1.0) == (verdict == "passed")


def test_the_share_counts_tests_that_were_not_run_as_failed(reports: dict[str, Report]) -> None:
    assert reports["lcb prints the example"].scores == (1.0, 0.0)
    assert reports["lcb prints the example"].share == pytest.approx(1 / 3)
    assert reports["mbpp wrong"].scores == (1.0, 0.0, 0.0)
    assert reports["lcb call wrong once"].share == 0.0


def test_a_call_that_takes_too_long_ends_its_process_whatever_the_others_were_allowed() -> None:
    source = "def f(x):\n    while x:\n        pass\n    return x\n"
    request = caller(source, "", [["f", [x], {"dict": []}] for x in (0, 1, 0)], 0.2)
    found = subprocess.run(
        [sys.executable, "-I", "-c", harness("call")], input=request, capture_output=True, timeout=60, check=False
    )
    assert found.returncode == -signal.SIGPROF and 128 + signal.SIGPROF in OUT_OF_TIME
    assert results_of(found.stdout) == (True, [{"ok": 0}])


class Scripted:
    """A sandbox that answers as it is told, and notes what it was asked."""

    def __init__(self, answer: Callable[[bytes], Outcome]) -> None:
        self.answer, self.runs = answer, 0
        self.limits: list[Limits] = []

    async def run(
        self,
        program: Program,
        inputs: Sequence[bytes],
        limits: Limits,
        *,
        go_on: Callable[[int, Outcome], bool] | None = None,
    ) -> list[Outcome]:
        self.limits.append(limits)
        outcomes: list[Outcome] = []
        for index, each in enumerate(inputs):
            self.runs += 1
            outcomes.append(self.answer(each))
            if go_on is not None and not go_on(index, outcomes[-1]):
                break
        return outcomes

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass


def ended(stdout: bytes = b"", verdict: Verdict = Verdict.OK, wall_s: float = 0.1) -> Outcome:
    return Outcome(verdict, 0 if verdict is Verdict.OK else None, stdout, b"why", wall_s, 0.05)


MANY = read_problem({"input_output": json.dumps({"inputs": [str(i) for i in range(5_000)], "outputs": ["1"] * 5_000})})


def judged(sandbox: Scripted, terms: Terms = TERMS) -> Report:
    return asyncio.run(Tester(sandbox, terms).report("python", "print(1)", MANY))


def test_thousands_of_tests_cost_no_more_than_was_agreed() -> None:
    echo = Scripted(lambda given: ended(b"1"))
    assert judged(echo, Terms(max_tests=10)).kind == "passed" and echo.runs == 10
    slow = Scripted(lambda given: ended(b"1", wall_s=1.0))
    report = judged(slow, Terms(max_tests=None, total_s=20.0))
    assert (report.kind, report.total, slow.runs) == ("time", 5_000, 21) and report.share == 21 / 5_000
    wrong = Scripted(lambda given: ended(b"1" if given == b"0" else b"2"))
    assert judged(wrong).kind == "wrong" and wrong.runs == 2
    assert judged(wrong, Terms(stop=False)).share == 1 / 64 and wrong.runs == 2 + 64


def test_what_the_sandbox_could_not_run_is_no_verdict() -> None:
    flaky = Scripted(lambda given: ended(b"2") if given == b"0" else ended(verdict=Verdict.FAILED))
    assert not judged(flaky, Terms(stop=False)).graded
    assert judged(flaky).kind == "wrong", "the first test had failed before"


@pytest.mark.parametrize("name", ["MBPP", "HUMANEVAL", "APPS_CALL", "CODEFORCES"])
def test_a_sandbox_that_fails_leaves_every_kind_of_test_ungraded(name: str) -> None:
    broken = Scripted(lambda given: ended(verdict=Verdict.FAILED))
    report = asyncio.run(Tester(broken, TERMS).report("python", "a = 1", read_problem(getattr(rows, name))))
    assert report.kind == Verdict.FAILED and not report.graded and "why" in report.detail


def test_limits_are_the_problems_stretched_as_asked() -> None:
    echo = Scripted(lambda given: ended(b"3\n"))
    problem = read_problem(rows.TACO)
    asyncio.run(Tester(echo, Terms(time_factor=3.0)).report("python", "print(3)", problem))
    (limits,) = echo.limits
    assert (limits.cpu_s, limits.memory_bytes) == (6.0, 512 * 2**20) and limits.wall_s > 12.0
    small = read_problem(rows.CODEFORCES_FILES)
    asyncio.run(Tester(echo, TERMS).report("cpp", CPP, small))
    asyncio.run(Tester(echo, TERMS).report("python", "print(3)", small))
    assert [limits.memory_bytes >> 20 for limits in echo.limits] == [512, 64, 512]
    long = read_problem({"inputs": ["1"], "outputs": ["1" * 2**21]})
    asyncio.run(Tester(echo, TERMS).report("python", "print(3)", long))
    assert echo.limits[-1].output_bytes == 2**22 + 2**16


def test_the_tests_that_are_run_reach_from_the_first_to_the_last() -> None:
    assert chosen(range(1_000), 4) == [0, 333, 666, 999] and chosen(range(3), 4) == range(3)
    assert list(chosen(range(9), None)) == list(range(9)) and chosen(range(9), 1) == [0]
    assert [list(part) for part in chunks(9, (2, 4))] == [[0, 1], [2, 3, 4, 5], [6, 7, 8]]


@pytest.mark.parametrize(
    ("printed", "score"),
    [
        (b"1", 1.0),
        (b"wrong answer\n0\n", 0.0),
        (b"0.5", 0.5),
        (b"7", 1.0),
        (b"nan", 0.0),
        (b"-1", 0.0),
        (b"", 0.0),
        (b"ok", 0.0),
    ],
)
def test_a_checker_says_what_it_printed_last(printed: bytes, score: float) -> None:
    assert checker_score(ended(printed)) == score
    assert checker_score(ended(printed, Verdict.CRASHED)) == 0.0


def case(row: rows.Fields, *texts: str, question: str = "?") -> list[Rollout]:
    prompt = Prompt(
        "p", question, (1,), row.get("answer", ""), metadata={k: v for k, v in row.items() if k != "answer"}
    )
    ids, logprobs = np.ones(2, np.int32), np.zeros(2, np.float32)
    return [Rollout(prompt, i, ids, logprobs, "stop", (0,), text) for i, text in enumerate(texts)]


def scored(monkeypatch: pytest.MonkeyPatch, sandbox: Scripted, group: list[Rollout], **options: Any) -> Any:
    monkeypatch.setattr(code_reward, "open_sandbox", lambda config: sandbox)
    reward = resolve_reward(RewardConfig(function="code", options=options))
    (found,) = asyncio.run(score_groups(reward, [group]))
    return found


GOOD, BAD = "So:\n```python\nprint(3)\n```\n", "```python\nprint(4)\n```"


def test_a_response_gets_one_or_nothing_and_components(monkeypatch: pytest.MonkeyPatch) -> None:
    first = Scripted(lambda given: ended(b"3") if given == b"1 2\n" else ended(b"9"))
    found = scored(monkeypatch, first, case(rows.LCB_STDIN, GOOD, "I do not know."))
    assert found.rewards_G.tolist() == [0.0, 0.0]
    assert found.components_G[0] == {
        "passed": 1 / 3,
        "program": 1,
        "compiled": 1,
        **dict.fromkeys(KINDS, 0.0),
        "wrong": 1,
    }
    assert found.components_G[1] == {"passed": 0, "program": 0, "compiled": 0, **dict.fromkeys(KINDS, 0.0)}
    assert scored(monkeypatch, first, case(rows.LCB_STDIN, GOOD), credit="fraction").rewards_G.tolist() == [1 / 3]
    right = Scripted(lambda given: ended(str(sum(map(int, given.split()))).encode()))
    assert scored(monkeypatch, right, case(rows.LCB_STDIN, GOOD)).rewards_G.tolist() == [1.0]
    refused = Scripted(lambda given: ended(verdict=Verdict.COMPILE))
    table = scored(monkeypatch, refused, case(rows.LCB_STDIN, GOOD)).components_G[0]
    assert table["compiled"] == 0 and table["compile_error"] == table["program"] == 1


def test_a_sandbox_that_fails_leaves_a_response_ungraded_and_never_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Scripted(lambda given: ended(verdict=Verdict.FAILED))
    found = scored(monkeypatch, broken, case(rows.LCB_STDIN, GOOD, "none"))
    assert found.ungraded_G == ("sandbox_failure: why", "") and np.isnan(found.rewards_G[0]) and found.rewards_G[1] == 0


def test_the_time_that_a_program_waits_for_its_turn_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    class Waiting(Scripted):
        async def run(self, *arguments: Any, **named: Any) -> list[Outcome]:
            await asyncio.sleep(0.2)
            return await super().run(*arguments, **named)

    right = Waiting(lambda given: ended(str(sum(map(int, given.split()))).encode()))
    monkeypatch.setattr(code_reward, "open_sandbox", lambda config: right)
    reward = resolve_reward(RewardConfig(function="code", timeout_s=0.05))
    (found,) = asyncio.run(score_groups(reward, [case(rows.LCB_STDIN, GOOD)]))
    assert found.rewards_G.tolist() == [1.0] and found.stopped == 0


def test_a_tolerance_is_the_statements_unless_a_number_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    near = Scripted(lambda given: ended(str(sum(map(int, given.split())) + 1e-8).encode()))
    stated = case(rows.APPS_STDIN, GOOD, question="An absolute or relative error of at most 10^{-6} is fine.")
    assert scored(monkeypatch, near, stated).rewards_G.tolist() == [1.0]
    assert scored(monkeypatch, near, stated, tolerance=0).rewards_G.tolist() == [0.0]
    assert scored(monkeypatch, near, case(rows.APPS_STDIN, GOOD)).rewards_G.tolist() == [0.0]
    assert scored(monkeypatch, near, case(rows.APPS_STDIN, GOOD), tolerance=1e-6).rewards_G.tolist() == [1.0]


def test_tests_that_cannot_be_read_are_an_error_of_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    echo = Scripted(lambda given: ended())
    with pytest.raises(RewardError, match=r"raised ValueError: inputs is no list.*\(tests read as \"apps\"\)"):
        scored(monkeypatch, echo, case({"answer": '{"inputs": 3}'}, GOOD))
    answer = rows.EURUS["answer"]
    found = scored(monkeypatch, echo, case(rows.EURUS, answer), extraction="whole")
    assert found.rewards_G.tolist() == [0.0] and echo.runs == 0, "the tests themselves are no program"


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"tests": "codewars"}, "tests = 'codewars' .* none of auto, livecodebench, codeforces, humaneval, mbpp, apps"),
        ({"language": "rust"}, "language = 'rust' .* none of auto, python, cpp"),
        ({"credit": "half"}, "credit = 'half'"),
        ({"extraction": "regex"}, "extraction = 'regex'"),
        ({"time_factor": 0}, "time_factor = 0 .* must be above 0"),
        ({"time_s": "6"}, "time_s = '6': Input should be a valid number"),
        ({"max_tests": -1}, "max_tests = -1 .* whole number"),
        ({"max_tests": True}, "max_tests = True: Input should be a valid integer"),
        ({"tolerance": 1.5}, "tolerance = 1.5 .* must be in"),
        ({"timeout": 3}, "unexpected keyword argument 'timeout'"),
    ],
)
def test_an_option_that_means_nothing_is_named(options: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        resolve_reward(RewardConfig(function="code", options=options))


def test_options_reach_the_terms() -> None:
    made = Code(max_tests=0, credit="fraction", memory_mb=100, time_factor=2.0)
    assert made.terms == Terms(stop=False, max_tests=None, memory_bytes=100 * 2**20, time_factor=2.0)
    reward = Reward("code", made, built_in=True)
    assert reward.is_async and reward.untimed and not reward.sparing and not reward.by_answer
    assert reward.range == (0.0, 1.0)


def test_tests_that_cannot_be_read_are_found_before_training() -> None:
    good, bad = (Prompt(name, "?", (1,), answer) for name, answer in (("good", rows.EURUS["answer"]), ("bad", "42")))
    reward = resolve_reward(RewardConfig(function="code"))
    check = ReferenceCheck(reward, lambda text: [1] * min(9, len(text)), eos_id=0)
    survey = check.survey([good, bad], [0, 1])
    assert list(survey.problems) == [1] and survey.fatal == {1} and survey.graded == 2
    assert "the row has no tests in a layout that is known" in survey.problems[1]


def test_prompts_of_the_same_name_keep_their_own_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [json.dumps({"inputs": ["1"], "outputs": [wanted]}) for wanted in ("3", "4")]
    made = Code()
    found = [made.problem(Prompt("p", "?", (1,), answer)).tests for answer in answers]
    assert [tests.pairs for tests in found] == [(("1", "3"),), (("1", "4"),)]  # type: ignore[union-attr]
    prompt = Prompt("q", "?", (1,), answers[0])
    assert made.problem(prompt) is made.problem(prompt), "read once for all responses to a prompt"


def test_checkers_stop_at_the_first_that_says_no() -> None:
    sandbox = Scripted(lambda given: ended(b"0" if given.startswith(b"[") else b"1 1"))
    report = asyncio.run(Tester(sandbox, TERMS).report("python", "a", read_problem(rows.CODEFORCES)))
    assert (report.kind, report.share, sandbox.runs) == ("wrong", 0.0, 2 + 1)
    everything = Terms(stop=False)
    half = Scripted(lambda given: ended(b"0.5" if given.startswith(b"[") else b"1 1"))
    report = asyncio.run(Tester(half, everything).report("python", "a", read_problem(rows.CODEFORCES)))
    assert (report.kind, report.share, half.runs) == ("wrong", 0.5, 2 + 2)


def test_a_prompt_of_humaneval_that_no_template_changed_is_the_programs_beginning() -> None:
    row = {key: value for key, value in rows.HUMANEVAL.items() if key != "prompt"}
    text = rows.HUMANEVAL["prompt"]
    assert Code().problem(Prompt("p", text, (1,), "", metadata=row)).prefix == text
    assert Code().problem(Prompt("p", f"<|user|>{text}", (1,), "", metadata=row)).prefix == ""
    copied = row | {"code_prompt": text}
    assert Code().problem(Prompt("p", f"<|user|>{text}", (1,), "", metadata=copied)).prefix == text


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**400), 10**400) | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*KINDS_OF_VALUES, "ok", "x"]), inner, max_size=2)
    ),
)


@pytest.mark.parametrize("tree", [{"dict": [[i * (2**61 - 1), 0] for i in range(20_000)]}, None])
def test_keys_that_collide_do_not_keep_the_run_from_going_on(tree: Any) -> None:
    tree = tree or [{"set": [[i * (2**61 - 1) for i in range(20_000)]][0]}]
    began = time.process_time()
    assert not returned(Call((), [1, {1: 2}]), {"ok": tree}, None)
    assert time.process_time() - began < 0.5  # 4 s where they are put into a dictionary


@example({"complex": [10**400, 0]}, None)
@given(JSON, st.sampled_from([None, 1e-6]))
def test_whatever_a_program_says_its_results_are_it_is_right_or_wrong(tree: Any, tolerance: float | None) -> None:
    (ready, results) = results_of(b'{"ready": true}\n' + json.dumps({"ok": tree}).encode() + b"\n")
    assert ready and len(results) == 1
    assert returned(Call((), ["no JSON of it is this one", [1.5], {"a": 1}]), results[0], tolerance) is False


@given(st.binary(max_size=60), st.integers(0, 3))
def test_lines_that_are_none_end_the_results(junk: bytes, at: int) -> None:
    lines = [b'{"ready": true}', b'{"ok": 1}', b'{"ok": 2}']
    ready, results = results_of(b"\n".join([*lines[:at], b"?" + junk.replace(b"\n", b""), *lines[at:]]))
    assert ready == (at > 0) and results == [{"ok": 1}, {"ok": 2}][: max(0, at - 1)]
