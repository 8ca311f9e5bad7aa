"""AutoEnergy: a fixed ensemble without parameters, in the spirit of AutoAttack, for computation instead of accuracy."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from gatewatt.attacks.base import Attack, AttackResult, BestIterate, BrokenGradientError, NoGradientError
from gatewatt.attacks.directions import ConflictMasking
from gatewatt.attacks.lattice import LEVELS, LatticeBall
from gatewatt.attacks.losses import CheapestGateLoss, HingeLoss, PowerLoss
from gatewatt.attacks.projected import ProjectedAttack
from gatewatt.attacks.search import SquareSearch
from gatewatt.attacks.spaces import Ball, L2Ball, LinfBall
from gatewatt.flops import FlopsLedger, within_reach
from gatewatt.gating import DynamicNetwork, measuring_execution

MEMBERS = ("hinge", "power-cgm", "cheapest", "straight-through", "square")
"""Names of the members, in the order they run."""
ROUNDS = (*MEMBERS, "continued")
"""What :attr:`~gatewatt.attacks.AttackResult.member` counts: the members, and the descent that goes on from the best that they found."""
LONG = 4
"""How many times the steps of the others the longest member takes."""
HALVINGS = 8
"""How often the stretch between the clean image and the one found is halved in search of a smaller perturbation."""


def member(name: str, space: Ball, steps: int) -> Attack:
    """A member of the ensemble by name.

    - ``hinge``: adaptive steps on the cost-weighted hinge in logits;
    - ``power-cgm``: the same steps on GradMDM's power loss with complexity gradient masking;
    - ``cheapest``: opens closed gates one by one, the nearest first, in :data:`LONG` times as many steps: one long descent finds what several
      short ones miss;
    - ``straight-through``: the same through straight-through decisions, so that a step sees how opening one gate moves later ones; half of the
      steps from the image, half from a random start, since many networks decide like this already and would see ``cheapest`` twice;
    - ``square``: random search on true FLOPs, without a gradient.

    Raises:
        ValueError: for an unknown name.
    """
    if name == "hinge":
        return ProjectedAttack(HingeLoss(), space=space, steps=steps, name=name)
    if name == "power-cgm":
        return ProjectedAttack(PowerLoss(), ConflictMasking(), space=space, steps=steps, name=name)
    if name == "cheapest":
        return ProjectedAttack(CheapestGateLoss(), space=space, steps=LONG * steps, name=name)
    if name == "straight-through":
        half = max(steps // 2, 1)
        return ProjectedAttack(CheapestGateLoss(), space=space, steps=half, restarts=2, decision="straight_through", name=name)
    if name == "square":
        return SquareSearch(space=space, steps=2 * steps)
    raise ValueError(f"member must be one of {', '.join(MEMBERS)}, got {name!r}")


class AutoEnergy(Attack):
    """The worst case over :data:`MEMBERS`, image by image: most true FLOPs, then the smallest squared error.

    Members run one after the other, each from the clean images, on those that do not run everything yet. One that finds no gradient to follow is
    passed over: the random search needs none. A last descent goes on from the best that was found, with steps an eighth as long, so that the
    worst case of a short run is not left half-way. No member alone finds more on any image, but for what another batch size does to rounding.
    In the end each perturbation is scaled down for as long as the image spends as much, as it is and rounded to 8 bits: one radius for all images
    is more than most of them need. Behind a budget guard an image that costs what the guard lets through is done: nothing can make it cost more.

    Args:
        norm: ``linf`` or ``l2``.
        eps: radius on the [0, 1] scale; None for 4/255 (``linf``) or 0.5 (``l2``).
        steps: iterations of a member with a gradient, and of the last descent; one member takes :data:`LONG` times as many, and the random search
            has twice as many queries, of a forward pass each. In all nine gradients a step, and :data:`HALVINGS` times two forward passes.
        lattice: among 8-bit images alone (:class:`~gatewatt.attacks.LatticeBall`), so that saving the images changes nothing.
    """

    def __init__(self, norm: Literal["linf", "l2"] = "linf", eps: float | None = None, *, steps: int = 100, lattice: bool = False) -> None:
        super().__init__()
        if norm not in ("linf", "l2"):
            raise ValueError(f"norm must be linf or l2, got {norm!r}")
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        eps = eps if eps is not None else {"linf": 4 / 255, "l2": 0.5}[norm]
        space: Ball = LinfBall(eps) if norm == "linf" else L2Ball(eps)
        if lattice:
            space = LatticeBall(space)
        self.norm, self.eps, self.steps, self.lattice = norm, space.eps, steps, lattice
        self.members = {name: member(name, space, steps) for name in MEMBERS}
        self.continuation = ProjectedAttack(CheapestGateLoss(), space=space, steps=steps, first_step=0.25)

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that determines the attack, as plain values, for records."""
        plain = {key: getattr(self, key) for key in ("norm", "eps", "steps", "lattice", "decision")}
        return {"name": self.name, **plain, "members": list(ROUNDS), "long": LONG, "halvings": HALVINGS}

    def __repr__(self) -> str:
        return f"AutoEnergy({self.norm}, eps={self.eps:g}, steps={self.steps})"

    def craft(self, network: DynamicNetwork, images: Tensor, labels: Tensor | None, ledger: FlopsLedger) -> AttackResult:
        """Run every round and keep the worst case by the FLOPs of a pass that really skips, through the network's own decisions."""
        ledger = within_reach(network, ledger, images[:1])
        best = BestIterate(images)
        best.offer(images, self._spent(network, images, ledger), 0)
        winner = torch.full((len(images),), -1, device=images.device)
        for index, name in enumerate(ROUNDS):
            rows = best.unfinished(ledger)
            if len(rows) == 0:
                break
            try:
                if name == "continued":
                    found = self.continuation.craft_from(best.images[rows], network, images[rows], ledger)
                else:
                    found = self.members[name](network, images[rows], None if labels is None else labels[rows], ledger=ledger)
            except NoGradientError:
                continue
            except BrokenGradientError as error:
                raise BrokenGradientError(int(rows[error.image])) from error
            better = best.offer(found.images, self._spent(network, found.images, ledger), found.step, rows)
            winner[rows[better]] = index
        self._shrink(best, network, ledger)
        return best.result._replace(member=winner)

    def _shrink(self, best: BestIterate, network: DynamicNetwork, ledger: FlopsLedger) -> None:
        """Leave as small a share of each perturbation as bisection finds to spend as much, also after saving with 8 bits."""
        rows = (best.images != best.original).flatten(1).any(dim=1).nonzero().flatten()
        if len(rows) == 0:
            return
        clean, found = best.original[rows], best.images[rows]
        saved = self._spent(network, eight_bit(found), ledger)
        low, high = torch.zeros_like(clean[:, :1, :1, :1]), torch.ones_like(clean[:, :1, :1, :1])
        for _ in range(HALVINGS):
            share = (low + high) / 2
            shrunk = self.continuation.space.image(clean, share * (found - clean))
            spent = self._spent(network, shrunk, ledger)
            enough = (spent >= best.flops[rows]) & (self._spent(network, eight_bit(shrunk), ledger) >= saved)
            best.offer(shrunk[enough], spent[enough], best.step[rows[enough]], rows[enough])
            chosen = enough[:, None, None, None]
            low, high = torch.where(chosen, low, share), torch.where(chosen, share, high)

    @staticmethod
    def _spent(network: DynamicNetwork, images: Tensor, ledger: FlopsLedger) -> Tensor:
        """FLOPs (b,) in float32, whatever the members craft in: what is so close to a threshold must have crossed it in the end."""
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            return ledger(network(images, measuring_execution(network)).gates)


def eight_bit(images: Tensor) -> Tensor:
    """What a PNG file keeps of images in [0, 1]: :func:`gatewatt.metrics.round_to_8bit`, which stands on the same floor and is out of reach."""
    return (LEVELS * images).round() / LEVELS
