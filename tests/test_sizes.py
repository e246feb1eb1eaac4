import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from efficientllm.sizes import (
    Amount,
    Position,
    exact_count,
    format_amount,
    format_count,
    format_fraction,
    parse_count,
    parse_fraction,
)

counts = st.integers(0, 10**15)
fractions = st.floats(0, 1)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("469M", 469_000_000),
        ("1.1B", 1_100_000_000),
        (" 32k ", 32_000),
        ("74 B", 74 * 10**9),
        ("2T", 2 * 10**12),
        ("512Ki", 2**19),
        ("1.5Mi", 3 * 2**19),
        ("2gi", 2**31),
        (".5K", 500),
        ("1_000", 1000),
        ("1,234,567", 1_234_567),
        ("1e9", 10**9),
        (1e9, 10**9),
        (0, 0),
        (7, 7),
    ],
)
def test_counts_are_read(text: object, count: int) -> None:
    assert parse_count(text) == count


@pytest.mark.parametrize(
    "text", ["", "many", "-3", -3, "1.5.2M", "M", "4MB", "0x10", "1,5M", "1__0", "1e9999", "inf", None, True, [4]]
)
def test_what_is_no_count_is_refused_with_the_spelling_that_works(text: object) -> None:
    with pytest.raises(ValueError, match="is not a count: write a whole number that is not negative, such as") as e:
        parse_count(text)
    assert repr(text) in str(e.value)


@pytest.mark.parametrize("text", [1.5, "1.23456K", "0.1", 10**19, "1e999", "1" * 40])
def test_counts_are_whole_and_fit_a_machine_word(text: object) -> None:
    with pytest.raises(ValueError, match=r"is not a whole number below 2\^63"):
        parse_count(text)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1K"),
        (65_536, "65.54K"),
        (999_950, "1M"),  # not 1000K
        (469_000_000, "469M"),
        (469_123_456, "469.1M"),
        (1_711_376_384, "1.711B"),
        (2 * 10**12, "2T"),
    ],
)
def test_counts_are_shown_with_four_digits(count: int, text: str) -> None:
    assert format_count(count) == text


@settings(deadline=None)
@given(counts)
def test_shown_counts_are_near_and_exact_counts_exact(count: int) -> None:
    assert abs(parse_count(format_count(count)) - count) <= count * 0.0005
    assert parse_count(exact_count(count)) == count


@pytest.mark.parametrize(
    ("count", "text"),
    [(469 * 10**6, "469M"), (8_600_000_000, "8.6B"), (65_536, "64Ki"), (2048, 2048), (469_123_456, 469_123_456)],
)
def test_exact_counts_are_readable_where_they_can(count: int, text: object) -> None:
    assert exact_count(count) == text


@settings(deadline=None)
@given(fractions)
def test_fractions_round_trip(fraction: float) -> None:
    assert parse_fraction(fraction) == parse_fraction(format_fraction(fraction)) == fraction


@pytest.mark.parametrize("text", ["101%", 1.5, -0.1, "a%", "%", "4M", True, None])
def test_what_is_no_fraction_is_refused(text: object) -> None:
    with pytest.raises(ValueError, match=r"is not a fraction: write a share such as 2% or 0\.02"):
        parse_fraction(text)


@settings(deadline=None)
@given(st.one_of(fractions, st.integers(2, 10**15)))
def test_positions_round_trip(value: float) -> None:
    position = Position.parse(value)
    assert position == Position.parse(str(position)) == Position.parse(position) == Position(value)


@pytest.mark.parametrize(
    ("value", "tokens", "text"),
    [
        ("15%", 150, "15%"),
        (0.02, 20, "2%"),
        ("0.125", 125, "12.5%"),
        (1, 1000, "100%"),
        (0, 0, "0%"),
        ("4M", 4_000_000, "4M"),
        (4e6, 4_000_000, "4M"),
        (2, 2, "2"),
    ],
)
def test_positions_are_fractions_up_to_one_and_tokens_above(value: object, tokens: int, text: str) -> None:
    position = Position.parse(value)
    assert position.tokens(1000) == tokens
    assert str(position) == text


@pytest.mark.parametrize("value", ["110%", 1.5, -0.1, "soon", None, False])
def test_what_is_no_position_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match=r"is no place in a run: write a share of it such as 15% or 0\.15"):
        Position.parse(value)


@settings(deadline=None)
@given(
    st.one_of(
        st.floats(1e-6, 0.999).map(lambda share: (f"{share:.7f}x", False)),
        st.integers(2, 10**15).map(lambda count: (str(count), False)),
        st.floats(0.001, 1e6).map(lambda time: (f"{time:.4f}ms", True)),
    )
)
def test_amounts_round_trip(written: tuple[str, bool]) -> None:
    text, timed = written
    amount = Amount.parse(text, timed=timed)
    assert amount == Amount.parse(str(amount), timed=timed) == Amount.parse(amount)


def test_amounts_are_shares_or_absolute() -> None:
    assert Amount.parse("40%").of(1001) == Amount.parse("0.4x").of(1001) == Amount.parse(0.4).of(1001) == 400
    assert Amount.parse("0.5x", timed=True).of(0.03) == 0.015
    assert Amount.parse("1.2M").of(7) == 1_200_000
    assert Amount.parse("12ms", timed=True).of(7.0) == Amount.parse("0.012 s", timed=True).of(7.0) == 0.012
    assert format_amount(1_234_567, "FLOPs per token") == "1.235M FLOPs per token"
    assert format_amount(0.01234, "s") == "12.3 ms"


@pytest.mark.parametrize("value", ["100%", "50%x", "50% x", 1, 0, "-3", "soon", None, True, "12ms"])
def test_what_is_no_amount_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match=r"is no size to reach: write a ratio such as 50% or 0\.5x"):
        Amount.parse(value)


@pytest.mark.parametrize("value", ["1x", "50%x", 12, "12", "0ms", "12 min", None])
def test_what_is_no_latency_is_refused(value: object) -> None:
    with pytest.raises(
        ValueError, match=r"is no latency to reach: write a ratio such as 50% or 0\.5x, or a time such as"
    ):
        Amount.parse(value, timed=True)
