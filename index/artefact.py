"""The converted model on disk: a directory that its manifest describes, made by a child process when it is missing.

An artefact is a directory `<digest>-<backend>-v<FORMAT>` holding `model.onnx`, `tokenizer.json` and `manifest.json`; it
appears by one rename, so two converters at once are safe: the second finds the first one's directory and keeps it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from index import lifeline
from index.errors import ModelFault
from index.model import ModelFiles, read_json, settle_directory, sha256_of
from index.quiet import SILENCE

log = logging.getLogger(__name__)

FORMAT = 2  # raise it when the graph, the quantiser's settings or the manifest change
ONNX, INT8 = "onnx", "onnx-int8"
CONVERTER = "index.convert"


@dataclass(frozen=True, slots=True)
class Artefact:
    """A converted model on disk, as its manifest states it; checksums verified by `open_artefact`."""

    directory: Path
    backend: str
    source: str  # ModelFiles.digest
    dimension: int
    window: int
    prefix: str  # the model's default prompt, put before every text
    inputs: tuple[str, ...]
    states: tuple[int, ...] = ()  # layers whose token states are outputs; 0 = the embeddings

    @property
    def graph(self) -> Path:
        return self.directory / "model.onnx"

    @property
    def tokenizer(self) -> Path:
        return self.directory / "tokenizer.json"


def artefact_directory(models: Path, digest: str, backend: str) -> Path:
    return models / f"{digest[:16]}-{backend}-v{FORMAT}"


def open_artefact(directory: Path, digest: str) -> Artefact:
    """What the manifest says, after both files were hashed again. Raises ModelFault when anything differs."""
    manifest = read_json(directory / "manifest.json")
    try:
        if (manifest["format"], manifest["source_sha256"]) != (FORMAT, digest):
            raise ModelFault(f"{directory.name} was converted from another model or by another version")
        for name, expected in manifest["files"].items():
            if sha256_of(directory / name) != expected:
                raise ModelFault(f"{directory.name}/{name} does not match its checksum")
        if not {"model.onnx", "tokenizer.json"} <= manifest["files"].keys():
            raise ModelFault(f"the manifest of {directory.name} lists no graph or no tokenizer")
        return Artefact(
            directory=directory,
            backend=str(manifest["backend"]),
            source=digest,
            dimension=int(manifest["dimension"]),
            window=int(manifest["window"]),
            prefix=str(manifest["prefix"]),
            inputs=tuple(manifest["inputs"]),
            states=tuple(int(layer) for layer in manifest["states"]),
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ModelFault(f"the manifest of {directory.name} is damaged") from error


async def converted(files: ModelFiles, models: Path, backend: str, timeout_s: float) -> Artefact:
    """The artefact of this model, converting it first when it is absent or damaged. Raises ModelFault."""
    directory = artefact_directory(models, files.digest, backend)
    await asyncio.to_thread(_settle, models)
    if directory.exists():
        try:
            return await asyncio.to_thread(open_artefact, directory, files.digest)
        except ModelFault as fault:
            log.warning("converting again: %s", fault)
    await _run_converter(files, models, backend, timeout_s)
    return await asyncio.to_thread(open_artefact, directory, files.digest)


def _settle(models: Path) -> None:
    try:
        settle_directory(models)
    except OSError as error:
        log.warning("%s cannot be tidied: %s", models, error.strerror)


async def _run_converter(files: ModelFiles, models: Path, backend: str, timeout_s: float) -> None:
    """One child process; killed when the caller is cancelled or `timeout_s` passes; it ends with this process."""
    command = [
        sys.executable,
        "-P",
        "-m",
        lifeline.MODULE,
        CONVERTER,
        str(files.directory),
        "--into",
        str(models),
    ]
    command += ["--digest", files.digest, "--window", str(files.window), "--backend", backend]
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.PIPE,  # open while this process lives
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, **SILENCE},
    )
    assert process.stderr is not None
    try:
        async with asyncio.timeout(timeout_s):
            errors = await process.stderr.read()
            await process.wait()
    except TimeoutError:
        raise ModelFault(f"converting the model took longer than {timeout_s:g} s") from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
            _settle(models)
    if process.returncode != 0:
        lines = errors.decode(errors="replace").strip().splitlines()
        raise ModelFault(f"the model does not convert to {backend}: {lines[-1] if lines else process.returncode}")
