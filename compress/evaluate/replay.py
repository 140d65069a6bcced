"""lm-eval apart from the model: its requests are recorded here, scored elsewhere, and the answers played back to it.

Imports lm-eval, so it is imported late.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import torch
from lm_eval.api.model import LM
from transformers import AutoModelForCausalLM

from compress.errors import UserError
from compress.evaluate.comparison import Comparison, VariantResult
from compress.evaluate.harness import run_on
from compress.evaluate.measures.lm_eval import LmEval
from compress.evaluate.requests import Answer, AnswerFile, Request, RequestFile, check_answers
from compress.evaluate.strict import Strict
from compress.evaluate.task_result import TaskResult

Key = tuple[str, int, int]


def record(config: Any, tokenizer: Any, request: LmEval, model_name: str) -> RequestFile:
    """All log-likelihood requests of a request's tasks, with token ids as lm-eval's `HFLM` makes them.

    Args:
        config: the model's configuration; no weights are needed.

    Raises:
        UserError: no such task, one that generates or rolls, or an input beyond the model's context.
    """
    request.check(None)
    with torch.device("meta"):
        recorder = _Recorder(AutoModelForCausalLM.from_config(config), tokenizer, 1)
    for name in request.tasks:
        run_on(recorder, request, name)
    return RequestFile(model_name, request.tasks, request.limit, tuple(recorder.recorded.values()))


def replay(asked: RequestFile, answers: Sequence[Answer], include: str | None) -> list[TaskResult]:
    """The tasks' results from recorded answers, by lm-eval.

    Args:
        include: the folder of task files that the requests were made with.

    Raises:
        UserError: answers are missing, or the tasks here ask something else than was recorded.
    """
    check_answers(answers, asked)
    request = LmEval(tasks=asked.tasks, include=include, limit=asked.limit)
    request.check(None)
    player = _Player(dict(zip(map(_key, asked.requests), zip(asked.requests, answers, strict=True), strict=True)))
    return [run_on(player, request, name) for name in asked.tasks]


def compare_answers(asked: RequestFile, answered: Sequence[AnswerFile], include: str | None) -> Comparison:
    """Several models' recorded answers to the same requests beside those of the first.

    Raises:
        UserError: as `replay`.
    """
    variants = [VariantResult(name=model.name, results=replay(asked, model.answers, include)) for model in answered]
    return Comparison(
        model=answered[0].name,
        fingerprint=f"requests {asked.key}",
        dtype=", ".join(dict.fromkeys(model.dtype for model in answered)),
        device=", ".join(dict.fromkeys(model.device for model in answered)),
        seed=0,
        batch_size=1,
        asked=[{"measure": "lm_eval", "tasks": list(asked.tasks), "limit": asked.limit}],
        versions={"lm-eval": version("lm_eval")},
        variants=variants,
    )


def _key(request: Request) -> Key:
    return request.task, request.doc, request.choice


def _instance_key(instance: Any) -> Key:
    return instance.task_name, instance.doc_id, instance.idx


def _other_kind(instances: Sequence[Any]) -> UserError:
    return UserError(
        "only log-likelihoods can be recorded",
        where=instances[0].task_name,
        expected="a task of multiple choice or of one continuation",
        found=instances[0].request_type,
        fix="run this task with the model in memory: compress eval MODEL --tasks NAME",
    )


class _Recorder(Strict):
    """Keeps what it is asked, with the token ids that its base class makes of it, and answers nothing of worth."""

    def __init__(self, model: Any, tokenizer: Any, batch_size: int) -> None:
        super().__init__(model, tokenizer, batch_size)
        self.recorded: dict[Key, Request] = {}
        self._asked: list[Any] = []

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
        self._asked = requests
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
        for instance, ((context, continuation), context_ids, ids) in zip(self._asked, requests, strict=True):
            self._fits(len(context_ids) + len(ids) - 1)
            key = task, doc, choice = _instance_key(instance)
            self.recorded[key] = Request(task, doc, choice, context, continuation, tuple(context_ids), tuple(ids))
        return [(0.0, False)] * len(requests)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> Any:
        raise _other_kind(requests)

    def generate_until(self, requests: Any, disable_tqdm: bool = True) -> Any:
        raise _other_kind(requests)


class _Player(LM):
    """Answers from a record; asked anything else, it says so."""

    def __init__(self, known: dict[Key, tuple[Request, Answer]]) -> None:
        super().__init__()
        self.known = known

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
        return [self._answer(instance) for instance in requests]

    def _answer(self, instance: Any) -> Answer:
        known = self.known.get(_instance_key(instance))
        if known is None or (known[0].context, known[0].continuation) != tuple(instance.args):
            raise UserError(
                "this task's requests differ from the recorded ones",
                where=f"{instance.task_name}, item {instance.doc_id}, request {instance.idx}",
                fix="record the requests again, with the task files and data that are here",
            )
        return known[1]

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> Any:
        raise _other_kind(requests)

    def generate_until(self, requests: Any, disable_tqdm: bool = True) -> Any:
        raise _other_kind(requests)
