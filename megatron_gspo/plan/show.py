"""Plans in words, for a terminal and as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from megatron_gspo.config import dump
from megatron_gspo.doctor.machine import gib
from megatron_gspo.dryrun.result import DryRun
from megatron_gspo.plan.advice import Change
from megatron_gspo.plan.memory import FEW, limit_of
from megatron_gspo.plan.models import Model
from megatron_gspo.plan.published import Compared, factor_off
from megatron_gspo.plan.rates import ASLEEP, CONTEXT, HEADROOM, Gpu
from megatron_gspo.plan.search import Outcome, Plan
from megatron_gspo.plan.settings import Choice, Request, config_of
from megatron_gspo.report.text import count

LACKING = {
    "training": "do not hold the trainer",
    "serving": f"leave servers no room for {FEW} of the longest sequences",
    "host": "need more host memory than a node has",
}
NOTE = (
    "Sums, not measurements: of this project nothing has run on a GPU yet. `plan --published` compares the sums with "
    "published times."
)


def text_of(
    model: Model, gpu: Gpu, request: Request, outcome: Outcome, changes: Sequence[Change] | None, top: int
) -> str:
    """What the command prints. ``changes``: None where none were looked for."""
    lines = [_asked(model, gpu, request), ""]
    for number, plan in enumerate(outcome.best(top), 1):
        lines += [*_plan(number, plan, request), ""]
    lines += [why_out(outcome, gpu)]
    if not outcome.plans:
        lines.append(_nearest(outcome, gpu))
    if changes:
        head = "Fewer GPUs would do:" if outcome.plans else "It would fit with one of these:"
        lines += ["", head, *(f"  {change.options:24} {_short(change.plan)}" for change in changes)]
    elif not outcome.plans and changes is not None:
        lines.append(
            "No single change that was tried makes it fit (narrow moments, LoRA, shorter responses, more GPUs)."
        )
    return "\n".join([*lines, "", NOTE])


def why_out(outcome: Outcome, gpu: Gpu) -> str:
    """How many legal layouts there are, and why they are not proposed."""
    usable = f"{gib(limit_of(gpu))} ({1 - HEADROOM:.0%} of a card)"
    parts = [f"{number} {LACKING[name]}" for name, number in outcome.lacking.items()]
    parts += [f"{outcome.slower} were not looked at, since they would be slower"] if outcome.slower else []
    parts = [f"{len(outcome.plans)} fit into {usable}", *parts]
    return f"{count(outcome.layouts, 'legal layout')}: {'; '.join(parts)}."


def _nearest(outcome: Outcome, gpu: Gpu) -> str:
    if outcome.nearest is None:
        return "Nothing fits: no layout's weights and gradients do."
    plan = outcome.nearest
    parts = " + ".join(f"{name} {gib(size)}" for name, size in _fullest(plan).items())
    return (
        f"Nothing fits: the nearest, {plan.choice.name}, needs {gib(plan.memory.needed)} of {gib(limit_of(gpu))} "
        f"({parts})."
    )


def _fullest(plan: Plan) -> dict[str, int]:
    memory = plan.memory
    return memory.trainer.parts if memory.lacking == "training" else memory.server.parts


def _asked(model: Model, gpu: Gpu, request: Request) -> str:
    work, active = request.work, model.matrices.active
    return (
        f"{model.name}, {model.parameters / 1e9:.1f} B parameters, {active / 1e9:.1f} B of them multiply a token; "
        f"{request.gpus} x {gpu.name} on nodes of {request.per_node}; {work.prompts} prompts x {work.group_size} "
        f"responses, prompts of {work.mean_prompt:.0f} tokens (at most {work.prompt_tokens}), responses of "
        f"{work.mean_response:.0f} (at most {work.response_tokens}), {work.minibatches} optimizer steps"
    )


def placed(choice: Choice) -> str:
    """ "8 GPUs in turns, 2 servers of 4"."""
    servers = f"{count(choice.servers.count, 'server')} of {count(choice.servers.tensor, 'GPU')}"
    if choice.colocated:
        return f"colocated on {count(choice.gpus, 'GPU')}, {servers}"
    return f"apart: trainer on {count(choice.gpus, 'GPU')}, {servers}"


def settings(choice: Choice) -> str:
    """What is set beside the layout."""
    parts = [f"micro-batches of {choice.microbatch_tokens} tokens", f"recompute {choice.recompute}"]
    parts += ["optimizer states in host memory"] if choice.offload else []
    parts += ["moments in bfloat16"] if choice.state_dtype == "bfloat16" else []
    parts += [f"LoRA of rank {choice.lora}"] if choice.lora else []
    parts += [f"layers a stage {_runs(choice.parallel.stage_layers)}"] if choice.parallel.stage_layers else []
    return ", ".join(parts)


def _runs(numbers: Sequence[int]) -> str:
    """ "3 x 31, 1" of thirty-one threes and a one."""
    groups = [(number, len(list(same))) for number, same in groupby(numbers)]
    return ", ".join(f"{number} x {times}" if times > 1 else str(number) for number, times in groups)


def _plan(number: int, plan: Plan, request: Request) -> Iterator[str]:
    memory, choice, step = plan.memory, plan.choice, plan.step
    yield f"{number}. {choice.name}; {placed(choice)}; {settings(choice)}"
    shares = ", ".join(f"{name} {share:.0%}" for name, share in plan.shares().items() if share >= 0.005)
    yield f"   a step  {step.mid:.0f} s ({step.low:.0f} to {step.high:.0f}): {shares}"
    yield f"   trainer {_sum(memory.trainer.parts)} = {gib(memory.trainer.total)}"
    yield (
        f"   server  {_sum(memory.server.parts)} = {gib(memory.server.total)}; room for {memory.server.at_once} of the "
        f"longest sequences at once"
    )
    host = f"{gib(memory.host)} of host memory a node"
    if memory.trainer.offloaded:
        host += f", {gib(memory.trainer.offloaded)} of states a rank"
    if memory.trainer.moved:
        host += f"; {gib(memory.trainer.moved)} a rank leave the card while servers generate"
    yield f"   host    {host}"


def _sum(parts: dict[str, int]) -> str:
    return " + ".join(f"{name} {gib(size)}" for name, size in parts.items())


def _short(plan: Plan) -> str:
    fullest = max(plan.memory.trainer.total, plan.memory.server.total)
    return f"{plan.choice.name}; {placed(plan.choice)}: {plan.step.mid:.0f} s a step, {gib(fullest)} on a card"


def record(
    model: Model, gpu: Gpu, request: Request, outcome: Outcome, changes: Sequence[Change] | None, top: int
) -> dict[str, Any]:
    """For ``--json``: bytes and seconds."""
    return {
        "model": {"name": model.name, "parameters": model.parameters, "active": round(model.matrices.active)},
        "gpus": request.gpus,
        "gpu": vars(gpu),
        "usable_bytes": limit_of(gpu),
        "workload": vars(request.work),
        "plans": [plan_record(model, request, plan) for plan in outcome.best(top)],
        "layouts": {"legal": outcome.layouts, "fit": len(outcome.plans), "slower": outcome.slower, **outcome.lacking},
        "nearest": None if outcome.nearest is None else _memory(outcome.nearest),
        "changes": [
            {"options": change.options, "seconds": change.plan.step.record(), **_memory(change.plan)}
            for change in changes or ()
        ],
        "measured": False,
    }


def plan_record(model: Model, request: Request, plan: Plan) -> dict[str, Any]:
    """One plan, with its configuration as TOML."""
    choice = plan.choice
    return {
        "placement": "colocated" if choice.colocated else "apart",
        "trainer_gpus": choice.gpus,
        "servers": {"count": choice.servers.count, "tensor": choice.servers.tensor},
        "lora": choice.lora,
        "seconds": plan.step.record(),
        "parts": {name: part.record() for name, part in plan.seconds.items()},
        "shares": {name: round(share, 4) for name, share in plan.shares().items()},
        **_memory(plan),
        "config": dump(config_of(model, request, choice)),
    }


def dry_text(gpu: Gpu, choice: Choice, found: DryRun, short: int) -> str:
    """What a dry run of a plan found, kind of rank by kind of rank; ``short``: bytes that a card lacks."""
    lines = [f"Dry run of {choice.name}, {found.seconds:.0f} s, without {', '.join(found.left_out)}:"]
    for name, rank in found.ranks.items():
        peak = rank.peak
        parts = {part: int(size) for part, size in peak.parts.items() if size}
        lines.append(
            f"  {name}: {_sum(parts)} = {gib(int(peak.total))}, in {peak.moment.phase} at its {peak.moment.site}; by "
            f"doctor's sum {gib(int(found.estimate[name]))}"
        )
        sent: dict[str, float] = {}
        for each in rank.collectives:
            sent[each.kind] = sent.get(each.kind, 0) + each.bytes
        moved = ", ".join(f"{kind} {gib(int(size))}" for kind, size in sent.items())
        lines.append(f"    {rank.flops / 1e12:.0f} Tflop in an optimizer step with its pi_old pass; {moved}")
    beside = gib(CONTEXT) + " of context" + (f" and {gib(ASLEEP)} of a sleeping server" if choice.colocated else "")
    verdict = f"is {gib(short)} more than" if short else "fits into"
    lines.append(
        f"The fullest rank, with {beside}, {verdict} {gib(limit_of(gpu))} ({1 - HEADROOM:.0%} of a card, {gpu.name})."
    )
    return "\n".join(lines)


def dry_record(found: DryRun, short: int) -> dict[str, Any]:
    """The same for ``--json``."""
    return {
        "short_bytes": short,
        "seconds": round(found.seconds, 1),
        "left_out": list(found.left_out),
        "agreement": found.agreement,
        "ranks": {
            name: {
                "moment": rank.peak.moment._asdict(),
                "parts": rank.peak.parts,
                "host": rank.host,
                "estimate": found.estimate[name],
                "flops": rank.flops,
                "collectives": [vars(each) for each in rank.collectives],
            }
            for name, rank in found.ranks.items()
        },
    }


def _memory(plan: Plan) -> dict[str, Any]:
    memory = plan.memory
    return {
        "layout": plan.choice.name,
        "trainer_bytes": memory.trainer.parts,
        "server_bytes": memory.server.parts,
        "sequences_at_once": memory.server.at_once,
        "offloaded_bytes": memory.trainer.offloaded,
        "moved_bytes": memory.trainer.moved,
        "host_bytes": memory.host,
        "needed_bytes": memory.needed,
    }


def published_text(rows: Sequence[Compared]) -> str:
    """A line for each published time, and by what factor each kind is off."""
    width = max(len(row.point.name) for row in rows)
    lines = [f"{'':9} {'':{width}}  {'published':>10}  {'predicted':>10}  {'from':>8}  {'to':>8}  ratio"]
    lines += [
        f"{row.point.kind:9} {row.point.name:{width}}  {row.point.seconds:10.4g}  {row.predicted.mid:10.4g}  "
        f"{row.predicted.low:8.3g}  {row.predicted.high:8.3g}  {row.ratio:5.2f}{'' if row.inside else '  outside'}"
        for row in rows
    ]
    for kind in dict.fromkeys(row.point.kind for row in rows):
        of_kind = [row for row in rows if row.point.kind == kind]
        inside = sum(row.inside for row in of_kind)
        lines.append(
            f"{kind}: off by a factor of {factor_off(of_kind):.2f} on average; {inside} of {len(of_kind)} in range"
        )
    sources = dict.fromkeys(row.point.source for row in rows)
    return "\n".join([*lines, "Sources: " + "; ".join(sources) + ". Seconds."])


def published_record(rows: Sequence[Compared]) -> list[dict[str, Any]]:
    """For ``--json``."""
    return [
        {
            "kind": row.point.kind,
            "name": row.point.name,
            "source": row.point.source,
            "published": row.point.seconds,
            "predicted": row.predicted.record(),
            "ratio": round(row.ratio, 3),
        }
        for row in rows
    ]
