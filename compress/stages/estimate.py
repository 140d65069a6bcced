"""How long a run takes, and how much memory, before it starts: counts of passes and tokens, and a machine's speeds.

The constants were fitted to SmolLM2-135M in float32 on one core, from 512 to 2,048 tokens: profile, search, export and
evaluation took between .8 and 1.1 times what they say. Training, and GPUs, are by count alone. They stand for an idle
machine; other work on it makes a run longer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from compress.data.generated import AT_ONCE
from compress.data.prompt import Task
from compress.evaluate.comparison import CONTROL_ROW, WINDOWS_ROW
from compress.evaluate.measure import asked_for
from compress.models.backward import ACTIVATIONS_SHARE
from compress.plan import ModelShape
from compress.profile.passes import PASSES
from compress.recipe.defaults import Situation
from compress.recipe.schema import Recipe
from compress.stages.check import uses_of
from compress.stages.evaluate import row_names
from compress.stages.speeds import Speeds
from compress.train.settings import RecoverSettings, TrainSettings
from compress.train.student import LOGITS_BYTES, LOSS_BYTES

PRODUCTS = {"cpu": 0.93, "cuda": 0.5}  # speed of a model's products beside that of one large product
DISPATCHED = 200  # operations of a layer, each of which has to be dispatched
CACHE_READS = 6  # times that a decode step of the dense model reads or copies its cache
BACKWARD = 1.05  # forward passes that a backward pass to the activations takes
WEIGHT_GRADIENTS = 1.2  # and what gradients of all weights add
TABLES, GRADIENT_TABLES = 3, 14  # exponentials that a table of the attention matrix takes for each of its numbers
COLUMNS = 0.2  # forward passes that sums over the columns of projections take
CHOICE = 0.15  # forward passes that the training of routers takes beside the pass that they read
ALTERNATIVE = 0.35  # forward passes for the attention of all head groups under another target
RULES = 7  # targets that a refinement's model knows of each head group
BASELINES = 2  # different ones, in most searches
ANSWER = 12  # tokens of a written answer
LENGTH = 512  # tokens that stand for those of a text
REPLAYED = 1e-4  # seconds of a layer's small kernels in a step that a CUDA graph replays
START, READ = 8.0, 0.1e9  # seconds of imports, and bytes per second at which weights are read, hashed and converted
EXPORT = 35.0  # seconds beside the weights, most of them in a fresh process that imports torch


class Estimate:
    """Seconds of passes of one model at some speeds.

    Args:
        shape: of the model; without one nothing is known of its attention.
        itemsize: bytes of a weight.
    """

    def __init__(self, situation: Situation, speeds: Speeds, kind: str, itemsize: int) -> None:
        self.speeds = speeds
        self.shape: ModelShape | None = situation.shape
        self.parameters = situation.parameters
        self.weights = situation.parameters * itemsize
        self.products = speeds.products * PRODUCTS.get(kind, 0.5)
        shape = self.shape
        self.heads = shape.layers * shape.query_heads if shape else 0
        self.head_dim = shape.head_dim if shape else 0
        self.token_bytes = 2 * shape.layers * shape.kv_heads * shape.head_dim * itemsize if shape else 0
        self.dispatch = (shape.layers if shape else 0) * DISPATCHED * speeds.dispatch

    def forward(self, length: int) -> float:
        """One forward pass of a sequence: all weights, and half of the matrix of queries and keys, twice."""
        operations = 2 * self.parameters + 2 * self.heads * self.head_dim * length
        return length * operations / self.products + self.dispatch

    def decode(self, length: int, batch: int = 1) -> float:
        """One decode step behind so many tokens, for one of the sequences that share it."""
        step = (self.weights + batch * CACHE_READS * length * self.token_bytes) / self.speeds.bandwidth
        return (step + self.dispatch) / batch + 2 * self.parameters / self.products

    def writing(self, length: int, batch: int, kind: str) -> float:
        """A token of documents of so many tokens that are written together, half of which lie before it on average."""
        if kind != "cuda":
            return self.decode(length // 2, batch)
        layers = self.shape.layers if self.shape else 0
        step = (self.weights + batch * length / 2 * self.token_bytes) / self.speeds.bandwidth + layers * REPLAYED
        return step / batch + 2 * self.parameters / self.products

    def attended(self, length: int, exponentials: int) -> float:
        """So many exponentials for every head, query and key."""
        return self.heads * length * length * exponentials / self.speeds.elements

    def answers(self, tasks: Sequence[Task]) -> float:
        """The dense model's own answers to the prompts of some tasks."""
        return sum(
            task.count * (self.forward(task.length) + ANSWER * self.decode(task.length))
            for task in tasks
            if task.answer == "model"
        )

    def passes(self, tasks: Iterable[Task], count: float = 1.0) -> float:
        """`count` forward passes of every document."""
        return count * sum(task.count * self.forward(task.length) for task in tasks)


