"""Metrics to Weights & Biases: the ``wandb`` extra, imported when it is asked for."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING

from megatron_gspo.config import RunConfig
from megatron_gspo.errors import ConfigError, DependencyError
from megatron_gspo.report.metrics import clean
from megatron_gspo.report.rundir import RunDirectory

if TYPE_CHECKING:
    from megatron_gspo.types import StepReport

ID_FILE = "wandb_id"


class WandbSink:
    """One Weights & Biases run, named as the run directory; project and account come from wandb's own environment.

    Its id lies in the run directory, so a resumed run goes on where it stopped and a replaced one is a new run.
    Raises DependencyError without wandb, ConfigError when wandb refuses to start (no account, no network).
    """

    def __init__(self, run: RunDirectory, config: RunConfig) -> None:
        try:
            import wandb
        except ImportError as error:
            raise DependencyError(
                "train.wandb = true needs wandb, which is not installed: pip install 'megatron-gspo[wandb]'"
            ) from error
        try:
            self._run = wandb.init(
                id=run_id(run),
                resume="allow",
                name=run.path.name,
                dir=str(run.path),
                config=config.model_dump(mode="json"),
            )
        except wandb.Error as error:
            raise ConfigError(
                f"train.wandb = true, and wandb does not start: {error}: log in with `wandb login`, or set "
                f"WANDB_MODE=offline and send the run later with `wandb sync`"
            ) from error
        # wandb's own step may not be negative, and the initial evaluation's is: ours is a metric to plot against.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, report: StepReport) -> None:
        """Logs a line."""
        self._run.log({"step": report.step, "outer_step": report.outer_step, **clean(report.metrics)})

    def close(self) -> None:
        """Ends the run there."""
        self._run.finish()


def run_id(run: RunDirectory) -> str:
    """The id of the directory's Weights & Biases run, made when it is first asked for."""
    path = run.path / ID_FILE
    if not path.exists():
        path.write_text(uuid.uuid4().hex[:12] + "\n", encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()
