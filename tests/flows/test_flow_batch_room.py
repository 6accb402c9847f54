"""Whoever hands in files of lines, with a key or a made-up one, leaves room for others."""

from __future__ import annotations

import contextlib
from collections import Counter

import anthropic
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.batch.room import FileRoom
from proxy.core.errors import BadRequest, CacheFault
from tests.flows.batching import QUICK, ended, hand_in, line, sdk
from tests.flows.running import chat_body, running
from tests.upstream import Json
from tests.waiting import PATIENCE_S

MIB = 1024 * 1024
SMALL = {**QUICK, "batch": {"poll_interval_s": 0.02, "files_bytes": 4 * MIB}}
FILE = b'{"custom_id": "a"}\n' + b" " * (400_000 - 20) + b"\n"


async def test_made_up_keys_fill_half_of_the_room_and_the_next_is_told(data_dir, up):
    async with running(data_dir, up.url, SMALL) as ibid:
        taken, refused = 0, []
        for number in range(12):
            async with sdk(ibid, f"sk-made-up-{number}") as client:
                try:
                    await client.files.create(file=("lines.jsonl", FILE), purpose="batch")
                    taken += len(FILE)
                except openai.APIStatusError as error:
                    refused.append(error)
        assert 4 * MIB / 2 - len(FILE) < taken <= 4 * MIB / 2
        assert {(error.status_code, error.code) for error in refused} == {(413, "batch_storage_full")}
        assert "batch.files_bytes" in str(refused[0])
        async with sdk(ibid) as client:  # what is not kept is not held back
            up.default = Json(200, {"id": "file-x", "object": "file"})
            assert (await client.files.create(file=("x.jsonl", FILE), purpose="fine-tune")).id == "file-x"
        async with anthropic.AsyncAnthropic(
            base_url=ibid.url, api_key="sk-made-up", max_retries=0, timeout=PATIENCE_S
        ) as client:
            body = chat_body("How tall?" * 60_000, max_tokens=9)
            with pytest.raises(anthropic.APIStatusError) as caught:
                await client.messages.batches.create(requests=[{"custom_id": "a", "params": body}])
            assert caught.value.status_code == 413


async def test_what_was_deleted_makes_room_for_a_tenant_again(data_dir, up):
    async with running(data_dir, up.url, SMALL) as ibid, sdk(ibid) as client:
        files = [await client.files.create(file=("lines.jsonl", FILE), purpose="batch") for _ in range(5)]
        with pytest.raises(openai.APIStatusError):
            await client.files.create(file=("lines.jsonl", FILE), purpose="batch")
        await client.files.delete(files[0].id)
        await client.files.create(file=("lines.jsonl", FILE), purpose="batch")
        batch = await ended(client, await hand_in_small(client, files))
        assert batch.status == "completed"


async def hand_in_small(client: openai.AsyncOpenAI, files: list) -> object:
    await client.files.delete(files[1].id)
    return await hand_in(client, [line("a", "What is a hinge?")])


async def test_an_upload_that_is_the_upstreams_needs_no_database(data_dir, up):
    async with running(data_dir, up.url, SMALL) as ibid, sdk(ibid) as client:
        up.default = Json(200, {"id": "file-x", "object": "file"})
        asked = ibid.app.batches.engine.shop.store

        async def gone(tenant: str) -> tuple[int, int]:
            raise CacheFault("store_down", "the database is gone")

        asked.bytes_of_files = gone
        file = await client.files.create(file=("x.jsonl", FILE), purpose="fine-tune")
        assert file.id == "file-x"
        with pytest.raises(openai.APIStatusError):
            await client.files.create(file=("x.jsonl", FILE), purpose="batch")


def test_what_waits_for_its_purpose_is_bounded_and_leaves_nothing() -> None:
    room = FileRoom(Held(), 100, lambda: 0)  # type: ignore[arg-type]
    with room.waiting() as one, room.waiting() as other:
        one(60)
        other(40)
        with pytest.raises(BadRequest) as caught:
            other(1)
        assert (caught.value.status, room.waiting_bytes) == (413, 100)
    assert room.waiting_bytes == 0


class Held:
    """What SQL would say of whole files."""

    def __init__(self) -> None:
        self.of: Counter[str] = Counter()

    async def bytes_of_files(self, tenant: str) -> tuple[int, int]:
        return self.of.total(), self.of[tenant]


STEPS = st.tuples(
    st.sampled_from("abc"), st.sampled_from("xyz"), st.lists(st.integers(1, 60), max_size=5), st.booleans()
)


@given(st.lists(STEPS, max_size=12), st.integers(1, 3))
async def test_no_order_of_uploads_exceeds_the_room_or_leaves_any_of_it_taken(steps: list, abreast: int) -> None:
    held = Held()
    room = FileRoom(held, 400, lambda: 0)  # type: ignore[arg-type]
    for at in range(0, len(steps), abreast):
        async with contextlib.AsyncExitStack() as stack:
            for tenant, address, sizes, is_kept in steps[at : at + abreast]:
                place = await stack.enter_async_context(room.place(tenant, address, 1))
                for size in sizes:
                    before = place.bytes
                    with contextlib.suppress(BadRequest):
                        place.take(size)
                    assert place.bytes in (before, before + size)
                    total = held.of.total() + room.arriving_bytes
                    assert total <= 400
                    if total > 200 and place.bytes > before:
                        assert held.of[tenant] + room.arriving_of[tenant] <= 50
                        assert room.arriving_of[address] <= 50
                if is_kept:
                    stack.callback(held.of.update, {tenant: place.bytes})  # before its place is left
                else:
                    place.give_back(place.bytes)
    assert (room.arriving_bytes, dict(room.arriving_of)) == (0, {})
    assert room.taken_bytes == held.of.total()
