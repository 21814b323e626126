"""A message between a sandbox's client and what runs its programs: a header of JSON, then bytes."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from megatron_gspo.sandbox.interface import Limits, Outcome, Program, Verdict

PREFIX = struct.Struct("!I")
"""Bytes of the header, which stand before it."""
Message = tuple[dict[str, Any], list[bytes]]
"""(header, bytes)."""


def pack(header: Mapping[str, Any], blobs: Sequence[bytes] = ()) -> bytes:
    """A message as bytes. Its header tells how long each of ``blobs`` is."""
    text = json.dumps({**header, "sizes": [len(blob) for blob in blobs]}).encode()
    return b"".join((PREFIX.pack(len(text)), text, *blobs))


def unpack(message: bytes) -> Message:
    """What ``pack`` was given. Raises ValueError for bytes that are no message."""
    try:
        (length,) = PREFIX.unpack_from(message)
        header = json.loads(message[PREFIX.size : PREFIX.size + length])
        return header, split(header, message[PREFIX.size + length :])
    except (struct.error, KeyError, TypeError) as error:
        raise ValueError(f"no message of a sandbox: {error}") from None


def split(header: Mapping[str, Any], rest: bytes) -> list[bytes]:
    """The bytes that stand behind a header, apart. Raises ValueError where they are not as many as it says."""
    sizes = header["sizes"]
    if sum(sizes) != len(rest):
        raise ValueError(f"a message with {len(rest)} bytes where its header says {sum(sizes)}")
    blobs, start = [], 0
    for size in sizes:
        blobs.append(rest[start : start + size])
        start += size
    return blobs


def of_program(program: Program, source: bytes, limits: Limits, *, precompiled: bool = False) -> bytes:
    """The message that loads a program; ``source``: its text as bytes; ``precompiled``: with the precompiled header."""
    header = {
        "language": program.language,
        "names": list(program.files),
        "limits": asdict(limits),
        "precompiled": precompiled,
    }
    return pack(header, [source, *program.files.values()])


def to_program(message: Message) -> tuple[str, bytes, dict[str, bytes], Limits]:
    """(language, source, files, limits) of ``of_program``. Raises ValueError for another message."""
    header, (source, *contents) = message
    try:
        files = dict(zip(header["names"], contents, strict=True))
        return str(header["language"]), source, files, Limits(**header["limits"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"no program: {error}") from None


def of_outcome(outcome: Outcome) -> bytes:
    """The message of an outcome."""
    header = {
        "verdict": outcome.verdict,
        "status": outcome.status,
        "wall_s": outcome.wall_s,
        "cpu_s": outcome.cpu_s,
    }
    return pack(header, [outcome.stdout, outcome.stderr])


def to_outcome(message: Message) -> Outcome | None:
    """The outcome of ``of_outcome``; None for the message of a program that is ready to be run. Raises ValueError."""
    header, blobs = message
    if header.get("ready"):
        return None
    try:
        stdout, stderr = blobs
        return Outcome(Verdict(header["verdict"]), header["status"], stdout, stderr, header["wall_s"], header["cpu_s"])
    except KeyError as error:
        raise ValueError(f"no outcome: it has no {error}") from None
