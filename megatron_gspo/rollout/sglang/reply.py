"""SGLang's ``/generate``: the request of a prompt's responses, and the validation of each. Pure functions, no HTTP."""

from __future__ import annotations

import math
import uuid
from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_gspo.errors import EngineReplyError, StaleWeightsError
from megatron_gspo.rollout.engine import Decode, Sampling, rollout_seed
from megatron_gspo.rollout.sglang.routes import decode_routes
from megatron_gspo.types import OPEN, Prompt, Rollout, ServerAccess, is_of_another_run

LOGPROB_EPSILON = 1e-6
"""A logprob may exceed 0 by this much: rounding of a log-softmax."""
LOWEST = math.log(float(np.finfo(np.float32).smallest_subnormal)) - 1
"""A token whose logprob is below this (-104) has probability 0 in float32, in which every engine samples: it was not
drawn. A greedy one may have any that is finite."""
LEAST_FINITE = float(np.finfo(np.float32).min)
"""A logprob below this is -inf where it is kept."""
TOKEN_BYTES = 256
"""Of JSON for each token of a response, at most: its id, its logprob with the id once more, and room to spare."""
META_BYTES = 2**14
"""Of JSON around a response's tokens, at most."""
FRAME_BYTES = 2**20
"""Of a reply, whatever was asked for."""


MOST_AT_ONCE_BYTES = 2**26
"""Of one reply: longer ones are asked for in parts, so that no server or client holds a whole group's as one text."""


def generation_request(prompt: Prompt, samples: Sequence[int], sampling: Sampling) -> dict[str, Any]:
    """The body of POST ``/generate`` for some responses to a prompt, each with a seed of its own; but for its ``rid``.

    (SGLang's ``n`` would give all of them the same seed.)
    """
    parameters: dict[str, Any] = {
        "temperature": 0.0 if sampling.greedy else sampling.temperature,
        "max_new_tokens": sampling.max_tokens,
        "stop_token_ids": list(sampling.stop_token_ids),
    } | _truncation(sampling)
    request = {
        "input_ids": [list(prompt.token_ids)] * len(samples),
        "sampling_params": [parameters | _seed(prompt, sample, sampling) for sample in samples],
        "return_logprob": True,
    }
    return request | ({"return_routed_experts": True} if sampling.routes else {})


def _truncation(sampling: Sampling) -> dict[str, Any]:
    """What only an evaluation has, and a greedy one needs not."""
    if sampling.greedy:
        return {}
    values: dict[str, tuple[float, float]] = {"top_p": (sampling.top_p, 1.0), "top_k": (sampling.top_k, -1)}
    return {name: value for name, (value, default) in values.items() if value != default}


def alone(request: dict[str, Any]) -> dict[str, Any]:
    """The request of one response as SGLang's router takes it, which knows of no lists (sglang-router 0.3.2)."""
    return request | {name: request[name][0] for name in ("input_ids", "sampling_params")}


def _seed(prompt: Prompt, sample: int, sampling: Sampling) -> dict[str, int]:
    if sampling.seed is None:
        return {}
    return {"sampling_seed": rollout_seed(sampling.seed, sampling.outer_step, prompt.id, sample, prompt.visit)}


