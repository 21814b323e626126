"""Whether a parallel layout computes the same training step as one process does: ``megatron-gspo parity``."""
