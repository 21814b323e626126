"""The pure parts of the parity check: names of layouts, the mini-batches and the naive formulas."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_gspo.algorithm.base import algorithm_class
from megatron_gspo.algorithm.catalog import ALGORITHMS, policy_losses
from megatron_gspo.algorithm.metrics import finish, minibatch_sums
from megatron_gspo.algorithm.objective import objective
from megatron_gspo.algorithm.ratios import segment_sum
from megatron_gspo.algorithm.weights import response_weights
from megatron_gspo.batching.packing import pack, shard_tokens
from megatron_gspo.batching.planning import padded_length, plan_microbatches
from megatron_gspo.config import parse
from megatron_gspo.errors import ConfigError
from megatron_gspo.megatron.optimizer import learning_rate
from megatron_gspo.parity.case import STEPS, TOTAL_STEPS, Case, random_samples, straddling_old
from megatron_gspo.parity.layouts import ALL, AXES, Layout, choose_layouts, layout_of, parse_layout
from megatron_gspo.parity.models import cut_model
from megatron_gspo.parity.naive import FORMULAS, Response, naive_term, naive_weights
from megatron_gspo.parity.naive_adamw import NaiveAdamW, decays, gradient_norm, naive_lr
from megatron_gspo.parity.naive_metrics import Measured, naive_metrics
from megatron_gspo.types import Shard
from tests import oracle

# ------------------------------------------------------------------------------------------------------------- layouts


@pytest.mark.parametrize(
    ("name", "parallel", "model", "ranks"),
    [
        ("TP1", {"tensor": 1}, {}, 1),
        ("EP2", {"expert": 2}, {}, 2),
        ("TP2xEP4", {"tensor": 2, "expert": 4}, {}, 4),
        ("TP2xPP2xDP2xEP2", {"tensor": 2, "pipeline": 2, "data": 2, "expert": 2}, {}, 8),
        (
            "TP2xCP2xPP2xVPP2+recompute",
            {"tensor": 2, "context": 2, "pipeline": 2, "virtual_pipeline": 2},
            {"recompute": "full"},
            8,
        ),
        ("PP16+recompute-selective", {"pipeline": 16}, {"recompute": "selective"}, 16),
    ],
)
def test_a_layout_is_read_from_its_name(name, parallel, model, ranks):
    layout = parse_layout(name)
    assert (layout.name, layout.parallel, layout.model, layout.ranks) == (name, parallel, model, ranks)


@pytest.mark.parametrize("name", ["", "TP", "TP0", "tp2", "TP2xTP4", "TP2PP2", "XP2", "TP2+recomputed", "TP2+off"])
def test_a_name_that_is_no_layout_is_refused(name):
    with pytest.raises(ConfigError, match="is not a layout"):
        parse_layout(name)


def test_all_has_every_axis_alone_and_combinations_of_up_to_8_ranks():
    layouts = [parse_layout(name) for name in ALL]
    assert len({layout.name for layout in layouts}) == len(layouts) >= 24
    assert max(layout.ranks for layout in layouts) == 8
    alone = {next(iter(layout.parallel)) for layout in layouts if len(layout.parallel) == 1}
    assert alone == set(AXES.values()) - {"virtual_pipeline", "expert_tensor"}  # these two live on another axis
    for name in ("TP2xCP2xPP2", "TP2xPP2xEP2", "CP2xEP2xPP2xVPP2+recompute"):
        assert name in ALL


def run_config(**sections):
    return parse({"model": {"path": "m"}, "data": {"path": "d"}, "train": {"run_dir": "r"}} | sections)


def test_the_configurations_own_layout_fills_the_world():
    config = run_config(parallel={"tensor": 2, "expert": 2}, model={"path": "m", "recompute": "full"})
    assert layout_of(config).name == "TP2xEP2+recompute"
    assert layout_of(config).model == {"recompute": "full"}
    assert layout_of(config, world=8).parallel == {"tensor": 2, "expert": 2, "data": 4}
    assert layout_of(run_config()) == Layout("TP1", {}, {})


def test_layouts_are_chosen_by_name_and_by_what_fits():
    layouts, named = choose_layouts("all,TP2,EP8", None, max_ranks=8)
    assert [layout.name for layout in layouts] == [*ALL, "EP8"]
    assert named == {"TP2", "EP8"}
    few, _ = choose_layouts("all", None, max_ranks=2)
    assert max(layout.ranks for layout in few) == 2
    fitting, _ = choose_layouts("all", None, max_ranks=2, world=8)
    assert {layout.ranks for layout in fitting} == {8}
    with pytest.raises(ConfigError, match="needs 16 ranks, more than --max-ranks 8"):
        choose_layouts("PP16", None, max_ranks=8)
    with pytest.raises(ConfigError, match="needs a configuration file"):
        choose_layouts("config", None, max_ranks=8)
    with pytest.raises(ConfigError, match="leaves no layout"):
        choose_layouts(" , ", None, max_ranks=8)


# ---------------------------------------------------------------------------------------------------------- mini-batch


@pytest.mark.parametrize("seed", range(4))
def test_mini_batches_have_groups_of_uneven_size_and_a_long_response_first(seed):
    case = Case("model", random_samples(67, seed))
    assert case.minibatches == [[*range(8)], [8, 9, 10]]
    assert [sample.group for sample in case.samples] == [0] * 4 + [1] * 4 + [2, 2, 3]
    for members in case.minibatches:
        lengths = [case.samples[index].length for index in members]
        assert lengths[0] == max(lengths) > case.run_config(parse_layout("TP1")).train.microbatch_tokens - 16
    assert {np.sign(sample.advantage) for sample in case.samples} == {-1.0, 1.0}
    kept = case.without([0, 9, 10])
    assert kept.dropped == ((0, 0), (2, 1), (3, 2))
    assert kept.minibatches == [[*range(7)], [7]]
    assert case.without([8, 9, 10]).minibatches == [[*range(8)]], "an empty mini-batch is none"


@pytest.mark.parametrize(("context", "ranks"), [(1, 2), (1, 4), (2, 2)])
def test_a_data_rank_has_a_dummy_in_the_second_mini_batch(context, ranks):
    case = Case("model", random_samples(67, 0))
    config = case.run_config(Layout("", {"context": context, "data": ranks}))
    lengths = [padded_length(case.samples[index].length, context) for index in case.minibatches[1]]
    plan = plan_microbatches(lengths, token_budget=config.train.microbatch_tokens, num_ranks=ranks)
    sizes = [len(part) for rank in range(ranks) for part in plan.microbatches(rank)]
    assert 0 in sizes and sum(sizes) == 3


def test_the_two_steps_lie_in_the_warm_up_and_in_the_decay():
    config = Case("model", random_samples(67, 0)).run_config(parse_layout("TP1"))
    settings = config.optimizer
    rates = [
        naive_lr(step, lr=settings.lr, min_lr=settings.min_lr, warmup=settings.warmup_steps, total=TOTAL_STEPS)
        for step in range(TOTAL_STEPS)
    ]
    assert config.total_steps == TOTAL_STEPS
    assert rates == pytest.approx(
        [learning_rate(settings, step, TOTAL_STEPS) for step in range(TOTAL_STEPS)], rel=1e-14
    )
    assert rates[STEPS[0]] == pytest.approx(2 / 3 * settings.lr)
    assert settings.min_lr < rates[STEPS[1]] < settings.lr


@pytest.mark.parametrize("loss", policy_losses())
def test_old_logprobs_put_ratios_on_both_sides_of_both_ends_and_none_near_one(loss):
    case = Case("", random_samples(67, 0), loss=loss)
    new = [np.random.default_rng(1).normal(-3, 1, s.num_trained) for s in case.samples]
    log_w = [new_R - straddling_old(case, index, new_R) for index, new_R in enumerate(new)]
    if algorithm_class(loss).clips == "responses":
        ratios = np.array([row.mean() for row in log_w])
        assert any(np.abs(row).max() > 1.5 * abs(row.mean()) for row in log_w), "tokens vary within a response"
    else:
        ratios = np.concatenate(log_w)
    np.testing.assert_allclose(np.unique(ratios.round(9)), 1e-3 * np.array([-3, -1 / 3, 1 / 3, 3]), rtol=1e-5)


def losses_of(loss, case):
    """(new [R], old, ref, advantages, weights) by sample, of made-up logprobs."""
    rng = np.random.default_rng(1)
    new = [torch.from_numpy(rng.normal(-3, 1, s.num_trained)).requires_grad_() for s in case.samples]
    old = [torch.from_numpy(straddling_old(case, i, n.detach().numpy())) for i, n in enumerate(new)]
    ref = [n.detach() + torch.from_numpy(rng.normal(0, 0.3, len(n))) for n in new]
    weights = naive_weights([sample.group for sample in case.samples])
    return new, old, ref, [case.advantages(i) for i in range(len(new))], weights


def response(n, o, r, a, rollout=()):
    return Response(list(n.unbind()), o.tolist(), r.tolist(), list(rollout), a)


@pytest.mark.parametrize("loss", ["gspo", "gspo-token", "grpo", "ppo"])
def test_the_naive_formulas_are_those_of_the_tests_oracle(loss):
    case = Case("", random_samples(67, 0), loss=loss)
    new, old, ref, advantages, weights = losses_of(loss, case)
    rows = zip(new, old, ref, advantages, weights, strict=True)
    clip = {"clip_low": 1e-3, "clip_high": 1e-3}
    terms = [naive_term(loss, response(n, o, r, a), clip, w, 0.25) for n, o, r, a, w in rows]
    expected = oracle.naive_loss(loss, new, old, advantages, weights, 1e-3, 1e-3)
    kl = oracle.naive_kl(new, old, ref, weights)
    assert [term.low for term in terms] == expected.clipped_low
    assert [term.high for term in terms] == expected.clipped_high
    assert [term.log_ratio for term in terms] == pytest.approx(expected.log_ratio_S, rel=1e-12)
    assert sum(term.kl for term in terms) == pytest.approx(kl.item(), rel=1e-12)
    total = sum(term.loss for term in terms)
    assert total.item() == pytest.approx(expected.loss.item() + 0.25 * kl.item(), rel=1e-12)
    mine = torch.autograd.grad(total, new)
    theirs = torch.autograd.grad(expected.loss + 0.25 * kl, new)
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-15)


def test_every_algorithm_of_the_catalog_has_a_naive_form():
    assert set(FORMULAS) == set(ALGORITHMS)


def test_naive_weights_are_1_over_groups_and_survivors():
    assert naive_weights([0, 0, 0, 2, 2, 5]) == [1 / 9] * 3 + [1 / 6] * 2 + [1 / 3]
    groups = [0] * 4 + [1] * 4 + [2, 2, 3]
    lengths = [[7] * 4, [3] * 4, [5, 6], [9]]
    paper = np.concatenate(response_weights("paper", lengths, max_response_tokens=9))
    assert naive_weights(groups) == pytest.approx(paper, rel=1e-15)
    for name in ("token-mean", "group-token-mean", "token-sum"):
        expected = np.concatenate(response_weights(name, lengths, max_response_tokens=9))
        assert naive_weights(groups, [n for g in lengths for n in g], name, 9) == pytest.approx(expected, rel=1e-15)


def test_the_naive_optimizer_is_torchs_adamw_behind_its_clipping_with_norms_and_biases_exempt():
    generator = torch.Generator().manual_seed(0)
    names = ["model.layers.0.mlp.up_proj.weight", "model.norm.weight", "model.layers.0.self_attn.q_proj.bias"]
    weights = {name: torch.randn(3, 4, generator=generator, dtype=torch.float64) for name in names}
    parameters = {name: torch.nn.Parameter(weight.clone()) for name, weight in weights.items()}
    mine = NaiveAdamW(dict(weights), betas=(0.9, 0.98), eps=0.1, weight_decay=0.3, clip_grad=1.5)
    groups = [
        {"params": [parameters[names[0]]], "weight_decay": 0.3},
        {"params": [parameters[name] for name in names[1:]], "weight_decay": 0.0},
    ]
    theirs = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), eps=0.1)
    for lr, size in ((0.2, 1.0), (0.1, 3.0), (0.3, 0.05)):  # the last one is not clipped
        gradients = {name: size * torch.randn(3, 4, generator=generator, dtype=torch.float64) for name in names}
        for name, parameter in parameters.items():
            parameter.grad = gradients[name].clone()
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), 1.5)
        assert gradient_norm(gradients) == pytest.approx(float(norm), rel=1e-14)
        for group in theirs.param_groups:
            group["lr"] = lr
        theirs.step()
        mine.step(gradients, lr)
    for name, parameter in parameters.items():
        torch.testing.assert_close(mine.weights[name], parameter.data, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize(
    ("name", "exempt"),
    [
        ("model.layers.0.input_layernorm.weight", True),
        ("model.layers.0.self_attn.q_norm.weight", True),
        ("model.layers.0.self_attn.kv_a_layernorm.weight", True),
        ("model.norm.weight", True),
        ("model.layers.0.self_attn.k_proj.bias", True),
        ("model.layers.0.mlp.gate.weight", False),
        ("model.layers.0.mlp.shared_expert_gate.weight", False),
        ("model.embed_tokens.weight", False),
        ("lm_head.weight", False),
    ],
)
def test_norms_and_biases_do_not_decay(name, exempt):
    assert decays(name) is not exempt


@pytest.mark.parametrize("loss", policy_losses())
def test_naive_metrics_are_those_that_a_run_reports_from_sums(loss):
    case = Case("", random_samples(67, 0), loss=loss)
    new, old, ref, advantages, weights = losses_of(loss, case)
    samples = [s.placed(w) for s, w in zip(case.samples, weights, strict=True)]
    shard = shard_tokens(pack(samples, loss_dtype=torch.float64), Shard())

    def packed(values):
        values_T = torch.zeros(len(shard.mask_T), dtype=torch.float64)
        return values_T.masked_scatter(shard.mask_T, torch.cat(list(values)))

    nothing_T = torch.zeros_like(shard.mask_T)
    shard = shard.replace(old_logprobs_T=packed(old), ref_logprobs_T=packed(ref), chosen_T=nothing_T)
    entropy = [0.1 + n.detach() ** 2 for n in new]
    algorithm = case.algorithm.model_copy(update={"kl_loss_coef": 0.25})
    output = objective(algorithm, shard, packed(n.detach() for n in new), segment_sum)
    reported = finish(minibatch_sums(shard, output, packed(entropy), packed(n.detach() for n in new)))
    measured = []
    for index, (n, o, r, a, w) in enumerate(zip(new, old, ref, advantages, weights, strict=True)):
        rollout = samples[index].rollout_logprobs.astype(np.float64)
        term = naive_term(loss, response(n.detach(), o, r, a, rollout), algorithm.model_dump(), w, 0.25)
        values = (v.detach().numpy() for v in (n, o, r))
        measured.append(Measured(*values, rollout, entropy[index].numpy(), a, term.low, term.high, term.loss.item()))
    naive = naive_metrics(measured, {3: np.array([2, 4, 0, 2]), 4: np.array([2, 2, 2, 2])})
    assert naive.pop("expert/load_max").value == 2.0
    assert set(reported) == set(naive)
    for name, value in reported.items():
        assert value == pytest.approx(naive[name].value, rel=1e-12, abs=1e-13), name
    clips = algorithm.clips != "nothing"
    assert (reported["clip/frac_low"] > 0, reported["clip/frac_high"] > 0) == (clips, clips)
    assert reported["kl/engine_tail"] > 0


def test_a_cut_model_keeps_its_files_and_has_fewer_layers(tmp_path: Path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps({"num_hidden_layers": 3, "layer_types": ["a", "b", "c"]}))
    (source / "model.safetensors").write_bytes(b"weights")
    cut = cut_model(source, tmp_path / "cut", 2)
    assert json.loads((cut / "config.json").read_text()) == {"num_hidden_layers": 2, "layer_types": ["a", "b"]}
    assert (cut / "model.safetensors").read_bytes() == b"weights"
    with pytest.raises(ConfigError, match=r"--layers 4: .* has 3 layers"):
        cut_model(source, tmp_path / "more", 4)
