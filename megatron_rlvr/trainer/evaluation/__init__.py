"""Evaluation while training and of finished models."""
