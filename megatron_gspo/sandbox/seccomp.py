"""The system calls that a program cannot make, as a filter for the kernel (seccomp, classic BPF).

Namespaces already take away what these calls would reach. What is denied here is what namespaces leave: parts of the
kernel that a program of a few lines has no use for, sockets of other families (vsock reaches the hypervisor), memory
that no mount and no process shows (memfd, System V), and namespaces inside namespaces.
Numbers: arch/x86/entry/syscalls/syscall_64.tbl and include/uapi/asm-generic/unistd.h of Linux 6.
"""

from __future__ import annotations

import errno
import platform
import struct

CALLS = {
    # name: (x86_64, aarch64); None where there is none
    "acct": (163, 89),
    "add_key": (248, 217),
    "adjtimex": (159, 171),
    "bpf": (321, 280),
    "chroot": (161, 51),
    "clock_adjtime": (305, 266),
    "clock_settime": (227, 112),
    "delete_module": (176, 106),
    "finit_module": (313, 273),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fsopen": (430, 430),
    "fspick": (433, 433),
    "init_module": (175, 105),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "io_uring_setup": (425, 425),
    "ioperm": (173, None),
    "iopl": (172, None),
    "kcmp": (312, 272),
    "kexec_file_load": (320, 294),
    "kexec_load": (246, 104),
    "keyctl": (250, 219),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "modify_ldt": (154, None),
    "mount": (165, 40),
    "mount_setattr": (442, 442),
    "move_mount": (429, 429),
    "mq_open": (240, 180),
    "msgget": (68, 186),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "open_tree": (428, 428),
    "perf_event_open": (298, 241),
    "pidfd_getfd": (438, 438),
    "pivot_root": (155, 41),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "ptrace": (101, 117),
    "quotactl": (179, 60),
    "reboot": (169, 142),
    "request_key": (249, 218),
    "setns": (308, 268),
    "settimeofday": (164, 170),
    "shmget": (29, 194),
    "swapoff": (168, 225),
    "swapon": (167, 224),
    "syslog": (103, 116),
    "umount2": (166, 39),
    "unshare": (272, 97),
    "userfaultfd": (323, 282),
    "vhangup": (153, 58),
}
"""Denied with EPERM."""
SOCKET = (41, 198)
CLONE = (56, 220)
CLONE3 = 435
FAMILIES = (1, 2, 10)
"""AF_UNIX, AF_INET, AF_INET6: those of sockets that may be made."""
NEW_NAMESPACES = 0x7E020000
"""The flags of clone that make namespaces: CLONE_NEWNS and _NEWCGROUP to _NEWNET."""
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""(column above, AUDIT_ARCH of linux/audit.h) by ``platform.machine()``."""

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _ARCH, _ARGUMENT = 0, 4, 16
"""Offsets in ``struct seccomp_data``; of the first argument, its low half (both machines are little-endian)."""
_KILL, _ERROR, _ALLOW = 0x80000000, 0x00050000, 0x7FFF0000
_X32 = 0x40000000


def supported(machine: str = "") -> bool:
    """Whether there is a filter for this machine."""
    return (machine or platform.machine()) in MACHINES


def filter_for(machine: str = "") -> bytes:
    """The filter, an array of ``struct sock_filter``. Raises KeyError for a machine that has none."""
    column, arch = MACHINES[machine or platform.machine()]
    program = [_op(_LOAD, _ARCH), _op(_EQUAL, arch, 1, 0), _op(_RETURN, _KILL), _op(_LOAD, _NUMBER)]
    program += [_op(_AT_LEAST, _X32, 0, 1), _error(errno.ENOSYS)] if column == 0 else []
    for numbers in CALLS.values():
        if (number := numbers[column]) is not None:
            program += [_op(_EQUAL, number, 0, 1), _error(errno.EPERM)]
    # The C library then makes threads with clone, whose flags a filter can read.
    program += [_op(_EQUAL, CLONE3, 0, 1), _error(errno.ENOSYS)]
    program += [_op(_EQUAL, CLONE[column], 0, 4), _op(_LOAD, _ARGUMENT), _op(_ANY_BIT, NEW_NAMESPACES, 0, 1)]
    program += [_error(errno.EPERM), _op(_RETURN, _ALLOW)]
    allowed = [_op(_EQUAL, family, len(FAMILIES) - index, 0) for index, family in enumerate(FAMILIES)]
    program += [_op(_EQUAL, SOCKET[column], 0, len(FAMILIES) + 2), _op(_LOAD, _ARGUMENT), *allowed]
    program += [_error(errno.EAFNOSUPPORT), _op(_RETURN, _ALLOW)]
    return b"".join(program)


def _op(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)


def _error(number: int) -> bytes:
    return _op(_RETURN, _ERROR | number)
