"""Advantage estimators, one a file, found by name."""
