"""Nonsense in every input of ``doctor``: it says something about each, in one line, and foresaw it."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from megatron_gspo.cli import main
from megatron_gspo.config import RunConfig
from megatron_gspo.doctor.check import Check
from megatron_gspo.hf.catalog import SIZES
from tests.unit.doctor_cases import Case, prepare

fuzz = settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**6), 10**6),
    st.sampled_from([2**31, 2**63, 10**30, 0, 1, 2, 3]),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(
        ["", "sft", "gspo", "/", ".", "http://[", "http://127.0.0.1:1", "\0", "bfloat16", "disk", "constant"]
    ),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
SETTINGS = sorted(
    f"{section}.{name}"
    for section, field in RunConfig.model_fields.items()
    for name in field.annotation.model_fields  # type: ignore[union-attr]
    if name not in ("run_dir", "timeout_s", "server_start_s")
)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Case:
    root = tmp_path_factory.mktemp("fuzz")
    prepare().write_model(root / "model", seed=0)
    case = Case(root, ['algorithm.name="gspo"', 'rollout.servers=["http://127.0.0.1:1"]']).write()
    shutil.copytree(case.model, root / "kept")
    return case


def hold(checks: list[Check]) -> None:
    for check in checks:
        assert "\n" not in check.detail + check.fix and check.detail
        assert "nobody foresaw" not in check.fix, check
        assert "Traceback" not in check.detail, check


def toml(value: Any) -> str:
    """A value as an override's right side; what TOML cannot say comes as the text that a shell would pass."""
    try:
        return json.dumps(value, allow_nan=False)
    except ValueError:
        return str(value)


@fuzz
@given(st.dictionaries(st.sampled_from(SETTINGS), VALUES, min_size=1, max_size=4))
@example({"parallel.tensor": 10**30})
@example({"train.prompts_per_step": 2**31, "train.minibatches": 1})
@example({"rollout.max_prompt_tokens": 2**63, "train.microbatch_tokens": 2**70})
@example({"parallel.pipeline": 4, "parallel.expert": 16, "parallel.tensor": 4})
@example({"data.path": "\0", "model.path": "\0"})
@example({"sync.method": "disk", "sync.directory": "\0"})
def test_any_setting_may_hold_anything(sound: Case, chosen: dict[str, Any]) -> None:
    hold(sound.checks(*(f"{name}={toml(value)}" for name, value in chosen.items())))


@fuzz
@given(
    st.sampled_from(
        [
            *SIZES,
            "architectures",
            "rope_parameters",
            "rope_theta",
            "rms_norm_eps",
            "eos_token_id",
            "pad_token_id",
            "tie_word_embeddings",
            "mlp_only_layers",
            "decoder_sparse_step",
            "norm_topk_prob",
            "router_aux_loss_coef",
            "dtype",
            "hidden_act",
        ]
    ),
    VALUES,
)
@example("num_hidden_layers", 2**24)
@example("decoder_sparse_step", 0)
@example("pad_token_id", 10**9)
@example("rope_theta", {})
def test_any_field_of_config_json_may_hold_anything(sound: Case, name: str, value: Any) -> None:
    (sound.model / "config.json").write_text((sound.root / "kept" / "config.json").read_text())
    sound.change_config(**{name: value})
    try:
        hold(sound.checks())
    finally:
        (sound.model / "config.json").write_text((sound.root / "kept" / "config.json").read_text())


@fuzz
@given(
    st.sampled_from(
        [
            "config.json",
            "tokenizer.json",
            "tokenizer_config.json",
            "generation_config.json",
            "model.safetensors",
            "model.safetensors.index.json",
        ]
    ),
    st.one_of(
        st.binary(max_size=60),
        VALUES.map(lambda v: json.dumps(v).encode()),
        VALUES.map(lambda v: json.dumps({"weight_map": v}).encode()),
        st.none(),
    ),
)
@example("model.safetensors.index.json", b'{"weight_map": {"lm_head.weight": "."}}')
@example("model.safetensors", (2**60).to_bytes(8, "little") + b"{}")
def test_any_file_of_the_model_may_be_anything(sound: Case, name: str, content: bytes | None) -> None:
    """Or be missing."""
    path, kept = sound.model / name, sound.root / "kept" / name
    try:
        if content is None:
            path.unlink(missing_ok=True)
        else:
            path.write_bytes(content)
        hold(sound.checks())
    finally:
        path.unlink(missing_ok=True)
        if kept.exists():
            shutil.copyfile(kept, path)


@fuzz
@given(
    st.lists(
        st.one_of(
            st.binary(max_size=40),
            VALUES.map(lambda v: json.dumps(v).encode()),
            VALUES.map(lambda v: json.dumps({"prompt": v, "answer": v}).encode()),
        ),
        max_size=4,
    ),
    st.sampled_from(["jsonl", "parquet"]),
    st.booleans(),
)
@example([b"[" * 100_000], "jsonl", False)
@example([b'{"prompt": "1=", "answer": "' + b"1" * 5000 + b'", "n": ' + b"1" * 5000 + b"}"], "jsonl", False)
def test_any_line_may_stand_in_a_prompt_file(sound: Case, lines: list[bytes], suffix: str, skip: bool) -> None:
    path = sound.root / f"odd.{suffix}"
    path.write_bytes(b"\n".join(lines))
    hold(sound.checks(f'data.path="{path}"', f'data.eval_path="{path}"', f"data.skip_bad={str(skip).lower()}"))


@fuzz
@given(st.one_of(st.binary(max_size=200), st.text(max_size=80).map(str.encode)), st.booleans())
@example(b"a = " + b"[" * 50_000, True)
@example(b"[model]\npath = 1979-05-27T07:32:00Z", True)
@example(b"x = " + b"9" * 5000, False)
def test_any_bytes_may_be_the_configuration(sound: Case, content: bytes, as_json: bool) -> None:
    path = sound.root / "odd.toml"
    path.write_bytes(content)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(["doctor", str(path), *(["--json"] if as_json else [])])
    assert status == 2
    assert err.getvalue().startswith("error: configuration: ") and err.getvalue().count("\n") == 1
    if as_json:
        assert json.loads(out.getvalue())["ok"] is False
