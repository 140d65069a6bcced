"""Gathers every method that a recipe may name."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from compress.recipe import Methods


def load() -> Methods:
    """Import the packages that register methods, and hand over their classes. Imports torch."""
    import typing

    import compress.data.tasks
    import compress.profile
    import compress.search.checks  # noqa: F401  (importing a package registers its methods)
    from compress import registry
    from compress.data.text import DatasetText, EmbeddedText, FileText
    from compress.evaluate.harness import HarnessRequest
    from compress.evaluate.latency import LatencyRequest
    from compress.evaluate.perplexity import PerplexityRequest
    from compress.recipe import Methods
    from compress.search.budget.budget import Budget
    from compress.search.checks import check_recipe
    from compress.search.refine.refine import Refine
    from compress.train.settings import RecoverSettings

    sources: tuple[type[registry.Method], ...] = (EmbeddedText, FileText, DatasetText)
    return Methods(
        statistics=dict(registry.statistics.items()),
        solvers=dict(registry.solvers.items()),
        tasks=dict(registry.tasks.items()),
        sources={typing.cast(str, source.model_fields["source"].default): source for source in sources},
        budget=Budget,
        refine=Refine,
        recover=RecoverSettings,
        perplexity=PerplexityRequest,
        lm_eval=HarnessRequest,
        latency=LatencyRequest,
        check=check_recipe,
    )
