"""``megatron-gspo plan``: layouts and placements for a number of GPUs, with memory and time.

megatron-gspo plan qwen3-30b-a3b --gpus 16 --gpu h100-80
megatron-gspo plan run.toml --gpus 16 --verify
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_gspo.plan.given import Given
    from megatron_gspo.plan.settings import Request
    from megatron_gspo.plan.workload import Workload

SUMMARY = "propose layouts and placements for a number of GPUs"
EXAMPLE = "megatron-gspo plan qwen3-30b-a3b --gpus 8 --gpu h100-80 --write plan.toml"
MORE = (
    "Says what each card would hold and how long an outer step would take, with a range, and why other layouts are "
    "out. Of a TOML file: what that run would take. Sums, from sizes alone: no weights and no GPU are needed. Exit "
    "status 2 when nothing fits."
)
DOCS = "docs/planning.md"
PLACEMENTS = ("auto", "apart", "colocated")
OF_A_SEARCH = (
    *("prompts", "group_size", "minibatches", "prompt_tokens", "response_tokens", "lora"),
    *("placement", "reference", "narrow_states", "fp8_rollouts", "write"),
)
"""Options that a TOML file answers."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="Hugging Face directory, config.json, the name of a published shape, or a run's TOML file",
    )
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="section.key=value", help="settings that replace the TOML file's"
    )
    for name, default, text in (
        ("gpus", 8, "GPUs of trainer and servers together"),
        ("gpus-per-node", 8, "GPUs of each machine"),
        ("prompts", 64, "prompts an outer step"),
        ("group-size", 16, "responses a prompt"),
        ("minibatches", 4, "optimizer steps an outer step"),
        ("prompt-tokens", 1024, "tokens of the longest prompt"),
        ("response-tokens", 7168, "tokens of the longest response"),
        ("lora", 0, "rank of adapters; 0 trains all weights"),
        ("top", 3, "plans to show"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{text} (default: {default})")
    parser.add_argument("--gpu", default="h100-80", metavar="NAME", help="its kind (default: h100-80)")
    parser.add_argument(
        "--mean-prompt", type=float, metavar="N", help="mean prompt (default: a quarter of the longest)"
    )
    parser.add_argument("--mean-response", type=float, metavar="N", help="mean response (default: half of the longest)")
    parser.add_argument(
        "--placement", choices=PLACEMENTS, default="auto", help="of trainer and servers (default: auto)"
    )
    parser.add_argument("--reference", action="store_true", help="with a reference policy (a KL term)")
    parser.add_argument("--narrow-states", action="store_true", help="also propose Adam's moments in bfloat16")
    parser.add_argument(
        "--fp8-rollouts", action="store_true", help='servers hold weights in eight bits (engine_dtype = "fp8")'
    )
    parser.add_argument("--write", type=Path, metavar="TOML", help="write the best plan as a configuration")
    parser.add_argument(
        "--verify", action="store_true", help="run the best plan's step on tensors without values: minutes, no GPU"
    )
    parser.add_argument("--published", action="store_true", help="compare predictions with published times instead")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> int:
    """Runs the command; returns the exit status."""
    if options.published and options.model is None:
        return _published(options)
    if options.model is None:
        options.parser.error("name a model (a directory, a config.json or a published shape), or --published")
    if options.published:
        options.parser.error(f"--published takes no model, and {options.model} is one")
    from megatron_gspo.errors import ConfigError
    from megatron_gspo.plan.models import find_model
    from megatron_gspo.plan.rates import GPUS

    if options.overrides and not options.model.endswith(".toml"):
        raise ConfigError(f"{options.overrides[0]} replaces a setting of a TOML file, and {options.model} is none")
    if options.gpu not in GPUS:
        raise ConfigError(f"--gpu {options.gpu}: known are {', '.join(GPUS)}")
    run = _given(options) if options.model.endswith(".toml") else None
    model = find_model(run.config.model.path if run else options.model)
    return _propose(options, model, GPUS[options.gpu], run.request if run else request_of(options), run)


def _propose(options: argparse.Namespace, model: Any, gpu: Any, request: Request, run: Given | None) -> int:
    """Searches or weighs what is given, writes and prints; 2 when nothing fits."""
    import json

    from megatron_gspo.plan.advice import to_fit, with_fewer
    from megatron_gspo.plan.given import lacks, weighed
    from megatron_gspo.plan.search import search
    from megatron_gspo.plan.settings import written
    from megatron_gspo.plan.show import dry_record, dry_text, record, text_of

    outcome = weighed(model, gpu, run) if run else search(model, gpu, request)
    changes = None if run else (with_fewer if outcome.plans else to_fit)(model, gpu, request)
    if options.write and outcome.plans:
        options.write.write_text(written(model, request, outcome.plans[0].choice), encoding="utf-8")
    dry = _dry_run(model, request, outcome, run) if options.verify else None
    short = lacks(gpu, outcome.plans[0].choice, dry) if dry else 0
    if options.json:
        said = record(model, gpu, request, outcome, changes, options.top)
        print(json.dumps(said | ({"verified": dry_record(dry, short)} if dry else {}), indent=2))
    else:
        print(text_of(model, gpu, request, outcome, changes, options.top))
        if run and (cards := run.config.reward_server.cards):
            print(f"\nOf {options.gpus} GPUs, {cards} are set aside for reward_server.")
        if dry:
            print(f"\n{dry_text(gpu, outcome.plans[0].choice, dry, short)}")
        if options.write and outcome.plans:
            print(f"Written: {options.write}; fill in your paths, then: megatron-gspo doctor {options.write}")
    return 0 if outcome.plans and not short else 2


def _given(options: argparse.Namespace) -> Given:
    """The TOML file. Raises ConfigError for options of a search, which say what it says."""
    from megatron_gspo.config import load
    from megatron_gspo.errors import ConfigError
    from megatron_gspo.plan.given import given

    for name in OF_A_SEARCH:
        if getattr(options, name) != options.parser.get_default(name):
            raise ConfigError(f"--{name.replace('_', '-')}: {options.model} says that; replace its setting")
    _check_numbers(options)
    means = options.mean_prompt or 0, options.mean_response or 0
    return given(load(options.model, options.overrides), options.gpus, options.gpus_per_node, *means)


def _dry_run(model: Any, request: Request, outcome: Any, run: Given | None) -> Any:
    """Of the best plan; None without one. Raises ConfigError for what has no dry run."""
    from megatron_gspo.dryrun import verify_shape
    from megatron_gspo.plan.settings import config_of

    if not outcome.plans:
        return None
    choice = outcome.plans[0].choice
    config = run.config if run else config_of(model, request, choice)
    return verify_shape(config, model.family, model.shape, choice.gpus)


def request_of(options: argparse.Namespace) -> Request:
    """The request. Raises ConfigError for numbers that no run could have."""
    from megatron_gspo.config.rollouts import EIGHT_BITS
    from megatron_gspo.plan.settings import Request

    _check_numbers(options)
    return Request(
        gpus=options.gpus,
        per_node=options.gpus_per_node,
        work=_workload(options),
        placement=options.placement,
        lora=options.lora,
        narrow=options.narrow_states,
        engine_dtype=EIGHT_BITS if options.fp8_rollouts else "",
    )


def _check_numbers(options: argparse.Namespace) -> None:
    from megatron_gspo.errors import ConfigError

    least = {"gpus": 1, "gpus_per_node": 1, "prompts": 1, "group_size": 2, "minibatches": 1, "top": 1, "lora": 0}
    least |= {"prompt_tokens": 1, "response_tokens": 1}
    for name, minimum in least.items():
        if getattr(options, name) < minimum:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(options, name)}: at least {minimum}")
    if options.prompts % options.minibatches:
        raise ConfigError(f"--prompts {options.prompts} is not a multiple of --minibatches {options.minibatches}")
    if options.gpus > options.gpus_per_node and options.gpus % options.gpus_per_node:
        raise ConfigError(f"--gpus {options.gpus} are no whole nodes of --gpus-per-node {options.gpus_per_node}")


def _workload(options: argparse.Namespace) -> Workload:
    from megatron_gspo.errors import ConfigError
    from megatron_gspo.plan.workload import Workload

    for name in ("prompt", "response"):
        mean, longest = getattr(options, f"mean_{name}"), getattr(options, f"{name}_tokens")
        if mean is not None and not 0 < mean <= longest:
            raise ConfigError(f"--mean-{name} {mean:g}: above 0, and at most --{name}-tokens {longest}")
    return Workload(
        prompts=options.prompts,
        group_size=options.group_size,
        prompt_tokens=options.prompt_tokens,
        response_tokens=options.response_tokens,
        mean_prompt=options.mean_prompt or max(1.0, options.prompt_tokens / 4),
        mean_response=options.mean_response or options.response_tokens / 2,
        minibatches=options.minibatches,
        reference=options.reference,
    )


def _published(options: argparse.Namespace) -> int:
    import json

    from megatron_gspo.plan.published import compared
    from megatron_gspo.plan.show import published_record, published_text

    rows = compared()
    print(json.dumps(published_record(rows), indent=2) if options.json else published_text(rows))
    return 0
