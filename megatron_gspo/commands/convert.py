"""``megatron-gspo convert``."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_gspo.convert.logits import LogitsRow
    from megatron_gspo.convert.run import Show
    from megatron_gspo.megatron.groups import Groups

SUMMARY = "convert checkpoints between Hugging Face directories and Megatron distributed ones"
EXAMPLE = "megatron-gspo convert Qwen3-30B-A3B Qwen3-30B-A3B-megatron"
DOCS = "docs/converting.md"
MORE = """
The direction follows from what SRC is. Tensors pass one at a time: memory does not grow with the model. A conversion
that is cut short continues when the same command is given again; what was at DST stays until the new one is whole.
Under torchrun, ranks share the files.

--verify compares SRC and DST, of either kind each, tensor by tensor, instead of converting: names, shapes, dtypes and
bytes. Exit status: 0 when they are the same, 1 when they are not, 2 for a mistake in what was asked."""


MOST_GB = 1e6
"""Of a file: more than there is of any model."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("source", metavar="SRC", help="Hugging Face directory, or Megatron distributed checkpoint")
    parser.add_argument("destination", metavar="DST", help="directory to write")
    parser.add_argument("--config", metavar="DIR", help="config.json and tokenizer (default: SRC's, or its run's)")
    parser.add_argument("--model", default="policy", metavar="NAME", help="of a run's checkpoint (default: policy)")
    parser.add_argument("--dtype", choices=("fp8",), help="of matrices, for an engine (default: that of SRC)")
    parser.add_argument("--max-shard-gb", type=float, default=4.0, metavar="GB", help="of a file (default: 4)")
    parser.add_argument("--verify", action="store_true", help="compare SRC with DST, tensor by tensor")
    parser.add_argument("--logits", action="store_true", help="with --verify: compare logits, too")
    parser.add_argument("--tokens", metavar="IDS", help="with --logits: token ids joined by commas (default: 32 drawn)")
    parser.add_argument("--layout", default="", metavar="tensor=2,...", help="with --logits: Megatron's, of the ranks")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="with --logits: relative (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint at DST")
    parser.add_argument("--drop-unknown", action="store_true", help="leave out tensors that the family's table lacks")
    parser.add_argument("--expect", choices=("hugging-face", "megatron"), help="refuse a SRC of the other kind")
    parser.add_argument("--json", action="store_true", help="print what was done as one JSON object")


