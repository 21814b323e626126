"""Several sources of prompts as one order: shares by weight, each source's own epochs, and resuming anywhere."""

from __future__ import annotations

import json
import tomllib
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_gspo.config import RunConfig, dump, parse
from megatron_gspo.config.inputs import missing
from megatron_gspo.data import PromptCursor
from megatron_gspo.data.curriculum import Curriculum
from megatron_gspo.data.mixture import MixtureCursor, Source, mix
from megatron_gspo.data.prompts import load_prompts
from megatron_gspo.errors import ConfigError, DataError
from megatron_gspo.train.progress import Progress
from tests.unit.test_config import tree
from tests.unit.test_data_prompts import TOKENIZER

PARTS = [("math", 7, 2.0), ("code", 11, 1.0), ("chat", 3, 0.25)]

sources = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 400)), min_size=1, max_size=6).map(
    lambda each: [(f"s{i}", count, weight / 100) for i, (count, weight) in enumerate(each)]
)


@settings(max_examples=60, deadline=None)
@given(parts=sources, takes=st.lists(st.integers(0, 9), max_size=20), seed=st.integers(0, 2**63 - 1))
def test_after_any_step_each_source_has_given_its_share_within_one(
    parts: list[tuple[str, int, float]], takes: list[int], seed: int
) -> None:
    cursor = MixtureCursor(parts, seed)
    total = sum(Fraction(repr(weight)) for _, _, weight in parts)
    given_: Counter[int] = Counter()
    for n in takes:
        given_.update(map(cursor.source_of, cursor.take(n)))
        for source, (_, _, weight) in enumerate(parts):
            off = abs(given_[source] - sum(given_.values()) * Fraction(repr(weight)) / total)
            assert (
                off <= 1 - Fraction(1, max(2, 2 * len(parts) - 2)) if len(parts) > 1 else off == 0
            )  # Tijdeman's bound


def test_at_every_single_prompt_no_share_is_off_by_more_than_tijdeman_s_bound() -> None:
    draw = np.random.default_rng(0)
    for trial in range(12):
        weights = draw.integers(1, 60, int(draw.integers(2, 8))).tolist()
        cursor = MixtureCursor([(f"s{i}", 5, float(weight)) for i, weight in enumerate(weights)], trial)
        given_ = [0] * len(weights)
        for time in range(1, 201):
            given_[cursor.source_of(cursor.take(1)[0])] += 1
            off = max(abs(n - Fraction(time * w, sum(weights))) for n, w in zip(given_, weights, strict=True))
            assert off <= 1 - Fraction(1, 2 * len(weights) - 2)


def test_a_source_visits_each_of_its_prompts_once_an_epoch_whatever_is_beside_it() -> None:
    def of(name: str, cursor: MixtureCursor, count: int) -> list[int]:
        which = cursor.names.index(name)
        start = sum(count for other, count, _ in PARTS[:which]) if len(cursor.names) == 3 else 0
        own = [index - start for index in cursor.take(300) if cursor.source_of(index) == which]
        return own[:count]

    alone, beside = MixtureCursor([PARTS[0]], 5), MixtureCursor(PARTS, 5)
    first = [alone.take(1)[0] for _ in range(7)]
    drawn: list[int] = []
    while len(drawn) < 7:
        drawn += [index for index in beside.take(1) if index < 7]
    assert drawn == first and sorted(first) == list(range(7))
    assert len(of("code", MixtureCursor(PARTS, 6), 11)) == 11


def test_sources_of_one_length_have_orders_of_their_own() -> None:
    cursor = MixtureCursor([("abc", 30, 1.0), ("abd", 30, 1.0)], 0)
    drawn = [index for _ in range(60) for index in cursor.take(1)]
    first, second = ([index % 30 for index in drawn if cursor.source_of(index) == source] for source in (0, 1))
    assert sorted(first) == sorted(second) and first != second


def test_what_one_step_draws_is_shuffled_over_its_places() -> None:
    cursor = MixtureCursor([("a", 50, 1.0), ("b", 50, 1.0)], 0)
    steps = [[cursor.source_of(index) for index in cursor.take(8)] for _ in range(40)]
    assert all(sorted(step) == [0, 0, 0, 0, 1, 1, 1, 1] for step in steps)
    first_places = [step[0] for step in steps]
    assert 8 < sum(first_places) < 32 and len({tuple(step) for step in steps}) > 20


@pytest.mark.parametrize("before", [0, 1, 9, 40])
def test_a_resumed_mixture_continues_where_it_was_saved(before: int) -> None:
    cursor = MixtureCursor(PARTS, seed=1)
    cursor.instead(cursor.take(before)[:3])
    resumed = MixtureCursor(PARTS, seed=1)
    resumed.load_state_dict(json.loads(json.dumps(cursor.state_dict())))
    assert [resumed.take(5) for _ in range(9)] == [cursor.take(5) for _ in range(9)]


