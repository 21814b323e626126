"""A comparison with known effects: what its numbers and its sentences say of them."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_gspo.errors import DataError
from megatron_gspo.report.comparison import digest, draw
from megatron_gspo.report.comparison.analysis import analyse, final_steps
from megatron_gspo.report.comparison.cells import Arm, Comparison, read, short_names
from megatron_gspo.report.comparison.contrasts import contrasts
from megatron_gspo.report.comparison.page import arm_rows, progress, settings, title
from megatron_gspo.report.comparison.page import result as page_result
from megatron_gspo.report.comparison.sentences import findings, limits, signed, times_text
from megatron_gspo.report.metrics import by_outer_step
from tests.unit.comparison_cases import MATRIX, STEPS, effects, make_comparison, make_digest, make_plan, write
from tests.unit.report_runs import make_report, make_run

CELL: dict[str, Any] = {
    "arm": "gspo-off",
    "loss": "gspo",
    "replay": "off",
    "dense": False,
    "seed": 3,
    "cold_start": "runs/a",
    "wall_s": 81.5,
    "peak_memory_mb": 712.0,
}


def said(comparison: Comparison) -> list[str]:
    return [finding.text for finding in findings(comparison, analyse(comparison))]


def unsaid(comparison: Comparison) -> str:
    return "\n".join(limits(comparison, analyse(comparison)))


def result(comparison: Comparison, name: str) -> Any:
    return next(one for one in analyse(comparison).results if one.contrast.name == name)


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    return read(
        make_comparison(tmp_path_factory.mktemp("known") / "out", (*MATRIX, "grpo-dense", "gspo-dense"), final=effects)
    )


def test_the_contrasts_are_losses_replay_modes_and_what_each_loss_gains():
    arms = [Arm(name, *name.split("-")) for name in MATRIX]
    assert [contrast.name for contrast in contrasts(arms)] == [
        "gspo-off − grpo-off",
        "gspo-r2 − grpo-r2",
        "gspo-r3 − grpo-r3",
        "grpo-r2 − grpo-off",
        "grpo-r3 − grpo-off",
        "grpo-r3 − grpo-r2",
        "gspo-r2 − gspo-off",
        "gspo-r3 − gspo-off",
        "gspo-r3 − gspo-r2",
        "(gspo-r2 − gspo-off) − (grpo-r2 − grpo-off)",
        "(gspo-r3 − gspo-off) − (grpo-r3 − grpo-off)",
    ]
    gain = contrasts(arms)[9]
    assert gain.value({"gspo-r2": 0.8, "gspo-off": 0.7, "grpo-r2": 0.6, "grpo-off": 0.3}.__getitem__) == pytest.approx(
        -0.2
    )
    assert [contrast.name for contrast in contrasts(arms[:1])] == []


def test_an_arm_that_is_better_by_a_tenth_in_every_seed_is_said_to_be(known: Comparison):
    text = next(text for text in said(known) if text.startswith("gspo-off ended"))
    assert text.startswith("gspo-off ended higher than grpo-off, by 0.099 (interval +0.094 to +0.103; p = 0.00034)")
    assert said(known)[0].startswith(
        "3 of 11 differences in final reward could be shown, with 16 seeds from 4 cold starts."
    )


def test_the_differences_are_within_seeds_and_the_cold_starts_spread_is_not_in_them(known: Comparison):
    """Rewards of an arm differ by 0.09 from cold start to cold start; the difference of arms does not."""
    one = result(known, "gspo-off − grpo-off")
    expected = [effects("gspo-off", seed) - effects("grpo-off", seed) for seed in range(16)]
    assert one.differences == pytest.approx(expected, abs=1e-4)
    assert one.mean.value == pytest.approx(sum(expected) / 16, abs=1e-4)
    assert one.mean.high - one.mean.low < 0.02
    of_arm = analyse(known).arms["gspo-off"]["final"]["reward"]
    assert of_arm.high - of_arm.low > 0.1
    assert (one.p, one.p_holm) == (2.0**-15, 11 * 2.0**-15)


def test_noise_is_said_to_show_no_difference(known: Comparison):
    text = next(text for text in said(known) if text.startswith("gspo-r2 against gspo-off"))
    assert (
        text
        == "gspo-r2 against gspo-off: no difference could be shown; the interval −0.017 to +0.020 includes 0 (p = 1)."
    )
    assert "does not mean that there is none" in unsaid(known)


def test_the_gain_from_replay_is_compared_between_losses(tmp_path: Path):
    """R2 gives GRPO 0.2 and GSPO nothing: the paper's claim, which no pair of arms alone would show."""
    gain = lambda arm, seed: 0.5 + (0.2 if arm == "grpo-r2" else 0.0) + 0.001 * (seed % 5) * len(arm)  # noqa: E731
    comparison = read(make_comparison(tmp_path / "out", ("grpo-off", "grpo-r2", "gspo-off", "gspo-r2"), final=gain))
    text = next(text for text in said(comparison) if text.startswith("gspo gained"))
    assert text.startswith("gspo gained less from r2 than grpo, by 0.200 (interval −0.2")


