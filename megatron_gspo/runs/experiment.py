"""What makes a run the experiment that it is: for every setting, whether changing it changes a number.

``RULES`` is total: a setting without an entry fails a test. Beside the settings stands the content of what they name
(``contents``, and the fingerprints of the prompts as they were read): the same name may hold something else by now.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_gspo.algorithm.base import make_algorithm
from megatron_gspo.config import RewardConfig, RunConfig
from megatron_gspo.data.model_files import read_json
from megatron_gspo.hf.digest import files_digest, weights_digest
from megatron_gspo.rewards.registry import BUILTIN_REWARDS, named_functions

Flat = Mapping[str, Any]
"""Settings by "section.key"."""
Alters = Callable[[Flat, Flat], bool]
"""(settings then, settings now) -> whether a change between them changes a number."""


@dataclass(frozen=True)
class Rule:
    """Whether a run may be resumed with another value."""

    reason: str
    """What a change would do, or why it does nothing."""
    alters: Alters


def _always(then: Flat, now: Flat) -> bool:
    return True


def _never(then: Flat, now: Flat) -> bool:
    return False


def _decays(then: Flat, now: Flat) -> bool:
    return any({then[name], now[name]} != {"constant"} for name in ("optimizer.schedule", "critic.schedule"))


def _clips_elsewhere(then: Flat, now: Flat) -> bool:
    return _clip_range(then) != _clip_range(now)


def _clip_range(settings: Flat) -> tuple[float, float] | None:
    """None for an algorithm without one."""
    low, high = (settings.get(f"algorithm.{name}") for name in CLIPS)
    return None if low is None or high is None else (low, high)


CLIPS = ("clip_low", "clip_high")


def _other_engine_dtype(then: Flat, now: Flat) -> bool:
    return _engine_dtype(then) != _engine_dtype(now)


def _engine_dtype(settings: Flat) -> str:
    return str(settings["rollout.engine_dtype"] or settings["model.dtype"])


def _evaluates(then: Flat, now: Flat) -> bool:
    return bool(then["data.eval_path"] and now["data.eval_path"])


def _mixes_otherwise(then: Flat, now: Flat) -> bool:
    return _mixture(then) != _mixture(now)


def _mixture(settings: Flat) -> list[tuple[Any, ...]]:
    """What of the sources alters a number; how they are read is in the prompts' fingerprint."""
    return [(source["name"], source["weight"], source.get("reward")) for source in settings.get("data.sources", ())]


def _names(section: str, text: str) -> tuple[str, ...]:
    return tuple(f"{section}.{name}" for name in text.split())


