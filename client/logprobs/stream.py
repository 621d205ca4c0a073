"""Puts the events of a Generate stream together again, and refuses a stream that breaks the contract.

Pure: takes events from wherever they come. Offsets in code points and the prompt's offsets are not checked: the
first follow from the bytes, the second depend on the chat template.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import NoReturn

from logprobs.errors import IncompleteStreamError, InconsistentStreamError
from logprobs.generation import Completion, Generation
from logprobs.v1 import logprobs_pb2 as pb

__all__ = ["StreamAssembler"]

_STOPS = {
    pb.FINISH_REASON_END_OF_SEQUENCE: None,
    pb.FINISH_REASON_STOP_STRING: "stop_string",
    pb.FINISH_REASON_STOP_TOKEN: "stop_token_id",
    pb.FINISH_REASON_MAX_TOKENS: None,
    pb.FINISH_REASON_CONTEXT_FULL: None,
    pb.FINISH_REASON_TIME_LIMIT: None,
}
"""Which stop must be told with a finish reason. Reasons that are added later are not held to any."""


class StreamAssembler:
    """Takes a stream's events in order; gives the Generation once all of them are there.

    An event that breaks a rule raises and changes nothing.
    """

    def __init__(self) -> None:
        self._started: pb.GenerationStarted | None = None
        self._prompt: list[pb.Token] = []
        self._prompt_changed = False
        self._drafts: dict[int, _Draft] = {}
        self._ranking: pb.CompletionsRanked | None = None

    @property
    def generation(self) -> Generation:
        """What has arrived so far."""
        seed = self._started.seed if self._started and self._started.HasField("seed") else None
        return Generation(
            started=self._started,
            prompt_tokens=tuple(self._prompt),
            prompt_text_changed=self._prompt_changed,
            completions=tuple(draft.completion(seed) for _, draft in sorted(self._drafts.items())),
            ranking=self._ranking,
        )

    def push(self, event: pb.GenerateResponse) -> None:
        """Takes the next event; skips one of a kind that is not known here.

        Raises:
            InconsistentStreamError: it breaks a rule.
        """
        kind = event.WhichOneof("event")
        if kind is None:
            return
        if self._ranking is not None:
            self._refuse(f"a {kind} event after the ranking")
        if kind == "started":
            self._start(event.started)
        elif self._started is None:
            self._refuse(f"a {kind} event before the started one")
        elif kind == "prompt_scored":
            self._score_prompt(event.prompt_scored, self._started)
        elif kind == "decoded":
            self._decode(event.decoded)
        elif kind == "finished":
            self._finish(event.finished)
        else:
            self._rank(event.ranked, self._started)

    def finish(self) -> Generation:
        """The whole; to be called when the stream has ended with OK.

        Raises:
            IncompleteStreamError: something is missing.
        """
        missing = next(self._missing(), None)
        if missing is not None:
            raise IncompleteStreamError(f"the stream ended without {missing}", self.generation)
        return self.generation

    def _start(self, started: pb.GenerationStarted) -> None:
        if self._started is not None:
            self._refuse("a second started event")
        if started.completion_count < 1:
            self._refuse("a generation of no completions")
        self._started = started

    def _score_prompt(self, scored: pb.PromptScored, started: pb.GenerationStarted) -> None:
        if self._drafts:
            self._refuse("a prompt_scored event after the first token decoded")
        if self._prompt and scored.text_changed != self._prompt_changed:
            self._refuse("prompt_scored events that disagree about text_changed")
        tokens = [*self._prompt, *scored.tokens]
        if len(tokens) > started.prompt_token_count:
            self._refuse(f"more prompt tokens than the {started.prompt_token_count} announced")
        if any(token.HasField("logprob") != (index > 0) for index, token in enumerate(tokens)):
            self._refuse("a prompt token other than the first without a logprob, or the first with one")
        self._prompt, self._prompt_changed = tokens, scored.text_changed

    def _decode(self, decoded: pb.TokensDecoded) -> None:
        indices = [delta.completion for delta in decoded.deltas]
        if len(set(indices)) < len(indices):
            self._refuse("two deltas of one completion in one event")
        self._check_indices(indices)
        self._check_prompt()
        for delta in decoded.deltas:
            self._refuse_if(delta.completion, self._draft(delta.completion).objection_to_delta(delta))
        for delta in decoded.deltas:
            self._drafts.setdefault(delta.completion, _Draft(delta.completion)).add(delta)

    def _finish(self, finished: pb.CompletionFinished) -> None:
        self._check_indices([finished.completion])
        if finished.reason != pb.FINISH_REASON_TIME_LIMIT:
            self._check_prompt()
        self._refuse_if(finished.completion, self._draft(finished.completion).objection_to_end(finished))
        self._drafts.setdefault(finished.completion, _Draft(finished.completion)).finished = finished

    def _rank(self, ranked: pb.CompletionsRanked, started: pb.GenerationStarted) -> None:
        missing = next(self._unfinished(started), None)
        if missing is not None:
            self._refuse(f"a ranking before {missing}")
        order = [place.completion for place in ranked.completions]
        if len(order) < 2:
            self._refuse("a ranking of fewer than two completions")
        if sorted(order) != list(range(len(order))):
            self._refuse("a ranking that does not name each completion drawn once")
        if set(order[: len(self._drafts)]) != set(self._drafts):
            self._refuse("a ranking whose best are not the completions sent")
        values = [place.value for place in ranked.completions]
        if not all(better >= worse for better, worse in pairwise(values)):
            self._refuse("a ranking that is not best first")
        for place in ranked.completions[: len(self._drafts)]:
            if place.totals != self._drafts[place.completion].totals:
                self._refuse(f"a ranking that disagrees with the totals of completion {place.completion}")
        self._ranking = ranked

    def _check_indices(self, indices: Sequence[int]) -> None:
        """With `best_of` an index may pass the number of completions sent, but there are no more of them."""
        assert self._started is not None
        if any(index < 0 for index in indices):
            self._refuse("a completion with a negative index")
        if len(self._drafts.keys() | set(indices)) > self._started.completion_count:
            self._refuse(f"more completions than the {self._started.completion_count} announced")

    def _check_prompt(self) -> None:
        """Whatever is decoded follows the whole prompt; only a time limit may end the stream before."""
        assert self._started is not None
        if 0 < len(self._prompt) < self._started.prompt_token_count:
            self._refuse("a token decoded before the prompt was told whole")

    def _draft(self, index: int) -> _Draft:
        return self._drafts.get(index) or _Draft(index)

    def _missing(self) -> Iterator[str]:
        if self._started is None:
            yield "a started event"
            return
        yield from self._unfinished(self._started)
        if self._ranking is None and list(self._drafts) != [0]:
            yield "a ranking of its completions"

    def _unfinished(self, started: pb.GenerationStarted) -> Iterator[str]:
        for index, draft in self._drafts.items():
            if draft.finished is None:
                yield f"the end of completion {index}"
        if len(self._drafts) < started.completion_count:
            yield f"{started.completion_count - len(self._drafts)} of its completions"

    def _refuse_if(self, index: int, objection: str | None) -> None:
        if objection is not None:
            self._refuse(f"completion {index}: {objection}")

    def _refuse(self, rule: str) -> NoReturn:
        raise InconsistentStreamError(f"the stream breaks the contract: {rule}", self.generation)


class _Draft:
    """One completion as it grows."""

    def __init__(self, index: int) -> None:
        self._index = index
        self._tokens: list[pb.Token] = []
        self._texts: list[str] = []
        self._byte_count = 0
        self.finished: pb.CompletionFinished | None = None

    @property
    def totals(self) -> pb.Totals:
        """The server's totals, checked; before the end, those of the tokens that arrived."""
        return self.finished.totals if self.finished is not None else _totals(self._tokens)

    def objection_to_delta(self, delta: pb.CompletionDelta) -> str | None:
        """Why the delta cannot come next; None if it can."""
        if self.finished is not None:
            return "something decoded after its end"
        offset = self._byte_count
        for token in delta.tokens:
            if token.byte_offset != offset:
                return f"a token at byte {token.byte_offset} where {offset} comes next"
            offset += len(token.bytes)
        return None

    def add(self, delta: pb.CompletionDelta) -> None:
        """Takes a delta to which there is no objection."""
        self._tokens.extend(delta.tokens)
        self._texts.append(delta.text)
        self._byte_count += sum(len(token.bytes) for token in delta.tokens)

    def objection_to_end(self, finished: pb.CompletionFinished) -> str | None:
        """Why the completion cannot end so; None if it can."""
        if self.finished is not None:
            return "a second end"
        if finished.reason == pb.FINISH_REASON_UNSPECIFIED:
            return "an end without a reason"
        if finished.reason in _STOPS and finished.WhichOneof("matched") != _STOPS[finished.reason]:
            return "a finish reason that does not go with the stop told"
        if self._text != b"".join(token.bytes for token in self._tokens).decode("utf-8", "replace"):
            return "text that is not its tokens' bytes"
        return _objection_to_totals(finished.totals, _totals(self._tokens))

    def completion(self, first_seed: int | None) -> Completion:
        """As far as it has come."""
        finished = self.finished or pb.CompletionFinished()
        matched = finished.WhichOneof("matched")
        return Completion(
            index=self._index,
            seed=None if first_seed is None else first_seed + self._index,
            tokens=tuple(self._tokens),
            text=self._text,
            finish_reason=finished.reason,
            stop_string=finished.stop_string if matched == "stop_string" else None,
            stop_token_id=finished.stop_token_id if matched == "stop_token_id" else None,
            totals=self.totals,
        )

    @property
    def _text(self) -> str:
        return "".join(self._texts)


