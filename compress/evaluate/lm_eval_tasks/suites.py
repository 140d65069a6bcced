"""The long-context suites for lm-eval's own command line.

lm_eval --model hf --model_args pretrained=MODEL --include_path compress/evaluate/lm_eval_tasks --tasks compress_vt \\
    --metadata '{"length": 4096, "count": 100, "seed": 0}'
"""

from compress.evaluate.suites.documents import load, score

__all__ = ["load", "score"]
