"""Score's answers: which tokens are the continuation's, where they are, and that every number adds up."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
from harness import Served, ids, running, text
from logprobs.v1 import logprobs_pb2 as pb

TOLERANCE = 1e-4
CONTEXT = "the horse raced"
CONTINUATION = " past the barn"


def scored(served: Served, context: pb.Input, *continuations: pb.Input, **fields: Any) -> Sequence[pb.ScoredSequence]:
    """The sequences of an answer."""
    return served.score(pb.ScoreRequest(context=context, continuations=continuations, **fields))


def tokenized(served: Served, content: str) -> list[int]:
    """The ids of a text's tokens."""
    return [token.id for token in served.stub.Tokenize(pb.TokenizeRequest(input=text(content))).tokens]


def numbers(tokens: Sequence[pb.Token]) -> list[float]:
    """The logprobs of tokens that all have one."""
    assert all(token.HasField("logprob") for token in tokens)
    return [token.logprob for token in tokens]


# the context alone


def test_a_context_alone_is_scored_from_its_second_token(tiny: Served) -> None:
    [sequence] = scored(tiny, text(CONTEXT))
    first, *rest = sequence.tokens
    assert [token.id for token in sequence.tokens] == tokenized(tiny, CONTEXT)
    assert not any(first.HasField(name) for name in ("logprob", "rank", "tail_logprob", "entropy"))
    assert sequence.totals.token_count == len(rest)
    assert sequence.totals.logprob == pytest.approx(math.fsum(numbers(rest)), rel=1e-6)
    assert sequence.totals.byte_count == len(CONTEXT)
    assert sequence.context_token_count == 0


@pytest.mark.parametrize("empty", [text(""), ids([])], ids=["text", "ids"])
def test_an_empty_context_alone_has_no_tokens(empty: pb.Input, tiny: Served) -> None:
    [sequence] = scored(tiny, empty)
    assert sequence == pb.ScoredSequence(totals=pb.Totals(), greedy=True)


def test_a_context_of_one_token_has_no_logprob(tiny: Served) -> None:
    [sequence] = scored(tiny, ids([5]))
    assert [token.id for token in sequence.tokens] == [5]
    assert sequence.totals == pb.Totals(byte_count=len(sequence.tokens[0].bytes))


# where a continuation begins


def test_a_continuation_is_scored_as_the_end_of_the_whole(tiny: Served) -> None:
    [whole] = scored(tiny, text(CONTEXT + CONTINUATION))
    [sequence] = scored(tiny, text(CONTEXT), text(CONTINUATION))
    own = whole.tokens[sequence.context_token_count :]
    assert [token.id for token in sequence.tokens] == [token.id for token in own]
    assert numbers(sequence.tokens) == pytest.approx(numbers(own), abs=TOLERANCE)
    assert b"".join(token.bytes for token in sequence.tokens).decode() == CONTINUATION
    assert sequence.tokens[0].byte_offset == 0


def test_a_token_that_straddles_the_boundary_is_the_continuations(tiny: Served) -> None:
    [sequence] = scored(tiny, text("the ho"), text("rse"))
    assert tokenized(tiny, "the horse") != tokenized(tiny, "the ho") + tokenized(tiny, "rse")
    first = sequence.tokens[0]
    assert first.byte_offset < 0
    assert first.byte_offset == first.code_point_offset
    assert b"".join(token.bytes for token in sequence.tokens).decode() == "the horse"[first.byte_offset - 3 :]
    assert sequence.totals.byte_count == len("rse")
    assert first.HasField("logprob")


def test_a_boundary_inside_a_character_of_several_tokens_cuts_none(tiny: Served) -> None:
    [sequence] = scored(tiny, text("ab é"), text("字é"))
    assert [(t.byte_offset, t.code_point_offset) for t in sequence.tokens] == [(0, 0), (1, 0), (2, 0), (3, 1), (4, 1)]
    assert b"".join(token.bytes for token in sequence.tokens).decode() == "字é"


@pytest.mark.parametrize("side", ["context", "continuation", "both"])
def test_token_ids_are_never_tokenised_together(side: str, tiny: Served) -> None:
    context, continuation = tokenized(tiny, "the ho"), tokenized(tiny, "rse")
    left = text("the ho") if side == "continuation" else ids(context)
    right = text("rse") if side == "context" else ids(continuation)
    [sequence] = scored(tiny, left, right)
    assert [token.id for token in sequence.tokens] == continuation
    assert sequence.context_token_count == len(context)
    assert sequence.tokens[0].byte_offset == 0
    [whole] = scored(tiny, ids(context + continuation))
    assert numbers(sequence.tokens) == pytest.approx(numbers(whole.tokens[len(context) :]), abs=TOLERANCE)