def test_a_difference_in_one_cold_start_is_not_claimed_for_others(tmp_path: Path):
    """One cold start of four gives 0.4. All seeds agree in sign: the p is small, the interval over four means wide."""
    final = lambda arm, seed: 0.5 + ((0.4 if seed % 4 == 0 else 0.001) + 1e-4 * seed) * (arm == "gspo-off")  # noqa: E731
    comparison = read(make_comparison(tmp_path / "out", ("grpo-off", "gspo-off"), final=final))
    one = result(comparison, "gspo-off − grpo-off")
    assert (one.verdict, one.p) == ("here", 2.0**-15)
    assert one.mean.low < 0 < one.mean.high
    text = next(text for text in said(comparison) if text.startswith("gspo-off ended higher"))
    assert "from these cold starts" in text and "4 cold starts cannot show" in text


def test_two_cold_starts_say_that_another_may_differ(tmp_path: Path):
    comparison = read(make_comparison(tmp_path / "out", cold_starts=2, final=effects))
    assert "With 2 cold starts, fewer than 3, intervals are over seeds" in unsaid(comparison)
    assert not result(comparison, "gspo-off − grpo-off").mean.clustered


def test_few_seeds_can_prove_nothing_and_it_says_so(tmp_path: Path):
    comparison = read(make_comparison(tmp_path / "out", seeds=4, final=effects))
    assert "With 4 seeds the test's smallest p is 0.125, times 11" in unsaid(comparison)
    assert result(comparison, "gspo-off − grpo-off").verdict == "uncorrected"
    text = next(text for text in said(comparison) if text.startswith("gspo-off against grpo-off"))
    assert "not shown; the interval" in text and "leaves 0 out, but p = 1 after correction" in text


def test_one_seed_has_numbers_and_no_intervals(tmp_path: Path):
    comparison = read(
        make_comparison(tmp_path / "out", ("grpo-off", "gspo-off"), seeds=1, cold_starts=1, final=effects)
    )
    texts = said(comparison)
    assert texts[0].startswith("No difference in final reward could be tested")
    assert texts[1] == "gspo-off against grpo-off: +0.108 in one seed, which says nothing of other seeds."
    assert "there are no intervals" in unsaid(comparison)


def test_arms_that_are_equal_in_every_seed_are_said_to_be(tmp_path: Path):
    comparison = read(
        make_comparison(tmp_path / "out", ("gspo-off", "gspo-r2"), final=lambda arm, seed: 0.5 + seed / 100)
    )
    assert result(comparison, "gspo-r2 − gspo-off").verdict == "equal"
    assert "gspo-r2 against gspo-off: equal final rewards in every one of 16 seeds." in said(comparison)


def test_the_dense_twin_is_described_and_not_tested(known: Comparison):
    one = result(known, "gspo-dense − grpo-dense")
    assert one.p is None and one.p_holm is None
    assert any(
        "gspo-dense against grpo-dense, a control that is described and not tested: +0.1" in text
        for text in said(known)
    )
    assert "the dense twin, another network" in unsaid(known)


