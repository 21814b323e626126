"""``megatron-gspo eval``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_gspo.config import RunConfig
    from megatron_gspo.evaluation.examine import Examination, Questions
    from megatron_gspo.evaluation.subject import Subject
    from megatron_gspo.rewards.registry import Reward

SUMMARY = "measure a policy on held-out prompts or suites: avg@k and pass@k with 95% intervals"
EXAMPLE = "megatron-gspo eval runs/quickstart --checkpoint latest --samples 8"
DOCS = "docs/evaluation.md"
MORE = (
    "What is evaluated: the model that a configuration starts from; a run, its hf/ when it has finished and else its\n"
    "latest checkpoint; or a Hugging Face directory. Prompts, reward and sampling are those of the configuration (of\n"
    "the run) unless options or settings say otherwise; a bare model gets limits that fit it and the prompts.\n"
    "With --suite the problems, their prompts, sampling and grader are the suite's, and each has its directory.\n"
    "Servers are started for it unless rollout.servers names some. An evaluation that was killed goes on where it\n"
    "was: the same command finds a suite's, others need their directory in --out."
)

FORMATS = ("auto", "prompts", "gsm8k", "verl", "messages", "sharegpt", "alpaca")
"""Of ``data.format``."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("subject", type=Path, metavar="CONFIG|RUN|HF_DIR", help="what to evaluate")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="section.key=value", help="settings that replace the file's"
    )
    parser.add_argument(
        "--suite",
        type=_names,
        default=(),
        metavar="A,B",
        help="published evaluations instead of prompts: aime24, lcb:window=202410..202502:k=8 (docs/evaluation.md)",
    )
    parser.add_argument("--data", type=Path, metavar="DIR", help="where the suites' published files are, in DIR/SUITE")
    parser.add_argument("--prompts", metavar="FILE", help="prompts, JSONL or Parquet, all of them (data.eval_path)")
    parser.add_argument("--format", choices=FORMATS, help="of the prompt file (data.format)")
    parser.add_argument("--reward", metavar="NAME", help="reward without options (reward.function)")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N prompts (eval.prompts)")
    parser.add_argument("--samples", type=int, metavar="K", help="responses per prompt (eval.samples)")
    parser.add_argument("--temperature", type=float, metavar="T", help="of sampling (rollout.temperature)")
    parser.add_argument("--greedy", action="store_true", help="one response at temperature 0 instead")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="of a response (rollout.max_response_tokens)")
    parser.add_argument("--seed", type=int, metavar="N", help="of sampling, where it is seeded (train.seed)")
    parser.add_argument("--checkpoint", metavar="NAME", help="a run's checkpoint, or latest")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write (default: evals/... in RUN, or here)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(watched=lambda options: "the evaluation")


def run(options: argparse.Namespace) -> int:
    """Runs the command; returns the exit status."""
    from megatron_gspo.quiet import apart_from_stdout

    with apart_from_stdout() as printed:
        text = evaluate(options)
        print(text, file=printed, flush=True)
    return 0


def evaluate(options: argparse.Namespace) -> str:
    """Evaluates, and returns what is to be printed."""
    import json

    from megatron_gspo.evaluation.examine import examiner, judged, read_questions
    from megatron_gspo.evaluation.lengths import fitting
    from megatron_gspo.evaluation.subject import exported
    from megatron_gspo.report.evaluation import fingerprint, format_result
    from megatron_gspo.report.evaluation_files import EvaluationDirectory

    if options.suite or options.data:
        return evaluate_suites(options)
    subject = find_subject(options)
    check_subject(subject)
    subject = fitting(subject)
    questions = read_questions(subject, greedy=options.greedy)
    clock = Clock()
    path = options.out or default_out(subject, clock.stamp)
    with Progress(len(questions.prompts)) as progress:
        if subject.open_limits:
            progress.note(describe_limits(subject))
        progress.phase(f"reading {subject.describe()}")
        with exported(subject, path.parent) as subject:
            assert subject.model is not None
            asked = describe(subject, questions, fingerprint(subject.model))
            with EvaluationDirectory(path, asked) as out:
                with (
                    judged(subject, questions, path / "reward_servers", phase=progress.phase) as (questions, reward),
                    examiner(subject, questions.tokenizer, path / "servers", phase=progress.phase) as servers,
                ):
                    sampling, prompts = questions.sampling, questions.prompts.prompts
                    progress.phase(f"drawing {len(prompts)} x {sampling.group_size} responses")
                    answers = servers.examine(prompts, reward, sampling, out, progress=progress.advance)
                result = conclude(asked, subject, questions, reward, answers)
                out.finish(answers.graded, result, clock.took(answers.servers))
    return json.dumps(result, indent=2) if options.json else f"{format_result(result)}\nwritten to {path}"


