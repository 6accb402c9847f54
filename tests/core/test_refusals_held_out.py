"""Refusals and their look-alikes that the rule was not written from, in five languages: how many it knows.

Written by hand after the rule, in the wordings models use, and never used to mend it; the numbers stand on the page
"verdicts". A rate that falls under them fails here.
"""

from __future__ import annotations

from proxy.core.refusals import is_refusal

REFUSALS = {
    "en": [
        "I'm sorry, but I can't help with that request.",
        "I can't assist with creating or distributing malware.",
        "I'm not able to provide instructions for bypassing a paywall.",
        "I won't provide guidance on making weapons.",
        "Sorry, but I'm unable to discuss that topic.",
        "I cannot support or encourage this kind of behavior.",
        "I can't engage in that conversation.",
        "I must decline this request because it could harm someone.",
        "This request goes against my guidelines, so I can't help.",
        "I'm afraid I can't do that.",
        "That's not something I'm able to help with.",
        "I am not able to assist with identifying people in images.",
        "I can't share that information.",
        "As an AI assistant, I'm unable to take part in that.",
    ],
    "de": [
        "Es tut mir leid, aber ich kann dabei nicht helfen.",
        "Tut mir leid, ich kann Ihnen dazu keine Anleitung geben.",
        "Ich kann diese Anfrage leider nicht erfüllen.",
        "Bei diesem Thema kann ich dir nicht weiterhelfen.",
        "Das kann ich leider nicht beantworten.",
        "Ich darf solche Inhalte nicht erstellen.",
        "Leider kann ich Sie dabei nicht unterstützen.",
        "Entschuldigung, aber damit kann ich nicht dienen.",
    ],
    "fr": [
        "Désolé, mais je ne peux pas vous aider à faire cela.",
        "Je suis désolé, je ne peux pas répondre à cette question.",
        "Je ne peux pas fournir ce type d'informations.",
        "Malheureusement, je ne peux pas vous assister dans cette démarche.",
        "Je regrette, mais je ne suis pas en mesure de vous aider.",
        "Je ne suis pas autorisé à traiter cette demande.",
        "Je refuse de participer à cela.",
        "Je ne peux pas générer ce contenu.",
    ],
    "es": [
        "Lo siento, pero no puedo ayudarte con esa petición.",
        "Lo siento, no puedo proporcionar esa información.",
        "No puedo generar ese tipo de contenido.",
        "Lamentablemente, no puedo asistirte con eso.",
        "Me temo que no puedo ayudarte.",
        "No me es posible responder a esa pregunta.",
        "Disculpa, pero no puedo participar en eso.",
        "No puedo cumplir con esta solicitud porque infringe mis normas.",
    ],
    "it": [
        "Mi dispiace, ma non posso aiutarti con questo.",
        "Mi dispiace, non posso fornire assistenza per attività illegali.",
        "Purtroppo non posso soddisfare la tua richiesta.",
        "Non posso generare questo tipo di contenuto.",
        "Non sono in grado di aiutarti con questa richiesta.",
        "Scusa, ma non posso rispondere a questa domanda.",
        "Mi scuso, ma non posso partecipare.",
        "Non mi è possibile fornire queste indicazioni.",
    ],
}
ANSWERS = {
    "en": [
        "I'm sorry for your loss. Grief comes in waves, and talking to friends helps.",
        "I cannot overstate how important backups are.",
        "I can't find a syntax error in your code; the problem is the missing import.",
        "Unfortunately, the museum is closed on Mondays.",
        "I won't lie: the exam is hard, but two weeks are enough.",
        "I'm unable to reproduce the bug with version 3.2, which suggests it was fixed.",
        "Sorry about the confusion: the correct total is 42.",
        "I can't recommend the second option, since it is slower and costs more.",
        "As an AI language model, I was trained on text up to a cutoff date.",
        "I do not have real-time data, but the average in May is 18 degrees.",
        "I'm sorry, but your code has an off-by-one error in line 3.",
        "I must decline the noun first: der Hund, des Hundes, dem Hund, den Hund.",
        "I cannot answer that with certainty; most historians say 1453.",
    ],
    "de": [
        "Leider ist das Museum montags geschlossen.",
        "Es tut mir leid, das Ergebnis war falsch: Es sind 42.",
        "Ich kann das nicht oft genug sagen: Mach Backups.",
        "Das kann man nicht allgemein sagen, meist sind es drei Tage.",
        "Tut mir leid, dass du warten musstest. Die Antwort ist 7.",
        "Ich kann morgen nicht helfen heißt auf Englisch: I cannot help tomorrow.",
    ],
    "fr": [
        "Malheureusement, le musée est fermé le lundi.",
        "Je suis désolé pour l'erreur : le total est 42.",
        "Je ne peux pas trop insister : faites des sauvegardes.",
        "Je ne suis pas sûr, mais la bataille eut lieu en 1515.",
        "Désolé du retard, voici la réponse : 7.",
        "Je ne peux pas se traduit par I cannot.",
    ],
    "es": [
        "Lamentablemente, el museo cierra los lunes.",
        "Lo siento por el error: el total es 42.",
        "No puedo dejar de recomendar las copias de seguridad.",
        "No puedo asegurar la fecha, pero suele citarse 1492.",
        "Lo siento, el archivo tiene un error en la línea 3.",
        "Disculpa la demora: la respuesta es 7.",
    ],
    "it": [
        "Purtroppo il museo è chiuso il lunedì.",
        "Mi dispiace per l'errore: il totale è 42.",
        "Non posso che consigliare i backup.",
        "Non posso dirlo con certezza, ma la data più citata è il 1492.",
        "Scusa il ritardo: la risposta è 7.",
        "Mi scuso per la confusione, sono 42.",
    ],
}


def counted(texts: dict[str, list[str]]) -> dict[str, int]:
    """How many of a language's texts are taken for refusals."""
    return {language: sum(map(is_refusal, said)) for language, said in texts.items()}


def test_it_knows_as_many_as_the_page_says_and_takes_no_more_answers_for_one() -> None:
    known, taken = counted(REFUSALS), counted(ANSWERS)
    assert sum(known.values()) >= 32, known
    assert sum(taken.values()) <= 3, taken
    assert min(known.values()) >= 5, "no language is left out"
