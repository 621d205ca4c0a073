"""Beam search: which tokens extend which beams, which hypotheses are finished, and what of them is certain.

The rules are those of transformers' `generate(num_beams=N)`, so that tokens, order and scores are the same. Beams are
leaves of a tree of tokens: what all that may still be told agree on is the path to where they part. Knows nothing of
models, blocks or tensors; of each beam's distribution it is given the few most probable tokens.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from logprobs_server.engine.completion import Completion
from logprobs_server.engine.events import CompletionFinished, Event, FinishReason, PositionLogprobs
from logprobs_server.engine.types import BeamOptions, EarlyStopping, GenerateJob, TokenBytes, length_normalized
from logprobs_server.text.completion import CompletionText

__all__ = ["BeamRow", "BeamSearch"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BeamRow:
    """What may follow a beam.

    position: what is told of its distribution, without a token.
    token_ids, logprobs, ranks: the most probable tokens, `BeamSearch.width` of them or all, best first.
    """

    position: PositionLogprobs
    token_ids: Sequence[int]
    logprobs: Sequence[float]
    ranks: Sequence[int]


@dataclass(frozen=True, slots=True, eq=False)
class _Node:
    """A token of the tree, with all before it; the root stands for the prompt.

    total: sum of logprobs, in nats. text: what stop strings are searched in, None if there are none.
    """

    parent: _Node | None
    position: PositionLogprobs
    total: float
    length: int
    text: CompletionText | None


_Candidate = tuple[float, int, int]
"""Minus the total, the beam's number and the token's place in its row: the least is the best."""


class BeamSearch:
    """The search of one job: its beams, best first, and its finished hypotheses.

    completions: one per beam, empty. The hypothesis with the best score becomes the first of them.
    """

    def __init__(
        self, job: GenerateJob, options: BeamOptions, completions: Sequence[Completion], eos_token_ids: frozenset[int]
    ) -> None:
        self._options = options
        self._stopping = job.stopping
        self._completions = completions
        self._ends = frozenset(job.stopping.token_ids) | (frozenset() if job.stopping.ignore_eos else eos_token_ids)
        text = CompletionText(job.stopping.strings, job.stopping.include) if job.stopping.strings else None
        self._certain = _Node(None, PositionLogprobs(token_id=None), 0.0, 0, text)
        self._beams = [self._certain]
        self._finished: list[tuple[float, _Node]] = []

    @property
    def width(self) -> int:
        """Tokens wanted of each beam's row: one beam may go on as all the next ones, and most of its tokens may end it
        or be masked."""
        return 2 * len(self._completions) + len(self._ends)

    def extend(self, rows: Sequence[BeamRow], vocabulary: TokenBytes) -> tuple[list[tuple[int, int]], list[Event]]:
        """Takes one step.

        Args:
            rows: one per beam.
        Returns:
            The next beams, best first, as (number of the beam that goes on, token id), and what became certain.
            Without a beam the search has ended, and so have all completions.
        """
        chosen: list[tuple[int, int]] = []
        beams: list[_Node] = []
        for rank, (_, number, place) in enumerate(self._candidates(rows)):
            node, ends = self._child(self._beams[number], rows[number], place, vocabulary)
            if ends and rank < len(self._completions):
                self._finish(node)
            elif not ends and len(beams) < len(self._completions):
                beams.append(node)
                chosen.append((number, rows[number].token_ids[place]))
        self._beams = beams
        if self._over():
            return [], self._end(None, vocabulary)
        return chosen, self._tell_agreed(vocabulary)

    def end(self, reason: FinishReason, vocabulary: TokenBytes) -> list[Event]:
        """Ends the search where it is: beams count as finished, and what has no token is empty."""
        for beam in self._beams:
            if beam.length:
                self._finish(beam)
        return self._end(reason, vocabulary)

    def _candidates(self, rows: Sequence[BeamRow]) -> list[_Candidate]:
        """The best continuations of all beams together, as many as transformers looks at, best first."""
        masked = self._ends if self._beams[0].length < self._stopping.min_tokens else frozenset()
        found = (
            (-(beam.total + logprob), number, place)
            for number, (beam, row) in enumerate(zip(self._beams, rows, strict=True))
            for place, (token_id, logprob) in enumerate(zip(row.token_ids, row.logprobs, strict=True))
            if token_id not in masked
        )
        return heapq.nsmallest(max(2, 1 + len(self._ends)) * len(self._completions), found)

    def _child(self, beam: _Node, row: BeamRow, place: int, vocabulary: TokenBytes) -> tuple[_Node, bool]:
        """The beam with one more token, and whether that ends it."""
        token_id, logprob, rank = row.token_ids[place], row.logprobs[place], row.ranks[place]
        position = replace(row.position, token_id=token_id, logprob=logprob, rank=rank, greedy=place == 0)
        length = beam.length + 1
        ends = token_id in self._ends or length == self._completions[0].limit
        text = None
        if beam.text is not None and token_id not in self._ends:
            text = beam.text.fork()
            delta = text.push(vocabulary.token_bytes(token_id), match_stops=length > self._stopping.min_tokens)
            ends = ends or delta.stop is not None
        return _Node(beam, position, beam.total + logprob, length, text), ends

    def _finish(self, node: _Node) -> None:
        """Keeps a hypothesis if it is among the best; of equal ones the earlier stays."""
        self._finished.append((self._score(node), node))
        self._finished.sort(key=lambda one: -one[0])
        del self._finished[len(self._completions) :]

    def _score(self, node: _Node, length: int | None = None) -> float:
        """What hypotheses are compared by; `length` is that of its own tokens unless given."""
        return length_normalized(node.total, length or node.length, self._options.length_penalty)

    def _over(self) -> bool:
        """Whether no beam is left, or none is to be waited for."""
        if not self._beams or len(self._finished) < len(self._completions):
            return not self._beams
        if self._options.early_stopping is EarlyStopping.WHEN_FULL:
            return True
        grows = self._options.early_stopping is EarlyStopping.NEVER and self._options.length_penalty > 0
        best = self._score(self._beams[0], self._completions[0].limit if grows else None)
        return best <= self._finished[-1][0]

    def _tell_agreed(self, vocabulary: TokenBytes) -> list[Event]:
        """Tells the tokens that every beam, and every finished hypothesis that may be told, goes on with."""
        told = self._options.told
        leaves = self._beams + [node for _, node in self._finished[:told]]
        agreed = []
        for nodes in zip(*(_path(leaf, self._certain) for leaf in leaves), strict=False):
            if any(node is not nodes[0] for node in nodes):
                break
            agreed.append(nodes[0])
        if agreed:
            self._certain = agreed[-1]
        return [event for one in self._completions[:told] for event in _told(one, agreed, vocabulary)]

    def _end(self, reason: FinishReason | None, vocabulary: TokenBytes) -> list[Event]:
        """Tells the rest of what is to be told, and of every completion how it ended."""
        events: list[Event] = []
        for index, completion in enumerate(self._completions):
            told = index < self._options.told
            node = self._finished[index][1] if index < len(self._finished) else self._certain
            last = _told(completion, _path(node, self._certain if told else None), vocabulary)
            if not (last and isinstance(last[-1], CompletionFinished)):
                assert reason is not None, "a hypothesis that nothing ends"
                last += completion.end(reason)
            events += last if told else last[-1:]
        return events


def _path(node: _Node, after: _Node | None) -> list[_Node]:
    """The tokens up to `node` that follow `after`, all of them if that is None, in order."""
    path = []
    while node is not after and node.parent is not None:
        path.append(node)
        node = node.parent
    return path[::-1]


def _told(completion: Completion, nodes: Iterable[_Node], vocabulary: TokenBytes) -> list[Event]:
    """Gives a completion its next tokens. They were not drawn: of each there was one to take."""
    return [event for node in nodes for event in completion.accept(node.position, 0.0, 1, vocabulary)]
