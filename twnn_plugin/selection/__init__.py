"""Networks whose layers a policy picks from, sample by sample (Mathur & Plis 2023)."""

from .connection import Connection
from .engine import LayerSelection, selection_of
from .foresight import Outcomes, foreseen, outcomes
from .learning import Reward, closed_loss, policy_loss
from .record import SelectionRecord, SelectionReport
from .study import Study, informed_loss, study
from .watch import Monitor

__all__ = [
    "Connection",
    "LayerSelection",
    "Monitor",
    "Outcomes",
    "Reward",
    "SelectionRecord",
    "SelectionReport",
    "Study",
    "closed_loss",
    "foreseen",
    "informed_loss",
    "outcomes",
    "policy_loss",
    "selection_of",
    "study",
]
