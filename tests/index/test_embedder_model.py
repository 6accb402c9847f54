"""The model's files, its conversion, and what is loaded to serve it."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from index import convert, model
from index.artefact import INT8, ONNX, Artefact, artefact_directory, converted, open_artefact
from index.batcher import open_embedder
from index.embedder import OnnxBackend
from index.errors import EmbedderFault, ModelFault
from index.model import locate
from tests.models import converted_data_dir
from tests.waiting import PATIENCE_S


@pytest.fixture(scope="module")
def data_dir() -> Path:
    return converted_data_dir()


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A directory that looks like a sentence-transformers model; its weights are noise."""
    directory = tmp_path / "foreign"
    (directory / "1_Pooling").mkdir(parents=True)
    transformer = {"type": "sentence_transformers.models.Transformer", "path": ""}
    pooling = {"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"}
    (directory / "modules.json").write_text(json.dumps([transformer, pooling]))
    (directory / "config.json").write_text(json.dumps({"model_type": "bert", "max_position_embeddings": 128}))
    (directory / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 64}))
    (directory / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 10**30}))
    (directory / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    (directory / "model.safetensors").write_bytes(b"noise")
    return directory


def test_the_bundled_model_is_found_under_each_of_its_names_with_its_published_checksum(tmp_path: Path) -> None:
    files = locate(None, tmp_path)
    assert model.sha256_of(files.directory / "model.safetensors") == model.BUNDLED_WEIGHTS_SHA256
    assert files.window == 256
    assert locate("sentence-transformers/all-MiniLM-L6-v2", tmp_path) == files
    assert list(tmp_path.iterdir()) == []


def test_damaged_bundled_weights_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, foreign: Path) -> None:
    monkeypatch.setattr(model, "_bundled_directory", lambda: foreign)
    with pytest.raises(ModelFault, match="damaged"):
        locate(None, tmp_path)
    (foreign / "model.safetensors").unlink()
    with pytest.raises(ModelFault, match=r"model\.safetensors is missing"):
        locate(None, tmp_path)


def test_a_bundled_model_that_is_not_installed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "BUNDLED_PACKAGE", "no_such_package_here")
    with pytest.raises(ModelFault, match="not installed"):
        locate(None, tmp_path)


@pytest.mark.parametrize("name", ["no/such-model", "/no/such/directory", "../../etc", ""])
def test_a_model_that_is_not_on_this_machine_is_refused_without_the_network(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def connect(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("socket.socket.connect", connect)
    monkeypatch.setattr("socket.getaddrinfo", connect)
    with pytest.raises(ModelFault):
        locate(name, tmp_path)


def test_the_window_is_the_smallest_limit_the_model_names(foreign: Path, tmp_path: Path) -> None:
    assert locate(str(foreign), tmp_path / "a").window == 64
    (foreign / "sentence_bert_config.json").unlink()
    assert locate(str(foreign), tmp_path / "b").window == 128
    (foreign / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 100}))
    assert locate(str(foreign), tmp_path / "c").window == 100


def test_a_model_that_names_no_window_is_refused(foreign: Path, tmp_path: Path) -> None:
    (foreign / "sentence_bert_config.json").unlink()
    (foreign / "config.json").write_text("{}")
    with pytest.raises(ModelFault, match="window"):
        locate(str(foreign), tmp_path)


def test_a_foreign_model_is_held_to_the_digest_of_its_first_use(foreign: Path, tmp_path: Path) -> None:
    records = tmp_path / "records"
    first = locate(str(foreign), records)
    assert locate(str(foreign), records) == first
    (foreign / "model.safetensors").write_bytes(b"other noise")
    with pytest.raises(ModelFault, match="first use"):
        locate(str(foreign), records)
    (record,) = records.iterdir()
    record.unlink()
    assert locate(str(foreign), records).digest != first.digest


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "1_Pooling/config.json", "modules.json"])
def test_every_file_that_shapes_a_vector_is_part_of_the_digest(name: str, foreign: Path, tmp_path: Path) -> None:
    before = locate(str(foreign), tmp_path / "a").digest
    with (foreign / name).open("ab") as file:
        file.write(b"\n")
    assert locate(str(foreign), tmp_path / "b").digest != before


def test_pickled_weights_are_refused(foreign: Path, tmp_path: Path) -> None:
    (foreign / "model.safetensors").rename(foreign / "pytorch_model.bin")
    with pytest.raises(ModelFault, match="safetensors"):
        locate(str(foreign), tmp_path)


def test_a_later_module_with_pickled_weights_is_refused(foreign: Path, tmp_path: Path) -> None:
    (foreign / "1_Pooling" / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ModelFault, match="safetensors"):
        locate(str(foreign), tmp_path)


@pytest.mark.parametrize(
    "modules",
    [
        [{"type": "os.system", "path": ""}],
        [{"type": "sentence_transformers.models.Transformer", "path": "../.."}],
        [{"type": "sentence_transformers.models.Transformer"}],
        [],
        {"type": "x"},
        7,
    ],
)
def test_a_module_list_that_brings_code_or_leaves_the_directory_is_refused(
    modules: Any, foreign: Path, tmp_path: Path
) -> None:
    (foreign / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ModelFault):
        locate(str(foreign), tmp_path)


async def test_a_model_that_cannot_be_converted_is_a_fault_with_the_reason_and_leaves_nothing(
    foreign: Path, tmp_path: Path
) -> None:
    models = tmp_path / "models"
    files = locate(str(foreign), models)
    with pytest.raises(ModelFault, match=r"does not convert to onnx: .*[A-Za-z]{4}"):
        await converted(files, models, ONNX, timeout_s=3 * PATIENCE_S)
    assert not artefact_directory(models, files.digest, ONNX).exists()


