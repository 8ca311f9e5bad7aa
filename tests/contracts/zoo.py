"""One small network of every family, settled so that its gates really differ between images."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn

from gatewatt.gating import DynamicNetwork, gate_table
from gatewatt.networks import DVT, SACT, AViT, ManiDP, ShallowDeep, SkipNet
from gatewatt.networks.avit import halting_center
from gatewatt.networks.manidp import MaskBlock
from gatewatt.objectives import (
    ComputeTarget,
    CrossEntropy,
    HaltingPrior,
    HybridReinforcement,
    ManifoldPruning,
    Objective,
    PonderCost,
    SummedExits,
    WeightedExits,
)


@cache
def sample() -> Tensor:
    """Twelve images (12, 3, 32, 32), smooth and unlike each other."""
    generator = torch.Generator().manual_seed(3)
    coarse = torch.rand(12, 3, 4, 4, generator=generator)
    smooth = nn.functional.interpolate(coarse, size=(32, 32), mode="bilinear", align_corners=False)
    contrast = torch.linspace(0.2, 1, 12).view(-1, 1, 1, 1)
    return (0.5 + contrast * (smooth - 0.5) + 0.05 * torch.randn(smooth.shape, generator=generator)).clamp(0, 1)


def warmed(network: DynamicNetwork) -> DynamicNetwork:
    """BatchNorm statistics that fit :func:`sample`."""
    with torch.no_grad():
        for _ in range(8):
            network.train()(sample())
    return network.eval()


def skipnet(**arguments: object) -> DynamicNetwork:
    """Every gate's bias moved to just beside the median of its logits: on it, a pixel's last bit would decide."""
    network = warmed(SkipNet(8, width=4, **arguments))  # type: ignore[arg-type]
    assert isinstance(network, SkipNet)
    with torch.no_grad():
        if hasattr(network.gating, "projection"):
            network.gating.projection.weight *= 20
            network.gating.projection.bias -= network(sample()).gates["block1"].score.logit().median()
        else:
            for index, gate in enumerate(network.gating.gates):
                gate.projection.bias[1] -= network(sample()).gates[f"block{index + 1}"].score.logit().median() + 0.01
    return network


def sact(halting: str) -> DynamicNetwork:
    """Halting biases raised from -3, so that sums reach 1 - eps within a block for some and not for others."""
    network = warmed(SACT(26, width=4, halting=halting))  # type: ignore[arg-type]
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "halting" in name and parameter.ndim > 1:
                parameter *= 8
            elif name.endswith("bias") and parameter.numel() == 1 and bool((parameter == -3).all()):
                parameter.fill_(-0.3)
    return network


def manidp() -> DynamicNetwork:
    """Thresholds at the median of each mask block's responses."""
    network = warmed(ManiDP(8, width=4))
    for module in network.modules():
        if isinstance(module, MaskBlock):
            module.spread.fill_(0.5)
    with torch.no_grad():
        # Front to back: a threshold changes what later blocks see.
        for name in [name for name, module in network.named_modules() if isinstance(module, MaskBlock)]:
            block, seen = network.get_submodule(name), []
            handle = block.register_forward_hook(lambda module, inputs, output, seen=seen: seen.append(output))
            network(sample())
            handle.remove()
            block.xi.fill_(seen[0].clamp_min(0).median().item())  # type: ignore[union-attr,operator]
    return network


def shallow_deep() -> DynamicNetwork:
    """Confidence at the median of the first exit's."""
    network = warmed(ShallowDeep("resnet-20", width=4))
    with torch.no_grad():
        confidence = network(sample()).exits[:, :3].softmax(2).amax(2).median().item()  # type: ignore[index]
    again = ShallowDeep("resnet-20", width=4, confidence=confidence)
    again.load_state_dict(network.state_dict())
    return again.eval()


def dvt() -> DynamicNetwork:
    """Confidences at the medians of the first two exits'."""
    network = DVT("small-32", 10, dim=16, depth=2, heads=2).eval()
    with torch.no_grad():
        conf = network(sample()).exits.softmax(2).amax(2).median(0).values  # type: ignore[union-attr]
        network.doubt.copy_((1 - conf[:2]).view_as(network.doubt))
    return network


def avit() -> DynamicNetwork:
    """Center at which tokens halt on average after a few layers."""
    network = AViT("small-32", 10, dim=16, depth=5, heads=2, patch=8).eval()
    with torch.no_grad():
        network.gate_center.fill_(halting_center(network.signal(sample()), 10.0, 0.3))
    return network


FAMILIES: dict[str, Callable[[], DynamicNetwork]] = {
    "skipnet": skipnet,
    "skipnet-hrl": lambda: skipnet(decision="sampled"),
    "skipnet-ffgate1": lambda: skipnet(gate="feedforward1"),
    "skipnet-ffgate2": lambda: skipnet(gate="feedforward2"),
    "sact": lambda: sact("position"),
    "act": lambda: sact("image"),
    "manidp": manidp,
    "shallow-deep": shallow_deep,
    "dvt": dvt,
    "avit": avit,
}


def manifold_pruning() -> Objective:
    """With the cross entropy of an epoch that never was."""
    objective = ManifoldPruning(lasso=5e-3, graph=1.0)
    objective.reference = 2.0
    return objective


OBJECTIVES: dict[str, Callable[[], Objective]] = {
    "skipnet": lambda: ComputeTarget(0.7),
    "skipnet-hrl": HybridReinforcement,
    "skipnet-ffgate1": lambda: ComputeTarget(0.7),
    "skipnet-ffgate2": CrossEntropy,
    "sact": PonderCost,
    "act": PonderCost,
    "manidp": manifold_pruning,
    "shallow-deep": WeightedExits,
    "dvt": SummedExits,
    "avit": HaltingPrior,
}


def settled(family: str) -> DynamicNetwork:
    """The network of a family, in eval mode, its gates neither all open nor all closed."""
    torch.manual_seed(1)
    network = FAMILIES[family]().eval()
    with torch.no_grad():
        executed = gate_table(network(sample()).gates).executed
    assert 0.02 < executed.mean() < 0.98, f"{family}: {executed.mean():.3f} of the gates are open"
    assert len(executed.unique(dim=0)) > 1, f"{family}: one route for all images"
    return network
