"""`ibid adopt PEER FILE`: another gateway's configuration as one of ours, and in words what became of each setting."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, NamedTuple

from proxy.commands import printing
from proxy.commands.adopt import bifrost, cachellm, client, gptcache, helicone, litellm, portkey, reading
from proxy.commands.adopt.draft import Draft, Fate
from proxy.commands.codes import FINE
from proxy.core.errors import ConfigError
from proxy.settings import config


class Peer(NamedTuple):
    """`prefix`: of the headers that its clients send, "" where none are read here."""

    adopt: Callable[[str, str], Draft]
    prefix: str = ""


PEERS: Final[Mapping[str, Peer]] = {
    "litellm": Peer(litellm.adopt),
    "portkey": Peer(portkey.adopt, portkey.PREFIX),
    "helicone": Peer(helicone.adopt, helicone.PREFIX),
    "gptcache": Peer(gptcache.adopt),
    "cachellm": Peer(cachellm.adopt),
    "bifrost": Peer(bifrost.adopt, "x-bf-"),
}
_TITLES: Final[Mapping[Fate, str]] = {
    Fate.TAKEN: "Taken over:",
    Fate.RENAMED: "Has another name or another place:",
    Fate.LEFT: "Has no counterpart, and what to do instead:",
}


def run(peer: str, file: str, output: str | None, *, force: bool) -> int:
    """Write the configuration, and say on standard error what became of each setting. Raises ConfigError."""
    chosen = PEERS[peer]
    draft = chosen.adopt(reading.text_of(file), file)
    draft.part_models()
    text = draft.toml(f"{peer}'s {Path(file).name if file != '-' else 'configuration'}")
    prove(text, draft)
    if output is None:
        sys.stdout.write(text)
        written = ""
    else:
        written = _write(Path(output), text, force=force)
    sys.stderr.write(story(draft, chosen.prefix, written))
    return FINE


def prove(text: str, draft: Draft) -> None:
    """That what is written is a configuration, so that nobody is handed one that does not start. Raises ConfigError."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ibid.toml"
        path.write_text(text, encoding="utf-8")
        try:
            config.load(config.Flags(config=str(path)), {"HOME": folder, **dict.fromkeys(draft.keys, "sk-proof")})
        except ConfigError as error:
            raise ConfigError(
                f"this cannot be said in ibid's words: {error.message.replace(str(path), 'line')}"
            ) from error


def _write(path: Path, text: str, *, force: bool) -> str:
    """What was done, in words. The file is its owner's alone."""
    was_there = path.exists()
    if was_there and not force:
        raise ConfigError(f"{path} exists: --force overwrites it, or name another with --output")
    flags = os.O_WRONLY | os.O_CREAT | (os.O_TRUNC if force else os.O_EXCL)
    try:
        with os.fdopen(os.open(path, flags, 0o600), "w", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    return f"{path} was {'overwritten' if was_there else 'written'}"


def story(draft: Draft, prefix: str, written: str) -> str:
    """What became of each setting, the headers that mean the same here, and what to do next."""
    parts = []
    for fate, title in _TITLES.items():
        notes = [note for note in draft.notes if note.fate is fate]
        lines = dict.fromkeys(f"  {note.what}: {note.here}" for note in notes)
        if lines:
            parts.append("\n".join([title, *lines]))
    if prefix and (rows := client.table_of(prefix)):
        parts.append(
            "\n".join(["Headers that clients may go on sending:", *(f"  {name}: {does}" for name, does in rows)])
        )
    steps = [written] if written else []
    steps += [f"export {key}=… before the start" for key in draft.keys]
    steps.append(
        f"next: ibid check --config {written.split(' was ')[0] if written else 'FILE'}, then `ibid serve --shadow`"
    )
    parts.append("\n".join(steps))
    return "\n\n".join(printing.printable_lines(part) for part in parts) + "\n"
