"""What stands above the charts: the state of a run in a sentence, and its numbers with their change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from statistics import fmean, median
from typing import Any

from megatron_gspo.report.metrics import INITIAL, Record, by_outer_step, counted, recent_window
from megatron_gspo.report.payload import later_starts
from megatron_gspo.report.rundir import RunDirectory
from megatron_gspo.report.status import recent_text, step_noun
from megatron_gspo.report.text import duration


@dataclass(frozen=True)
class State:
    """How a run stands, in a word and a sentence."""

    word: str
    """finished, failed, stopped, killed, running, silent, or unknown (without a manifest)."""
    sentence: str


@dataclass(frozen=True)
class Tile:
    """A number to glance at."""

    name: str
    value: str
    note: str
    """Its change, or what to hold it against."""


def state(run: RunDirectory, summary: dict[str, Any], now: datetime) -> State:
    """Where the run stands at ``now``; ``summary`` as ``status.summarise`` gives it."""
    manifest, resumed = run.manifest(), later_starts(run)
    progress = _steps(summary)
    if not summary["fine_tunes"]:
        progress += f" ({summary['optimizer_steps']} optimizer steps)"
    if resumed:
        progress += f", resumed after {step_noun(summary)} {', '.join(map(str, resumed))}"
    written, ended = _last_written(run), _time(manifest.get("ended"))
    age = (now - written).total_seconds() if written else 0.0
    last = f"last line written {_clock(written)}, {duration(max(0.0, age))} before this page" if written else ""
    match summary["status"]:
        case "finished" | "failed" | "stopped" as word:
            return State(word, _sentence(f"{word} {_clock(ended)}", progress, str(manifest.get("error") or "")))
        case "killed":
            return State("killed", _sentence("ended without a word", last, progress))
        case "silent":
            return State("silent", _sentence("says that it runs, and was killed or hangs", last, progress))
        case "running":
            left = f"about {duration(summary['eta_s'])} left" if summary["eta_s"] else ""
            return State("running", _sentence(progress, left, last))
        case _:
            return State("unknown", _sentence("no manifest.json that can be read", progress, last))


def tiles(run: RunDirectory, summary: dict[str, Any]) -> list[Tile]:
    """The numbers to glance at; what was not recorded has the value "-"."""
    lines = run.metrics()
    outer = by_outer_step(line for line in lines if line["outer_step"] != INITIAL)
    return [
        *([_loss(summary)] if summary["fine_tunes"] else []),
        _evaluation(lines, "eval/accuracy", "eval accuracy"),
        _evaluation(lines, "eval/greedy_accuracy", "greedy accuracy"),
        _recent(outer, "reward/mean", "reward", ".3f"),
        _against(outer, "clip/frac_tokens", "clipped tokens", ".1%", "clip/frac_sequences", "of sequences"),
        _recent(outer, "entropy", "entropy, nats/token", ".3f"),
        _gap(outer, summary),
        _gradient(outer),
        _against(outer, "length/mean", "response tokens", ",.1f", "length/truncated", "truncated"),
        Tile("tokens/s", _text(summary["tokens_per_s"], ",.0f"), _per_step(summary)),
        Tile("run time", _text_of_duration(run), _steps(summary)),
    ]


def _evaluation(lines: Sequence[Record], metric: str, name: str) -> Tile:
    found = [(line[metric], line["outer_step"]) for line in lines if metric in line]
    if not found:
        return Tile(name, "-", "")
    first, last = found[0][0], found[-1][0]
    if len(found) == 1:
        return Tile(name, f"{last:.3f}", "evaluated once")
    best, at = max(found, key=lambda point: point[0])
    note = f"{_change(last - first)} from {first:.3f}"
    if best > last:
        note += f"; best {best:.3f} {'before training' if at == INITIAL else f'at step {counted(at)}'}"
    return Tile(name, f"{last:.3f}", note)


def _recent(outer: Sequence[Record], metric: str, name: str, spec: str) -> Tile:
    """The mean of the recent outer steps, as ``status`` has it, against that of the first ones."""
    width = recent_window(len(outer))
    begin, end = _values(outer[:width], metric), _values(outer[-width:], metric)
    if not end:
        return Tile(name, "-", "")
    value = fmean(end)
    if len(outer) == 1 or not begin:
        return Tile(name, f"{value:{spec}}", "one step" if len(outer) == 1 else f"mean of {width}")
    first = fmean(begin)
    return Tile(name, f"{value:{spec}}", f"{_change(value - first, spec)} from {first:{spec}}; means of {width}")


def _against(outer: Sequence[Record], metric: str, name: str, spec: str, other: str, other_name: str) -> Tile:
    width = recent_window(len(outer))
    values, others = _values(outer[-width:], metric), _values(outer[-width:], other)
    note = f"{fmean(others):.1%} {other_name}" if others else ""
    return Tile(name, f"{fmean(values):{spec}}" if values else "-", note)


def _gap(outer: Sequence[Record], summary: dict[str, Any]) -> Tile:
    """k3 as ``status`` has it."""
    value, tails = summary["engine_k3_median"], _values(outer[-summary["recent_outer_steps"] :], "kl/engine_tail")
    if value is None:
        return Tile("engine gap k3", "-", "")
    tail = f"; tail {fmean(tails):.2g}" if tails else ""
    return Tile("engine gap k3", f"{value:.2g}", f"median of {recent_text(summary)}, healthy below 1e-3{tail}")


def _loss(summary: dict[str, Any]) -> Tile:
    """Of fine-tuning."""
    first, value = summary["loss_first"], summary["loss"]
    if value is None:
        return Tile("loss", "-", "")
    return Tile(
        "loss", f"{value:.4f}", f"{_change(value - first, '.4f')} from {first:.4f}; mean of {recent_text(summary)}"
    )


def _gradient(outer: Sequence[Record]) -> Tile:
    found = [(record["grad_norm"], record["outer_step"]) for record in outer if "grad_norm" in record]
    if not found:
        return Tile("gradient norm", "-", "")
    largest, at = max(found)
    value = median(value for value, _ in found[-recent_window(len(outer)) :])
    return Tile("gradient norm", f"{value:.3g}", f"largest {largest:.3g} at step {counted(at)}")


def _per_step(summary: dict[str, Any]) -> str:
    whole, rollout = summary["seconds_per_outer_step"], summary["time_split"]["rollout"]
    if not whole:
        return ""
    per_step = f"{whole:.3g} s {'a' if summary['algorithm'] == 'sft' else 'an'} {step_noun(summary)}"
    return per_step + (f", {rollout / whole:.0%} rollout" if rollout else "")


def _steps(summary: dict[str, Any]) -> str:
    total = summary["outer_steps_total"]
    return f"{summary['outer_steps']}{f' of {total}' if total else ''} {step_noun(summary)}s"


def _text_of_duration(run: RunDirectory) -> str:
    """From the start to the end, or to the last line of metrics when no end was written."""
    manifest = run.manifest()
    ended = None if manifest.get("status") == "running" else _time(manifest.get("ended"))  # an earlier start's
    start, end = _time(manifest.get("started")), ended or _last_written(run)
    return duration(max(0.0, (end - start).total_seconds())) if start and end else "-"


def _last_written(run: RunDirectory) -> datetime | None:
    try:
        return datetime.fromtimestamp(run.metrics_file.stat().st_mtime, UTC)
    except OSError:
        return _time(run.manifest().get("started"))


def _time(value: Any) -> datetime | None:
    """An instant of the manifest; None when it is none, or has no time zone."""
    try:
        instant = datetime.fromisoformat(value)
    except (TypeError, ValueError):
        return None
    return instant if instant.tzinfo else None


def _clock(instant: datetime | None) -> str:
    return instant.astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC") if instant else ""


def _sentence(*parts: str | None) -> str:
    return "; ".join(part.strip() for part in parts if part)


def _change(value: float, spec: str = ".3f") -> str:
    return f"{value:+{spec}}".replace("-", "−")


def _values(records: Sequence[Record], name: str) -> list[float]:
    return [record[name] for record in records if name in record]


def _text(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)
