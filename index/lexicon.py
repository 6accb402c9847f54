"""Curated word lists behind the token classes: short, closed classes where one word changes the answer.

Every list is data, read once at import. `index.tokens.RULES_VERSION` must rise when a list changes, since signatures
computed before the change no longer compare with new ones.
"""

from __future__ import annotations

ANTONYMS: tuple[tuple[str, str], ...] = (
    ("on", "off"),
    (
        "enable enables enabled enabling activate activated activating",
        "disable disables disabled disabling deactivate deactivated deactivating",
    ),
    (
        "increase increases increased increasing raise raised raising gain",
        "decrease decreases decreased decreasing reduce reduces reduced reducing lower lowering lowered lose",
    ),
    ("before prior", "after following"),
    ("buy buys buying bought purchase purchased purchasing", "sell sells selling sold"),
    ("open opens opened opening reopen", "close closes closed closing shut"),
    ("min minimum minimal", "max maximum maximal"),
    ("first earliest", "last latest"),
    ("import imports imported importing", "export exports exported exporting"),
    (
        "encrypt encrypts encrypted encrypting encryption encode encoding encoded",
        "decrypt decrypts decrypted decrypting decryption decode decoding decoded",
    ),
    (
        "add adds added adding insert inserting install installs installed installing",
        "remove removes removed removing delete deletes deleted deleting uninstall uninstalled uninstalling",
    ),
    (
        "start starts started starting begin begins beginning launch",
        "stop stops stopped stopping end ends ending terminate",
    ),
    ("up upward upwards", "down downward downwards"),
    ("in inside indoor indoors inbound incoming", "out outside outdoor outdoors outbound outgoing"),
    ("upload uploads uploaded uploading", "download downloads downloaded downloading"),
    ("push", "pull"),
    ("send sends sent sending", "receive receives received receiving"),
    ("deposit deposits deposited depositing", "withdraw withdraws withdrew withdrawing withdrawal withdrawn"),
    ("lock locks locked locking", "unlock unlocks unlocked unlocking"),
    ("login logging-in signin sign-in", "logout sign-out signout"),
    (
        "accept accepts accepted accepting approve approved approving",
        "reject rejects rejected rejecting decline declined declining deny denied refuse refused",
    ),
    (
        "allow allows allowed allowing permit permitted",
        "forbid forbids forbidden prohibit prohibited block blocks blocked blocking ban banned",
    ),
    ("create creates created creating build make", "destroy destroys destroyed destroying drop"),
    ("connect connects connected connecting", "disconnect disconnects disconnected disconnecting"),
    ("include includes included including", "exclude excludes excluded excluding except"),
    ("high higher highest", "low lowest"),
    ("large larger largest big bigger biggest", "small smaller smallest little"),
    ("long longer longest", "short shorter shortest"),
    ("fast faster fastest quick quicker quickest", "slow slower slowest"),
    ("more greater", "less fewer"),
    ("most", "least fewest"),
    ("best better", "worst worse"),
    ("good", "bad"),
    ("cheap cheaper cheapest inexpensive", "expensive dear dearest costliest priciest"),
    ("hot hotter hottest warm", "cold colder coldest cool"),
    ("old older oldest", "new newer newest young younger youngest"),
    ("early earlier", "late later"),
    ("left", "right"),
    ("top above over", "bottom below under beneath"),
    ("north northern", "south southern"),
    ("east eastern", "west western"),
    (
        "male man men boy boys husband father son brother him his he",
        "female woman women girl girls wife mother daughter sister her she",
    ),
    (
        "positive pros advantage advantages benefit benefits",
        "negative cons disadvantage disadvantages drawback drawbacks",
    ),
    ("legal lawful", "illegal unlawful"),
    ("safe safely secure", "dangerous unsafe unsecure insecure"),
    ("true", "false"),
    ("public", "private"),
    ("internal domestic", "external international foreign"),
    ("input inputs", "output outputs"),
    ("read reads reading", "write writes writing written"),
    ("employer", "employee"),
    ("lend lends lending lent", "borrow borrows borrowing borrowed"),
    ("win wins winning won", "lost losing"),
    ("ascending", "descending"),
    ("horizontal horizontally", "vertical vertically"),
    (
        "arrive arrives arriving arrival arrivals arrived land landing",
        "depart departs departing departure departures departed leave leaves leaving",
    ),
    ("love loves", "hate hates"),
    ("hire hires hiring hired", "fire fires firing fired"),
    ("pass passed passing", "fail fails failed failing"),
    ("same similar alike", "different difference differ"),
    ("always", "sometimes rarely"),
    ("all every", "some"),
    ("morning", "evening"),
    ("spicy", "mild"),
)
"""At most 64 pairs: the index of a pair is its bit in the two antonym masks."""

