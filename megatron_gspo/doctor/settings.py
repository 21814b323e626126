"""Checks of settings that are accepted and will not do what one expects: one table of small functions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path

from megatron_gspo.config import RunConfig
from megatron_gspo.doctor.check import Check, error, ok, warning
from megatron_gspo.doctor.facts import Facts
from megatron_gspo.doctor.lengths import fit_into, kept_positions, longest_prompt
from megatron_gspo.errors import ConfigError, MegatronGspoError
from megatron_gspo.hf.catalog import read_model
from megatron_gspo.report.rundir import RunDirectory

LONG_WARMUP = 0.5
"""Share of a run above which warm-up is most of what happens."""
LOW_RATE = 1e-5
"""Of adapters."""
NOISE = "noise/abs_log_ratio_p99"

When = Callable[[RunConfig], object]
INERT: tuple[tuple[tuple[str, ...], When, str], ...] = (
    (
        ("optimizer.min_lr",),
        lambda c: c.optimizer.schedule == "constant",
        'optimizer.schedule = "constant" never falls',
    ),
    (
        (
            *("algorithm.clip_low", "algorithm.clip_high", "algorithm.aggregation", "algorithm.kl_loss_coef"),
            *("rollout.group_size", "rollout.temperature", "train.minibatches", "reward.function", "data.eval_path"),
        ),
        lambda c: not c.algorithm.draws_responses,
        'algorithm.name = "sft" draws no responses and has no ratio',
    ),
    (
        ("algorithm.clip_low", "algorithm.clip_high"),
        lambda c: c.algorithm.draws_responses and c.train.minibatches == 1,
        "train.minibatches = 1: every ratio is exactly 1, and nothing is ever clipped",
    ),
    (
        ("rollout.local_servers", "rollout.server_args", "rollout.server_python", "rollout.server_start_s"),
        lambda c: c.rollout.named,
        "running servers are named, and none is started",
    ),
    (
        tuple(f"placement.{name}" for name in ("gpus", "tensor", "expert", "attention_data", "memory")),
        lambda c: c.rollout.named or not c.algorithm.draws_responses,
        "it is about servers that are started here, and none is",
    ),
    (("sync.directory",), lambda c: c.sync.method != "disk", 'only sync.method = "disk" writes there'),
    (
        ("sync.backend",),
        lambda c: c.sync.method not in ("auto", "distributed"),
        'only sync.method = "distributed" makes a group',
    ),
    (
        ("train.keep_last", "train.keep_every", "train.checkpoint_async"),
        lambda c: not c.train.checkpoint_every,
        "train.checkpoint_every = 0 saves once, at the end",
    ),
    (("train.resume_changes",), lambda c: not c.train.resume, "train.resume = false compares with no checkpoint"),
    (("eval.prompts", "eval.greedy"), lambda c: not (c.eval.every and c.data.eval_path), "nothing is evaluated"),
    (
        ("algorithm.allow_wide_clip",),
        lambda c: c.algorithm.clips != "responses",
        "no clip range is of sequence ratios",
    ),
    (("rollout.max_empty_steps",), lambda c: c.rollout.on_empty_step == "error", "the first empty step fails the run"),
    (
        ("rollout.server_restarts",),
        lambda c: c.rollout.named,
        "running servers are named, and nobody starts them here",
    ),
    (
        ("rollout.server_restarts", "rollout.wait_for_servers_s"),
        lambda c: c.rollout.on_server_loss == "error",
        'rollout.on_server_loss = "error": the first loss of a server fails the run',
    ),
    (("train.max_non_finite_steps",), lambda c: c.train.on_non_finite == "error", "the first one fails the run"),
    (("replay.min_coverage",), lambda c: c.replay.mode != "r3", "only r3 replays routes that may be missing"),
    (("replay.engine_routes_every",), lambda c: c.replay.mode == "r3", "r3 asks for routes in every outer step"),
    (("replay.drift_every",), lambda c: c.replay.mode != "off", "with replay every outer step is measured"),
)
"""(settings, when they have no effect, why); said only of those that the configuration names."""


def check_settings(facts: Facts) -> list[Check]:
    """Every finding; one line when there is none."""
    found = [check for rule in RULES for check in rule(facts)]
    return found or [ok(f"{len(RULES)} rules for settings that do not do what one expects: none applies")]


def inert(facts: Facts) -> Iterator[Check]:
    """Settings that have no effect beside the others."""
    config = facts.config
    for names, when, why in INERT:
        named = [name for name in names if _is_named(config, name)]
        if named and when(config):
            yield warning(f"{', '.join(named)} has no effect: {why}", f"remove {', '.join(named)}")


def positions(facts: Facts) -> Iterator[Check]:
    """Whether prompt and response fit into the positions of the model."""
    rollout, limit = facts.config.rollout, _positions(facts)
    longest = rollout.max_prompt_tokens + rollout.max_response_tokens
    if limit is None:
        return
    served = limit - kept_positions(facts)
    if longest > limit:
        yield error(
            f"rollout.max_prompt_tokens {rollout.max_prompt_tokens} + max_response_tokens "
            f"{rollout.max_response_tokens} = {longest}, above max_position_embeddings = {limit} in config.json",
            fit_into(facts, served),
        )
    elif (prompt := longest_prompt(facts)) is not None and prompt + rollout.max_response_tokens > served:
        yield warning(
            f"the longest prompt has {prompt} tokens, rollout.max_response_tokens = {rollout.max_response_tokens}: of "
            f"max_position_embeddings = {limit}, {rollout.engine} keeps {limit - served}, and would cut this response",
            fit_into(facts, served),
        )


def warmup(facts: Facts) -> Iterator[Check]:
    """Whether the warm-up leaves steps at the full rate."""
    steps, total = facts.config.optimizer.warmup_steps, facts.config.total_steps
    if steps > LONG_WARMUP * total:
        yield warning(
            f"optimizer.warmup_steps = {steps} of {total} optimizer steps (train.outer_steps x train.minibatches)",
            "fewer optimizer.warmup_steps",
        )


def clip_and_noise(facts: Facts) -> Iterator[Check]:
    """Against the noise that a run in this directory has measured; nothing is known before one has."""
    config = facts.config
    if facts.supervised:
        return
    clip_range = config.algorithm.clip_range()
    if clip_range is None:
        return
    low, high = clip_range
    try:
        lines = RunDirectory.open(config.train.run_dir).metrics()
    except MegatronGspoError:
        return
    noises = [line[NOISE] for line in lines if NOISE in line]
    if noises and noises[-1] > min(low, high):
        yield warning(
            f"clip range {low:g}, {high:g}, but {config.train.run_dir} measured numerical noise of {noises[-1]:.1e} in "
            f"log s_i (p99): sequences are clipped for nothing",
            "a wider algorithm.clip_low and clip_high, or model.dtype = float32",
        )


def reference(facts: Facts) -> Iterator[Check]:
    """A reference that the policy starts from is the usual one; one of another shape cannot be."""
    config = facts.config
    path = config.algorithm.reference
    if not path or facts.supervised:
        return
    if "algorithm.reference" in facts.missing:
        fix = facts.advice("algorithm.reference") or "algorithm.reference"
        yield error(f"algorithm.reference = {path}: no such model directory", fix)
        return
    if facts.problem("model"):  # said by the model's own check
        return
    _, other = read_model(path)
    if other.vocab_size != facts.shape.vocab_size:
        yield error(
            f"algorithm.reference = {path} has a vocabulary of {other.vocab_size}, the policy {facts.shape.vocab_size}",
            "algorithm.reference: a model of the same tokenizer",
        )
    elif Path(path).resolve() == Path(config.model.path).resolve():
        yield ok("algorithm.reference is model.path, which it is when it is empty: KL starts at 0")


def adapters(facts: Facts) -> Iterator[Check]:
    """What adapters stand on, and how much of the model they are; a learning rate that is one for whole weights."""
    lora = facts.config.lora
    if not lora.rank or facts.problem("model"):
        return
    try:
        every = facts.adapters
    except ConfigError as caught:
        yield error(str(caught), "lora.targets")
        return
    trained, of = (sum(prod(tensor.shape) for tensor in tensors) for tensors in (every, facts.tensors))
    names = dict.fromkeys(tensor.name.rsplit(".", 3)[1] for tensor in every)
    share = f"{trained:,} parameters, {trained / of:.2%} of {of:,}"
    yield ok(f"adapters of rank {lora.rank} on {', '.join(names)}: {share}")
    if facts.config.optimizer.lr < LOW_RATE:
        yield warning(
            f"optimizer.lr = {facts.config.optimizer.lr:g} is one for whole weights: adapters learn as fast at about "
            f"ten times such a rate",
            "optimizer.lr",
        )


def precision(facts: Facts) -> Iterator[Check]:
    """Whether the dtype is one for this machine."""
    dtype = facts.config.model.dtype
    if dtype == "float64" and facts.machine.gpus:
        yield warning(
            'model.dtype = "float64" on a GPU: for proofs on a CPU, and many times slower here', "model.dtype"
        )
    if dtype == "float64" and not facts.supervised:
        yield warning('model.dtype = "float64": the engine has float32 at most, and kl/engine shows the gap', "")
    if dtype == "bfloat16" and not facts.supervised and min(facts.config.algorithm.clip_range() or (1.0,)) < 1e-3:
        yield ok(
            "bfloat16 noise may reach a clip range this narrow: watch noise/abs_log_ratio_p99 (train.noise_floor_every)"
        )


def extras(facts: Facts) -> Iterator[Check]:
    """Whether the packages of optional sinks are there."""
    import importlib.util

    if facts.config.train.wandb and importlib.util.find_spec("wandb") is None:
        yield error(
            "train.wandb = true, but wandb is not installed",
            'pip install "megatron-gspo[wandb]", or train.wandb = false',
        )


def several_machines(facts: Facts) -> Iterator[Check]:
    """What runs over several machines need besides."""
    config, spread = facts.config, facts.nodes > 1
    if spread and not facts.supervised and not config.rollout.named:
        yield error(
            f"{facts.ranks} ranks on {facts.nodes} nodes of {facts.ranks_per_node} would not reach servers that one of "
            f"them starts",
            "start servers with `megatron-gspo serve`, and name them in rollout.servers_from",
        )
    if config.sync.method == "disk" and config.sync.directory.startswith("/dev/shm"):
        away = [url for url in config.rollout.servers if not _is_local(url)]
        if away or spread:
            yield warning(
                f'sync.method = "disk" in {config.sync.directory}, memory of one machine'
                + (f"; {away[0]} is perhaps another" if away else ""),
                'a directory that all share in sync.directory, or sync.method = "auto"',
            )


RULES: tuple[Callable[[Facts], Iterator[Check]], ...] = (
    inert,
    positions,
    warmup,
    clip_and_noise,
    reference,
    adapters,
    precision,
    extras,
    several_machines,
)
"""Each yields what it finds."""


def _is_named(config: RunConfig, name: str) -> bool:
    """Whether the configuration sets it, to other than its default."""
    section_name, _, field = name.partition(".")
    section = getattr(config, section_name)
    return field in section.model_fields_set and getattr(section, field) != type(section).model_fields[field].default


def _positions(facts: Facts) -> int | None:
    return None if facts.problem("model") else facts.shape.max_positions


def _is_local(url: str) -> bool:
    return url.partition("://")[2].startswith(("127.", "localhost", "[::1]"))
