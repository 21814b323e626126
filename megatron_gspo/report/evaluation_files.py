"""What an evaluation writes while it goes on, so that it can go on where it was killed.

    settings.json      what is asked of which weights: another evaluation does not continue this one
    responses.jsonl    one prompt a line, in the order in which they arrived: tokens and texts of its responses
    verdicts.jsonl     one prompt a line: rewards
    samples.jsonl      at the end, in the order of the prompts: one response a line, with its reward
    result.json        the figures. Where it is, the evaluation is whole
    clock.json         when it ran and how long, how often it was taken up again, and where the servers were
    servers/           logs of servers that were started for it

``settings.json``, ``samples.jsonl`` and ``result.json`` are the same, byte for byte, however often an evaluation was
killed, where sampling is seeded.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TextIO

import numpy as np

from megatron_gspo.errors import ConfigError, MegatronGspoError
from megatron_gspo.report.evaluation import Answers
from megatron_gspo.report.metrics import strict
from megatron_gspo.storage import claiming, cut_torn_line, replace_text, writing

if TYPE_CHECKING:
    from megatron_gspo.types import Prompt, Rollout

SETTINGS, RESPONSES, VERDICTS = "settings.json", "responses.jsonl", "verdicts.jsonl"
SAMPLES, RESULT, CLOCK = "samples.jsonl", "result.json", "clock.json"
OURS = frozenset({SETTINGS, RESPONSES, VERDICTS, SAMPLES, CLOCK, "servers"})
"""What an evaluation that has not ended may have left."""


@dataclass(frozen=True)
class Before:
    """What an earlier start left."""

    responses: dict[str, list[dict[str, Any]]]
    """Prompt's id -> its responses."""
    verdicts: dict[str, list[dict[str, Any]]]
    """Prompt's id -> what its responses got."""
    starts: int
    """How often it was begun, this time not counted."""