NEGATIONS = frozenset(
    """not no never none neither nor nothing nobody nowhere without cannot cant dont doesnt didnt isnt arent wasnt
    werent wont wouldnt couldnt shouldnt hasnt havent hadnt aint hardly barely unable unavailable unlikely impossible
    invalid incorrect inactive incomplete untrue unused unpaid unwanted unnecessary unsupported unauthorised
    unauthorized unsuccessful non nicht kein keine keinen keiner keinem nie niemals ohne nunca jamás tampoco pas jamais
    sans не нет без никогда 不 没 沒 无 無 别 別""".split()
)

QUESTION_WORDS: dict[str, str] = {
    "who": "who", "whom": "who", "whose": "who", "what": "what", "when": "when", "where": "where", "why": "why",
    "how": "how", "which": "which", "whats": "what", "whos": "who", "wheres": "where", "hows": "how", "whys": "why",
    "what's": "what", "who's": "who", "where's": "where", "when's": "when", "why's": "why", "how's": "how",
}  # fmt: skip
YES_NO = frozenset(
    "is are was were am do does did can could should would will shall may might has have had must isn't aren't "
    "wasn't don't doesn't didn't can't couldn't shouldn't wouldn't won't".split()
)
HOW_KINDS: dict[str, str] = {
    "many": "how_many", "much": "how_much", "long": "how_long", "often": "how_often", "far": "how_far",
    "old": "how_old", "big": "how_big", "tall": "how_big", "high": "how_big", "large": "how_big",
    "expensive": "how_much", "soon": "how_long",
}  # fmt: skip
QUESTIONS = (
    "none", "who", "when", "where", "why", "how_many", "how_much", "how_long", "how_often", "how_far", "how_old",
    "how_big", "what", "which", "how", "yes_no",
)  # fmt: skip
"""Classes 1..11 ask for one kind of fact and exclude each other; 12..15 are wordings that often mean the same."""

POSSESSIVES: dict[str, int] = {"my": 1, "mine": 1, "your": 2, "yours": 2, "our": 4, "ours": 4}

NUMBER_WORDS: dict[str, int] = {
    "zero": 0, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9,
    "ten": 10, "eleven": 11, "twelve": 12, "thirteen": 13, "fourteen": 14, "fifteen": 15, "sixteen": 16,
    "seventeen": 17, "eighteen": 18, "nineteen": 19, "twenty": 20, "thirty": 30, "forty": 40, "fifty": 50,
    "sixty": 60, "seventy": 70, "eighty": 80, "ninety": 90, "dozen": 12, "twice": 2, "double": 2, "triple": 3,
}  # fmt: skip
MULTIPLIERS: dict[str, int] = {
    "hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12, "lakh": 10**5,
    "lakhs": 10**5, "crore": 10**7, "crores": 10**7, "hundreds": 100, "thousands": 1000, "millions": 10**6,
}  # fmt: skip
ORDINALS: dict[str, int] = {
    "first": 1, "second": 2, "third": 3, "fourth": 4, "fifth": 5, "sixth": 6, "seventh": 7, "eighth": 8, "ninth": 9,
    "tenth": 10, "eleventh": 11, "twelfth": 12, "thirteenth": 13, "fifteenth": 15, "twentieth": 20, "thirtieth": 30,
}  # fmt: skip
PRONOUN_ONE = frozenset("this that which no any every some the each other another new old no-one someone only".split())

