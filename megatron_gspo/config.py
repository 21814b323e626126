"""The whole configuration: one validated tree, read from TOML, that imports no torch.

``load(path, overrides)`` reads a file and applies ``section.key=value`` overrides. Each field's docstring says what it
means and in which unit. An unknown key, a value out of range or two settings that contradict each other raise
``ConfigError`` (``LayoutError`` for layouts) with one line that shows the values.
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import tomli_w
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from megatron_gspo.algorithm.catalog import LOSSES
from megatron_gspo.algorithm.planning import padded_length
from megatron_gspo.errors import ConfigError, LayoutError

WIDE_CLIP = 0.05
"""A sequence-ratio clip range above this needs ``allow_wide_clip``: it is what PPO uses for single tokens, and s_i,
a geometric mean over the response, hardly ever leaves it, so nothing would be clipped."""

AsList = Field(strict=False)
"""Of a tuple: TOML has lists. Its items are as strict as everything else."""
Positive = Annotated[int, Field(ge=1)]
Named = Annotated[str, Field(min_length=1)]
PositiveFloat = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Decay = Annotated[float, Field(ge=0, lt=1)]


def _server_url(text: str) -> str:
    """Raises ValueError for what no request could be sent to."""
    parts = urlsplit(text)  # raises for brackets that do not match; ``port`` for one that is no port
    plain = text.isprintable() and not any(map(str.isspace, text))
    if not (plain and parts.scheme in ("http", "https") and parts.hostname and parts.port != 0):
        raise ValueError(f"{text!r} is no server: write http://HOST:PORT")
    return text


Url = Annotated[str, AfterValidator(_server_url)]


class Section(BaseModel):
    """Strict: true is no number, "3" none either, 3.0 no count and 1 no truth value."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True, protected_namespaces=()
    )


class ModelConfig(Section):
    """The policy that is trained."""

    path: Named
    """Hugging Face directory (``config.json``, safetensors, tokenizer) that training starts from; or what
    ``convert`` makes of one: a Megatron distributed checkpoint beside the same files."""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Parameters and activations. float64 is for proofs on a CPU."""
    logprob_chunk: Positive = 1024
    """Tokens (per tensor rank group) whose logprobs are computed at one time, over a tile of 8,192 vocabulary rows at
    a time: memory is two such tiles."""
    recompute: Literal["off", "selective", "full"] = "off"
    """Activation recompute, for memory; it cannot change a step. "selective" runs ``recompute_modules`` again in
    backward; "full" keeps only each layer's input and runs the whole layer again."""
    recompute_modules: Annotated[tuple[Literal["core_attn", "mlp", "moe"], ...], AsList] = ("mlp", "moe")
    """What "selective" runs again: attention scores, dense MLPs, mixtures of experts (with their routing)."""

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if self.recompute == "selective" and not self.recompute_modules:
            raise ValueError('recompute = "selective" with recompute_modules = [] recomputes nothing: use "off"')
        default = type(self).model_fields["recompute_modules"].default
        if self.recompute != "selective" and self.recompute_modules != default:
            raise ValueError(
                f"recompute_modules = {list(self.recompute_modules)} has no effect with recompute = "
                f'"{self.recompute}": use "selective"'
            )
        return self


