"""The recipe: the YAML file that fixes a whole run. Its schema, and the reading that reports every problem at once.

Importing this needs neither torch nor any method. Methods (statistics, solvers, tasks, text sources, the budget) are
classes that the caller hands in as `Methods`; their fields are the recipe's keys.
"""

from __future__ import annotations

import io
import json
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, SerializeAsAny, ValidationError, field_validator

from compress.encodings import decode, wrong_byte
from compress.errors import Problem, UserError, nearest
from compress.limits import BATCH, DOCUMENT_TOKENS, SEED
from compress.located_yaml import MOST_CHARACTERS, KeyPath, LocatedYaml, key_path, read_located, unknown_key
from compress.registry import Method, PathText

AnyMethod = SerializeAsAny[Method]
Baseline = Literal["plan", "uniform", "uniform-at-longest", "streaming", "random"]
Dtype = Literal["float32", "bfloat16", "float16"]


class Section(BaseModel):
    """Frozen; unknown keys are refused, and so is `true` or `"4"` where a number belongs."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class CalibrationSection(Section):
    """The documents that heads are measured on."""

    text: AnyMethod = Field(description="where the haystacks come from")
    documents: tuple[AnyMethod, ...] = Field(
        min_length=1, description="what is profiled, one entry per task and length"
    )
    training: tuple[AnyMethod, ...] = Field(
        (), description="what statistics that train, and refinement, learn from; without it, `documents`"
    )
    second: AnyMethod | None = Field(
        None, description="another text; importance statistics then run on both, and the profile says how they agree"
    )
    held_out: tuple[AnyMethod, ...] = Field((), description="what the final plan is chosen on; best at longer lengths")


class ProfileSection(Section):
    """What is measured."""

    statistics: tuple[AnyMethod, ...] = Field(min_length=1, description="statistics to take, one pass for all")


class SearchSection(Section):
    """How the plan is decided."""

    solver: AnyMethod = Field(description="the method that decides")
    budget: AnyMethod = Field(description="what the plan may cost")
    refine: AnyMethod | None = Field(None, description="exchanges between head groups by measured loss, afterwards")


class ExportSection(Section):
    """The form of the checkpoint."""

    form: Literal["patched", "native", "auto"] = Field(
        "patched",
        description="patched carries its own attention code and holds every plan; native is a stock architecture, for "
        "plans of full layers and one window without sinks; auto is native where the plan allows it",
    )
    dtype: Dtype | None = Field(None, description="dtype of the weights on disk; null keeps the recipe's")
    max_shard_size: str = Field(
        "5GB", pattern=r"^[1-9][0-9]{0,5}(KB|MB|GB)$", description="largest weight file, as 5GB"
    )


class EvaluateSection(Section):
    """What the checkpoint is compared on; the dense model is always beside it."""

    compare: tuple[Baseline, ...] = Field(
        ("plan", "uniform"), strict=False, description="plans beside the dense model, baselines at the plan's bytes"
    )
    perplexity: AnyMethod | None = Field(None, description="leave it out to skip perplexity")
    recall: tuple[AnyMethod, ...] = Field((), description="recall tasks, one entry per task and length")
    lm_eval: AnyMethod | None = Field(None, description="lm-eval tasks and long-context suites")
    latency: AnyMethod | None = Field(None, description="time of a prefill and a decode step beside the dense model's")
    batch_size: int = Field(1, ge=1, le=BATCH, description="recall prompts answered at once; more is faster on a GPU")

    @field_validator("compare")
    @classmethod
    def _each_once(cls, compare: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(compare)) < len(compare):
            raise ValueError("expected each name once")
        return compare


class Recipe(Section):
    """One run, from the model to the numbers."""

    schema_: Literal[1] = Field(1, alias="schema", description="version of this form")
    model: PathText = Field(description="demo/smollm2-135m, a hub id, a folder, or a .gguf file")
    dtype: Dtype = Field("float32", description="dtype of the weights in memory")
    device: str = Field(
        "auto", pattern=r"^(auto|cpu|mps|cuda(:\d{1,3})?)$", description="auto, cpu, mps, cuda or cuda:N"
    )
    seed: int = Field(0, ge=0, le=SEED, description="of documents, sampling and evaluation")
    output: PathText = Field(description="the run folder, relative to the current folder")
    calibration: CalibrationSection
    profile: ProfileSection
    search: SearchSection
    recover: AnyMethod | None = Field(None, description="training of the plan's model; leave it out to train nothing")
    export: ExportSection = Field(default_factory=ExportSection)
    evaluate: EvaluateSection

    _text: str = PrivateAttr("")
    _source: Path = PrivateAttr(Path())
    _names: dict[type[Method], str] = PrivateAttr(default_factory=dict)

    @property
    def text(self) -> str:
        """The file, verbatim."""
        return self._text

    @property
    def source(self) -> Path:
        """The file's path."""
        return self._source

    def name_of(self, method: Method) -> str:
        """The name that a recipe gives to a method's class."""
        return self._names[type(method)]

    def resolved(self) -> dict[str, Any]:
        """Plain data with every default written out, in the order of the schema, and the same for the same recipe."""
        return typing.cast(dict[str, Any], self._plain(self))

    def _plain(self, value: Any) -> Any:
        if isinstance(value, Method):
            data = value.model_dump(mode="json")
            if type(value) in self._names:
                key = "task" if "task" in data else "source" if "source" in data else "name"
                data = {key: self._names[type(value)]} | data
            return data
        if isinstance(value, BaseModel):
            fields = type(value).model_fields
            return {field.alias or name: self._plain(getattr(value, name)) for name, field in fields.items()}
        return [self._plain(item) for item in value] if isinstance(value, tuple) else value


