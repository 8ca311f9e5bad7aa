"""Published attacks by name: what each is made of.

GradMDM as its paper has it and as its authors' release has it; its ablations (Pan et al., TPAMI 2023, Tables 4 and 9), which differ from it in loss
and direction alone; its predecessor GradAuto; ILFO. DeepSloth has a loop of its own (:mod:`gatewatt.attacks.deepsloth`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from gatewatt.attacks.directions import ComplexityOnly, ConflictMasking, Direction, Joint, UnitLength
from gatewatt.attacks.layerwise import LayerwiseMasking
from gatewatt.attacks.loop import EnergyAttack
from gatewatt.attacks.losses import ComplexityLoss, GateLoss, NormLoss, PowerLoss
from gatewatt.attacks.spaces import Space, StandardizedTanhSpace
from gatewatt.networks.layers import CIFAR_MEAN, CIFAR_STD


class GradMDM(EnergyAttack):
    """Power loss and complexity gradient masking, as the paper states them: input level, per image.

    Where the paper leaves a choice open, the default is the reading explained at :class:`~gatewatt.attacks.EnergyAttack`.

    Args:
        alpha: power of Eq. 7, at least 1 (4 in the paper; 1 without masking is Eq. 6).
        gamma: weight of the squared error.
        steps: iterations.
        warmup: fraction of the steps on Eq. 6 alone.
        lr: Adam's learning rate.
        space: where the perturbation lives.
        keep: ``last`` (the paper) or ``best`` iterate by true FLOPs.
        decision: attack through this decision instead of the network's own.
        prediction_weight: see :class:`~gatewatt.attacks.EnergyAttack`; positive for the variant that keeps the prediction.
    """

    def __init__(
        self,
        alpha: float | Sequence[float] = 4.0,
        *,
        gamma: float = 100.0,
        steps: int = 100,
        warmup: float = 0.2,
        lr: float = 0.01,
        space: Space | None = None,
        keep: Literal["last", "best"] = "last",
        decision: Literal["straight_through", "hard"] | None = None,
        prediction_weight: float = 0.0,
    ) -> None:
        super().__init__(
            PowerLoss(alpha),
            ConflictMasking(),
            space=space,
            gamma=gamma,
            steps=steps,
            warmup=warmup,
            lr=lr,
            keep=keep,
            decision=decision,
            prediction_weight=prediction_weight,
        )


class GradMDMReleased(EnergyAttack):
    """GradMDM as its authors' release computes it, which is not what the paper states; for networks that skip whole blocks, as SkipNet.

    Where the release differs from the paper, and this class with it:

    - masking happens inside the backward pass, at every gate, between gradients of length 1 (:class:`~gatewatt.attacks.LayerwiseMasking`), not
      once at the image;
    - the loss on closed gates is a p-norm with p = 3.5 (:class:`~gatewatt.attacks.NormLoss`), not a sum of fourth powers; the one on open gates
      is the p-norm of what they lack (:class:`~gatewatt.attacks.FinishedNormLoss`), not Eq. 8;
    - gates count alike, whatever they cost;
    - the warm-up on Eq. 6 takes 10 of the 100 iterations, not 20 %;
    - images are mapped by (tanh(0.8 (s + delta)) + 1) / 2 with s the standardised image (:class:`~gatewatt.attacks.StandardizedTanhSpace`), so an
      attack of no steps already moves every pixel, and squared errors are in units of the standard deviations. The release's MSE is the mean
      of these, and the PSNRs of the paper's tables are 10 log10(255^2 / MSE) of the MSEs beside them; if those are the release's, true PSNRs
      are some 35 dB lower. Records are in 8-bit levels throughout.

    Where this class differs from the release:

    - its factor of 1.5e5 on the gates' gradient beside a summed squared error is 3HW at 224x224 to half a percent; here it is the mean squared
      error at every size (before Adam, which does not see the common factor);
    - images never leave [0, 1], as the release's do on ImageNet;
    - the image is that after the last update; the release reports the one before it. Both take the last iterate, not the best;
    - recovery is measured in FLOPs per image, not as a ratio of mean gate counts.

    Args:
        gamma: weight of the squared error in standardised units.
        finished: p of the norm over open gates: 0.35 for a network trained with SP, 50 for one trained with HRL.
        steps: iterations.
        lr: Adam's learning rate.
        mean: of the data's channels, on the [0, 1] scale (CIFAR-10's when left out).
        std: their standard deviations.
        decision: attack through this decision instead of the network's own; the release attacks them as they are.
    """

    def __init__(
        self,
        *,
        gamma: float = 100.0,
        finished: float = 0.35,
        steps: int = 100,
        lr: float = 0.01,
        mean: Sequence[float] = CIFAR_MEAN,
        std: Sequence[float] = CIFAR_STD,
        decision: Literal["straight_through", "hard"] | None = None,
    ) -> None:
        super().__init__(
            NormLoss(3.5),
            LayerwiseMasking(finished),
            space=StandardizedTanhSpace(mean, std),
            gamma=gamma,
            steps=steps,
            warmup=0.1,
            lr=lr,
            decision=decision,
            weighing="equal",
        )


class ILFO(EnergyAttack):
    """Eq. 6 with preset thresholds, 300 steps (Haque et al., CVPR 2020): a reconstruction.

    No code was published and its constants cannot be recovered; GradMDM's authors describe it as their Eq. 6 with a preset threshold per gate.
    Optimiser, parametrisation and penalty are therefore GradMDM's.

    Args:
        thresholds: level to raise each unit's score to, one per unit; None for each gate's own threshold.
        gamma: weight of the squared error.
        steps: iterations.
        lr: Adam's learning rate.
        keep: ``last`` or ``best`` iterate.
        decision: attack through this decision instead of the network's own.
    """

    def __init__(
        self,
        thresholds: Sequence[float] | None = None,
        *,
        gamma: float = 100.0,
        steps: int = 300,
        lr: float = 0.01,
        keep: Literal["last", "best"] = "last",
        decision: Literal["straight_through", "hard"] | None = None,
    ) -> None:
        loss = ComplexityLoss(thresholds)
        super().__init__(loss, ComplexityOnly(), gamma=gamma, steps=steps, warmup=0.0, lr=lr, keep=keep, decision=decision)


class GradAuto(EnergyAttack):
    """GradMDM's predecessor: Eq. 6 with masking at the input, the masked gradient scaled to length 1 (Pan et al., ECCV 2022).

    As in its release, Adam takes 300 steps without a warm-up and the scaled gradient is weighed ``strength`` times the number of values 3HW
    against the summed squared error; divided by 3HW that is a mean squared error with weight ``1 / strength``. The release's tanh map, which
    is no identity at the start and leaves [0, 1], is replaced by :class:`~gatewatt.attacks.TanhSpace`, and its units are weighed by their cost.

    Args:
        strength: K, weight of the gates; 1 in the release, whose squared error is in standardised units.
        steps: iterations.
        lr: Adam's learning rate.
        keep: ``last`` or ``best`` iterate.
        decision: attack through this decision instead of the network's own.
    """

    def __init__(
        self,
        strength: float = 1.0,
        *,
        steps: int = 300,
        lr: float = 0.01,
        keep: Literal["last", "best"] = "last",
        decision: Literal["straight_through", "hard"] | None = None,
    ) -> None:
        if not strength > 0:
            raise ValueError(f"strength must be positive, got {strength}")
        loss, direction = ComplexityLoss(), UnitLength(ConflictMasking())
        super().__init__(loss, direction, gamma=1 / strength, steps=steps, warmup=0.0, lr=lr, keep=keep, decision=decision)


ABLATIONS: dict[str, tuple[Callable[[], GateLoss], Callable[[], Direction]]] = {
    "Eq5": (ComplexityLoss, Joint),
    "Eq6": (ComplexityLoss, ComplexityOnly),
    "CGM": (ComplexityLoss, ConflictMasking),
    "Power": (PowerLoss, ComplexityOnly),
    "PowerJoint": (PowerLoss, Joint),
}
"""Name -> loss and direction: Eq. 5, Eq. 6, masking alone, power alone, and ``L_P + L_F``."""


def ablation(name: str, *, gamma: float = 100.0, steps: int = 100, keep: Literal["last", "best"] = "last") -> EnergyAttack:
    """An ablation of GradMDM by name, everything else as in GradMDM.

    Args:
        name: one of :data:`ABLATIONS`.
        gamma: weight of the squared error.
        steps: iterations.
        keep: ``last`` or ``best`` iterate.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in ABLATIONS:
        raise ValueError(f"ablation must be one of {', '.join(ABLATIONS)}, got {name!r}")
    loss, direction = ABLATIONS[name]
    return EnergyAttack(loss(), direction(), gamma=gamma, steps=steps, keep=keep, name=name)
