"""Kernels of our own for the CPU, built once from source where a compiler is.

Importing this module loads nothing: `load()` does, and says whether the kernels can be used.
"""

from __future__ import annotations

import hashlib
import logging
import os
import subprocess
import tempfile
import threading
from pathlib import Path

import torch

__all__ = ["in_use", "load"]

_loading = threading.Lock()
_log = logging.getLogger(__name__)
_SOURCE = Path(__file__).with_name("cpu.cpp")
_HEADERS = ("attention.h", "lanes.h", "logits.h", "product.h", "rows.h", "threads.h", "tiles.h")
_COMPILER = "c++"
_FLAGS = ("-std=c++20", "-O3", "-march=native", "-fPIC", "-shared")
_VECTORS = {
    "AVX512": ("-DCPU_CAPABILITY=AVX512", "-DCPU_CAPABILITY_AVX512"),
    "AVX2": ("-DCPU_CAPABILITY=AVX2", "-DCPU_CAPABILITY_AVX2", "-mno-avx512f"),
}
"""More flags by what torch runs on; ATEN_CPU_CAPABILITY=avx2 makes it run on less than the processor has."""


def load(build_dir: Path) -> bool:
    """Makes the kernels callable as torch.ops.logprobs, building them in `build_dir` the first time (10 to 60 s).

    A process loads them once, wherever they were built.

    Returns:
        False where the processor has neither AVX-512 nor AVX2, where there is no compiler, or the build fails; the log
        says which.
    """
    with _loading:
        return _loaded() or _load(build_dir)


def in_use(tensor: torch.Tensor) -> bool:
    """Whether the kernels are loaded and can take this tensor."""
    return tensor.is_cpu and _loaded()


def _loaded() -> bool:
    return hasattr(torch.ops.logprobs, "row_statistics")


def _load(build_dir: Path) -> bool:
    capability = torch.backends.cpu.get_cpu_capability().partition("_")[0]
    if capability not in _VECTORS:
        _log.info("kernels not used: this processor has neither AVX-512 nor AVX2")
        return False
    flags = (*_FLAGS, *_VECTORS[capability])
    library = build_dir / f"logprobs-{_digest(flags)}.so"
    try:
        if not library.exists():
            _build(library, flags)
        torch.ops.load_library(str(library))  # type: ignore[no-untyped-call]
    except subprocess.CalledProcessError as error:
        _log.warning("kernels not used: the compiler failed: %s", error.stderr.strip().rpartition("\n")[2])
        return False
    except OSError as error:
        _log.warning("kernels not used: %s", error)
        return False
    return True


def _digest(flags: tuple[str, ...]) -> str:
    """Of all that a built library depends on: the source, torch, the flags, and the processor it is tuned to."""
    cpuinfo = Path("/proc/cpuinfo")
    processor = next((line for line in cpuinfo.read_text().splitlines() if line.startswith("flags")), "")
    sources = [_SOURCE.with_name(name).read_text() for name in (_SOURCE.name, *_HEADERS)]
    parts = (*sources, torch.__version__, *flags, processor)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _build(library: Path, flags: tuple[str, ...]) -> None:
    """Compiles the source; the library appears whole or not at all, also where several processes build it at once.

    Raises:
        OSError: there is no compiler, or the place cannot be written.
        subprocess.CalledProcessError: the compiler failed.
    """
    from torch.utils import cpp_extension

    _log.info("building kernels for this processor, once, in %s", library.parent)
    library.parent.mkdir(parents=True, exist_ok=True)
    includes = [f"-I{path}" for path in cpp_extension.include_paths()]
    links = [f"-L{path}" for path in cpp_extension.library_paths()]
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        built = Path(scratch) / library.name
        command = [_COMPILER, *flags, *includes, str(_SOURCE), "-o", str(built), *links, "-lc10", "-ltorch_cpu"]
        subprocess.run(command, check=True, capture_output=True, text=True)
        os.replace(built, library)