def test_unfinished_and_failed_cells_are_counted_and_left_out(tmp_path: Path):
    out = make_comparison(tmp_path / "out", ("grpo-off", "gspo-off"), seeds=6, final=effects)
    (out / "cells/gspo-off/seed_005.json").unlink()
    broken = make_digest("grpo-off", 1, "runs/cold/b/hf", 0.0, status="failed", error="NaN in sequence 3")
    write(out, json.loads((out / "compare.json").read_text()), [broken])
    comparison = read(out)
    assert progress(comparison) == ("failed", "10 of 12 cells finished, 1 failed")
    assert result(comparison, "gspo-off − grpo-off").seeds == (0, 2, 3, 4)
    assert "1 cell failed (grpo-off seed 1) and counts nowhere" in unsaid(comparison)
    assert "11 of 12 cells have ended" in unsaid(comparison)
    assert analyse(comparison).arms["grpo-off"]["finished"] == 5


def test_a_missing_arm_leaves_its_contrasts_open(tmp_path: Path):
    plan = make_plan(("grpo-off", "gspo-off"), range(3), ["runs/a"])
    out = write(tmp_path / "out", plan, [make_digest("grpo-off", seed, "runs/a", 0.5) for seed in range(3)])
    comparison = read(out)
    assert result(comparison, "gspo-off − grpo-off").verdict == "missing"
    assert "gspo-off against grpo-off: no seed has finished in every arm of it." in said(comparison)
    assert arm_rows(comparison, analyse(comparison))[1][:3] == ["gspo-off", "0 of 3", "-"]


def test_the_final_reward_is_the_mean_of_the_last_five_steps(tmp_path: Path):
    plan = make_plan(("grpo-off",), [0], ["runs/a"])
    out = write(tmp_path / "out", plan, [make_digest("grpo-off", 0, "runs/a", 0.0, curve=lambda step: step / 100)])
    assert analyse(read(out)).outcomes["reward"] == {"grpo-off": {0: pytest.approx((7 + 8 + 9 + 10 + 11) / 500)}}
    plan["config"]["train"]["outer_steps"] = 5
    assert final_steps(read(write(tmp_path / "out", plan, []))) == 2


def test_the_clip_ratio_is_a_geometric_mean_over_seeds(known: Comparison):
    ratio = analyse(known).clipping[0]
    assert (ratio.metric, ratio.name, len(ratio.seeds)) == ("clip/frac_tokens", "gspo-off / grpo-off", 16)
    logs = []
    for seed in range(16):
        gspo, grpo = (known.of(arm)[seed].values("clip/frac_tokens") for arm in ("gspo-off", "grpo-off"))
        logs.append(math.log(sum(gspo) / sum(grpo)))
    assert ratio.mean is not None and ratio.mean.value == pytest.approx(math.exp(sum(logs) / 16))
    assert ratio.mean.low is not None and 35 < ratio.mean.low < ratio.mean.value < 46


def test_seeds_that_clip_nothing_have_no_ratio_and_are_counted(tmp_path: Path):
    out = make_comparison(tmp_path / "out", ("grpo-off", "gspo-off"), seeds=4)
    for seed in (0, 1):
        path = out / f"cells/grpo-off/seed_{seed:03d}.json"
        changed = json.loads(path.read_text())
        changed["series"]["clip/frac_tokens"] = [0.0] * STEPS
        path.write_text(json.dumps(changed))
    ratio = analyse(read(out)).clipping[0]
    assert (ratio.seeds, ratio.left_out) == ((2, 3), 2)
    assert any("2 seeds with a 0 left out" in text for text in said(read(out)))


def test_replay_costs_what_it_takes_over_off(known: Comparison):
    costs = {(ratio.metric, ratio.name): ratio.mean for ratio in analyse(known).costs}
    wall = costs["wall_s", "gspo-r2 / gspo-off"]
    assert wall is not None and wall.value == pytest.approx(1.03)
    train = costs["time/train", "gspo-r2 / gspo-off"]
    assert train is not None and train.low is not None and train.high is not None
    assert train.low < 1.05 < train.high


def test_collapses_are_counted_by_arm_with_their_steps(tmp_path: Path):
    plan = make_plan(("grpo-off", "gspo-off"), range(2), ["runs/a"])
    falls = lambda step: 0.8 if step < 5 else 0.0  # noqa: E731
    cells = [make_digest("grpo-off", 0, "runs/a", 0, curve=falls), make_digest("grpo-off", 1, "runs/a", 0.8)]
    comparison = read(
        write(tmp_path / "out", plan, [*cells, *(make_digest("gspo-off", s, "runs/a", 0.8) for s in range(2))])
    )
    assert analyse(comparison).arms["grpo-off"]["collapsed"] == {0: 8}
    collapsed = "grpo-off in 1 of 2 cells (outer step 8); no other arm."
    assert f"Collapsed (five-step mean reward under half of its peak): {collapsed}" in said(comparison)


