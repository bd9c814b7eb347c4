"""timm's manners for models with wormholes: each tool of timm that treats a model does so here, too."""

from .checkpointing import without_checkpointing
from .export import Unrolled, export, unrolled
from .features import last_alone
from .manners import adopt

__all__ = ["Unrolled", "adopt", "export", "last_alone", "unrolled", "without_checkpointing"]
