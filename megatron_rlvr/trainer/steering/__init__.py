"""What changes from rollout step to rollout step."""
