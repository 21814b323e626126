"""The report: one HTML file that needs nothing else, for one run or for several on the same axes.

Text from runs reaches the page in two ways only: through the template's autoescape, and as JSON that the script puts
into text nodes. plotly.js is embedded whole, compressed; the browser unpacks it.
"""

from __future__ import annotations

import base64
import gzip
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from megatron_gspo.errors import DependencyError
from megatron_gspo.report.payload import labels, payload, seconds_of_run, settings, to_json
from megatron_gspo.report.rundir import RunDirectory
from megatron_gspo.report.status import summarise
from megatron_gspo.report.text import algorithm_text, duration, layout_text


def write_report(runs: Sequence[Path], out: Path) -> Path:
    """Writes the page for ``runs`` (directories; still going or crashed will do) to ``out`` and returns it.

    Raises DataError for a directory that is no run, ConfigError for a run named twice.
    """
    directories = [RunDirectory.open(path) for path in runs]
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(out.name + ".tmp")
    temporary.write_text(render(directories), encoding="utf-8")
    temporary.replace(out)
    return out


def render(runs: Sequence[RunDirectory]) -> str:
    """The page as text."""
    environment = Environment(
        loader=PackageLoader("megatron_gspo.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    names = labels(runs)
    return environment.get_template("report.html.j2").render(
        title=", ".join(names),
        runs=[run_facts(run, name) for run, name in zip(runs, names, strict=True)],
        settings=settings_table([settings(run) for run in runs]),
        style=_template("report.css"),
        script=_template("report.js"),
        payload=Markup(to_json(payload(runs))),
        plotly=Markup(packed_plotly()),
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )


def run_facts(run: RunDirectory, label: str) -> dict[str, Any]:
    """What stands above the charts: what ran, and the numbers that sum it up."""
    summary = summarise(run)
    return {
        "label": label,
        "status": {"running": "not finished"}.get(summary["status"], summary["status"] or "no manifest"),
        "facts": [(name, text) for name, text in facts(run).items() if text],
        "numbers": key_numbers(summary, seconds_of_run(run)),
        "warnings": summary["warnings"],
    }


def facts(run: RunDirectory) -> dict[str, str]:
    """Model, algorithm, layout, versions, seeds, commit, start: each as text, empty where nobody knows."""
    manifest, config = run.manifest(), run.config()
    layout, git = _mapping(manifest.get("layout")), _mapping(manifest.get("git"))
    engine, versions = _mapping(manifest.get("engine")), _mapping(manifest.get("versions"))
    return {
        "model": f"{config.model.path} ({config.model.dtype})" if config else str(manifest.get("model") or ""),
        "algorithm": algorithm_text(config) if config else str(manifest.get("algorithm") or ""),
        "layout": layout_text(layout, layout["world_size"]) if "world_size" in layout else "",
        "engine": ", ".join(f"{key} {value}" for key, value in engine.items() if isinstance(value, (str, int, float))),
        "versions": ", ".join(f"{key} {value}" for key, value in versions.items() if value),
        "seeds": ", ".join(f"{key} {value}" for key, value in _mapping(manifest.get("seeds")).items()),
        "commit": f"{str(git['commit'])[:12]}{' + changes' if git.get('dirty') else ''}" if "commit" in git else "",
        "started": str(manifest.get("started") or "").replace("T", " "),
    }


def key_numbers(summary: Mapping[str, Any], run_seconds: float | None) -> list[tuple[str, str]]:
    """(what, value) in the order of the summary row."""
    total = summary["outer_steps_total"]
    return [
        ("eval accuracy", f"{_text(summary['eval_first'], '.3f')} → {_text(summary['eval_last'], '.3f')}"),
        ("reward, recent", _text(summary["reward"], ".3f")),
        ("clipped tokens, recent", _text(summary["clip_frac_tokens"], ".2%")),
        ("clipped sequences, recent", _text(summary["clip_frac_sequences"], ".2%")),
        ("engine gap k3, median", _text(summary["engine_k3_median"], ".2g")),
        ("tokens/s, recent", _text(summary["tokens_per_s"], ",.0f")),
        ("outer steps", f"{summary['outer_steps']}{f' of {total}' if total else ''}"),
        ("duration", "-" if run_seconds is None else duration(run_seconds)),
    ]


def settings_table(runs: Sequence[Mapping[str, str]]) -> list[tuple[str, list[str], bool]]:
    """(setting, its value in each run, whether they differ), in the order of the configuration."""
    names = {name: None for run in runs for name in run}
    rows = [(name, [run.get(name, "-") for run in runs]) for name in names]
    return [(name, values, len(set(values)) > 1) for name, values in rows]


def packed_plotly() -> str:
    """plotly.js, gzip and base64: 2 MB instead of 4.8."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise DependencyError(f"the report needs plotly ({error}): pip install plotly") from error
    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), mtime=0)).decode()


def _template(name: str) -> Markup:
    return Markup((Path(__file__).parent / "templates" / name).read_text(encoding="utf-8"))


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)