@dataclass(frozen=True)
class Methods:
    """The classes that a recipe may name, by the name it gives them.

    Attributes:
        check: what they know of what does not go together, as keys and problems without a place.
    """

    statistics: Mapping[str, type[Method]]
    solvers: Mapping[str, type[Method]]
    tasks: Mapping[str, type[Method]]
    sources: Mapping[str, type[Method]]
    budget: type[Method]
    refine: type[Method]
    recover: type[Method]
    perplexity: type[Method]
    lm_eval: type[Method]
    latency: type[Method]
    check: Callable[[Recipe], list[tuple[KeyPath, Problem]]] = lambda recipe: []


@dataclass(frozen=True)
class _Slot:
    """A place in the recipe where a method stands.

    Attributes:
        selector: the key that names the method; None where only one kind can stand.
        many: whether a list of methods stands there.
        default: what stands there when the key is left out; None when it has to be given, or may be absent.
        optional: whether null may stand there, too.
    """

    path: tuple[str, ...]
    kind: str
    selector: str | None
    many: bool
    default: Any = None
    optional: bool = False


_TEXT = {"source": "embedded"}
_STATISTICS = [{"name": "influence"}, {"name": "attention"}, {"name": "retrieval"}]
_SLOTS = (
    _Slot(("calibration", "text"), "sources", "source", False, _TEXT),
    _Slot(("calibration", "second"), "sources", "source", False, optional=True),
    _Slot(("calibration", "documents"), "tasks", "task", True),
    _Slot(("calibration", "training"), "tasks", "task", True, []),
    _Slot(("calibration", "held_out"), "tasks", "task", True, []),
    _Slot(("profile", "statistics"), "statistics", "name", True, _STATISTICS),
    _Slot(("search", "solver"), "solvers", "name", False, {"name": "moa"}),
    _Slot(("search", "budget"), "budget", None, False),
    _Slot(("search", "refine"), "refine", None, False, optional=True),
    _Slot(("recover",), "recover", None, False, optional=True),
    _Slot(("evaluate", "perplexity"), "perplexity", None, False, optional=True),
    _Slot(("evaluate", "recall"), "tasks", "task", True, []),
    _Slot(("evaluate", "lm_eval"), "lm_eval", None, False, optional=True),
    _Slot(("evaluate", "latency"), "latency", None, False, optional=True),
)
_SINGULAR = {"sources": "text source", "tasks": "task", "statistics": "statistic", "solvers": "solver"}
MOST_BYTES = 4 * MOST_CHARACTERS
_DEFAULT_SECTIONS = ("profile", "evaluate")


