"""How binary neural networks train: the library behind the book.

Import the module you need, for instance ``from bnnbook import binarize, layers, training``.
Nothing is imported here, so that ``import bnnbook`` costs nothing.
"""

__version__ = "0.1.0"
REPOSITORY = "https://github.com/bnnbook/bnnbook"
