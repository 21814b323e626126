"""Samples to micro-batches: what goes where, and how it is laid out and cut."""