def test_a_continuation_of_nothing_starts_without_logprob(tiny: Served) -> None:
    [sequence] = scored(tiny, text(""), text(CONTEXT))
    [alone] = scored(tiny, text(CONTEXT))
    assert [token.id for token in sequence.tokens] == [token.id for token in alone.tokens]
    assert not sequence.tokens[0].HasField("logprob")
    assert sequence.totals.token_count == len(alone.tokens) - 1


@pytest.mark.parametrize("empty", [text(""), ids([])], ids=["text", "ids"])
def test_an_empty_continuation_has_no_tokens(empty: pb.Input, tiny: Served) -> None:
    [sequence] = scored(tiny, text(CONTEXT), empty)
    assert not sequence.tokens
    assert sequence.totals == pb.Totals()
    assert sequence.context_token_count == len(tokenized(tiny, CONTEXT))


def test_continuations_are_answered_in_order_as_if_alone(tiny: Served) -> None:
    continuations = [text(CONTINUATION), text(" and fell"), ids([7, 8, 9]), text(""), text(CONTINUATION)]
    together = scored(tiny, text(CONTEXT), *continuations)
    for continuation, sequence in zip(continuations, together, strict=True):
        [alone] = scored(tiny, text(CONTEXT), continuation)
        assert [token.id for token in sequence.tokens] == [token.id for token in alone.tokens]
        assert numbers(sequence.tokens) == pytest.approx(numbers(alone.tokens), abs=TOLERANCE)
        assert sequence.context_token_count == alone.context_token_count


def test_continuations_share_the_computing_of_their_context(tiny: Served) -> None:
    context = [i % 300 for i in range(1000)]
    request = pb.ScoreRequest(context=ids(context), continuations=[ids([i, 5]) for i in range(20)])
    assert tiny.stub.Score(request).usage.input_token_count == 1000 + 20 * 2


# what is told


def test_totals_alone_are_those_of_the_tokens(tiny: Served) -> None:
    continuations = [text(CONTINUATION), text(" and fell")]
    full = scored(tiny, text(CONTEXT), *continuations)
    totals = scored(tiny, text(CONTEXT), *continuations, totals_only=True)
    for sequence, short in zip(full, totals, strict=True):
        assert not short.tokens
        assert short.totals.token_count == sequence.totals.token_count
        assert short.totals.byte_count == sequence.totals.byte_count
        assert short.totals.logprob == pytest.approx(sequence.totals.logprob, abs=TOLERANCE)
        assert sequence.totals.logprob == pytest.approx(math.fsum(numbers(sequence.tokens)), rel=1e-6)


def test_ranks_place_the_token_among_all(tiny: Served) -> None:
    [sequence] = scored(tiny, text(CONTEXT), logprobs=pb.LogprobOptions(top_count=100, token_ids=range(100)))
    for token in sequence.tokens[1:]:
        above = [alternative for alternative in token.top if alternative.logprob > token.logprob]
        assert token.rank == len(above) + 1 if token.rank <= 100 else len(above) == 100


def test_alternatives_are_what_was_asked_for(tiny: Served) -> None:
    options = pb.LogprobOptions(top_count=5, token_ids=[9, 3, 9], entropy=True)
    [sequence] = scored(tiny, text(CONTEXT), text(CONTINUATION), logprobs=options)
    for token in sequence.tokens:
        assert [alternative.id for alternative in token.named] == [9, 3, 9]
        values = [alternative.logprob for alternative in token.top]
        assert values == sorted(values, reverse=True)
        assert len({alternative.id for alternative in token.top}) == 5
        assert math.fsum(map(math.exp, values)) + math.exp(token.tail_logprob) == pytest.approx(1, abs=1e-5)
        assert token.entropy > 0
        same = [a.logprob for a in (*token.top, *token.named) if a.id == token.id]
        assert same == pytest.approx([token.logprob] * len(same), abs=1e-6)


def test_the_whole_vocabulary_sums_to_one_and_leaves_no_tail(tiny_folder: Any) -> None:
    with running(tiny_folder, max_top_count=300) as served:
        options = pb.LogprobOptions(top_count=300, entropy=True)
        [sequence] = scored(served, text(CONTEXT), logprobs=options)
        for token in sequence.tokens[1:]:
            values = [alternative.logprob for alternative in token.top]
            assert math.fsum(map(math.exp, values)) == pytest.approx(1, abs=1e-5)
            assert token.tail_logprob == -math.inf
            assert token.entropy == pytest.approx(-math.fsum(v * math.exp(v) for v in values), abs=1e-4)


