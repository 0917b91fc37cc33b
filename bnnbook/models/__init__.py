"""Networks of the papers, one file a paper, one constructor function each."""

from bnnbook.models.binaryconnect import binaryconnect_cnn, binaryconnect_mlp

__all__ = ["binaryconnect_cnn", "binaryconnect_mlp"]
