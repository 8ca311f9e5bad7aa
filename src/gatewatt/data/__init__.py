"""Images in, batches out: pixels in [0, 1], labels, and the id of each image."""

from gatewatt.data.batch import Batch, BatchKey, Images
from gatewatt.data.cifar import CIFAR10Data, CIFAR100Data
from gatewatt.data.cub import CubData
from gatewatt.data.digits import DigitsData
from gatewatt.data.distortion import Distortion, Mixing
from gatewatt.data.folder import FileImages, FolderData, read_image
from gatewatt.data.loader import BatchLoader
from gatewatt.data.memory import Augmentation, MemoryImages
from gatewatt.data.module import ImageData
from gatewatt.data.order import BatchOrder

__all__ = [
    "Augmentation",
    "Batch",
    "BatchKey",
    "BatchLoader",
    "BatchOrder",
    "CIFAR10Data",
    "CIFAR100Data",
    "CubData",
    "DigitsData",
    "Distortion",
    "FileImages",
    "FolderData",
    "ImageData",
    "Images",
    "MemoryImages",
    "Mixing",
    "read_image",
]
