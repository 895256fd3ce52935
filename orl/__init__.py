"""ORL: object-level representation learning from unlabelled scene photos (NeurIPS 2021)."""

__version__ = "0.1.0"


class InputError(ValueError):
    """Bad input from the user: the message is one sentence naming it and what to do; commands exit 2."""


class NoRoomError(OSError):
    """The disk is full: the message is one sentence naming the file and what to do; commands exit 1."""
