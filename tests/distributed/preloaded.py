"""What the ranks of distributed tests have in common, imported once for all of them."""

import megatron.core.dist_checkpointing  # noqa: F401
import safetensors.torch  # noqa: F401

import megatron_rlvr.ops.native
import megatron_rlvr.policy.policy
import megatron_rlvr.trainer.update.steps
import megatron_rlvr.weights.conversion  # noqa: F401
