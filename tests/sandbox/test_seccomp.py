"""The filter of system calls, run by a small interpreter of classic BPF: for other machines than this one, too."""

from __future__ import annotations

import errno
import re
import struct
from pathlib import Path

import pytest

from megatron_gspo.sandbox import seccomp
from megatron_gspo.sandbox.seccomp import CALLS, CLONE, CLONE3, MACHINES, SOCKET, filter_for

ALLOWED, KILLED = "allowed", "killed"
SIGCHLD = 17
CLONE_THREAD = 0x3D0F00
"""What the C library makes a thread with."""


def judged(machine: str, number: int, first: int = 0, *, arch: int | None = None) -> str | int:
    """What the filter says of a call: allowed, killed, or the number of an error."""
    program = [struct.unpack("=HBBI", piece) for piece in re.findall(rb"(?s).{8}", filter_for(machine))]
    data = struct.pack("=IIQ6Q", number, MACHINES[machine][1] if arch is None else arch, 0, first, 0, 0, 0, 0, 0)
    at, value = 0, 0
    while True:
        code, if_true, if_false, operand = program[at]
        at += 1
        if code == 0x20:
            (value,) = struct.unpack_from("=I", data, operand)
        elif code == 0x06:
            action = operand & 0xFFFF0000
            return {0x7FFF0000: ALLOWED, 0x80000000: KILLED}.get(action) or operand & 0xFFFF
        else:
            holds = {0x15: value == operand, 0x35: value >= operand, 0x45: bool(value & operand)}[code]
            at += if_true if holds else if_false


@pytest.mark.parametrize("machine", MACHINES)
def test_what_is_denied_is_denied_and_everything_else_is_not(machine: str) -> None:
    column = MACHINES[machine][0]
    denied = {numbers[column] for numbers in CALLS.values()} - {None}
    for number in range(600):
        expected = ALLOWED
        if number in denied:
            expected = errno.EPERM
        elif number == CLONE3:
            expected = errno.ENOSYS
        elif number == SOCKET[column]:
            continue
        assert judged(machine, number) == expected, number


@pytest.mark.parametrize("machine", MACHINES)
def test_sockets_of_three_families_are_made_and_no_others(machine: str) -> None:
    number = SOCKET[MACHINES[machine][0]]
    allowed = [family for family in range(64) if judged(machine, number, family) == ALLOWED]
    assert allowed == [1, 2, 10]
    assert judged(machine, number, 40) == errno.EAFNOSUPPORT, "vsock"


@pytest.mark.parametrize("machine", MACHINES)
def test_clone_makes_processes_and_threads_and_no_namespaces(machine: str) -> None:
    number = CLONE[MACHINES[machine][0]]
    assert judged(machine, number, SIGCHLD) == judged(machine, number, CLONE_THREAD) == ALLOWED
    for flag in (0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000):
        assert judged(machine, number, flag | SIGCHLD) == errno.EPERM, hex(flag)


def test_calls_by_another_architectures_numbers_end_the_program() -> None:
    assert judged("x86_64", 39, arch=0x40000003) == KILLED, "i386"
    assert judged("x86_64", 0x40000000 + 165) == errno.ENOSYS, "x32"
    assert judged("aarch64", 39, arch=0x40000028) == KILLED, "32-bit ARM"


def test_the_numbers_are_those_of_this_machines_headers() -> None:
    header = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")
    if not header.exists():
        pytest.skip("no headers of x86_64")
    known = {name: int(number) for name, number in re.findall(r"#define __NR_(\w+) (\d+)", header.read_text())}
    assert {name: known[name] for name in CALLS if name in known} == {
        name: number for name, (number, _) in CALLS.items() if name in known
    }
    assert (known["socket"], known["clone"], known["clone3"]) == (SOCKET[0], CLONE[0], CLONE3)
    generic = Path("/usr/include/asm-generic/unistd.h").read_text()
    others = {name: int(number) for name, number in re.findall(r"#define __NR(?:3264)?_(\w+) (\d+)", generic)}
    assert {name: others[name] for name in CALLS if name in others and CALLS[name][1] is not None} == {
        name: number for name, (_, number) in CALLS.items() if name in others and number is not None
    }
    assert (others["socket"], others["clone"]) == (SOCKET[1], CLONE[1])


def test_the_documentation_counts_them() -> None:
    page = (Path(seccomp.__file__).parents[2] / "docs" / "sandbox.md").read_text()
    assert f"denies {len(CALLS)} system calls" in page


def test_a_machine_without_a_filter_is_refused() -> None:
    assert seccomp.supported("x86_64") and seccomp.supported("aarch64") and not seccomp.supported("riscv64")
