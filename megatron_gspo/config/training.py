"""What is trained, on what, and how."""

from __future__ import annotations

import shlex
import shutil
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, model_validator

from megatron_gspo.config.sources import SourceConfig
from megatron_gspo.section import (
    AsList,
    Count,
    Decay,
    Named,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Seconds,
    Section,
)


def _address(text: str) -> str:
    """Raises ValueError for what is no HOST:PORT or :PORT."""
    if text:
        parts = urlsplit(f"//{text}")  # raises for brackets that do not match; ``port`` for one that is no port
        plain = text.isascii() and text.isprintable() and " " not in text and parts.netloc == text
        if not (plain and parts.port and "@" not in text):
            raise ValueError(f"{text!r} is no address: write HOST:PORT, as in 127.0.0.1:9100")
    return text


def _command(text: str) -> str:
    """Raises ValueError for what is no command."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ValueError(f"{text!r} is no command: {error}") from None
    if text and not words:
        raise ValueError(f"{text!r} is no command: there is no word in it")
    if words and shutil.which(words[0]) is None:
        raise ValueError(f"{text!r}: {words[0]} is no program that can be run from here")
    return text


Command = Annotated[str, AfterValidator(_command)]
"""Split as a shell does, and run without one; empty: none."""


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
    kernels: Literal["auto", "reference"] = "auto"
    """Which form an operation takes that has several. "auto": the fastest that the machine and ``dtype`` allow;
    "reference": plain torch everywhere, and Megatron's own experts one by one. Results are equal within rounding;
    ``doctor`` and ``manifest.json`` name what was taken, and why."""
    recompute: Literal["off", "selective", "full"] = "off"
    """Activation recompute, for memory; it cannot change a step. "selective" runs ``recompute_modules`` again in
    backward; "full" keeps only each layer's input and runs the whole layer again."""
    recompute_modules: Annotated[tuple[Literal["core_attn", "mlp", "moe"], ...], AsList] = ("mlp", "moe")
    """What "selective" runs again: attention scores, dense MLPs, mixtures of experts (with their routing)."""
    recompute_method: Literal["uniform", "block"] = "uniform"
    """Which layers "full" runs again: "uniform" all of them, ``recompute_layers`` at a time, of which the first one's
    input alone is kept; "block" the first ``recompute_layers`` of each virtual pipeline stage, as many as do not fit
    otherwise."""
    recompute_layers: Positive = 1
    """Layers, for ``recompute_method``. With "uniform" it divides those of each virtual pipeline stage."""

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if self.recompute == "selective" and not self.recompute_modules:
            raise ValueError('recompute = "selective" with recompute_modules = [] recomputes nothing: use "off"')
        self._check_layers()
        default = type(self).model_fields["recompute_modules"].default
        if self.recompute != "selective" and self.recompute_modules != default:
            raise ValueError(
                f"recompute_modules = {list(self.recompute_modules)} has no effect with recompute = "
                f'"{self.recompute}": use "selective"'
            )
        return self

    def _check_layers(self) -> None:
        for name in ("recompute_method", "recompute_layers"):
            value = getattr(self, name)
            if self.recompute != "full" and value != type(self).model_fields[name].default:
                raise ValueError(f'{name} = {value!r} has no effect with recompute = "{self.recompute}": use "full"')


