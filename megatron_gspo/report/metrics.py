"""The metrics of ``metrics.jsonl``: name, unit, meaning, and how an outer step's lines become one value.

docs/metrics.md is this table to read, and a test holds the two equal, word for word; the report's page shows its texts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Record = dict[str, Any]
"""One line of ``metrics.jsonl``: step, outer_step, minibatch, and metric -> float; what was not measured is absent."""

PLACE = ("step", "outer_step", "minibatch")
"""What says where a line belongs."""

INITIAL = -1
"""``step`` and ``outer_step`` of the evaluation before any training."""
WINDOW = 10
"""Outer steps that "recent" means, at most: ``recent_window``."""


@dataclass(frozen=True)
class Metric:
    """What a number is: unit, meaning, and what to look for."""

    unit: str
    meaning: str = ""
    """One sentence or two, in the Markdown of docs/metrics.md."""
    look_for: str = ""
    combine: Literal["mean", "last"] = field(default="mean", kw_only=True)
    """An outer step's value: the mean over its mini-batches, or the last line that has one. "last" is for what an
    outer step has one of (rewards, lengths, times, evaluations) and for s_i, furthest from pi_old in the last one."""


LAYER = "layer_NN"
"""The end of a row's name that stands for one metric a layer: ``layer_00`` and so on."""
COMPONENT = "reward/component/NAME"
"""The row that stands for every component of a reward: ``reward/component/correct`` and so on."""
OF_SOURCE = "source/NAME/"
"""How the rows begin that stand for one metric a source: ``source/math/reward`` and so on."""
SOURCE_FAMILIES = tuple(f"{OF_SOURCE}{kind}" for kind in ("reward", "accuracy", "length", "groups", "zero_std_groups"))
SUITE = "eval/SUITE/"
"""The beginning of the rows that stand for one metric a suite: ``eval/aime24/accuracy`` and so on."""
FAMILIES = (LAYER, COMPONENT, *SOURCE_FAMILIES)
"""Ends of the rows that stand for several metrics."""