def seconds(recipe: Recipe, situation: Situation, speeds: Speeds, device: str) -> dict[str, float]:
    """Seconds of each stage.

    Args:
        situation: of the recipe's model.
        speeds: of the device, with the recipe's dtype.
        device: where the work is done.
    """
    itemsize = {"float32": 4}.get(recipe.dtype, 2)
    kind = device.partition(":")[0]
    of = Estimate(situation, speeds, kind, itemsize)
    calibration, search, recover = recipe.calibration, recipe.search, recipe.recover
    stages = {"load": START + of.weights / READ}
    written = {(use.source.model_dump_json(), use.part): use for use in uses_of(recipe) if use.source.written(use.part)}
    if written:
        stages["text"] = sum(
            use.source.written(use.part)
            * of.writing(use.source.written_length, AT_ONCE.get(kind, AT_ONCE["cpu"]), kind)
            for use in written.values()
        )
    upcycled = 1 if recipe.upcycle is None else recipe.upcycle.count
    if recipe.upcycle is None:
        stages["profile"] = of.answers([*calibration.documents, *calibration.training]) + _profile(recipe, of)
    else:
        read = sum(recipe.upcycle.text_tokens for _ in recipe.upcycle.texts)
        stages["upcycle"] = upcycled * (of.weights / READ + read / LENGTH * of.forward(LENGTH))
    if recipe.prepare is not None:
        targets, prepare = len(recipe.prepare.targets), recipe.prepare
        chosen = sum(all(each.needs_choice for each in prepare.objectives_of(target)) for target in prepare.targets)
        rounds = 1 if prepare.again is None else 2
        passes = (1 + BACKWARD) * (targets - chosen) * rounds + CHOICE * chosen
        stages["prepare"] = _training(prepare, of, rounds + passes)
        if prepare.effect:
            lengths = sorted(calibration.lengths)
            others = targets if of.shape is None else prepare.pricing().alternatives(of.shape, lengths)
            stages["effect"] = of.passes(calibration.documents, 1 + BACKWARD + ALTERNATIVE * others)
    searched = search.solver.most_plans(len(calibration.lengths))
    plans = 1 + searched * (1 if search.serve is None else 2) + BASELINES
    if recipe.upcycle is None:
        stages["search"] = of.answers(calibration.held_out) + of.passes(calibration.held_out, plans)
    if search.refine is not None:
        learnt = [*calibration.documents, *calibration.training]
        made = search.refine.samples * (1 + BACKWARD + RULES * ALTERNATIVE)
        stages["search"] += max(60 * search.refine.minutes, of.passes(learnt, plans + made))
    rows = row_names(recipe)
    if recover is not None:
        step = 1 + BACKWARD + (WEIGHT_GRADIENTS if recover.train == "full" else 0.0)
        step += any(objective.needs_teacher for objective in recover.losses)
        times = 1 + sum(row in rows for row in (CONTROL_ROW, WINDOWS_ROW))
        stages["recover"] = _training(recover, of, (times - 1 + upcycled) * step)
    stages["export"] = EXPORT + upcycled * of.weights / READ
    batch = recipe.evaluate.batch_size
    changed = len(set(rows) - {"dense", CONTROL_ROW})
    stages["evaluate"] = sum(
        (len(rows) if inputs.by_dense else changed)
        * inputs.count
        * (of.forward(inputs.length) + inputs.written * of.decode(inputs.length, batch))
        for measure in asked_for(recipe.evaluate)
        for inputs in measure.inputs(of.shape)
    )
    return stages


