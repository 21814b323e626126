"""Hostile programs are contained, get the verdict that is theirs, and leave the host as it was."""

from __future__ import annotations

import asyncio

import pytest

from tests.sandbox.cases import Case
from tests.sandbox.hostile import all_cases
from tests.sandbox.world import World, hostile

NAMED = (
    "fork bomb/counted",
    "threads/counted",
    "zombies/9",
    "daemons/6",
    "pipe kept open/500",
    "memory/bytearray/2147483648",
    "memory/of forks/60",
    "disk/full /box",
    "disk/sparse/1099511627776",
    "output/stdout/65536",
    "output/of children/3",
    "time/deaf sleep",
    "connect SOCK_STREAM/127.0.0.1:@PORT@",
    "absent/@CANARY@/secret",
    "through a link//etc/shadow",
    "read-only//proc/sys/kernel/core_pattern",
    "signal/first process 9",
    "unshare/libc.unshare(268435456)",
    "forged/b'{\"exit-code\": 0}\\n'",
    "descriptors inherited",
)
CASES = {case.name: case for case in all_cases()}


def wrong_with(world: World, cases: list[Case]) -> list[str]:
    return asyncio.run(hostile(world, cases)) + world.complaints()


def test_twenty_hostile_programs_are_contained(world: World) -> None:
    cases = [CASES[name] for name in NAMED]
    assert len(cases) == 20
    assert wrong_with(world, cases) == []


def test_there_are_a_thousand_and_none_twice() -> None:
    assert len(all_cases()) == len(CASES) >= 1000


def test_no_verdict_that_is_expected_blames_the_sandbox() -> None:
    assert not [case.name for case in all_cases() if "sandbox_failure" in case.verdicts or not case.verdicts]


@pytest.mark.sandbox_suite
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("family", sorted({case.name.split("/")[0] for case in CASES.values()}))
def test_every_hostile_program_is_contained(world: World, family: str) -> None:
    assert wrong_with(world, [case for case in CASES.values() if case.name.split("/")[0] == family]) == []
