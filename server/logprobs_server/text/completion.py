"""What the drawn tokens of one completion add up to: its text, and each token's place in it.

Knows bytes, characters and stop strings; nothing of ids, logprobs or why tokens were drawn.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from logprobs_server.text.detokenizer import Utf8Decoder
from logprobs_server.text.stop import StopMatcher

__all__ = ["CompletionText", "Delta", "PlacedToken"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedToken:
    """The bytes a token adds to the completion's text, and where they start; `trimmed` if a stop cut some off.

    A token that lies wholly behind the cut has no bytes and starts at the text's end. A token that starts inside a
    character has that character's code point offset.
    """

    bytes: bytes
    byte_offset: int
    code_point_offset: int
    trimmed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """What became certain: tokens in the order they were pushed, whole characters, the stop string that ended it."""

    placed: tuple[PlacedToken, ...]
    text: str
    stop: str | None


class CompletionText:
    """One completion's text, token by token.

    Every token comes out once, in order, as soon as no stop string can cut its bytes any more. The bytes of all tokens
    put together are those of the text: it is what they decode to, U+FFFD for what is no UTF-8.

    A stop string cuts the text at its start, or at its end if it is included; either way nothing is told of text
    that may still become part of one. A character is matched with the token that completes it.
    """

    def __init__(self, stops: Sequence[str], include_stop: bool) -> None:
        self._decoder = Utf8Decoder()
        self._matcher = StopMatcher(stops)
        self._has_stops = bool(stops)
        self._include_stop = include_stop
        self._tokens: deque[PlacedToken] = deque()  # not told yet
        self._lengths: list[int] = []  # bytes of each character not told yet
        self._num_bytes = 0
        self._told_bytes = 0
        self._told_characters = 0
        self._ended = False

    @property
    def byte_count(self) -> int:
        """Bytes of the text so far, those not told yet included."""
        return self._num_bytes

    def fork(self) -> CompletionText:
        """The text of another completion, which goes on from the same tokens by itself."""
        other = copy.copy(self)
        other._decoder, other._matcher = copy.copy(self._decoder), self._matcher.fork()
        other._tokens, other._lengths = self._tokens.copy(), self._lengths.copy()
        return other

    def push(self, token_bytes: bytes, *, match_stops: bool = True) -> Delta:
        """Takes the next token's bytes (none for a special token).

        match_stops: False lets the token's characters through unmatched; matching starts afresh after them.
        """
        characters = self._place(token_bytes)
        text = self._matcher.push(characters) if match_stops else self._matcher.flush() + characters
        if self._matcher.matched is not None:
            return self._stop(text, self._matcher.matched)
        if not self._has_stops:
            return Delta(placed=self._all_tokens(), text=text, stop=None)
        self._tell(len(text))
        return Delta(placed=self._certain_tokens(), text=text, stop=None)

    def push_stop_token(self, token_bytes: bytes, keep: bool) -> Delta:
        """Ends the completion with a stop token, which is not searched for stop strings; trims it unless kept."""
        kept = token_bytes if keep else b""
        characters = self._place(kept, trimmed=kept != token_bytes)
        return self._end(self._matcher.flush() + characters + self._decoder.flush().text)

    def flush(self) -> Delta:
        """Ends the completion where it is. An incomplete character becomes U+FFFD, which is not matched."""
        assert not self._ended
        return self._end(self._matcher.flush() + self._decoder.flush().text)

    def _place(self, token_bytes: bytes, *, trimmed: bool = False) -> str:
        """Appends a token; returns the characters that it completes."""
        assert not self._ended, "nothing follows the end of a completion"
        start, text, lengths = self._decoder.push(token_bytes)
        self._tokens.append(
            PlacedToken(bytes=token_bytes, byte_offset=self._num_bytes, code_point_offset=start, trimmed=trimmed)
        )
        self._num_bytes += len(token_bytes)
        if self._has_stops:
            self._lengths += lengths
        return text

    def _tell(self, num_characters: int) -> None:
        """Notes that the next characters are told, or are about to be."""
        self._told_characters += num_characters
        self._told_bytes += sum(self._lengths[:num_characters])
        del self._lengths[:num_characters]

    def _certain_tokens(self) -> tuple[PlacedToken, ...]:
        """Takes the tokens that end where told characters end, or before."""
        certain = []
        while self._tokens and self._tokens[0].byte_offset + len(self._tokens[0].bytes) <= self._told_bytes:
            certain.append(self._tokens.popleft())
        return tuple(certain)

    def _all_tokens(self) -> tuple[PlacedToken, ...]:
        tokens = tuple(self._tokens)
        self._tokens.clear()
        return tokens

    def _stop(self, text: str, stop: str) -> Delta:
        """Ends the completion at a stop string that follows `text`."""
        if self._include_stop:
            text += stop
        self._tell(len(text))
        self._num_bytes = self._told_bytes
        self._ended = True
        return Delta(placed=tuple(self._cut(token) for token in self._all_tokens()), text=text, stop=stop)

    def _cut(self, token: PlacedToken) -> PlacedToken:
        """The token as it is if the text ends where told characters end."""
        kept = token.bytes[: max(self._told_bytes - token.byte_offset, 0)]
        return PlacedToken(
            bytes=kept,
            byte_offset=min(token.byte_offset, self._told_bytes),
            code_point_offset=min(token.code_point_offset, self._told_characters),
            trimmed=len(kept) < len(token.bytes),
        )

    def _end(self, text: str) -> Delta:
        self._ended = True
        return Delta(placed=self._all_tokens(), text=text, stop=None)
