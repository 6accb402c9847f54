"""Text → unit vector, one call at a time, on whichever thread owns the backend.

Three backends behind one Protocol: ONNX fp32 (what serves by default), ONNX int8 (faster, its own calibration, one text
at a time because dynamic activation scales are per tensor: the same text in a batch has cosine 0.994 to itself), and
torch (the reference and the fall-back). Only `TorchBackend` imports torch, when it is opened.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from index.artefact import INT8, Artefact
from index.errors import EmbedderFault, ModelFault, TextTooLong
from index.model import ModelFiles
from index.quiet import library

onnxruntime = library("onnxruntime")
ort_state = library("onnxruntime.capi.onnxruntime_pybind11_state")

Vector = NDArray[np.float32]
TokenStates = NDArray[np.float16] | NDArray[np.float32]

ORT_FAULTS: tuple[type[Exception], ...] = (
    ort_state.EPFail,
    ort_state.EngineError,
    ort_state.Fail,
    ort_state.InvalidArgument,
    ort_state.InvalidGraph,
    ort_state.InvalidProtobuf,
    ort_state.NoModel,
    ort_state.NoSuchFile,
    ort_state.NotImplemented,
    ort_state.RuntimeException,
)
"""Everything onnxruntime raises; they share no base class but Exception."""
OPEN_FAULTS: tuple[type[Exception], ...] = (*ORT_FAULTS, OSError, ValueError)


class Backend(Protocol):
    """A loaded model. Not thread-safe: one thread calls it."""

    identity: str  # "<12 hex digits of the model's digest>:<backend>:<window>", the same after a restart
    dimension: int
    window: int  # tokens, special tokens included
    batch_limit: int  # texts of equal length that may share a call; 1 means strictly alone
    states: tuple[int, ...]  # layers whose token states `encode_states` gives; none where it cannot

    def tokens(self, text: str) -> list[int]:
        """Token ids of the whole text, never cut. Raises TextTooLong beyond the window."""
        ...

    def encode_tokens(self, rows: Sequence[list[int]]) -> Vector:
        """(len(rows), dimension) float32, unit rows. All rows have one length. Raises EmbedderFault."""
        ...

    def encode_states(self, rows: Sequence[list[int]]) -> tuple[Vector, TokenStates]:
        """What `encode_tokens` gives, and the states of the same run without those of the first and last token:
        (len(rows), tokens - 2, len(self.states), dimension) float16, unit rows. Raises EmbedderFault.
        """
        ...

    def encode(self, text: str) -> Vector:
        """(dimension,) float32 of unit length. Raises TextTooLong, EmbedderFault."""
        ...


def identity_of(digest: str, backend: str, window: int) -> str:
    return f"{digest[:12]}:{backend}:{window}"


class OnnxBackend:
    """One onnxruntime session over a converted artefact.

    `threads` are onnxruntime's own (0 lets it choose). Spinning is off: left on, its threads ignore the process's
    affinity and burn the loop's core (measured: 1.97 cores used under a one-core pin).
    """

    def __init__(self, artefact: Artefact, threads: int = 1) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self._session = onnxruntime.InferenceSession(
                str(artefact.graph), options, providers=["CPUExecutionProvider"]
            )
            self._tokenizer = Tokenizer.from_file(str(artefact.tokenizer))
        except OPEN_FAULTS as error:
            raise ModelFault(f"the converted model cannot be opened: {type(error).__name__}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._inputs = artefact.inputs
        self._prefix = artefact.prefix
        self.dimension = artefact.dimension
        self.window = artefact.window
        self.batch_limit = 1 if artefact.backend == INT8 else 8
        self.states = artefact.states
        self._every_output = ["embedding", *(f"states_{layer}" for layer in artefact.states)]
        self.identity = identity_of(artefact.source, artefact.backend, artefact.window)

    def tokens(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(self._prefix + text).ids
        if len(ids) > self.window:
            raise TextTooLong(f"{len(ids)} tokens, window {self.window}")
        return ids

    def encode_tokens(self, rows: Sequence[list[int]]) -> Vector:
        vectors: Vector = self._run(["embedding"], rows)[0]
        return vectors

    def encode_states(self, rows: Sequence[list[int]]) -> tuple[Vector, TokenStates]:
        if not self.states:
            raise EmbedderFault("the model gives no token states")
        vectors, *layers = self._run(self._every_output, rows)
        states = np.empty((*layers[0][:, 1:-1].shape[:2], len(layers), self.dimension), dtype=np.float16)
        for i, layer in enumerate(layers):
            inner = layer[:, 1:-1]
            lengths = np.sqrt(np.einsum("ntd,ntd->nt", inner, inner))
            np.divide(inner, lengths[:, :, None], out=states[:, :, i], casting="same_kind")
        return vectors, states

    def _run(self, outputs: list[str], rows: Sequence[list[int]]) -> list[NDArray[np.float32]]:
        if len(rows) > self.batch_limit:
            raise EmbedderFault(f"{len(rows)} texts in one call, limit {self.batch_limit}")
        ids = np.asarray(rows, dtype=np.int64)
        feeds = {"input_ids": ids}
        if "attention_mask" in self._inputs:
            feeds["attention_mask"] = np.ones_like(ids)
        if "token_type_ids" in self._inputs:
            feeds["token_type_ids"] = np.zeros_like(ids)
        try:
            found: list[NDArray[np.float32]] = self._session.run(outputs, feeds)
        except ORT_FAULTS as error:
            raise EmbedderFault(f"onnxruntime raised {type(error).__name__}") from error
        return found

    def encode(self, text: str) -> Vector:
        vector: Vector = self.encode_tokens([self.tokens(text)])[0]
        return vector


def load_reference(directory: Path, **model_kwargs: Any) -> Any:
    """The sentence-transformers model itself: local files, safetensors, no code of the model's own."""
    sentence_transformers = library("sentence_transformers")
    return sentence_transformers.SentenceTransformer(
        str(directory),
        device="cpu",
        trust_remote_code=False,
        local_files_only=True,
        model_kwargs={"use_safetensors": True, **model_kwargs},
    )


