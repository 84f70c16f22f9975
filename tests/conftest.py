"""Every test starts from the same random state, on one thread, with the project on sys.path."""
import os
import shutil
import sys
from pathlib import Path

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported, here and in every process that a test starts
import torch  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


@pytest.fixture(autouse=True)
def same_start():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def pytest_configure(config):
    """torch.distributed.optim still scripts on import; that is torch's affair."""
    config.addinivalue_line("filterwarnings", "ignore:.*torch.jit:DeprecationWarning")


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """(a folder with data/ and the finished tiny run in out/flex and out/base, its flags), made once. The text is the
    project's own source. Tests leave the folder as it is."""
    import train
    from data.prepare import prepare
    from tests.miniature import TINY
    root = tmp_path_factory.mktemp("demo")
    text = root / "text"
    text.mkdir()
    for path in sorted([*ROOT.glob("*.py"), *ROOT.glob("plumbing/*.py")]):
        shutil.copy(path, text)
    prepare([str(text)], str(root / "data"), vocab_size=600)
    flags = ["--data", str(root / "data")] + TINY
    train.main(flags + ["--out", str(root / "out/flex")])
    return root, flags
