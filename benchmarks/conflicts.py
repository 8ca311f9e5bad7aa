"""How often closed and open gates pull an image in opposite directions: what gradient masking has to work with.

    python benchmarks/conflicts.py --data FOLDER [--checkpoint skipnet-38-cifar10] [--images 250] [--steps 20] [--gamma 100]

Masking changes a step only for images where the gradients of Eq. 7 and Eq. 8 conflict (negative inner product), and then only by the component
along Eq. 8. Printed per quarter of the attack: the share of images in conflict, the mean cosine of the two gradients, and the share of the
gradient's length that masking removes, over the images in conflict. Then the scores of the gates that are closed on clean images: the power loss
weighs a closed gate by the third power of its score. OUT/<checkpoint>.md keeps it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gatewatt import load
from gatewatt.attacks import ConflictMasking, EnergyAttack, GateLoss, mask_conflict
from gatewatt.attacks.directions import Gradient
from gatewatt.data import FolderData
from gatewatt.files import write_text
from gatewatt.gating import GateTable, gate_table


class WatchedMasking(ConflictMasking):
    """Gradient masking that remembers, per step and image, the cosine of both gradients and what was removed."""

    def __init__(self) -> None:
        super().__init__()
        self.cosine: list[Tensor] = []
        self.removed: list[Tensor] = []

    def __call__(self, loss: GateLoss, table: GateTable, weights: Tensor, gradient: Gradient) -> Tensor:
        """As :class:`ConflictMasking`."""
        g_closed, g_open = gradient(loss(table, weights), True), gradient(self.finished(table, weights), False)
        rectified = mask_conflict(g_closed, g_open)
        self.cosine.append(torch.cosine_similarity(g_closed.flatten(1), g_open.flatten(1)))
        self.removed.append((g_closed - rectified).flatten(1).norm(dim=1) / g_closed.flatten(1).norm(dim=1).clamp_min(1e-20))
        return rectified


def main() -> None:
    """Attack and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder with test/<class>/*")
    parser.add_argument("--checkpoint", default="skipnet-38-cifar10")
    parser.add_argument("--images", type=int, default=250)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--gamma", type=float, default=100.0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/conflicts"))
    options = parser.parse_args()
    network = load(options.checkpoint).eval()
    data = FolderData(options.data, test_images=options.images, eval_batch_size=options.images)
    watched = WatchedMasking()
    attack = EnergyAttack(direction=watched, gamma=options.gamma, steps=options.steps, warmup=0.0, name="GradMDM")
    closed = []
    for batch in data.test_dataloader():
        attack(network, batch.images)
        with torch.no_grad():
            table = gate_table(network(batch.images).gates)
        closed.append(table.score[table.score < table.threshold])
    cosine, removed = torch.stack(watched.cosine), torch.stack(watched.removed)
    text = [f"{options.checkpoint}, {options.images} test images, gamma {options.gamma:g}, {options.steps} steps without warm-up, float32"]
    text.append(f"{'steps':>10} {'in conflict':>12} {'mean cosine':>12} {'removed, where in conflict':>28}")
    for quarter in torch.arange(options.steps).chunk(4):
        conflict = cosine[quarter] < 0
        lost = removed[quarter][conflict].mean() if conflict.any() else torch.tensor(0.0)
        steps = f"{int(quarter[0]) + 1}-{int(quarter[-1]) + 1}"
        text.append(f"{steps:>10} {100 * conflict.float().mean():>10.1f} % {cosine[quarter].mean():>12.3f} {100 * lost:>26.1f} %")
    # numpy takes quantiles of any number of scores; torch refuses more than 16 million.
    low, middle, high = np.quantile(torch.cat(closed).numpy(), (0.25, 0.5, 0.75))
    text.append(f"scores of the gates that are closed on clean images: median {middle:.2f}, quartiles {low:.2f} and {high:.2f}")
    print("\n".join(text))
    write_text(options.out / f"{Path(options.checkpoint).stem}.md", "\n".join(["```", *text, "```"]) + "\n")


if __name__ == "__main__":
    main()
