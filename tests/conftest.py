"""Every test starts from the same random state, on one thread, with the project on sys.path."""
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


@pytest.fixture(autouse=True)
def same_start():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def pytest_configure(config):
    """torch.distributed.optim still scripts on import; that is torch's affair."""
    config.addinivalue_line("filterwarnings", "ignore:.*torch.jit:DeprecationWarning")