def in_parts(samples: Sequence[int], prompt: Prompt, sampling: Sampling) -> list[Sequence[int]]:
    """The samples of each request: all in one, unless its reply could be longer than ``MOST_AT_ONCE_BYTES``."""
    each = most_reply_bytes(prompt, 1, sampling) - FRAME_BYTES
    most = max(1, (MOST_AT_ONCE_BYTES - FRAME_BYTES) // each)
    return [samples[start : start + most] for start in range(0, len(samples), most)]


def new_request_id() -> str:
    """What a reply must bear as its ``id``: no other request has it, of this run or of anybody's."""
    return uuid.uuid4().hex


def most_reply_bytes(prompt: Prompt, samples: int, sampling: Sampling) -> int:
    """The longest sound reply to a ``generation_request`` of so many samples: what is longer was not asked for."""
    size = META_BYTES + TOKEN_BYTES * sampling.max_tokens
    if sampling.routes:  # int32 in base64
        tokens = len(prompt.token_ids) + sampling.max_tokens
        size += tokens * len(sampling.routes.moe_layers) * sampling.routes.top_k * 6
    return FRAME_BYTES + samples * size


def parse_generation(
    reply: Any,
    prompt: Prompt,
    sample: int,
    sampling: Sampling,
    *,
    vocab_size: int,
    weight_version: int,
    request_id: str,
    decode: Decode | None = None,
    access: ServerAccess = OPEN,
) -> Rollout:
    """One validated response from a decoded reply.

    Raises EngineReplyError, with the values, unless the reply holds: ``request_id``; token ids in [0, vocab_size), one
    logprob <= 0 for each and for the same id, above ``LOWEST`` (finite where sampling is greedy); a known finish reason
    that fits the tokens (the stop token at the end and nowhere else; exactly ``max_tokens`` when cut); counts that
    agree; ``weight_version`` by its name in ``access``; and, when they were asked for, routes (``decode_routes``). A
    response of mixed versions has none: a retraction computes the cache of its first tokens again, routes with it,
    under weights that their logprobs are not from. Nor has an aborted one.
    """
    try:
        meta = reply["meta_info"]
        _require(
            meta["id"] == request_id,
            f"the reply is that of request {shorten(meta['id'])}, and {request_id} was sent",
        )
        ids = _token_ids(reply["output_ids"], vocab_size)
        logprobs = _logprobs(meta["output_token_logprobs"], ids, LEAST_FINITE if sampling.greedy else LOWEST)
        _check_counts(meta, prompt, ids)
        finish_reason = _finish_reason(meta["finish_reason"], ids, sampling)
        versions = _weight_versions(meta, weight_version, access)
        routes = None
        if sampling.routes and len(versions) == 1 and finish_reason != "abort":
            routes = decode_routes(meta.get("routed_experts"), len(prompt.token_ids) + len(ids), sampling.routes)
    except EngineReplyError as error:
        raise type(error)(f"prompt {prompt.id!r}, sample {sample}: {error}") from None
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise EngineReplyError(
            f"prompt {prompt.id!r}, sample {sample}: not a reply of /generate "
            f"({type(error).__name__}: {error}): {shorten(reply)}"
        ) from None
    return Rollout(
        prompt=prompt,
        sample=sample,
        response_ids=np.asarray(ids, dtype=np.int32),
        rollout_logprobs=np.asarray(logprobs, dtype=np.float32),
        finish_reason=finish_reason,  # type: ignore[arg-type]  # checked against the three names
        weight_versions=versions,
        text=decode(ids) if decode else "",
        routes=routes,
    )


def shorten(value: Any, limit: int = 300) -> str:
    """The value's text, cut to what fits in an error message."""
    try:
        text = value if isinstance(value, str) else repr(value)
    except (RecursionError, ValueError) as error:  # nested without end, or an integer of thousands of digits
        text = f"a {type(value).__name__} that cannot be shown ({error})"
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text)} characters)"


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise EngineReplyError(message)


def _token_ids(ids: Any, vocab_size: int) -> list[int]:
    if not isinstance(ids, list) or not set(map(type, ids)) <= {int}:
        raise EngineReplyError(f"output_ids are not integers: {shorten(ids)}")
    if ids and (min(ids) < 0 or max(ids) >= vocab_size):
        outside = [i for i in ids if not 0 <= i < vocab_size]
        raise EngineReplyError(f"output_ids outside the vocabulary [0, {vocab_size}): {outside[:5]}")
    return ids


