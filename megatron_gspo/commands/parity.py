"""``megatron-gspo parity``."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_gspo.config import RunConfig
    from megatron_gspo.parity.check import Settings
    from megatron_gspo.parity.layouts import Layout
    from megatron_gspo.parity.ranks import LocalRanks
    from megatron_gspo.parity.world import WorldRanks

SUMMARY = "show that parallel layouts compute the same training step as one process"
EXAMPLE = "megatron-gspo parity --layouts TP2,TP2xPP2xEP2 --dtype float64"
DOCS = "docs/parity.md"
MORE = """
Runs two optimizer steps in each layout, by the functions that a run calls, and compares logprobs, entropy, s_i, loss,
clip decisions, metrics, and every rank's gradients and parameters with one process (no packing; losses, AdamW and
metrics written down again in float64), and that with transformers. Starts its own ranks on this machine; under torchrun
or Slurm the world's ranks check the layouts that fit them. Exit status: 0 when every layout holds (of "--layouts all",
every one that is not refused), 1 when one does not, 2 for a mistake in what was asked."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    from megatron_gspo.algorithm.catalog import policy_losses
    from megatron_gspo.parity.models import MODELS
    from megatron_gspo.parity.precision import PRECISIONS

    parser.add_argument(
        "target", nargs="?", metavar="CONFIG|HF_DIR", help="TOML file or Hugging Face directory (default: --model)"
    )
    parser.add_argument("--model", choices=MODELS, default="tiny-moe", help="synthetic model (default: %(default)s)")
    parser.add_argument("--layers", type=int, metavar="N", help="take only the first N layers of CONFIG or HF_DIR")
    parser.add_argument(
        "--layouts", help='names joined by commas, "all", or "config" (default: config with CONFIG, else all)'
    )
    parser.add_argument("--max-ranks", type=int, default=8, metavar="N", help="most ranks a layout (default: 8)")
    parser.add_argument("--dtype", choices=PRECISIONS, help="default: CONFIG's, else float64")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--loss", choices=policy_losses(), help="default: CONFIG's, else gspo")
    parser.add_argument("--kernels", choices=("auto", "reference"), help="model.kernels (default: CONFIG's, else auto)")
    parser.add_argument(
        "--lora",
        type=int,
        metavar="RANK",
        help="train adapters of this rank on every matrix, in place of the weights (default: CONFIG's lora.rank)",
    )
    parser.add_argument(
        "--replay",
        action="store_true",
        help="make routers choose random experts, the same in every layout, instead of their own (default: with a "
        "CONFIG whose replay.mode is not off)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the mini-batch and a synthetic model's weights")
    parser.add_argument("--tolerance", type=float, help="largest relative error (default: the dtype's)")
    parser.add_argument("--json", action="store_true", help='print {"layouts": [{...}, ...]} instead of the table')


def run(options: argparse.Namespace) -> int:
    """Runs the command; returns the exit status."""
    import json

    from megatron_gspo.parity.layouts import choose_layouts
    from megatron_gspo.quiet import mute
    from megatron_gspo.runs.rank import world_of_torchrun

    mute()
    config = _config(options.target)
    world = world_of_torchrun()
    text = options.layouts or ("config" if config else "all")
    layouts, named = choose_layouts(text, config, max_ranks=options.max_ranks, world=world)
    ranks = _ranks(options.device, world)

    from megatron_gspo.parity.check import check
    from megatron_gspo.parity.table import format_table

    settings = _settings(options, config, layouts)
    rows = check(settings, ranks, say=_say if ranks.is_first else lambda line: None)
    if ranks.is_first:
        report = json.dumps({"layouts": [row.as_record() for row in rows]}) if options.json else format_table(rows)
        print(report, flush=True)
    ranks.leave()
    verdicts = [row.verdict for row in rows[1:]]
    unproven = rows[0].verdict != "held" or any(
        row.verdict == "failed" or (row.verdict == "refused" and row.layout in named) for row in rows
    )
    return 1 if unproven or "held" not in verdicts else 0


def _config(target: str | None) -> RunConfig | None:
    from megatron_gspo.config import load
    from megatron_gspo.config.inputs import check_inputs

    if not target or Path(target).is_dir():
        return None
    config = load(target)
    check_inputs(config, Path(target), ("model.path",))
    return config


def _settings(options: argparse.Namespace, config: RunConfig | None, layouts: list[Layout]) -> Settings:
    from megatron_gspo.errors import ConfigError
    from megatron_gspo.parity.check import Settings

    path = config.model.path if config else options.target or ""
    if options.layers and not path:
        raise ConfigError("--layers cuts CONFIG's or HF_DIR's model, and none is given")
    if not 0 <= options.seed < 2**63:
        raise ConfigError(f"--seed {options.seed}: it must be in 0 ... 2**63 - 1")
    if options.layers is not None and options.layers < 1:
        raise ConfigError(f"--layers {options.layers}: a model has one at least")
    if options.tolerance is not None and not options.tolerance > 0:
        raise ConfigError(f"--tolerance {options.tolerance:g}: it must be above 0")
    if options.lora is not None and options.lora < 0:
        raise ConfigError(f"--lora {options.lora}: a rank is 1 or more, and 0 is none")
    trained = config.algorithm.name if config and config.algorithm.draws_responses else "gspo"
    return Settings(
        layouts=layouts,
        path=path,
        model=options.model,
        layers=options.layers,
        loss=options.loss or trained,
        dtype=options.dtype or (config.model.dtype if config else "float64"),
        seed=options.seed,
        tolerance=options.tolerance,
        temperature=config.rollout.temperature if config else Settings.temperature,
        chunk=config.model.logprob_chunk if config else Settings.chunk,
        kernels=options.kernels or (config.model.kernels if config else Settings.kernels),
        lora=options.lora if options.lora is not None else (config.lora.rank if config else 0),
        replay=options.replay or (config is not None and config.replay.mode != "off"),
    )


def _ranks(device: str | None, world: int | None) -> LocalRanks | WorldRanks:
    """Where layouts run. A check on the CPU hides GPUs before anything could find them."""
    from megatron_gspo.parity.ranks import LocalRanks

    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from megatron_gspo.errors import ConfigError
    from megatron_gspo.platforms import here

    if device == "cuda" and here().device_type == "cpu":
        raise ConfigError("--device cuda: torch finds no GPU here")
    device = here().device_type
    if world is None:
        return LocalRanks(device)
    from megatron_gspo.parity.world import WorldRanks

    return WorldRanks(device)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
