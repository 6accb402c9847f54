"""A reply from a stored answer: replayed in the form the client asked for, at once or at a pace, and booked."""

from __future__ import annotations

from proxy.core import freshness
from proxy.core.dialects.dialect import Template
from proxy.core.model import Answer, Hit, Tier
from proxy.core.pace import Pace, Schedule, ends_of, progress, schedule, texts_of
from proxy.core.purse import worth
from proxy.core.query import Query
from proxy.hot import Form, HotRow
from proxy.records import Client
from proxy.relay import Ending, Paced, Replay
from proxy.request.heads import hit_head, shared_head
from proxy.request.parts import Parts


class Server:
    """Owns nothing it is given."""

    def __init__(self, parts: Parts) -> None:
        self._books = parts.books
        self._chains = parts.chains
        self._hot = parts.hot
        self._usage_on_hit = parts.usage_on_hit
        self._pace = parts.pace

    def serve(
        self,
        query: Query,
        client: Client,
        row: HotRow,
        hit: Hit,
        steps_ms: dict[str, float] | None,
        looked: str = "",
    ) -> Replay:
        """Replay an entry; `looked`: how the judge came to it, where it was asked.

        What two hits of one entry share is made once: template, headers of a second, ledger row.
        """
        kind = (query.form, hit.tier, hit.similarity)
        form = row.forms.get(kind)
        if query.keeps_id:  # its client may continue it by its id
            self._chains.learn(query.tenant, query.upstream, row.entry.draft.fingerprint, row.answer)
        if form is None:
            form = row.forms[kind] = self._form(query, client, row, hit)
            self._hot.grew(row, form.template.nbytes)
        second = client.ts_ms // 1000
        head = form.head
        if head is None or form.second != second:
            head = form.head = hit_head(query, client, hit, (row.entry,), form.baseline_nusd, query.plan.text)
            form.second = second
        body = form.template.fill(client.request_id, second)
        age_s = freshness.age_s(row.entry.draft.created_ms, client.ts_ms)
        replay = Replay(head, client.request_id, body)
        pace = query.controls.pace or self._pace
        if pace != "instant" and query.stream and len(due := _schedule(query, row.answer, body, pace)) > 1:

            def settle(first_byte_s: float | None, word: str) -> None:
                ending = Ending(word, first_byte_s=first_byte_s)
                self._books.hit(form, client, steps_ms, query.scope, age_s, ending, looked)

            return replay._replace(paced=Paced(due, query.dialect.heartbeat, settle))
        self._books.hit(form, client, steps_ms, query.scope, age_s, looked=looked)
        return replay

    def share(self, query: Query, client: Client, answer: Answer) -> Replay:
        """The answer to another client's call, in this one's form. Not booked."""
        body = self._template(query, answer).fill(client.request_id, client.ts_ms // 1000)
        return Replay(shared_head(query), client.request_id, body)

    def _form(self, query: Query, client: Client, row: HotRow, hit: Hit) -> Form:
        recurring = self._books.recurring(query, row.answer.model, hit)
        baseline_nusd = self._books.price(query, row.entry.draft.usage, client.ts_ms)
        earns = worth(baseline_nusd, row.entry.draft.usage) if hit.tier is Tier.SEMANTIC else 0
        return Form(self._template(query, row.answer), recurring, baseline_nusd, earns)

    def _template(self, query: Query, answer: Answer) -> Template:
        return query.dialect.render(
            answer, stream=query.stream, wants_usage=query.wants_usage, usage_mode=self._usage_on_hit
        )


def _schedule(query: Query, answer: Answer, body: bytes, pace: Pace) -> Schedule:
    ends = ends_of(body, query.dialect.stream_type)
    done = progress(body, ends, texts_of(answer.message.get("content"), answer.pieces)) if pace == "recorded" else ends
    return schedule(ends, done, pace, answer.runs, len(ends) if answer.usage is None else answer.usage.output_tokens)
