"""One rank of a stage whose ZeRO-3 lets go of every weight at once; run by torchrun in place of `train.launch`.

By default DeepSpeed keeps weights below 100,000 numbers gathered, which is all that a tiny model has, and does not
release what it needs again soon: nothing would be seen of code that reads a weight outside its module's call.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from sparsevlm.train import arguments, launch

STRICT = {
    "stage3_param_persistence_threshold": 0,
    "stage3_model_persistence_threshold": 0,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
}


def strictly(configure: Callable[..., Any]) -> Callable[..., Any]:
    """Make a function that returns a DeepSpeed configuration return a strict one."""

    def configured(*args: Any, **kwargs: Any) -> Any:
        config = configure(*args, **kwargs)
        if config is not None and config["zero_optimization"]["stage"] == 3:
            config["zero_optimization"] |= STRICT
        return config

    return configured


if __name__ == "__main__":
    arguments.deepspeed_config = strictly(arguments.deepspeed_config)
    launch.leave(launch.main(sys.argv[1:]))
