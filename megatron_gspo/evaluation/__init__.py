"""``megatron-gspo eval``: responses of any checkpoint, and what they score."""
