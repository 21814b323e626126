"""Whole checkpoints between Hugging Face directories and Megatron's distributed ones: streamed, resumable, exact."""