UNITS: dict[str, str] = {
    form: forms.split()[0]
    for forms in (
        "km kilometer kilometers kilometre kilometres kms",
        "m meter meters metre metres",
        "cm centimeter centimeters centimetre centimetres",
        "mm millimeter millimeters",
        "mile miles mi",
        "ft foot feet",
        "inch inches in",
        "yard yards yd",
        "kg kilo kilos kilogram kilograms kgs",
        "g gram grams",
        "mg milligram milligrams",
        "lb lbs pound pounds",
        "oz ounce ounces",
        "ton tons tonne tonnes",
        "l liter liters litre litres",
        "ml milliliter milliliters",
        "gallon gallons gal",
        "cup cups",
        "ms millisecond milliseconds",
        "sec s second seconds secs",
        "minute minutes min mins",
        "hour hours hr hrs h",
        "day days",
        "week weeks wk",
        "month months",
        "year years yr yrs",
        "kb kib",
        "mb mib",
        "gb gib gig gigs gigabyte gigabytes",
        "tb tib terabyte terabytes",
        "bit bits",
        "byte bytes",
        "c celsius",
        "f fahrenheit",
        "mph",
        "kmh kph",
        "w watt watts",
        "kw kilowatt kilowatts",
        "kwh",
        "v volt volts",
        "hz",
        "mhz",
        "ghz",
        "px pixel pixels",
        "percent percentage pct",
        "x times",
        "k",
        "mp",
        "gbps",
        "mbps",
    )
    for form in forms.split()
}
CURRENCIES: dict[str, str] = {
    form: forms.split()[0]
    for forms in (
        "usd dollar dollars $ bucks",
        "eur euro euros €",
        "gbp sterling £ quid",
        "jpy yen ¥",
        "inr rupee rupees rs ₹",
        "cny yuan rmb",
        "chf",
        "aud",
        "cad",
        "krw won_ ₩",
        "rub ruble rubles ₽",
        "btc bitcoin bitcoins",
        "eth",
        "cent cents",
    )
    for form in forms.split()
}
DATES: dict[str, str] = {
    form: forms.split()[0]
    for forms in (
        "january jan", "february feb", "april apr", "june jun", "july jul", "august aug", "september sep sept",
        "october oct", "november nov", "december dec", "monday mondays", "tuesday tuesdays", "wednesday wednesdays",
        "thursday thursdays", "friday fridays", "saturday saturdays", "sunday sundays", "today", "tomorrow",
        "yesterday", "tonight", "morning mornings", "afternoon afternoons", "evening evenings", "night nights", "noon",
        "midnight", "weekday weekdays", "weekend weekends", "daily", "weekly", "monthly", "yearly annual annually",
        "hourly", "quarterly", "spring", "summer", "winter", "autumn", "christmas", "easter", "am a.m", "pm p.m",
        "decade", "century",
    )
    for form in forms.split()
}  # fmt: skip
DATES_WHEN_CAPITAL = {"may": "may", "march": "march"}

STOPWORDS = frozenset(
    """a an the of in on at by for with to from as and or but if then so than that this these those there here it its
    it's i i'm i've i'd i'll me my mine myself we us our ours you your yours he she him her his hers they them their is
    are was were be been being am do does did doing done can could should would will shall may might must has have had
    having not no what when where who whom whose which why how whats what's who's where's how's about into onto over
    under up down out off per via please tell show give list find get got want wants need needs like know let lets let's
    help explain describe much many any some all each every both other another such just only also too very really
    actually ever even still yet already again now well ok okay hi hello hey thanks thank kindly dear sir go going way
    ways thing things one ones someone something anyone anything possible able exactly able would like could you
    don't doesn't didn't isn't aren't can't won't between because while during whether according available there's
    that's you're i'd we're they're make makes making made use using used take taking work works working mean means
    der die das ein eine und ist von zu im den dem des mit auf für el la los las un una de del y es en que por para con
    le les une et est du des dans pour avec""".split()
)

TWO_WORD_HEADS = frozenset(
    "san new los las saint st fort ft north south east west salt santa el la palm long st. puerto costa sri hong "
    "united united saudi".split()
)

LANGUAGES: dict[str, int] = {
    word: code
    for code, words in (
        (1, "the is are what how why when where which does do can should my you and of to i for with"),
        (2, "der das und ist nicht ein eine wie wann warum welche wurde dem mit auf ich für von zur im"),
        (3, "el los las una qué cómo cuándo dónde cuál por para está del es fue que"),
        (4, "le les une est quel quelle comment pourquoi dans avec pour sont des je où quand été"),
        (5, "il che cosa perché sono della gli quale dove nel"),
        (6, "não uma são como onde quando você qual em foi dos"),
    )
    for word in words.split()
}
