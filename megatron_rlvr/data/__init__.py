"""Prompts, tokenisation, packing and balancing."""