class TorchBackend:
    """sentence-transformers itself. Loading it brings torch into the process: about 400 MB and seconds of import."""

    batch_limit = 1
    states: tuple[int, ...] = ()

    def __init__(self, files: ModelFiles, threads: int = 1) -> None:
        try:
            library("torch").set_num_threads(max(threads, 1))
            self._model = load_reference(files.directory)
        except (ImportError, OSError, RuntimeError, ValueError, LookupError, TypeError) as error:
            raise ModelFault(
                f"sentence-transformers cannot load {files.name!r}: {type(error).__name__}: {error}"
            ) from error
        self.window = min(files.window, int(self._model.max_seq_length or files.window))
        self.dimension = int(self._model.get_embedding_dimension())
        self.identity = identity_of(files.digest, "torch", self.window)
        self._prefix = (self._model.prompts or {}).get(self._model.default_prompt_name or "", "") or ""
        if self._prefix and any(getattr(module, "include_prompt", True) is False for module in self._model):
            raise ModelFault(f"{files.name!r} leaves its default prompt out of the pooling, which is not supported")

    def tokens(self, text: str) -> list[int]:
        ids: list[int] = self._model.tokenizer(self._prefix + text, truncation=False, verbose=False)["input_ids"]
        if len(ids) > self.window:
            raise TextTooLong(f"{len(ids)} tokens, window {self.window}")
        return ids

    def encode_tokens(self, rows: Sequence[list[int]]) -> Vector:
        torch = library("torch")
        ids = torch.tensor(rows, dtype=torch.int64)
        with torch.inference_mode():
            features = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            if "token_type_ids" in self._model.tokenizer.model_input_names:
                features["token_type_ids"] = torch.zeros_like(ids)
            try:
                vectors = torch.nn.functional.normalize(self._model(features)["sentence_embedding"], p=2, dim=1)
            except (RuntimeError, ValueError, LookupError, TypeError) as error:
                raise EmbedderFault(f"torch raised {type(error).__name__}") from error
        array: Vector = vectors.numpy()
        return array

    def encode_states(self, rows: Sequence[list[int]]) -> tuple[Vector, TokenStates]:
        raise EmbedderFault("torch serves without token states")

    def encode(self, text: str) -> Vector:
        vector: Vector = self.encode_tokens([self.tokens(text)])[0]
        return vector
