"""What a gate's mask reaches is learned right, or not claimed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tests.contracts.zoo import settled
from torch import Tensor, nn
from torch.nn import functional

from gatewatt.defenses.following import reaches
from gatewatt.gating import Charge, DynamicNetwork, DynamicOutput, Execution, Gate, decision_named


class Followed(DynamicNetwork):
    """A gate of U units, and one that follows it as it is told."""

    executions = ("masked", "dense")

    def __init__(self, units: int, following: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.arguments, self.decision = {}, decision_named("hard")
        self.units, self.following, self.head, self.work = units, following, nn.Linear(3, 2), nn.Linear(3, 2)
        self.charges = (Charge("work", ("followed",)),)

    def forward(self, images: Tensor, execution: Execution = "masked") -> DynamicOutput:
        """Logits that do not depend on what ran."""
        means = images.mean((2, 3))
        score = torch.sigmoid(means[:, :1] * torch.linspace(-1, 1, self.units))
        threshold = torch.tensor(0.5)
        ran = torch.ones_like(score) if execution == "dense" else self.decision("own", score, threshold, training=False)
        gates = {"own": Gate(score, threshold, ran), "followed": Gate(score, threshold, self.following(ran), follows="own")}
        return DynamicOutput(self.head(means) + self.work(means), gates)


def dilated(radius: int) -> Callable[[Tensor], Tensor]:
    """Maps of 6x6 positions, dilated."""
    return lambda ran: functional.max_pool2d(ran.view(-1, 1, 6, 6), 2 * radius + 1, 1, radius).flatten(1)


def three_of_many(ran: Tensor) -> Tensor:
    """As it is, unless three units run or more: then everywhere."""
    return torch.where(ran.sum(1, keepdim=True) >= 3, torch.ones_like(ran), ran)


@pytest.mark.parametrize(
    ("following", "radius"),
    [
        (lambda ran: ran, 0),
        (lambda ran: ran * (torch.arange(36) % 2), 0),
        (dilated(1), 1),
        (lambda ran: torch.maximum(ran, ran.roll(1, 1)) * (torch.arange(36) % 6 > 0), 1),
        (dilated(2), 2),
        (dilated(3), 3),
        (dilated(4), None),
        (lambda ran: torch.maximum(ran, ran.roll(1, 1)), None),
        (three_of_many, None),
        (lambda ran: ran.amax(1, keepdim=True).expand_as(ran), None),
    ],
)
def test_the_narrowest_reach_that_holds_everything(following: Callable[[Tensor], Tensor], radius: int | None) -> None:
    assert reaches(Followed(36, following), 4)["followed"].radius == radius


def test_units_that_are_no_map_have_no_neighbours() -> None:
    assert reaches(Followed(35, lambda ran: torch.maximum(ran, ran.roll(1, 1))), 4)["followed"].radius is None
    assert reaches(Followed(35, lambda ran: ran), 4)["followed"].radius == 0
    assert reaches(Followed(1, lambda ran: ran), 4)["followed"].radius == 0


def test_what_runs_by_itself_follows_nothing() -> None:
    with pytest.raises(ValueError, match="gate 'followed' follows 'own' and runs where nothing of it does: what it costs has no bound"):
        reaches(Followed(36, torch.ones_like), 4)


def test_the_masks_of_sact() -> None:
    found = {name: reach.radius for name, reach in reaches(settled("sact"), 32).items()}
    assert found["block1_unit2_dilated"] == 1
    assert found["block3_unit4_dilated"] == 1
    assert found["block2_unit2_anywhere"] is None
    assert set(found.values()) == {1, None}
    for family in ("act", "skipnet", "manidp"):
        assert reaches(settled(family), 32) == {}
