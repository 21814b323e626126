"""What a check says, and the running of checks: one that fails never keeps the others from running."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from megatron_gspo.config.inputs import MODELS, lack
from megatron_gspo.doctor.facts import Facts
from megatron_gspo.errors import MegatronGspoError
from megatron_gspo.hf.elsewhere import what_is_there
from megatron_gspo.report.text import count

Status = Literal["ok", "warning", "error"]
LONGEST = 700
"""Characters of a detail; an error of pydantic or of a user's code may be pages long."""


@dataclass(frozen=True)
class Check:
    """One line."""

    status: Status
    detail: str
    """What was looked at, with the values."""
    fix: str = ""
    """What to change, by the setting's name; empty when nothing needs to be."""
    name: str = ""
    """Filled in by ``examine`` from the catalog."""
    lacks: str = ""
    """The fact for whose absence nothing was looked at; filled in by ``examine``."""

    def as_record(self) -> dict[str, str]:
        """For ``--json``."""
        return {"name": self.name, "status": self.status, "detail": self.detail, "fix": self.fix}


def ok(detail: str) -> Check:
    """A finding that is as it should be."""
    return Check("ok", detail)


def warning(detail: str, fix: str = "") -> Check:
    """Allowed, but perhaps not what is wanted."""
    return Check("warning", detail, fix)


def error(detail: str, fix: str = "") -> Check:
    """The run would fail, or would silently not do what its configuration says."""
    return Check("error", detail, fix)


@dataclass(frozen=True)
class Entry:
    """A check in the catalog."""

    name: str
    run: Callable[[Facts], Check | Sequence[Check]]
    needs: tuple[str, ...] = ("config",)
    """Facts without which there is nothing to look at; the entry that owns each of them reports its failure."""
    setting: str = ""
    """What to change when looking raises: the setting that the entry is about."""
    file: str = ""
    """The setting whose file or directory this entry reports when it is not there."""


def examine(facts: Facts, entries: Iterable[Entry]) -> list[Check]:
    """Every entry's checks, in order. Nothing that a check raises gets past."""
    return [check for entry in entries for check in _checks(facts, entry)]


def _checks(facts: Facts, entry: Entry) -> list[Check]:
    lacking = next((need for need in entry.needs if facts.problem(need)), None)
    if entry.file and not facts.problem("config") and _missing_files(facts, entry):
        results: Sequence[Check] = [_no_such_file(facts, entry)]
    elif lacking:
        results = [replace(warning(f"not checked: it needs {Facts.WORDS[lacking]}"), lacks=_root(facts, lacking))]
    else:
        try:
            result = entry.run(facts)
            results = [result] if isinstance(result, Check) else result
        except MegatronGspoError as caught:
            results = [error(str(caught), entry.setting)]
        except Exception as caught:  # an input that nobody thought of must not hide what the other checks say
            results = [error(f"{type(caught).__name__}: {caught}", "nobody foresaw this input: please report it")]
    return [replace(c, name=entry.name, detail=one_line(c.detail), fix=one_line(c.fix)) for c in results]


def _no_such_file(facts: Facts, entry: Entry) -> Check:
    name = _missing_files(facts, entry)[0]
    path = facts.missing[name]
    there = f": {what_is_there(Path(path))}" if entry.file in MODELS and os.path.isdir(path) else ""
    return error(f"{path}: {lack(path, entry.file)}{there}", facts.advice(name) or name)


def _missing_files(facts: Facts, entry: Entry) -> list[str]:
    """The settings whose files are not there: of training prompts, those of every source."""
    of_source = "data.sources." if entry.file == "data.path" else None
    return [name for name in facts.missing if name == entry.file or (of_source and name.startswith(of_source))]


def _root(facts: Facts, lacking: str) -> str:
    """The fact to name: a tokenizer, and prompts in its tokens, are not there when the model's directory is not."""
    return "model" if lacking != "config" and "model.path" in facts.missing else lacking


def fold(checks: Sequence[Check]) -> list[Check]:
    """The lines to read: one for all that was not looked at for the same reason, in the place of the first of them."""
    names: dict[str, list[str]] = {}
    for check in checks:
        names.setdefault(check.lacks, []).append(check.name)
    lines: list[Check] = []
    for check in checks:
        together = names[check.lacks] if check.lacks else []
        if len(together) < 2:
            lines.append(check)
        elif together[0] == check.name:
            detail = f"not checked without {Facts.WORDS[check.lacks]}: {', '.join(together)}"
            lines.append(replace(check, name=check.lacks, detail=detail))
    return lines


def one_line(text: str) -> str:
    """The text on one line, without control characters (a file's name or content may hold any), cut at ``LONGEST``."""
    words = " ".join(text.split())
    plain = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in words)
    return plain if len(plain) <= LONGEST else plain[: LONGEST - 3] + "..."


def summary(checks: Sequence[Check]) -> str:
    """ "14 checks: 12 ok, 1 warning, 1 error"; those that ``fold`` puts into one line are counted by themselves."""
    lines = fold(checks)
    good, bad, doubtful = (sum(line.status == status for line in lines) for status in ("ok", "error", "warning"))
    doubtful -= sum(line not in checks for line in lines)
    text = f"{count(len(checks), 'check')}: {good} ok, {count(doubtful, 'warning')}, {count(bad, 'error')}"
    skipped = len(checks) - good - bad - doubtful
    return text + (f", {skipped} not checked" if skipped else "")


def first_error(checks: Sequence[Check]) -> Check | None:
    """The first that is an error; None without one."""
    return next((check for check in checks if check.status == "error"), None)


def as_json(checks: Sequence[Check]) -> dict[str, Any]:
    """{"ok": bool, "checks": [{name, status, detail, fix}, ...]}."""
    return {"ok": first_error(checks) is None, "checks": [check.as_record() for check in checks]}
