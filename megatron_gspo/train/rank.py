"""One rank of a run: its failure becomes one line, said once, and an exit status."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from typing import TYPE_CHECKING

from megatron_gspo.config import RunConfig
from megatron_gspo.errors import MegatronGspoError, UserError

if TYPE_CHECKING:
    from megatron_gspo.train.recorder import MakeRecorder

MUTED_MODULES = (
    r"megatron\.core",  # says at import what it does without apex and Transformer Engine, and more at every step
    r"torch\.distributed\.c10d_logger",  # new names of collectives, which Megatron-Core calls by the old ones
)


def run_rank(config: RunConfig, make_recorder: MakeRecorder) -> int:
    """Trains as one rank; returns the process's exit status."""
    for module in MUTED_MODULES:
        warnings.filterwarnings("ignore", module=module)
    from megatron_gspo.train.loop import train

    try:
        train(config, make_recorder)
    except MegatronGspoError as error:
        if os.environ["RANK"] == "0":  # ``parallel.exchange.agree`` has brought the failure to every rank
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        return 2 if isinstance(error, UserError) else 1
    except Exception:
        print(f"rank {os.environ['RANK']} failed:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        return 1
    return 0
