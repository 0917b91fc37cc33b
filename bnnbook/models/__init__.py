"""The papers' networks, one file per paper and one constructor per network; and a summary."""

from bnnbook.models.alexnet import alexnet, alexnet_small, four_layer_cnn
from bnnbook.models.binaryconnect import binaryconnect_cnn, binaryconnect_mlp
from bnnbook.models.binarynet import binarynet
from bnnbook.models.bireal import birealnet18, birealnet20
from bnnbook.models.expert import (
    architecture_name,
    expertnet,
    load_one_expert,
    parse_architecture,
)
from bnnbook.models.reactnet import reactnet_a, reactnet_small
from bnnbook.models.summary import summary

__all__ = [
    "alexnet",
    "alexnet_small",
    "architecture_name",
    "binaryconnect_cnn",
    "binaryconnect_mlp",
    "binarynet",
    "birealnet18",
    "birealnet20",
    "expertnet",
    "four_layer_cnn",
    "load_one_expert",
    "parse_architecture",
    "reactnet_a",
    "reactnet_small",
    "summary",
]
