"""Dynamic networks, one family per file."""

from gatewatt.networks.resnet import ResNet
from gatewatt.networks.skipnet import SkipNet

__all__ = ["ResNet", "SkipNet"]