TABLE: tuple[tuple[str, Alters, tuple[str, ...]], ...] = (
    ("weights and activations are others", _always, _names("model", "path dtype")),
    (
        "the objective is another",
        _always,
        _names("algorithm", "name aggregation credit kl_loss_coef kl_reward_coef reference"),
    ),
    ("the clip range is another", _clips_elsewhere, _names("algorithm", "clip_low clip_high")),
    (
        "the objective is another",
        _always,
        _names("correction", "rule level low high reject reject_level reject_above veto denominator opsm bypass"),
    ),
    (
        "the objective is another",
        _always,
        _names(
            "algorithm",
            "dual_clip log_clip_low log_clip_high tau_positive tau_negative k_positive lambda_positive k_negative "
            "lambda_negative max_ratio anchor share low high coefficient reward_coef",
        ),
    ),
    (
        "the critic is another",
        _always,
        _names("critic", "path gamma lam lam_alpha value_lam whiten clip_value normalise epochs pretraining_steps"),
    ),
    (
        "every optimizer step of the critic is another",
        _always,
        _names("critic", "lr min_lr schedule warmup_steps betas eps weight_decay clip_grad state_dtype"),
    ),
    (
        "every optimizer step is another",
        _always,
        _names("optimizer", "lr min_lr schedule warmup_steps betas eps weight_decay clip_grad state_dtype"),
    ),
    (
        "the schedule decays over the whole run, so that every learning rate from here on is another",
        _decays,
        _names("train", "outer_steps"),
    ),
    ("what is trained is another", _always, _names("lora", "rank alpha rslora targets")),
    ("the checkpoint has the adapters", _never, _names("lora", "path")),
    ("other prompts come together", _always, _names("train", "seed prompts_per_step minibatches")),
    ("other prompts come together", _always, _names("data", "shuffle curriculum curriculum_floor")),
    ("other prompts come together, or rewards are others", _mixes_otherwise, _names("data", "sources")),
    (
        "other responses are drawn",
        _always,
        _names(
            "rollout",
            "engine server_args group_size temperature top_p top_k min_p max_response_tokens seeded stop_tokens",
        ),
    ),
    ("the engine samples from other weights", _other_engine_dtype, _names("rollout", "engine_dtype")),
    ("the engine samples from other weights", _always, _names("sync", "router_noise")),
    ("other responses are trained on", _always, _names("rollout", "on_truncated on_mixed_version dynamic_sampling")),
    ("rewards are others", _always, _names("reward", "function options special_tokens")),
    ("rewards are others", _always, _names("reward_server", "model kind dtype args")),
    ("rewards are others", _always, _names("rollout", "overlong_buffer overlong_penalty")),
    ("gradients take other experts", _always, _names("replay", "mode")),
    ("eval/* means something else", _evaluates, _names("eval", "samples")),
    (
        "a layout computes the same step",
        _never,
        _names("parallel", "tensor pipeline virtual_pipeline stage_layers context expert expert_tensor data overlap"),
    ),
    (
        "memory and speed",
        _never,
        _names("model", "logprob_chunk recompute recompute_modules recompute_method recompute_layers"),
    ),
    ("memory, speed and rounding", _never, _names("placement", "mode gpus tensor expert attention_data memory")),
    ("memory and speed", _never, ("optimizer.offload", "critic.offload")),
    ("speed and rounding", _never, _names("model", "kernels")),
    ("memory, speed and rounding", _never, _names("train", "microbatch_tokens oversize deterministic")),
    (
        "prompts are compared as they were read",
        _never,
        (
            *_names("data", "path eval_path format prompt_field answer_field completion_field"),
            *_names("data", "chat_template chat_template_kwargs skip_bad limit"),
            *_names("rollout", "max_prompt_tokens"),
            *_names("eval", "prompts"),
        ),
    ),
    (
        "how servers are started and reached",
        _never,
        _names(
            "rollout",
            "servers servers_from server_nodes router local_servers server_python server_start_s server_restarts "
            "concurrency timeout_s retries health_every_s resubmit_after_s",
        ),
    ),
    ("how servers are started and reached", _never, _names("reward_server", "count tensor memory start_s restarts")),
    ("how weights travel", _never, _names("sync", "method directory bucket_mb backend timeout_s verify")),
    (
        "when a run fails",
        _never,
        _names(
            "rollout",
            "on_empty_step max_empty_steps max_engine_k3 on_engine_drift on_server_loss wait_for_servers_s",
        ),
    ),
    ("programs run in another environment, and rewards may be others", _always, _names("sandbox", "python disk_mb")),
    ("where programs run", _never, _names("sandbox", "backend servers key_file concurrency retries")),
    ("when a run fails", _never, _names("reward", "timeout_s concurrency check_references max_ungraded")),
    ("when a run fails", _never, _names("replay", "min_coverage")),
    ("when a run fails", _never, _names("train", "collective_timeout_s on_non_finite max_non_finite_steps")),
    ("a permission", _never, _names("algorithm", "allow_wide_clip")),
    ("which steps are measured", _never, _names("train", "noise_floor_every profile_steps")),
    ("which steps are measured", _never, _names("eval", "every start greedy suites suites_data suites_every")),
    ("which steps are measured", _never, _names("replay", "engine_routes_every drift_every")),
    (
        "what is kept, and where",
        _never,
        _names(
            "train",
            "run_dir checkpoint_every keep_last keep_every checkpoint_async save_rollouts save_hf save_hf_every "
            "tensorboard wandb metrics_address on_checkpoint on_end hook_timeout_s",
        ),
    ),
    ("how this start begins", _never, _names("train", "overwrite resume max_restarts resume_changes")),
)
"""(reason, whether it alters numbers, settings). A setting stands once."""

