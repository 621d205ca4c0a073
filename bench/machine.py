"""What the machine could do at best: bytes read from memory per second, and the model's own products.

Measured in a process of its own, whose threads are gone when subjects are asked.
"""

from __future__ import annotations

import json
import platform
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["Machine", "measure", "processor_name"]

_READ_BYTES = 1 << 30
_TRIES = 3
_ROWS = (128, 512)
"""Rows of a product: few enough for results that allocators keep, and as many as prompts have; the faster counts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """The machine's ceilings for one model in one type.

    layers_s, head_s: seconds that the products of all layers, and of the head, take per token, many tokens at once.
    weight_bytes: read by every step. kv_bytes: keys and values of one token.
    """

    processor: str
    threads: int
    torch: str
    dtype: str
    read_bytes_per_s: float
    layers_s: float
    head_s: float
    weight_bytes: int
    kv_bytes: int

    def best(self, other: Machine) -> Machine:
        """The better of two measurements of one machine: a ceiling is never too high, and too low if it is busy."""
        return replace(
            self,
            read_bytes_per_s=max(self.read_bytes_per_s, other.read_bytes_per_s),
            layers_s=min(self.layers_s, other.layers_s),
            head_s=min(self.head_s, other.head_s),
        )

    @property
    def ceilings(self) -> dict[str, float]:
        """What differs from one measurement to the next."""
        return {"read_bytes_per_s": self.read_bytes_per_s, "layers_s": self.layers_s, "head_s": self.head_s}

    def at(self, ceilings: Mapping[str, float]) -> Machine:
        """The machine with those of another measurement."""
        read, layers, head = (ceilings[name] for name in self.ceilings)
        return replace(self, read_bytes_per_s=read, layers_s=layers, head_s=head)

    def step_s(self, streams: int, context: float) -> float:
        """Seconds of a step: weights, keys and values read once, or the products, whatever takes longer."""
        read = self.weight_bytes + streams * context * self.kv_bytes
        return max(read / self.read_bytes_per_s, streams * (self.layers_s + self.head_s))


def measure(folder: Path, dtype: torch.dtype) -> Machine:
    """Takes the best of several tries of everything."""
    config = json.loads((folder / "config.json").read_text())
    hidden, inner, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    width = config.get("head_dim") or hidden // config["num_attention_heads"]
    queries, pairs = config["num_attention_heads"] * width, 2 * config["num_key_value_heads"] * width
    layer = [(queries + pairs, hidden), (hidden, queries), (2 * inner, hidden), (hidden, inner)]
    head = [(config["vocab_size"], hidden)]
    return Machine(
        processor=processor_name(),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        dtype=str(dtype).removeprefix("torch."),
        read_bytes_per_s=_read_bytes_per_s(),
        layers_s=_products_s(layer * layers, dtype),
        head_s=_products_s(head, dtype),
        weight_bytes=dtype.itemsize * sum(n * k for n, k in layer * layers + head),
        kv_bytes=dtype.itemsize * layers * pairs,
    )


def _read_bytes_per_s() -> float:
    """With all cores; two ways of reading, since either may have a bound of its own."""
    block = torch.ones(_READ_BYTES // 4)
    return _READ_BYTES / min(_best_s(block.sum), _best_s(block.max))


@torch.inference_mode()
def _products_s(shapes: list[tuple[int, int]], dtype: torch.dtype) -> float:
    """Seconds per row of products with all these weights, one after the other; as they are, or packed for it.

    Those of float32 count too: where a processor does not multiply bfloat16 numbers they are several times as fast.
    """

    def best(dtype: torch.dtype) -> float:
        weights = [torch.randn(shape).to(dtype) for shape in shapes]
        return min(_best_s(products) / rows for rows in _ROWS for products in _products(weights, rows))

    return min(map(best, {dtype, torch.float32}))


def _products(weights: list[Tensor], rows: int) -> Iterator[Callable[[], object]]:
    """Each way to multiply so many rows by all weights; those of one size share their rows."""
    inputs = {width: torch.randn(rows, width).to(weights[0].dtype) for width in {w.shape[1] for w in weights}}
    work = [(inputs[weight.shape[1]], weight) for weight in weights]
    yield lambda: [functional.linear(x, weight) for x, weight in work]
    if torch._C._has_mkldnn:
        packed = [(x, torch.ops.mkldnn._reorder_linear_weight(weight, rows)) for x, weight in work]
        yield lambda: [torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "") for x, weight in packed]


def _best_s(work: Callable[[], object]) -> float:
    times = []
    for _ in range(1 + _TRIES):  # the first warms up
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def processor_name() -> str:
    """As the system calls it."""
    named = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return named[1] if named else platform.machine()


if __name__ == "__main__":
    print(json.dumps(asdict(measure(Path(sys.argv[1]), getattr(torch, sys.argv[2])))))
