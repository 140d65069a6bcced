"""The plan of a recipe, whether it was searched, or is that of an upcycled model."""

from __future__ import annotations

from compress.plan import Plan
from compress.stages.search import search_stage
from compress.stages.session import Session
from compress.stages.upcycle import upcycle_stage


def finished_plan(session: Session) -> Plan:
    """The plan as it was found before. Raises UserError where it was not."""
    if session.recipe.upcycle is not None:
        return upcycle_stage(session, must_be_done=True)
    return search_stage(session, must_be_done=True)
