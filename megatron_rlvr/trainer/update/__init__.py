"""The optimizer steps on one rollout batch."""
