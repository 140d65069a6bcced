"""A plugin of vLLM that serves checkpoints of `compress` by their plans: head groups keep what their spans say.

vLLM calls `register` in each of its processes (entry point `vllm.general_plugins`). Nothing here imports `compress`;
the plan comes from `compress_plan` in the checkpoint's config.json.
"""

from __future__ import annotations

import logging

TESTED = ("0.32",)  # minor versions of vLLM

logger = logging.getLogger("vllm.compress")


def register() -> None:
    """Tell vLLM about the configurations, models and attention backend; harmless when called again.

    With a version of vLLM that was not tested it registers nothing and says so, since what it builds on has no promise
    of stability. vLLM then refuses the checkpoint, or runs it dense with `trust_remote_code`.
    """
    import vllm

    if ".".join(vllm.__version__.split(".")[:2]) not in TESTED:
        logger.error(
            "compress-vllm was tested with vLLM %s and not with %s, so it does nothing: install one of these, or a "
            "newer compress-vllm",
            ", ".join(f"{version}.x" for version in TESTED),
            vllm.__version__,
        )
        return
    from vllm import ModelRegistry
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    from compress_vllm.config import register_configs
    from compress_vllm.families import ROWS

    register_configs()
    for row in ROWS:
        # As text: vLLM looks at the class in a process of its own, and imports it only where it is needed.
        ModelRegistry.register_model(row.planned, f"compress_vllm.models:{row.planned}")
    register_backend(AttentionBackendEnum.CUSTOM, "compress_vllm.backend.SpanBackend")
