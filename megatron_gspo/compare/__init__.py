"""One command, a matrix of losses, replay modes and seeds: ``megatron-gspo compare``."""
