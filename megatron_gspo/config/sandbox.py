"""Where the programs that models write are run."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import model_validator

from megatron_gspo.config.rollouts import Url
from megatron_gspo.section import AsList, Count, Positive, Section

UNPROTECTED = "none_programs_run_unprotected_on_this_machine"
"""Of ``sandbox.backend``."""


class SandboxConfig(Section):
    """Running programs that nobody trusts, for rewards and evaluations that do (docs/sandbox.md)."""

    backend: Literal["bubblewrap", "server", "sandboxfusion", "none_programs_run_unprotected_on_this_machine"] = (
        "bubblewrap"
    )
    """"bubblewrap" runs them on this machine, in namespaces of their own; "server" sends them to ``megatron-gspo
    sandbox serve``, "sandboxfusion" to a SandboxFusion server. The last one runs what a model wrote with your rights,
    your files and your network: limits hold, and nothing else does."""
    servers: Annotated[tuple[Url, ...], AsList] = ()
    """Base URLs of the servers of "server" and "sandboxfusion"; programs are spread over them."""
    key_file: str = ""
    """File with the servers' key, which nobody but its owner may open (mode 0600)."""
    concurrency: Positive | None = None
    """Programs at once. When absent, as many as there are processor cores, and 64 for each server."""
    python: str = ""
    """Interpreter of Python programs, on the machine where they run; the packages of its environment can be imported.
    Empty: the one that this environment was made from, or the system's, without packages."""
    disk_mb: Positive = 64
    """MiB that a program may write to each of its directories (its own, /tmp, /dev/shm), which lie in memory."""
    retries: Count = 3
    """Times that a program is sent again when a server is away or answers with HTTP 429 or 5xx."""

    @model_validator(mode="after")
    def _check(self) -> SandboxConfig:
        remote = self.backend in ("server", "sandboxfusion")
        if remote and not self.servers:
            raise ValueError(
                f'sandbox.backend = "{self.backend}" needs sandbox.servers: name its URL, http://HOST:PORT'
            )
        if self.backend == "server" and not self.key_file:
            raise ValueError(
                'sandbox.backend = "server" needs sandbox.key_file: the file with the key of `sandbox serve`'
            )
        if not remote and (self.servers or self.key_file):
            raise ValueError(
                f'sandbox.servers = {list(self.servers)} and sandbox.key_file = "{self.key_file}" are not used with '
                f'sandbox.backend = "{self.backend}": leave them out, or set it to "server" or "sandboxfusion"'
            )
        return self
