"""Models, settings and text that the tests of recovery share; run as a script it is one training of its own process.

Usage: python -m tests.train.common FOLDER SETTINGS [STEP FILE]; after that step it waits for the file.
"""

from __future__ import annotations

import random
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from compress.models.families import layers_of
from compress.models.pruning import Kept, prune
from compress.train.recovery import Recovered, recover
from compress.train.settings import RecoverSettings
from tests.tiny import SIZES, VOCABULARY, tiny_model

# Sharp attention of large weights is hard to train; these learn within a few steps.
SOFT = SIZES | {"initializer_range": 0.06}


def model_of(family: str = "llama-gqa", *, soft: bool = True, **sizes: Any) -> Any:
    """A random model in eval mode; Phi-3 has fused projections."""
    if family == "phi3":
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(transformers.Phi3Config(**SOFT)).float().eval()
    if not soft:
        return tiny_model(family)
    torch.manual_seed(0)
    config = {"llama-gqa": transformers.LlamaConfig, "qwen2": transformers.Qwen2Config}[family](**SOFT | sizes)
    return transformers.AutoModelForCausalLM.from_config(config).float().eval()


def pruned_model() -> Any:
    """Half of the head groups, and 40 of 64 neurons."""
    model = model_of()
    prune(model, [Kept((0,), tuple(range(40))) for _ in layers_of(model)])
    return model


def text(count: int = 640) -> list[int]:
    """Tokens that repeat with a period of eleven: something to learn."""
    words = random.Random(0).choices(range(4, VOCABULARY), k=11)
    return [words[place % 11] for place in range(count)]


def settings(**changes: Any) -> RecoverSettings:
    """Six short steps without dropout at a rate that shows."""
    given: dict[str, Any] = {"length": 16, "batch_size": 4, "steps": 6, "rate": 0.01, "dropout": 0.0, "warmup": 0.0}
    return RecoverSettings.model_validate(given | changes)


def trained(folder: Path, model: Any = None, **changes: Any) -> tuple[Any, Recovered]:
    """A model and the record of its recovery."""
    model = pruned_model() if model is None else model
    teacher = changes.pop("teacher", None)
    return model, recover(model, settings(**changes), text(), folder, teacher=teacher, seed=3)


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.set_num_interop_threads(1)
    options = RecoverSettings.model_validate_json(sys.argv[2])

    def told(done: int, total: int, what: str) -> None:
        """One line a step, so that a parent can follow; after the step that it names wait until it has made a file."""
        print(done, flush=True)
        while sys.argv[3:] and done == int(sys.argv[3]) and not Path(sys.argv[4]).exists():
            time.sleep(0.01)

    try:
        recover(pruned_model(), options, text(), Path(sys.argv[1]), teacher=model_of(), seed=3, progress=told)
    except KeyboardInterrupt as stop:
        sys.exit(str(stop))