def load_recipe(path: Path | str, methods: Methods | Callable[[], Methods]) -> Recipe:
    """Read and check a recipe file.

    Args:
        methods: what a recipe may name, or what gathers it, which is called only for a recipe with the right outline.

    Raises:
        UserError: no such file, or everything that is wrong with it: each problem with file, line, column, key,
            what was expected and found, and the nearest valid name.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
    except FileNotFoundError:
        raise UserError("no such recipe file", where=str(path), fix=_similar_file(path)) from None
    except IsADirectoryError:
        inside = path / "recipe.yaml"
        raise UserError(
            "the recipe cannot be read: it is a folder",
            where=str(path),
            expected="a .yaml file",
            fix=f"did you mean `{inside}`?" if inside.is_file() else None,
        ) from None
    except (OSError, ValueError) as error:
        raise UserError("the recipe cannot be read", where=str(path), found=_reason(error)) from None
    if len(data) > MOST_BYTES:
        raise UserError(
            "the file is too large to be a recipe", where=str(path), expected=f"at most {MOST_BYTES:,} bytes"
        )
    try:
        text = decode(data)
    except UnicodeDecodeError:
        raise UserError(
            "the recipe is not UTF-8 text", where=str(path), found=wrong_byte(io.BytesIO(data)), fix="save it as UTF-8"
        ) from None
    return parse_recipe(text, methods, path)


def _reason(error: OSError | ValueError) -> str:
    return getattr(error, "strerror", None) or str(error)


def parse_recipe(text: str, methods: Methods | Callable[[], Methods], path: Path) -> Recipe:
    """`load_recipe` for a text; `path` is what problems name. Raises UserError."""
    located = read_located(text, str(path))
    problems = list(located.problems)
    if not isinstance(located.data, dict):
        if not problems:
            problems.append(
                Problem(
                    "a recipe is a mapping of keys", located.where(()), "model:, output:, ...", _found(located.data)
                )
            )
        raise UserError(problems)
    if not isinstance(methods, Methods):
        problems += _outline(located)
        if problems:
            raise UserError(sorted(problems, key=_place))
        methods = methods()
    data = _copy(located.data)
    for section in _DEFAULT_SECTIONS:
        if data.get(section) is None:
            data[section] = {}
    names: dict[type[Method], str] = {}
    for slot in _SLOTS:
        _fill(slot, data, methods, located, problems, names)
    recipe = None
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        problems += [_problem(item, (), Recipe, located) for item in error.errors(include_url=False)]
    if recipe is not None:
        recipe._text, recipe._source, recipe._names = text, path, names
        problems += _cross_checks(recipe, located) + _missing_scores(recipe, methods, located)
        for keys, found in [] if problems else methods.check(recipe):
            found.where = located.where(keys)
            problems.append(found)
    if problems or recipe is None:
        # Where the text itself is wrong, what was put in its place is nothing to complain of, too.
        told = {problem.where for problem in located.problems}
        others = [problem for problem in problems if problem.where not in told]
        raise UserError(sorted([*located.problems, *others], key=_place))
    return recipe


def _outline(located: LocatedYaml) -> list[Problem]:
    """What is wrong with the keys of the top level, which needs no method to be known."""
    fields = {field.alias or name: field for name, field in Recipe.model_fields.items()}
    unknown = [unknown_key((key,), list(fields), located) for key in located.data if key not in fields]
    missing = [
        Problem(f"missing key `{name}`", located.where(()), expected=field.description)
        for name, field in fields.items()
        if field.is_required() and name not in located.data and name not in _DEFAULT_SECTIONS
    ]
    return unknown + missing


def _copy(data: Any) -> Any:
    """A deep copy that takes the aliases of YAML apart."""
    if isinstance(data, dict):
        return {key: _copy(value) for key, value in data.items()}
    return [_copy(item) for item in data] if isinstance(data, list) else data


def _fill(
    slot: _Slot,
    data: dict[str, Any],
    methods: Methods,
    located: LocatedYaml,
    problems: list[Problem],
    names: dict[type[Method], str],
) -> None:
    """Put methods in the place of their keys. A wrong one is a problem, and an empty method takes its place."""
    parent: Any = data
    for part in slot.path[:-1]:
        parent = parent.get(part) if isinstance(parent, dict) else None
    if not isinstance(parent, dict):
        return
    raw = parent.get(slot.path[-1])
    if slot.path[-1] not in parent:
        if slot.default is None:
            return
        raw = slot.default
    if raw is None and slot.optional:
        return
    if not slot.many:
        parent[slot.path[-1]] = _method(slot, raw, slot.path, methods, located, problems, names)
    elif isinstance(raw, list):
        parent[slot.path[-1]] = tuple(
            _method(slot, item, (*slot.path, i), methods, located, problems, names) for i, item in enumerate(raw)
        )
    else:
        problems.append(
            Problem(
                f"wrong value for `{key_path(slot.path)}`",
                located.where(slot.path),
                expected=f"a list, each entry `- {slot.selector}: ...`",
                found=_found(raw),
            )
        )
        parent[slot.path[-1]] = (Method(),)


def _method(
    slot: _Slot,
    raw: Any,
    path: KeyPath,
    methods: Methods,
    located: LocatedYaml,
    problems: list[Problem],
    names: dict[type[Method], str],
) -> Method:
    """One method from its keys."""
    if not isinstance(raw, dict):
        expected = f"`{slot.selector}: ...` and its parameters" if slot.selector else "a mapping of keys"
        fix = f"write `{{{slot.selector}: {raw}}}`" if slot.selector and isinstance(raw, str) else None
        problems.append(Problem(f"wrong value for `{key_path(path)}`", located.where(path), expected, _found(raw), fix))
        return Method()
    parameters = dict(raw)
    known: Any = getattr(methods, slot.kind)
    if slot.selector is None:
        chosen: type[Method] = known
    else:
        name = parameters.get(slot.selector)
        if not isinstance(name, str) or name not in known:
            missing = slot.selector not in parameters
            here: KeyPath = path if missing else (*path, slot.selector)
            what = (
                f"missing key `{key_path((*path, slot.selector))}`"
                if missing
                else (f"unknown {_SINGULAR[slot.kind]} `{name}`")
            )
            problems.append(
                Problem(
                    what,
                    located.where(here),
                    expected=f"one of {', '.join(sorted(known))}",
                    found=None if missing else _found(name),
                    fix=None if missing else nearest(str(name), known),
                )
            )
            return Method()
        chosen = known[name]
        names[chosen] = name
        if slot.selector not in chosen.model_fields:
            del parameters[slot.selector]
    try:
        # As JSON, because strict JSON takes a list for a tuple and still refuses `true` or "4" for a number.
        return chosen.model_validate_json(json.dumps(parameters), strict=True)
    except ValidationError as error:
        extra = [slot.selector] if slot.selector else []
        problems += [_problem(item, path, chosen, located, extra) for item in error.errors(include_url=False)]
        return Method()


def _problem(
    item: Any, prefix: KeyPath, schema: type[BaseModel], located: LocatedYaml, extra: list[str] | None = None
) -> Problem:
    """One of pydantic's errors in the project's words, at its place in the file."""
    inner = _place_in_file(located.data, prefix, item)
    path = (*prefix, *inner)
    kind = item["type"]
    if kind == "extra_forbidden":
        owner = _schema_at(schema, item["loc"][:-1])
        known = [field.alias or name for name, field in owner.model_fields.items()] if owner else []
        return unknown_key(path, known + ((extra or []) if len(inner) == 1 and owner is schema else []), located)
    if kind == "missing":
        owner = _schema_at(schema, item["loc"][:-1])
        field = (
            next((f for name, f in owner.model_fields.items() if (f.alias or name) == inner[-1]), None)
            if owner and inner
            else None
        )
        return Problem(
            f"missing key `{key_path(path)}`",
            located.where(path[:-1], key=True),
            expected=field.description if field else None,
        )
    if kind == "model_type":
        owner = _schema_at(schema, inner)
        keys = ", ".join(f.alias or name for name, f in owner.model_fields.items()) if owner else ""
        message = f"a mapping with the keys {keys}"
    elif kind == "string_pattern_mismatch":
        owner = _schema_at(schema, inner[:-1])
        pattern_field = owner.model_fields.get(str(inner[-1])) if owner else None
        message = pattern_field.description if pattern_field and pattern_field.description else item["msg"]
    else:
        message = item["msg"].removeprefix("Value error, ").removeprefix("Input should be ").removeprefix("expected ")
    fix = None
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        selector = item["ctx"]["discriminator"].strip("'")
        options = [option.strip(" '") for option in item["ctx"].get("expected_tags", "").split(",")]
        message = f"`{selector}: ...`" + (f", one of {', '.join(options)}" if options[0] else "")
        fix = nearest(str(item["ctx"].get("tag", "")), options)
        return Problem(f"wrong value for `{key_path(path)}`", located.where(path), message, item["ctx"].get("tag"), fix)
    if kind == "literal_error":
        options = [option.strip(" '") for option in item["ctx"]["expected"].replace(" or ", ", ").split(",")]
        fix = nearest(str(item["input"]), options)
    whole = isinstance(item["input"], dict | list) and kind == "value_error"
    return Problem(
        f"wrong value for `{key_path(path)}`",
        located.where(path),
        expected=message,
        found=None if whole else _found(item["input"]),
        fix=fix,
    )


def _place_in_file(data: Any, prefix: KeyPath, item: Any) -> KeyPath:
    """Where an error is in the file, below `prefix`: pydantic names branches of unions too (`text.file.path`)."""
    for part in prefix:
        data = _step(data, part)
    place: list[str | int] = []
    for number, part in enumerate(item["loc"]):
        missing = item["type"] == "missing" and number == len(item["loc"]) - 1
        inner = _step(data, part)
        if missing or inner is not _NOTHING:
            place.append(part)
            data = inner
    return tuple(place)


_NOTHING = object()


def _step(data: Any, part: str | int) -> Any:
    """The part of a mapping or list, `_NOTHING` where there is none. Numbers as keys are given as text."""
    if isinstance(data, dict):
        return next((value for key, value in data.items() if str(key) == str(part)), _NOTHING)
    if isinstance(data, list) and isinstance(part, int) and part < len(data):
        return data[part]
    return _NOTHING


def _schema_at(schema: type[BaseModel], path: KeyPath) -> type[BaseModel] | None:
    """The model class that checks the mapping at `path`; a branch of a union chooses the class with that name."""
    candidates = [schema]
    for part in path:
        if isinstance(part, int):
            continue
        named = [model for model in candidates if any(field.default == part for field in model.model_fields.values())]
        if len(candidates) > 1 and named:
            candidates = named
            continue
        field = next(
            (f for model in candidates for name, f in model.model_fields.items() if (f.alias or name) == part), None
        )
        candidates = list(_models_in(field.annotation)) if field else []
    return candidates[0] if candidates else None


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """Model classes in an annotation, through unions, tuples and Annotated."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        if issubclass(annotation, BaseModel):
            yield annotation
        return
    for argument in typing.get_args(annotation):
        yield from _models_in(argument)