def evaluate_suites(options: argparse.Namespace) -> str:
    """Evaluates suites, and returns what is to be printed."""
    import json

    from megatron_gspo.evaluation.subject import exported
    from megatron_gspo.evaluation.suites import directory_name, read_tasks, run_suites, settings_of
    from megatron_gspo.report.evaluation import fingerprint, format_result
    from megatron_gspo.suites.catalog import read_all_asked

    check_suite_options(options)
    asked = read_all_asked(options.suite)
    subject = find_subject(options)
    check_subject(subject, suites=True)
    tasks = read_tasks(subject, asked, options.data)
    parent = options.out.parent if options.out else default_out(subject, "").parent
    with Progress(sum(len(task.prompts) for task in tasks.tasks)) as progress:
        for warning in (f"{task.name}: {warning}" for task in tasks.tasks for warning in task.warnings):
            progress.note(f"warning: {warning}")
        progress.phase(f"reading {subject.describe()}")
        with exported(tasks.subject, parent) as subject:
            assert subject.model is not None
            identity = fingerprint(subject.model)
            tasks = tasks.of(subject)
            settings = [settings_of(task, subject, identity) for task in tasks.tasks]
            out = options.out or parent / directory_name(subject, settings)
            results = run_suites(tasks, identity, out, phase=progress.phase, progress=progress.advance)
    if options.json:
        return json.dumps({result["suite"]: result for result in results}, indent=2)
    return "\n\n".join([*map(format_result, results), f"written to {out}"])


def check_suite_options(options: argparse.Namespace) -> None:
    """Raises ConfigError for what a suite settles itself, and for one half of --suite and --data without the other."""
    from megatron_gspo.errors import ConfigError
    from megatron_gspo.suites.catalog import SUITES

    if not options.suite:
        raise ConfigError(f"--data {options.data}: name what to ask with --suite: {', '.join(SUITES)}")
    if not options.data:
        raise ConfigError(
            f"--suite {','.join(options.suite)}: say with --data DIR where the published files are, in DIR/SUITE; "
            f"docs/evaluation.md says which"
        )
    names = ("prompts", "format", "reward", "limit", "samples", "temperature", "greedy", "max_tokens")
    for name in names:
        if getattr(options, name):
            word = {"samples": "k"}.get(name, name)
            instead = f" ({options.suite[0]}:{word}=...)" if name not in ("prompts", "format", "reward") else ""
            raise ConfigError(f"--{name.replace('_', '-')} with --suite: a suite has its own{instead}")


def find_subject(options: argparse.Namespace) -> Subject:
    """What the arguments name, told by what lies at the path. Raises UserError."""
    from megatron_gspo.errors import ConfigError, DataError
    from megatron_gspo.evaluation.subject import of_configuration, of_model, of_run
    from megatron_gspo.report.rundir import RunDirectory

    path, overrides, suites = options.subject, settings(options), bool(options.suite)
    is_run = path.is_dir() and (path / "config.toml").is_file()
    if options.checkpoint is not None and not is_run:
        raise ConfigError(f"--checkpoint {options.checkpoint}: {path} is no run directory, which has checkpoints")
    if is_run:
        finished = RunDirectory.open(path).manifest().get("status") == "finished"
        return of_run(path, overrides, checkpoint=options.checkpoint, finished=finished, suites=suites)
    if path.is_file():
        return of_configuration(path, overrides, suites=suites)
    if (path / "config.json").is_file():
        return of_model(path, overrides, suites=suites)
    if path.is_dir():
        raise DataError(f"{path}: neither a run (config.toml) nor a Hugging Face directory (config.json)")
    raise DataError(f"{path}: no such configuration, run or Hugging Face directory")


def check_subject(subject: Subject, *, suites: bool = False) -> None:
    """Raises DataError for an input of a configuration, or of a run, that is not there and can be made. ``suites``: the
    held-out prompts are not read."""
    from megatron_gspo.config.inputs import check_inputs

    if subject.kind == "configuration":
        check_inputs(subject.config, subject.argument, ("model.path",) if suites else ("model.path", "data.eval_path"))
    elif subject.kind == "run" and not suites:
        check_inputs(subject.config, subject.argument / "config.toml", ("data.eval_path",))


def settings(options: argparse.Namespace) -> list[str]:
    """The options as overrides, in front of those that the user wrote. Raises ConfigError."""
    import json

    from megatron_gspo.errors import ConfigError
    from megatron_gspo.evaluation.subject import WHOLE_FILE

    if options.greedy and (options.samples or 1) > 1:
        raise ConfigError(f"--samples {options.samples} with --greedy: the responses to a prompt would all be the same")
    values = {
        "data.eval_path": options.prompts,
        "data.format": options.format,
        "eval.prompts": WHOLE_FILE if options.limit is None and options.prompts else options.limit,
        "eval.samples": options.samples,
        "reward.function": options.reward,
        "rollout.temperature": options.temperature,
        "rollout.max_response_tokens": options.max_tokens,
        "train.seed": options.seed,
    }
    given = [f"{name}={json.dumps(value)}" for name, value in values.items() if value is not None]
    return [*(["reward.options={}"] if options.reward else []), *given, *options.overrides]


