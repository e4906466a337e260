"""Calls that processes have to agree on where ZeRO-3 shards a block's weights."""

from __future__ import annotations

import torch
from torch import nn


def most_calls(calls: int, module: nn.Module, device: torch.device) -> int:
    """Return how often a process has to call a module's parts; it asks before it does, and calls not less often.

    Under ZeRO-3 a call gathers weights from all processes. One whose pictures have fewer sizes than another's would
    call less often and the others would wait for it, so all make as many calls as the one with the most.

    Args:
        calls: Calls that this process needs.
        module: The module that holds the weights.
        device: Where the processes talk.
    """
    import torch.distributed as dist

    sharded = any(hasattr(weight, "ds_id") for weight in module.parameters())  # as DeepSpeed marks them
    if not (sharded and dist.is_initialized()):
        return calls
    number = torch.tensor(calls, device=device)
    dist.all_reduce(number, op=dist.ReduceOp.MAX)
    return int(number)
