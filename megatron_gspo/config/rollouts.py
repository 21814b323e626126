"""What comes from the inference engine, how it is judged, and what goes back to it."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, model_validator

from megatron_gspo.section import AsList, Count, Named, NonNegativeFloat, Positive, PositiveFloat, Seconds, Section


def _server_url(text: str) -> str:
    """Raises ValueError for what no request could be sent to, and for a password: a run writes its addresses down."""
    parts = urlsplit(text)  # raises for brackets that do not match; ``port`` for one that is no port
    if "@" in parts.netloc:
        raise ValueError("a server's address holds a user or a password: a key goes into $MEGATRON_GSPO_SERVER_KEY")
    plain = text.isprintable() and not any(map(str.isspace, text))
    plain = plain and not (parts.query or parts.fragment)
    if not (plain and parts.scheme in ("http", "https") and parts.hostname and parts.port != 0):
        raise ValueError(f"{text!r} is no server: write http://HOST:PORT")
    return text


def without_keys(arguments: tuple[str, ...]) -> tuple[str, ...]:
    """Raises ValueError for a key: everybody reads a command line, and a run writes its configuration down."""
    for flag in ("--api-key", "--admin-api-key"):
        if any(word.split("=", 1)[0] == flag for word in arguments):
            raise ValueError(f"{flag} stands on a command line, which everybody can read; a run makes keys of its own")
    return arguments


Url = Annotated[str, AfterValidator(_server_url)]
EIGHT_BITS = "fp8"
"""Of ``rollout.engine_dtype``: no dtype of torch's, but one with scales."""
StopToken = Annotated[str, Field(min_length=1)] | Annotated[int, Field(ge=0)]