RULES: dict[str, Rule] = {name: Rule(reason, alters) for reason, alters, names in TABLE for name in names}


def flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Sections of settings -> "section.key" -> value."""
    return {f"{section}.{key}": value for section, settings in tree.items() for key, value in settings.items()}


def rule_of(name: str) -> Rule:
    """The rule of a setting; one that only an algorithm of the user's has makes another objective."""
    return RULES.get(name, RULES["algorithm.name"])


def as_trained(config: Mapping[str, Any]) -> dict[str, Any]:
    """Setting -> value, of the configuration that a checkpoint keeps; what an earlier version did not have, or left to
    the algorithm (null), has its default."""
    kept = flat(config)
    known = {"model": {"path": "model"}, "data": {"path": "data"}, "train": {"run_dir": "run"}}
    defaults = RunConfig.model_validate(known).model_dump(mode="json")
    algorithm = make_algorithm(str(kept.get("algorithm.name", "gspo")))
    defaults = flat(defaults | {"algorithm": algorithm.model_dump(mode="json")})
    left = {name for name, value in kept.items() if value is None and name.startswith("algorithm.")}
    return defaults | {name: value for name, value in kept.items() if name not in left}


TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "chat_template.jinja", "generation_config.json"),
)
"""Files that say how text becomes tokens and back, and which tokens end a response. Another list would be another
hash: checkpoints keep it."""


def contents(config: RunConfig) -> dict[str, str]:
    """Setting -> a hash of what it names: the tokenizer's files, the reference's and the reward model's weights, the
    reward's source; and of what it adds to, the stop tokens of ``config.json``.

    A reward's own imports are not followed, and those of the package come with its version.
    """
    model = Path(config.model.path)
    found = {"model.path": files_digest(model / name for name in TOKENIZER), "rollout.stop_tokens": _stop_tokens(model)}
    if config.algorithm.draws_responses:
        if own := _sources([config.reward]):
            found["reward.function"] = files_digest(own)
        if own := _sources([source.reward_config(config.reward) for source in config.data.sources]):
            found["data.sources"] = files_digest(own)
        if config.reward_server.model:
            found["reward_server.model"] = weights_digest(Path(config.reward_server.model))
        if config.algorithm.uses_reference:
            found["algorithm.reference"] = weights_digest(Path(config.algorithm.reference or config.model.path))
    return found


def _sources(rewards: Sequence[RewardConfig]) -> list[Path]:
    """The files of the user's that rewards, and the parts of combinations, are in."""
    sources = [_source(name) for reward in rewards for name in named_functions(reward)]
    return list(dict.fromkeys(source for source in sources if source is not None))


def _stop_tokens(model: Path) -> str:
    """A hash of the end-of-sequence tokens in ``config.json``, which is none of the tokenizer's files."""
    named = json.dumps(read_json(model).get("eos_token_id"))
    return hashlib.sha256(named.encode()).hexdigest()[:16]


def _source(function: str) -> Path | None:
    """The file of a reward function of the user's; None for one of the package, and where there is no file."""
    where = function.rpartition(":")[0]
    if function in BUILTIN_REWARDS or where.partition(".")[0] == "megatron_gspo":
        return None
    if where.endswith(".py"):
        return Path(where)
    try:
        spec = importlib.util.find_spec(where)
    except (ImportError, ValueError):
        return None
    return Path(spec.origin) if spec and spec.origin else None
