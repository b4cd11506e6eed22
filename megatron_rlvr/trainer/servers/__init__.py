"""The trainer's side of the rollout servers."""
