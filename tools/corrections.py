"""Bias and variance of each correction for the engine gap, exactly, on a problem small enough to enumerate.

    python tools/corrections.py               # an engine whose logits differ by Gaussian noise; seconds
    python tools/corrections.py --engine      # a real one: SGLang in bfloat16, with noise on its routers; minutes

A policy draws responses of 4 tokens, each token's distribution depending on all before it. All of them are scored by a
random reward, and the gradient of the expected reward on the policy's own distribution is known exactly. A trainer sees
responses that the engine drew: by the product's own loss and corrections, the mean of its gradient estimate is what it
learns towards, and the spread of one response's estimate is its noise. Printed are the tables of docs/corrections.md;
both columns are relative to the exact gradient.

By default the policy is a table of logits over 5 tokens, 625 responses. With ``--engine`` it is the quickstart's
mixture of experts with as many tokens, in Megatron; the engine is a server that a run's own code starts and
sends weights to, with ``sync.router_noise``; and gradients are those of all of the model's parameters.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import runpy
import tempfile
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from megatron_gspo.algorithm.base import make_algorithm
from megatron_gspo.algorithm.correction import Correction
from megatron_gspo.algorithm.importance import correct
from megatron_gspo.algorithm.objective import objective
from megatron_gspo.algorithm.ratios import segment_sum
from megatron_gspo.batching.packing import pack, shard_tokens
from megatron_gspo.types import PlacedSample, ServerAccess, Shard

if TYPE_CHECKING:
    from megatron_gspo.train.assembly import Run
    from megatron_gspo.types import Rollout

VOCABULARY, LENGTH = 5, 4
GAPS = (0.05, 0.3, 1.0)
"""Standard deviation of the noise on the engine's logits."""
NOISES = (0.0, 0.05, 0.2)
"""``sync.router_noise`` of the real engine."""
RULES: dict[str, dict[str, object]] = {
    "none": {},
    "truncate, token, 2": {"rule": "truncate", "high": 2.0},
    "clip, token, 0.5 to 2": {"rule": "clip", "low": 0.5, "high": 2.0},
    "mask, token, 0.5 to 5 (IcePop)": {"rule": "mask", "low": 0.5, "high": 5.0},
    "drop, token, 0.5 to 2": {"rule": "drop", "low": 0.5, "high": 2.0},
    "truncate, sequence, 2": {"rule": "truncate", "level": "sequence", "high": 2.0},
    "truncate, sequence, no bound": {"rule": "truncate", "level": "sequence", "high": 1e9},
    "clip, sequence, 0.5 to 2": {"rule": "clip", "level": "sequence", "low": 0.5, "high": 2.0},
    "mask, sequence, 0.5 to 2": {"rule": "mask", "level": "sequence", "low": 0.5, "high": 2.0},
    "drop, sequence, 0.5 to 2": {"rule": "drop", "level": "sequence", "low": 0.5, "high": 2.0},
    "truncate, geometric, 2": {"rule": "truncate", "level": "geometric", "high": 2.0},
    "mask, geometric, 0.8 to 1.25": {"rule": "mask", "level": "geometric", "low": 0.8, "high": 1.25},
    "drop, geometric, 0.8 to 1.25": {"rule": "drop", "level": "geometric", "low": 0.8, "high": 1.25},
    "reject k1 above 0.1, sequence": {"reject": "k1", "reject_above": 0.1},
    "reject k2 above 0.01, sequence": {"reject": "k2", "reject_above": 0.01},
    "reject k3 above 0.01, sequence": {"reject": "k3", "reject_above": 0.01},
    "reject k3 above 0.01, token": {"reject": "k3", "reject_above": 0.01, "reject_level": "token"},
    "veto below 0.5": {"veto": 0.5},
    "bypass": {"bypass": True},
}
Found = dict[str, tuple[float, float]]
"""Rule -> (bias, spread), each relative to the norm of the exact gradient."""


