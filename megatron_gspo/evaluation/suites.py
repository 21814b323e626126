"""Suites asked of a subject, one after another on the same servers; what was done before is not done again."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from megatron_gspo.data.tokenizer import Tokenizer, open_tokenizer, turn_end_fix, turn_end_problem
from megatron_gspo.evaluation.examine import Examination, Examiner, check_engine_reads, examiner, is_seeded
from megatron_gspo.evaluation.lengths import positions
from megatron_gspo.evaluation.subject import Subject
from megatron_gspo.report.evaluation import SCHEMA, counts, warnings_of
from megatron_gspo.report.evaluation_files import RESULT, EvaluationDirectory, is_done, same_settings
from megatron_gspo.report.manifest import versions
from megatron_gspo.report.metrics import strict
from megatron_gspo.rollout.engine import Progress
from megatron_gspo.storage import replace_text, writing
from megatron_gspo.suites.catalog import Asked
from megatron_gspo.suites.task import ANSWERS_SHOWN, Task, check_contamination, figures, final_answers, make_task
from megatron_gspo.train.grade import Graded

SUMMARY = "summary.json"


@dataclass(frozen=True)
class Tasks:
    """The suites that are asked, and what they share."""

    subject: Subject
    """With limits that hold all of them."""
    tokenizer: Tokenizer
    tasks: list[Task]

    def of(self, subject: Subject) -> Tasks:
        """The same for a subject whose checkpoint was exported."""
        return replace(self, subject=subject)


def read_tasks(subject: Subject, asked: Sequence[Asked], data: Path) -> Tasks:
    """Reads every suite before anything is started or written. Raises UserError."""
    config = subject.config
    directory = check_engine_reads(subject)
    tokenizer = open_tokenizer(config, directory)
    room, seeded = positions(config, directory), is_seeded(config)
    tasks = [
        make_task(one, data, config, tokenizer, positions=room, seeded=seeded, alone=len(asked) == 1) for one in asked
    ]
    limits = {
        "max_prompt_tokens": max(task.longest_prompt for task in tasks),
        "max_response_tokens": max(task.sampling.max_tokens for task in tasks),
    }
    rollout = config.rollout.model_copy(update={**limits, "overlong_buffer": 0})
    return Tasks(replace(subject, config=config.model_copy(update={"rollout": rollout})), tokenizer, tasks)


def settings_of(task: Task, subject: Subject, identity: dict[str, Any]) -> dict[str, Any]:
    """All that decides a suite's result: it goes on where one with the same was killed."""
    config = subject.config
    model = {"name": subject.describe(), "kind": subject.kind, "step": subject.step, **identity}
    dtypes = {"dtype": config.model.dtype, "engine_dtype": config.rollout.engine_dtype or config.model.dtype}
    return {"suite": task.name, "title": task.suite.title, "model": model, **dtypes, **task.record}


def directory_name(subject: Subject, settings: Sequence[dict[str, Any]]) -> str:
    """``NAME-0123abcd``: the same for the same suites of the same weights, so that an evaluation that was killed is
    found."""
    digest = hashlib.sha256(json.dumps(list(settings), sort_keys=True).encode()).hexdigest()[:8]
    return f"{(subject.checkpoint or subject.model or subject.argument).name}-{digest}"


def run_suites(
    tasks: Tasks,
    identity: dict[str, Any],
    out: Path,
    *,
    phase: Callable[[str], None],
    progress: Progress,
) -> list[dict[str, Any]]:
    """The result of each suite, in ``out/SUITE``, and ``out/summary.json``. Servers are started when there is something
    left to do. Raises ConfigError for a directory of another evaluation, RolloutError and RewardError."""
    settings = {task.name: settings_of(task, tasks.subject, identity) for task in tasks.tasks}
    left = [task for task in tasks.tasks if not _is_whole(out / task.name, settings[task.name])]
    if left:
        with examiner(tasks.subject, tasks.tokenizer, out / "servers", phase=phase) as servers:
            for task in left:
                _run_one(task, tasks, servers, settings[task.name], out / task.name, phase, progress)
    results = [json.loads((out / task.name / RESULT).read_bytes()) for task in tasks.tasks]
    with writing(out, "the summary"):
        replace_text(out / SUMMARY, json.dumps(summary(results), indent=2) + "\n")
    return results