class AlgorithmConfig(Section):
    """The objective."""

    name: Literal["gspo", "gspo-token", "grpo", "ppo", "sft"] = "gspo"
    """A loss of ``algorithm/catalog.py``, or "sft" for supervised fine-tuning on the prompts' completions."""
    clip_low: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """The ratio is clipped below at 1 - clip_low; the loss's own default when absent (3e-4 for GSPO)."""
    clip_high: PositiveFloat | None = None
    """The ratio is clipped above at 1 + clip_high; the loss's own default when absent (4e-4 for GSPO)."""
    allow_wide_clip: bool = False
    """Permits a sequence-ratio clip range above 0.05, where GSPO hardly ever clips."""
    aggregation: Literal["paper", "token-mean", "token-sum"] = "paper"
    """How a mini-batch's tokens are weighted. "paper": prompt 1/P, response 1/G, token 1/|y|. "token-mean": every
    response token alike (DAPO). "token-sum": 1/P, 1/G, token 1/max_response_tokens (Dr.GRPO). Token-ratio losses and
    gspo-token take any; gspo only "paper", since its loss has no token terms."""
    kl_loss_coef: NonNegativeFloat = 0.0
    """Weight of the k3 estimate of KL(new || reference) in the loss."""
    reference: str = ""
    """Hugging Face directory of the reference policy; ``model.path`` when empty."""

    def clip_range(self) -> tuple[float, float]:
        """(clip_low, clip_high), with the loss's defaults filled in."""
        entry = LOSSES[self.name]
        low = entry.clip_low if self.clip_low is None else self.clip_low
        high = entry.clip_high if self.clip_high is None else self.clip_high
        return low, high

    @property
    def uses_reference(self) -> bool:
        return self.kl_loss_coef > 0

    @model_validator(mode="after")
    def _check(self) -> AlgorithmConfig:
        if self.name == "sft":
            return self
        low, high = self.clip_range()
        if LOSSES[self.name].ratio == "sequence" and max(low, high) > WIDE_CLIP and not self.allow_wide_clip:
            raise ValueError(
                f"clip_low = {low:g}, clip_high = {high:g} is a range for token ratios; {self.name} clips the sequence "
                f"ratio s_i, whose defaults are 0.0003 and 0.0004: use those, or set algorithm.allow_wide_clip = true"
            )
        if self.name == "gspo" and self.aggregation != "paper":
            raise ValueError(
                f'aggregation = "{self.aggregation}" weights tokens, and gspo has one term a sequence: use "paper", '
                f'or name = "gspo-token"'
            )
        return self


