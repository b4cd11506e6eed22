"""Measurements of the entropy instruments while training."""