class RolloutConfig(Section):
    """Sampling from the inference engine."""

    engine: Literal["sglang"] = "sglang"
    """Inference engine, an entry of ``rollout.engine.ENGINES``."""
    servers: Annotated[tuple[Url, ...], AsList] = ()
    """Base URLs of running servers. Empty: ``local_servers`` are started and stopped with the run."""
    servers_from: str = ""
    """Directory into which ``serve`` writes where its servers are, a file a node; all nodes must see it.
    In the place of ``servers``: the run waits, ``server_start_s`` at most, for those of ``server_nodes`` nodes."""
    server_nodes: Positive = 1
    """Nodes in ``servers_from``, each with servers that answer, that a run begins with."""
    router: Url | Literal[""] = ""
    """Base URL of a router in front of ``servers`` (SGLang's own, say): requests for responses go to it, weights and
    questions to ``servers``, which must be all that it has. Empty: the run spreads its requests itself."""
    local_servers: Positive | None = None
    """Servers to start on this machine when ``servers`` is empty. Absent: on GPUs as many as ``[placement]`` has room
    for; on a CPU, where each computes on one core, one for every 64 responses of an outer step, at most one a core and
    8."""
    server_python: str = ""
    """Python of the environment that holds sglang; found at ``.venv-sglang/bin/python`` (in the working directory or
    the checkout) or in $MEGATRON_GSPO_SGLANG_PYTHON when empty."""
    engine_dtype: Literal["", "float32", "bfloat16", "float16", "fp8"] = ""
    """Dtype of local servers and of the weights that are sent; ``model.dtype`` when empty. Another one makes an engine
    gap: that of a reduced-precision engine, on a CPU too. "fp8": matrices in float8_e4m3fn with a scale for each block
    of 128 x 128, all else in bfloat16 (docs/fp8.md); named servers must have been started from such weights."""
    server_args: Annotated[tuple[str, ...], AsList, AfterValidator(without_keys)] = ()
    """More arguments for each local server, after those that ``[placement]`` and the launcher choose, which they
    overrule; a size that the configuration names in both places, with two values, is refused."""
    server_start_s: Seconds = 300.0
    """Seconds a local server may take until it is healthy."""
    group_size: Positive = 8
    """Responses G per prompt."""
    dynamic_sampling: Count = 0
    """How often, at most, the places of groups whose rewards are all equal, or that were dropped, are drawn anew from
    further prompts of the order (DAPO). What the last time brings is kept. 0 never."""
    temperature: Annotated[float, Field(ge=1e-5, allow_inf_nan=False)] = 1.0
    """Sampling temperature; the trainer's logprobs and entropy use the same. Below 1e-6 SGLang takes the best token, so
    that is refused."""
    top_p: float = 1.0
    """Only 1 is accepted: the engine returns logprobs that are not renormalised over the kept tokens."""
    top_k: int = -1
    """Only -1 is accepted, for the same reason."""
    min_p: float = 0.0
    """Only 0 is accepted, for the same reason."""
    max_prompt_tokens: Positive = 1024
    """Longer prompts are an error, or are skipped and counted when ``data.skip_bad`` is set."""
    max_response_tokens: Positive = 1024
    """Longer responses are cut: ``finish_reason`` "length". Behind the prompt they must fit into the model's positions,
    of which SGLang keeps two."""
    stop_tokens: Annotated[tuple[StopToken, ...], AsList] = ()
    """Tokens that end a response besides the model's own (those of ``generation_config.json``, ``config.json`` and the
    tokenizer), as texts or ids: ``["<|im_end|>"]`` for a base model whose chat template ends a turn with it. Each must
    be one token of the vocabulary. Training, evaluation and fine-tuning use them."""
    concurrency: Positive | None = None
    """Prompts in flight per data-parallel leader, spread over all servers. Absent: as many as make 512 responses a
    server."""
    timeout_s: Seconds = 600.0
    """Seconds in which a server must answer one of the requests that it has, or generate a token: then they are given
    up. Waiting in its queue does not count."""
    retries: Count = 3
    """Further tries after a connection failure, a 5xx answer or an abort; each with the same seed."""
    on_server_loss: Literal["continue", "error"] = "continue"
    """A server that is gone, or silent for too long: its prompts go to others, it is started again if this run has
    started it, and asked for responses once it holds the current weights; or the run fails (docs/servers.md)."""
    server_restarts: Count = 10
    """How often, at most, local servers that have died are started again in one start of a run, all together."""
    wait_for_servers_s: Annotated[float, Field(ge=0.0)] = 1800.0
    """Seconds that a run without any server waits for one to return, once it is saved; then it fails."""
    health_every_s: Seconds = 20.0
    """Seconds between questions to a server that has requests and answers none. One that does not even take three of
    them in a row is given up, before ``timeout_s``."""
    resubmit_after_s: Seconds | None = None
    """Seconds after which a prompt that is not answered is asked of another server too: the first answer counts, the
    other request is aborted. Absent: never. Without ``seeded``, the answer that comes first is rather a short one."""
    seeded: bool | None = None
    """Repeatable sampling: seed = hash(run seed, outer step, prompt, sample). Absent: on a CPU only."""
    on_truncated: Literal["keep", "drop", "zero", "mask"] = "keep"
    """Truncated responses: keep their reward, drop them, keep them with reward 0, or let their reward count in their
    group and do not train on them ("mask": DAPO's overlong filtering)."""
    overlong_buffer: Count = 0
    """DAPO's overlong shaping: of the last so many tokens below ``max_response_tokens``, each takes
    ``overlong_penalty`` / ``overlong_buffer`` off the reward. 0: none."""
    overlong_penalty: PositiveFloat = 1.0
    """What a response of ``max_response_tokens`` loses."""
    on_mixed_version: Literal["drop", "keep", "error"] = "drop"
    """Responses whose tokens come from more than one weight version."""

    max_engine_k3: NonNegativeFloat | None = None
    """Nats per token of ``kl/engine_k3``, how far the engine's logprobs are from the trainer's at equal weights, above
    which the first outer step of a start (a resumed one too) fails before anything is learned. When absent, 0.001 for a
    float32 engine; 0.1 for a bfloat16 or float16 one, and with ``sync.router_noise``; 0.3 for an fp8 one. 0 compares
    nothing."""
    on_engine_drift: Literal["warn", "stop"] = "warn"
    """A later outer step above ``max_engine_k3``: a warning, once until it is below again, or the run fails."""
    on_empty_step: Literal["error", "skip"] = "error"
    """An outer step in which every response was dropped: the run fails, or the step is skipped. A skipped step takes no
    optimizer step, and its prompts are not drawn again before the next epoch."""
    max_empty_steps: Positive = 10
    """With ``on_empty_step`` "skip": as many skipped outer steps in a row fail the run."""

    def is_seeded(self, *, on_gpu: bool) -> bool:
        """``seeded``, with its default filled in."""
        return not on_gpu if self.seeded is None else self.seeded

    @property
    def named(self) -> bool:
        """Whether running servers are named, so that a run starts none."""
        return bool(self.servers or self.servers_from)

    @property
    def places(self) -> tuple[str, ...]:
        """Where they are: URLs, or the directory that will say so."""
        return (self.servers_from,) if self.servers_from else self.servers

    @model_validator(mode="after")
    def _check(self) -> RolloutConfig:
        if self.servers and self.servers_from:
            raise ValueError("servers and servers_from both name running servers: keep one of them")
        if self.server_nodes > 1 and not self.servers_from:
            raise ValueError(f"server_nodes = {self.server_nodes} are those in servers_from, which is empty: set it")
        if self.router and not self.named:
            raise ValueError("router: name the servers behind it in rollout.servers, which are sent the weights")
        if self.overlong_buffer > self.max_response_tokens:
            raise ValueError(
                f"overlong_buffer = {self.overlong_buffer} is longer than max_response_tokens = "
                f"{self.max_response_tokens}: every response would lose some of its reward"
            )
        for name, only in (("top_p", 1.0), ("top_k", -1), ("min_p", 0.0)):
            value = getattr(self, name)
            if value != only:
                raise ValueError(
                    f"{name} = {value:g}: training needs the logprobs of the distribution that was sampled, and the "
                    f"engine returns untruncated ones; remove it (only {only:g} is accepted)"
                )
        return self


