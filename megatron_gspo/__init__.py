"""Group Sequence Policy Optimization for mixture-of-experts models on Megatron-Core with SGLang rollouts."""

__version__ = "0.1.0"