METRICS: dict[str, Metric] = {
    "reward/mean": Metric(
        "reward",
        "Mean reward of the outer step's surviving responses, in [0, 1] unless the reward has another range.",
        "Rises.",
        combine="last",
    ),
    "reward/std": Metric("reward", "Population standard deviation of those rewards.", combine="last"),
    "reward/zero_std_groups": Metric(
        "fraction",
        "Share of surviving groups whose responses all got the same reward: their advantages are 0.",
        "Above 0.5, half of the rollouts teach nothing: the prompts are too easy or too hard.",
        combine="last",
    ),
    "reward/grader_timeouts": Metric(
        "responses",
        "Responses of the outer step whose grading by a built-in reward was stopped because it took too long; each "
        "got 0.",
        "0; `docs/grading.md` has the limits.",
        combine="last",
    ),
    COMPONENT: Metric(
        "reward",
        "Mean of the named part of a reward that has parts (`docs/rewards.md`), over the outer step's surviving "
        "responses that have it.",
        "What the reward is made of: one part that rises while the others fall may be all that is learnt.",
        combine="last",
    ),
    "loss": Metric(
        "1",
        "The loss of the whole mini-batch, globally normalised: the negated surrogate objective and the KL "
        "term, if any; for sft the mean negative log-likelihood of a completion token.",
        "Its gradient means something, its level does not.",
    ),
    "grad_norm": Metric(
        "1",
        "Global gradient norm before clipping.",
        "A sudden rise by a factor of ten deserves a look at that step's responses.",
    ),
    "lr": Metric("1", "Learning rate of the step."),
    "ratio/mean": Metric("1", "Mean of s_i.", "Exactly 1 in minibatch 0.", combine="last"),
    "ratio/p01": Metric(
        "1",
        "1% quantile of s_i over the mini-batch's responses.",
        "Exactly 1 in minibatch 0, like all quantiles.",
        combine="last",
    ),
    "ratio/p05": Metric("1", "5% quantile of s_i.", "Compare with 1 - clip_low.", combine="last"),
    "ratio/p50": Metric("1", "Median of s_i.", combine="last"),
    "ratio/p95": Metric("1", "95% quantile of s_i.", "Compare with 1 + clip_high.", combine="last"),
    "ratio/p99": Metric("1", "99% quantile of s_i.", combine="last"),
    "ratio/abs_log_mean": Metric("nats/token", "Mean of abs(log s_i).", combine="last"),
    "ratio/token_log_rms": Metric(
        "nats",
        "Root mean square of log w_t over response tokens.",
        "Much larger than `ratio/abs_log_mean`: the noise that a sequence ratio averages away.",
        combine="last",
    ),
    "ratio/ess": Metric("fraction", "Effective sample size, (sum s_i)^2 / (n sum s_i^2).", "Near 1.", combine="last"),
    "clip/frac_tokens": Metric(
        "fraction",
        "Response tokens on the clipped branch / response tokens.",
        "Exactly 0 in minibatch 0. GSPO clips far more than GRPO: 0.15 against 0.0013 as others read the "
        "paper's figure.",
    ),
    "clip/frac_sequences": Metric("fraction", "The same by sequence: responses with a clipped token / responses."),
    "clip/frac_low": Metric(
        "fraction", "The part of `clip/frac_tokens` with the ratio below 1 - clip_low and a negative advantage."
    ),
    "clip/frac_high": Metric(
        "fraction", "The part of `clip/frac_tokens` with the ratio above 1 + clip_high and a positive advantage."
    ),
    "clip/frac_tokens_nonzero_adv": Metric(
        "fraction", "Clipped tokens / response tokens whose advantage is not 0; a group of equal rewards cannot clip."
    ),
    "noise/abs_log_ratio_p50": Metric(
        "nats/token",
        "Median of abs(log s_i) between two packings of the same responses at equal weights: the noise floor,"
        " measured every `train.noise_floor_every` outer steps.",
        "Far below the clip range.",
        combine="last",
    ),
    "noise/abs_log_ratio_p99": Metric(
        "nats/token",
        "99% quantile of the same.",
        "Below the clip range, else rounding is clipped. bf16 noise can reach 3e-4.",
        combine="last",
    ),
    "entropy": Metric(
        "nats/token",
        "-sum pi log pi over the whole vocabulary, mean over response tokens, at the sampling temperature.",
        "Falls slowly; near 0, exploration is over.",
    ),
    "kl/engine_k1": Metric(
        "nats/token",
        "Mean of log mu - log pi_old over response tokens. With `correction.bypass` and no pass of pi_old, pi_theta "
        "stands for pi_old here and below.",
        "Near 0, of either sign.",
    ),
    "kl/engine_k3": Metric(
        "nats/token",
        "Mean of rho - 1 - log rho, with rho = pi_old / mu.",
        "Below 1e-3 is usually taken as healthy; about 1e-12 in float32 on a CPU.",
    ),
    "kl/engine_tail": Metric(
        "fraction",
        "Share of tokens with max(rho, 1/rho) > 2.",
        "Below 1e-4; above 0.1 went with a crash (arXiv 2510.11370).",
    ),
    "dynamic/drawn": Metric(
        "count",
        "Prompts drawn in the outer step; with `rollout.dynamic_sampling` alone, as are the next.",
        "Far above `train.prompts_per_step`, most groups teach nothing.",
        combine="last",
    ),
    "dynamic/rounds": Metric("count", "How often places were drawn anew.", "Below its limit.", combine="last"),
    "dynamic/left": Metric("count", "Places left with a group of equal rewards, or without one.", "0.", combine="last"),
    "correction/weight": Metric(
        "ratio",
        "Mean over response tokens of the weight that `[correction]` gives them; with a rule, `reject` or `veto` "
        "alone, as are the next.",
        "Near 1; far below it, most of the batch is left out.",
    ),
    "correction/ess": Metric(
        "fraction",
        "Effective sample size of these weights: (sum w)^2 / (n sum w^2).",
        "Near 1; low, few tokens decide.",
    ),
    "correction/masked_tokens": Metric("fraction", "Share of tokens with weight 0.", "Small."),
    "correction/masked_sequences": Metric("fraction", "Share of responses whose every token has weight 0.", "Small."),
    "correction/out_of_band": Metric(
        "fraction", "Share of tokens whose rho, at `correction.level`, is outside [low, high].", "Small and steady."
    ),
    "correction/chi2": Metric(
        "ratio", "Mean of rho^2 - 1 over tokens: the chi-squared divergence of pi_old from mu.", "Near 0."
    ),
    "correction/ppl_engine": Metric("ratio", "exp(-mean log mu): the engine's perplexity of what it drew."),
    "correction/ppl_trainer": Metric("ratio", "The trainer's, exp(-mean log pi_old).", "The engine's."),
    "critic/explained_variance": Metric(
        "fraction",
        "1 - Var(return - value) / Var(return) over response tokens, of the values before the outer step's update; "
        "with `algorithm.credit` gae alone, as are the next.",
        "Rises from about 0 (below it, the values are worse than a constant).",
        combine="last",
    ),
    "critic/loss": Metric("reward squared", "The value loss, clipping included.", "Falls."),
    "critic/clip_frac": Metric("fraction", "Share of tokens whose value has moved beyond `critic.clip_value`."),
    "critic/grad_norm": Metric("norm", "The critic's, before clipping."),
    "critic/lr": Metric("1", "The critic's learning rate.", combine="last"),
    "critic/returns": Metric("reward", "Mean over response tokens of what values are trained towards.", combine="last"),
    "critic/returns_squared": Metric("reward squared", "Mean of its square.", combine="last"),
    "critic/values": Metric("reward", "Mean value over response tokens.", "Follows the returns.", combine="last"),
    "reward/kl_penalty": Metric(
        "reward",
        "Mean over responses of what `algorithm.kl_reward_coef` takes off a reward: its multiple of the sum of "
        "log pi_old - log pi_ref; where credit is by response.",
        "Small beside the spread of rewards.",
        combine="last",
    ),
    "kl/ref_k1": Metric(
        "nats/token",
        "Mean of log pi_theta - log pi_ref over response tokens, each with the same weight; with a reference "
        "(`algorithm.kl_loss_coef` above 0) alone. The tokens were drawn by mu, so it estimates the divergence of "
        "pi_theta from pi_ref without bias where pi_theta is mu: in minibatch 0, but for the engine gap.",
        "Near 0 at first, of either sign; rises as the policy leaves the reference.",
    ),
    "kl/ref_k3": Metric(
        "nats/token",
        "Mean of r - 1 - log r, with r = pi_ref / pi_theta: the same divergence from the same tokens, never negative "
        "and with less variance.",
        "Rises as the policy leaves the reference; steady where `algorithm.kl_loss_coef` holds it.",
    ),
    "route/drift": Metric(
        "fraction",
        "Share of the experts that pi_old's own routing chose and the policy's own routing now does not, mean over "
        "layers and over the tokens of prompts and responses; with replay on or off, what routers would choose by "
        "themselves.",
        "Exactly 0 in minibatch 0. About 0.1 after one update of a large model (arXiv 2507.18071).",
        combine="last",
    ),
    "route/drift_tokens": Metric(
        "fraction", "Share of those tokens with a change in some layer.", "Far above `route/drift`.", combine="last"
    ),
    "route/drift/layer_NN": Metric(
        "fraction", "`route/drift` of one MoE layer; NN is its number over all layers, from 00.", combine="last"
    ),
    "route/engine_mismatch": Metric(
        "fraction",
        "Share of the experts that the engine chose and the trainer's own routing in the pi_old pass does not, mean "
        "over layers and over the tokens whose routes the engine returned; one value an outer step. With "
        "`replay.mode` r3 the pi_old pass replays the engine's routes, so that each layer is compared on the inputs "
        "that they lead to.",
        "Near 0 in float32; about 0.1 in bf16 (arXiv 2510.11370).",
        combine="last",
    ),
    "route/engine_mismatch_tokens": Metric(
        "fraction", "Share of those tokens with a difference in some layer.", "0.94 as reported there.", combine="last"
    ),
    "route/engine_mismatch/layer_NN": Metric(
        "fraction", "`route/engine_mismatch` of one MoE layer.", "Rises with depth.", combine="last"
    ),
    "replay/coverage": Metric(
        "fraction",
        "Share of the tokens of prompts and responses that had a route to replay.",
        "Exactly 1 with r2; near 1 with r3, where the last token of a response never has one. `replay.min_coverage` "
        "stops a step before it trains on too few.",
    ),
    "expert/load_max": Metric(
        "multiple of mean",
        "Tokens of the fullest expert / mean over experts, largest over layers.",
        "Steady; a rise means that experts fall out of use.",
    ),
    "length/mean": Metric("tokens", "Response tokens, the stop token included.", combine="last"),
    "length/mean_positive": Metric(
        "tokens",
        "The same over responses with a positive advantage.",
        "GSPO's 1/length couples to it: watch both signs.",
        combine="last",
    ),
    "length/mean_negative": Metric("tokens", "The same over responses with a negative advantage.", combine="last"),
    "length/truncated": Metric(
        "fraction",
        "Responses cut by `rollout.max_response_tokens`.",
        "Small; above 0.5 the limit is what is learnt.",
        combine="last",
    ),
    "dropped/responses": Metric(
        "responses",
        "Responses dropped in the outer step: empty, aborted, of mixed weight versions, dropped by "
        "configuration, not graded, or left alone in their group.",
        "0.",
        combine="last",
    ),
    "step/skipped": Metric(
        "0 or 1",
        "1 on the one line of an outer step in which no group had two responses left and which `rollout.on_empty_step` "
        "skipped: no optimizer step was taken, and the next one has the same `step`.",
        "0.",
        combine="last",
    ),
    "step/non_finite": Metric(
        "0 or 1",
        "1 on the line of an optimizer step that was left out under `train.on_non_finite`: a logprob, a loss or a "
        "gradient was not finite, and weights and moments stayed as they were. It counts as a step for the schedule.",
        "0.",
    ),
    "dropped/aborted": Metric("responses", "Those that the server gave up on, retries included.", combine="last"),
    "dropped/empty": Metric("responses", "Those without a token.", combine="last"),
    "dropped/mixed_version": Metric(
        "responses", "Those of several weight versions (`rollout.on_mixed_version`).", combine="last"
    ),
    "dropped/truncated": Metric("responses", "Those that were cut, under `rollout.on_truncated`.", combine="last"),
    "dropped/ungraded": Metric(
        "responses",
        "Those that the grader could not grade (a judge that does not answer, a sandbox that failed); they leave the "
        "batch and are no 0.",
        "0; `reward.max_ungraded` bounds it.",
        combine="last",
    ),
    "dropped/lonely": Metric("responses", "Sound ones that were left alone in their group.", combine="last"),
    "dropped/groups": Metric("groups", "Groups that left the batch with them.", combine="last"),
    "servers/up": Metric(
        "servers",
        "Rollout servers that are there at the end of the outer step's draw, with the current weights.",
        "All of them.",
        combine="last",
    ),
    "servers/lost": Metric(
        "servers",
        "How often one was given up since the outer step before: gone, silent, or without this run's weights.",
        "0.",
        combine="last",
    ),
    "servers/returned": Metric(
        "servers",
        "How often one came back.",
        combine="last",
    ),
    "servers/restarted": Metric(
        "servers", "How often a local one was started again.", "0; `rollout.server_restarts` bounds it.", combine="last"
    ),
    "servers/moved": Metric(
        "prompts", "Prompts that another server answered because theirs was lost.", "0.", combine="last"
    ),
    "servers/resubmitted": Metric(
        "prompts",
        "Prompts that were asked of a second server, under `rollout.resubmit_after_s`.",
        "Few: each is computed twice.",
        combine="last",
    ),
    "source/NAME/groups": Metric(
        "groups",
        "Of a source (`data.sources`): its surviving groups of the outer step.",
        "Its share of the weights, over some outer steps.",
        combine="last",
    ),
    "source/NAME/reward": Metric("reward", "Mean reward of their responses.", "Rises.", combine="last"),
    "source/NAME/accuracy": Metric(
        "fraction",
        "Share of them that get the most that the source's reward gives; absent where its range has no top.",
        "Rises.",
        combine="last",
    ),
    "source/NAME/length": Metric("tokens", "Mean length of these responses.", combine="last"),
    "source/NAME/zero_std_groups": Metric(
        "fraction",
        "Share of these groups whose responses all got the same reward.",
        "A source near 1 teaches nothing: it is too easy or too hard.",
        combine="last",
    ),
    "curriculum/skipped": Metric(
        "prompts",
        "Turns that were passed over in the outer step because the prompt's last groups had no variance, under "
        '`data.curriculum = "variance"`.',
        "Grows as prompts are learnt.",
        combine="last",
    ),
    "curriculum/easy": Metric(
        "fraction",
        "Share of all prompts whose last group had equal rewards in the upper half of the reward's range.",
        "Rises.",
        combine="last",
    ),
    "curriculum/hard": Metric(
        "fraction", "The same in the lower half.", "Falls; what stays is beyond the policy.", combine="last"
    ),
    "data/skipped": Metric(
        "prompts",
        "Prompts (for sft, examples) that turned out bad when they were drawn, under `data.skip_bad`; the next of the "
        "order stood in for each.",
        "0, or few.",
        combine="last",
    ),
    "eval/accuracy": Metric(
        "fraction",
        "Share of the responses to the fixed held-out prompts that get reward 1, the top of the reward's range (avg@k "
        "for k = `eval.samples`), sampled at the training temperature with the same seeds every time. A response that "
        "the server gave up on is wrong; one that was not graded counts nowhere. Absent, as is pass@k, where the "
        "range has no top.",
        "Rises; `reward/mean` that rises without it is overfitting.",
        combine="last",
    ),
    "eval/greedy_accuracy": Metric("fraction", "The same at temperature 0.", combine="last"),
    "eval/pass_at_k": Metric(
        "fraction",
        "Share of those prompts with a right one among `eval.samples` responses; absent for one response per prompt.",
        "Falls while the accuracy rises: fewer prompts are solved at all.",
        combine="last",
    ),
    "eval/reward": Metric(
        "reward",
        "Mean reward of the sampled held-out responses.",
        "Equals the accuracy when rewards are 0 or 1.",
        combine="last",
    ),
    "eval/rewarded": Metric("fraction", "Share of them with a reward above 0.", combine="last"),
    "eval/SUITE/accuracy": Metric(
        "fraction",
        "Share of the responses to the problems of a suite of `eval.suites` that are right (avg@k), each suite drawn "
        "and graded as it says (`docs/evaluation.md`), with the same seeds every time.",
        "Rises, if training teaches more than its own prompts.",
        combine="last",
    ),
    "eval/SUITE/pass_at_k": Metric(
        "fraction", "Share of its problems with a right one among their k responses.", combine="last"
    ),
    "eval/SUITE/maj_at_k": Metric(
        "fraction",
        "Share of its problems whose most frequent final answer among k responses is right; ties by expectation. "
        "Absent for suites of programs.",
        "Rises less than the accuracy where training only sharpens what the model mostly says.",
        combine="last",
    ),
    "eval/SUITE/elo": Metric(
        "points",
        "Rating on Codeforces' scale (`docs/evaluation.md`), whose interval `eval` prints.",
        combine="last",
    ),
    "eval/SUITE/truncated": Metric(
        "fraction",
        "Share of its responses that the limit cut.",
        "Near 0, or accuracies are those of the limit.",
        combine="last",
    ),
    "tokens_per_s": Metric(
        "tokens/s",
        "Prompt and response tokens trained on / wall time of the outer step, over all ranks.",
        combine="last",
    ),
    "time/rollout": Metric("s", "Waiting for responses.", combine="last"),
    "time/reward": Metric("s", "Rewards and advantages.", combine="last"),
    "time/logprobs": Metric("s", "Forward passes for pi_old, the reference and the noise floor.", combine="last"),
    "time/train": Metric("s", "Forward, backward and optimizer over all mini-batches.", combine="last"),
    "time/sync": Metric(
        "s", "New weights to the rollout servers; colocated, also the change of turns.", combine="last"
    ),
}

