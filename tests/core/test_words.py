"""What a prompt shows to a reader of patterns: persons by what their data looks like, and questions about now."""

from __future__ import annotations

from datetime import date

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.core.words import is_card, is_iban, read_prompt

TODAY = date(2026, 11, 30)
SENTENCES = ["{}", "Call me, it is {} if you need it.", "Is {} valid?", "Bitte prüfe {} für mich", "what about {}"]


def luhn(digits: str) -> str:
    return next(digits + str(last) for last in range(10) if is_card(digits + str(last)))


def iban(country: str, account: str) -> str:
    rest = "".join(str(int(sign, 36)) for sign in account + country + "00")
    made = f"{country}{98 - int(rest) % 97:02d}{account}"
    assert is_iban(made)
    return made


def digits(count: int) -> st.SearchStrategy[str]:
    return st.text("0123456789", min_size=count, max_size=count)


def grouped(text: str, sign: str) -> str:
    return sign.join(text[i : i + 4] for i in range(0, len(text), 4))


cards = st.builds(
    lambda lead, rest, sign: grouped(luhn(lead + rest), sign),
    st.sampled_from(["4", "51", "34", "6011"]),
    digits(11),
    st.sampled_from(["", " ", "-"]),
)
ibans = st.one_of(
    st.builds(lambda n, sign: grouped(iban("DE", n), sign), digits(18), st.sampled_from(["", " "])),
    st.builds(lambda n: iban("FR", n), digits(23)),
    st.builds(lambda n: iban("ES", n), digits(20)),
    st.builds(lambda n: iban("GB", "WEST" + n), digits(14)),
)
phones = st.one_of(
    st.builds("+49 {} {}".format, st.sampled_from(["171", "30", "89"]), digits(7)),
    st.builds("+1-212-{}-{}".format, digits(3), digits(4)),
    st.builds("(030) {}".format, digits(6)),
    st.builds("212-{}-{}".format, digits(3), digits(4)),
    st.builds("0171 {}".format, digits(7)),
    st.builds(lambda n: "06 " + " ".join(n[i : i + 2] for i in (0, 2, 4, 6)), digits(8)),
    st.builds("612 {} {}".format, digits(3), digits(3)),
)
mails = st.builds(
    "{}@{}.{}".format,
    st.text("abcdefghijklmnopqrstuvwxyz.+-", min_size=1, max_size=20).filter(lambda s: s[0].isalpha()),
    st.text("abcdefghijklmnopqrstuvwxyz", min_size=2, max_size=10),
    st.sampled_from(["com", "de", "co.uk"]),
)
ids = st.one_of(
    st.builds(lambda n: f"{n:08d}{'TRWAGMYFPDXBNJZSQVHLCKE'[n % 23]}", st.integers(0, 99_999_999)),
    st.builds(lambda n: f"X{n:07d}{'TRWAGMYFPDXBNJZSQVHLCKE'[n % 23]}", st.integers(0, 9_999_999)),
    st.builds(
        lambda sex, year, month, rest: f"{sex}{year}{month}{rest}{97 - int(f'{sex}{year}{month}{rest}') % 97:02d}",
        st.sampled_from("12"),
        digits(2),
        st.sampled_from(["01", "07", "12"]),
        digits(8),
    ),
    st.builds("078-{:02d}-{:04d}".format, st.integers(1, 99), st.integers(1, 9999)),
    st.builds("AB {}C".format, st.integers(100_000, 999_999)),
)
references = st.builds(
    "{} {}".format,
    st.sampled_from(
        ["customer", "order number", "my account no.", "invoice #", "booking id:", "Kundennummer", "Bestellnr.",
         "pedido", "commande n°", "policy number is", "patient"]
    ),
    st.integers(100_000, 99_999_999),
)  # fmt: skip


@given(st.one_of(cards, ibans, phones, mails, ids, references), st.sampled_from(SENTENCES))
def test_what_looks_like_personal_data_is_found(data: str, sentence: str) -> None:
    assert read_prompt(sentence.format(data), TODAY).personal


