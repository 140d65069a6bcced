"""What any target costs a head group, to first order: slope . (O_target - O_full).

With s = dLoss/dO, the gradient at a query head's attention output in one row, replacing the output O_full of full
attention by that of a target changes the loss by s . (O_target - O_full), to first order. Both outputs are exact: they
come from the runtime's own mixers. Summed over the rows and the query heads of a group this is `effect.signed`, the
derivative of the loss where O_full moves towards O_target; `effect.absolute` sums the sizes, as attention influence
does, since rows that gain do not make up for rows that lose at other inputs. For a window it is what
`influence.joint` is; a removed group has O_target = 0. So windows, removal and any target that the runtime has are
priced in the same unit, and may be weighed against each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch
from pydantic import BeforeValidator, Field, SerializeAsAny

from compress.limits import ENTRIES
from compress.models.outputs import Alternatives, check_priced
from compress.profile.heads.base import HeadStatistic, Table
from compress.profile.key import Key
from compress.profile.passes.tiles import LayerTensors
from compress.profile.statistic import Item, Result, Results, Subject, Sums
from compress.registry import statistics
from compress.runtime.mixer import LayerFacts
from compress.targets.target import Target, parse_target

if TYPE_CHECKING:
    from compress.plan import ModelShape


@statistics.register("effect")
class Effect(HeadStatistic):
    """Loss that each of some targets costs each head group, to first order (needs a backward pass)."""

    targets: tuple[Annotated[SerializeAsAny[Target], BeforeValidator(parse_target)], ...] = Field(
        min_length=1,
        max_length=ENTRIES,
        description="the targets, as a plan has them, for instance `{target: window, sink: 64, alpha: 256, beta: 0}` "
        "or `{target: pruned}`",
    )

    needs_gradient: ClassVar[bool] = True
    tiled: ClassVar[bool] = False
    unit: ClassVar[str] = "change of the mean answer cross-entropy, nats"
    gives: ClassVar[Mapping[str, str]] = {"effect.absolute": "targets", "effect.signed": "targets"}

    def tables(self, shape: ModelShape, length: int) -> dict[str, Table]:
        """`absolute` and `signed`, (layer, group) for every target; 0 in layers that slide by themselves, where a
        target has no place there.
        """
        return {part: Table(self.unit, target=len(self.targets)) for part in ("absolute", "signed")}

    def begin(self, subject: Subject, lengths: Sequence[int]) -> dict[int, Sums]:
        """See `SummedStatistic.begin`.

        Raises:
            UserError: a target that cannot be priced.
        """
        check_priced(self.targets, "profile.statistics.effect.targets")
        return super().begin(subject, lengths)

    def add_layer(self, sums: Sums, layer: LayerTensors, item: Item) -> None:
        """Price all targets on the rows of one layer, in float32."""
        slope = layer.output_gradient
        assert slope is not None
        query, key, value = (tensor[None].float() for tensor in (layer.query, layer.key, layer.value))
        groups = key.shape[1]
        facts = LayerFacts(
            index=layer.layer,
            head_dim=query.shape[-1],
            hidden_size=0,  # only mixers that read the layer's input ask for it, and those are refused
            group_size=query.shape[1] // groups,
            native_window=layer.window,
        )
        placed = [number for number, target in enumerate(self.targets) if layer.window is None or target.as_built]
        alternatives = Alternatives(facts, [[self.targets[number]] * groups for number in placed])
        changes = alternatives.changes(query, key, value, layer.scaling, scores=layer.scores)
        for number, change in zip(placed, changes, strict=True):
            effects = torch.einsum("htd,htd->ht", slope.float(), change[0]).view(groups, -1)
            sums["signed"][layer.layer, :, number] += effects.sum(1, dtype=torch.float64)
            sums["absolute"][layer.layer, :, number] += effects.abs().sum(1, dtype=torch.float64)

    def named(self, key: Key, table: Table, values: torch.Tensor) -> Results:
        """A tensor (layer, group) for each target."""
        return {
            key.to(target): Result(values[..., number].clone(), ("layer", "group"), table.unit)
            for number, target in enumerate(self.targets)
        }
