"""Rollouts from SGLang. The only package that imports or launches sglang."""
