"""Lengths of an evaluation: what fits the model and the prompts, where nobody has named limits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from megatron_gspo.config import RunConfig
from megatron_gspo.data.formats import Paths
from megatron_gspo.data.prompts import PromptSet, load_prompts
from megatron_gspo.data.tokenizer import Tokenizer, open_tokenizer
from megatron_gspo.errors import ConfigError
from megatron_gspo.evaluation.subject import LIMITS, Subject
from megatron_gspo.hf.catalog import read_model
from megatron_gspo.rollout.engine import ENGINES


def fitting(subject: Subject) -> Subject:
    """The subject with a value for each limit of ``subject.open_limits``: prompts as long as the longest, responses as
    long as the default and the model's positions allow. Raises ConfigError when no response fits behind the prompts."""
    if not subject.open_limits or subject.model is None:
        return subject
    config, rollout = subject.config, subject.config.rollout
    prompts = read_prompts(config, open_tokenizer(config, subject.model), limited=False)
    limits = {name: getattr(rollout, name) for name in LIMITS}
    longest = max(prompts.looked.prompt_tokens)
    if "max_prompt_tokens" in subject.open_limits:
        limits["max_prompt_tokens"] = longest
    room = positions(config, subject.model) - min(longest, limits["max_prompt_tokens"])
    if room < 1:
        raise ConfigError(_no_room(config, subject.model, longest))
    if "max_response_tokens" in subject.open_limits:
        limits["max_response_tokens"] = min(room, rollout.max_response_tokens)
    return replace(subject, config=config.model_copy(update={"rollout": rollout.model_copy(update=limits)}))


def read_prompts(config: RunConfig, tokenizer: Tokenizer, *, limited: bool = True) -> PromptSet:
    """The prompts to evaluate, all of them looked at; without ``limited`` of any length. Raises UserError."""
    return load_prompts(
        config.data.eval_path,
        tokenizer=tokenizer,
        format=config.data.format,
        fields=Paths.named_by(config.data),
        chat_template=config.data.chat_template,
        max_prompt_tokens=config.rollout.max_prompt_tokens if limited else None,
        skip_bad=config.data.skip_bad,
        limit=config.eval.prompts,
        whole=True,
    )


def check_room(config: RunConfig, model: Path, prompts: PromptSet) -> None:
    """Raises ConfigError when the longest prompt and a response as long as allowed are more than the engine gives the
    model: it would cut the response."""
    longest, response = max(prompts.looked.prompt_tokens), config.rollout.max_response_tokens
    room = positions(config, model) - longest
    if room < 1:
        raise ConfigError(_no_room(config, model, longest))
    if response > room:
        raise ConfigError(
            f"rollout.max_response_tokens = {response} (--max-tokens): the longest prompt of {config.data.eval_path} "
            f"has {longest} tokens, and {_limit(config, model)}: at most {room}"
        )


def positions(config: RunConfig, model: Path) -> int:
    """Tokens of a prompt and its response together that the engine gives the model."""
    _, shape = read_model(model)
    return shape.max_positions - ENGINES[config.rollout.engine].kept_positions


def _limit(config: RunConfig, model: Path) -> str:
    kept = ENGINES[config.rollout.engine].kept_positions
    whole = positions(config, model) + kept
    return f"max_position_embeddings = {whole}, of which {config.rollout.engine} keeps {kept}"


def _no_room(config: RunConfig, model: Path, longest: int) -> str:
    half = max(1, positions(config, model) // 2)
    return (
        f"{config.data.eval_path}: its longest prompt has {longest} tokens, and {_limit(config, model)}: nothing is "
        f"left for a response; rollout.max_prompt_tokens={half} with data.skip_bad=true would leave longer prompts out"
    )
