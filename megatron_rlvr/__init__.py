"""Reinforcement learning with verifiable rewards on Megatron-Core and SGLang, with policy entropy kept safe."""

__version__ = "0.1.0"
