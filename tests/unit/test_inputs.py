"""Files that are not there: which command makes them, in the same words by doctor, train, eval and compare."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from megatron_gspo.cli import main
from megatron_gspo.config import load
from megatron_gspo.config.inputs import advice, check_inputs, missing
from megatron_gspo.doctor.catalog import CHECKS
from megatron_gspo.errors import DataError

ROOT = Path(__file__).parents[2]
PREPARE = "python examples/quickstart/prepare.py .cache/quickstart"
Captured = pytest.CaptureFixture[str]


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout as it is cloned: examples, and nothing that was made from them."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path: Path, **sections: Any) -> Path:
    tree = {"model": {"path": "m"}, "data": {"path": "d.jsonl"}, "train": {"run_dir": f"runs/{path.stem}"}}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(tomli_w.dumps({name: tree.get(name, {}) | sections.get(name, {}) for name in {**tree, **sections}}))
    return path


def model(path: Path) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    return path


def doctor(capsys: Captured, *words: str) -> tuple[list[str], str]:
    """(lines, the error on stderr)."""
    assert main(["doctor", *words]) == 2
    captured = capsys.readouterr()
    return captured.out.splitlines(), captured.err


EXAMPLES = {
    "quickstart/gspo": f"{PREPARE} && megatron-gspo train examples/quickstart/sft.toml",
    "quickstart/lora": f"{PREPARE} && megatron-gspo train examples/quickstart/sft.toml",
    "quickstart/ppo": f"{PREPARE} && megatron-gspo train examples/quickstart/sft.toml",
    "quickstart/sft": PREPARE,
    "gsm8k_tiny/gspo": "python examples/gsm8k_tiny/prepare.py path/to/gsm8k/train.jsonl .cache/gsm8k_tiny && "
    "megatron-gspo train examples/gsm8k_tiny/sft.toml",
    "gsm8k_tiny/sft": "python examples/gsm8k_tiny/prepare.py path/to/gsm8k/train.jsonl .cache/gsm8k_tiny",
    "code_tiny/gspo": "python examples/code_tiny/prepare.py .cache/code_tiny && "
    "megatron-gspo train examples/code_tiny/sft.toml",
    "code_tiny/sft": "python examples/code_tiny/prepare.py .cache/code_tiny",
    "compare_tiny/compare": "python examples/compare_tiny/prepare.py .cache/compare_tiny",
    "compare_tiny/sft": "python examples/compare_tiny/prepare.py .cache/compare_tiny",
}
"""Every TOML file that is trained on a laptop -> what makes its model."""
RECIPES = {
    "qwen3_30b_a3b/gspo": "Qwen/Qwen3-30B-A3B-Base",
    "qwen3_30b_a3b/gspo_r3": "Qwen/Qwen3-30B-A3B-Base",
    "qwen3_30b_a3b/grpo_r2": "Qwen/Qwen3-30B-A3B-Base",
    "qwen3_235b_a22b/gspo": "Qwen/Qwen3-235B-A22B",
    "moonlight_16b_a3b/gspo": "moonshotai/Moonlight-16B-A3B",
    "qwen3_0_6b/gspo": "Qwen/Qwen3-0.6B-Base",
}
"""Every other one -> its model's name on the hub."""


def test_every_example_is_here(fresh: Path):
    assert {f"examples/{name}.toml" for name in {**EXAMPLES, **RECIPES}} == {
        str(path.relative_to(fresh)) for path in fresh.glob("examples/*/*.toml")
    }


@pytest.mark.parametrize(("name", "commands"), EXAMPLES.items())
def test_doctor_on_a_fresh_example_names_the_commands_that_come_first(name, commands, fresh, capsys):
    lines, err = doctor(capsys, f"examples/{name}.toml")
    (said,) = [line for line in lines if line.startswith("error    model ")]
    assert said.endswith(f": no such model directory  ->  make it: {commands}")
    if not err.startswith("error: engine: "):  # where sglang is not installed
        assert err.startswith("error: model: ") and err.endswith(f" -> make it: {commands}\n")
    unchecked = [line for line in lines if "not checked" in line]
    assert len(unchecked) == 2 and unchecked[0].startswith("warning  model ")
    assert "without the model's config.json: weights, tokenizer, layout, placement, memory," in unchecked[0]
    wrong = {re.split(r"  +", line)[1] for line in lines if line.startswith("error")} - {"engine"}
    assert wrong == {"model", "prompts"} | (set() if name.endswith("sft") else {"eval prompts"})
    prompts = [line for line in lines if "no such data file" in line]
    assert prompts and all(line.endswith(f"->  make it: {commands.partition(' && ')[0]}") for line in prompts)


