"""New processes that need not import torch: forks of one that has, and has computed nothing.

The import takes most of a short process's time. `FORKS` stands where `multiprocessing` would.
"""

import multiprocessing

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "hypothesis",
        "pytest",
        "torch.distributed.fsdp",
        "transformers.models.mixtral.modeling_mixtral",
        "transformers.models.qwen3_moe.modeling_qwen3_moe",
        "moebalance.lab.train",
        "layout_models",
    ]
)