def summary(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of each suite its first figure, as a table would have it."""
    rows = {}
    for result in results:
        figures, name = result["result"], result["result"]["headline"]
        shown = figures["measured"].get(name) or figures["estimates"][name]
        rows[result["suite"]] = {
            "title": result["title"],
            "figure": name,
            **{key: shown[key] for key in ("value", "low", "high")},
            "problems": figures["prompts"],
            "samples": figures["samples"],
            "warnings": len(result["warnings"]),
        }
    return {"schema": f"{SCHEMA}/summary", "model": results[0]["model"], "suites": rows}


def _is_whole(path: Path, settings: dict[str, Any]) -> bool:
    return is_done(path) and same_settings(path, settings)


def _run_one(
    task: Task,
    tasks: Tasks,
    servers: Examiner,
    settings: dict[str, Any],
    path: Path,
    phase: Callable[[str], None],
    progress: Progress,
) -> None:
    started, clock = datetime.now(UTC), time.monotonic()
    with EvaluationDirectory(path, settings) as directory:
        there = len(directory.before.responses)
        goes_on = f", goes on: {there} problems have theirs" if there else ""
        phase(f"{task.suite.title}: {len(task.prompts)} x {task.sampling.group_size} responses{goes_on}")
        found = servers.examine(task.prompts, task.reward, task.sampling, directory, progress=progress)
        contamination, overlapping = _contamination(task, tasks.subject)
        result = {"schema": SCHEMA, **settings, **describe(task, found.graded), "contamination": contamination}
        result["warnings"] = [*task.warnings, *overlapping, *_warnings(tasks, result, found)]
        result["versions"] = versions(found.engine_version)
        took = {
            "started": started.isoformat(timespec="seconds"),
            "seconds": round(time.monotonic() - clock, 3),
            "servers": list(found.servers),
        }
        directory.finish(found.graded, result, took)


def describe(task: Task, graded: Sequence[Graded]) -> dict[str, Any]:
    """``result`` and ``problems``: JSON values."""
    rewards_PK = np.stack([group.rewards_K for group in graded])
    responses = [[rollout.text for rollout in group.rollouts] for group in graded]
    answers = final_answers(task, task.prompts, responses)
    problems = []
    for index, (problem, group) in enumerate(zip(task.problems, graded, strict=True)):
        row: dict[str, Any] = {
            "id": problem.id,
            "rewards": strict(group.rewards_K.tolist()),
            "tokens": [len(rollout.response_ids) for rollout in group.rollouts],
            "finish_reasons": [rollout.finish_reason for rollout in group.rollouts],
        }
        if answers is not None:
            row["answers"] = [None if one is None else one[:ANSWERS_SHOWN] for one in answers[index]]
        problems.append(row)
    return {"result": figures(task, rewards_PK, answers) | counts(graded), "problems": problems}


def _contamination(task: Task, subject: Subject) -> tuple[dict[str, Any], list[str]]:
    """A bare model does not say what it was trained on."""
    if subject.kind == "model":
        return {"training_prompts": None, "looked_at": 0}, []
    return check_contamination(task, subject.config)


def _warnings(tasks: Tasks, result: dict[str, Any], found: Examination) -> list[str]:
    warnings = [found.note] if found.note else []
    if tasks.subject.config.data.chat_template and (problem := turn_end_problem(tasks.tokenizer)):
        warnings.append(f"{problem} ({turn_end_fix(tasks.tokenizer)})")
    measured = result["result"]["measured"].values()
    return [*warnings, *warnings_of(found.graded), *(warning for one in measured for warning in one["warnings"])]
