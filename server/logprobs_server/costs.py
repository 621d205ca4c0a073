"""What a request costs and how large its answer may become, known before it runs. Pure arithmetic, and its limits."""

from __future__ import annotations

from itertools import accumulate

from logprobs_server.engine.types import LogprobOptions
from logprobs_server.requests import Limits
from logprobs_server.rules import Rules
from logprobs_server.text.vocabulary import Vocabulary

__all__ = ["ANSWER_OVERHEAD", "FLOAT_BYTES", "SEQUENCE_OVERHEAD", "Costs"]

_TOKEN_OVERHEAD = 96
_ALTERNATIVE_OVERHEAD = 20
SEQUENCE_OVERHEAD = 64
"""Upper bounds of the encoded size, in bytes, of a Token, an Alternative, a ScoredSequence without what they hold."""
ANSWER_OVERHEAD = 1024
"""What an answer holds besides: model, usage, the lengths of its fields."""
FLOAT_BYTES = 4


class Costs:
    """Knows how long the vocabulary's spellings are, and the limits."""

    def __init__(self, vocabulary: Vocabulary, limits: Limits) -> None:
        self._vocabulary = vocabulary
        self._limits = limits
        lengths = (len(vocabulary.spelled(i)) + len(vocabulary.special_name(i)) for i in range(vocabulary.size))
        longest = sorted(lengths, reverse=True)[: 2 * limits.top_count]
        self._spelling_bound = [0, *accumulate(longest)]

    def check_alternatives(self, rules: Rules, field: str, positions: int, each: int) -> None:
        """Notes that a request wants more alternatives than the server gives."""
        limit = self._limits.alternatives
        rules.check(
            positions * each <= limit,
            field,
            f"{positions} positions with {each} alternatives each are more than this server's {limit:,} alternatives",
        )

    def check_size(self, rules: Rules, field: str, payload: int) -> None:
        """Notes that an answer that holds so many bytes could be too large for a message."""
        size, limit = ANSWER_OVERHEAD + payload, self._limits.response_bytes
        rules.check(size <= limit, field, f"the answer could need {size:,} bytes; this server's limit is {limit:,}")

    def size_bound(self, tokens: int, options: LogprobOptions) -> int:
        """Bytes that this many tokens cannot pass."""
        named = sum(len(self._vocabulary.spelled(i)) for i in options.token_ids)
        alternatives = options.top_count + len(options.token_ids)
        spelled = self._spelling_bound[1] + self._spelling_bound[min(options.top_count, len(self._spelling_bound) - 1)]
        return tokens * (_TOKEN_OVERHEAD + _ALTERNATIVE_OVERHEAD * alternatives + named + spelled)
