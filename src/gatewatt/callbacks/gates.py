"""FLOPs per gate at the end of a run: what the ledger charges beside what forward hooks saw run."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as L  # noqa: N812 - the name Lightning's own documentation uses
import torch

from gatewatt.callbacks.console import mflops, percent, print_table
from gatewatt.tasks.base import NetworkTask


class GateReport(L.Callback):
    """Print, for every gate, how often it opened, its price, and the FLOPs of its modules by two routes.

    The ledger's figure is the gate's usage times its price; the hooks' figure adds up the rows that really entered its modules. They come
    from the clean passes of the last validation or test, which really skip, and must be equal; a difference is an error. Of a network that
    cannot skip, hooks see every module run for every image, so there is nothing to compare and the table says so.
    """

    def __init__(self) -> None:
        self.rows: list[list[str]] = []
        self.title = ""
        self.skipped = True

    def collect(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Gather the figures over all processes.

        Raises:
            RuntimeError: if ledger and hooks disagree on passes that really skipped.
        """
        assert isinstance(pl_module, NetworkTask)
        evaluation, ledger = pl_module.evaluation, pl_module.ledger
        self.skipped = evaluation.execution == "skipped"
        usage = evaluation.usage.compute().cpu()
        images = int(reduced(trainer, evaluation.meter.images))
        hooked = {module: reduced(trainer, flops) for module, flops in evaluation.meter.flops.items()}
        rates = dict(zip(ledger.units, usage.split(list(ledger.units.values())), strict=True))
        self.rows = []
        for gate, metric in evaluation.per_gate.items():
            modules = [charge.module for charge in ledger.charges if charge.gates[-1] == gate]
            charged, ran = metric.compute().item(), sum(hooked[module] for module in modules) / images
            if self.skipped and charged != ran:
                raise RuntimeError(f"gate {gate!r}: the ledger charges {charged:.2f} MACs per image, hooks saw {ran:.2f} run")
            price, rate = sum(ledger.prices[module] for module in modules), float(rates[gate].mean())
            self.rows.append([gate, mflops(price), percent(rate), mflops(charged), mflops(ran)])
        self.rows.append(["always on", mflops(ledger.fixed), percent(1), mflops(ledger.fixed), ""])
        total = evaluation.flops.compute().item()
        self.rows.append(["total", mflops(ledger.dense), percent(total / ledger.dense), mflops(total), ""])
        self.title = f"FLOPs per gate, {images} clean images (of the always-on part, gates cost {mflops(ledger.overhead)})"

    def show(self, trainer: L.Trainer) -> None:
        """Print the table once, by the first process."""
        if trainer.is_global_zero and self.rows:
            columns = ["gate", "price", "open", "ledger, per image", "hooks, per image" if self.skipped else "hooks, nothing skipped"]
            caption = "1 MAC = 1 FLOP; FLOPs of convolutions and linear layers, by fvcore."
            if not self.skipped:
                caption += " Nothing was skipped in these passes: all of it ran, and the ledger alone says what the gates would leave out."
            print_table(self.title, columns, self.rows, caption=caption)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Gather after every validation but the sanity check."""
        if not trainer.sanity_checking:
            self.collect(trainer, pl_module)

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Gather after the test."""
        self.collect(trainer, pl_module)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show the last validation's figures."""
        self.show(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show the figures of a validation that stands alone."""
        if trainer.state.fn == "validate":
            self.show(trainer)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show the test's figures."""
        self.show(trainer)


def reduced(trainer: L.Trainer, value: Any) -> float:
    """Sum a number over all processes, in float64."""
    return float(trainer.strategy.reduce(torch.tensor(float(value), dtype=torch.float64), reduce_op="sum"))
