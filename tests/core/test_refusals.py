"""Refusals in plain words as models word them, and answers that only begin like one; both written down by hand."""

from __future__ import annotations

import pytest

from proxy.core.refusals import LIMIT_CHARS, is_refusal

REFUSALS = [
    "I'm sorry, but I can't assist with that.",
    "I\u2019m sorry, but I can\u2019t assist with that request.",
    "I'm sorry, I can't help with that.",
    "Sorry, I can't help with that.",
    "I cannot assist with that request.",
    "I can't help with that.",
    "I can't help you with that.",
    "I cannot fulfill this request. I am programmed to be a helpful and harmless AI assistant.",
    "I cannot provide instructions on how to make a weapon.",
    "I can't provide information or guidance on illegal or harmful activities.",
    "I cannot create content that promotes hate speech. Can I help you with something else?",
    "I cannot generate explicit content.",
    "I apologize, but I cannot assist with creating malware.",
    "I'm unable to assist with that request.",
    "I am unable to help with this.",
    "I'm not able to help with that.",
    "As an AI language model, I cannot engage in illegal activities.",
    "Unfortunately, I cannot comply with this request.",
    "I won't help with that.",
    "I must decline to answer that.",
    "I'd rather not discuss that.",
    "I'm not comfortable providing that.",
    "This is not something I can help with.",
    "Es tut mir leid, aber dabei kann ich Ihnen nicht helfen.",
    "Es tut mir leid, aber ich kann Ihnen bei dieser Anfrage nicht helfen.",
    "Tut mir leid, das kann ich nicht tun.",
    "Leider kann ich dir dabei nicht helfen.",
    "Dabei kann ich nicht helfen.",
    "Je suis désolé, mais je ne peux pas vous aider avec cela.",
    "Désolé, je ne peux pas répondre à cette demande.",
    "Je ne peux pas vous aider à ce sujet.",
    "Lo siento, pero no puedo ayudarte con eso.",
    "Lo siento, no puedo cumplir con esa solicitud.",
    "No puedo ayudarte con eso.",
    "Mi dispiace, ma non posso aiutarti con questa richiesta.",
    "Purtroppo non posso fornire queste informazioni.",
    "Non posso aiutarti con questo.",
]
ANSWERS = [
    "Lyon lies on the Rhône.",
    "I can't help falling in love with you is a line of a song by Elvis Presley.",
    "I cannot tell you exactly, yet most estimates say about 8 million.",
    "Sorry is a word of Germanic origin.",
    "I'm sorry to hear that. A cold usually passes within a week.",
    "I'm sorry, but I can't open links. However, from its name the page is about bread.",
    "Unfortunately, the Library of Alexandria was lost.",
    "I can do that: 12 times 12 is 144.",
    "I'm unable to assist with that in one line. Here is the whole function:\n\n```python\npass\n```",
    "I can't provide a single number, but I can give you a range: 3 to 5.",
    "As an AI, I do not have feelings, yet I can explain what joy is.",
    "You cannot divide by zero.",
    "I cannot provide legal advice, but here are the steps people usually take:\n1. Read the contract.",
    "Leider regnet es morgen in Wien.",
    "Es tut mir leid zu hören, dass du krank bist. Trink viel Tee.",
    "Je suis désolé que vous soyez malade. Reposez-vous.",
    "Malheureusement, il pleut à Paris.",
    "Lo siento mucho por tu pérdida. El duelo lleva tiempo.",
    "No puedo es una forma del verbo poder.",
    "Mi dispiace per la tua perdita.",
    "Purtroppo oggi piove a Roma.",
    "Leider kann ich morgen nicht kommen.",
    "Lo siento, no puedo ir mañana.",
    "I cannot give a better example than this one.",
    "No.",
    "",
]


@pytest.mark.parametrize("text", REFUSALS)
def test_a_refusal_is_known(text: str) -> None:
    assert is_refusal(text)
    assert is_refusal(f"  {text}\n")


@pytest.mark.parametrize("text", ANSWERS)
def test_an_answer_is_none(text: str) -> None:
    assert not is_refusal(text)


def test_a_long_text_is_an_answer() -> None:
    assert not is_refusal("I'm sorry, but I can't assist with that. " + "x" * LIMIT_CHARS)


@pytest.mark.parametrize("text", ["sorry, " * 80, "i'm sorry but " * 40, "leider " * 80, "désolé, " * 70])
def test_an_apology_over_and_over_is_read_to_its_end_and_refuses_nothing(text: str) -> None:
    assert not is_refusal(text[:LIMIT_CHARS])
