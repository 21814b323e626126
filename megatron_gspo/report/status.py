"""``megatron-gspo status RUN``: how far a run is, how fast, and what looks wrong."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

from megatron_gspo.config import RunConfig
from megatron_gspo.errors import WeightError
from megatron_gspo.megatron.checkpoint_files import latest_in
from megatron_gspo.report.liveness import silence, state
from megatron_gspo.report.metrics import (
    INITIAL,
    TIME_PARTS,
    WINDOW,
    Record,
    by_outer_step,
    counted,
    recent_window,
    seconds,
    steps_taken,
)
from megatron_gspo.report.ranks import ENDED, grouped, ranks_of
from megatron_gspo.report.rundir import RunDirectory
from megatron_gspo.report.text import duration

K3_HEALTHY = 1e-3
"""Engine gap below which trainer and engine count as the same policy (docs/metrics.md)."""
UNENDED = ("running", "silent", "killed")
"""Of such a run its ranks have something to tell."""
LOST = ("gone", "silent", "missing", "failed")
"""States of a rank that a run which goes on should not have."""
TAIL_HEALTHY = 1e-4
"""Share of tokens whose ratio between engine and trainer is above 2 that is still usual."""


def summarise(run: RunDirectory | Path | str) -> dict[str, Any]:
    """Where a run stands, as JSON values; None where nothing was recorded. Raises DataError if it is no run.

    ``recent_outer_steps``: how many of the last outer steps the means and medians are over.
    """
    run = run if isinstance(run, RunDirectory) else RunDirectory.open(run)
    config, manifest, lines = run.config(), run.manifest(), run.metrics()
    trained = [line for line in lines if line["outer_step"] != INITIAL]
    outer = by_outer_step(trained)
    recent = outer[-recent_window(len(outer)) :]
    evaluations = [line["eval/accuracy"] for line in lines if "eval/accuracy" in line]
    losses = _values(outer, "loss")
    done, total = (outer[-1]["outer_step"] + 1 if outer else 0), (config.train.outer_steps if config else None)
    per_step = median(map(seconds, recent)) if recent else None
    engine = manifest.get("engine") or {}
    return {
        "run": str(run.path),
        "algorithm": config.algorithm.name if config else None,
        "fine_tunes": config is not None and not config.algorithm.draws_responses,
        "status": state(run, per_step),
        "silent_s": round(silence(run), 1),
        "error": manifest.get("error"),
        "starts": len(manifest.get("starts", [])) or None,
        "optimizer_steps": steps_taken(trained[-1]) if trained else 0,
        "outer_steps": done,
        "outer_steps_total": total,
        "eta_s": (total - done) * per_step if total and per_step else None,
        "recent_outer_steps": len(recent),
        "loss_first": losses[0] if losses else None,
        "loss": _mean(recent, "loss"),
        "grad_norm": _median(recent, "grad_norm"),
        "lr": recent[-1].get("lr") if recent else None,
        "reward": _mean(recent, "reward/mean"),
        "eval_first": evaluations[0] if evaluations else None,
        "eval_last": evaluations[-1] if evaluations else None,
        "clip_frac_tokens": _mean(recent, "clip/frac_tokens"),
        "clip_frac_sequences": _mean(recent, "clip/frac_sequences"),
        "explained_variance": _mean(recent, "critic/explained_variance"),
        "engine_k3_median": _median(recent, "kl/engine_k3"),
        "tokens_per_s": _median(recent, "tokens_per_s"),
        "seconds_per_outer_step": per_step,
        "time_split": {part: _mean(recent, f"time/{part}") for part in TIME_PARTS},
        "engine": {name: engine.get(name) for name in ("name", "version")},
        "servers": [{"url": url} for url in engine.get("urls") or ()],
        "reward_servers": [{"url": url} for url in manifest.get("reward_servers") or ()],
        "servers_up": recent[-1].get("servers/up") if recent else None,
        "ranks": ranks_of(run.path, (manifest.get("layout") or {}).get("world_size")),
        "last_checkpoint": last_checkpoint(run),
        "warnings": warnings(trained, config),
    }


def warnings(lines: list[Record], config: RunConfig | None) -> list[str]:
    """What a reader should look at, one sentence each. ``lines``: optimizer steps, without the initial evaluation."""
    outer = by_outer_step(lines)
    recent = outer[-WINDOW:]
    found = []
    first = [line["step"] for line in lines if line["minibatch"] == 0 and line.get("clip/frac_tokens", 0.0) > 0]
    if first:
        found.append(f"tokens were clipped in minibatch 0 (step {counted(first[-1])}), whose ratios must be exactly 1")
    if unclipped := _steps_without_clipping(outer, config):
        found.append(f"nothing was clipped for {unclipped} outer steps: the clip range is too wide, or nothing moves")
    k3 = _median(recent, "kl/engine_k3")
    if k3 is not None and k3 > K3_HEALTHY:
        found.append(f"kl/engine_k3 is {k3:.2g}, above {K3_HEALTHY:g}: engine and trainer disagree")
    tail = _median(recent, "kl/engine_tail")
    if tail is not None and tail > TAIL_HEALTHY:
        found.append(f"kl/engine_tail is {tail:.2g}, above {TAIL_HEALTHY:g}: tokens whose probabilities differ twofold")
    flat = _mean(recent, "reward/zero_std_groups")
    if flat is not None and flat > 0.5:
        found.append(f"{flat:.0%} of the groups have equal rewards and teach nothing: prompts too easy or too hard")
    if skipped := sum(record.get("step/skipped", 0.0) > 0 for record in recent):
        found.append(f"{skipped} of the last {len(recent)} outer steps were skipped: every response was dropped")
    if lost := sum(record.get("servers/lost", 0.0) for record in recent):
        found.append(f"{lost:g} rollout servers were lost in the last {len(recent)} outer steps (docs/servers.md)")
    stopped = _mean(recent, "reward/grader_timeouts")
    if stopped:
        found.append(f"{stopped:.2g} responses per outer step took too long to grade and got 0 (docs/grading.md)")
    truncated = _mean(recent, "length/truncated")
    if truncated is not None and truncated > 0.5:
        found.append(f"{truncated:.0%} of the responses were truncated: raise rollout.max_response_tokens")
    return found


def last_checkpoint(run: RunDirectory) -> str | None:
    """Name of the checkpoint that ``train.resume`` continues from; None when there is none, or none can be told."""
    try:
        latest = latest_in(run.checkpoints)
    except WeightError:
        return None
    return latest.name if latest else None


def format_status(summary: dict[str, Any]) -> str:
    """A summary as text for the terminal: of fine-tuning its loss, of reinforcement learning rewards and ratios."""
    rows = [
        ("run", f"{summary['run']} ({_state_text(summary)})"),
        *([("error", summary["error"])] if summary["error"] else []),
        *(_fine_tuning_rows(summary) if summary["fine_tunes"] else _policy_rows(summary)),
        ("speed", _speed_text(summary)),
        *(_rank_rows(summary) if summary["status"] in UNENDED else []),
        *_server_rows(summary),
        ("checkpoint", summary["last_checkpoint"] or "none yet"),
    ]
    lines = [f"{name:<14} {text}" for name, text in rows]
    return "\n".join(lines + [f"{'warning':<14} {text}" for text in summary["warnings"]])


def _policy_rows(summary: dict[str, Any]) -> list[tuple[str, str]]:
    over = recent_text(summary)
    return [
        ("outer step", f"{_place(summary)} ({summary['optimizer_steps']} optimizer steps){_time_left(summary)}"),
        ("reward", f"{_text(summary['reward'], '.3f')} (mean of {over})"),
        ("eval accuracy", f"{_text(summary['eval_first'], '.3f')} -> {_text(summary['eval_last'], '.3f')}"),
        ("clip fraction", _clip_text(summary)),
        *_critic_rows(summary, over),
        ("engine gap k3", f"{_text(summary['engine_k3_median'], '.2g')} (median of {over})"),
    ]


def _critic_rows(summary: dict[str, Any], over: str) -> list[tuple[str, str]]:
    """None without a critic."""
    explained = summary.get("explained_variance")
    return [] if explained is None else [("critic", f"explains {explained:.1%} of the returns (mean of {over})")]


def _fine_tuning_rows(summary: dict[str, Any]) -> list[tuple[str, str]]:
    over = recent_text(summary)
    return [
        ("step", f"{_place(summary)}{_time_left(summary)}"),
        ("loss", f"{_text(summary['loss_first'], '.4f')} -> {_text(summary['loss'], '.4f')} (mean of {over})"),
        ("|grad|", f"{_text(summary['grad_norm'], '.3g')} (median of {over})"),
        ("learning rate", _text(summary["lr"], ".2g")),
    ]


def recent_text(summary: dict[str, Any]) -> str:
    """ "the last 6 outer steps": what the means and medians of a summary are over."""
    steps, noun = summary["recent_outer_steps"], step_noun(summary)
    return f"the last {noun}" if steps == 1 else f"the last {steps} {noun}s"


def step_noun(summary: dict[str, Any]) -> str:
    """What a run's steps are called: fine-tuning has no outer ones."""
    return "step" if summary["fine_tunes"] else "outer step"


