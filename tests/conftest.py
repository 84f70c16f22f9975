"""Every test starts from the same random state, on one thread, with the project on sys.path."""
import os
import shutil
import sys
from pathlib import Path

import pytest

# read when torch is imported, here and in every process that a test starts
os.environ["OMP_NUM_THREADS"] = "1"
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


# -----------------------------------------------------------------------------
# the demo in miniature. What is made once is left as it is: a test that changes something copies it.


@pytest.fixture(scope="module")
def small_base():
    """The demo's base has a small shape here, so that it is trained in a second."""
    import train
    from tests.miniature import SMALL_CONFIG
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "LlamaConfig", SMALL_CONFIG)
        yield


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """(a folder, flags): data/ from three files of the project, a finished run in out/base and
    out/flex, and two Llamas of random weights in llama/ and odd/."""
    import train
    from data.prepare import prepare
    from tests.miniature import ODD, SMALL_CONFIG, TINY, save_random
    root = tmp_path_factory.mktemp("demo")
    text = root / "text"
    text.mkdir()
    for name in ("train.py", "model.py", "space.py"):
        shutil.copy(ROOT / name, text)
    prepare([str(text)], str(root / "data"), vocab_size=600)
    save_random(root / "llama", SMALL_CONFIG(vocab_size=600), root / "data")
    save_random(root / "odd", ODD, root / "data")
    flags = ["--data", str(root / "data"), *TINY]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "LlamaConfig", SMALL_CONFIG)
        train.main([*flags, "--out", str(root / "out/flex")])
    return root, flags


@pytest.fixture(scope="session")
def random_start(demo):
    """(the same folder, flags of a family that starts from the random Llama)."""
    root, flags = demo
    return root, [*flags, "--llama", str(root / "llama")]


@pytest.fixture(scope="session")
def odd_start(demo):
    """(the same folder, flags of a family that starts from the odd Llama)."""
    root, flags = demo
    return root, [*flags, "--llama", str(root / "odd")]