def _profile(recipe: Recipe, of: Estimate) -> float:
    """The passes of a profile over its documents, and the training of statistics that train."""
    total, documents = 0.0, recipe.calibration.documents
    lengths, corpora = sorted(recipe.calibration.lengths), 1 if recipe.calibration.second is None else 2
    for each in PASSES:
        taken = [statistic for statistic in recipe.profile.statistics if statistic.reads == each.reads]
        if not taken:
            continue
        others = sum(statistic.alternatives(of.shape, lengths) for statistic in taken) if of.shape else 0
        work = each.work(taken, others)
        passes = work.forward + BACKWARD * work.backward + WEIGHT_GRADIENTS * work.weights
        passes += ALTERNATIVE * work.alternatives + COLUMNS * work.columns
        if work.trained is not None:
            queue = recipe.calibration.training or documents
            total += work.trained * of.passes(queue, passes) / sum(task.count for task in queue)
            continue
        total += min(work.corpora, corpora) * of.passes(documents, passes)
        tables = 0 if not work.tables else GRADIENT_TABLES if work.backward else TABLES
        total += sum(task.count * of.attended(task.length, tables) for task in documents)
    return total


def _training(settings: TrainSettings, of: Estimate, passes: float) -> float:
    """So many forward passes of every sequence."""
    return passes * settings.step_count * settings.batch_size * of.forward(settings.length)


def memory(recipe: Recipe, situation: Situation) -> int:
    """Bytes that the run holds at most in any stage, about; of a training in several processes, what each holds."""
    tasks = [*recipe.calibration.documents, *recipe.calibration.held_out, *recipe.evaluate.recall]
    upcycled = 1 if recipe.upcycle is None else recipe.upcycle.count
    stages = [situation.held(max((task.length for task in tasks), default=0)) * upcycled]
    if recipe.prepare is not None:
        stages.append(situation.held(_tokens_at_once(recipe.prepare)))  # layer by layer
    if recipe.recover is not None:
        stages.append(_trained(recipe.recover, situation) * upcycled)
    return max(stages)


def _tokens_at_once(settings: TrainSettings) -> int:
    """Tokens that one pass of a training takes."""
    return min(settings.micro_batch or settings.batch_size, settings.batch_size) * settings.length


def _trained(settings: RecoverSettings, situation: Situation) -> int:
    """Bytes of a training of the whole model: weights, gradients and moments in float32, what is kept for the backward
    pass, and the losses over the vocabulary."""
    tokens = _tokens_at_once(settings) // settings.context
    layers = situation.shape.layers if situation.shape else 1
    kept = situation.kept * tokens
    recomputed = settings.checkpointing
    if recomputed is None:
        recomputed = situation.memory is not None and kept > ACTIVATIONS_SHARE * situation.memory
    if recomputed:
        kept = kept // layers + layers * situation.hidden * 4 * tokens
    losses = min(tokens * situation.vocabulary, LOGITS_BYTES // 4) * LOSS_BYTES[situation.gpu]
    # Gradients and two moments; and on a GPU the model is counted in 16 bits.
    optimised = situation.parameters * (12 + 2 * situation.gpu) if settings.train == "full" else 0
    return situation.held(0) + optimised + kept + losses