def test_an_emulated_gap_is_said(tmp_path: Path):
    out = make_comparison(tmp_path / "out", seeds=2)
    plan = json.loads((out / "compare.json").read_text())
    plan["config"]["sync"] = {"router_noise": 0.02}
    assert "noise of 0.02, relative, on the router weights" in unsaid(read(write(out, plan, [])))


def test_every_setting_is_there_with_what_each_arm_has(known: Comparison):
    rows = {row.name: row for row in settings(known)}
    assert rows["algorithm.clip_low"].values == ["0.2"] * 3 + ["0.001"] * 3 + ["0.2", "0.001"]
    assert rows["replay.mode"].differs and not rows["optimizer.lr"].differs
    assert title(known) == "grpo and gspo, with replay off, r2 and r3"


def test_a_digest_has_the_runs_numbers_in_a_few_kilobytes(tmp_path: Path):
    run = make_run(tmp_path / "run", outer_steps=30)
    found = digest(run.path, CELL)
    assert found["cell"] == CELL and found["status"] == "finished" and found["outer_steps"] == 12
    outer = by_outer_step(line for line in run.metrics() if line["outer_step"] >= 0)
    assert found["series"]["reward/mean"] == [pytest.approx(record["reward/mean"], rel=5e-4) for record in outer]
    assert [value is not None for value in found["series"]["eval/accuracy"]] == [step % 5 == 4 for step in range(30)]
    assert found["initial"] == {"eval/accuracy": 0.6, "eval/greedy_accuracy": 0.65}
    assert found["clip_range"] == [1e-3, 1.33e-3]
    assert len(json.dumps(found)) < 20_000


def test_a_digest_keeps_how_far_a_ratio_is_from_1(tmp_path: Path):
    run = make_run(tmp_path / "run", outer_steps=2)
    kept = digest(run.path, CELL)["series"]["ratio/p99"][1]
    assert kept - 1 == pytest.approx(make_report(1, 3).metrics["ratio/p99"] - 1, rel=1e-4)


def test_a_digest_has_the_profile_over_mini_batches(tmp_path: Path):
    run = make_run(tmp_path / "run", outer_steps=3)
    expected = [sum(make_report(step, m).metrics["clip/frac_tokens"] for step in range(3)) / 3 for m in range(4)]
    assert digest(run.path, CELL)["by_minibatch"]["clip/frac_tokens"] == pytest.approx(expected, rel=1e-3)


def test_a_digest_of_layers_has_the_drift_that_an_outer_step_ends_with(tmp_path: Path):
    run = make_run(tmp_path / "run", outer_steps=1)
    lines = [{"step": m, "outer_step": 0, "minibatch": m, "route/drift/layer_07": m / 100} for m in range(4)]
    run.metrics_file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert digest(run.path, CELL)["series"] == {"route/drift/layer_07": [0.03]}


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("compare.json", "{}", "not a comparison's plan"),
        ("compare.json", "[", "is no JSON"),
        ("cells/grpo-off/seed_000.json", "[]", "not a JSON object"),
        (
            "cells/grpo-off/seed_000.json",
            '{"cell": {"arm": "gspo-off", "seed": 0}}',
            "not the digest of grpo-off with seed 0",
        ),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(tmp_path: Path, file: str, text: str, message: str):
    out = make_comparison(tmp_path / "out", ("grpo-off", "gspo-off"), seeds=2)
    (out / file).write_text(text)
    with pytest.raises(DataError, match=message):
        draw(out)


def test_nothing_finished_is_still_a_page(tmp_path: Path):
    out = write(tmp_path / "out", make_plan(MATRIX, range(4), ["runs/a"]), [])
    draw(out)
    assert json.loads((out / "comparison.json").read_text())["cells"] == {"planned": 24, "finished": 0, "failed": 0}


