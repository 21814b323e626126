"""The charts of the report, in reading order: one entry a chart, drawn by ``templates/charts.js``.

A chart whose metrics no run has is left out, so an entry here costs nothing to runs that do not record it.
"""

from __future__ import annotations

from megatron_gspo.report.drawing import Chart, Curve, Section

SECTIONS = (
    Section(
        "Is it learning?",
        (
            Chart(
                "Reward and accuracy",
                "reward, accuracy",
                (
                    Curve("reward/mean", "reward, training prompts"),
                    Curve("eval/accuracy", "accuracy, held-out", markers=True),
                    Curve("eval/greedy_accuracy", "accuracy, greedy", markers=True),
                    Curve("eval/pass_at_k", "pass@k, held-out", markers=True),
                ),
                "Evaluations belong to the weights after the step they stand at; the one at 0 is before any training.",
            ),
            Chart(
                "Components of the reward",
                "mean over responses",
                (Curve("reward/component/NAME", ""),),
                "What the reward is made of, before its weights.",
            ),
            *(
                Chart(f"{title} by source", unit, (Curve(f"source/NAME/{kind}", ""),), zero=zero)
                for title, unit, kind, zero in (
                    ("Reward", "reward", "reward", False),
                    ("Accuracy", "accuracy", "accuracy", False),
                    ("Response length", "tokens per response", "length", False),
                    ("Groups of equal rewards", "share of groups", "zero_std_groups", True),
                    ("Groups", "groups per outer step", "groups", True),
                )
            ),
            Chart(
                "Suites",
                "share right (0 to 1)",
                (Curve("eval/SUITE/accuracy", "", markers=True),),
                "avg@k of published evaluations, each drawn in its own way.",
            ),
            Chart(
                "Suites: the best and the most frequent answer",
                "share right (0 to 1)",
                (
                    Curve("eval/SUITE/pass_at_k", "pass@k", markers=True),
                    Curve("eval/SUITE/maj_at_k", "maj@k", markers=True),
                ),
                "pass@k: a right one among k; maj@k: the most frequent one is right.",
            ),
            Chart("Rating", "points", (Curve("eval/SUITE/elo", "", markers=True),)),
            Chart(
                "Suites: truncated responses",
                "share (0 to 1)",
                (Curve("eval/SUITE/truncated", "", markers=True),),
                zero=True,
            ),
            Chart(
                "Response length",
                "tokens per response",
                (
                    Curve("length/mean", "all"),
                    Curve("length/mean_positive", "advantage > 0"),
                    Curve("length/mean_negative", "advantage < 0"),
                ),
            ),
            Chart(
                "Truncated, and groups of equal rewards",
                "share (0 to 1)",
                (
                    Curve("length/truncated", "truncated responses"),
                    Curve("reward/zero_std_groups", "groups with equal rewards"),
                ),
                "A group whose rewards are all equal has no advantages and teaches nothing.",
                zero=True,
            ),
            Chart(
                "Held-out reward",
                "reward, share",
                (Curve("eval/reward", "mean reward", markers=True), Curve("eval/rewarded", "any reward", markers=True)),
                "Differs from the accuracy where a reward has parts, as for a well-formed answer that is wrong.",
            ),
            Chart(
                "Dropped responses",
                "responses, groups per outer step",
                (
                    Curve("dropped/responses", "all responses"),
                    Curve("dropped/aborted", "aborted"),
                    Curve("dropped/empty", "empty"),
                    Curve("dropped/mixed_version", "of mixed weight versions"),
                    Curve("dropped/truncated", "truncated"),
                    Curve("dropped/ungraded", "not graded, the grader failed"),
                    Curve("dropped/lonely", "left alone in their group"),
                    Curve("dropped/groups", "groups"),
                    Curve("reward/grader_timeouts", "graded 0, the grader took too long"),
                ),
                zero=True,
            ),
            Chart(
                "Skipped outer steps",
                "1: skipped",
                (Curve("step/skipped", "nothing to train on"), Curve("step/non_finite", "not finite")),
                "Every response of the step was dropped, or a logprob or gradient was not finite; the weights stayed.",
                zero=True,
            ),
            Chart(
                "Lost servers",
                "servers, prompts per outer step",
                (
                    Curve("servers/lost", "servers lost"),
                    Curve("servers/returned", "servers that came back"),
                    Curve("servers/restarted", "servers started again"),
                    Curve("servers/moved", "prompts moved to another server"),
                    Curve("servers/resubmitted", "prompts asked of a second server"),
                ),
                zero=True,
            ),
            Chart("Servers", "rollout servers", (Curve("servers/up", "with the current weights"),), zero=True),
            Chart(
                "Dynamic sampling",
                "prompts, rounds per outer step",
                (
                    Curve("dynamic/drawn", "prompts drawn"),
                    Curve("dynamic/rounds", "times that places were drawn anew"),
                    Curve("dynamic/left", "places left with equal rewards"),
                ),
                zero=True,
            ),
            Chart(
                "Curriculum: what is known of prompts",
                "share of all prompts",
                (Curve("curriculum/easy", "last group all right"), Curve("curriculum/hard", "last group all wrong")),
                zero=True,
            ),
            Chart("Curriculum: turns passed over", "prompts", (Curve("curriculum/skipped", "passed over"),), zero=True),
            Chart(
                "Critic",
                "explained variance (at most 1)",
                (Curve("critic/explained_variance", "of returns, before the update"),),
                "At 0 the values know no more than a constant.",
            ),
            Chart(
                "Values and returns",
                "reward per token",
                (Curve("critic/returns", "returns"), Curve("critic/values", "values")),
            ),
            Chart(
                "Value loss",
                "reward squared",
                (Curve("critic/loss", "loss"), Curve("critic/returns_squared", "mean squared return")),
                zero=True,
            ),
            Chart(
                "Critic's update",
                "gradient norm; share; rate (log)",
                (
                    Curve("critic/grad_norm", "gradient norm"),
                    Curve("critic/clip_frac", "values clipped"),
                    Curve("critic/lr", "learning rate"),
                ),
                log=True,
            ),
            Chart(
                "KL taken off rewards",
                "reward per response",
                (Curve("reward/kl_penalty", "mean penalty"),),
            ),
            Chart("Skipped prompts", "prompts", (Curve("data/skipped", "bad rows, replaced by the next"),), zero=True),
        ),
    ),
    Section(
        "Is the update sound?",
        (
            Chart(
                "Clip fraction",
                "share clipped (log)",
                (
                    Curve("clip/frac_tokens", "tokens"),
                    Curve("clip/frac_sequences", "sequences"),
                    Curve("clip/frac_tokens_nonzero_adv", "tokens, advantage ≠ 0"),
                ),
                "Zero, as in every first mini-batch, lies below a log axis and leaves a gap.",
                log=True,
            ),
            Chart(
                "Sequence ratio",
                "s_i − 1",
                (
                    Curve("ratio/p50", "median"),
                    Curve("ratio/p01", "p01"),
                    Curve("ratio/p05", "p05"),
                    Curve("ratio/p95", "p95"),
                    Curve("ratio/p99", "p99"),
                    Curve("noise/abs_log_ratio_p99", "noise floor, p99"),
                ),
                "Bands hold 98% and 90% of the sequences. What lies outside the clip range may be clipped; a clip "
                "range inside the noise floor clips rounding errors.",
                kind="ratio",
            ),
            Chart(
                "Noise floor",
                "nats per token",
                (
                    Curve("noise/abs_log_ratio_p50", "median", markers=True),
                    Curve("noise/abs_log_ratio_p99", "p99", markers=True),
                ),
                "|log s_i| between two packings at equal weights: what no learning made. 0 where rounding is equal.",
                zero=True,
            ),
            Chart(
                "Clipped below and above",
                "share clipped (log)",
                (Curve("clip/frac_low", "below 1 − clip_low"), Curve("clip/frac_high", "above 1 + clip_high")),
                log=True,
            ),
            Chart("Entropy", "nats per token", (Curve("entropy", "entropy"),), zero=True),
            Chart("Gradient norm", "norm before clipping", (Curve("grad_norm", "gradient norm"),), zero=True),
            Chart("Learning rate", "learning rate", (Curve("lr", "learning rate"),), zero=True),
            Chart(
                "Distance from π_old",
                "nats (log)",
                (
                    Curve("ratio/token_log_rms", "RMS of token log-ratios"),
                    Curve("ratio/abs_log_mean", "mean |log s_i|, per token"),
                ),
                log=True,
            ),
            Chart(
                "Distance from the reference",
                "nats per token (log)",
                (Curve("kl/ref_k3", "k3"), Curve("kl/ref_k1", "|k1|", magnitude=True)),
                "KL(π_θ ‖ π_ref) as the responses show it; what the KL term of the loss holds.",
                log=True,
            ),
            Chart("Effective sample size", "share of the sequences", (Curve("ratio/ess", "ESS / n"),)),
            Chart(
                "Loss",
                "loss",
                (Curve("loss", "loss"),),
                "Of a policy a surrogate: its gradient means something, its level does not. Of fine-tuning the mean "
                "negative log-likelihood of a token: it falls.",
            ),
        ),
    ),
    Section(
        "Do engine and trainer agree?",
        (
            Chart(
                "Engine gap",
                "nats per token (log)",
                (Curve("kl/engine_k3", "k3"), Curve("kl/engine_k1", "|k1|", magnitude=True)),
                "How far π_old is from what the engine sampled; k3 below 1e-3 is usually taken as healthy.",
                log=True,
            ),
            Chart(
                "Corrections for the gap",
                "share (0 to 1)",
                (
                    Curve("correction/ess", "effective sample size"),
                    Curve("correction/masked_tokens", "tokens left out"),
                    Curve("correction/masked_sequences", "responses left out"),
                    Curve("correction/out_of_band", "outside the band"),
                ),
                "What [correction] does to a step's tokens.",
                zero=True,
            ),
            Chart(
                "Weights of the corrections",
                "ratio",
                (Curve("correction/weight", "mean weight"), Curve("correction/chi2", "chi-squared of the gap")),
                "The weight is near 1 where engine and trainer agree.",
            ),
            Chart(
                "Perplexity",
                "of what was drawn",
                (Curve("correction/ppl_engine", "engine"), Curve("correction/ppl_trainer", "trainer")),
                "The same where engine and trainer agree.",
            ),
            Chart(
                "Engine gap, tail",
                "share of tokens",
                (Curve("kl/engine_tail", "probabilities differ more than twofold"),),
                zero=True,
            ),
            Chart(
                "Routing",
                "share (0 to 1)",
                (
                    Curve("route/drift", "experts changed since π_old"),
                    Curve("route/drift_tokens", "tokens changed since π_old, in any layer"),
                    Curve("route/engine_mismatch", "experts, engine ≠ trainer", markers=True),
                    Curve("route/engine_mismatch_tokens", "tokens, engine ≠ trainer in any layer", markers=True),
                ),
                "What routers choose by themselves, whether replay overrules them or not.",
                zero=True,
            ),
            Chart(
                "Routing drift by layer",
                "share of experts",
                (Curve("route/drift/layer_NN", "layer"),),
                "Experts that were chosen under π_old and are not any more; exactly 0 in the first mini-batch.",
                zero=True,
            ),
            Chart(
                "Engine mismatch by layer",
                "share of experts",
                (Curve("route/engine_mismatch/layer_NN", "layer", markers=True),),
                "Experts that the engine chose and the trainer at the same weights does not.",
                zero=True,
            ),
            Chart("Replay coverage", "share of tokens", (Curve("replay/coverage", "with a route to replay"),)),
            Chart("Expert load", "largest load / mean load", (Curve("expert/load_max", "fullest expert"),), zero=True),
        ),
    ),
    Section(
        "Where does the time go?",
        (
            Chart(
                "Time of an outer step",
                "seconds",
                (
                    Curve("time/rollout", "rollout"),
                    Curve("time/reward", "reward"),
                    Curve("time/logprobs", "logprobs"),
                    Curve("time/train", "train"),
                    Curve("time/sync", "sync"),
                ),
                kind="time",
            ),
            Chart("Throughput", "tokens per second", (Curve("tokens_per_s", "tokens/s"),), zero=True),
        ),
    ),
)

CHARTS = tuple(chart for section in SECTIONS for chart in section.charts)
