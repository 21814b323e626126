"""What a terminal sees of libraries in a step, a save and a resume: nothing that we know and have judged."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import pytest

from megatron_gspo.quiet import LOGS, WARNINGS, mute
from tests import oracle
from tests.distributed import steps
from tests.distributed.test_checkpoint import case_of, load_and_train, train_and_save
from tests.pool import RankPool

pytestmark = pytest.mark.distributed


class Heard(logging.Handler):
    """Keeps what no logger's filter has dropped."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.name}: {record.getMessage()}")


def remarks(case: steps.Case, parallel: dict[str, int], plan: steps.Plan, directory: Path, muted: bool) -> list[str]:
    """What a rank's terminal would show while it trains, saves, loads and trains on."""
    heard = Heard()
    logging.root.addHandler(heard)
    if muted:
        mute()
    with warnings.catch_warnings(record=True) as warned:
        train_and_save(case, parallel, plan, directory)
        load_and_train(case, parallel, plan, directory)
    return [*heard.lines, *(f"{warning.filename}: {warning.message}" for warning in warned)]


@pytest.mark.parametrize("layout", ["TP2xEP2", "PP2"])
def test_libraries_say_nothing_in_a_run(ranks: RankPool, tmp_path: Path, layout: str) -> None:
    """TP2xEP2 has experts at expert_tensor = 1, and ranks that are not muted beside it; PP2 a dense first stage."""
    path = oracle.make_tiny_qwen3_moe(tmp_path / "model", layers=2, mlp_only_layers=[0])
    world, parallel = steps.LAYOUTS[layout]
    case = case_of(str(path), "float32")
    plan = steps.uneven_plan(len(case.samples), steps.data_size(layout))
    quiet = ranks.run(world, remarks, case, parallel, plan, tmp_path / "quiet", True)
    assert quiet == [[]] * world
    if layout == "TP2xEP2":
        loud = ranks.run(world, remarks, case, parallel, plan, tmp_path / "loud", False)
        assert loud[0], "there was nothing to mute"


def test_what_is_not_listed_is_shown_by_the_first_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    say = {"__name__": "megatron.core.somewhere", "__warningregistry__": {}}
    for rank, expected in (("0", ["of a new kind"]), ("1", [])):
        monkeypatch.setenv("RANK", rank)
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("default")
            mute()
            for text in ("Apex is not installed. Falling back to Torch Norm", "of a new kind"):
                exec(f"import warnings; warnings.warn({text!r})", dict(say))
        assert [str(warning.message) for warning in warned] == expected


def test_only_the_listed_lines_of_a_logger_are_dropped() -> None:
    heard = Heard()
    logger = logging.getLogger(LOGS[0][0])
    before = list(logger.filters)
    logger.addHandler(heard)
    try:
        mute()
        mute()
        assert len(logger.filters) == len({*before, *logger.filters}), "a filter was added twice"
        for text in (f"{LOGS[0][1]}. GPTModel is only accepting fixes", "another line"):
            logger.warning(text)
    finally:
        logger.removeHandler(heard)
    assert heard.lines == [f"{LOGS[0][0]}: another line"]
    assert all(module and message for module, message in WARNINGS)
