"""
Pictures: --plot of any program. matplotlib is asked for where it is used, and no other need.
"""
import importlib.util
import io
from pathlib import Path

from plumbing.errors import fail
from plumbing.files import atomic_write


def check_picture(path: str | None) -> None:
    """Can a picture go to the path of --plot? Asked before anything is measured; else fail()."""
    if path and Path(path).suffix not in (".png", ".svg", ".pdf"):
        fail(f"--plot {path} found; expected a file that ends in .png, .svg or .pdf")
    if path and importlib.util.find_spec("matplotlib") is None:
        fail("--plot needs matplotlib, which is not installed: pip install matplotlib")


def write_picture(figure, path: str) -> None:
    """Writes a matplotlib figure whole, or fail(): matplotlib itself writes a path piece by piece,
    and a reader must not see half."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=Path(path).suffix[1:], dpi=150)
    try:
        with atomic_write(path) as file:
            file.write(buffer.getvalue())
    except OSError as error:
        fail(f"--plot {path} cannot be written ({error.strerror or error}); the tables above are "
             "whole; choose another place")