@pytest.mark.parametrize(("name", "hub"), RECIPES.items())
def test_a_recipe_names_what_downloads_its_model_and_what_makes_its_data(name, hub, fresh):
    source = Path(f"examples/{name}.toml")
    data = "make it: python tools/prepare_data.py dapo"
    hints = {name: advice(path, source, is_model=name == "model.path") for name, path in missing(load(source)).items()}
    assert hints == {
        "model.path": f"make it: hf download {hub} --local-dir models/{hub.partition('/')[2]}",
        "data.path": f"{data} published/data/dapo-math-17k.parquet data/dapo",
        "data.eval_path": f"{data} published/data/aime-2024.parquet data/aime24 --hold-out all",
    }


@pytest.mark.parametrize(("name", "commands"), EXAMPLES.items())
def test_train_eval_and_compare_say_the_same(name, commands, fresh, capsys):
    config = f"examples/{name}.toml"
    starts = {"train": [config]}
    if "sft" not in name:
        losses = "grpo,ppo" if "ppo" in name else "grpo,gspo"  # gspo gives a token no advantage of its own
        starts |= {"eval": [config], "compare": [config, "--out", "out", "--losses", losses]}
    for command, words in starts.items():
        assert main([command, *words]) == 2
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.count("\n") == 1
        assert "model.path = " in captured.err and captured.err.endswith(f" -> make it: {commands}\n")
    assert not Path("out").exists() and not Path("runs").exists()


def test_json_has_every_check_with_its_four_fields(fresh, capsys):
    assert main(["doctor", "examples/quickstart/gspo.toml", "--json"]) == 2
    told = json.loads(capsys.readouterr().out)
    assert [check["name"] for check in told["checks"]] == [entry.name for entry in CHECKS]
    assert {tuple(check) for check in told["checks"]} == {("name", "status", "detail", "fix")}
    by_name = {check["name"]: check for check in told["checks"]}
    assert by_name["memory"]["detail"] == "not checked: it needs the model's config.json"
    assert by_name["model"]["fix"] == f"make it: {EXAMPLES['quickstart/gspo']}"
    assert by_name["eval prompts"]["fix"] == f"make it: {PREPARE}"


@pytest.mark.parametrize("text", [None, "[model", "[model]\npaht = 3\n"])
def test_a_configuration_that_cannot_be_read_is_one_line(text, tmp_path, capsys):
    path = tmp_path / "run.toml"
    if text is not None:
        path.write_text(text)
    lines, err = doctor(capsys, str(path))
    assert lines == [] and err.startswith(f"error: configuration: {path}: ") and err.count("\n") == 1


def test_what_is_there_is_made_no_more(fresh: Path):
    """After prepare.py only the cold start is left; after that, nothing."""
    config = load("examples/quickstart/gspo.toml")
    source = Path("examples/quickstart/gspo.toml")
    model(Path(".cache/quickstart/model"))
    for name in ("sft", "train", "eval"):
        Path(f".cache/quickstart/{name}.jsonl").touch()
    assert missing(config) == {"model.path": "runs/quickstart-sft/hf"}
    with pytest.raises(DataError, match=r"-> make it: megatron-gspo train examples/quickstart/sft\.toml$"):
        check_inputs(config, source)
    model(Path("runs/quickstart-sft/hf"))
    assert missing(config) == {}
    check_inputs(config, source)