class SyncConfig(Section):
    """How new weights reach the rollout servers."""

    method: Literal["auto", "ipc", "distributed", "disk", "tensor"] = "auto"
    """"ipc": servers on this machine open the trainer's memory, files of shared memory on CPUs and CUDA IPC on GPUs
    that both share; "distributed": broadcast over a process group that rank 0 shares with the servers; "disk":
    safetensors through a directory that servers can read; "tensor": over HTTP, slow. "auto" is "ipc" for servers that
    the run starts beside the trainer, and "distributed" for others; a line and ``manifest.json`` say which."""
    directory: str = "/dev/shm"
    """Parent directory of the files of "disk"; each sync removes the one before."""
    bucket_mb: Positive | None = None
    """Megabytes of tensors per request of "tensor" or "ipc", file of "disk" or broadcast of "distributed". When absent,
    64, and 512 between GPUs."""
    backend: Literal["auto", "gloo", "nccl"] = "auto"
    """Of the process group of "distributed"; "auto" is nccl where trainer and servers all compute on GPUs, and on
    different ones as far as is known, gloo otherwise; a line says which and why."""
    timeout_s: Seconds = 600.0
    """Seconds that one request or broadcast may take; a server that is silent for longer fails the run."""
    verify: Literal["off", "first", "every"] = "first"
    """Which syncs of a run a checksum confirms: before it the servers' weights are overwritten by random numbers,
    after it every parameter must have changed and servers must agree. It costs two passes of hashing over the weights,
    and the run says how many seconds. Servers without ``/weights_checker`` are warned of, and refused under "every"."""
    router_noise: NonNegativeFloat = 0.0
    """Emulates, on a CPU, an engine that routes otherwise than the trainer: Gaussian noise on the router weights that
    the servers receive, relative to each tensor's root mean square, drawn anew at every weight version from
    ``train.seed``. The trainer's own weights stay as they are. 0: none."""


def _storable(options: dict[str, Any]) -> dict[str, Any]:
    """The options, which a run stores and reads again. Raises ValueError."""
    if _holds_no_number(options):
        raise ValueError('inf and nan cannot be stored with the run: write them as text, "inf"')
    return options


def _holds_no_number(value: Any) -> bool:
    if isinstance(value, float):
        return not math.isfinite(value)
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return any(map(_holds_no_number, parts))