class Policy(Protocol):
    """What is trained: the logprobs of all responses, and their gradients in its parameters."""

    @property
    def logprobs_RL(self) -> torch.Tensor:
        """[responses, tokens] float64."""
        ...

    def gradients(self, weights_KRL: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """([K, parameters] sums of the logprobs' gradients, weighed; [responses, tokens, tokens] the inner products of
        each response's gradients), float64."""
        ...


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", action="store_true", help="a real SGLang server and a real policy in Megatron")
    parser.add_argument("--noise", type=float, nargs="+", default=NOISES, help="sync.router_noise, with --engine")
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY, help="tokens, with --engine; 4 to 13")
    parser.add_argument("--length", type=int, default=LENGTH, help="of a response, with --engine")
    options = parser.parse_args()
    if options.engine:
        show(on_the_engine(options.noise, options.vocabulary, options.length))
    else:
        show({f"noise {gap:g}": measure(gap) for gap in GAPS})


def show(measured: Mapping[str, Found]) -> None:
    """The table, as it is in the docs."""
    print("| rule | " + " | ".join(f"bias, {gap} | spread" for gap in measured) + " |")
    print("|---|" + "---|---|" * len(measured))
    for name in RULES:
        cells = ("{:.3f} | {:.2f}".format(*found[name]) for found in measured.values())
        print(f"| {name} | {' | '.join(cells)} |")


def measure(gap: float) -> Found:
    """Of a table of logits, and an engine whose logits have noise of standard deviation ``gap``."""
    policy, engine_RL, rewards_R = problem(gap)
    return compare(policy, {"": engine_RL}, rewards_R)[""]


def compare(policy: Policy, engines: Mapping[str, torch.Tensor], rewards_R: torch.Tensor) -> dict[str, Found]:
    """By engine, of which ``engines`` has the logprobs of all responses, [responses, tokens]."""
    pi_RL = policy.logprobs_RL
    pi_R = pi_RL.sum(1).exp()
    advantages_R = rewards_R - (pi_R * rewards_R).sum()
    exactly_RL = pi_R[:, None] * coefficients(pi_RL, pi_RL, advantages_R, Correction())
    estimated, drawn = [exactly_RL], []
    for mu_RL in engines.values():
        drawn.append(mu_RL.sum(1).exp())
        for settings in RULES.values():
            terms_RL = coefficients(pi_RL, mu_RL, advantages_R, Correction(**settings))  # type: ignore[arg-type]
            estimated.append(terms_RL)
    likely = [torch.ones_like(pi_R), *(mu_R for mu_R in drawn for _ in RULES)]
    weights_KRL = torch.stack([mu_R[:, None] * terms_RL for mu_R, terms_RL in zip(likely, estimated, strict=True)])
    means, inner_RLL = policy.gradients(weights_KRL)
    exact, size = means[0], means[0].norm()
    found: dict[str, Found] = {name: {} for name in engines}
    cells = [(name, rule) for name in engines for rule in RULES]
    for (name, rule), mean, mu_R, terms_RL in zip(cells, means[1:], likely[1:], estimated[1:], strict=True):
        squares_R = torch.einsum("rl,rlm,rm->r", terms_RL, inner_RLL, terms_RL)
        spread = ((mu_R * squares_R).sum() - mean.square().sum()).clamp(min=0).sqrt()
        found[name][rule] = (float((mean - exact).norm() / size), float(spread / size))
    return found


