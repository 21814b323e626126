"""What a killed run left in shared memory goes; what a living one uses stays."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from megatron_gspo.sync.disk import SETTLED_S, remove_abandoned


def test_directories_of_dead_processes_go_and_those_in_use_or_new_or_of_others_stay(tmp_path: Path) -> None:
    for name in ("megatron-gspo-dead", "megatron-gspo-used", "megatron-gspo-new", "somebody-else"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").touch()
        if not name.endswith("new"):
            os.utime(tmp_path / name, (0, 0))
    used = os.open(tmp_path / "megatron-gspo-used", os.O_RDONLY)
    fcntl.flock(used, fcntl.LOCK_EX)
    remove_abandoned(tmp_path)
    os.close(used)
    assert SETTLED_S > 0
    assert {path.name for path in tmp_path.iterdir()} == {"megatron-gspo-used", "megatron-gspo-new", "somebody-else"}
