"""What every test starts from: no network, a chosen number of threads, a fixed seed."""

import gc
import os
import signal

# Set before anything imports Hugging Face or matplotlib: both read the environment once, at import.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"

import pytest
import torch
from hypothesis import HealthCheck, settings

# No deadline: the first call of a shape pays for warming up. CI derandomizes, so that a red run can be run again.
settings.register_profile("dev", deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", settings.get_profile("dev"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "dev")

# One, so that workers do not wait for each other; CONTRIBUTING.md says when to choose another number.
torch.set_num_threads(int(os.environ.get("TITHE_TEST_THREADS", "1")))

# A shell that starts the suite in the background has children ignore Ctrl-C: those of the tests that send it must not.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Weights and inputs are the same in each run and whichever worker a test lands on."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def _freeze() -> None:
    """Take what exists, most of it the code of libraries, out of the collector's sight: looking it through takes time.

    A plan looks among all living objects for optimizers and modules that hold its weights; those of a test are new.
    """
    gc.collect()
    gc.freeze()