def coefficients(
    pi_RL: torch.Tensor, mu_RL: torch.Tensor, advantages_R: torch.Tensor, settings: Correction
) -> torch.Tensor:
    """[responses, tokens]: of one response's gradient estimate, by the product's loss and corrections, what the
    gradient of each token's logprob counts with."""
    length = pi_RL.shape[1]
    samples = [
        PlacedSample.of_response(
            np.zeros(1),
            np.zeros(length),
            group=0,
            sample=sample,
            rollout_logprobs=mu_R.numpy(),
            advantage=advantage,
            token_advantages=np.full(length, advantage),
            weight=float(length),  # a sum over tokens
        )
        for sample, (mu_R, advantage) in enumerate(zip(mu_RL, advantages_R.tolist(), strict=True))
    ]
    shard = shard_tokens(pack(samples, loss_dtype=torch.float64), Shard())
    nothing_T = torch.zeros(len(shard.mask_T), dtype=torch.float64)
    new_T, mu_T = (nothing_T.masked_scatter(shard.mask_T, rows_RL) for rows_RL in (pi_RL, mu_RL))
    shard = shard.replace(old_logprobs_T=mu_T if settings.bypass else new_T, rollout_logprobs_T=mu_T)
    if settings.weighs:
        weights_T = correct(shard, settings, segment_sum).weights_T
        of_tokens_RL = weights_T[shard.mask_T].view_as(pi_RL)
        shard = shard.replace(corrections_T=weights_T, corrections_S=of_tokens_RL.mean(1))
    leaf_T = new_T.clone().requires_grad_()
    loss = objective(make_algorithm("ppo"), shard, leaf_T, segment_sum).loss
    (gradient_T,) = torch.autograd.grad(loss, leaf_T)
    return -gradient_T[shard.mask_T].view_as(pi_RL)