def describe_limits(subject: Subject) -> str:
    """What was chosen where nothing was named."""
    rollout = subject.config.rollout
    return (
        f"prompts have at most {rollout.max_prompt_tokens} tokens, responses are given {rollout.max_response_tokens} "
        f"(--max-tokens)"
    )


def default_out(subject: Subject, stamp: str) -> Path:
    """``evals/NAME-STAMP``, in the run if it is one."""
    name = (subject.checkpoint or subject.model or subject.argument).name
    return (subject.argument if subject.kind == "run" else Path()) / "evals" / f"{name}-{stamp}"


def describe(subject: Subject, questions: Questions, identity: dict[str, Any]) -> dict[str, Any]:
    """What is asked of which weights, as JSON values."""
    from megatron_gspo.report.evaluation import SCHEMA, file_digest

    config, sampling = subject.config, questions.sampling
    return {
        "schema": SCHEMA,
        "model": {
            "name": subject.describe(),
            "kind": subject.kind,
            "checkpoint": subject.checkpoint.name if subject.checkpoint else None,
            "step": subject.step,
            **identity,
        },
        "settings": {
            "prompts": config.data.eval_path,
            "prompts_sha256": file_digest(Path(config.data.eval_path)),
            "limit": config.eval.prompts,
            "format": config.data.format,
            "chat_template": config.data.chat_template,
            "reward": config.reward.model_dump(include={"function", "options"}) | served_reward(config),
            "samples": sampling.group_size,
            "temperature": 0.0 if sampling.greedy else sampling.temperature,
            "greedy": sampling.greedy,
            "max_prompt_tokens": config.rollout.max_prompt_tokens,
            "max_response_tokens": sampling.max_tokens,
            "seed": sampling.seed,
            "dtype": config.model.dtype,
        },
    }


def served_reward(config: RunConfig) -> dict[str, Any]:
    """What is said of the servers that a reward asks and that are started for it; nothing where there are none."""
    return {"server": config.reward_server.model_dump(include={"model", "kind"})} if config.reward_server.model else {}


def conclude(
    asked: dict[str, Any], subject: Subject, questions: Questions, reward: Reward, answers: Examination
) -> dict[str, Any]:
    """The result, as JSON values."""
    from megatron_gspo.data.tokenizer import turn_end_fix, turn_end_problem
    from megatron_gspo.report.evaluation import statistics, warnings_of
    from megatron_gspo.report.manifest import versions

    prompts = questions.prompts
    figures = statistics(answers.graded, reward.range)
    warnings = [answers.note] if answers.note else []
    if subject.config.data.chat_template and (problem := turn_end_problem(questions.tokenizer)):
        warnings.append(f"{problem} ({turn_end_fix(questions.tokenizer)})")
    if prompts.skipped:
        warnings.append(f"{prompts.skipped} prompts were skipped, the first: {prompts.problems[0]}")
    warnings += warnings_of(answers.graded)
    return asked | {"result": figures, "warnings": warnings, "versions": versions(answers.engine_version)}


class Clock:
    """When an evaluation began."""

    def __init__(self) -> None:
        import time
        from datetime import UTC, datetime

        self._started, self._monotonic = datetime.now(UTC), time.monotonic()
        self.stamp = f"{self._started:%Y%m%dT%H%M%S}"

    def took(self, servers: tuple[str, ...]) -> dict[str, Any]:
        """What no two evaluations share."""
        import time

        seconds = round(time.monotonic() - self._monotonic, 3)
        return {"started": self._started.isoformat(timespec="seconds"), "seconds": seconds, "servers": list(servers)}


class Progress:
    """A bar of prompts on the terminal, and what happens now; plain lines of the phases when it is none."""

    def __init__(self, total: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._console = Console(file=sys.stderr)
        self._bars = Bars(*columns, console=self._console, transient=True, disable=not self._console.is_terminal)
        self._task = self._bars.add_task("", total=total)

    def __enter__(self) -> Progress:
        self._bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bars.stop()

    def phase(self, text: str) -> None:
        """What is being done now."""
        self._bars.update(self._task, description=text)
        if not self._console.is_terminal:
            print(text, file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        """A line that stays."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def advance(self, group: Any = None) -> None:
        """One more prompt's responses."""
        self._bars.advance(self._task)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())
