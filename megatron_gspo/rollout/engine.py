"""What training asks of an inference engine, and which engines there are.

Adding an engine is one file with a class that satisfies ``Engine`` (and one that starts its servers on this machine),
and one entry in ``ENGINES``.
"""

from __future__ import annotations

import hashlib
import json
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Protocol, Self

from megatron_gspo.config import RolloutConfig
from megatron_gspo.types import OPEN, Prompt, Rollout, RouteShape, ServerAccess

Progress = Callable[[Sequence[Rollout]], None]
"""Called with each group as it completes, in the order of completion."""
Decode = Callable[[Sequence[int]], str]
"""Token ids to the text that rewards read (``data.tokenizer.response_text``)."""
EVALUATION = -1
"""The outer step that evaluation's seeds are made from: the same in every evaluation, and none of training's."""


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn: plain sampling at a temperature, since training needs the sampled distribution. An
    evaluation's may be truncated. Raises ValueError for ``top_p`` or ``top_k`` in an outer step of training.

    >>> Sampling(8, 1.0, 512, (0,), outer_step=EVALUATION, top_p=0.7).top_k
    -1
    """

    group_size: int
    """Responses per prompt."""
    temperature: float
    max_tokens: int
    """Response tokens, the stop token included; a longer response is cut (``finish_reason`` "length")."""
    stop_token_ids: tuple[int, ...]
    """Every token that ends a response; the model's own end-of-sequence tokens must be among them."""
    seed: int | None = None
    """Run seed of repeatable sampling; None leaves the draw to the engine."""
    outer_step: int = 0
    """Enters the seeds: the same prompt is answered anew in another outer step."""
    greedy: bool = False
    """Argmax instead of a draw; for evaluation only (the logprobs are those at temperature 1)."""
    routes: RouteShape | None = None
    """Asks for the routes of every token, and says what those of the model look like; None does not ask."""
    top_p: float = 1.0
    """Of an evaluation: draws from the likeliest tokens that hold this much probability. The logprobs of its responses
    stay those of the whole distribution, so nothing can be trained on them."""
    top_k: int = -1
    """Of an evaluation: draws from so many of the likeliest tokens; -1 from all."""

    def __post_init__(self) -> None:
        if (self.top_p, self.top_k) != (1.0, -1) and self.outer_step != EVALUATION:
            raise ValueError(
                f"top_p = {self.top_p:g}, top_k = {self.top_k} in outer step {self.outer_step}: training needs the "
                f"logprobs of the distribution that was sampled"
            )


class Engine(Protocol):
    """Draws responses. Used by one rank a data-parallel group, within one event loop."""

    version: str
    """The engine's own version, for the manifest."""
    lost: dict[str, str]
    """Servers that were given up since ``serve``, with the reason: no prompt goes there any more."""
    moved: int
    """Prompts that went to another server since ``serve``, because theirs was lost."""
    resubmitted: int
    """Prompts that were asked of another server too, because theirs took long."""

    @property
    def repeatable(self) -> bool:
        """Whether equal seeds give equal tokens, whatever else is in the batch."""
        ...

    def serve(self, urls: Sequence[str]) -> None:
        """Asks these servers from now on, all of which hold the current weights."""
        ...

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...

    async def rollout_groups(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        weight_version: int,
        progress: Progress | None = None,
        first: int = 0,
    ) -> list[list[Rollout]]:
        """Draws ``sampling.group_size`` responses for each prompt: groups in the order of ``prompts``, by sample.

        ``first``: prompts of the leaders before this one, which are asked for at the same time, of the same servers.

        Every response is validated. Truncated, aborted and mixed-version ones are returned and told apart by their
        fields (``rollout.survivors.apply_policies`` handles them). Raises NoServerError when no server is left
        (EngineUnavailableError when one is gone, under ``rollout.on_server_loss = "error"``), EngineReplyError when a
        reply breaks the contract or comes from other weights than ``weight_version``, and
        RolloutError when a server refuses a request.
        """
        ...


class Control(Protocol):
    """The engine's other face: the weights of every server, and their version. Used by one trainer rank.

    Each call is of all servers. A refusal, or a server that is gone (NoAnswerError), is a SyncError naming it.
    """

    urls: tuple[str, ...]

    def flush_when_idle(self) -> None:
        """Empties prefix caches; a server that still generates is waited for, and then refuses."""
        ...

    def set_version(self, version: str) -> None:
        """Names the version of what they hold."""
        ...

    def check_version(self, version: str) -> None:
        """Raises SyncError unless every server reports ``version``."""
        ...

    def versions(self) -> list[str]:
        """What each server says of the version of what it holds."""
        ...

    def pause(self) -> None:
        """Ends what is being generated and lets nothing begin until ``unpause``: requests wait."""
        ...

    def unpause(self) -> None:
        """Lets requests in again."""
        ...

    def sleep(self, tags: Sequence[str]) -> None:
        """Gives device memory back: "kv_cache", "weights", whose contents are lost. Servers must be awake, paused and
        idle: one that is not may die of it."""
        ...

    def wake(self, tags: Sequence[str]) -> None:
        """Takes the memory again, with nothing in it. Servers must be asleep: one that is not may die of it."""
        ...

    def infos(self) -> list[dict[str, Any]]:
        """Each server's settings."""
        ...

    def tensor_ranks(self) -> tuple[int, ...]:
        """Tensor-parallel ranks of each server."""
        ...

    def begin_update(self) -> None:
        """Opens an update session, which takes tensors until ``end_update``."""
        ...

    def end_update(self) -> None:
        """Closes the session."""
        ...

    def post_tensors(self, payload: bytes) -> None:
        """One bucket of named tensors, pickled and in base64, in an open session."""
        ...

    def post_handles(self, payloads: Sequence[Sequence[bytes]]) -> None:
        """One flat bucket in memory that servers open, in an open session: what each tensor rank of each is told."""
        ...

    def update_from_disk(self, directory: str) -> None:
        """Loads a Hugging Face directory that the servers can read."""
        ...

    def join(self, group: str, address: str, port: int, world_size: int, backend: str) -> list[Future[str]]:
        """Begins to take every server's ranks, from rank 1 on, into a group with a store at (address, port)."""
        ...

    def receive(self, group: str, layout: Mapping[str, Any], patience_s: float) -> list[Future[str]]:
        """Begins to receive one flat bucket of tensors from the group's rank 0."""
        ...

    def leave(self, group: str) -> list[Future[str]]:
        """Begins to take the servers out of a group."""
        ...

    def overwrite(self) -> None:
        """Puts random numbers in the place of the weights."""
        ...

    def checksums(self) -> list[list[dict[str, str]]]:
        """Of each server and each of its tensor-parallel ranks: parameter -> hash of its bytes."""
        ...


