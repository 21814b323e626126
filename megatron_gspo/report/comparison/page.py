"""The comparison's page and the JSON beside it, from the plan and the digests alone."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from markupsafe import Markup

from megatron_gspo.report.comparison.analysis import Analysis, analyse, as_json
from megatron_gspo.report.comparison.cells import Comparison, read, short_names
from megatron_gspo.report.comparison.charts import sections
from megatron_gspo.report.comparison.collapses import collapse_step
from megatron_gspo.report.comparison.sentences import findings, limits, table, times_text
from megatron_gspo.report.headline import Tile
from megatron_gspo.report.html import Setting, environment, packed_plotly, settings_table, template, write_page
from megatron_gspo.report.metrics import METRICS
from megatron_gspo.report.payload import flatten, to_json
from megatron_gspo.report.text import count, duration

PAGE, RESULT = "report.html", "comparison.json"
VERSION = 1
SCRIPTS = ("common.js", "comparison.js")


def draw(out: Path) -> None:
    """Writes ``out/report.html`` and ``out/comparison.json``.

    Reads ``out/compare.json`` and the digests (``out/cells/ARM/seed_003.json``, or the lines of ``out/cells.jsonl``),
    and nothing else. Any of the cells may be missing, or have failed; the page says how many. Raises DataError where
    the plan or a digest cannot be read.
    """
    out = Path(out)
    comparison = read(out)
    analysis = analyse(comparison)
    write_page(json.dumps(result(comparison, analysis), indent=1, allow_nan=False) + "\n", out / RESULT)
    write_page(render(comparison, analysis), out / PAGE)


def result(comparison: Comparison, analysis: Analysis) -> dict[str, Any]:
    """``comparison.json``."""
    return {
        "version": VERSION,
        "title": title(comparison),
        "cells": {"planned": comparison.planned, "finished": _finished(comparison), "failed": len(comparison.failed)},
        "shows": [finding.text for finding in findings(comparison, analysis)],
        "does_not_show": limits(comparison, analysis),
        **as_json(analysis),
    }


def render(comparison: Comparison, analysis: Analysis) -> str:
    """The page as text."""
    drawn = sections(comparison, analysis)
    named = {metric for section in drawn for chart in section["charts"] for metric in chart["metrics"]}
    payload = {
        "arms": [{"name": arm.name, "replay": arm.replay} for arm in comparison.arms],
        "sections": drawn,
        "metrics": {
            name: [METRICS[name].unit, METRICS[name].meaning, METRICS[name].look_for]
            for name in METRICS
            if name in named
        },
    }
    return environment().get_template("comparison.html.j2").render(
        title=title(comparison),
        line=line(comparison),
        progress=progress(comparison),
        findings=findings(comparison, analysis),
        limits=limits(comparison, analysis),
        tiles=tiles(comparison, analysis),
        arms=[arm.name for arm in comparison.arms],
        arm_rows=arm_rows(comparison, analysis),
        final_steps=analysis.final_steps,
        stability=analysis.stability,
        contrasts={
            outcome: table([one for one in analysis.results if one.outcome == outcome]) for outcome in analysis.outcomes
        },
        settings=settings(comparison),
        cells=cell_rows(comparison, analysis),
        facts=facts(comparison),
        command=" ".join(map(str, comparison.plan.get("command") or [])),
        style=template("report.css"),
        script=Markup("\n").join(map(template, SCRIPTS)),
        payload=Markup(to_json(payload)),
        plotly=Markup(packed_plotly()),
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )  # fmt: skip


def title(comparison: Comparison) -> str:
    """``grpo and gspo, with replay off, r2 and r3``."""
    losses = listed(dict.fromkeys(arm.loss for arm in comparison.arms))
    replays = listed(dict.fromkeys(arm.replay for arm in comparison.arms if not arm.dense))
    swept = f", over {comparison.swept}" if comparison.swept else ""
    return f"{losses}, with replay {replays}{swept}" if replays else f"{losses}{swept}"


def line(comparison: Comparison) -> str:
    """On what, how long, how often."""
    starts = len(dict.fromkeys(comparison.plan.get("cold_starts") or [])) or 1
    data, steps = comparison.setting("data", "path"), comparison.setting("train", "outer_steps")
    parts = [
        f"model {comparison.setting('model', 'path') or '-'}",
        f"prompts {data}" if data else "",
        f"{count(int(steps), 'outer step')} of {comparison.setting('train', 'minibatches')} mini-batches"
        if steps
        else "",
        count(len(comparison.arms), "arm"),
        f"{count(len(comparison.seeds), 'seed')} from {count(starts, 'cold start')}",
    ]
    return " · ".join(part for part in parts if part)


def progress(comparison: Comparison) -> tuple[str, str]:
    """A word, and the sentence beside it."""
    finished, failed = _finished(comparison), len(comparison.failed)
    sentence = f"{finished} of {count(comparison.planned, 'cell')} finished" + (f", {failed} failed" if failed else "")
    return ("finished" if finished == comparison.planned else "failed" if failed else "unfinished"), sentence


def tiles(comparison: Comparison, analysis: Analysis) -> list[Tile]:
    """The numbers to glance at."""
    tested = analysis.tested
    shown = sum(one.verdict in ("higher", "lower") for one in tested)
    collapsed = sum(len(facts["collapsed"]) for facts in analysis.arms.values())
    finished = _finished(comparison)
    found = [
        Tile(
            "cells finished",
            f"{finished}/{comparison.planned}",
            f"{count(len(comparison.arms), 'arm')}, {count(len(comparison.seeds), 'seed')} each",
        ),
        Tile("differences shown", f"{shown}/{len(tested)}", "tested, in final reward") if tested else None,
        Tile("collapsed", f"{collapsed}/{finished}", "cells under half of their peak"),
        *[
            Tile("clipped tokens", f"{times_text(ratio.mean.value)} times", ratio.name)
            for ratio in analysis.clipping[:1]
            if ratio.mean
        ],
        *[
            Tile("time with replay", f"{ratio.mean.value:.2f} times", ratio.name)
            for ratio in analysis.costs[:1]
            if ratio.mean
        ],
    ]
    return [tile for tile in found if tile]


def arm_rows(comparison: Comparison, analysis: Analysis) -> list[list[str]]:
    """A row an arm: cells, final outcomes with intervals, collapses, clip fractions, engine gap, time, memory."""
    rows = []
    for arm in comparison.arms:
        known = analysis.arms[arm.name]
        failed = f", {known['failed']} failed" if known["failed"] else ""
        rows.append([
            arm.name, f"{known['finished']} of {len(comparison.seeds)}{failed}",
            *(_estimate(known["final"][name]) for name in analysis.outcomes), str(len(known["collapsed"])),
            _share(known["clip_tokens"]), _share(known["clip_sequences"]), _number(known["engine_k3"], ".2g"),
            duration(known["wall_s"]) if known["wall_s"] else "-", _number(known["peak_memory_mb"], ",.0f", " MB"),
        ])  # fmt: skip
    return rows


def cell_rows(comparison: Comparison, analysis: Analysis) -> list[list[str]]:
    """A row a cell that is there: arm, seed, cold start, state, final reward, accuracy, collapse, time, memory."""
    short = short_names([cell.cold_start for cell in comparison.cells])
    rows = []
    for cell in comparison.cells:
        finals = [_number(analysis.outcomes[name][cell.arm].get(cell.seed), ".3f") for name in analysis.outcomes]
        wall, collapsed = cell.measured("wall_s"), collapse_step(cell)
        error = str(cell.digest.get("error") or "")
        rows.append([
            cell.arm, str(cell.seed), short[cell.cold_start], cell.status + (f": {error}" if error else ""), *finals,
            "-" if collapsed is None else f"step {collapsed}", duration(wall) if wall else "-",
            _number(cell.measured("peak_memory_mb"), ",.0f", " MB"),
        ])  # fmt: skip
    return rows


def settings(comparison: Comparison) -> list[Setting]:
    """Every setting of the base configuration, and what each arm has in its place."""
    base = dict(flatten(comparison.plan.get("config") or {}))
    return settings_table([base | dict(flatten(dict(arm.settings))) for arm in comparison.arms])


def facts(comparison: Comparison) -> list[tuple[str, str]]:
    """Versions, hardware, seeds, cold starts, overrides: what it takes to run it again."""
    plan = comparison.plan
    starts = list(dict.fromkeys(plan.get("cold_starts") or []))
    rows = {
        "hardware": ", ".join(f"{name} {value}" for name, value in _items(plan.get("hardware"))),
        "versions": ", ".join(f"{name} {value}" for name, value in _items(plan.get("versions"))),
        "seeds": ", ".join(map(str, comparison.seeds)),
        "cold starts": ", ".join(map(str, starts)),
        "overrides": " ".join(map(str, plan.get("overrides") or [])),
        "planned": str(plan.get("created") or "").replace("T", " "),
    }
    return [(name, text) for name, text in rows.items() if text]


def listed(names: Iterable[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last


def _items(value: Any) -> list[tuple[str, Any]]:
    return (
        [(name, item) for name, item in value.items() if item not in (None, "")] if isinstance(value, Mapping) else []
    )


def _finished(comparison: Comparison) -> int:
    return sum(cell.finished for cell in comparison.cells)


def _estimate(mean: Any) -> str:
    if mean is None:
        return "-"
    around = f" ({mean.low:.3f} to {mean.high:.3f})".replace("-", "−") if mean.low is not None else ""
    return f"{mean.value:.3f}{around}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}" if value >= 1e-3 or value == 0 else f"{value:.1e}"


def _number(value: float | None, spec: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{spec}}{unit}"
