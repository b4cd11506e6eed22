"""How a tensor and a message travel in one entry of an ``update_weights_from_tensor`` request."""

from __future__ import annotations

import base64
import io
import pickle
from typing import Any

import torch
from torch.multiprocessing import reductions

_DEVICE_ARGUMENT = 6
"""Place of the device among the arguments of torch's `rebuild_cuda_tensor`."""


def pack_payload(message: str, tensor: torch.Tensor) -> str:
    """base64 of [(message, tensor)]: on a CPU the tensor's bytes, on a GPU a handle to its memory.

    The memory behind a handle must stay as it is until the receiver has said that it is done.
    """
    buffer = io.BytesIO()
    if not tensor.is_cuda:
        # A view would bring its whole storage along.
        tensor = tensor.clone() if tensor.untyped_storage().nbytes() != tensor.nbytes else tensor
    _Pickler(buffer).dump([(message, tensor)])
    return base64.b64encode(buffer.getvalue()).decode()


class _Pickler(pickle.Pickler):
    """Pickles GPU tensors as handles that name their device by its UUID.

    The receiver may count devices in another order; SGLang looks a string up among the devices that it sees. CPU
    tensors go by value: torch shares them by file descriptors, which a process that is no child cannot open.
    """

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, torch.Tensor) and obj.is_cuda:
            rebuild, arguments = reductions.reduce_tensor(obj)
            device = str(torch.cuda.get_device_properties(arguments[_DEVICE_ARGUMENT]).uuid)
            return rebuild, (*arguments[:_DEVICE_ARGUMENT], device, *arguments[_DEVICE_ARGUMENT + 1 :])
        return NotImplemented