@pytest.mark.parametrize(
    "text",
    [
        "Why does ruff complain about my order of imports?",
        "What is wrong with my account model in Django?",
        "What does error 0x80070005 mean on Windows?",
        "What is 482913 plus 17?",
        "Why is this slow: SELECT * FROM t WHERE id=1234567",
        "I want to cancel my bank account, what are the steps?",
        "How can I track my parcel?",
        "Where do I see where my shipment is?",
        "Can you tell me where to see my account's IBAN?",
        "I sent my parcel back, when will the money arrive?",
        "Wie kündige ich mein Konto?",
        "¿Cómo cancelo mi pedido?",
        "Comment annuler ma commande ?",
        "Is 1700000000000 a timestamp in milliseconds?",
        "Sum up 100 200 300 and 400",
        "What is port 8080 used for, and 65535?",
        "Convert 1234567 bytes to megabytes",
        "Which primes are below 1000003?",
        "RFC 2616 or 9110, which one holds?",
        "The commit is 1234567890abcdef, how do I revert it?",
        "Is 2026-11-30T10:00:00Z a valid time?",
        "What does HTTP 404 mean in order 66?",
        "pi is 3.14159265358979, give me ten more digits",
        "Does version 10.0.19041.1234 support it?",
        "Set max_order_id=4000000 in the config",
        "Convert #336699 to RGB values",
        "Is 1234 5678 9012 3456 a valid card number?",
    ],
)
def test_innocent_numbers_and_words_are_not_personal(text: str) -> None:
    assert not read_prompt(text, TODAY).personal


@given(st.integers(0, 10**15), st.sampled_from(["What is {} plus 17?", "Is {} a prime number?", "x = {}; why?"]))
def test_a_number_alone_names_nobody(number: int, sentence: str) -> None:
    if not is_card(str(number)):
        assert not read_prompt(sentence.format(f"{number:,}"), TODAY).personal


@pytest.mark.parametrize(
    "text",
    [
        "Where is my order?", "Why is my last invoice so high?", "Has my parcel arrived yet?",
        "When does my refund come?", "Please show me my orders", "Can you check my booking?",
        "Wo ist meine Bestellung?", "Wie hoch ist mein Kontostand?",
        "¿Dónde está mi pedido?", "Où est ma commande ?", "my balance is wrong",
    ],
)  # fmt: skip
def test_a_question_after_the_state_of_what_is_ones_own_stays_personal(text: str) -> None:
    assert read_prompt(text, TODAY).personal


@pytest.mark.parametrize(
    "text",
    [
        "What is the weather today?", "what's the temperature in Paris", "Who is the current president?",
        "What is the price of gold?", "Which team won last week?", "Was kostet das jetzt?", "Qué tiempo hace hoy",
        "Quel temps fait-il aujourd'hui ?", "Was ist der Preis von Bitcoin?", "¿Cuál es el precio actual?",
        "Qui est le président actuel ?", "What is the latest commit on main right now?", "what's on the news",
        "how is my current account doing today",
    ],
)  # fmt: skip
def test_what_depends_on_now_is_found(text: str) -> None:
    assert read_prompt(text, TODAY).time


@pytest.mark.parametrize(
    "text",
    [
        "How much cash can I take out per day?", "How long does it take?",
        "Is there a limit on withdrawals in one day?",
        "How do I close my current account?", "I entered the wrong PIN three times, what now?",
        "Do you match prices of competitors?", "Is there a price match guarantee?", "Is VAT included in the price?",
        "Will you match a lower price from another shop?", "revert my most recent commit without losing work",
        "From what temperature is it a fever?", "At what temperature should I wash wool?",
        "What is the temperature of the sun?", "What is the actual difference between TCP and UDP?",
        "Wie komme ich von hier zum Bahnhof?", "Does the update contain breaking changes?",
        "How do I print the current directory in bash?", "Do you offer next-day delivery?",
    ],
)  # fmt: skip
def test_what_holds_at_any_time_is_not_about_now(text: str) -> None:
    assert not read_prompt(text, TODAY).time


def test_two_words_that_name_something_are_enough() -> None:
    for text in ("refund policy", "longest river", "vpn meaning", "Rückgabe Frist"):
        assert read_prompt(text, TODAY).words >= 3
    for text in ("hello there", "go on", "thanks team", "more details", "guten tag", "x y"):
        assert read_prompt(text, TODAY).words < 3