def _totals(tokens: Iterable[pb.Token]) -> pb.Totals:
    """The totals that the tokens add up to; of sampling logprobs only where every token has one."""
    tokens = list(tokens)
    scored = [token.logprob for token in tokens if token.HasField("logprob")]
    totals = pb.Totals(
        token_count=len(scored),
        byte_count=sum(len(token.bytes) for token in tokens),
        logprob=math.fsum(scored),
    )
    if all(token.HasField("sampling_logprob") for token in tokens):
        totals.sampling_logprob = math.fsum(token.sampling_logprob for token in tokens)
    return totals


def _objection_to_totals(told: pb.Totals, added: pb.Totals) -> str | None:
    if (told.token_count, told.byte_count) != (added.token_count, added.byte_count):
        return "totals that do not count its tokens"
    if not _close(told.logprob, added.logprob):
        return f"a total logprob of {told.logprob} where its tokens add up to {added.logprob}"
    if told.HasField("sampling_logprob") and not _close(told.sampling_logprob, added.sampling_logprob):
        return "a total sampling logprob that its tokens do not add up to"
    return None


def _close(told: float, added: float) -> bool:
    """Tokens carry float32, totals float64; the difference is that of rounding."""
    return math.isclose(told, added, rel_tol=1e-6, abs_tol=1e-3)