@dataclass(frozen=True)
class EngineEntry:
    """An engine by name; each field is ``module:class``, imported on use."""

    engine: str
    """Called with (urls, rollout_config, vocab_size=..., decode=..., access=..., leaders=...)."""
    control: str
    """A ``Control``; called with (urls, timeout_s, key, health_every_s)."""
    servers: str
    """A context manager that starts servers on this machine; called as ``sglang``'s ``LocalServers``."""
    without_dense_layers: frozenset[str] = frozenset()
    """Architectures of which it makes every layer a mixture of experts, whatever ``config.json`` says."""
    computed_with: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Architecture -> keys of ``config.json`` that it does not look at, with what it computes with instead."""
    sizes_heads: frozenset[str] = frozenset()
    """Architectures whose attention heads it gives hidden_size / num_attention_heads numbers, whatever ``head_dim`` in
    ``config.json`` says."""
    own_heads: frozenset[str] = frozenset()
    """Architectures to which it gives a head of its own, also where ``config.json`` ties it to the embedding: it is
    sent with the weights."""
    kept_positions: int = 0
    """Of a model's positions, those that a prompt and its response together never get."""


ENGINES = {
    "sglang": EngineEntry(
        "megatron_gspo.rollout.sglang.client:SGLangEngine",
        "megatron_gspo.rollout.sglang.control:Servers",
        "megatron_gspo.rollout.sglang.launcher:LocalServers",
        # 0.5.23, srt/models/qwen2_moe.py and qwen3_moe.py: at equal weights logprobs were up to 2.6 off.
        without_dense_layers=frozenset({"Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM"}),
        # srt/models/olmoe.py: renormalize=False; at equal weights logprobs were up to 1.5 off.
        computed_with={"OlmoeForCausalLM": {"norm_topk_prob": False}},
        # srt/models/qwen2_moe.py, mixtral.py and olmoe.py; a Qwen2-MoE of other heads ends the server as it loads it.
        sizes_heads=frozenset({"Qwen2MoeForCausalLM", "MixtralForCausalLM", "OlmoeForCausalLM"}),
        # Their ParallelLMHead is never tied, and a checkpoint of a tied one holds no tensor for it: logprobs of ln V.
        own_heads=frozenset(
            {
                "Qwen2MoeForCausalLM",
                "Qwen3MoeForCausalLM",
                "MixtralForCausalLM",
                "OlmoeForCausalLM",
                "Glm4MoeForCausalLM",
            }
        ),
        # 0.5.23: a request has context length - 1 (srt/managers/tp_worker.py), and max_new_tokens is cut to what is
        # left of that behind the prompt, less 1 (scheduler.py).
        kept_positions=2,
    ),
}


def make_engine(
    urls: Sequence[str],
    config: RolloutConfig,
    *,
    vocab_size: int,
    decode: Decode | None = None,
    access: ServerAccess = OPEN,
    leaders: int = 1,
) -> Engine:
    """The configured engine over the servers at ``urls``, to be entered with ``async with``; ``leaders`` ask them at
    the same time.

    ``vocab_size`` is the Hugging Face ``config.vocab_size``: prompts and replies must lie within it. ``decode`` fills
    ``Rollout.text``. ``access`` opens the servers, and names the weight versions that are believed.
    """
    make = pkgutil.resolve_name(ENGINES[config.engine].engine)
    engine: Engine = make(urls, config, vocab_size=vocab_size, decode=decode, access=access, leaders=leaders)
    return engine


def make_control(
    engine: str, urls: Sequence[str], timeout_s: float, key: str = "", health_every_s: float = 20.0
) -> Control:
    """The control of an engine's servers; one that is silent is asked every ``health_every_s`` whether it is there.
    Raises SyncError when there is none."""
    control: Control = pkgutil.resolve_name(ENGINES[engine].control)(urls, timeout_s, key, health_every_s)
    return control


def local_servers(config: RolloutConfig) -> Any:
    """The class that starts servers of the configured engine on this machine."""
    return pkgutil.resolve_name(ENGINES[config.engine].servers)


def rollout_seed(run_seed: int, outer_step: int, prompt_id: str, sample: int, visit: int = 0) -> int:
    """The seed of one response, in [0, 2**31): a hash, so that no two responses of a run share a stream by design."""
    key = json.dumps([run_seed, outer_step, prompt_id, sample, *([visit] if visit else [])]).encode()
    return int.from_bytes(hashlib.sha256(key).digest()[:4], "big") >> 1