class ParallelConfig(Section):
    """How the model is laid out over ranks: world = tensor x pipeline x context x data."""

    tensor: Positive = 1
    """Tensor-parallel ranks; sequence parallelism is on whenever this is above 1."""
    pipeline: Positive = 1
    """Pipeline stages."""
    virtual_pipeline: Positive = 1
    """Virtual stages a pipeline rank: it holds every ``pipeline``-th of pipeline x virtual_pipeline pieces of the
    model, which shortens the time that stages wait at the ends of a step. Micro-batches come in multiples of
    ``pipeline``; where there are fewer, dummies fill up."""
    stage_layers: Annotated[tuple[Annotated[int, Field(ge=0)], ...], AsList] | None = None
    """Layers of each of the pipeline x virtual_pipeline virtual stages, in the model's order. Absent: alike, and where
    they do not divide, the first ones have one more (the last one also has the output layer)."""
    context: Positive = 1
    """Context-parallel ranks: each holds 1/context of every sequence's tokens (load-balanced, zigzag)."""
    expert: Positive = 1
    """Expert-parallel ranks: each holds 1/expert of the experts. Drawn from tensor x context x data."""
    expert_tensor: Positive = 1
    """Tensor-parallel ranks within an expert; 1 whatever ``tensor`` is, unless set."""
    data: Positive | None = None
    """Data-parallel ranks. Absent: what is left of the world under torchrun, else the fewest that hold the experts."""

    def world_size(self) -> int:
        """Ranks that this layout needs when it starts by itself."""
        return self.tensor * self.pipeline * self.context * self.data_size()

    def data_size(self, world_size: int | None = None) -> int:
        """Data-parallel ranks, for ``world_size`` ranks or for the smallest world that fits.

        Raises LayoutError, showing the product, when it does not multiply out.
        """
        model = self.tensor * self.pipeline * self.context
        text = f"tensor {self.tensor} x pipeline {self.pipeline} x context {self.context}"
        experts = self.expert * self.expert_tensor
        dense = self.tensor * self.context
        if self.data is not None:
            data = self.data
        elif world_size is not None:
            data = max(1, world_size // model)
        else:
            data = next(d for d in range(1, experts + 1) if (dense * d) % experts == 0)
        if world_size is not None and model * data != world_size:
            raise LayoutError(f"{text} x data {data} = {model * data} ranks, but the world has {world_size}")
        if (dense * data) % experts:
            raise LayoutError(
                f"expert {self.expert} x expert_tensor {self.expert_tensor} = {experts} does not divide "
                f"tensor {self.tensor} x context {self.context} x data {data} = {dense * data}"
            )
        return data

    @property
    def microbatch_multiple(self) -> int:
        """Micro-batches of a mini-batch come in multiples of this: virtual stages take turns a round of stages long."""
        return self.pipeline if self.virtual_pipeline > 1 else 1

    @model_validator(mode="after")
    def _check(self) -> ParallelConfig:
        if self.virtual_pipeline > 1 and self.pipeline == 1:
            raise LayoutError(
                f"virtual_pipeline = {self.virtual_pipeline} cuts the stages of a pipeline, and pipeline = 1 has none"
            )
        stages = self.pipeline * self.virtual_pipeline
        if self.stage_layers is not None and len(self.stage_layers) != stages:
            raise LayoutError(
                f"stage_layers = {list(self.stage_layers)} names {len(self.stage_layers)} virtual stages, but "
                f"pipeline {self.pipeline} x virtual_pipeline {self.virtual_pipeline} = {stages}"
            )
        self.data_size()
        return self


class TrainConfig(Section):
    """The outer loop."""

    run_dir: Named
    """Where the run writes; must not exist unless ``resume`` or ``overwrite``."""
    overwrite: bool = False
    """Replaces an existing run directory."""
    resume: bool = False
    """Continues from ``checkpoints/latest`` in ``run_dir``; starts afresh where there is no checkpoint yet, so that a
    job can be queued again unchanged."""
    resume_changes: Annotated[tuple[str, ...], AsList] = ()
    """Settings that may differ from the checkpoint's although that makes it another experiment: ["optimizer.lr"]."""
    outer_steps: Positive = 100
    """Rollout-train-sync rounds; for sft, optimizer steps."""
    prompts_per_step: Positive = 16
    """Prompts P an outer step, over all ranks; for sft, examples an optimizer step."""
    minibatches: Positive = 4
    """Optimizer steps an outer step; each takes prompts_per_step / minibatches whole groups."""
    microbatch_tokens: Positive = 4096
    """Token budget of a packed micro-batch (prompt, response, and what context parallelism fills a sequence up with),
    of which a rank holds 1/context. Memory, not mathematics: it cannot change a step."""
    oversize: Literal["error", "own"] = "error"
    """A sequence above the budget: an error, or a micro-batch of its own."""
    checkpoint_every: Annotated[int, Field(ge=0)] = 10
    """Outer steps between checkpoints; the end always has one, and 0 is only there."""
    keep_last: Positive = 2
    """Newest checkpoints that stay."""
    keep_every: Annotated[int, Field(ge=0)] = 0
    """Checkpoints whose number of outer steps this divides stay as well; 0 none."""
    checkpoint_async: bool = False
    """Writes checkpoints while training goes on, from copies in host memory (weights, moments: this rank's share)."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seeds data order, rollouts and whatever else is drawn."""
    deterministic: bool = False
    """torch deterministic algorithms (always so on a CPU)."""
    noise_floor_every: Annotated[int, Field(ge=0)] = 10
    """Outer steps between measurements of the numerical noise in log s_i; 0 never."""
    save_rollouts: Annotated[int, Field(ge=0)] = 8
    """Responses of an outer step kept in ``rollouts/`` for reading; 0 keeps none."""
    save_hf: bool = True
    """Writes a Hugging Face directory at the end, beside the checkpoint."""
    save_hf_every: Annotated[int, Field(ge=0)] = 0
    """Outer steps between Hugging Face directories in ``exports/``, written while training goes on, from copies in host
    memory (this rank's share of the weights); all stay. 0 none."""
    tensorboard: bool = True
    """Writes TensorBoard events."""
    wandb: bool = False
    """Also logs to Weights & Biases (the ``wandb`` extra)."""

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        if self.resume and self.overwrite:
            raise ValueError(
                "resume = true continues the run in run_dir, overwrite = true removes it: set train.overwrite = false"
            )
        return self


class OptimizerConfig(Section):
    """AdamW under Megatron's distributed optimizer."""

    lr: PositiveFloat = 1e-6
    """Peak learning rate."""
    min_lr: NonNegativeFloat = 0.0
    """Floor of a decaying schedule."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Shape after warm-up, over the run's optimizer steps."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Optimizer steps of linear warm-up from 0."""
    betas: Annotated[tuple[Decay, Decay], AsList] = (0.9, 0.98)
    """Adam's decay rates."""
    eps: PositiveFloat = 1e-8
    """Adam's epsilon."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay; norms and biases are exempt."""
    clip_grad: NonNegativeFloat = 1.0
    """Global gradient norm above which gradients are scaled down; 0 never."""


class RolloutConfig(Section):
    """Sampling from the inference engine."""

    engine: Literal["sglang"] = "sglang"
    """Inference engine, an entry of ``rollout.engine.ENGINES``."""
    servers: Annotated[tuple[Url, ...], AsList] = ()
    """Base URLs of running servers. Empty: ``local_servers`` are started and stopped with the run."""
    local_servers: Positive = 1
    """Servers to start on this machine when ``servers`` is empty."""
    server_python: str = ""
    """Python of the environment that holds sglang; found at ``.venv-sglang/bin/python`` (in the working directory or
    the checkout) or in $MEGATRON_GSPO_SGLANG_PYTHON when empty."""
    engine_dtype: Literal["", "float32", "bfloat16", "float16"] = ""
    """Dtype of local servers and of the weights that are sent; ``model.dtype`` when empty. Another one makes an engine
    gap: that of a reduced-precision engine, on a CPU too."""
    server_args: Annotated[tuple[str, ...], AsList] = ()
    """More arguments for each local server, after those that the launcher chooses for CPU or GPU."""
    server_start_s: PositiveFloat = 300.0
    """Seconds a local server may take until it is healthy."""
    group_size: Annotated[int, Field(ge=2)] = 8
    """Responses G a prompt."""
    temperature: PositiveFloat = 1.0
    """Sampling temperature; the trainer's logprobs and entropy use the same."""
    top_p: float = 1.0
    """Only 1 is accepted: the engine returns logprobs that are not renormalised over the kept tokens."""
    top_k: int = -1
    """Only -1 is accepted, for the same reason."""
    min_p: float = 0.0
    """Only 0 is accepted, for the same reason."""
    max_prompt_tokens: Positive = 1024
    """Longer prompts are an error, or are skipped and counted when ``data.skip_bad`` is set."""
    max_response_tokens: Positive = 1024
    """Longer responses are cut: ``finish_reason`` "length"."""
    concurrency: Positive = 64
    """Prompts in flight a data-parallel leader."""
    timeout_s: PositiveFloat = 600.0
    """Seconds until a request that has not answered is given up."""
    retries: Annotated[int, Field(ge=0)] = 3
    """Further tries after a connection failure, a 5xx answer or an abort; each with the same seed."""
    seeded: bool | None = None
    """Repeatable sampling: seed = hash(run seed, outer step, prompt, sample). Absent: on a CPU only."""
    on_truncated: Literal["keep", "drop", "zero"] = "keep"
    """Truncated responses: keep their reward, drop them, or keep them with reward 0."""
    on_mixed_version: Literal["drop", "keep", "error"] = "drop"
    """Responses whose tokens come from more than one weight version."""

    def is_seeded(self, *, on_gpu: bool) -> bool:
        """``seeded``, with its default filled in."""
        return not on_gpu if self.seeded is None else self.seeded

    @model_validator(mode="after")
    def _check(self) -> RolloutConfig:
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

    method: Literal["disk", "tensor", "distributed"] = "tensor"
    """"disk": safetensors through a directory that servers can read; "tensor": over HTTP in an update session;
    "distributed": broadcast over a process group that rank 0 shares with the servers."""
    directory: str = "/dev/shm"
    """Parent directory of the files of "disk"; each sync removes the one before."""
    bucket_mb: Positive = 64
    """Megabytes of tensors a request of "tensor", a file of "disk", or a broadcast of "distributed"."""
    backend: Literal["auto", "gloo", "nccl"] = "auto"
    """Of the process group of "distributed"; "auto" is nccl where trainer and servers all compute on GPUs, gloo
    otherwise. nccl needs a GPU of its own for each: with servers that share the trainer's, "gloo"."""
    timeout_s: PositiveFloat = 600.0
    """Seconds that one request or broadcast may take; a server that is silent for longer fails the run."""
    verify: Literal["off", "first", "every"] = "off"
    """Which syncs of a run a checksum confirms: before it the servers' weights are overwritten by random numbers,
    after it every parameter must have changed and servers must agree. Needs ``/weights_checker``."""
    router_noise: NonNegativeFloat = 0.0
    """Emulates, on a CPU, an engine that routes otherwise than the trainer: Gaussian noise on the router weights that
    the servers receive, relative to each tensor's root mean square, drawn anew at every weight version from
    ``train.seed``. The trainer's own weights stay as they are. 0: none."""


class DataConfig(Section):
    """Prompts."""

    path: Named
    """JSONL or Parquet file of training prompts."""
    eval_path: str = ""
    """Held-out prompts; empty: no evaluation."""
    format: Literal["prompts", "gsm8k"] = "prompts"
    """"prompts": fields ``prompt`` (text or chat messages), ``answer``, optional ``id`` and metadata; "gsm8k": the
    dataset's own ``question`` and ``answer``."""
    chat_template: bool = True
    """Renders prompts with the tokenizer's chat template when it has one; chat messages need it."""
    shuffle: bool = True
    """A new deterministic order every epoch, from ``train.seed``."""
    skip_bad: bool = False
    """Skips and counts malformed lines and over-long prompts instead of stopping."""
    limit: Positive | None = None
    """Reads at most this many training prompts."""


class RewardConfig(Section):
    """The reward function."""

    function: str = "exact"
    """A built-in name ("exact", "arithmetic", "gsm8k"), ``package.module:function`` or ``path/to/file.py:function``."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments bound to the function."""
    timeout_s: PositiveFloat = 30.0
    """Seconds a call may take."""
    concurrency: Positive = 64
    """Asynchronous calls in flight; a plain function runs in at most 8 threads."""


class EvalConfig(Section):
    """Evaluation on held-out prompts during training."""

    every: Annotated[int, Field(ge=0)] = 10
    """Outer steps between evaluations; the first is before any training, the last at the end; 0 never."""
    start: bool = True
    """Also evaluates before any training."""
    prompts: Positive = 512
    """Prompts used: the first ones of ``data.eval_path``."""
    samples: Positive = 1
    """Responses a prompt at the training temperature; above 1, ``eval/pass_at_k`` is logged too."""
    greedy: bool = True
    """Also evaluates at temperature 0, one response a prompt (``eval/greedy_accuracy``)."""


class ReplayConfig(Section):
    """Routing Replay for mixture-of-experts models, and how routing is watched."""

    mode: Literal["off", "r2", "r3"] = "off"
    """"r2" replays the routes of the pi_old pass in every mini-batch of its outer step; "r3" replays those of the
    engine, in the pi_old pass too."""
    min_coverage: Annotated[float, Field(ge=0.0, le=1.0)] = 0.9
    """With "r3", the step fails when the engine gave routes for a smaller share of the tokens that have one."""
    engine_routes_every: Annotated[int, Field(ge=0)] = 0
    """Without "r3", outer steps between requests of the engine's routes, for ``route/engine_mismatch``; 0 never."""
    drift_every: Annotated[int, Field(ge=0)] = 1
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


class RunConfig(Section):
    """The root: one section a concern."""

    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    algorithm: AlgorithmConfig = AlgorithmConfig()
    parallel: ParallelConfig = ParallelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    rollout: RolloutConfig = RolloutConfig()
    sync: SyncConfig = SyncConfig()
    reward: RewardConfig = RewardConfig()
    eval: EvalConfig = EvalConfig()
    replay: ReplayConfig = ReplayConfig()

    @property
    def minibatches(self) -> int:
        """Optimizer steps an outer step: 1 for sft."""
        return 1 if self.algorithm.name == "sft" else self.train.minibatches

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run."""
        return self.train.outer_steps * self.minibatches

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        prompts, minibatches = self.train.prompts_per_step, self.train.minibatches
        if self.algorithm.name != "sft" and prompts % minibatches:
            raise ValueError(
                f"train.prompts_per_step = {prompts} is not a multiple of train.minibatches = {minibatches}: "
                f"a mini-batch is made of whole groups ({prompts} / {minibatches} = {prompts / minibatches:g})"
            )
        if self.optimizer.min_lr > self.optimizer.lr:
            raise ValueError(
                f"optimizer.min_lr = {self.optimizer.min_lr:g} is above optimizer.lr = {self.optimizer.lr:g}"
            )
        warmup, total = self.optimizer.warmup_steps, self.total_steps
        if warmup >= total:
            raise ValueError(f"optimizer.warmup_steps = {warmup} leaves nothing of the run's {total} optimizer steps")
        if self.algorithm.reference and not self.algorithm.uses_reference:
            raise ValueError("algorithm.reference is set, but algorithm.kl_loss_coef = 0 does not use it")
        if self.algorithm.name == "sft" and (self.replay.mode != "off" or self.replay.engine_routes_every):
            name = "mode" if self.replay.mode != "off" else "engine_routes_every"
            raise ValueError(
                f"replay.{name} = {getattr(self.replay, name)!r} is about the routes of rollouts, and sft has none: "
                f"remove it"
            )
        self._check_paths()
        prompt, response = self.rollout.max_prompt_tokens, self.rollout.max_response_tokens
        longest = padded_length(prompt + response, self.parallel.context)
        if self.train.oversize == "error" and longest > self.train.microbatch_tokens:
            padded = f", padded to {longest} for parallel.context = {self.parallel.context},"
            raise ValueError(
                f"rollout.max_prompt_tokens {prompt} + max_response_tokens {response} = {prompt + response}"
                f"{padded if longest > prompt + response else ''} does not fit into train.microbatch_tokens = "
                f'{self.train.microbatch_tokens}: raise it to at least {longest}, or set train.oversize = "own"'
            )
        return self

    def _check_paths(self) -> None:
        """A run directory is replaced under ``train.overwrite``, so nothing that the run reads may lie in it."""
        run = Path(self.train.run_dir).resolve()
        inputs = {
            "model.path": self.model.path,
            "algorithm.reference": self.algorithm.reference,
            "data.path": self.data.path,
            "data.eval_path": self.data.eval_path,
        }
        for name, path in inputs.items():
            if path and (run == Path(path).resolve() or run in Path(path).resolve().parents):
                raise ValueError(
                    f"{name} = {path} lies in train.run_dir = {self.train.run_dir}: name another directory"
                )


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a TOML file, applies ``section.key=value`` overrides and validates the whole.

    Relative paths are left as they are: they are relative to the working directory.
    Raises ConfigError (or LayoutError) with one line.
    """
    return parse(read(path), source=str(path), overrides=overrides)


def read(path: str | Path) -> dict[str, Any]:
    """A TOML file's tree, not validated. Raises ConfigError."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file") from None
    except (OSError, ValueError, RecursionError) as error:  # not UTF-8, not TOML, brackets or digits without end
        raise ConfigError(f"{path}: {error}") from None


def parse(tree: dict[str, Any], source: str = "configuration", overrides: Sequence[str] = ()) -> RunConfig:
    """Applies ``overrides`` to a tree of plain values (in place) and validates it.

    Raises ConfigError naming ``source`` and the first setting that is wrong.
    """
    for override in overrides:
        _apply_override(tree, override)
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        cause = error.errors(include_url=False)[0].get("ctx", {}).get("error")
        kind = type(cause) if isinstance(cause, ConfigError) else ConfigError
        raise kind(f"{source}: {_first_problem(error)}") from None


def dump(config: RunConfig) -> str:
    """The resolved configuration as TOML; ``load`` reads it back to an equal one."""
    return tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    section, dot, name = key.strip().partition(".")
    if any("\ud800" <= character <= "\udfff" for character in override):  # a shell's bytes that are no UTF-8
        raise ConfigError(f"{override!a} is not UTF-8, and no file could hold it")
    if not (equals and dot and section and name):
        raise ConfigError(f"{override!r} is not an override: write section.key=value, as in train.seed=1")
    value = _override_value(override, text)
    *parents, leaf = name.split(".")
    node = tree.setdefault(section, {})
    for parent in parents:
        node = node.setdefault(parent, {}) if isinstance(node, dict) else None
    if not isinstance(node, dict):
        raise ConfigError(f"{override!r}: {section} is not a section of settings")
    node[leaf] = value


def _override_value(override: str, text: str) -> Any:
    try:
        tree = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:  # an unquoted string, rollout.engine=sglang, or a truth value as Python writes it
        return {"True": True, "False": False}.get(text.strip(), text.strip())
    except (ValueError, RecursionError) as error:  # digits or brackets without end
        raise ConfigError(f"{override[:80]!r}: {error}") from None
    if len(tree) > 1:
        raise ConfigError(f"{override[:80]!r} holds more than one value")
    return tree["value"]


def _first_problem(error: ValidationError) -> str:
    """One line of the first problem; the rest are counted."""
    problems = error.errors(include_url=False)
    first = problems[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        text = f"unknown setting {where}{_did_you_mean(first['loc'])}"
    elif first["type"] == "missing":
        text = f"{where} is missing"
    elif first["type"] == "value_error":
        text = f"{where}: {first['ctx']['error']}" if where else str(first["ctx"]["error"])
    else:
        message = first["msg"].replace("tuple", "list")  # TOML's word
        text = f"{where} = {first['input']!r:.200}: {message[0].lower()}{message[1:]}"
    more = len(problems) - 1
    return text + (f" (and {more} more)" if more else "")


def _did_you_mean(location: tuple[int | str, ...]) -> str:
    import difflib

    fields = RunConfig.model_fields
    if len(location) > 1:
        section = fields[str(location[0])].annotation
        fields = section.model_fields if isinstance(section, type) and issubclass(section, BaseModel) else {}
    close = difflib.get_close_matches(str(location[-1]), fields, n=1)
    if close:
        return f" (did you mean {'.'.join([*map(str, location[:-1]), close[0]])}?)"
    return f" (known: {', '.join(fields)})"
