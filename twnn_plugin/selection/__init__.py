"""Networks whose layers a policy picks from, sample by sample (Mathur & Plis 2023)."""

from .engine import LayerSelection
from .learning import Reward, policy_loss
from .record import SelectionRecord

__all__ = ["LayerSelection", "Reward", "SelectionRecord", "policy_loss"]