def test_what_stands_in_for_a_bad_prompt_is_of_its_source_and_leaves_the_shares_as_they_are() -> None:
    plain, mended = MixtureCursor(PARTS, 3), MixtureCursor(PARTS, 3)
    for _ in range(20):
        wanted, indices = plain.take(6), mended.take(6)
        bad = [index for index in indices if index % 5 == 0]
        assert list(map(mended.source_of, mended.instead(bad))) == list(map(mended.source_of, bad))
        assert list(map(plain.source_of, wanted)) == list(map(mended.source_of, indices))


@pytest.mark.parametrize(
    "other",
    [
        MixtureCursor(PARTS, 4),
        MixtureCursor(PARTS[:2], 3),
        MixtureCursor([("math", 7, 1.0), *PARTS[1:]], 3),
        MixtureCursor([("maths", 7, 2.0), *PARTS[1:]], 3),
        PromptCursor(21, 3),
    ],
)
def test_another_mixture_is_not_continued(other: MixtureCursor | PromptCursor) -> None:
    with pytest.raises(DataError, match="the checkpoint's cursor"):
        MixtureCursor(PARTS, 3).load_state_dict(dict(other.state_dict()))
    with pytest.raises(DataError, match="the checkpoint's cursor"):
        other.load_state_dict(MixtureCursor(PARTS, 3).state_dict())  # type: ignore[arg-type]


