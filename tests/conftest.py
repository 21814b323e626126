"""Settings of all tests."""

import contextlib
import signal

from hypothesis import settings

# No deadline: a busy machine is not a wrong result. Derandomized: a failure on one machine fails on every other.
settings.register_profile("megatron_gspo", deadline=None, derandomize=True)
settings.load_profile("megatron_gspo")

# What runs in the background of a script is deaf to Ctrl-C, and so is what it starts: tests that press it would wait.
with contextlib.suppress(ValueError):  # not the main thread
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
