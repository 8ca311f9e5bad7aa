"""An exponential moving average of the weights: what is validated, calibrated and exported instead of the last step's."""

from __future__ import annotations

import lightning.pytorch as L  # noqa: N812 - the name Lightning's own documentation uses
from lightning.pytorch.callbacks import EMAWeightAveraging

from gatewatt.callbacks.budget import ExitBudget
from gatewatt.callbacks.saliency import SaliencyCalibration


class WeightAverage(EMAWeightAveraging):
    """Lightning's moving average, in place of the network for the whole of a validation and from the end of training on.

    After every step ``average = decay average + (1 - decay) weights``, buffers such as BatchNorm's statistics included; the first step's weights
    start it. A checkpoint holds both, so a resumed run ends as an uninterrupted one; :class:`~gatewatt.callbacks.ExportCheckpoint` writes the
    average. Lightning's own callback swaps the weights too late for a callback that calibrates the network before it is validated.

    Args:
        decay: in (0, 1); 0.99996 for DVT on ImageNet, 375,000 steps. A short run wants a smaller one: it remembers about 1 / (1 - decay) steps.

    Raises:
        ValueError: if ``decay`` is out of range; at the start of a fit, if :class:`~gatewatt.callbacks.ExitBudget` is listed before it, or with
            :class:`~gatewatt.callbacks.SaliencyCalibration`, whose thresholds belong to the weights that are trained.
    """

    def __init__(self, decay: float = 0.9999) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"decay must be in (0, 1), got {decay}")
        super().__init__(decay=decay)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse callbacks that would calibrate other weights than those that are exported."""
        callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        if any(isinstance(callback, ExitBudget) for callback in callbacks[: callbacks.index(self)]):
            raise ValueError("list WeightAverage before ExitBudget in trainer.callbacks: exits are calibrated on the averaged network")
        # The average would even hold the stand-ins of the epochs before the first calibration, which lie far beyond any threshold.
        if any(isinstance(callback, SaliencyCalibration) for callback in callbacks):
            raise ValueError(
                "WeightAverage does not go with SaliencyCalibration, which sets thresholds for the weights that are trained and not for their "
                "average; leave one of them out of trainer.callbacks"
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the average where the network is: it was made before the network was moved there."""
        assert self._average_model is not None
        self._average_model.to(pl_module.device)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the average in place."""
        super().on_validation_epoch_start(trainer, pl_module)

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Nothing: it is in place already."""

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Nothing: other callbacks may still look at the network."""

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Go on with the weights that are trained."""
        super().on_validation_epoch_end(trainer, pl_module)
