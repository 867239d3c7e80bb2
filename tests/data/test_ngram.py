"""Byte n-grams: probabilities by hand, and that they are probabilities."""

import math
import re

import pytest

from megalodon_plugin.data.ngram import ngram_losses


def test_by_hand():
    """`abab`: a and b twice each, after a always b (twice), after b always a (once)."""
    unigram = (2 + 2 / 256) / (4 + 2)  # of a, and of b; two kinds of bytes
    b_after_a = (2 + unigram) / (2 + 1)
    losses = ngram_losses(b"abab", b"ab", orders=(1, 2))
    assert losses.keys() == {1, 2}
    assert losses[1] == pytest.approx(-math.log(unigram))
    assert losses[2] == pytest.approx(-math.log(b_after_a))


def test_by_hand_at_an_unseen_byte_and_an_unseen_context():
    unseen = (0 + 2 / 256) / (4 + 2)
    assert ngram_losses(b"abab", b"z", orders=(1,))[1] == pytest.approx(-math.log(unseen))
    unseen_after_a = (0 + unseen) / (2 + 1)
    assert ngram_losses(b"abab", b"az", orders=(2,))[2] == pytest.approx(-math.log(unseen_after_a))
    a = (2 + 2 / 256) / (4 + 2)  # a context that was never seen leaves the shorter one's probability
    assert ngram_losses(b"abab", b"za", orders=(2,))[2] == pytest.approx(-math.log(a))


def test_the_loss_is_the_mean_over_the_same_bytes_for_every_order():
    """With orders up to 3 the first two bytes are not scored, not even by the unigram."""
    train = b"abracadabra"
    alone = [ngram_losses(train, byte, orders=(1,))[1] for byte in (b"r", b"a")]
    assert ngram_losses(train, b"abra", orders=(1, 3))[1] == pytest.approx(sum(alone) / 2)


def probability(train, context, byte, order):
    """P(byte | context) by the definition, one count at a time."""
    if order == 0:
        return 1 / 256
    shorter = probability(train, context[1:], byte, order - 1)
    follows = [train[i + order - 1] for i in range(len(train) - order + 1) if train[i : i + order - 1] == context]
    kinds = len(set(follows))
    return (follows.count(byte) + kinds * shorter) / (len(follows) + kinds) if follows else shorter


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("context", [b"bra", b"zbr", b"zzz", b"\x00\xff\x00"])
def test_every_continuation(context, order):
    """The 256 probabilities are those of the definition, and sum to one, after seen, half-seen and unseen contexts."""
    train = b"abracadabra abracadabrb\x00\xff\x00\xff"
    context = context[len(context) - order + 1 :]
    got = [math.exp(-ngram_losses(train, context + bytes([b]), orders=(order,))[order]) for b in range(256)]
    assert got == pytest.approx([probability(train, context, b, order) for b in range(256)])
    assert sum(got) == pytest.approx(1)


def test_a_longer_context_helps_on_a_text_that_repeats_itself():
    losses = ngram_losses(b"the rain in spain " * 50, b"the rain in spain " * 3)
    assert losses[4] < losses[3] < losses[2]


@pytest.mark.parametrize("orders", [(0, 2), (2, 5), (-1,)])
def test_orders_out_of_range(orders):
    with pytest.raises(ValueError, match=re.escape(f"`orders` must lie between 1 and 4, but are {orders}")):
        ngram_losses(b"abracadabra", b"abracadabra", orders=orders)


@pytest.mark.parametrize(("train", "held_out"), [(b"abc", b"abracadabra"), (b"abracadabra", b"abc"), (b"", b"abcd")])
def test_texts_that_are_too_short(train, held_out):
    message = f"both texts must have at least 4 bytes, but have {len(train)} and {len(held_out)}"
    with pytest.raises(ValueError, match=re.escape(message)):
        ngram_losses(train, held_out)
