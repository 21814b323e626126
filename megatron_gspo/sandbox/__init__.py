"""Running programs that nobody trusts: on this machine behind namespaces, or by a server. docs/sandbox.md.

``open_sandbox`` gives what ``[sandbox]`` asks for; ``interface`` says what it takes and gives.
"""

from __future__ import annotations

from megatron_gspo.config.sandbox import SandboxConfig
from megatron_gspo.sandbox.interface import Limits, Outcome, Program, Sandbox, Verdict

__all__ = ["Limits", "Outcome", "Program", "Sandbox", "Verdict", "open_sandbox"]


def open_sandbox(config: SandboxConfig) -> Sandbox:
    """The sandbox of a configuration, to be entered with ``async with``.

    Entering it raises ConfigError where programs cannot be run as the configuration asks (no namespaces, no
    bubblewrap, no key), with what to do.

        async with open_sandbox(config.sandbox) as sandbox:
            outcomes = await sandbox.run(Program("python", source), [b"1\\n", b"2\\n"], Limits())
    """
    if config.backend == "server":
        from megatron_gspo.sandbox.client import ServerSandbox

        return ServerSandbox(config)
    if config.backend == "sandboxfusion":
        from megatron_gspo.sandbox.fusion import FusionSandbox

        return FusionSandbox(config)
    from megatron_gspo.sandbox.local import LocalSandbox

    return LocalSandbox(config)
