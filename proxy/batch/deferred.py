"""Plain calls that are answered later: `Prefer: respond-async` (RFC 7240 §4.1).

The answer is worked out in the background, as if the client had waited. A client that can wait an hour or more lets its
call go through its provider's batch API, together with others of its own: a batch is handed in when there are
COLLECT_LINES of them, when the first has waited `collect_s`, or in time for the nearest deadline.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import orjson

from proxy.batch.engine import Engine
from proxy.batch.files import FileWriter
from proxy.batch.headers import RawHeaders, has_credentials, joined, kept, of_lines
from proxy.batch.lines import Answered, new_id, refusal
from proxy.batch.offers import is_batchable
from proxy.batch.workshop import new_name
from proxy.core.batches import BatchFile, Deferred, Job, read_reply, spell_reply
from proxy.core.dialects.routes import without_key
from proxy.core.errors import BadRequest, CacheFault, IbidError, UpstreamError
from proxy.core.plan import DEFER_FROM_S
from proxy.core.query import Query
from proxy.records import Client
from proxy.relay import Head, Replay
from proxy.tasks import Tasks

log = logging.getLogger(__name__)

COLLECT_LINES = 1000
MARGIN_S = 600.0  # before a deadline: time to ask for what a batch did not bring
LEASE_MS = 1_200_000  # a call is another process's after that: longer than any answer may take
RETRY_AFTER_S = 2
LOOK_S = 0.5  # between two looks for an answer that a client waits for
WAIT_S = 600.0  # at most, for limits of a virtual key to let a call in: well within its lease

Reply = tuple[int, list[tuple[str, str]], bytes]


@dataclass(slots=True)
class _Group:
    """Calls that can go in one batch."""

    headers: RawHeaders
    path: str
    calls: list[Deferred] = field(default_factory=list)
    timer: asyncio.TimerHandle | None = None


class DeferredCalls:
    """Owner of what is under way; `stop` hands in what was collected."""

    def __init__(self, engine: Engine, tasks: Tasks, *, collect_s: float = 60.0, keep_s: float = 2_592_000.0) -> None:
        self._engine = engine
        self._shop = engine.shop
        self._tasks = tasks
        self._collect_s = collect_s
        self._keep_s = keep_s
        self._stopped = False
        self._under_way: set[str] = set()
        self._working: set[asyncio.Task[None]] = set()
        self._groups: dict[tuple[str, str, RawHeaders, str, str, str], _Group] = {}

    async def start(self) -> None:
        """Go on with what an earlier process left, where that needs nobody. Raises CacheFault."""
        for call in await self._shop.store.open_deferred():
            if not call.needs_owner and call.id not in self._under_way:
                await self._take_up(call, joined(call.headers, ()))

    async def accept(self, query: Query, path_qs: str, headers: Sequence[tuple[bytes, bytes]]) -> Deferred:
        """Write a call down and begin it. Raises CacheFault."""
        deadline_s = query.controls.deadline_s
        now_ms = self._shop.now_ms()
        shown, needs_owner = kept(headers)
        call = Deferred(
            id=new_name("def_"),
            tenant=query.tenant,
            path_qs=_without_credential(path_qs),
            headers=shown,
            needs_owner=needs_owner,
            body=query.body,
            created_ms=now_ms,
            deadline_ms=None if deadline_s is None else now_ms + int(deadline_s * 1000),
            expires_ms=now_ms + int(self._keep_s * 1000),
            key_id=query.key_id or "",
        )
        await self._shop.store.put_deferred(call, self._shop.worker, now_ms + LEASE_MS)
        self._begin(call, query, of_lines(headers))
        return call

    async def wait(self, query: Query, client: Client) -> Replay:
        """As `accept`, for a client that stays. Raises UpstreamError for an answer that is a refusal, CacheFault."""
        call = await self.accept(query, client.path_qs, client.headers)
        while True:
            reply = await self.reply(call.id, query.tenant, client.headers)
            if isinstance(reply, tuple):
                break
            await asyncio.sleep(LOOK_S)
        status, headers, body = reply
        if status != 200:
            raise _refused(status, body)
        kept = [line for line in headers if line[0].lower() not in ("x-request-id", "content-length")]
        return Replay(Head(kept, query.dialect.id_header), client.request_id, body)

    async def reply(self, call_id: str, tenant: str, headers: Sequence[tuple[bytes, bytes]]) -> Reply | Deferred | None:
        """The answer, the call while it is under way, or None for one that this tenant does not have."""
        store = self._shop.store
        call = await store.deferred(call_id, tenant)
        if call is None:
            return None
        if call.reply is not None:
            return read_reply(call.reply)
        if call.job_id and (result := await store.result(call.job_id, call.number)) is not None:
            return read_reply(result)
        job = await store.job(call.job_id, tenant) if call.job_id else None
        if job is not None and not job.is_ended:
            await self._engine.resume(job, headers)
        elif call.id not in self._under_way:
            await self._take_up(call, joined(call.headers, headers))
        return call

    def stop(self) -> None:
        """What was collected is written down already: the next process goes on with it."""
        for group in self._groups.values():
            if group.timer is not None:
                group.timer.cancel()
        self._groups.clear()
        self._stopped = True

    async def drained(self, within_s: float) -> None:
        """After `stop`: what was being asked has ended, and is written down."""
        if self._working:
            await asyncio.wait(self._working, timeout=within_s)

    @property
    def waiting(self) -> int:
        return len(self._under_way)

    # -- one call -------------------------------------------------------------------------------------------------

    async def _take_up(self, call: Deferred, headers: RawHeaders) -> None:
        """Begin a call that nobody works on any more, if whoever asks about it may send it."""
        if call.needs_owner and not has_credentials(headers):
            return
        now_ms = self._shop.now_ms()
        if not await self._shop.store.claim_deferred(call.id, self._shop.worker, now_ms, now_ms + LEASE_MS):
            return
        try:
            query = self._shop.read(call.path_qs, call.tenant, headers, call.body, call.key_id)
        except BadRequest as error:  # it was read once: the rules have changed since
            log.warning("a deferred call cannot be read any more", extra={"code": error.code})
            dialect = self._shop.dialect_of(call.path_qs)
            await self._settle(call, refusal(dialect, new_id(), error))
            return
        self._begin(call, query, headers)

    def _begin(self, call: Deferred, query: Query, headers: RawHeaders) -> None:
        self._under_way.add(call.id)
        try:
            task = self._tasks.spawn(self._work(call, query, headers), "deferred")
            self._working.add(task)
            task.add_done_callback(self._working.discard)
        except RuntimeError:  # closing
            self._under_way.discard(call.id)

    async def _work(self, call: Deferred, query: Query, headers: RawHeaders) -> None:
        collected = False
        try:
            collected = await self._collect_if_patient(call, query, headers)
            if not collected and (answered := await self._ask(call, query, headers)) is not None:
                await self._settle(call, answered)
        except CacheFault as fault:
            log.warning("a deferred call waits for the database", extra={"reason": fault.code})
        finally:
            if not collected:
                self._under_way.discard(call.id)

    async def _ask(self, call: Deferred, query: Query, headers: RawHeaders) -> Answered | None:
        """The answer, or what its key's limits have against it; None: the next process goes on with it."""
        lines = self._shop.lines
        deadline_s = None if call.deadline_ms is None else call.deadline_ms / 1000
        until_s = min(deadline_s or math.inf, lines.clock() + WAIT_S)

        def may_wait(_refused: BadRequest) -> bool:
            return not self._stopped and lines.clock() < until_s

        try:
            client, answered = await lines.let_in(query, call.path_qs, headers, may_wait)
        except BadRequest as refused:
            if refused.should_retry and self._stopped:
                return None
            return refusal(query.dialect, new_id(), refused)
        if answered is not None:
            return answered
        try:
            return await lines.ask(query, client, deadline_s)
        finally:
            lines.let_go(client)

    async def _settle(self, call: Deferred, answered: Answered) -> None:
        headers = [*answered.headers]
        if not any(name.lower() == "x-request-id" for name, _ in headers):
            headers.append(("x-request-id", answered.request_id))
        await self._shop.store.settle_deferred(call.id, spell_reply(answered.status, headers, answered.body))

    async def _collect_if_patient(self, call: Deferred, query: Query, headers: RawHeaders) -> bool:
        """Whether the call goes with a batch; one that the cache answers does not have to."""
        path = call.path_qs.partition("?")[0]
        if call.deadline_ms is None or query.stream or query.controls.only_if_cached or not is_batchable(path):
            return False
        left_s = call.deadline_ms / 1000 - self._shop.clock()
        if left_s < DEFER_FROM_S - MARGIN_S or self._shop.offers.known(query.upstream) is False:
            return False
        found = await self._find(call, query, headers)
        if isinstance(found, Answered):
            await self._settle(call, found)
            self._under_way.discard(call.id)
            return True
        if not await self._shop.offers.probe(query.upstream, path, headers):
            return False
        self._join(call, query, headers, path, left_s)
        return True

    async def _find(self, call: Deferred, query: Query, headers: RawHeaders) -> Answered | None:
        """What the cache has, or what its key's limits will have against it in a batch as well."""
        lines = self._shop.lines
        try:
            client, answered = await lines.let_in(query, call.path_qs, headers, lambda _: False)
        except BadRequest as refused:
            return None if refused.should_retry else refusal(query.dialect, new_id(), refused)
        if answered is not None:
            return answered
        try:
            found = await lines.find(query, client)
        finally:
            lines.let_go(client)
        return found if isinstance(found, Answered) else None

    # -- collecting -----------------------------------------------------------------------------------------------

    def _join(self, call: Deferred, query: Query, headers: RawHeaders, path: str, left_s: float) -> None:
        own = tuple([line for line in headers if not line[0].lower().startswith((b"x-stainless-", b"x-deadline"))])
        key = (call.tenant, call.key_id, own, path, query.upstream, query.model)
        group = self._groups.get(key)
        if group is None:
            group = self._groups[key] = _Group(own, path)
        group.calls.append(call)
        loop = asyncio.get_running_loop()
        wait_s = min(self._collect_s, max(left_s - DEFER_FROM_S, 0.0))
        if len(group.calls) >= COLLECT_LINES:
            wait_s = 0.0
        if group.timer is None or loop.time() + wait_s < group.timer.when():
            if group.timer is not None:
                group.timer.cancel()
            group.timer = loop.call_later(wait_s, self._flush, key)

    def _flush(self, key: tuple[str, str, RawHeaders, str, str, str]) -> None:
        group = self._groups.pop(key, None)
        if group is not None:
            try:
                _ = self._tasks.spawn(self._hand_in(group), "deferred")
            except RuntimeError:  # closing
                log.info("deferred calls wait for the next start", extra={"calls": len(group.calls)})

    async def _hand_in(self, group: _Group) -> None:
        """A batch of ours like any other, which nobody sees."""
        shop, calls = self._shop, group.calls
        now_ms = shop.now_ms()
        expires_ms = max(call.expires_ms for call in calls)
        tenant = calls[0].tenant
        try:
            file_id = new_name("file-")
            writer = FileWriter(shop.store, BatchFile(file_id, tenant, "requests", "", 0, now_ms, expires_ms))
            await writer.begin()
            for call in calls:
                await writer.write(requests_line(call.id, call.body))
            await writer.end()
            deadline_ms = min(call.deadline_ms or expires_ms for call in calls) - int(MARGIN_S * 1000)
            job = Job(
                new_name("batch_"), tenant, "deferred", group.path, "in_progress", file_id, now_ms, deadline_ms,
                expires_ms, key_id=calls[0].key_id,
            )  # fmt: skip
            await shop.store.join_deferred(job.id, [call.id for call in calls])
            await self._engine.begin(job, group.headers)
        except IbidError as fault:
            log.warning("deferred calls cannot be handed in", extra={"reason": fault.code})
        finally:
            self._under_way.difference_update([call.id for call in calls])


def _refused(status: int, body: bytes) -> UpstreamError:
    """A refusal that came instead of an answer, with what it says of itself."""
    try:
        told = orjson.loads(body).get("error")
    except (orjson.JSONDecodeError, AttributeError):
        told = None
    said = told if isinstance(told, dict) else {}
    message, code = said.get("message"), said.get("code")
    return UpstreamError(
        message if isinstance(message, str) else "The call was refused when it was made.",
        code=code if isinstance(code, str) else "upstream_error",
        status=status,
        should_retry=False if status in (401, 403, 429) else None,
    )


def _without_credential(path_qs: str) -> str:
    """A path whose query holds no credential; it travels in a header, which is in memory alone."""
    path, mark, query = path_qs.partition("?")
    return path + without_key(mark + query)


def requests_line(custom_id: str, body: bytes) -> bytes:
    """A line of a file of requests. Line ends between the tokens of a body become blanks."""
    flat = body.replace(b"\r", b" ").replace(b"\n", b" ")
    return b'{"custom_id":%b,"params":%b}\n' % (orjson.dumps(custom_id), flat)
