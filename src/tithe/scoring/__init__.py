"""Score weights by passes of the model over samples, while the rules' probes observe; losses in blocks of rows."""

from tithe.scoring.causal import causal_loss
from tithe.scoring.channels import channel_norms, price_channels
from tithe.scoring.likelihood import Likelihood
from tithe.scoring.loss import Loss, check_loss
from tithe.scoring.passes import STATISTICS, Passes

__all__ = [
    "STATISTICS",
    "Likelihood",
    "Loss",
    "Passes",
    "causal_loss",
    "channel_norms",
    "check_loss",
    "price_channels",
]
