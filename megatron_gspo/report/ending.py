"""What the terminal says when a run has finished: what came of it, where it lies, and what to do next."""

from __future__ import annotations

import shlex

from megatron_gspo.config import RunConfig
from megatron_gspo.report.metrics import INITIAL, Record
from megatron_gspo.report.rundir import RunDirectory
from megatron_gspo.report.status import summarise


def ending(run: RunDirectory) -> list[str]:
    """Lines, the first of them empty; commands can be copied as they stand."""
    config = run.config()
    rows = [("finished", _result(run, config)), *_places(run)]
    commands = _commands(run, config)
    rows += zip(("next", *[""] * (len(commands) - 1)), commands, strict=True)
    return ["", *(f"{name:<14} {text}" for name, text in rows)]


def _result(run: RunDirectory, config: RunConfig | None) -> str:
    """Accuracies before and after; of a run that evaluates nothing, its reward, or its loss, at first and of late."""
    lines, summary = run.metrics(), summarise(run)
    if accuracy := _before_and_after(lines, "eval/accuracy"):
        greedy = _before_and_after(lines, "eval/greedy_accuracy")
        return f"held-out accuracy {accuracy}" + (f", greedy {greedy}" if greedy else "")
    if config is not None and not config.algorithm.draws_responses:
        return f"loss {_text(summary['loss_first'], '.4f')} -> {_text(summary['loss'], '.4f')}"
    rewards = [line["reward/mean"] for line in lines if "reward/mean" in line]
    first = rewards[0] if rewards else None
    return f"reward {_text(first, '.3f')} -> {_text(summary['reward'], '.3f')}; nothing was held out (data.eval_path)"


def _before_and_after(lines: list[Record], metric: str) -> str:
    """ "0.605 before, 0.853 after"; "0.853 after" where nothing was measured before training."""
    values = [(line["outer_step"], line[metric]) for line in lines if metric in line]
    before = [value for outer_step, value in values if outer_step == INITIAL]
    after = [value for outer_step, value in values if outer_step != INITIAL]
    parts = [f"{value:.3f} {word}" for word, found in (("before", before), ("after", after)) for value in found[-1:]]
    return ", ".join(parts)


def _places(run: RunDirectory) -> list[tuple[str, str]]:
    """Those that are there."""
    rows = []
    if run.report_file.is_file():
        rows.append(("report", f"{run.report_file.resolve().as_uri()} (open it in a browser)"))
    if (run.path / "hf" / "config.json").is_file():
        rows.append(("model", str(run.path / "hf")))
    return rows


def _commands(run: RunDirectory, config: RunConfig | None) -> list[str]:
    path = shlex.quote(str(run.path))
    if config is not None and config.data.eval_path:
        evaluate = f"megatron-gspo eval {path} --samples 8"
    else:
        evaluate = f"megatron-gspo eval {path} --prompts HELD_OUT_FILE --samples 8"
    if config is not None and not config.algorithm.draws_responses:
        evaluate += " --reward NAME"
    return [evaluate, f"megatron-gspo status {path}"]


def _text(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)