def _logprobs(entries: Any, ids: list[int], lowest: float) -> list[float]:
    _require(isinstance(entries, list), f"output_token_logprobs are not a list: {shorten(entries)}")
    _require(len(entries) == len(ids), f"{len(entries)} logprobs for {len(ids)} tokens")
    if (sound := _sound_logprobs(entries, ids, lowest)) is not None:
        return sound
    for position, (token, (logprob, logprob_token, *_)) in enumerate(zip(ids, entries, strict=True)):
        _require(
            type(logprob_token) is int and token == logprob_token,
            f"token {position} is {token}, but its logprob is that of token {shorten(logprob_token)}",
        )
        _require(
            type(logprob) in (float, int) and lowest <= logprob <= LOGPROB_EPSILON,  # False for NaN
            f"the logprob of token {position} (id {token}) is {shorten(logprob)}, none of a token that was drawn: it "
            f"lies in [{lowest:.4g}, 0]",
        )
    return [float(entry[0]) for entry in entries]


def _sound_logprobs(entries: list[Any], ids: list[int], lowest: float) -> list[float] | None:
    """The logprobs of a reply in which all are as they should be, without a step in Python for each; else None."""
    if not set(map(type, entries)) <= {list} or min(map(len, entries), default=2) < 2:
        return None
    values, tokens = [entry[0] for entry in entries], [entry[1] for entry in entries]
    if tokens != ids or not set(map(type, tokens)) <= {int} or not set(map(type, values)) <= {float}:  # True == 1
        return None
    value_T = np.asarray(values, dtype=np.float64)
    return values if bool(((value_T >= lowest) & (value_T <= LOGPROB_EPSILON)).all()) else None


def _check_counts(meta: dict[str, Any], prompt: Prompt, ids: list[int]) -> None:
    for key, count in (("prompt_tokens", len(prompt.token_ids)), ("completion_tokens", len(ids))):
        same = type(meta[key]) is int and meta[key] == count
        _require(same, f"{key} is {shorten(meta[key])}, but {count} tokens were sent or received")


def _finish_reason(reason: Any, ids: list[int], sampling: Sampling) -> str:
    kind = reason["type"]
    stops = sampling.stop_token_ids
    _require(kind in ("stop", "length", "abort"), f"unknown finish reason {shorten(reason)}")
    _require(len(ids) <= sampling.max_tokens, f"{len(ids)} tokens, more than max_tokens = {sampling.max_tokens}")
    body = ids[:-1] if kind == "stop" else ids
    if not set(stops).isdisjoint(body):
        early = [position for position, token in enumerate(body) if token in stops]
        raise EngineReplyError(f"stop token at position {early[:1]} of {len(ids)}, but generation went on to {kind!r}")
    if kind == "stop":
        matched = reason["matched"]
        _require(
            matched in stops,
            f"the server stopped at {matched!r}, which is not in stop_token_ids {list(stops)}: the model's own "
            f"end-of-sequence tokens must be among them",
        )
        _require(bool(ids) and ids[-1] == matched, f"stopped at token {matched}, but the response ends in {ids[-3:]}")
    if kind == "length":
        _require(
            len(ids) == sampling.max_tokens,
            f"cut at {len(ids)} tokens, before max_tokens = {sampling.max_tokens}: the server's context or token pool "
            f"is too small",
        )
    return str(kind)


def _weight_versions(meta: dict[str, Any], expected: int, access: ServerAccess) -> tuple[int, ...]:
    """Distinct versions in the order of the tokens; one that is not ``expected`` must share the response with it."""
    names = [span["version"] for span in meta.get("weight_versions") or ()] or [meta["weight_version"]]
    known = [access.version_of(name) for name in names]
    versions = tuple(dict.fromkeys(version for version in known if version is not None))
    own = access.version_name(expected)
    if any(is_of_another_run(name, own) for name in names):
        raise EngineReplyError(
            f"another run is using the server: it holds weights of version {shorten(names)}, and {own!r} were sent: "
            f"give each run servers of its own"
        )
    if None in known:
        raise StaleWeightsError(
            f"weight version {shorten(names)} is none of this run's ({own!r} was expected): "
            f"no sync has reached the server, one failed halfway, or somebody else has started it again or given it "
            f"weights"
        )
    _require(
        expected in versions,
        f"answered with weights of version {', '.join(map(str, versions))}, expected {expected}: "
        f"the server missed a weight sync",
    )
    return versions
