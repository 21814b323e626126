"""Weight sync from the trainer to the rollout servers."""
