"""Benchmarks of what this package says is fast or small. ``megatron-gspo bench NAME`` runs one."""