def test_accepted_changes_of_the_sources_begin_a_new_order() -> None:
    state = Progress(PromptCursor(21, 3), outer_steps=2).state_dict()
    progress = Progress(MixtureCursor(PARTS, 3))
    with pytest.raises(DataError):
        progress.load_state_dict(state)
    progress.load_state_dict(state, accepted=["data.sources"])
    assert progress.outer_steps == 2 and progress.cursor.take(5) == MixtureCursor(PARTS, 3).take(5)


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    for name, count in (("math", 5), ("code", 3)):
        rows = [{"prompt": f"{n}+1=", "answer": str(n + 1)} for n in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [tmp_path / "math.jsonl", tmp_path / "code.jsonl"]


def test_prompts_of_a_source_have_its_name_in_their_id_and_their_own_place(
    files: list[Path],
) -> None:
    parts = [Source(path.stem, 1.0, load_prompts(path, tokenizer=TOKENIZER, chat_template=False)) for path in files]
    mixed = mix(parts)
    assert len(mixed) == 8 and [prompt.id for prompt in mixed.prompts][4:6] == ["math/line-5", "code/line-1"]
    assert {prompt.source for prompt in mixed.prompts} == {"math", "code"}
    assert mixed.place(5) == f"{files[1]}, line 1" and mixed.prompts[-1] == mixed.prompts[7]
    assert len({prompt.id for prompt in mixed.prompts}) == 8
    swapped = mix(parts[::-1])
    assert mixed.looked.fingerprint() != swapped.looked.fingerprint() == swapped.looked.fingerprint()
    with pytest.raises(IndexError):
        mixed.prompts[8]


def config(*given_: dict[str, Any], **data: Any) -> RunConfig:
    made = tree(data={"sources": list(given_), **data})
    if given_ and "path" not in data:
        del made["data"]["path"]
    return parse(made)


A, B = {"name": "a", "path": "a.jsonl"}, {"name": "b", "path": "b.jsonl", "weight": 3.0}


@pytest.mark.parametrize(
    ("sources", "data", "problem"),
    [
        ([A | {"weight": 0.0}], {}, "data.sources.0.weight = 0.0: input should be greater than 0"),
        ([A | {"weight": -1.0}], {}, "data.sources.0.weight = -1.0: input should be greater than 0"),
        ([A, A], {}, "two sources are called 'a': give each its own name"),
        ([A | {"name": "a b"}], {}, "data.sources.0.name: 'a b' is no word of letters, digits, - and _"),
        ([A | {"name": "a/b"}], {}, "'a/b' is no word"),
        ([A | {"name": ""}], {}, "'' is no word"),
        ([{"name": "a"}], {}, "data.sources.0.path is missing"),
        ([A | {"reward": {}}], {}, "data.sources.0.reward.function is missing"),
        ([A], {"path": "p.jsonl"}, "path = 'p.jsonl' and sources: name the training prompts once"),
        ([A], {"limit": 3}, "limit = 3 with sources: give each source its own"),
        ([], {"path": ""}, "path is empty: name a file of training prompts, or sources"),
        ([], {"curriculum": "variance", "curriculum_floor": 1e-6}, "greater than or equal to 0.01"),
        ([], {"curriculum_floor": 0.5}, 'curriculum_floor = 0.5 has no effect with curriculum = "off"'),
        ([A | {"format": "xml"}], {}, "data.sources.0.format = 'xml'"),
    ],
)
def test_what_sources_cannot_be_is_one_line(sources: list[dict[str, Any]], data: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config(*sources, **data)
    assert problem in str(caught.value) and "\n" not in str(caught.value)


def test_sources_inherit_what_they_do_not_say_and_are_dumped_whole(tmp_path: Path) -> None:
    own = {"function": "math", "options": {}}
    made = config(A, B | {"reward": own, "format": "gsm8k"}, format="verl", answer_field="solution")
    first, second = (made.data.of_source(source) for source in made.data.sources)
    assert (first.path, first.format, first.answer_field) == ("a.jsonl", "verl", "solution")
    assert (second.path, second.format, second.answer_field) == ("b.jsonl", "gsm8k", "solution")
    rewards = [source.reward_config(made.reward).function for source in made.data.sources]
    assert rewards == ["exact", "math"]
    (tmp_path / "config.toml").write_text(dump(made))
    assert parse(tomllib.loads(dump(made))) == made
    assert set(missing(made)) == {"model.path", "data.sources.a.path", "data.sources.b.path"}


def test_supervised_fine_tuning_has_no_sources() -> None:
    made = tree(data={"sources": [A]}, algorithm={"name": "sft"})
    del made["data"]["path"]
    with pytest.raises(ConfigError, match=r"data\.sources is about the prompts of rollouts, and sft has none"):
        parse(made)


# The curriculum.


def test_a_prompt_is_kept_with_a_probability_that_halves_with_each_group_without_variance() -> None:
    order = Curriculum(PromptCursor(4, 0), 0, floor=0.125)
    for expected in (0.5, 0.25, 0.125, 0.125):
        order.record({0: "hard", 1: "easy"})
        assert (order.kept(0), order.kept(1), order.kept(2)) == (expected, expected, 1.0)
    assert order.shares() == (0.25, 0.25)
    order.record({0: "varied"})
    assert order.kept(0) == 1.0 and order.shares() == (0.25, 0.0)


def test_off_or_without_a_group_of_equal_rewards_the_order_is_the_plain_one() -> None:
    order, plain = Curriculum(PromptCursor(10, 3), 3, floor=0.1), PromptCursor(10, 3)
    for _ in range(12):
        taken = order.take(4)
        assert taken == plain.take(4)
        order.record(dict.fromkeys(taken, "varied"))
    assert order.passed_over == 0


HOPELESS = 200
"""Of 400 prompts."""


def run_simulated(floor: float, steps: int, order: Curriculum | None = None) -> tuple[Curriculum, list[list[int]]]:
    """Steps of 40 prompts, of which the first half of the set never has variance."""
    order = order or Curriculum(PromptCursor(400, 1), 1, floor)
    drawn = []
    for _ in range(steps):
        taken = order.take(40)
        order.record({index: "hard" if index < HOPELESS else "varied" for index in taken})
        drawn.append(taken)
    return order, drawn


@pytest.mark.parametrize("floor", [0.5, 0.25, 0.0625])
def test_the_share_of_groups_with_variance_rises_by_what_the_formula_gives(floor: float) -> None:
    _, drawn = run_simulated(floor, 400)
    late = [index for step in drawn[200:] for index in step]
    share = sum(index >= HOPELESS for index in late) / len(late)
    expected = 1 / (1 + floor)  # each turn of a hopeless prompt, which has failed often, is kept at the floor
    assert abs(share - expected) < 0.02
    early = [index for step in drawn[:10] for index in step]
    assert sum(index >= HOPELESS for index in early) / len(early) == 0.5  # the first epoch knows nothing


def test_a_killed_and_resumed_curriculum_draws_the_same_prompts() -> None:
    _, whole = run_simulated(0.125, 60)
    order, first = run_simulated(0.125, 25)
    state = json.loads(json.dumps(order.state_dict()))
    resumed = Curriculum(PromptCursor(400, 1), 1, 0.125)
    resumed.load_state_dict(state)
    assert resumed.passed_over == order.passed_over > 0 and resumed.shares() == order.shares()
    _, rest = run_simulated(0.125, 35, resumed)
    assert first + rest == whole
    assert run_simulated(0.125, 60)[1] == whole != run_simulated(0.25, 60)[1]


def test_a_curriculum_over_a_mixture_keeps_the_shares_of_the_sources() -> None:
    parts = [("dull", 100, 1.0), ("bright", 100, 3.0)]
    mixture = MixtureCursor(parts, 2)
    order = Curriculum(mixture, 2, 0.1)
    given_: Counter[int] = Counter()
    for _ in range(100):
        taken = order.take(8)
        given_.update(map(mixture.source_of, taken))
        order.record({index: "easy" if index < 50 else "varied" for index in taken})
    assert given_ == {0: 200, 1: 600} and order.passed_over > 20
    resumed = Curriculum(MixtureCursor(parts, 2), 2, 0.1)
    resumed.load_state_dict(json.loads(json.dumps(order.state_dict())))
    assert resumed.take(30) == order.take(30)


def test_a_checkpoint_without_a_curriculum_is_continued_with_nothing_known() -> None:
    plain = PromptCursor(10, 3)
    plain.take(7)
    order = Curriculum(PromptCursor(10, 3), 3, 0.1)
    order.load_state_dict(plain.state_dict())
    assert order.take(6) == plain.take(6) and order.shares() == (0.0, 0.0)
    other = Curriculum(PromptCursor(12, 3), 3, 0.1)
    state = {**PromptCursor(12, 3).state_dict(), "curriculum": order.state_dict()["curriculum"]}
    with pytest.raises(DataError, match="knows 10 prompts, and there are 12"):
        other.load_state_dict(state)
