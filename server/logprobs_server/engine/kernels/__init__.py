"""Kernels of our own for the CPU, built once from source where a compiler is.

Importing this module loads nothing: `load()` does, and says whether the kernels can be used.
"""

from __future__ import annotations

import hashlib
import logging
from functools import cache
from pathlib import Path

import torch

__all__ = ["load"]

_log = logging.getLogger(__name__)
_SOURCE = Path(__file__).with_name("cpu.cpp")
_FLAGS = ["-O3", "-march=native", "-fopenmp", "-DCPU_CAPABILITY=AVX512", "-DCPU_CAPABILITY_AVX512"]


@cache
def load(build_dir: Path) -> bool:
    """Makes the kernels callable as torch.ops.logprobs, building them in `build_dir` the first time.

    Returns:
        False where there is no AVX-512 processor, no compiler, or the build fails; the log says which.
    """
    if "AVX512" not in torch.backends.cpu.get_cpu_capability():
        _log.info("kernels not used: this processor has no AVX-512")
        return False
    try:
        from torch.utils import cpp_extension

        digest = hashlib.sha256(_SOURCE.read_bytes() + torch.__version__.encode()).hexdigest()[:16]
        place = build_dir / f"kernels-{digest}"
        place.mkdir(parents=True, exist_ok=True)
        library = place / f"logprobs_kernels_{digest}.so"
        if library.exists():
            torch.ops.load_library(str(library))  # type: ignore[no-untyped-call]
        else:
            _log.info("building kernels in %s, once", place)
            cpp_extension.load(
                library.stem, [str(_SOURCE)], extra_cflags=_FLAGS, build_directory=str(place), is_python_module=False
            )
    except (OSError, RuntimeError, ImportError) as error:
        _log.warning("kernels not used: %s", str(error).partition("\n")[0])
        return False
    return True