async def test_a_conversion_that_takes_too_long_is_given_up(foreign: Path, tmp_path: Path) -> None:
    files = locate(str(foreign), tmp_path)
    with pytest.raises(ModelFault, match="longer than"):
        await converted(files, tmp_path, ONNX, timeout_s=0.01)


@pytest.mark.parametrize("name", ["model.onnx", "tokenizer.json", "manifest.json"])
def test_a_damaged_artefact_is_refused(name: str, data_dir: Path, tmp_path: Path) -> None:
    digest = locate(None, tmp_path).digest
    copy = tmp_path / "copy"
    shutil.copytree(artefact_directory(data_dir / "models", digest, INT8), copy)
    assert open_artefact(copy, digest).dimension == 384
    with (copy / name).open("r+b") as file:
        file.seek(-100, os.SEEK_END)
        byte = file.read(1)
        file.seek(-100, os.SEEK_END)
        file.write(bytes([byte[0] ^ 0x80]))
    with pytest.raises(ModelFault):
        open_artefact(copy, digest)


def test_an_artefact_of_another_model_is_refused(data_dir: Path, tmp_path: Path) -> None:
    digest = locate(None, tmp_path).digest
    with pytest.raises(ModelFault, match="another model"):
        open_artefact(artefact_directory(data_dir / "models", digest, ONNX), "0" * 64)


def test_the_second_of_two_converters_keeps_what_the_first_published(data_dir: Path, tmp_path: Path) -> None:
    digest = locate(None, tmp_path).digest
    source = artefact_directory(data_dir / "models", digest, INT8)
    target = tmp_path / "target"
    shutil.copytree(source, tmp_path / "first")
    shutil.copytree(source, tmp_path / "second")
    convert._publish(tmp_path / "first", target, digest)
    published = (target / "manifest.json").stat().st_ino
    convert._publish(tmp_path / "second", target, digest)
    assert (target / "manifest.json").stat().st_ino == published


def test_a_damaged_artefact_in_the_way_is_replaced(data_dir: Path, tmp_path: Path) -> None:
    digest = locate(None, tmp_path).digest
    target = tmp_path / "target"
    target.mkdir()
    (target / "manifest.json").write_text("{")
    shutil.copytree(artefact_directory(data_dir / "models", digest, INT8), tmp_path / "made")
    convert._publish(tmp_path / "made", target, digest)
    assert open_artefact(target, digest).backend == INT8
    assert sorted(path.name for path in tmp_path.iterdir()) == ["target"]


async def test_a_sound_artefact_is_not_converted_again(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(*args: Any) -> None:
        raise AssertionError("a converter was started")

    monkeypatch.setattr("index.artefact._run_converter", refuse)
    artefact = await converted(locate(None, data_dir / "models"), data_dir / "models", ONNX, timeout_s=1)
    manifest = json.loads((artefact.directory / "manifest.json").read_text())
    assert manifest["agreement"]["smallest"] >= 0.9999
    assert manifest["versions"].keys() >= {"torch", "sentence-transformers", "onnxruntime"}


def test_int8_refuses_two_texts_in_one_call(data_dir: Path) -> None:
    models = data_dir / "models"
    digest = locate(None, models).digest
    backend = OnnxBackend(open_artefact(artefact_directory(models, digest, INT8), digest))
    row = backend.tokens("one text")
    assert backend.batch_limit == 1
    with pytest.raises(EmbedderFault):
        backend.encode_tokens([row, row])


def test_ids_outside_the_vocabulary_are_a_fault_not_a_crash(data_dir: Path) -> None:
    models = data_dir / "models"
    digest = locate(None, models).digest
    backend = OnnxBackend(open_artefact(artefact_directory(models, digest, ONNX), digest))
    with pytest.raises(EmbedderFault):
        backend.encode_tokens([[101, 10**9, 102]])


def test_a_graph_that_is_no_graph_is_a_fault(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"noise")
    artefact = Artefact(tmp_path, ONNX, "0" * 64, 4, 16, "", ("input_ids",))
    with pytest.raises(ModelFault, match="cannot be opened"):
        OnnxBackend(artefact)


async def test_the_identity_is_the_same_after_a_restart_and_differs_between_backends(data_dir: Path) -> None:
    seen = []
    for backend in (ONNX, ONNX, INT8):
        owner = await open_embedder(data_dir, backend=backend, encode_deadline_s=60)
        seen.append(owner.identity)
        await owner.close()
    assert seen[0] == seen[1] != seen[2]
    assert seen[0].endswith(f":{ONNX}:256")


SERVING = """
import asyncio, sys
from pathlib import Path
from index.batcher import open_embedder

async def serve():
    owner = await open_embedder(Path(sys.argv[1]), backend=sys.argv[2], encode_deadline_s=60)
    await owner.embed("How do I reset my password?")
    owner.signature("How do I reset my password?")
    await owner.close()

asyncio.run(serve())
heavy = {"torch", "sentence_transformers", "transformers", "onnx", "onnxscript"} & sys.modules.keys()
sys.exit(f"loaded: {sorted(heavy)}" if heavy else 0)
"""


@pytest.mark.parametrize("backend", [ONNX, INT8])
def test_serving_a_converted_model_loads_neither_torch_nor_sentence_transformers(backend: str, data_dir: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SERVING, str(data_dir), backend], capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert done.returncode == 0, done.stderr


async def test_opening_is_off_the_loop(data_dir: Path) -> None:
    """While the model is hashed, opened and warmed, the loop keeps turning."""
    opening = asyncio.create_task(open_embedder(data_dir, encode_deadline_s=60))
    turns = 0
    while not opening.done():
        await asyncio.sleep(0.001)
        turns += 1
    await (await opening).close()
    assert turns > 20