class RewardConfig(Section):
    """The reward function."""

    function: str = "exact"
    """A built-in name ("exact", "arithmetic", "gsm8k" and those of docs/rewards.md), ``package.module:function`` or
    ``path/to/file.py:function``; a class works too."""
    options: Annotated[dict[str, Any], AfterValidator(_storable)] = Field(default_factory=dict)
    """Keyword arguments bound to the function, or given to the class."""
    special_tokens: bool = False
    """``response.text`` keeps special tokens, but for the stop token at its end: for rewards that look for
    ``</think>`` or a tool call's tokens in a tokenizer where those are special."""
    timeout_s: Seconds = 30.0
    """Seconds a call may take. A function of yours that takes longer ends the run; a built-in grader gives 0, and what
    asks another server leaves the response ungraded."""
    max_ungraded: Annotated[float, Field(ge=0.0, le=1.0)] = 0.1
    """Share of an outer step's responses that may stay ungraded because their grader failed (they leave the batch,
    ``dropped/ungraded``); more of them end the run."""
    concurrency: Positive = 64
    """Asynchronous calls in flight; a plain function runs in at most 8 threads."""
    check_references: Count | None = None
    """Distinct reference answers that are graded as responses before training (and by ``doctor``), at most; the others
    are when they are drawn, unless the function is ``async``. When absent, 10,000, and 8 for an ``async`` function,
    which may be a judge.
    0 grades none, then or later."""


class EvalConfig(Section):
    """Evaluation on held-out prompts during training."""

    every: Count = 10
    """Outer steps between evaluations; the first is before any training, the last at the end; 0 never."""
    start: bool = True
    """Also evaluates before any training."""
    prompts: Positive = 512
    """Prompts used: the first ones of ``data.eval_path``."""
    samples: Positive = 1
    """Responses per prompt at the training temperature; above 1, ``eval/pass_at_k`` is logged too."""
    greedy: bool = True
    """Also evaluates at temperature 0, one response per prompt (``eval/greedy_accuracy``)."""
    suites: Annotated[tuple[Named, ...], AsList] = ()
    """Published evaluations, each with its own prompts, sampling and grader: ``["aime24", "lcb:k=4"]``;
    docs/evaluation.md has them. They are asked at the servers' current weights, and give ``eval/SUITE/*``."""
    suites_data: str = ""
    """Directory of the suites' published files, those of a suite in ``suites_data/SUITE``."""
    suites_every: Count = 50
    """Outer steps between evaluations on suites; the first is before any training (with ``start``), the last at the
    end; 0 never."""

    @model_validator(mode="after")
    def _check(self) -> EvalConfig:
        if self.suites and not self.suites_data:
            raise ValueError(f"suites = {list(self.suites)}: suites_data must say where their published files are")
        return self


class ReplayConfig(Section):
    """Routing Replay for mixture-of-experts models, and how routing is watched."""

    mode: Literal["off", "r2", "r3"] = "off"
    """"r2" replays the routes of the pi_old pass in every mini-batch of its outer step; "r3" replays those of the
    engine, in the pi_old pass too."""
    min_coverage: Annotated[float, Field(ge=0.0, le=1.0)] = 0.9
    """With "r3", the step fails when the engine gave routes for a smaller share of the tokens that have one."""
    engine_routes_every: Count = 0
    """Without "r3", outer steps between requests of the engine's routes, for ``route/engine_mismatch``; 0 never."""
    drift_every: Count = 1
    """With "off", outer steps between measurements of ``route/drift``, 0 never; with replay every step has one."""

    @property
    def uses_engine_routes(self) -> bool:
        """Whether servers are asked for routes at all: they must have been started to capture them."""
        return self.mode == "r3" or self.engine_routes_every > 0

    def asks_for_routes(self, outer_step: int) -> bool:
        """Whether the responses of this outer step come with the engine's routes."""
        return self.mode == "r3" or bool(self.engine_routes_every and outer_step % self.engine_routes_every == 0)

    def measures_drift(self, outer_step: int) -> bool:
        """Whether this outer step's mini-batches have a ``route/drift``."""
        return self.mode != "off" or bool(self.drift_every and outer_step % self.drift_every == 0)
