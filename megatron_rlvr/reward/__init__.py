"""Verifiers and reward shaping."""
