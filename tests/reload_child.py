"""Fresh process without `compress`: loads checkpoints, saves them again, loads those, and records what it saw.

Usage: python reload_child.py SCRATCH CHECKPOINT [CHECKPOINT ...]
"""

import gc
import json
import os
import sys
from pathlib import Path


def main(scratch: Path, folders: list[Path]) -> None:
    os.environ["HF_MODULES_CACHE"] = str(scratch / "modules")
    os.environ["HF_HUB_OFFLINE"] = "1"
    sys.modules["compress"] = None  # type: ignore[assignment] # an import of it raises ModuleNotFoundError
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModel, AutoModelForCausalLM

    gc.freeze()  # what is imported is not looked at again in every collection
    try:
        import compress  # noqa: F401

        importable = True
    except ImportError:
        importable = False
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(4, 97, (1, 301), generator=generator)
    for folder in folders:
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
        with torch.inference_mode():
            logits = model(ids).logits
        model.save_pretrained(scratch / "again" / folder.name)
        again = AutoModelForCausalLM.from_pretrained(scratch / "again" / folder.name, trust_remote_code=True).eval()
        with torch.inference_mode():
            saved_again = again(ids).logits
        body = AutoModel.from_pretrained(scratch / "again" / folder.name, trust_remote_code=True)
        try:
            AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
            without_flag = "loaded"
        except ValueError as error:
            without_flag = str(error)
        facts = {
            "compress_importable": importable,
            "class": type(model).__name__,
            "body_class": type(body).__name__,
            "config_is_models": type(model.config) is type(model).config_class,
            "auto_map": json.loads((scratch / "again" / folder.name / "config.json").read_text())["auto_map"],
            "without_flag": without_flag,
        }
        save_file({"logits": logits, "saved_again": saved_again}, scratch / f"{folder.name}.safetensors")
        (scratch / f"{folder.name}.json").write_text(json.dumps(facts))
    gc.unfreeze()


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(folder) for folder in sys.argv[2:]])
