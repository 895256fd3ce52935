"""ORL: object-level representation learning from unlabelled scene photos (NeurIPS 2021).

For use in Python (docs/guides/python.md; each is described in orl/api.py):

- `load_backbone(path)`: the backbone of a file of weights, a torch module
- `embed(backbone, images)`: features of photos, float32 [N, C], unit rows
- `correspond(backbone, a, b)`: regions of two photos that show the same kind of thing
- `draw(a, b, pairs)`: a picture of them

They are loaded when first used: `import orl` loads nothing heavy.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orl.api import correspond, draw, embed, load_backbone

__all__ = ["InputError", "NoRoomError", "correspond", "draw", "embed", "load_backbone"]
__version__ = "0.1.0"


class InputError(ValueError):
    """Bad input from the user: the message is one sentence naming it and what to do; commands exit 2."""


class NoRoomError(OSError):
    """The disk is full: the message is one sentence naming the file and what to do; commands exit 1."""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'orl' has no attribute {name!r}")
    from orl import api

    return getattr(api, name)
