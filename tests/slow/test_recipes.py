"""The recipes at full size: dry runs of every number of cards that a README names, and every rank's tensors."""

from __future__ import annotations

import json

import pytest

from megatron_gspo.cli import main
from megatron_gspo.plan.models import find_model
from tests.unit.meta_models import saved
from tests.unit.recipes import FOLDERS, Row, rows
from tests.unit.test_recipes import assert_whole, jobs

pytestmark = [pytest.mark.slow_suite, pytest.mark.timeout(3600)]

ROWS: dict[str, Row] = {}
for _folder in FOLDERS:
    for _row, _ in rows(_folder):
        if not find_model(_row.config.model.path).shape.megatron.get("multi_latent_attention"):
            ROWS.setdefault(f"{_folder}, {_row.gpus} {' '.join(_row.settings)}", _row)
"""Of each layout the first card that is named: what a rank holds does not depend on it, and it is the smallest. A dry
run refuses latent attention (docs/dryrun.md)."""


@pytest.mark.parametrize("name", ROWS)
def test_plan_verify_says_that_a_recipe_fits_the_cards_of_its_readme(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    row = ROWS[name]
    words = ["plan", str(row.toml), *row.settings, "--gpus", str(row.gpus), "--gpu", row.card, "--verify", "--json"]
    assert main(words) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["verified"]["short_bytes"] == 0
    assert said["verified"]["agreement"] == pytest.approx(1, rel=0.05)


@pytest.mark.parametrize("name", jobs(whole=True))
def test_what_every_rank_would_save_at_full_size_is_together_what_transformers_saves(name: str) -> None:
    job = jobs(whole=True)[name]
    (tensors,) = saved([job])
    assert_whole(job, tensors)