def _place(summary: dict[str, Any]) -> str:
    done, total = summary["outer_steps"], summary["outer_steps_total"]
    return f"{done}/{total}" if total else str(done)


def _time_left(summary: dict[str, Any]) -> str:
    return f", about {duration(summary['eta_s'])} left" if summary["eta_s"] and summary["status"] == "running" else ""


def format_line(summary: dict[str, Any]) -> str:
    """A summary as one line, for a log."""
    if summary["fine_tunes"]:
        learning = f"loss {_text(summary['loss'], '.4f')}"
    else:
        learning = f"reward {_text(summary['reward'], '.3f')}, eval {_text(summary['eval_last'], '.3f')}"
    return (
        f"{summary['status'] or 'no manifest'}: {step_noun(summary)} {_place(summary)}, {learning}, "
        f"{_text(summary['tokens_per_s'], '.0f')} tokens/s, checkpoint {summary['last_checkpoint'] or 'none yet'}"
        + "".join(f"; warning: {text}" for text in summary["warnings"])
    )


def _state_text(summary: dict[str, Any]) -> str:
    word, resumed = summary["status"] or "no manifest", (summary["starts"] or 1) - 1
    if word == "silent":
        word = f"silent: nothing written for {duration(summary['silent_s'])}; it hangs, or was killed"
    return word + (f", resumed {resumed}x" if resumed else "")


