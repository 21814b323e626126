"""A run from its start to its report: launching, the loop, checkpoints, resuming, exports."""
