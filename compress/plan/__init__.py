"""The plan: its schema, how it is made, read and described, and the facts about the model that it is bound to."""

from compress.plan.build import make_plan, measured_plan, plan_of_layers, uniform_plan
from compress.plan.facts import ModelShape
from compress.plan.read import CHECKPOINT_PLAN, read_plan
from compress.plan.schema import (
    Amount,
    Expert,
    Form,
    Group,
    LayerPlan,
    Mlp,
    MlpRouting,
    OutputBias,
    Plan,
    Predicted,
    Upcycle,
)
from compress.plan.words import added, amount_line, removal

__all__ = [
    "CHECKPOINT_PLAN",
    "Amount",
    "Expert",
    "Form",
    "Group",
    "LayerPlan",
    "Mlp",
    "MlpRouting",
    "ModelShape",
    "OutputBias",
    "Plan",
    "Predicted",
    "Upcycle",
    "added",
    "amount_line",
    "make_plan",
    "measured_plan",
    "plan_of_layers",
    "read_plan",
    "removal",
    "uniform_plan",
]
