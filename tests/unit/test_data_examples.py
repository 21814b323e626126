"""The data that the examples prepare."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import re
import sys
from itertools import islice
from pathlib import Path
from types import ModuleType

import pytest
from safetensors.torch import load_file

from megatron_gspo import config
from megatron_gspo.data import load_completions, load_prompts, load_tokenizer
from megatron_gspo.hf.catalog import read_model
from megatron_gspo.rewards.cases import Calls, read_problem

EXAMPLES = Path(__file__).parents[2] / "examples"
GSM8K = Path(
    os.environ.get("MEGATRON_GSPO_GSM8K", Path(__file__).parents[3] / "shared" / "data" / "gsm8k" / "train.jsonl")
)


def script(example: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"{example}_prepare", EXAMPLES / example / "prepare.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def prepare(monkeypatch: pytest.MonkeyPatch, example: str, *arguments: str | Path) -> None:
    monkeypatch.setattr(sys, "argv", ["prepare.py", *map(str, arguments)])
    script(example).main()


@pytest.mark.parametrize("path", sorted(EXAMPLES.rglob("*.toml")), ids=lambda p: "/".join(p.parts[-2:]))
def test_every_example_configuration_is_valid(path: Path) -> None:
    config.load(path)


def test_the_code_examples_files_load_share_no_prompt_and_have_tests(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sizes = ("--sft-examples", "10000", "--train-prompts", "200", "--eval-prompts", "100")
    prepare(monkeypatch, "code_tiny", tmp_path, *sizes)
    tokenizer = load_tokenizer(tmp_path / "model")
    assert (tokenizer.vocab_size, len(tokenizer), tokenizer.stop_ids) == (21, 21, (19,))
    prompts = [
        *load_prompts(tmp_path / "train.jsonl", tokenizer=tokenizer).prompts,
        *load_prompts(tmp_path / "eval.jsonl", tokenizer=tokenizer).prompts,
    ]
    examples = load_completions(tmp_path / "sft.jsonl", tokenizer=tokenizer).completions
    taught = {example.prompt.text for example in examples}
    assert len({p.text for p in prompts}) == 300 and len(taught) == 9_072 - 300
    assert not taught & {p.text for p in prompts}
    assert max(len(p.token_ids) for p in prompts) <= 32 and max(len(e.completion_ids) for e in examples) <= 8
    for prompt in prompts:
        problem = read_problem({"answer": prompt.answer})
        assert isinstance(problem.tests, Calls) and problem.prefix == "def f(x): return "
        shown = {int(x): int(y) for x, y in re.findall(r"f\((\d)\)=(\d+)", prompt.text)}
        slope, offset = shown[1] - shown[0], shown[0]
        assert [call.expected for call in problem.tests.calls] == [[slope * x + offset] for x in (-7, -3, 12, 25, 100)]
        assert not {call.arguments[0] for call in problem.tests.calls} & shown.keys()
    right = 0
    for example in examples:
        source, found = example.prompt.text, tokenizer.decode(example.completion_ids[:-1])
        offset, one = (int(re.search(rf"f\({x}\)=(\d+)", source)[1]) for x in (0, 1))  # type: ignore[index]
        right += eval(found, {"x": 100}) == 100 * (one - offset) + offset
    assert 0.40 < right / len(examples) < 0.44


def test_the_quickstarts_files_load_and_share_no_prompt(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sizes = ("--sft-examples", "300", "--train-prompts", "200", "--eval-prompts", "100")
    prepare(monkeypatch, "quickstart", tmp_path / "a", *sizes)
    tokenizer = load_tokenizer(tmp_path / "a" / "model")
    assert (tokenizer.vocab_size, len(tokenizer), tokenizer.stop_ids) == (13, 13, (11,))
    prompts = [
        *load_prompts(tmp_path / "a" / "train.jsonl", tokenizer=tokenizer).prompts,
        *load_prompts(tmp_path / "a" / "eval.jsonl", tokenizer=tokenizer).prompts,
    ]
    examples = load_completions(tmp_path / "a" / "sft.jsonl", tokenizer=tokenizer).completions
    assert len({p.text for p in prompts} | {example.prompt.text for example in examples}) == 600
    assert {len(p.token_ids) for p in prompts} == {len(example.completion_ids) for example in examples} == {13}
    for prompt in prompts:
        assert int(prompt.answer[-1]) == sum(map(int, prompt.text[:-1])) % 10

    prepare(monkeypatch, "quickstart", tmp_path / "b", *sizes)
    for name in ("train.jsonl", "eval.jsonl", "sft.jsonl", "model/model.safetensors", "model/tokenizer.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_the_quickstarts_teacher_errs_in_4_percent_of_its_steps_and_goes_on_from_there() -> None:
    module, rng = script("quickstart"), random.Random(1)
    rows = [module.example(digits, rng) for digits in islice(module.distinct_prompts(rng), 4000)]
    wrong_steps = right_ends = 0
    for row in rows:
        digits, sums = map(int, row["prompt"][:-1]), [0, *map(int, row["completion"])]
        wrong_steps += sum((a + d - b) % 10 != 0 for a, d, b in zip(sums, digits, sums[1:], strict=False))
        right_ends += sums[-1] == sum(map(int, row["prompt"][:-1])) % 10
    assert abs(wrong_steps / (4000 * 12) - 0.04) < 0.004
    expected = 0.1 + 0.9 * (1 - 0.04 * 10 / 9) ** 12  # a chain over Z_10 that mixes with probability 0.04 x 10/9
    assert abs(right_ends / 4000 - expected) < 0.03


def test_a_vocabulary_that_no_tokenizer_can_have_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = [{"question": f"What is {n} + {n}?", "answer": f"#### {2 * n}"} for n in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for size in ("50", "9000"):
        with pytest.raises(SystemExit, match=f"--vocab-size {size}: .*Vocabulary size"):
            prepare(
                monkeypatch,
                "gsm8k_tiny",
                tmp_path / "rows.jsonl",
                tmp_path,
                "--eval-prompts",
                "4",
                "--vocab-size",
                size,
            )


@pytest.mark.skipif(not GSM8K.is_file(), reason="needs GSM8K's train.jsonl ($MEGATRON_GSPO_GSM8K)")
def test_gsm8k_makes_the_round_trip_through_its_tokenizer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    prepare(monkeypatch, "gsm8k_tiny", GSM8K, tmp_path, "--keep-calculator")
    tokenizer = load_tokenizer(tmp_path / "model")
    settings = config.load(EXAMPLES / "gsm8k_tiny" / "sft.toml")
    assert settings.data.format == "gsm8k"
    examples = load_completions(GSM8K, tokenizer=tokenizer, format="gsm8k").completions
    rows = [json.loads(line) for line in GSM8K.read_text(encoding="utf-8").split("\n") if line]
    assert len(examples) == len(rows) == 7473
    for row, example in zip(rows, examples, strict=True):
        assert tokenizer.decode(example.prompt.token_ids) == row["question"] + "\n"
        assert tokenizer.decode(example.completion_ids) == row["answer"]
        assert example.completion_ids.count(tokenizer.eos_id) == 1
    questions = [json.loads(x)["question"] for n in ("train", "eval") for x in (tmp_path / f"{n}.jsonl").open()]
    assert len(set(questions)) == len(questions) == 7473


def test_the_comparisons_models_have_as_many_parameters_with_experts_as_without(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    module = script("compare_tiny")
    for kind in module.KINDS:
        module.write_random_model(tmp_path / kind, kind, seed=3)
    sizes = {
        kind: sum(x.numel() for x in load_file(tmp_path / kind / "model.safetensors").values()) for kind in module.KINDS
    }
    routers = 4 * 16 * 64
    assert sizes["moe"] - routers == sizes["dense"] == 444_736
    assert {len(load_tokenizer(tmp_path / kind)) for kind in module.KINDS} == {13}
    assert read_model(tmp_path / "dense")[1].num_experts == 0
    monkeypatch.setattr(module, "TRAIN_PROMPTS", 300)
    monkeypatch.setattr(module, "EVAL_PROMPTS", 200)
    monkeypatch.setattr(module, "SFT_EXAMPLES", 400)
    module.write_data(tmp_path)
    rows = [json.loads(line) for name in ("train", "eval", "sft") for line in (tmp_path / f"{name}.jsonl").open()]
    assert len({row["prompt"] for row in rows}) == len(rows) == 900
