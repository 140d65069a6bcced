"""What a recipe leaves out: lengths, documents, statistics, solver, refinement and evaluation, by model and machine.

The defaults are the best that was measured (profiles/README.md): attention mass and evidence that a rule hides, no
gradients, on documents that ask for many kinds of things, refined by the measured loss where the machine is quick
enough. What a recipe names stays as it is, and brings no default with it that was chosen for something else: with
documents of its own the lengths are theirs, and with a solver of its own nothing is refined unless the recipe says so.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from compress.environment import memory, usable_cores
from compress.models.backward import activation_bytes
from compress.models.families import context_of
from compress.models.load import load_config
from compress.models.placement import SPREAD
from compress.models.shape import shape_without_weights
from compress.plan import ModelShape
from compress.registry import solvers, statistics

LONGEST = 8192  # tokens that are profiled by default, where the machine allows it
LEAST = 512
PER_CORE = 1024  # tokens for each core, for a model of `SMALL` parameters
SMALL = 200_000_000
REFINING = 8  # cores from which on a plan is refined by default
CLOSEST = 256  # tokens in which a fact has room
ROOMY = 4 * CLOSEST  # tokens in which several facts, or pass keys, have room

# Documents of one length, a share of the longest: its divisor, then facts, pass keys and as many lines, and plain text.
MIX = ((4, 12, 4, 8), (2, 8, 3, 6), (1, 10, 4, 6))
MIX_TO_REFINE = ((4, 12, 4), (2, 12, 4), (1, 32, 8))  # divisor, facts, and documents of many pass keys
MIX_OF_FEW_CORES = ((2, 2, 1, 2), (1, 4, 1, 3))
# A hundredth of a nat of plain text would count as much as all facts lost, and is worth less to those who ask.
WEIGHTS = {"facts": 4.0, "continuation": 0.2}

BEST_SOLVER = {"name": "moa", "influence": "none", "retrieval": 1.0, "tables": {"hidden_mass": 1.0}}
# What a statistic cannot be without: a dozen windows, fixed ones and some that grow with the position.
SPELLED = {"effect": {"options": {"window": {"betas": [0.0, 0.25], "alpha_max": 1024, "alpha_step": 192}}}}
PRUNER = {"name": "amp", "importance": ["amp", "wanda_sp"], "group_score": "mean", "attention": [0.0, 0.3]}


@dataclass(frozen=True)
class Situation:
    """What defaults depend on besides the recipe.

    Attributes:
        gpu: whether the work is done on one.
        cores: of the machine, as far as this process may use them.
        memory: bytes of the device, None where unknown.
        context: longest input of the model in tokens, None without a limit.
        parameters: of the model.
        activations: bytes that a forward pass takes for each token in float32, about.
        shape: of the model, without its fingerprint; None of a machine alone.
        hidden, intermediate: width of the model's hidden states and of its MLPs.
        kept: bytes a token that a training of all weights keeps in float32 for its backward pass.
        vocabulary: tokens that the model knows.
    """

    gpu: bool = False
    cores: int = 2
    memory: int | None = None
    context: int | None = None
    parameters: int = 0
    activations: int = 0
    shape: ModelShape | None = None
    hidden: int = 0
    intermediate: int = 0
    kept: int = 0
    vocabulary: int = 0

    @classmethod
    def here(cls, device: str) -> Situation:
        """Of this machine, whatever the model."""
        gpu = torch.cuda.is_available() and (device in ("auto", SPREAD) or device.startswith("cuda"))
        known = memory()
        total = (
            torch.cuda.get_device_properties(0).total_memory if gpu else known["limit_bytes"] or known["total_bytes"]
        )
        return cls(gpu, usable_cores(), total)

    @classmethod
    def of(cls, model: str, device: str) -> Situation:
        """Of a model, whose weights are not read, and of this machine.

        Raises:
            UserError: no such model, or its configuration cannot be used.
        """
        return replace(cls.here(device), **_sizes(model))

    @property
    def longest(self) -> int:
        """Tokens of the longest input that is profiled by default."""
        if self.gpu:
            length = LONGEST
        else:
            length = min(LONGEST, int(PER_CORE * self.cores * min(1.0, SMALL / max(1, self.parameters))))
        while length > LEAST and self.memory is not None and self.held(length) > self.memory:
            length //= 2
        length = max(LEAST, 1 << (length.bit_length() - 1))
        return length if self.context is None else min(length, self.context)

    def held(self, length: int) -> int:
        """Bytes that a run needs at most, about: the dense model and a planned one, and what one input takes."""
        return 2 * self.parameters * (2 if self.gpu else 4) + length * self.activations

    def why(self) -> str:
        """The rule of `longest`, in words."""
        if self.gpu:
            rule = f"{LONGEST:,} tokens on a GPU"
        else:
            rule = f"{PER_CORE:,} tokens for each of {self.cores} cores, at most {LONGEST:,}"
            rule += ", fewer for a model of more than 200 million parameters" if self.parameters > SMALL else ""
        limits = [] if self.context is None else [f"the model's context is {self.context:,}"]
        return "; ".join([rule, *limits])


@functools.lru_cache(maxsize=4)
def _sizes(name: str) -> dict[str, Any]:
    """What a `Situation` says of a model, by its configuration."""
    config = load_config(name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    hidden = int(config.hidden_size)
    intermediate = int(getattr(config, "intermediate_size", 0) or 4 * hidden)
    return {
        "context": context_of(config),
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "activations": 16 * 4 * max(hidden, intermediate),
        "shape": shape_without_weights(model),
        "hidden": hidden,
        "intermediate": intermediate,
        "kept": activation_bytes(model, 1, 4, trained=True),
        "vocabulary": len(model.get_input_embeddings().weight),
    }


@dataclass
class Defaults:
    """The defaults of one recipe.

    Attributes:
        data: the recipe's plain data, which `fill` completes.
        chosen: what was chosen, one line for each part.
    """

    data: dict[str, Any]
    situation: Situation
    chosen: list[str] = field(default_factory=list)

    def fill(self) -> None:
        """Complete the recipe where it leaves something out; what is wrong in it is left to the schema."""
        if self.data.get("upcycle") is not None:
            self._upcycled()
            return
        search = self.data.get("search")
        if not isinstance(search, dict):
            return
        budget = search.get("budget")
        budget = budget if isinstance(budget, dict) else {}
        removes, windows = self._kinds(budget)
        calibration = self.data.get("calibration")
        calibration = calibration if isinstance(calibration, dict) else {} if calibration is None else None
        whole = calibration is not None and "documents" not in calibration
        if whole and calibration is not None:
            self.data["calibration"] = calibration
            self._lengths(budget, windows)
            self._documents(calibration, self._longest(budget), removes, windows)
        if search.get("solver") is None:
            self._solver(search, removes, windows, whole)
        self._statistics(search)
        if self.data.get("evaluate") is None:
            self._evaluation(self._longest(budget) if whole else self._profiled(), removes, windows)

    def _upcycled(self) -> None:
        """What the schema asks for and an upcycled model has no use for, at its smallest; and an evaluation."""
        length = min(LEAST, self.situation.longest)
        calibration = self.data.get("calibration")
        calibration = {} if calibration is None else calibration
        if isinstance(calibration, dict):
            self.data["calibration"] = {"documents": [_text(length, 1)], **calibration}
        self.data["profile"] = {"statistics": [{"name": "hidden_mass"}]}
        self.data["search"] = {"solver": {"name": "uniform"}, "budget": {"kv": 1.0, "lengths": [length]}}
        evaluate = self.data.get("evaluate")
        if evaluate is None:
            evaluate = {"perplexity": {"length": length, "windows": 8 if self.situation.gpu else 4}}
            self._note("evaluate", "perplexity of the seed, of every expert, and of the upcycled model")
        if isinstance(evaluate, dict):
            self.data["evaluate"] = {"compare": ["plan"], **evaluate}

    @staticmethod
    def _kinds(budget: dict[str, Any]) -> tuple[bool, bool]:
        """Whether the budget is one of parameters, and whether it is one of what attention holds, reads or takes."""
        removes = budget.get("parameters") is not None
        others = any(budget.get(kind) is not None for kind in budget if kind not in ("parameters", "lengths"))
        return removes, others or not removes

    def _longest(self, budget: dict[str, Any]) -> int:
        given = budget.get("lengths")
        mapped = next((value for value in budget.values() if isinstance(value, dict)), None)
        lengths = given if isinstance(given, list | tuple) else mapped if mapped is not None else []
        numbers = [int(length) for length in lengths if str(length).isdigit() and int(length) >= 16]
        return max(numbers, default=self.situation.longest)

    def _profiled(self) -> int:
        documents = self.data.get("calibration")
        tasks = documents.get("documents") if isinstance(documents, dict) else None
        lengths = [task.get("length") for task in tasks if isinstance(task, dict)] if isinstance(tasks, list) else []
        return max((length for length in lengths if isinstance(length, int)), default=self.situation.longest)

    def _lengths(self, budget: dict[str, Any], windows: bool) -> None:
        given = budget.get("lengths") is not None or any(isinstance(value, dict) for value in budget.values())
        if not given:
            longest = self.situation.longest
            if windows:
                budget["lengths"] = [longest]
            self._note("lengths", f"up to {longest:,} tokens ({self.situation.why()})")
        if self.situation.gpu and "dtype" not in self.data:
            self.data["dtype"] = "bfloat16"
            self._note("dtype", "bfloat16, on a GPU")

    def _documents(self, calibration: dict[str, Any], longest: int, removes: bool, windows: bool) -> None:
        many = self.situation.gpu
        documents: list[dict[str, Any]] = []
        held_out: list[dict[str, Any]] = []
        training: list[dict[str, Any]] = []
        if windows:
            for divisor, facts, digits, plain in MIX if many else MIX_OF_FEW_CORES:
                if longest // divisor >= CLOSEST or divisor == 1:
                    documents += [*_asked(longest // divisor, facts, digits, digits), _text(longest // divisor, plain)]
            if many:
                documents += _asked(longest, 2, 2, haystack="filler")
                for divisor, facts, digits in MIX_TO_REFINE:
                    length = longest // divisor
                    if length >= CLOSEST or divisor == 1:
                        training.append(_facts(length, facts, answer="text"))
                    if length >= ROOMY:
                        training.append({"task": "passkeys", "length": length, "count": digits, "answer": "text"})
                held_out = [*_asked(longest, 8, 4, 3), _text(longest, 6), *_asked(longest, 2, 2, haystack="filler")]
            else:
                held_out = [*_asked(longest, 3, 1), _text(longest, 2)]
        if removes:
            # Beside windows of a length that they have: what heads retrieve is read at all lengths that are profiled.
            length = min((task["length"] for task in documents), default=min(512, longest))
            whole = {"task": "continuation", "answer": "text"}
            count = max(1, 512 * (128 if many else 24) // length)
            documents.append({**whole, "length": length, "count": count, "answer_tokens": length - 1})
            if not windows:
                length = min(1024, longest)
                held_out = [{**whole, "length": length, "count": 8, "answer_tokens": length - 1}]
        calibration["documents"] = documents
        calibration.setdefault("training", training)
        calibration.setdefault("held_out", held_out)
        count = sum(task["count"] for task in documents)
        self._note(
            "documents", f"{count} to profile, of many kinds, and {sum(t['count'] for t in held_out)} to choose by"
        )

    def _solver(self, search: dict[str, Any], removes: bool, windows: bool, whole: bool) -> None:
        if removes and not windows:
            search["solver"] = dict(PRUNER)
            self._note("solver", "amp, by the scores of AMP and of Wanda-sp")
            return
        if isinstance(self.data.get("prepare"), dict) and not removes:
            search["solver"] = {"name": "keep"}
            self._note("solver", "keep: what was prepared everywhere, but where retrieval is highest")
            return
        removal = {"removal": {"importance": "taylor"}} if removes else {}
        search["solver"] = dict(BEST_SOLVER) | removal | ({} if self.situation.gpu else {"points": 2})
        also = ", and the loss that removal costs to first order" if removes else ""
        self._note("solver", f"moa, by attention mass and evidence that a rule hides{also}: the best method measured")
        if "refine" in search:
            return
        if self.situation.gpu or self.situation.cores >= REFINING:
            effort: dict[str, Any] = {"minutes": 3.0} if self.situation.gpu else {"minutes": 10.0, "samples": 1}
            search["refine"] = effort | ({"weights": dict(WEIGHTS)} if whole else {})
            self._note("refine", f"{search['refine']['minutes']:g} minutes of exchanges by measured loss")
        else:
            few = f"none, which on {self.situation.cores} cores would take longer than all else"
            self._note("refine", f"{few}; --set 'search.refine={{minutes: 30, samples: 1}}' adds it")

    def _statistics(self, search: dict[str, Any]) -> None:
        """Those that the solver reads; for one that reads none, a table of span rules."""
        profile = self.data.get("profile")
        if profile is None:
            profile = self.data["profile"] = {}
        solver = search.get("solver")
        if not isinstance(profile, dict) or "statistics" in profile or not isinstance(solver, dict):
            return
        try:
            read = solvers.parse(solver).scores_read()
        except ValueError:  # the schema says what is wrong with the solver, and nothing of what would follow from it
            profile["statistics"] = [{"name": "hidden_mass"}]
            return
        prepare = self.data.get("prepare")
        priced = isinstance(prepare, dict) and prepare.get("effect") is True  # the preparation measures the effects
        owners = {name: owner for owner, statistic in statistics.items() for name in statistic.gives}
        asked = [name for name, form in read.items() if name in owners and not (priced and form == "targets")]
        names = list(dict.fromkeys(owners[name] for name in asked))
        profile["statistics"] = [{"name": name} | copied(SPELLED.get(name, {})) for name in names or ["hidden_mass"]]
        self._note("statistics", ", ".join(names or ["hidden_mass"]))

    def _evaluation(self, longest: int, removes: bool, windows: bool) -> None:
        many = self.situation.gpu
        section: dict[str, Any] = {
            "compare": ["plan", *self._baselines(windows)],
            "perplexity": {"length": longest, "windows": 8 if many else 4},
            "batch_size": 25 if many else 1,
        }
        if longest >= CLOSEST:
            section["recall"] = [_facts(longest, 48 if many else 12, wordings="evaluation")]
        self.data["evaluate"] = section
        self._note("evaluate", "perplexity, and facts of kinds and wordings that nothing was calibrated on")

    def _baselines(self, windows: bool) -> list[str]:
        """What stands beside the plan: of the same bytes, or of the same widths."""
        if not windows:
            return ["random"]
        return ["uniform", "interleaved"] if isinstance(self.data.get("prepare"), dict) else ["uniform"]

    def _note(self, part: str, line: str) -> None:
        self.chosen.append(f"{part}: {line}")


def _facts(length: int, count: int, **more: str) -> dict[str, Any]:
    """Documents that ask for one of several facts; fewer facts where they would fill the text."""
    few = {} if length >= ROOMY else {"facts": 1}
    return {"task": "facts", "length": length, "count": count, **few, **more}


def _asked(length: int, facts: int, passkeys: int, lines: int = 0, **more: str) -> list[dict[str, Any]]:
    """Documents that ask for a fact, a pass key, or one of two lines."""
    counts = {"passkey": passkeys, "key_value": lines}
    digits = [{"task": task, "length": length, "count": count, **more} for task, count in counts.items() if count]
    return [_facts(length, facts, **more), *digits]


def _text(length: int, count: int) -> dict[str, Any]:
    """Plain text, the end of which is predicted."""
    return {
        "task": "continuation",
        "length": length,
        "count": count,
        "answer": "text",
        "answer_tokens": max(8, min(512, length // 4)),
    }


def needs_model(data: dict[str, Any]) -> bool:
    """Whether a recipe leaves out what depends on the model: its documents, and with them the lengths."""
    calibration = data.get("calibration")
    return calibration is None or (isinstance(calibration, dict) and "documents" not in calibration)


def filled(data: dict[str, Any], situation: Situation) -> tuple[dict[str, Any], tuple[str, ...]]:
    """A copy of a recipe's data with what it leaves out, and lines that say what was chosen."""
    defaults = Defaults(copied(data), situation)
    defaults.fill()
    return defaults.data, tuple(defaults.chosen)


def copied(value: Any) -> Any:
    """A deep copy, with what YAML shares by aliases taken apart."""
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    return [copied(item) for item in value] if isinstance(value, list) else value