def run(options: argparse.Namespace) -> int:
    """Runs the command; returns the exit status."""
    import dataclasses
    import json
    import resource
    import time

    import psutil

    from megatron_gspo.errors import ConfigError
    from megatron_gspo.quiet import mute

    check(options)
    if not Path(options.source).is_dir():  # before a process group is made
        raise ConfigError(f"{options.source}: no such directory")
    mute()
    groups = join_world()
    import torch.distributed as dist

    from megatron_gspo.convert.kinds import kind_of
    from megatron_gspo.convert.run import Options, convert

    if options.expect and (kind := kind_of(Path(options.source))) != options.expect:
        raise ConfigError(f"{options.source} is a {kind} checkpoint, and --expect says {options.expect}")
    if options.verify:
        return verify(options, groups)
    settings = Options(
        max_shard_bytes=int(options.max_shard_gb * 1e9),
        overwrite=options.overwrite,
        config=Path(options.config) if options.config else None,
        drop_unknown=options.drop_unknown,
        model=options.model,
        eight_bits=options.dtype == "fp8",
    )
    start, start_rss = time.monotonic(), psutil.Process().memory_info().rss
    with bars("converting") as show:
        done = convert(Path(options.source), Path(options.destination), settings, groups, show)
    seconds = time.monotonic() - start
    if dist.get_rank() == 0:
        report = dataclasses.asdict(done) | {
            "seconds": round(seconds, 3),
            "bytes_per_s": round(done.bytes / seconds),
            "start_rss_bytes": start_rss,
            "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }
        print(json.dumps(report) if options.json else _sentence(report), flush=True)
    dist.barrier(groups.world)
    return 0


def check(options: argparse.Namespace) -> None:
    """Raises ConfigError for options that cannot be, or that would be passed over."""
    from megatron_gspo.errors import ConfigError

    if not options.verify and (options.logits or options.tokens or options.layout):
        raise ConfigError("--logits, --tokens and --layout belong to --verify, which compares and writes nothing")
    if options.verify and options.dtype:
        raise ConfigError("--dtype says how tensors are written, and --verify compares and writes nothing")
    if options.logits and options.model != "policy":
        raise ConfigError(f"--logits are a policy's, and --model {options.model} is none: leave one of them out")
    if not 0 < options.max_shard_gb <= MOST_GB:
        raise ConfigError(f"--max-shard-gb {options.max_shard_gb:g}: it must be above 0, and at most {MOST_GB:g}")


def verify(options: argparse.Namespace, groups: Groups) -> int:
    """Prints how two checkpoints differ."""
    import dataclasses
    import json

    import torch.distributed as dist

    from megatron_gspo.convert.verify import verify_tensors

    config = Path(options.config) if options.config else None
    with bars("comparing") as show:
        paths = (Path(options.source), Path(options.destination))
        verdict = verify_tensors(*paths, config, groups, show, model=options.model)
    rows = compare_logits_of(options) if options.logits else []
    held = verdict.held and all(row.error <= options.tolerance for row in rows)
    if dist.get_rank() == 0:
        if options.json:
            logits = {"logits": [dataclasses.asdict(row) for row in rows]} if rows else {}
            print(json.dumps({"held": held, **dataclasses.asdict(verdict), **logits}), flush=True)
        else:
            for row in rows:
                print(f"logits: {row.checkpoint}, {row.implementation}: {row.largest:.3g} at most ({row.error:.2g})")
            for found in verdict.differences:
                print(f"{found.what}: {found.name}: {found.detail}")
            print(
                f"{verdict.equal} of {verdict.tensors} tensors are the same bytes, {len(verdict.differences)} "
                f"difference(s); sha256 of all {verdict.digest[:16]}...",
                flush=True,
            )
    dist.barrier(groups.world)
    return 0 if held else 1


def compare_logits_of(options: argparse.Namespace) -> list[LogitsRow]:
    """The rows of ``--logits``. Raises ConfigError for tokens or a layout that cannot be read."""
    import random

    from megatron_gspo.config import ParallelConfig
    from megatron_gspo.convert.logits import compare_logits
    from megatron_gspo.errors import ConfigError
    from megatron_gspo.hf.catalog import read_model

    try:
        layout = dict(word.split("=") for word in options.layout.split(",") if word)
        parallel = ParallelConfig.model_validate({name: int(size) for name, size in layout.items()})
        tokens = [int(word) for word in options.tokens.split(",")] if options.tokens else []
    except ValueError as error:
        raise ConfigError(f"--layout {options.layout!r} --tokens {options.tokens!r}: {error}") from None
    if not tokens:
        vocab_size = read_model(options.source)[1].vocab_size
        tokens = random.Random(0).choices(range(vocab_size), k=32)
    return compare_logits(Path(options.source), Path(options.destination), tokens, parallel)


def _sentence(report: dict[str, object]) -> str:
    kept = f", {report['kept_files']} of them kept from before" if report["kept_files"] else ""
    size, rate = float(str(report["bytes"])) / 1e9, float(str(report["bytes_per_s"])) / 1e6
    return (
        f"{report['destination']}: {report['tensors']} tensors, {size:.2f} GB in {report['files']} file(s){kept}, "
        f"{report['seconds']} s, {rate:.0f} MB/s"
    )


def join_world() -> Groups:
    """The groups of torchrun's world, or of this process alone; on the CPU."""
    from megatron_gspo.runs.rank import world_of_torchrun

    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before anything could find a GPU: files are all there is
    if world_of_torchrun() is None:
        alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
        os.environ |= alone
    from megatron_gspo.config import ParallelConfig
    from megatron_gspo.megatron.groups import make_groups, start_distributed

    start_distributed()
    return make_groups(ParallelConfig())


@contextlib.contextmanager
def bars(what: str) -> Iterator[Show]:
    """A progress bar of this rank's bytes, on the first rank's standard error when that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    from megatron_gspo.convert.run import Show

    first = os.environ["RANK"] == "0"
    console = Console(stderr=True, highlight=False)
    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not (first and sys.stderr.isatty())) as progress:
        task = progress.add_task(what, total=None)
        yield Show(
            note=lambda line: print(line, file=sys.stderr, flush=True) if line and first else None,
            total=lambda size: progress.update(task, total=size),
            moved=lambda size: progress.advance(task, size),
        )
