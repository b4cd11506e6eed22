"""Saving a run and taking it up again."""