def test_the_json_has_what_the_page_says(tmp_path: Path):
    out = make_comparison(tmp_path / "out", ("grpo-off", "gspo-off"), final=effects)
    draw(out)
    found = json.loads((out / "comparison.json").read_text())
    (reward, accuracy) = found["contrasts"]
    assert (reward["name"], reward["verdict"], len(reward["differences"])) == ("gspo-off − grpo-off", "higher", 16)
    assert reward["p"] == reward["p_holm"] == 2.0**-15
    assert accuracy["outcome"] == "accuracy"
    assert found["arms"]["gspo-off"]["values"]["reward"]["3"] == pytest.approx(effects("gspo-off", 3), abs=1e-4)
    assert found["shows"][1].startswith("gspo-off ended higher than grpo-off, by 0.099")


def test_names_are_as_short_as_they_can_be():
    assert short_names(["runs/a/hf", "runs/b/hf"]) == {"runs/a/hf": "a/hf", "runs/b/hf": "b/hf"}
    assert short_names(["runs/a"]) == {"runs/a": "a"}
    assert (signed(-0.1), signed(0.00004), times_text(12345.6)) == ("−0.100", "0.000", "12,300")


def kept_in_lines(out: Path) -> Path:
    """The same comparison with its digests as lines of one file."""
    digests = sorted(out.glob("cells/*/*.json"))
    (out / "cells.jsonl").write_text("".join(path.read_text() + "\n" for path in digests))
    shutil.rmtree(out / "cells")
    return out


def test_digests_in_one_file_draw_the_same_page_as_digests_in_a_directory(tmp_path: Path):
    out = make_comparison(tmp_path / "out", seeds=4, final=effects)
    draw(out)
    before, page = (out / "comparison.json").read_text(), (out / "report.html").read_text()
    cells = read(out).cells
    assert read(kept_in_lines(out)).cells == cells and len(cells) == 24
    draw(out)
    assert (out / "comparison.json").read_text() == before
    written = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC")
    assert written.sub("", (out / "report.html").read_text()) == written.sub("", page)


def test_a_cell_that_is_run_after_the_others_were_put_together_counts_too(tmp_path: Path):
    out = kept_in_lines(make_comparison(tmp_path / "out", ("grpo-off", "gspo-off"), seeds=2))
    lines = (out / "cells.jsonl").read_text().splitlines()
    (out / "cells.jsonl").write_text("\n".join(lines[:3]))
    write(out, json.loads((out / "compare.json").read_text()), [json.loads(lines[3]), json.loads(lines[0])])
    assert [(cell.arm, cell.seed) for cell in read(out).cells] == [
        (a, s) for a in ("grpo-off", "gspo-off") for s in (0, 1)
    ]
    (out / "cells/grpo-off/seed_000.json").write_text(lines[0].replace("finished", "failed"))
    with pytest.raises(DataError, match=r"cells\.jsonl differ in grpo-off with seed 0: remove the one that is wrong"):
        draw(out)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[", r"cells\.jsonl, line 2 is no JSON"),
        ("[]", r"cells\.jsonl, line 2: not a JSON object"),
        ("{}", r"line 2: not the digest of a cell that compare\.json plans \(no arm and seed\)"),
        ('{"cell": {"arm": "grpo-off", "seed": 9}}', r"plans \(\('grpo-off', 9\)\)"),
        ('{"cell": {"arm": "grpo-off", "seed": true}}', "no arm and seed"),
        ("first", "line 2: grpo-off with seed 0 is there twice"),
    ],
)
def test_a_line_that_cannot_be_read_is_refused_by_its_number(tmp_path: Path, line: str, message: str):
    out = kept_in_lines(make_comparison(tmp_path / "out", ("grpo-off", "gspo-off"), seeds=2))
    first, *others = (out / "cells.jsonl").read_text().splitlines()
    (out / "cells.jsonl").write_text("\n".join([first, first if line == "first" else line, *others]))
    with pytest.raises(DataError, match=message):
        draw(out)


@pytest.mark.parametrize("name", ["no-gap", "gap", "fast", "dense"])
def test_the_numbers_in_the_docs_come_from_the_digests_beside_them(name: str):
    kept = Path(__file__).parents[2] / "docs" / "comparison" / name
    comparison = read(kept)
    assert len(comparison.cells) == comparison.planned
    again = page_result(comparison, analyse(comparison))
    assert json.loads(json.dumps(again)) == json.loads((kept / "comparison.json").read_text())
