"""Entropy instruments: diagnostics, the law, controllers."""
