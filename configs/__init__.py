"""Hydra configs, installed as the package `megatron_rlvr.configs`."""
