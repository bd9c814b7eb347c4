"""``twnn demo``: three networks on real digits, one of them with a wormhole, under every solver."""

from .main import run

__all__ = ["run"]