def test_a_users_own_pair_of_files_is_told_apart_by_the_run_directory(tmp_path, monkeypatch):
    """However the same directory is written, and whatever else lies beside."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "mine/a first.toml", train={"run_dir": str(tmp_path / "runs/./cold")}, model={"path": "base"})
    write(tmp_path / "mine/other.toml", train={"run_dir": "runs/cold-2"})
    (tmp_path / "mine/broken.toml").write_text("[train\n")
    (tmp_path / "mine/bytes.toml").write_bytes(b"\xff\xfe")
    source = write(tmp_path / "mine/second.toml", model={"path": "runs/cold/hf/"})
    model(tmp_path / "base"), (tmp_path / "d.jsonl").touch()
    expected = f"make it: megatron-gspo train '{tmp_path}/mine/a first.toml'"
    for path in (
        "runs/cold/hf",
        "runs/../runs/cold/hf",
        str(tmp_path / "runs/cold/hf"),
        "runs/cold/exports/outer_00010",
    ):
        assert advice(path, source, is_model=True) == expected
    assert advice("runs/cold-2/hf", source, is_model=True).endswith("mine/other.toml")
    assert advice("runs/cold-3/hf", source, is_model=True) == ""


def test_a_run_that_saves_no_model_does_not_make_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "sft.toml", train={"save_hf": False})
    source = write(tmp_path / "gspo.toml", model={"path": "runs/sft/hf"})
    assert advice("runs/sft/hf", source, is_model=True) == ""


def test_a_comment_names_the_command_of_a_file_or_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = write(tmp_path / "run.toml")
    source.write_text(
        "# data/mine is made by: python my/prepare.py --out data/mine\n  #d.jsonl is made by make data  \n"
        "# nothing is made by\n" + source.read_text()
    )
    assert advice("data/mine/train.jsonl", source) == "make it: python my/prepare.py --out data/mine"
    assert advice("data/mine", source) == "make it: python my/prepare.py --out data/mine"
    assert advice("d.jsonl", source) == "make it: make data"
    assert advice("data/mine2/train.jsonl", source) == "" == advice("nothing", source)


def test_two_files_that_would_make_each_other_are_each_named_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    a = write(tmp_path / "a.toml", model={"path": "runs/b/hf"})
    write(tmp_path / "b.toml", model={"path": "runs/a/hf"})
    assert advice("runs/b/hf", a, is_model=True) == f"make it: megatron-gspo train {tmp_path}/b.toml"


def test_three_files_in_a_row_are_trained_in_their_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "z.toml")
    write(tmp_path / "b.toml", model={"path": "runs/z/hf"})
    c = write(tmp_path / "c.toml", model={"path": "runs/b/hf"})
    commands = advice("runs/b/hf", c, is_model=True).removeprefix("make it: ").split(" && ")
    assert commands == [f"megatron-gspo train {tmp_path}/z.toml", f"megatron-gspo train {tmp_path}/b.toml"]


def test_a_path_from_another_working_directory_says_which(fresh, monkeypatch, capsys):
    model(fresh / "models/base")
    source = write(fresh / "mine/run.toml", model={"path": "models/base"})
    (fresh / "elsewhere").mkdir()
    monkeypatch.chdir(fresh / "elsewhere")
    assert main(["train", str(source)]) == 2
    assert capsys.readouterr().err == (
        "error: model.path = models/base: no such model directory -> paths are relative to the working directory, and "
        f"it is there from {fresh}: cd {fresh}\n"
    )


def test_a_name_on_the_hub_is_told_to_be_downloaded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = write(tmp_path / "run.toml")
    hint = advice("Qwen/Qwen3-30B-A3B", source, is_model=True)
    assert "hf download Qwen/Qwen3-30B-A3B --local-dir Qwen3-30B-A3B" in hint
    (tmp_path / "Qwen").mkdir()  # then it is a path that is spelt wrong
    for path, is_model in (("Qwen/Qwen3-30B-A3B", True), ("a/b/c", True), ("data/train.jsonl", False)):
        assert advice(path, source, is_model=is_model) == ""


@pytest.mark.parametrize("path", ["a" * 300 + "/b", "a/" + "b" * 300, "/".join(["x"] * 3000), "loop/x", ".", "~/m"])
def test_any_path_may_be_missing(path, tmp_path, monkeypatch, capsys):
    """Too long, or through links in a circle."""
    monkeypatch.chdir(tmp_path)
    for name in ("loop", "loop.toml"):
        (tmp_path / name).symlink_to(name)
    source = write(tmp_path / "run.toml", model={"path": path}, data={"path": path.replace("m", "d")})
    write(tmp_path / "other.toml", train={"run_dir": path.partition("/")[0] or "x"})
    lines, err = doctor(capsys, str(source))
    assert any(line.startswith("error    model ") for line in lines) and "nobody foresaw" not in err
    assert main(["train", str(source)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_directory_without_a_config_is_no_model_and_only_what_is_read_is_missing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m").mkdir()
    source = write(
        tmp_path / "run.toml",
        algorithm={"kl_loss_coef": 0.1, "reference": "ref"},
        data={"eval_path": "e.jsonl"},
    )
    every = {"model.path": "m", "algorithm.reference": "ref", "data.path": "d.jsonl", "data.eval_path": "e.jsonl"}
    assert missing(load(source)) == every
    assert missing(load(source), ("data.path",)) == {"data.path": "d.jsonl"}
    assert set(missing(load(source, ['algorithm.name="sft"']))) == {"model.path", "data.path"}
    write(tmp_path / "teacher.toml", train={"run_dir": "m"})
    with pytest.raises(DataError, match=r"^model\.path = m: no config\.json in it -> make it: "):
        check_inputs(load(source), source)