class DataConfig(Section):
    """Prompts."""

    path: str
    """Training prompts: a file (JSON lines, a JSON array, CSV, TSV, each also compressed, or Parquet), a directory of
    shards, or a pattern (``data/train-*``). docs/data.md says how each is read. Absent where there are ``sources``."""
    sources: Annotated[tuple[SourceConfig, ...], AsList] = ()
    """Several sources of training prompts instead of ``path``, mixed by their weights: each a table
    ``[[data.sources]]`` with ``name``, ``path``, ``weight`` (1.0), ``format``, ``prompt_field``, ``answer_field``,
    ``limit`` and ``reward`` (``{ function, options }``; ``[reward]`` when absent)."""
    eval_path: str = ""
    """Held-out prompts; empty: no evaluation."""
    format: Literal["auto", "prompts", "gsm8k", "verl", "messages", "sharegpt", "alpaca"] = "auto"
    """What a row means. "prompts": fields ``prompt`` (text or chat messages), ``answer``, optional ``id`` and
    metadata; "gsm8k": the dataset's own ``question`` and ``answer``; the others are in docs/data.md. "auto" takes the
    format of the first row that is of a known one."""
    prompt_field: str = ""
    """The field that holds the prompt, where it is not the format's own; "a.b" is the field b within a."""
    answer_field: str = ""
    """The field that holds the reference answer, likewise: "reward_model.ground_truth"."""
    completion_field: str = ""
    """For sft, the field that holds the text to learn, likewise."""
    chat_template: bool = True
    """Renders prompts with the tokenizer's chat template when it has one; chat messages need it."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Variables handed to the chat template: ``{ enable_thinking = false }`` for Qwen3. One that it never reads is
    refused."""
    shuffle: bool = True
    """A new deterministic order every epoch, from ``train.seed``."""
    skip_bad: bool = False
    """Skips and counts bad rows (malformed, over-long, with a reference answer that the reward cannot use) instead of
    stopping. Of more than 30,000 rows, one that turns out bad when it is drawn is replaced by the next of the order."""
    limit: Positive | None = None
    """Reads at most this many training prompts."""
    curriculum: Literal["off", "variance"] = "off"
    """"variance": a prompt whose last k groups in a row had equal rewards is kept with probability max(floor, 2^-k)
    when its turn comes, else the next has its turn."""
    curriculum_floor: Annotated[float, Field(ge=0.01, le=1.0)] = 0.0625
    """The least probability with which such a prompt is kept. Where all are such, a step draws 1 / floor as many."""

    @model_validator(mode="before")
    @classmethod
    def _path_or_sources(cls, given: Any) -> Any:
        return {"path": "", **given} if isinstance(given, dict) and given.get("sources") else given

    @property
    def paths(self) -> dict[str, str]:
        """Setting -> path, of every file of training prompts."""
        return {f"data.sources.{source.name}.path": source.path for source in self.sources} or {"data.path": self.path}

    def of_source(self, source: SourceConfig) -> DataConfig:
        """How a source is read: these settings, with its own in their place."""
        own = {name: getattr(source, name) for name in ("format", "prompt_field", "answer_field")}
        kept = {name: value for name, value in own.items() if value}
        return self.model_copy(update={"path": source.path, "sources": (), "limit": source.limit, **kept})

    def _check_sources(self) -> None:
        names = [source.name for source in self.sources]
        if self.sources and self.path:
            raise ValueError(f"path = {self.path!r} and sources: name the training prompts once")
        if not self.sources and not self.path:
            raise ValueError("path is empty: name a file of training prompts, or sources")
        if self.sources and self.limit is not None:
            raise ValueError(f"limit = {self.limit} with sources: give each source its own")
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two sources are called {name!r}: give each its own name")
        if self.curriculum == "off" and self.curriculum_floor != type(self).model_fields["curriculum_floor"].default:
            raise ValueError(f'curriculum_floor = {self.curriculum_floor:g} has no effect with curriculum = "off"')

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        self._check_sources()
        if self.chat_template_kwargs and not self.chat_template:
            raise ValueError(
                f"chat_template_kwargs = {self.chat_template_kwargs} has no effect with chat_template = false: remove "
                f"one of them"
            )
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
    max_restarts: Count = 0
    """Where ``train`` starts the ranks itself: how often in a row, without a new checkpoint, it starts
    them again after a failure, to go on from the latest checkpoint. Under torchrun its ``--max-restarts`` does that."""
    resume_changes: Annotated[tuple[str, ...], AsList] = ()
    """Settings that may differ from the checkpoint's although that makes it another experiment: ["optimizer.lr"]."""
    outer_steps: Positive = 100
    """Rollout-train-sync rounds; for sft, optimizer steps."""
    prompts_per_step: Positive = 16
    """Prompts P an outer step, over all ranks; for sft, examples an optimizer step."""
    minibatches: Positive = 4
    """Optimizer steps per outer step; each takes prompts_per_step / minibatches whole groups."""
    microbatch_tokens: Positive = 4096
    """Token budget of a packed micro-batch (prompt, response, and what context parallelism fills a sequence up with),
    of which a rank holds 1/context. Memory, not mathematics: it cannot change a step."""
    oversize: Literal["error", "own"] = "error"
    """A sequence above the budget: an error, or a micro-batch of its own."""
    checkpoint_every: Count = 10
    """Outer steps between checkpoints; the last outer step always has one; with 0 that is the only one."""
    keep_last: Positive = 2
    """Newest checkpoints that stay."""
    keep_every: Count = 0
    """Checkpoints whose number of outer steps this divides stay as well; 0 none."""
    checkpoint_async: bool = False
    """Writes checkpoints while training goes on, from copies in host memory (weights, moments: this rank's share)."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seeds data order, rollouts and whatever else is drawn."""
    deterministic: bool = False
    """torch deterministic algorithms (always so on a CPU)."""
    on_non_finite: Literal["error", "skip"] = "error"
    """A logprob, loss or gradient that is not finite: the run fails, or the optimizer step is left out. Either way the
    response, the layer or the parameters are named, and weights and moments are as they were."""
    max_non_finite_steps: Positive = 10
    """With ``on_non_finite`` "skip": as many outer steps in a row in which something was not finite fail the run."""
    collective_timeout_s: Seconds = 1800.0
    """Seconds that ranks wait for one another in a collective while one of them gives no sign of life, or all of them
    wait: then the missing are named, with what they were last doing, and the run fails. nccl and gloo have the same
    limit for their own operations. A rank that lives and computes (a reward, a rollout) is waited for, with a
    warning."""
    noise_floor_every: Count = 10
    """Outer steps between measurements of the numerical noise in log s_i; 0 never."""
    profile_steps: Annotated[tuple[Positive, ...], AsList] = ()
    """Outer steps, counted from 1, of which ``profile/`` gets a trace a rank: what ran when, for ui.perfetto.dev. The
    first steps of a run are slower than the others: [3] is better than [1]."""
    save_rollouts: Count = 8
    """Responses of an outer step kept in ``rollouts/`` for reading, and as many more as complete their groups; 0 keeps
    none."""
    save_hf: bool = True
    """Writes a Hugging Face directory at the end, beside the checkpoint."""
    save_hf_every: Count = 0
    """Outer steps between Hugging Face directories in ``exports/``, written while training goes on, from copies in host
    memory (this rank's share of the weights); all stay. 0 none."""
    on_checkpoint: Command = ""
    """A command that is run for each finished checkpoint while training goes on, one at a time, with its directory as
    last argument and in $MEGATRON_GSPO_CHECKPOINT: an upload. A failure is a warning; the run ends when it is done.
    A resumed run runs it again for the checkpoint that it goes on from, if it had not succeeded for it."""
    on_end: Command = ""
    """A command that is run when the run has ended, with the outcome ("finished", "stopped" or "failed") and the run
    directory as last arguments, and in $MEGATRON_GSPO_OUTCOME, $MEGATRON_GSPO_STATUS (exit status) and
    $MEGATRON_GSPO_RUN_DIR: a note to whoever waits."""
    hook_timeout_s: Seconds = 600.0
    """Seconds that ``on_checkpoint`` and ``on_end`` may take each time, and that a run which has ended waits."""
    tensorboard: bool = True
    """Writes TensorBoard events."""
    wandb: bool = False
    """Also logs to Weights & Biases (the ``wandb`` extra)."""
    metrics_address: Annotated[str, AfterValidator(_address)] = ""
    """HOST:PORT where the first rank answers Prometheus (``/metrics``) while the run goes on; ":9100" is that port of
    this machine alone (loopback). Whoever reaches the address can read it. Empty: none."""

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        if self.resume and self.overwrite:
            raise ValueError(
                "resume = true continues the run in run_dir, overwrite = true removes it: set train.overwrite = false"
            )
        if any(step > self.outer_steps for step in self.profile_steps):
            raise ValueError(
                f"profile_steps = {list(self.profile_steps)} are counted from 1 to outer_steps = {self.outer_steps}"
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
    warmup_steps: Count = 0
    """Optimizer steps of linear warm-up from 0."""
    betas: Annotated[tuple[Decay, Decay], AsList] = (0.9, 0.98)
    """Adam's decay rates."""
    eps: PositiveFloat = 1e-8
    """Adam's epsilon."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay; norms and biases are exempt."""
    clip_grad: NonNegativeFloat = 1.0
    """Global gradient norm above which gradients are scaled down; 0 never."""
    state_dtype: Literal["float32", "bfloat16"] = "float32"
    """What Adam's two moments are kept in, here and in checkpoints. "bfloat16" takes 4 bytes a parameter of 12 and
    rounds up or down by chance, so that small changes add up. Master weights are float32 whatever it says (float64 in
    a float64 run, and with "float32" the moments too)."""
    offload: bool = False
    """Keeps moments and, of a bfloat16 model, master weights in host memory, from where each step brings them to the
    GPU piece by piece. It changes no bit of a step. On a CPU it only makes copies."""


class CriticConfig(OptimizerConfig):
    """The critic of ``algorithm.credit = "gae"``, with an optimizer of its own; without that there is none."""

    lr: PositiveFloat = 1e-5
    """Peak learning rate."""
    path: str = ""
    """Directory that it starts from: a policy's, whose value head is zeros, or a critic's; ``model.path`` when
    empty."""
    gamma: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Discount of a reward per token."""
    lam: Annotated[float, Field(ge=0, le=1)] = 0.95
    """Lambda of the advantages: 0 trusts the next value alone, 1 the rewards alone."""
    lam_alpha: PositiveFloat | None = None
    """Lambda of a response of l tokens is 1 - 1 / (lam_alpha l) instead (VAPO, with 0.05)."""
    value_lam: Annotated[float, Field(ge=0, le=1)] | None = None
    """Lambda of the returns that values are trained towards; absent, that of the advantages (VC-PPO and VAPO: 1)."""
    whiten: bool = True
    """Advantages have mean 0 and deviation 1 over the trained tokens of an outer step."""
    clip_value: NonNegativeFloat = 0.2
    """A value may move so far from that before the update, in the head's units, before its gradient stops; 0: any
    distance."""
    normalise: bool = False
    """The head gives values in deviations of the returns that have been seen from their mean (MAPPO)."""
    epochs: Positive = 1
    """Times that the critic is trained on each of an outer step's mini-batches, an optimizer step each time."""
    pretraining_steps: Count = 0
    """Outer steps at the start in which the critic alone is trained; the policy's weights stay."""
