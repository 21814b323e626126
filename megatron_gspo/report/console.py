"""Progress on the terminal: a header, then one line an outer step. Plain text when the output is not a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from rich.console import Console
from rich.status import Status
from rich.text import Text

from megatron_gspo.config import RunConfig
from megatron_gspo.report.metrics import INITIAL, Record, clean, combine
from megatron_gspo.report.text import algorithm_text, duration, layout_text

if TYPE_CHECKING:
    from megatron_gspo.types import StepReport

HEADER_EVERY = 20
Formatter = Callable[[float], str]


@dataclass(frozen=True)
class Column:
    """A column of the table on the terminal."""

    title: str
    width: int
    metric: str
    format: Formatter
    keep: int
    """Columns that do not fit a narrow terminal go in descending order of this."""


def _fixed(digits: int) -> Formatter:
    return lambda value: f"{value:.{digits}f}"


def _general(value: float) -> str:
    return f"{value:.2g}"


def _percent(value: float) -> str:
    return "0" if value == 0 else f"{100 * value:.3g}%"


def _count(value: float) -> str:
    return f"{value / 1000:.1f}k" if value >= 10_000 else f"{value:.0f}"


def _deviation(value: float) -> str:
    return f"{value - 1:+.1e}"


COLUMNS = (
    Column("reward", 6, "reward/mean", _fixed(3), 0),
    Column("eval", 6, "eval/accuracy", _fixed(3), 0),
    Column("clip tok", 8, "clip/frac_tokens", _percent, 1),
    Column("clip seq", 8, "clip/frac_sequences", _percent, 5),
    Column("entropy", 7, "entropy", _fixed(3), 2),
    Column("s_i-1 p05", 9, "ratio/p05", _deviation, 4),
    Column("s_i-1 p95", 9, "ratio/p95", _deviation, 4),
    Column("k3 gap", 8, "kl/engine_k3", _general, 2),
    Column("|grad|", 7, "grad_norm", lambda value: f"{value:.3g}", 3),
    Column("tok/s", 6, "tokens_per_s", _count, 1),
    Column("rollout", 7, "time/rollout", _fixed(1), 6),
    Column("reward s", 8, "time/reward", _fixed(1), 8),
    Column("logp", 5, "time/logprobs", _fixed(1), 7),
    Column("train", 6, "time/train", _fixed(1), 6),
    Column("sync", 5, "time/sync", _fixed(1), 7),
)
SFT_COLUMNS = (
    Column("loss", 8, "loss", _fixed(4), 0),
    Column("|grad|", 7, "grad_norm", lambda value: f"{value:.3g}", 2),
    Column("lr", 8, "lr", _general, 1),
    Column("tok/s", 6, "tokens_per_s", _count, 1),
)
STEP_WIDTH, ETA_WIDTH = 9, 8
SFT_LINES = 50
"""Lines that a fine-tuning run prints: its steps are short and many."""


class ConsoleSink:
    """Prints an outer step when its last mini-batch arrives, its mini-batches combined as ``metrics.combine`` does.

    Fine-tuning has no outer steps: about ``SFT_LINES`` of its steps are printed.
    """

    def __init__(self, config: RunConfig, world_size: int, stream: TextIO | None = None) -> None:
        self._config = config
        self._console = Console(file=stream or sys.stderr, highlight=False, soft_wrap=True)
        width = self._console.width if self._console.is_terminal else 10_000
        self._is_sft = not config.algorithm.draws_responses
        self._every = max(1, config.train.outer_steps // SFT_LINES) if self._is_sft else 1
        self._columns = fitting(SFT_COLUMNS if self._is_sft else COLUMNS, width - STEP_WIDTH - ETA_WIDTH)
        self._pending: list[Record] = []
        self._printed = 0
        self._spent: list[float] = []
        self._clock = time.monotonic()
        self._status: Status | None = None
        self._console.print(Text(header(config, world_size), style="bold"))

    def phase(self, text: str) -> None:
        """What happens now, beside a spinner; nothing when the output is not a terminal.

        What came before the first step (servers, weights) is no part of a step's time, and of the ETA.
        """
        if not self._spent:
            self._clock = time.monotonic()
        if not self._console.is_terminal:
            return
        if self._status is None:
            self._status = self._console.status(Text(text))
            self._status.start()
        else:
            self._status.update(Text(text))

    def note(self, text: str) -> None:
        """A line of its own."""
        self._console.print(Text(text, style="dim"))

    def ending(self, lines: Sequence[str]) -> None:
        """What is left to say at the end."""
        for line in lines:
            self._console.print(Text(line))

    def write(self, report: StepReport) -> None:
        """Prints an outer step's row."""
        place = {"step": report.step, "outer_step": report.outer_step, "minibatch": report.minibatch}
        self._pending.append(place | clean(report.metrics))
        if report.outer_step == INITIAL or self._ends_a_line(report):
            self._flush()

    def close(self) -> None:
        """Ends the table."""
        if self._pending:
            self._flush()
        if self._status is not None:
            self._status.stop()

    def _ends_a_line(self, report: StepReport) -> bool:
        done = report.outer_step + 1
        if self._is_sft:
            return done % self._every == 0 or done == self._config.train.outer_steps
        last = report.minibatch == self._config.train.minibatches - 1
        return last or "tokens_per_s" in report.metrics  # which ends a step that has fewer of them

    def _flush(self) -> None:
        record = combine(self._pending)
        now = time.monotonic()
        if record["outer_step"] != INITIAL:
            steps = len({line["outer_step"] for line in self._pending})
            self._spent.append((now - self._clock) / steps)
        self._clock, self._pending = now, []
        if self._printed % HEADER_EVERY == 0:
            titles = [f"{column.title:>{column.width}}" for column in self._columns]
            row = "  ".join([f"{'step':>{STEP_WIDTH}}", *titles, f"{'ETA':>{ETA_WIDTH}}"])
            self._console.print(Text(row, style="dim"))
        self._printed += 1
        self._console.print(Text(self._line(record)))

    def _line(self, record: Record) -> str:
        total, outer_step = self._config.train.outer_steps, int(record["outer_step"])
        step = "start" if outer_step == INITIAL else f"{outer_step + 1}/{total}"
        cells = [f"{step:>{STEP_WIDTH}}"]
        for column in self._columns:
            text = column.format(record[column.metric]) if column.metric in record else "-"
            cells.append(f"{text:>{column.width}}")
        recent = self._spent[-10:]
        eta = duration((total - outer_step - 1) * sum(recent) / len(recent)) if recent else "-"
        return "  ".join([*cells, f"{eta:>{ETA_WIDTH}}"])


def header(config: RunConfig, world_size: int) -> str:
    """Model, layout, algorithm and clip range, in two lines."""
    train = config.train
    if not config.algorithm.draws_responses:
        plan = f"{train.outer_steps} steps of {train.prompts_per_step} examples"
    else:
        plan = (
            f"{train.outer_steps} outer steps of {train.minibatches} mini-batches · "
            f"{train.prompts_per_step} prompts x {config.rollout.group_size} responses"
        )
    layout = layout_text(config.parallel.model_dump() | {"data": config.parallel.data_size(world_size)}, world_size)
    return (
        f"{Path(config.model.path).name} ({config.model.dtype}) · {layout} · {algorithm_text(config)}\n"
        f"{plan} · writes {train.run_dir}"
    )


def fitting(columns: tuple[Column, ...], width: int) -> tuple[Column, ...]:
    """The columns that fit ``width`` characters, in their order; the least important are left out first."""
    kept = list(columns)
    while kept and sum(column.width + 2 for column in kept) > width:
        kept.remove(max(kept, key=lambda column: column.keep))
    return tuple(kept)