def test_alternatives_tell_their_bytes(tiny: Served) -> None:
    [sequence] = scored(tiny, ids([5, 6]), logprobs=pb.LogprobOptions(token_ids=[0, 5]))
    special, plain = sequence.tokens[1].named
    assert (special.bytes, special.special_name) == (b"", "<|eos|>")
    assert (plain.bytes, plain.special_name) == (sequence.tokens[0].bytes, "")


def test_what_greedy_decoding_chooses_is_called_greedy(tiny: Served) -> None:
    request = pb.GenerateRequest(prompt=text(CONTEXT), max_tokens=6, sampling=pb.Sampling(temperature=0))
    best = tiny.generate(request).token_ids()
    other = [*best[:-1], (best[-1] + 1) % 300]
    sequences = scored(tiny, text(CONTEXT), ids(best), ids(other), ids(best[:1]))
    assert [sequence.greedy for sequence in sequences] == [True, False, True]
    assert all(token.rank == 1 for token in sequences[0].tokens)


# the next token


def test_the_next_token_is_that_of_a_context_one_longer(tiny: Served) -> None:
    options = pb.LogprobOptions(top_count=3, token_ids=[7, 0], entropy=True)
    sequences = scored(tiny, text(CONTEXT), text(CONTINUATION), ids([]), next_token=True, logprobs=options)
    for sequence, before in zip(sequences, (CONTEXT + CONTINUATION, CONTEXT), strict=True):
        following = sequence.next
        best = following.top[0].id
        [longer] = scored(tiny, ids([*tokenized(tiny, before), best]), logprobs=options)
        token = longer.tokens[-1]
        assert [a.id for a in following.top] == [a.id for a in token.top]
        assert [a.id for a in following.named] == [7, 0]
        assert following.top[0].logprob == pytest.approx(token.logprob, abs=TOLERANCE)
        assert [a.logprob for a in following.named] == pytest.approx([a.logprob for a in token.named], abs=TOLERANCE)
        assert following.tail_logprob == pytest.approx(token.tail_logprob, abs=TOLERANCE)
        assert following.entropy == pytest.approx(token.entropy, abs=TOLERANCE)


def test_the_next_token_of_a_context_alone_is_told_beside_its_tokens(tiny: Served) -> None:
    options = pb.LogprobOptions(top_count=1)
    [sequence] = scored(tiny, text(CONTEXT), next_token=True, logprobs=options)
    [empty] = scored(tiny, text(CONTEXT), text(""), next_token=True, logprobs=options)
    assert len(sequence.tokens) == len(tokenized(tiny, CONTEXT))
    assert sequence.next.top[0].id == empty.next.top[0].id


def test_the_next_token_is_told_with_totals_only(tiny: Served) -> None:
    [sequence] = scored(
        tiny, text(CONTEXT), next_token=True, totals_only=True, logprobs=pb.LogprobOptions(token_ids=[1])
    )
    assert len(sequence.next.named) == 1


def test_nothing_has_no_next_token(tiny: Served) -> None:
    [sequence] = scored(tiny, text(""), next_token=True, logprobs=pb.LogprobOptions(top_count=1))
    assert not sequence.HasField("next")


def test_the_next_token_is_not_told_unasked(tiny: Served) -> None:
    [sequence] = scored(tiny, text(CONTEXT), logprobs=pb.LogprobOptions(top_count=1))
    assert not sequence.HasField("next")


# text that the tokenizer changes


def test_text_that_the_tokenizer_keeps_is_not_changed(tiny: Served) -> None:
    [alone] = scored(tiny, text("naïve 🙂"))
    [pair] = scored(tiny, text("naïve"), text(" 🙂"))
    assert not alone.text_changed
    assert not pair.text_changed


def test_bytes_that_the_tokenizer_drops_are_told_as_a_change(embedded: Served) -> None:
    dropped = "\U00040000"  # the embedded tokenizer has no token for the first of its bytes
    [alone] = scored(embedded, text(f"a{dropped}b"))
    [kept, changed] = scored(embedded, text("a"), text("b"), text(f"{dropped}b"))
    assert alone.text_changed
    assert changed.text_changed
    assert not kept.text_changed
    assert alone.totals.byte_count == sum(len(token.bytes) for token in alone.tokens)


def test_every_answer_tells_its_model(tiny: Served) -> None:
    response = tiny.stub.Score(pb.ScoreRequest(context=text("ab")))
    assert response.model == tiny.stub.GetModel(pb.GetModelRequest()).model