class EvaluationDirectory:
    """Takes responses and verdicts as they arrive, and the result at the end.

    Raises ConfigError when ``path`` holds files that are no evaluation with these ``settings``, or one that is done;
    WriteError when the disk does not take what is written.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        text = json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=True) + "\n"
        is_new = not path.exists() or (path.is_dir() and not any(path.iterdir()))
        if not is_new:
            _check_continues(path, text)
        with claiming(f"--out {path}", path):
            path.mkdir(parents=True, exist_ok=True)
            self._responses = (path / RESPONSES).open("a", encoding="utf-8", errors="backslashreplace")
            self._verdicts = (path / VERDICTS).open("a", encoding="utf-8", errors="backslashreplace")
            _lock(self._responses, path)
            replace_text(path / SETTINGS, text)
            for name in (RESPONSES, VERDICTS):
                cut_torn_line(path / name)
            self.before = _read(path)
            replace_text(path / CLOCK, json.dumps({"starts": self.before.starts + 1}) + "\n")
        self._drawn = sum(map(len, self.before.responses.values()))

    def drawn(self, rollouts: Sequence[Rollout]) -> None:
        """The responses to one prompt, not scored yet."""
        with writing(self.path, "the responses"):
            kept = [_kept(rollout) for rollout in rollouts]
            self._responses.write(_line({"prompt_id": rollouts[0].prompt.id, "samples": kept}))
            self._responses.flush()
        self._drawn += len(rollouts)

    def judged(self, group: Answers) -> None:
        """What a reward made of one prompt's responses; what it could not grade is graded once more where this
        evaluation is taken up again."""
        if group.ungraded_K:
            return
        with writing(self.path, "the verdicts"):
            verdicts = [_judged(group, i) for i in range(len(group.rollouts))]
            self._verdicts.write(_line({"prompt_id": group.rollouts[0].prompt.id, "verdicts": verdicts}))
            self._verdicts.flush()

    def finish(
        self,
        groups: Sequence[Answers],
        result: Mapping[str, Any],
        clock: Mapping[str, Any],
    ) -> None:
        """Every prompt's responses with their rewards, and the result; ``clock`` is what no two runs share."""
        with writing(self.path, "the result"):
            with (self.path / SAMPLES).open("w", encoding="utf-8", errors="backslashreplace") as file:
                for group in groups:
                    for i, rollout in enumerate(group.rollouts):
                        file.write(_line(_sample(rollout) | _judged(group, i)))
            replace_text(self.path / CLOCK, json.dumps({**clock, "starts": self.before.starts + 1}, indent=2) + "\n")
            replace_text(self.path / RESULT, json.dumps(result, indent=2, allow_nan=False) + "\n")
            for file in (self._responses, self._verdicts):
                file.close()
            for name in (RESPONSES, VERDICTS):
                (self.path / name).unlink()

    def close(self) -> None:
        """Leaves nothing where nothing had arrived."""
        with contextlib.suppress(OSError):  # what could not be written was said when it was
            self._responses.close()
            self._verdicts.close()
        if self._drawn or (self.path / RESULT).exists():
            return
        for name in (RESPONSES, VERDICTS, SETTINGS, CLOCK):
            (self.path / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # not empty: logs of servers
            self.path.rmdir()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """After a failure the error says where the responses are that had arrived."""
        self.close()
        if isinstance(error, MegatronGspoError) and self._drawn:
            raise type(error)(
                f"{error} (no result; the {self._drawn} responses that had arrived are in {self.path}, and the same "
                f"command with --out {self.path} goes on from there)"
            ) from error


def is_done(path: Path) -> bool:
    """Whether a directory holds a whole evaluation."""
    return (path / RESULT).is_file()


def same_settings(path: Path, settings: Mapping[str, Any]) -> bool:
    """Whether a directory holds an evaluation, done or not, of these settings."""
    try:
        return bool(json.loads((path / SETTINGS).read_bytes()) == json.loads(json.dumps(settings)))
    except (OSError, ValueError):
        return False


def restored(before: Before, prompt: Prompt, samples: int) -> list[Rollout] | None:
    """A prompt's responses as they were drawn before, without logprobs; None when they are not all there."""
    from megatron_gspo.types import Rollout

    kept = before.responses.get(prompt.id)
    if kept is None or len(kept) != samples:
        return None
    found = []
    for sample, one in enumerate(kept):
        ids = np.asarray(one["token_ids"], dtype=np.int32)
        nothing = np.full(len(ids), np.nan, dtype=np.float32)
        found.append(Rollout(prompt, sample, ids, nothing, one["finish_reason"], (0,), text=one["text"]))
    return found


def _check_continues(path: Path, settings: str) -> None:
    """Raises ConfigError for what is no unfinished evaluation of the same settings."""
    names = {entry.name for entry in path.iterdir()} if path.is_dir() else set()
    if SETTINGS not in names:
        raise ConfigError(f"--out {path} exists and is not an empty directory: name another")
    if RESULT in names:
        raise ConfigError(f"--out {path} holds an evaluation that is done: name another")
    if strange := sorted(names - OURS):
        raise ConfigError(f"--out {path} holds {strange[0]}, which is no part of an evaluation: name another")
    then = (path / SETTINGS).read_text(encoding="utf-8")
    if then != settings:
        what = ", ".join(_differing(json.loads(then), json.loads(settings))) or "its settings"
        raise ConfigError(f"--out {path} holds an evaluation that was begun otherwise ({what}): name another")


def _differing(then: Any, now: Any, place: str = "") -> list[str]:
    """Names of what two settings differ in."""
    if isinstance(then, dict) and isinstance(now, dict):
        names = dict.fromkeys((*then, *now))
        return [
            found
            for name in names
            for found in _differing(then.get(name), now.get(name), f"{place}.{name}" if place else name)
        ]
    return [] if then == now else [place]


def _read(path: Path) -> Before:
    responses = {str(line["prompt_id"]): line["samples"] for line in _lines(path / RESPONSES)}
    verdicts = {str(line["prompt_id"]): line["verdicts"] for line in _lines(path / VERDICTS)}
    starts = 0
    with contextlib.suppress(OSError, ValueError, KeyError):
        starts = int(json.loads((path / CLOCK).read_bytes())["starts"])
    return Before(responses, verdicts, starts)


def _lock(file: TextIO, path: Path) -> None:
    """Until this process ends, however, or the file is closed; a file system without locks takes any."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(f"--out {path} is being written by another process: name another") from None
    except OSError:
        pass


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def _kept(rollout: Rollout) -> dict[str, Any]:
    return {
        "token_ids": rollout.response_ids.tolist(),
        "finish_reason": rollout.finish_reason,
        "text": rollout.text,
    }


def _sample(rollout: Rollout) -> dict[str, Any]:
    return {
        "prompt_id": rollout.prompt.id,
        "sample": rollout.sample,
        "prompt": rollout.prompt.text,
        "answer": rollout.prompt.answer,
        "response": rollout.text,
        "tokens": len(rollout.response_ids),
        "finish_reason": rollout.finish_reason,
    }


def _judged(group: Answers, i: int) -> dict[str, Any]:
    """What was made of one response; the reward is None where there is none."""
    judged: dict[str, Any] = {"reward": strict(float(group.rewards_K[i]))}
    if group.components_K and group.components_K[i]:
        judged["components"] = group.components_K[i]
    if group.ungraded_K and group.ungraded_K[i]:
        judged["ungraded"] = group.ungraded_K[i]
    return judged


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"
