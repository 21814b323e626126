"""Published suites: files, prompts, drawing, figures; each from its files to its result within this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_gspo.algorithm.elo import win_probability
from megatron_gspo.cli import main
from megatron_gspo.config import DataConfig
from megatron_gspo.errors import ConfigError, DataError
from megatron_gspo.report.evaluation import format_result
from megatron_gspo.rollout.engine import EVALUATION, Sampling
from megatron_gspo.rollout.sglang.reply import generation_request
from megatron_gspo.suites import codeforces
from megatron_gspo.suites.base import STEP_BY_STEP, Problem
from megatron_gspo.suites.catalog import SUITES, find_suite, read_all_asked, read_asked
from megatron_gspo.suites.contamination import Overlap, find_overlap, training_texts
from megatron_gspo.suites.files import read_problems
from megatron_gspo.suites.gpqa import letter
from megatron_gspo.suites.mathematics import final_form
from megatron_gspo.types import Prompt
from tests.unit import suite_files
from tests.unit.suite_engine import killed_after, standing_in, write_model
from tests.unit.suite_files import FILES, codeforces_row

Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("suites") / "model")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("published")
    for write in FILES.values():
        write(directory)
    return directory


def answers_half(prompt: Prompt, draw: int) -> str:
    """Right for even draws; what is wrong is one of three answers."""
    said = prompt.answer.rpartition("#### ")[2] if draw % 2 == 0 else f"{1000 + draw % 3}"
    return f"So \\boxed{{{said}}}.\n```python\n{'right' if draw % 2 == 0 else 'wrong'}\n```"


def evaluate(capsys: Captured, model: Path, *arguments: str) -> dict[str, Any]:
    assert main(["eval", str(model), *arguments, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def refusal(capsys: Captured, *arguments: object) -> str:
    assert main(["eval", *map(str, arguments)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


# ---------------------------------------------------------------------------------------------------- whole suites


def test_every_suite_is_read_asked_graded_and_measured(
    model: Path, data: Path, tmp_path: Path, capsys: Captured
) -> None:
    asked = ",".join(name if name in ("gsm8k", "humaneval", "mbpp") else f"{name}:k=4" for name in SUITES)
    with standing_in(answers_half) as engine:
        found = evaluate(capsys, model, "--suite", asked, "--data", str(data), "--out", str(tmp_path / "out"))
    assert set(found) == set(SUITES) == set(FILES)
    counts = {name: result["result"]["prompts"] for name, result in found.items()}
    expected = {"aime24": 3, "aime25": 4, "math500": 2, "gsm8k": 2, "gpqa-diamond": 6}
    assert counts == expected | {"lcb": 2, "codeforces": 3, "humaneval": 1, "mbpp": 2}
    assert len(engine.asked) == sum(counts.values())
    for name, result in found.items():
        shown = json.loads((tmp_path / "out" / name / "result.json").read_text())
        assert shown == result and result["schema"] == "megatron-gspo/evaluation/1"
        rewards = [reward for problem in result["problems"] for reward in problem["rewards"]]
        assert result["result"]["estimates"]["accuracy"]["value"] == pytest.approx(np.mean(rewards))
        lines = (tmp_path / "out" / name / "samples.jsonl").read_text().splitlines()
        assert [json.loads(line)["reward"] for line in lines] == rewards
    everything = [
        reward for result in found.values() for problem in result["problems"] for reward in problem["rewards"]
    ]
    assert 0.3 < np.mean(everything) < 0.7
    summary = json.loads((tmp_path / "out/summary.json").read_text())["suites"]
    assert summary["codeforces"]["figure"] == "elo" and summary["aime24"]["figure"] == "accuracy"
    assert "maj@4" in found["aime24"]["result"]["estimates"] and "maj@4" not in found["lcb"]["result"]["estimates"]


def test_a_suite_is_drawn_as_it_says_and_truncated_sampling_reaches_the_server(
    model: Path, data: Path, tmp_path: Path, capsys: Captured
) -> None:
    with standing_in(answers_half) as engine:
        evaluate(capsys, model, "--suite", "aime24,gsm8k", "--data", str(data), "--out", str(tmp_path / "out"))
    aime, gsm8k = engine.sampling
    assert (aime.group_size, aime.temperature, aime.top_p, aime.top_k, aime.greedy) == (32, 1.0, 0.7, -1, False)
    assert (gsm8k.group_size, gsm8k.greedy) == (1, True)
    prompt = Prompt("p", "1", (1,), "")
    parameters = generation_request(prompt, [0], aime)["sampling_params"][0]
    assert parameters["top_p"] == 0.7 and "top_k" not in parameters
    assert generation_request(prompt, [0], gsm8k)["sampling_params"][0]["temperature"] == 0.0


def test_training_cannot_draw_truncated_responses() -> None:
    with pytest.raises(ValueError, match=r"top_p = 0.7, top_k = -1 in outer step 3: training needs the logprobs"):
        Sampling(8, 1.0, 16, (0,), outer_step=3, top_p=0.7)
    with pytest.raises(ValueError, match="top_k = 20 in outer step 0"):
        Sampling(8, 1.0, 16, (0,), top_k=20)
    assert Sampling(8, 1.0, 16, (0,), outer_step=EVALUATION, top_k=20).top_k == 20
    plain = generation_request(Prompt("p", "1", (1,), ""), [0], Sampling(1, 1.0, 16, (0,)))["sampling_params"][0]
    assert set(plain) == {"temperature", "max_new_tokens", "stop_token_ids"}, "training's request is as it was"


def test_an_evaluation_that_is_killed_goes_on_and_gives_the_same_files(
    model: Path, data: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--suite", "aime25:k=4,gpqa-diamond:k=2", "--data", str(data)]
    with standing_in(answers_half):
        evaluate(capsys, model, *arguments, "--out", str(tmp_path / "whole"))
    monkeypatch.chdir(tmp_path)
    for dies_after in (2, 1, 3):
        killed_after(dies_after, answers_half, [str(model), *arguments])
    capsys.readouterr()
    with standing_in(answers_half) as engine:
        assert main(["eval", str(model), *arguments]) == 0
    assert "2 responses, goes on: 3 problems have theirs" in capsys.readouterr().err
    (out,) = (tmp_path / "evals").iterdir()
    for name in ("aime25", "gpqa-diamond"):
        for file in ("settings.json", "samples.jsonl", "result.json"):
            assert (out / name / file).read_bytes() == (tmp_path / "whole" / name / file).read_bytes()
    assert (out / "summary.json").read_bytes() == (tmp_path / "whole/summary.json").read_bytes()
    clock = json.loads((out / "gpqa-diamond/clock.json").read_text())
    assert clock["starts"] == 2 and len(engine.asked) == 3, "what had arrived was not drawn again"
    assert not list(out.glob("*/responses.jsonl"))
    with standing_in(answers_half) as engine:
        evaluate(capsys, model, *arguments)
    assert not engine.asked, "what is done is not done again"
    with standing_in(answers_half):
        assert main(["eval", str(model), "--suite", "aime25:k=5", "--data", str(data), "--out", str(out)]) == 2
    assert "holds an evaluation that is done: name another" in capsys.readouterr().err


def test_responses_that_were_drawn_and_not_judged_are_judged_without_being_drawn(
    model: Path, data: Path, tmp_path: Path, capsys: Captured
) -> None:
    arguments = ["--suite", "gsm8k", "--data", str(data), "--out", str(tmp_path / "out")]
    killed_after(1, answers_half, [str(model), *arguments])
    (tmp_path / "out/gsm8k/verdicts.jsonl").write_text("")
    with standing_in(answers_half) as engine:
        found = evaluate(capsys, model, *arguments)
    assert len(engine.asked) == 1 and found["gsm8k"]["result"]["prompts"] == 2


def test_an_evaluation_of_prompts_goes_on_in_its_directory(model: Path, tmp_path: Path, capsys: Captured) -> None:
    rows = [{"prompt": f"{number}+1=", "answer": f"{number + 1}"} for number in range(6)]
    prompts = suite_files.jsonl(tmp_path / "prompts.jsonl", rows)

    def says(prompt: Prompt, draw: int) -> str:
        return prompt.answer if draw % 2 else "?"

    arguments = ["--prompts", str(prompts), "--reward", "exact", "--samples", "3", "--max-tokens", "9"]
    with standing_in(says):
        whole = evaluate(capsys, model, *arguments, "--out", str(tmp_path / "whole"))
    killed_after(4, says, [str(model), *arguments, "--out", str(tmp_path / "killed")])
    with standing_in(says) as engine:
        evaluate(capsys, model, *arguments, "--out", str(tmp_path / "killed"))
    assert len(engine.asked) == 2 and 0 < whole["result"]["estimates"]["accuracy"]["value"] < 1
    for file in ("settings.json", "samples.jsonl", "result.json"):
        assert (tmp_path / "killed" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    with standing_in(says):
        assert main(["eval", str(model), *arguments, "--out", str(tmp_path / "killed")]) == 2
    assert "holds an evaluation that is done: name another" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------- prompts


def problems_of(name: str, data: Path, *options: str) -> list[Problem]:
    return read_problems(read_asked(":".join([name, *options])), data).problems


def test_mathematical_problems_ask_for_a_box(data: Path) -> None:
    first = problems_of("aime24", data)[0]
    assert (first.id, first.answer) == ("60", "1") and first.question == f"Find $0 + 1$.\n{STEP_BY_STEP}"
    assert [problem.answer for problem in problems_of("aime25", data)] == ["2", "4", "6", "8"]
    assert problems_of("math500", data)[0].answer == "\\left( 3, \\frac{\\pi}{2} \\right)"
    assert problems_of("gsm8k", data)[0].answer == "3+2\n#### 5"


def test_choices_stand_in_an_order_that_no_machine_changes_and_the_letter_is_that_of_the_right_one(data: Path) -> None:
    problems = problems_of("gpqa-diamond", data)
    for number, problem in enumerate(problems, start=4):
        assert f"({problem.answer}) 10^-{number} eV\n" in problem.question
        assert problem.metadata["choices"]["ABCD".index(problem.answer)] == f"10^-{number} eV"
    assert [problem.answer for problem in problems] == [problem.answer for problem in problems_of("gpqa-diamond", data)]
    assert len({problem.answer for problem in problems}) > 1


def test_live_code_bench_is_cut_to_its_window_of_months(data: Path) -> None:
    found = read_problems(read_asked("lcb"), data)
    assert [problem.id for problem in found.problems] == ["abc2_a", "abc3_a"]
    assert "class Solution:" in found.problems[1].question and "stdin" in found.problems[0].question
    assert [p.id for p in problems_of("lcb", data, "window=2024-09..2024-09")] == ["abc1_a"]
    assert len(problems_of("lcb", data, "window=all")) == 4
    with pytest.raises(DataError, match="none of 4 rows"):
        problems_of("lcb", data, "window=199901..199902")


@pytest.mark.parametrize(
    ("window", "said"),
    [
        ("x", r"lcb:window=x: months as 202410\.\.202502, or all"),
        ("2024", r"lcb:window=2024: months as"),
        ("202413..202502", "months as"),
        ("202502..202410", "ends before it begins"),
    ],
)
def test_a_window_that_is_none_is_refused_when_it_is_read(window: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        read_asked(f"lcb:window={window}")


def test_solutions_do_not_reach_prompts_or_metadata(data: Path) -> None:
    hidden = {"humaneval": "return a + b", "mbpp": "return a + b", "codeforces": "Add them."}
    for name, text in hidden.items():
        for problem in problems_of(name, data):
            assert text not in problem.question and text not in json.dumps(problem.metadata)
    assert [problem.id for problem in problems_of("mbpp", data)] == ["11", "510"], "the test split"
    assert "assert add(1, 2) == 3" in problems_of("mbpp", data)[0].question


def test_codeforces_problems_are_those_that_can_be_judged(data: Path) -> None:
    problems = problems_of("codeforces", data)
    assert [problem.id for problem in problems] == ["2000/A", "2000/B", "2001/A"]
    assert "Time limit: 2 seconds\nMemory limit: 256 megabytes" in problems[0].question
    assert "## Example\nInput:\n```\n1 2\n```\nOutput:\n```\n3\n```" in problems[0].question


def test_answers_vote_in_one_form() -> None:
    assert final_form("", "so \\boxed{1{,}000}") == final_form("", "#### 1000") == "1000"
    assert final_form("", "\\boxed{\\left( 3, \\dfrac{\\pi}{2} \\right)}") == "(3,\\frac{\\pi}{2})"
    assert final_form("<think>", "7") is None and final_form("", "nothing") is None
    assert letter("", "It is \\boxed{\\text{(b)}}.") == "B" and letter("", "\\boxed{E}") is None


# ------------------------------------------------------------------------------------------------- missing, surplus


def test_what_is_missing_or_too_much_is_said(data: Path, tmp_path: Path) -> None:
    warnings = read_problems(read_asked("lcb"), data).warnings
    assert warnings == [
        "test.jsonl, test2.jsonl, test3.jsonl, test6.jsonl of livecodebench/code_generation_lite are not there: their "
        "problems are missing",
        "test4.jsonl of livecodebench/code_generation_lite has 1 rows, 101 are published: 100 missing",
        "test5.jsonl of livecodebench/code_generation_lite has 3 rows, 167 are published: 164 missing",
    ]
    row = {"problem": "Find 1.", "answer": "1"}
    suite_files.parquet(tmp_path / "aime_2024_problems.parquet", [row | {"ID": str(i)} for i in range(31)])
    found = read_problems(read_asked("aime24"), tmp_path)
    assert found.warnings == [
        "aime_2024_problems.parquet of Maxwell-Jia/AIME_2024 has 31 rows, 30 are published: 1 surplus",
        "30 problems are the same text as another one",
    ]


def test_where_data_are_to_come_from_is_said(model: Path, data: Path, tmp_path: Path, capsys: Captured) -> None:
    line = refusal(capsys, model, "--suite", "math500", "--data", tmp_path)
    assert line.startswith(f"error: suite math500: its problems are not in {tmp_path}: put there test.jsonl of")
    assert f"hf download --repo-type dataset HuggingFaceH4/MATH-500 --local-dir {tmp_path}" in line
    (tmp_path / "aime25").mkdir()
    suite_files.jsonl(tmp_path / "aime25/aime2025-I.jsonl", [{"question": "1?", "answer": "1"}])
    line = refusal(capsys, model, "--suite", "aime25", "--data", tmp_path)
    assert "(of these there are aime2025-I.jsonl)" in line, "half of AIME is not AIME"
    assert "say with --data DIR" in refusal(capsys, model, "--suite", "aime24")
    assert "name what to ask with --suite: aime24" in refusal(capsys, model, "--data", data)
    line = refusal(capsys, model, "--suite", "aime24", "--data", data, "--samples", "4")
    assert line == "error: --samples with --suite: a suite has its own (aime24:k=...)"


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"problem": "Find 1.", "answer": "1000"}, r"'1000' is no integer from 0 to 999"),
        ({"problem": "Find 1.", "answer": "1/2"}, r"'1/2' is no integer"),
        ({"answer": "1"}, r"no text in 'problem' or 'Problem' or 'question' \(the row has answer\)"),
        ({"problem": " ", "answer": "1"}, r"no text in 'problem'"),
    ],
)
def test_a_row_of_another_format_is_named_with_its_place(tmp_path: Path, row: dict[str, Any], said: str) -> None:
    suite_files.parquet(tmp_path / "aime_2024_problems.parquet", [{"problem": "Find 2.", "answer": "2"}, row])
    with pytest.raises(DataError, match=rf"aime_2024_problems.parquet, row 2: .*{said}"):
        read_problems(read_asked("aime24"), tmp_path)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("aime", r"no suite 'aime' \(did you mean aime2[45]\?\)"),
        ("aime24:k", "'k' is no option=value"),
        ("aime24:window=all", "no option 'window'"),
        ("aime24:k=half", "k = 'half' is not a whole number"),
        ("aime24:top_p=1.5", "top_p = 1.5 is out of range"),
        ("aime24:temperature=nan", "temperature = nan is out of range"),
        ("gsm8k:k=2", "k = 2 with temperature 0"),
        ("aime24:limit=0", "limit = 0 is out of range"),
    ],
)
def test_what_cannot_be_asked_is_refused(asked: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        read_asked(asked)
    with pytest.raises(ConfigError, match="'lcb' is asked for twice"):
        read_all_asked(["lcb", "lcb:k=2"])


def test_a_prompt_that_leaves_no_room_and_a_cut_of_responses_are_said(
    data: Path, tmp_path: Path, capsys: Captured
) -> None:
    small = write_model(tmp_path / "small", positions=86)
    line = refusal(capsys, small, "--suite", "aime24", "--data", data)
    assert "suite aime24: its longest prompt has 84 tokens, and the model has room for 84: nothing is left" in line
    with standing_in(answers_half):
        middle = write_model(tmp_path / "middle", positions=400)
        found = evaluate(capsys, middle, "--suite", "aime24:k=1", "--data", str(data), "--out", str(tmp_path / "out"))
    most = found["aime24"]["sampling"]["max_tokens"]
    assert (
        f"responses are cut at {most} tokens, not 32768: the model has no more positions" in found["aime24"]["warnings"]
    )


# ----------------------------------------------------------------------------------------------------- contamination

LONG = "A farmer has forty two sheep and sells half of them to a neighbour who keeps seven goats as well."


def test_a_problem_within_a_training_prompt_is_found_and_one_that_shares_some_words_is_not() -> None:
    problems = [Problem("long", LONG, LONG), Problem("short", "What is 2+5?", ""), Problem("other", LONG[::-1], "")]
    prompts = [
        f"Solve: {LONG.upper().replace(',', '')} Answer with a number!",
        "A farmer has forty two sheep and buys a dog from the man who lives at the other end of town.",
        "Tell me: what is 2 + 5, please?",
    ]
    assert find_overlap(problems, prompts).problems == ("long", "short")
    assert find_overlap(problems, prompts[1:2]).problems == ()
    half = " ".join(LONG.split()[:15])
    assert find_overlap(problems, [half]).problems == (), "3 of 7 runs of words"


def test_training_prompts_of_a_configuration_are_compared(
    model: Path, data: Path, tmp_path: Path, capsys: Captured
) -> None:
    rows = [{"prompt": "Ann has 3 apples and buys 2. How many? Think.", "answer": "5"}, {"prompt": "x", "answer": "1"}]
    suite_files.jsonl(tmp_path / "train.jsonl", rows)
    (tmp_path / "run.toml").write_text(
        f'model.path = "{model}"\ndata.path = "{tmp_path}/train.jsonl"\ntrain.run_dir = "{tmp_path}/run"\n'
    )
    arguments = ["--suite", "gsm8k", "--data", str(data), "--out", str(tmp_path / "out")]
    with standing_in(answers_half):
        found = evaluate(capsys, tmp_path / "run.toml", *arguments)["gsm8k"]
    assert found["contamination"] == {
        "training_prompts": f"{tmp_path}/train.jsonl",
        "looked_at": 2,
        "problems": ["line-1"],
    }
    assert f"1 of 2 problems stand in training prompts of {tmp_path}/train.jsonl (line-1)" in found["warnings"]


def test_every_source_of_a_mixture_is_compared(tmp_path: Path) -> None:
    for name, text in (("one", "nothing of it"), ("two", LONG)):
        suite_files.jsonl(tmp_path / f"{name}.jsonl", [{"prompt": text, "answer": "1"}])
    sources = [{"name": name, "path": str(tmp_path / f"{name}.jsonl"), "weight": 1.0} for name in ("one", "two")]
    texts = training_texts(DataConfig(sources=sources))
    assert find_overlap([Problem("long", LONG, LONG)], texts) == Overlap(2, True, ("long",))


# --------------------------------------------------------------------------------------------------------------- elo


def problem_of(contest: int, index: str, rating: int | None) -> Problem:
    row = codeforces_row(contest, index, rating)
    return codeforces.read(row)


def test_without_standings_problems_are_the_opponents(tmp_path: Path) -> None:
    problems = [problem_of(1, "A", 1000), problem_of(1, "B", 1400), problem_of(2, "A", 1000), problem_of(2, "B", None)]
    right_PK = np.array([[1.0, 1.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    found = codeforces.measure(problems, right_PK, tmp_path)["elo"]
    expected = (
        win_probability(found.value, np.array([1000.0, 1400.0])).mean() + win_probability(found.value, 1000.0)
    ) / 2
    assert expected == pytest.approx((0.75 + 0.5) / 2)
    assert found.details == {"contests": 2, "against participants": 0, "against problems": 2, "opponents": 3}


def test_standings_make_participants_the_opponents(tmp_path: Path) -> None:
    """Three people with ratings, one without, a virtual one; points over the problems that the data have."""
    people = {
        "anna": (1800, [500.0, 900.0, 1500.0]),
        "bert": (1400, [450.0, 0.0, 0.0]),
        "carl": (1000, [0.0, 0.0, 2000.0]),
    }
    rows = [
        {
            "party": {"members": [{"handle": handle}], "participantType": "CONTESTANT"},
            "problemResults": [{"points": points} for points in results],
        }
        for handle, (_, results) in people.items()
    ]
    rows.append({"party": {"members": [{"handle": "new"}], "participantType": "CONTESTANT"}, "problemResults": []})
    rows.append({**rows[0], "party": {"members": [{"handle": "anna"}], "participantType": "VIRTUAL"}})
    columns = [{"index": "A", "points": 500.0}, {"index": "B", "points": 1000.0}, {"index": "C", "points": 2000.0}]
    changes = [{"handle": handle, "oldRating": rating} for handle, (rating, _) in people.items()]
    changes.append({"handle": "new", "oldRating": 0})
    for folder, result in (("standings", {"problems": columns, "rows": rows}), ("ratings", changes)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "7.json").write_text(json.dumps({"status": "OK", "result": result}))
    problems = [problem_of(7, "A", 800), problem_of(7, "B", 1200)]
    right_PK = np.array([[1.0, 0.0, np.nan], [0.0, 0.0, 1.0]])  # points 500, 0, and one who cannot be judged
    found = codeforces.measure(problems, right_PK, tmp_path)["elo"]
    assert found.details == {"contests": 1, "against participants": 1, "against problems": 0, "opponents": 3}
    scores = np.array([0.0, (1.0 + 0.0) / 2, (1.0 + 0.5) / 2])  # anna 1400 points, bert 450, carl 0 over A and B
    ratings = np.array([1800.0, 1400.0, 1000.0])
    assert win_probability(found.value, ratings).mean() == pytest.approx(scores.mean())
    (tmp_path / "ratings/7.json").write_text('{"status": "FAILED"}')
    with pytest.raises(DataError, match="no answer of Codeforces' API with status OK"):
        codeforces.measure(problems, right_PK, tmp_path)


def test_incomplete_tests_are_said(data: Path) -> None:
    problems = problems_of("codeforces", data)
    found = codeforces.measure(problems, np.ones((3, 1)), data)["elo"]
    assert found.warnings == ("1 of 3 problems have some of the official tests alone",)
    assert codeforces.measure([problem_of(1, "A", None)], np.ones((1, 1)), data) == {}


def test_every_entry_of_the_catalog_is_a_suite_of_its_name() -> None:
    for name in SUITES:
        suite = find_suite(name)
        assert suite.name == name and suite.sources and suite.draw.source


def test_a_table_s_figures_stand_under_each_other_however_long_their_names_are() -> None:
    figures = {
        "prompts": 4,
        "samples": 2,
        "measured": {"elo": {"value": 1500.0, "low": 1400.0, "high": 1600.0}},
        "estimates": {"accuracy": {"value": 0.5, "low": 0.25, "high": None}},
        "components": {"compile_error": 0.25, "passed": 1.0},
        "truncated": 0.0,
        "tokens": {"mean": 3.0, "median": 3, "max": 4},
    }
    result = {"suite": "lcb", "title": "LCB", "sampling": {"temperature": 1.0}, "result": figures, "warnings": ["few"]}
    lines = format_result(result).splitlines()
    shown = ("1500", "0.5000", "0.2500", "1.0000", "0.00%", "3.0")
    cells = [(line, line.split()[1]) for line in lines[2:]]
    assert [line.index(cell) + len(cell) for line, cell in cells if cell in shown] == [22] * len(shown)
