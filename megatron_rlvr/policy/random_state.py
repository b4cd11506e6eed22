"""This rank's random generators as plain values: what a resumed run draws is what the other would have drawn."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from megatron.core import tensor_parallel

from megatron_rlvr.policy import platform


def capture() -> dict[str, Any]:
    """States of Python's, numpy's, torch's and Megatron's generators."""
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state().numpy(),
        "megatron": {
            name: tensor.cpu().numpy()
            for name, tensor in tensor_parallel.get_cuda_rng_tracker().get_states().items()
            if isinstance(tensor, torch.Tensor)
        },
    }
    if platform.on_gpu():
        state["cuda"] = torch.cuda.get_rng_state().numpy()
    return state


def restore(state: dict[str, Any]) -> None:
    """Takes up the generators where `capture` left them."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    if state["megatron"]:
        tracker = tensor_parallel.get_cuda_rng_tracker()
        tracker.set_states({name: torch.from_numpy(value.copy()) for name, value in state["megatron"].items()})
    if "cuda" in state and platform.on_gpu():
        torch.cuda.set_rng_state(torch.from_numpy(state["cuda"].copy()))
    # Last: on the CPU Megatron's generators and torch's are one.
    torch.set_rng_state(torch.from_numpy(state["torch"].copy()))
