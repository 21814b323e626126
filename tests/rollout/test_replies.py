"""A reply becomes a Rollout only if every number in it holds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_gspo.errors import EngineReplyError
from megatron_gspo.rollout.engine import Sampling, rollout_seed
from megatron_gspo.rollout.sglang.reply import generation_request, in_parts, most_reply_bytes, parse_generation
from megatron_gspo.rollout.sglang.server import murmur_hash32
from megatron_gspo.types import Rollout, RouteShape
from tests.rollout.cases import REQUEST, SAMPLING, STOP, prompt, reply


def parse(answer: Any, sampling: Sampling = SAMPLING, version: int = 7) -> Rollout:
    return parse_generation(
        answer, prompt(), 1, sampling, vocab_size=64, weight_version=version, request_id=REQUEST, decode=str
    )


def test_a_stopped_response_keeps_its_stop_token_and_logprobs() -> None:
    rollout = parse(reply([9, 8, STOP]))
    assert rollout.response_ids.tolist() == [9, 8, 3]
    assert rollout.response_ids.dtype == "int32"
    assert rollout.rollout_logprobs.tolist() == [-0.5, -1.5, -2.5]
    assert rollout.rollout_logprobs.dtype == "float32"
    assert (rollout.finish_reason, rollout.truncated, rollout.sample) == ("stop", False, 1)
    assert rollout.weight_versions == (7,)
    assert rollout.text == "[9, 8, 3]"


def test_truncated_aborted_and_mixed_version_responses_are_told_apart() -> None:
    assert parse(reply([9, 8, 7, 6], "length")).truncated
    aborted = parse(reply([9, 8], "abort"))
    assert (aborted.finish_reason, aborted.truncated) == ("abort", False)
    assert parse(reply([], "abort")).response_ids.shape == (0,)
    mixed = reply([9, 8, STOP])
    mixed["meta_info"]["weight_versions"] = [
        {"version": "6", "start": 0, "end": 1},
        {"version": "7", "start": 1, "end": 2},
        {"version": "6", "start": 2, "end": 3},
    ]
    assert parse(mixed).weight_versions == (6, 7)


def test_the_version_of_a_server_that_sends_no_spans_is_its_one_version() -> None:
    answer = reply([9, STOP])
    del answer["meta_info"]["weight_versions"]
    assert parse(answer).weight_versions == (7,)


def changed(path: str, value: Any = None, ids: tuple[int, ...] = (9, 8, STOP)) -> dict[str, Any]:
    """A sound reply with one value replaced (None removes it)."""
    answer = reply(list(ids))
    node: Any = answer
    *parents, leaf = [int(part) if part.isdigit() else part for part in path.split("/")]
    for parent in parents:
        node = node[parent]
    if value is None:
        del node[leaf]
    else:
        node[leaf] = value
    return answer


LOGPROBS = "meta_info/output_token_logprobs"
MALFORMED = {
    "no ids": (changed("output_ids"), "not a reply"),
    "no meta": (changed("meta_info"), "not a reply"),
    "no logprobs": (changed(LOGPROBS), "not a reply"),
    "no finish reason": (changed("meta_info/finish_reason"), "not a reply"),
    "an id is a float": (changed("output_ids/0", 9.0), "not integers"),
    "an id is a boolean": (changed("output_ids/0", True), "not integers"),
    "ids are text": (changed("output_ids", "983"), "not integers"),
    "an id is negative": (changed("output_ids/0", -1), r"outside the vocabulary \[0, 64\): \[-1\]"),
    "an id is the vocabulary size": (changed("output_ids/0", 64), r"outside the vocabulary \[0, 64\): \[64\]"),
    "a logprob too few": (changed(f"{LOGPROBS}/2"), "2 logprobs for 3 tokens"),
    "a logprob of another token": (changed(f"{LOGPROBS}/1/1", 9), "token 1 is 8, .* of token 9"),
    "a logprob is NaN": (changed(f"{LOGPROBS}/1/0", float("nan")), "token 1 .* is nan"),
    "a logprob is null": (changed(f"{LOGPROBS}/1", [None, 8, None]), "token 1 .* is None"),
    "a logprob is -inf": (changed(f"{LOGPROBS}/1/0", float("-inf")), "token 1 .* is -inf"),
    "a logprob is -inf in float32": (changed(f"{LOGPROBS}/1/0", -1e39), r"token 1 .* is -1e\+39"),
    "a logprob is an integer beyond floats": (changed(f"{LOGPROBS}/1/0", -(10**400)), "token 1 .* is -1000"),
    "a count is a truth value": (
        changed("meta_info/completion_tokens", True, ids=(STOP,)),
        "completion_tokens is True",
    ),
    "a logprob is positive": (changed(f"{LOGPROBS}/1/0", 0.01), "token 1 .* is 0.01"),
    "a logprob of a token that is never drawn": (changed(f"{LOGPROBS}/1/0", -105.0), "token 1 .* is -105.0, none"),
    "a logprob has no id": (changed(f"{LOGPROBS}/1", [-1.0]), "not a reply"),
    "completion count": (changed("meta_info/completion_tokens", 4), "completion_tokens is 4, but 3"),
    "prompt count": (changed("meta_info/prompt_tokens", 2), "prompt_tokens is 2, but 3"),
    "finish reason unknown": (changed("meta_info/finish_reason/type", "tired"), "unknown finish reason"),
    "stopped at another token": (changed("meta_info/finish_reason/matched", 2), "stopped at 2, which is not in"),
    "stopped without the token": (
        changed("meta_info/finish_reason/matched", STOP, ids=(9, 8, 4)),
        r"stopped at token 3, but the response ends in \[9, 8, 4\]",
    ),
    "went on after the stop token": (reply([STOP, 8, STOP]), r"stop token at position \[0\] of 3"),
    "longer than asked for": (reply([9, 8, 7, 6, 5], "length"), "5 tokens, more than max_tokens = 4"),
    "cut too early": (reply([9, 8], "length"), "cut at 2 tokens, before max_tokens = 4"),
    "stale weights": (reply([9, 8, STOP], version="6"), "version 6, expected 7: the server missed a weight sync"),
    "half-written weights": (reply([9, 8, STOP], version="7-incomplete"), "'7-incomplete'.* failed halfway"),
    "weights of another run": (
        reply([9, 8, STOP], version="7-4f1c09ab"),
        "another run is using the server: .*'7-4f1c09ab'",
    ),
    "a reply to another request": (changed("meta_info/id", "4b1f"), "that of request 4b1f, and 4b1e was sent"),
    "a reply to no request": (changed("meta_info/id"), "not a reply"),
    "weights of no trainer": (reply([9, 8, STOP], version="default"), "'default'"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_reply_is_refused_with_its_values(case: str) -> None:
    answer, message = MALFORMED[case]
    with pytest.raises(EngineReplyError, match=message) as caught:
        parse(answer)
    assert "prompt 'p', sample 1" in str(caught.value)


@pytest.mark.parametrize("answer", [None, [], "text", 3, {}, [reply([9, STOP])]])
def test_what_is_no_reply_at_all_is_refused(answer: Any) -> None:
    with pytest.raises(EngineReplyError, match="not a reply"):
        parse(answer)


def test_a_seeded_request_carries_the_seed_of_its_sample_and_an_unseeded_one_none() -> None:
    body = generation_request(prompt(), [1, 0], Sampling(2, 0.7, 4, (STOP,), seed=11, outer_step=5))
    assert body == {
        "input_ids": [[5, 6, 7]] * 2,
        "sampling_params": [
            {
                "temperature": 0.7,
                "max_new_tokens": 4,
                "stop_token_ids": [3],
                "sampling_seed": rollout_seed(11, 5, "p", sample),
            }
            for sample in (1, 0)
        ],
        "return_logprob": True,
    }
    assert "sampling_seed" not in generation_request(prompt(), [1], SAMPLING)["sampling_params"][0]
    greedy = Sampling(2, 0.7, 4, (STOP,), greedy=True)
    assert generation_request(prompt(), [0], greedy)["sampling_params"][0]["temperature"] == 0.0


def test_a_groups_requests_are_as_few_as_their_replies_are_small() -> None:
    short, long = (Sampling(64, 1.0, tokens, (STOP,)) for tokens in (16, 8192))
    assert in_parts(range(64), prompt(), short) == [range(64)]
    parts = in_parts(range(64), prompt(), long)
    assert [sample for part in parts for sample in part] == list(range(64))
    most = [most_reply_bytes(prompt(), len(part), long) for part in parts]
    assert len(parts) == 3 and max(most) <= 2**26
    assert len(in_parts(range(8), prompt(), replace(long, routes=RouteShape((True,) * 48, 8, 128)))) == 3


def test_seeds_differ_in_every_argument_fit_31_bits_and_do_not_change_between_releases() -> None:
    base = (1, 2, "a", 3)
    others = [(0, 2, "a", 3), (1, 1, "a", 3), (1, 2, "b", 3), (1, 2, "a", 2)]
    seeds = {rollout_seed(*arguments) for arguments in [base, *others]}
    assert len(seeds) == 5
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert rollout_seed(0, 0, "0", 0) == 2049335148 == rollout_seed(0, 0, "0", 0, visit=0)
    assert rollout_seed(0, 0, "0", 0, visit=1) not in {rollout_seed(0, 0, "0", sample) for sample in range(64)}


def test_the_seeded_hash_is_the_one_that_sglang_computes_on_a_gpu() -> None:
    """Expected values: SGLang 0.5.23's Triton kernel, run in Triton's interpreter."""
    seeds = torch.tensor([0, 7, 2**31 - 1, 123456789012345], dtype=torch.uint64)
    hashed = murmur_hash32(seeds, torch.tensor([0, 1, 5, 70000]), torch.arange(3))
    assert hashed.dtype == torch.uint32
    assert hashed.tolist() == [
        [2167721464, 10027521, 2423355346],
        [2181709319, 53648153, 1438758276],
        [1536227421, 3239904240, 916971233],
        [552274144, 1781070178, 276757524],
    ]
