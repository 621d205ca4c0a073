"""Numbers out of answers: rates, and percentiles of what a client waits; no I/O."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import ceil
from statistics import mean

from bench.exchange import Answer, Stream

__all__ = ["measures", "percentile"]


def measures(answer: Answer, tokens: int, completions: int) -> dict[str, float]:
    """What an answer about so many tokens shows; of the streams only what there is.

    seconds, tokens_s: of everything, prompts included. ttft_p50_ms: from request to first token.
    decode_tokens_s: of one stream, its prompt not included. itl_p50_ms, itl_p99_ms: between messages of a stream.
    steady_p50_ms, steady_p99_ms: the same while all streams run and nothing else comes in.
    late_p99_ms: the same between the late request and its first token.
    """
    found = {"seconds": answer.seconds, "tokens_s": tokens / answer.seconds}
    streams = answer.streams
    if streams:
        found["ttft_p50_ms"] = 1e3 * percentile([s.times[0] - s.start for s in streams], 0.5)
    if not streams or completions > 1:  # completions of one request share its messages
        return found
    found["decode_tokens_s"] = mean(map(_decode_rate, streams))
    first, last = max(s.times[0] for s in streams), min(s.times[-1] for s in streams)
    found |= _percentiles("itl", _gaps(streams))
    found |= _percentiles("steady", _gaps(streams, first, answer.late.start if answer.late else last))
    if answer.late:
        found |= _percentiles("late", _gaps(streams, answer.late.start, min(last, answer.late.times[0]), whole=False))
    return found


def percentile(values: Sequence[float], share: float) -> float:
    """The least value that this share of them do not exceed."""
    return sorted(values)[max(0, ceil(share * len(values)) - 1)]


def _decode_rate(stream: Stream) -> float:
    return (sum(stream.counts) - stream.counts[0]) / (stream.times[-1] - stream.times[0])


def _gaps(
    streams: Sequence[Stream], since: float = float("-inf"), until: float = float("inf"), *, whole: bool = True
) -> list[float]:
    """Milliseconds between messages of one stream: of gaps that lie within the span, or that it touches."""
    return [
        1e3 * (later - earlier)
        for stream in streams
        for earlier, later in pairwise(stream.times)
        if (since <= earlier and later <= until if whole else since < later and earlier < until)
    ]


def _percentiles(name: str, gaps: Sequence[float]) -> dict[str, float]:
    return {f"{name}_p{share}_ms": percentile(gaps, share / 100) for share in (50, 99)} if gaps else {}
