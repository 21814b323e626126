"""Settings of all tests."""

from hypothesis import settings

# No deadline: a busy machine is not a wrong result. Derandomized: a failure on one machine fails on every other.
settings.register_profile("megatron_gspo", deadline=None, derandomize=True)
settings.load_profile("megatron_gspo")
