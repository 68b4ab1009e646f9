"""Count the memory of a piece of work: `measure` it while it runs, or `predict` it on tensors without data."""

from tithe.ledger.blank import Blank
from tithe.ledger.prediction import predict
from tithe.ledger.recorder import TransformError, measure
from tithe.ledger.table import Ledger, human

__all__ = ["Blank", "Ledger", "TransformError", "human", "measure", "predict"]
