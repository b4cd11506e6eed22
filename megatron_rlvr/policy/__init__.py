"""The policy on Megatron-Core. The only package that imports megatron."""

import warnings

# The start-up line says which fused parts are in use; Megatron says it once a file on every rank.
warnings.filterwarnings("ignore", message=".*(Apex|Transformer Engine).*not installed.*", category=UserWarning)
# Names that torch renames under Megatron's feet.
warnings.filterwarnings("ignore", message=".*torch.distributed.*deprecated.*", category=FutureWarning)
