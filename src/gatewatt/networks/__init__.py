"""Dynamic networks, one family per file."""

from gatewatt.networks.avit import AViT
from gatewatt.networks.dvt import DVT
from gatewatt.networks.manidp import ManiDP
from gatewatt.networks.resnet import ResNet
from gatewatt.networks.sact import SACT
from gatewatt.networks.shallow_deep import ShallowDeep
from gatewatt.networks.skipnet import SkipNet

__all__ = ["DVT", "SACT", "AViT", "ManiDP", "ResNet", "ShallowDeep", "SkipNet"]