def _found(value: Any) -> str:
    """How a value reads in a message: as in YAML, cut short."""
    if value is None:
        return "nothing (null)"
    if isinstance(value, dict | list | tuple):
        return f"a {'mapping' if isinstance(value, dict) else 'list'} with {len(value)} entries"
    text = str(value).lower() if isinstance(value, bool) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


def _place(problem: Problem) -> tuple[int, int]:
    """Line and column, to print problems in the order of the file."""
    parts = (problem.where or "").rsplit(":", 2)
    return (int(parts[1]), int(parts[2])) if len(parts) == 3 and parts[1].isdigit() and parts[2].isdigit() else (0, 0)


def _cross_checks(recipe: Recipe, located: LocatedYaml) -> list[Problem]:
    """What no single key shows: the same thing twice, and parts that need one another."""
    problems = []
    lists: list[tuple[KeyPath, tuple[Method, ...]]] = [
        (("calibration", "documents"), recipe.calibration.documents),
        (("calibration", "held_out"), recipe.calibration.held_out),
        (("profile", "statistics"), recipe.profile.statistics),
        (("evaluate", "recall"), recipe.evaluate.recall),
    ]
    for path, methods in lists:
        seen: dict[Any, int] = {}
        for i, method in enumerate(methods):
            same: Any = type(method) if path[0] == "profile" else (type(method), method.model_dump_json())
            first = seen.setdefault(same, i)
            if type(method) is not Method and first != i:
                problems.append(
                    Problem(
                        f"`{key_path((*path, i))}` is there twice",
                        located.where((*path, i)),
                        expected="each entry once",
                        found=f"the same as `{key_path((*path, first))}`",
                        fix="raise `count` instead" if path[0] != "profile" else "remove one of the two",
                    )
                )
    problems += _too_many_documents(recipe, located)
    for i, method in enumerate(recipe.evaluate.recall):
        if not getattr(method, "scored", True):
            problems.append(
                Problem(
                    f"`evaluate.recall[{i}]` has no right answer to compare with",
                    located.where(("evaluate", "recall", i)),
                    expected="a task that hides something: passkey, key_value or facts",
                    found=str(getattr(method, "task", "")),
                )
            )
    return problems


