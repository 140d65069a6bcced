"""The ways in which statistics read a model, in the order in which a run takes them."""

from compress.profile.passes.attention import AttentionPass
from compress.profile.passes.base import Pass, Run, Work
from compress.profile.passes.projections import ProjectionsPass
from compress.profile.passes.reconstruction import ReconstructionPass
from compress.profile.passes.repeats import RepeatsPass
from compress.profile.passes.training import TrainingPass
from compress.profile.passes.weights import WeightsPass

PASSES: tuple[type[Pass], ...] = (
    AttentionPass,
    RepeatsPass,
    ReconstructionPass,
    ProjectionsPass,
    WeightsPass,
    TrainingPass,
)

__all__ = ["PASSES", "Pass", "Run", "Work"]
