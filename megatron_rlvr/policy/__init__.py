"""The policy on Megatron-Core. The only package that imports megatron."""