def lost_ranks(summary: dict[str, Any]) -> list[dict[str, Any]]:
    """Ranks of a run that are not there any more, or were never heard of."""
    return [entry for entry in summary["ranks"] if entry["state"] in LOST]


def is_healthy(summary: dict[str, Any]) -> bool:
    """Whether the run goes on with every rank, or is finished."""
    return summary["status"] == "finished" or (summary["status"] == "running" and not lost_ranks(summary))


def _rank_rows(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """A row for the ranks of each host, and one for each that is lost."""
    rows = []
    living = [entry for entry in summary["ranks"] if entry["state"] in ("alive", "ended")]
    for host in dict.fromkeys(entry["host"] for entry in living):
        here = [entry for entry in living if entry["host"] == host]
        doing = []
        for phase in dict.fromkeys(entry["phase"] for entry in here):
            those = [entry for entry in here if entry["phase"] == phase]
            longest = max(entry["in_phase_s"] for entry in those)
            count = f"{len(those)} x " if len(those) < len(here) else ""
            doing.append(f"{count}{phase} for {duration(longest)}" if phase != ENDED else f"{count}{phase}")
        rows.append(("ranks", f"{host}: {grouped(entry['rank'] for entry in here)} ({', '.join(doing)})"))
    return rows + [("rank", _lost_text(entry)) for entry in lost_ranks(summary)]


def _lost_text(entry: dict[str, Any]) -> str:
    if entry["state"] == "missing":
        return f"{entry['rank']} has not been heard of"
    if entry["state"] == "failed":
        return f"{entry['rank']} on {entry['host']} has failed: logs/rank-{entry['rank']}.log says why"
    where = f"{entry['rank']} on {entry['host']} (process {entry['pid']})"
    said = {
        "gone": "is gone; it was in",
        "silent": f"has said nothing for {duration(entry['heard_s'])}; it was in",
    }[entry["state"]]
    return f"{where} {said} {entry['phase']}"


def _server_rows(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """The engine, and each server, of rollouts and of rewards: what it said when it was asked, else only its URL."""
    name, version = summary["engine"]["name"], summary["engine"]["version"]
    up, of_all = summary["servers_up"], len(summary["servers"])
    served = "" if up is None or up == of_all else f", {up:g} of {of_all} servers in the last outer step"
    rows = [("engine", f"{name} {version}{served}")] if version else []
    for server in summary["servers"]:
        said = "not asked"
        if "error" in server:
            said = server["error"] or f"healthy, weights of version {server['weight_version']}"
        rows.append(("server", f"{server['url']} ({said})"))
    for server in summary["reward_servers"]:
        said = (server["error"] or "healthy") if "error" in server else "not asked"
        rows.append(("reward server", f"{server['url']} ({said})"))
    return rows


def _clip_text(summary: dict[str, Any]) -> str:
    tokens, sequences = summary["clip_frac_tokens"], summary["clip_frac_sequences"]
    return f"{_text(tokens, '.2%')} of tokens, {_text(sequences, '.2%')} of sequences"


def _speed_text(summary: dict[str, Any]) -> str:
    parts = [f"{part} {value:.1f}" for part, value in summary["time_split"].items() if value]
    split = f" = {' + '.join(parts)}" if parts else ""
    rate, per_step = _text(summary["tokens_per_s"], ".0f"), _text(summary["seconds_per_outer_step"], ".1f")
    article = "a" if summary["fine_tunes"] else "an"
    return f"{rate} tokens/s, {per_step} s {article} {step_noun(summary)}{split if len(parts) > 1 else ''}"


def _steps_without_clipping(outer: list[Record], config: RunConfig | None) -> int:
    """Outer steps at the end of the run in which nothing was clipped; 0 when that is no news."""
    if config is not None and (config.train.minibatches == 1 or not config.algorithm.draws_responses):
        return 0  # with one mini-batch every ratio is 1
    fractions = [record["clip/frac_tokens"] for record in outer if "clip/frac_tokens" in record]
    count = next((i for i, fraction in enumerate(reversed(fractions)) if fraction > 0), len(fractions))
    return count if count >= WINDOW else 0


def _values(records: list[Record], name: str) -> list[float]:
    return [record[name] for record in records if name in record]


def _mean(records: list[Record], name: str) -> float | None:
    values = _values(records, name)
    return sum(values) / len(values) if values else None


def _median(records: list[Record], name: str) -> float | None:
    values = _values(records, name)
    return median(values) if values else None


def _text(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)
