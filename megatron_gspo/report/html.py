"""The report: one HTML file that needs nothing else, for one run or for several on the same axes.

Text from runs reaches the page in two ways only: through the template's autoescape, and as JSON that the script puts
into text nodes. plotly.js is embedded whole, compressed; the browser unpacks it.
"""

from __future__ import annotations

import base64
import gzip
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from megatron_gspo.errors import DependencyError
from megatron_gspo.report.headline import state, tiles
from megatron_gspo.report.payload import labels, payload, settings, to_json
from megatron_gspo.report.rundir import RunDirectory
from megatron_gspo.report.status import summarise
from megatron_gspo.report.text import algorithm_text, layout_text
from megatron_gspo.storage import replace_text

SCRIPTS = ("common.js", "page.js", "charts.js", "reader.js")


def write_report(runs: Sequence[Path], out: Path) -> Path:
    """Writes the page for ``runs`` (directories; still going or crashed will do) to ``out`` and returns it.

    Raises DataError for a directory that is no run, ConfigError for a run named twice.
    """
    return write_page(render([RunDirectory.open(path) for path in runs]), out)


def render(runs: Sequence[RunDirectory]) -> str:
    """The page as text."""
    names, now = labels(runs), datetime.now(UTC)
    return (
        environment()
        .get_template("report.html.j2")
        .render(
            title=", ".join(names),
            runs=[run_facts(run, name, now) for run, name in zip(runs, names, strict=True)],
            settings=settings_table([settings(run) | versions(run) for run in runs]),
            style=template("report.css"),
            script=Markup("\n").join(map(template, SCRIPTS)),
            payload=Markup(to_json(payload(runs))),
            plotly=Markup(packed_plotly()),
            written=now.strftime("%Y-%m-%d %H:%M UTC"),
        )
    )


def run_facts(run: RunDirectory, label: str, now: datetime) -> dict[str, Any]:
    """What stands above the charts: how far it is, what ran, the numbers that sum it up, and what to look at."""
    summary, known = summarise(run), {name: text for name, text in facts(run).items() if text}
    return {
        "label": label,
        "state": state(run, summary, now),
        "line": " · ".join(known[name] for name in ("algorithm", "layout", "model") if name in known),
        "facts": list(known.items()),
        "tiles": tiles(run, summary),
        "warnings": summary["warnings"],
    }


def facts(run: RunDirectory) -> dict[str, str]:
    """Model, algorithm, layout, versions, seeds, commit, start: each as text, empty where nobody knows."""
    manifest, config = run.manifest(), run.config()
    layout, engine = _mapping(manifest.get("layout")), _mapping(manifest.get("engine"))
    return {
        "model": f"{config.model.path} ({config.model.dtype})" if config else str(manifest.get("model") or ""),
        "algorithm": algorithm_text(config) if config else str(manifest.get("algorithm") or ""),
        "layout": layout_text(layout, layout["world_size"]) if "world_size" in layout else "",
        "engine": ", ".join(f"{key} {value}" for key, value in engine.items() if isinstance(value, (str, int, float))),
        "versions": ", ".join(f"{key} {value}" for key, value in _mapping(manifest.get("versions")).items() if value),
        "seeds": ", ".join(f"{key} {value}" for key, value in _mapping(manifest.get("seeds")).items()),
        "commit": _commit(manifest),
        "started": str(manifest.get("started") or "").replace("T", " "),
    }


def versions(run: RunDirectory) -> dict[str, str]:
    """What ran, as rows beside the settings: two runs of one configuration may differ in nothing else."""
    manifest = run.manifest()
    rows = {f"version of {name}": str(value) for name, value in _mapping(manifest.get("versions")).items() if value}
    return rows | ({"commit": commit} if (commit := _commit(manifest)) else {})


class Setting(NamedTuple):
    """A row of the table of settings."""

    name: str
    values: list[str]
    """One a run; "-" where a run has none."""
    differs: bool


def settings_table(runs: Sequence[dict[str, str]]) -> list[Setting]:
    """Every setting of any run, in the order of the configuration; the page shows what differs first."""
    names = {name: None for run in runs for name in run}
    values = {name: [run.get(name, "-") for run in runs] for name in names}
    return [Setting(name, values[name], len(set(values[name])) > 1) for name in names]


def environment() -> Environment:
    """Where the pages' templates are found; what they are given is text and gets escaped."""
    return Environment(
        loader=PackageLoader("megatron_gspo.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )


def template(name: str) -> Markup:
    """A style sheet or a script, as it is."""
    return Markup((Path(__file__).parent / "templates" / name).read_text(encoding="utf-8"))


def write_page(text: str, out: Path) -> Path:
    """Replaces ``out`` by the page in one move."""
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    replace_text(out, text, errors="replace")  # a lone surrogate, of a directory's name or a torn manifest
    return out


@cache
def packed_plotly() -> str:
    """plotly.js, gzip and base64: 2 MB instead of 4.8."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise DependencyError(f"the report needs plotly ({error}): pip install plotly") from error
    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), mtime=0)).decode()


def _commit(manifest: dict[str, Any]) -> str:
    git = _mapping(manifest.get("git"))
    return f"{str(git['commit'])[:12]}{' + changes' if git.get('dirty') else ''}" if "commit" in git else ""


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
