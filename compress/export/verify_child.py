"""Runs in a fresh process where `compress` cannot be imported: loads a checkpoint and records what it computes.

Usage: python verify_child.py CHECKPOINT PROBE.safetensors RESULT.safetensors THREADS remote|stock
"""

import importlib.abc
import json
import runpy
import sys
from pathlib import Path
from typing import Any


class Refuse(importlib.abc.MetaPathFinder):
    """Makes `import compress` fail as it would on a machine without the toolkit."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] == "compress":
            raise ModuleNotFoundError(f"No module named {name!r} (refused: the checkpoint has to load without it)")


def cache_bytes(cache: Any) -> int:
    """`compress.models.cache_bytes`, whose file is read because the package cannot be imported here."""
    path = Path(__file__).parents[1] / "models" / "cache_bytes.py"
    return int(runpy.run_path(str(path))["cache_bytes"](cache))


def main(checkpoint: str, probe_file: str, result_file: str, threads: str, code: str) -> None:
    """Load, run the probe, write logits, tokens and cache bytes."""
    sys.meta_path.insert(0, Refuse())
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    torch.set_num_threads(int(threads))
    probe = load_file(probe_file)
    ids, mask = probe["ids"], probe["mask"]
    options: dict[str, Any] = {"trust_remote_code": code == "remote", "dtype": "auto"}
    loaded: Any = AutoModelForCausalLM.from_pretrained(checkpoint, output_loading_info=True, **options)
    model, loading = loaded[0].eval(), loaded[1]
    # With the word also here: AutoTokenizer reads the configuration first, and asks about its code otherwise.
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=options["trust_remote_code"])
    result = {}
    wrong_generation = ""
    with torch.inference_mode():
        start = {"attention_mask": mask[:1, -16:], "max_new_tokens": 2, "tokenizer": tokenizer}
        try:
            model.generate(ids[:1, -16:], **start)
        except Exception as error:  # whatever the settings lead to, the parent process tells it
            wrong_generation = f"{type(error).__name__}: {error}".splitlines()[0]
        # The rest is compared with a model in memory: greedily, with the special tokens alone.
        generation = model.generation_config
        tokens = {name: getattr(generation, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        model.generation_config = GenerationConfig(**tokens)
        result["padded_logits"] = model(ids, attention_mask=mask, logits_to_keep=4).logits.float().contiguous()
        alone = model(ids[:1], use_cache=True, logits_to_keep=4)
        result["logits"] = alone.logits.float().contiguous()
        cache = "cache" if "cache" in alone else "past_key_values"  # transformers 5.24 renames output and argument
        before = getattr(model(ids[:1, :-1], use_cache=True, logits_to_keep=1), cache)
        result["step_logits"] = model(ids[:1, -1:], **{cache: before}).logits.float().contiguous()
        # A sliding layer of transformers holds all of the prompt until a step has followed it.
        result["cache_bytes"] = torch.tensor(cache_bytes(getattr(alone, cache) if code == "remote" else before))
        result["tokens"] = model.generate(
            ids[:1], attention_mask=mask[:1], max_new_tokens=16, do_sample=False, pad_token_id=int(probe["pad"])
        ).contiguous()
        body = AutoModel.from_pretrained(checkpoint, **options).eval()
        hidden = body(ids[:1, :16]).last_hidden_state
        result["hidden"] = hidden.float().contiguous()
    text = tokenizer.decode(result["tokens"][0, ids.shape[1] :])
    wrong = {name: sorted(map(str, loading[name])) for name in loading if loading[name]}
    facts = {"text": text, "class": type(model).__name__, "not_loaded": json.dumps(wrong) if wrong else ""}
    facts["generation"] = wrong_generation
    save_file(result, result_file, metadata={"facts": json.dumps(facts)})


if __name__ == "__main__":
    main(*sys.argv[1:])