TIME_PARTS = ("rollout", "reward", "logprobs", "train", "sync")


def row_of(name: str) -> str:
    """The name that a recorded metric has in ``METRICS``.

    >>> row_of("route/drift/layer_03"), row_of("source/math/reward"), row_of("eval/aime24/accuracy")
    ('route/drift/layer_NN', 'source/NAME/reward', 'eval/SUITE/accuracy')
    """
    name = re.sub(r"^source/[^/]+/", OF_SOURCE, name)
    name = re.sub(r"^eval/[^/]+/", SUITE, name)
    return COMPONENT if name.startswith("reward/component/") else re.sub(r"layer_\d+$", LAYER, name)


def clean(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Drops None and non-finite values: strict JSON has no NaN, and a mean over nothing was not measured."""
    values = {name: float(value) for name, value in metrics.items() if value is not None}
    return {name: value for name, value in values.items() if math.isfinite(value)}


def finite(value: Any) -> bool:
    """Whether it is a number that JSON and JavaScript can hold."""
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**53


def strict(value: Any) -> Any:
    """Plain values with None in the place of each NaN and infinity, for which JSON has no word."""
    if isinstance(value, dict):
        return {name: strict(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def by_outer_step(records: Iterable[Record]) -> list[Record]:
    """One record an outer step, in order: each metric combined as ``METRICS`` says (unknown ones as the mean)."""
    groups: dict[int, list[Record]] = {}
    for record in records:
        groups.setdefault(record["outer_step"], []).append(record)
    return [combine(groups[outer_step]) for outer_step in sorted(groups)]


def combine(lines: Sequence[Record]) -> Record:
    """The lines of one outer step as one record; ``step`` and ``minibatch`` are the last line's."""
    combined: Record = {}
    for name in {name: None for line in lines for name in line}:
        values = [line[name] for line in lines if name in line]
        last = name in PLACE or METRICS.get(row_of(name), Metric("")).combine == "last"
        combined[name] = values[-1] if last else sum(values) / len(values)
    return combined


def counted(step: int) -> int:
    """The number of a step as people read it, on the terminal and on a page: the first is 1, and 0 is ``INITIAL``."""
    return step + 1


def recent_window(outer_steps: int) -> int:
    """How many of a run's outer steps are its recent ones: never more than half of them, so that the first ones, which
    they are held against, are others."""
    return min(WINDOW, max(1, outer_steps // 2))


def steps_taken(line: Record) -> int:
    """Optimizer steps up to a line, its own included: a skipped outer step has none."""
    return int(line["step"]) + (0 if line.get("step/skipped") else 1)


def seconds(record: Record) -> float:
    """Seconds of an outer step: the sum of its time split."""
    return sum(record.get(f"time/{part}", 0.0) for part in TIME_PARTS)