def _too_many_documents(recipe: Recipe, located: LocatedYaml) -> list[Problem]:
    """Lists of documents that are each within the limits, and together more than a memory holds."""
    calibration = recipe.calibration
    lists: list[tuple[KeyPath, Any]] = [
        (("calibration", "documents"), calibration.documents),
        (("calibration", "training"), calibration.training),
        (("calibration", "held_out"), calibration.held_out),
        (("evaluate", "recall"), recipe.evaluate.recall),
    ]
    problems = []
    for path, tasks in lists:
        tokens = sum(task.length * task.count for task in tasks if type(task) is not Method)
        if tokens > DOCUMENT_TOKENS:
            problems.append(
                Problem(
                    f"`{key_path(path)}` asks for too many tokens",
                    located.where(path),
                    expected=f"at most {DOCUMENT_TOKENS:,} tokens, length times count, of all entries together",
                    found=f"{tokens:,}",
                    fix="lower `count` or `length`",
                )
            )
    return problems


FORMS = {
    "units": "a score of every head and neuron",
    "means": "mean inputs, which removed heads and neurons are compensated with",
    "groups": "one number for every head group",
    "rules": "a table of span rules",
    "targets": "what each of some targets costs every head group",
}


def _missing_scores(recipe: Recipe, methods: Methods, located: LocatedYaml) -> list[Problem]:
    """What the solver reads by name and the profile would not have, which only the search would find out."""
    listed: dict[str, str] = {}
    for statistic in recipe.profile.statistics:
        listed |= statistic.gives
    owners = {name: owner for owner, statistic in methods.statistics.items() for name in statistic.gives}
    problems = []
    for name, form in recipe.search.solver.scores_read().items():
        if listed.get(name) == form:
            continue
        fitting = [other for other in listed if listed[other] == form]
        fix = nearest(name, fitting)
        if name in listed:
            what, found = f"the solver cannot use `{name}`", f"{name}, {FORMS[listed[name]]}"
        else:
            what, found = f"the solver reads `{name}`, which is not measured", name
            if fix is None and name in owners and methods.statistics[owners[name]].gives[name] == form:
                fix = f"add `{{name: {owners[name]}}}` to `profile.statistics`"
        expected = f"{FORMS[form]}, of `profile.statistics`: {', '.join(fitting) or 'none is listed'}"
        problems.append(Problem(what, located.where(("search", "solver")), expected, found, fix))
    return problems


def _similar_file(path: Path) -> str | None:
    """The file of a similar name, beside the missing one or among the recipes in `recipes/`."""
    for folder in (path.parent, Path("recipes")):
        if folder.is_dir():
            names = {candidate.name: candidate for candidate in folder.glob("*.y*ml")}
            found = nearest(path.name, names)
            if found:
                name = found.split("`")[1]
                return f"did you mean `{names[name]}`?"
    return "`compress recipes` lists the recipes that come with the project"