@dataclass(frozen=True)
class Table:
    """A ``Policy``: a row of logits for each prefix."""

    logits: torch.Tensor
    """[prefixes, V] float64; a leaf."""
    responses: Sequence[tuple[int, ...]]

    @property
    def logprobs_RL(self) -> torch.Tensor:
        return table_logprobs(self.logits, self.responses).detach()

    def gradients(self, weights_KRL: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See ``Policy``. Tokens of one response have no row in common: their gradients are orthogonal."""
        logprobs_RL = table_logprobs(self.logits, self.responses)
        sums = [
            torch.autograd.grad((logprobs_RL * weights_RL).sum(), self.logits, retain_graph=True)[0].flatten()
            for weights_RL in weights_KRL
        ]
        likely = torch.log_softmax(self.logits.detach(), dim=-1).exp()
        own_RL = logprobs_RL.detach().exp()
        rows = torch.tensor([[prefix_index(r[:t]) for t in range(len(r))] for r in self.responses])
        squares_RL = likely.square().sum(-1)[rows] - 2 * own_RL + 1  # |e_y - p|^2
        return torch.stack(sums), torch.diag_embed(squares_RL)


def table_logprobs(logits: torch.Tensor, responses: Sequence[tuple[int, ...]]) -> torch.Tensor:
    """[responses, tokens] of each token given those before it."""
    rows = torch.tensor([[prefix_index(response[:t]) for t in range(len(response))] for response in responses])
    return torch.log_softmax(logits, dim=-1)[rows, torch.tensor(responses)]


def prefix_index(prefix: tuple[int, ...]) -> int:
    index = 0
    for token in prefix:
        index = index * VOCABULARY + token + 1
    return index


def problem(gap: float, seed: int = 0) -> tuple[Table, torch.Tensor, torch.Tensor]:
    """A policy, its engine's logprobs of all responses, and their rewards."""
    rng = np.random.default_rng(seed)
    count = prefix_index((VOCABULARY - 1,) * (LENGTH - 1)) + 1
    logits = rng.normal(0, 1.0, (count, VOCABULARY))
    engine = logits + rng.normal(0, gap, logits.shape)
    responses = list(itertools.product(range(VOCABULARY), repeat=LENGTH))
    policy = Table(torch.tensor(logits, requires_grad=True), responses)
    return policy, table_logprobs(torch.tensor(engine), responses), torch.from_numpy(rng.random(len(responses)))


def on_the_engine(noises: Sequence[float], vocabulary: int, length: int) -> dict[str, Found]:
    """By noise on the routers: of a mixture of experts in Megatron, and a server in bfloat16 that has its weights."""
    from megatron_gspo.megatron.groups import make_groups, start_distributed
    from megatron_gspo.quiet import mute
    from megatron_gspo.runs.nodes import servers_of
    from megatron_gspo.train.assembly import build_run
    from megatron_gspo.train.inputs import load_inputs
    from megatron_gspo.train.models import placed_here

    mute()
    torch.set_num_threads(1)
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    with tempfile.TemporaryDirectory() as directory:
        config = write_run(Path(directory), vocabulary, length)
        start_distributed()
        groups, inputs = make_groups(config.parallel), load_inputs(config)
        with servers_of(config, placed_here(config, ranks=1), Path(directory) / "servers", print) as servers:
            run = build_run(config, groups, inputs, servers.urls, ServerAccess(servers.key))
            responses = list(itertools.product(range(vocabulary), repeat=length))
            policy = Trained(run, vocabulary, responses)
            engines = {}
            for version, noise in enumerate(noises, start=1):
                sync = config.sync.model_copy(update={"router_noise": noise})
                replace(run, config=config.model_copy(update={"sync": sync})).push(version)
                likely = next_token_logprobs(run, servers.urls[0], vocabulary, length)
                engines[f"noise {noise:g}"] = mu_RL = along(likely, responses)
                print(describe(run, version, noise, likely, policy.logprobs_RL, mu_RL), flush=True)
            run.sync.close()
        return compare(policy, engines, torch.from_numpy(np.random.default_rng(0).random(len(responses))))


def write_run(directory: Path, vocabulary: int, length: int):  # type: ignore[no-untyped-def]  # RunConfig
    """The quickstart's model with fewer tokens, one prompt, and the configuration of a run of them."""
    from megatron_gspo.config import parse

    quickstart = runpy.run_path(str(Path(__file__).parents[1] / "examples" / "quickstart" / "prepare.py"))
    symbols = [*"0123456789"[: vocabulary - 3], "=", quickstart["EOS"], quickstart["PAD"]]
    quickstart["write_model"](directory / "model", 0, {symbol: i for i, symbol in enumerate(symbols)})
    quickstart["write_jsonl"](directory / "train.jsonl", [{"prompt": "00=", "answer": ""}])
    return parse(
        {
            "model": {"path": str(directory / "model")},
            "data": {"path": str(directory / "train.jsonl")},
            "reward": {"function": "exact"},
            "train": {"run_dir": str(directory / "run"), "prompts_per_step": 1, "minibatches": 1},
            "rollout": {
                "engine_dtype": "bfloat16",
                "group_size": 64,
                "max_prompt_tokens": 3,
                "max_response_tokens": length,
            },
        }
    )


class Trained:
    """A ``Policy``: a run's own, with the gradients that its optimizer would see."""

    def __init__(self, run: Run, vocabulary: int, responses: Sequence[tuple[int, ...]]) -> None:
        """``responses``: all of one length, in lexical order."""
        self._run, self._vocabulary, self._responses = run, vocabulary, responses
        self.logprobs_RL = torch.cat(list(self._evaluate()))

    def _evaluate(self) -> Iterator[torch.Tensor]:
        for start in range(0, len(self._responses), 64):
            batch = self._pack(some := self._responses[start : start + 64])
            ((logprobs_T, _),) = self._run.policy.logprobs([batch])
            yield logprobs_T[shard_tokens(batch, Shard()).mask_T].double().view(len(some), -1)

    def gradients(self, weights_KRL: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See ``Policy``. A pass of its own for each token of each prefix, which its responses share."""
        length = weights_KRL.shape[2]
        inner_RLL = torch.zeros(*self.logprobs_RL.shape, length, dtype=torch.float64)
        sums, pending = torch.zeros((), dtype=torch.float64), list[tuple[torch.Tensor, torch.Tensor]]()
        path: list[torch.Tensor] = []
        before: tuple[int, ...] = ()
        for index, response in enumerate(self._responses):
            shared = [one == other for one, other in zip(before, response, strict=False)]
            del path[shared.index(False) if shared else 0 :]
            for t in range(len(path), length):
                path.append(self._gradient(response[: t + 1]))
                following = self._vocabulary ** (length - 1 - t)  # responses that begin so
                pending.append((weights_KRL[:, index : index + following, t].sum(1), path[-1]))
            if len(pending) >= 64 or index + 1 == len(self._responses):
                weights, gradients = zip(*pending, strict=True)
                sums, pending = sums + torch.stack(weights, dim=1) @ torch.stack(gradients), []
            rows = torch.stack(path)
            inner_RLL[index] = rows @ rows.T
            before = response
        return sums, inner_RLL

    def _gradient(self, response: tuple[int, ...]) -> torch.Tensor:
        """[parameters] float64, of the last token's logprob."""
        batch = self._pack([response])
        last = int(shard_tokens(batch, Shard()).mask_T.nonzero()[-1])
        self._run.policy.gradients([batch], lambda _, logprobs_T, entropy_T: logprobs_T[last])
        return torch.cat([gradient.flatten() for _, gradient in self._run.policy.named_gradients()]).double()

    def _pack(self, responses: Sequence[tuple[int, ...]]):  # type: ignore[no-untyped-def]  # PackedBatch
        prompt = np.array(self._run.prompts.prompts[0].token_ids)
        samples = [
            PlacedSample.of_response(
                prompt,
                np.array(response),
                group=0,
                sample=sample,
                rollout_logprobs=np.zeros(len(response)),
                advantage=0.0,
                token_advantages=np.zeros(len(response)),
                weight=1.0,
            )
            for sample, response in enumerate(responses)
        ]
        return pack(samples, loss_dtype=torch.float32)


def next_token_logprobs(run: Run, url: str, vocabulary: int, length: int) -> dict[tuple[int, ...], torch.Tensor]:
    """Beginning of a response -> [V] float64 logprobs of the token behind it, as the server says."""
    prompt = run.prompts.prompts[0].token_ids
    begun = [each for size in range(length) for each in itertools.product(range(vocabulary), repeat=size)]
    body = {
        "input_ids": [[*prompt, *each] for each in begun],
        "sampling_params": {"max_new_tokens": 1, "temperature": 1.0},
        "return_logprob": True,
        "token_ids_logprob": list(range(vocabulary)),
    }
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {run.access.key}"}
    request = urllib.request.Request(f"{url}/generate", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=600) as answer:
        replies = json.load(answer)
    found = {}
    for each, reply in zip(begun, replies, strict=True):
        entries = {token: logprob for logprob, token, *_ in reply["meta_info"]["output_token_ids_logprobs"][0]}
        found[each] = torch.tensor([entries[token] for token in range(vocabulary)], dtype=torch.float64)
    return found


def along(likely: Mapping[tuple[int, ...], torch.Tensor], responses: Sequence[tuple[int, ...]]) -> torch.Tensor:
    """[responses, tokens] of each token given those before it."""
    rows = [[likely[each[:t]][token] for t, token in enumerate(each)] for each in responses]
    return torch.tensor(rows, dtype=torch.float64)


def describe(
    run: Run,
    version: int,
    noise: float,
    likely: Mapping[tuple[int, ...], torch.Tensor],
    pi_RL: torch.Tensor,
    mu_RL: torch.Tensor,
) -> str:
    """How far the engine is from the policy, and what it says of responses that it draws from what it says here."""
    mu_R, log_rho_RL = mu_RL.sum(1).exp(), pi_RL - mu_RL
    k3 = float((mu_R[:, None] * (torch.expm1(log_rho_RL) - log_rho_RL)).sum() / pi_RL.shape[1])
    off = 0.0
    for rollout in asyncio.run(draw(run, version)):
        ids, logprobs = rollout.response_ids.tolist(), rollout.rollout_logprobs.tolist()
        there = [float(likely[tuple(ids[:t])][token]) for t, token in enumerate(ids)]
        off = max(off, *(abs(a - b) for a, b in zip(there, logprobs, strict=True)))
    return (
        f"noise {noise:g}: k3 {k3:.1e} nats a token, largest |log rho| {float(log_rho_RL.abs().max()):.2g}; mu of all "
        f"responses adds up to {float(mu_R.sum()):.6f}; logprobs of drawn responses are at most {off:.1e} from mu"
    )


async def draw(run: Run, version: int) -> list[Rollout]:
    """A group of responses, as a run draws them."""
    async with run.engine as engine:
        groups = await engine.rollout_groups(run.prompts.prompts, run.sampling(version), weight_version=version)
    return groups[0]


if __name__ == "__main__":
    main()
