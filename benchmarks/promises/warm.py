"""Imported once by the server that the other processes are forked from."""

import torch

import gatewatt.attacks
import gatewatt.callbacks
import gatewatt.cli.trainer
import gatewatt.data
import gatewatt.metrics
import gatewatt.networks
import gatewatt.objectives
import gatewatt.tasks  # noqa: F401 - imported for those who come after

torch.set_num_threads(1)
