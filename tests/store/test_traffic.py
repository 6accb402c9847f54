"""What the rows still tell of what was asked."""

from __future__ import annotations

from proxy.store.traffic import read_traffic
from tests.rows import NOW, call, draft, hit, outcome
from tests.store.test_comparisons import comparison


async def test_a_question_costs_what_it_would_have_without_ibid_and_an_audited_one_what_its_audit_did(store):
    for name in ("asked", "audited", "unbooked"):
        await store.entries.put(draft(name), NOW)
    store.ledger.record(outcome("r-asked"))
    audit = call("again", purpose="audit")
    store.ledger.record(outcome("r-audited", cache_status="AUDIT", calls=(audit,), usage=None))
    store.ledger.record(hit("later", "cache.semantic"))
    await store.ledger.flush()
    traffic = await read_traffic(store.database, namespace=None, limit=10)
    assert [(q.prompt, q.price_nusd) for q in traffic.questions] == [
        ("question asked", 180_000), ("question audited", 180_000), ("question unbooked", 0),
    ]  # fmt: skip
    assert (traffic.requests, traffic.semantic_hits) == (2, 1)


async def test_the_newest_questions_come_oldest_first_with_the_groups_they_joined_or_differ_from(store):
    first, second, third = [(await store.entries.put(draft(name), NOW)).entry for name in "abc"]
    store.comparisons.record(comparison("b", fingerprint=second.draft.fingerprint), second.id, first.id)
    other = comparison("c", fingerprint=third.draft.fingerprint, group_id=first.id, p_same=0.1)
    store.comparisons.record(other, third.id, third.id)
    await store.comparisons.flush()
    traffic = await read_traffic(store.database, namespace="", limit=2)
    assert [(q.entry_id, q.group_id) for q in traffic.questions] == [(second.id, first.id), (third.id, third.id)]
    assert traffic.differing == {(third.id, first.id)}
    assert (await read_traffic(store.database, namespace="other", limit=9)).questions == []
