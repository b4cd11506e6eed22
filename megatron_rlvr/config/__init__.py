"""Structured configuration (torch-free). A default lives once, on the field."""

from megatron_rlvr.config.schema import RunConfig

__all__ = ["RunConfig"]
