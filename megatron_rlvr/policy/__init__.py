"""The policy on Megatron-Core. The only package that imports megatron."""

import warnings

# The start-up line says which fused parts are in use; Megatron says it once a file on every rank.
warnings.filterwarnings("ignore", message=".*(Apex|Transformer Engine).*not installed.*", category=UserWarning)
# A word on CUDA graphs that comes whether they are in use or not.
warnings.filterwarnings("ignore", message=".*full scope is deprecated.*", category=UserWarning)
# torch asks non-leaf tensors for .grad inside Megatron's own checks.
warnings.filterwarnings("ignore", message=".*not a leaf Tensor is being accessed.*", category=UserWarning)
# Names that torch renames under Megatron's feet.
warnings.filterwarnings("ignore", message=".*torch.distributed.*deprecated.*", category=FutureWarning)
