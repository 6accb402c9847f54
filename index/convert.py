"""sentence-transformers → ONNX, once, in a process of its own, so that torch never enters the server.

    python -m index.convert MODEL_DIR --into DATA_DIR/models --digest HEX --window N --backend onnx --backend onnx-int8

The whole pipeline (transformer, pooling, whatever follows, unit length) becomes one graph in a directory of its own
(`index.artefact`). A graph that does not agree with sentence-transformers on the check texts is refused, and the torch
backend is what remains.

Besides the embedding, the graph of a BERT-like model gives the states of every token after the embeddings, after the
middle layer and after the last (`states_<layer>`): what `index.guard` aligns. They are named outputs of nodes that are
there anyway, not new nodes. Measured 25 Nov 2026, fp32, 15 tokens, 1 thread, median of 300: 4.84 ms without these
outputs, 4.71 with them but unasked, 4.63 with them fetched; the optimised graphs have the same 272 nodes.

The exporter is torch's tracing one: measured 22 Nov 2026 with torch 2.13 on 2 cores it takes 1.4 s against 16 s of the
torch.export one, whose file for this pipeline onnxruntime 1.32 refuses ("Duplicate definition of name"). Attention is
exported in its plain form (`attn_implementation="eager"`), the only one onnxruntime's fusion recognises.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from index.artefact import CONVERTER, FORMAT, INT8, ONNX, Artefact, artefact_directory, open_artefact
from index.embedder import OnnxBackend, load_reference
from index.errors import ModelFault
from index.model import DAMAGED, TEMPORARY, claim, sha256_of, sync_directory
from index.quiet import SILENCE, library

OPSET = 17
GRAPH_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
AGREEMENT = {ONNX: (0.9999, 0.9999), INT8: (0.94, 0.99)}  # cosine to sentence-transformers: smallest, mean
CHECK_TEXTS = (
    "hi",
    "How do I reset my password?",
    "What is the capital of Burkina Faso, and how many people lived there in 2019?",
    "Translate 'good morning' into French.",
    "MY ROUTER BLINKS RED; WHAT DOES THAT MEAN?",
    "¿Cuál es la diferencia entre un préstamo y una hipoteca? Größe, naïve, 東京.",
    "def mean(xs): return sum(xs) / len(xs)  # why ZeroDivisionError?",
    "Explain, step by step, how a bill becomes a law in a country with two chambers. " * 4,
)


def convert(source: Path, models: Path, digest: str, window: int, backends: Sequence[str]) -> list[Path]:
    """Write one artefact per backend and return their directories. Raises ModelFault when agreement is not reached."""
    models.mkdir(mode=0o700, parents=True, exist_ok=True)
    done: list[Path] = []
    with _scratch(models) as scratch:
        os.environ["TMPDIR"] = tempfile.tempdir = str(scratch)  # where torch makes a folder for its compiler
        reference = load_reference(source, attn_implementation="eager")
        window = min(window, int(reference.max_seq_length or window))
        exported = scratch / "exported.onnx"
        inputs, layers = _export(reference, exported)
        for backend in backends:
            made = scratch / backend
            made.mkdir()
            if backend == INT8:
                _quantise(exported, made / "model.onnx", reference, scratch)
            else:
                shutil.copyfile(exported, made / "model.onnx")
            reference.tokenizer.backend_tokenizer.save(str(made / "tokenizer.json"))
            prefix = (reference.prompts or {}).get(reference.default_prompt_name or "", "") or ""
            agreement, dimension = _agreement(reference, made, inputs, prefix, window, backend)
            manifest = {
                "format": FORMAT,
                "backend": backend,
                "source_sha256": digest,
                "files": {name: sha256_of(made / name) for name in ("model.onnx", "tokenizer.json")},
                "dimension": dimension,
                "window": window,
                "prefix": prefix,
                "inputs": inputs,
                "states": layers,
                "agreement": agreement,
                "versions": {name: importlib.metadata.version(name) for name in VERSIONED},
            }
            (made / "manifest.json").write_text(json.dumps(manifest, indent=1))
            done.append(_publish(made, artefact_directory(models, digest, backend), digest))
    return done


@contextlib.contextmanager
def _scratch(models: Path) -> Iterator[Path]:
    """A folder to work in, locked while it is ours, so that what a crash leaves can be told from work under way."""
    with tempfile.TemporaryDirectory(dir=models, prefix=TEMPORARY) as name:
        descriptor = os.open(name, os.O_RDONLY)
        try:
            claim(descriptor)
            yield Path(name)
        finally:
            os.close(descriptor)


VERSIONED = ("torch", "sentence-transformers", "transformers", "tokenizers", "onnx", "onnxruntime")


def _layers(reference: Any) -> dict[int, Any]:
    """The modules of a BERT-like transformer whose outputs are token states; empty for any other."""
    transformer = getattr(reference[0], "auto_model", None)
    embeddings = getattr(transformer, "embeddings", None)
    blocks = getattr(getattr(transformer, "encoder", None), "layer", None)
    if embeddings is None or not blocks:
        return {}
    return {0: embeddings} | {layer: blocks[layer - 1] for layer in (max(1, len(blocks) // 2), len(blocks))}


def _export(reference: Any, path: Path) -> tuple[list[str], list[int]]:
    """Trace the pipeline into `path`; the names of the graph's inputs, in order, and the layers it gives states of."""
    torch = library("torch")
    sample = reference.preprocess(list(CHECK_TEXTS[1:3]))
    tensors = {name: value for name, value in sample.items() if isinstance(value, torch.Tensor)}
    if not {"input_ids", "attention_mask"} <= tensors.keys() <= set(GRAPH_INPUTS):
        raise ModelFault(f"the pipeline takes {sorted(tensors)}, which is not plain text")
    names = [name for name in GRAPH_INPUTS if name in tensors]
    layers = _layers(reference)
    states: dict[int, Any] = {}

    def keep(layer: int, output: Any) -> None:
        states[layer] = output[0] if isinstance(output, tuple) else output

    class Pipeline(torch.nn.Module):  # type: ignore[misc, name-defined]  # torch is imported by name
        def __init__(self) -> None:
            super().__init__()
            self.model = reference

        def forward(self, *values: Any) -> Any:
            features = dict(zip(names, values, strict=True))
            embedding = torch.nn.functional.normalize(self.model(features)["sentence_embedding"], p=2, dim=1)
            return (embedding, *(states[layer] for layer in layers))

    hooks = [
        module.register_forward_hook(lambda _module, _input, output, layer=layer: keep(layer, output))
        for layer, module in layers.items()
    ]
    outputs = ["embedding", *(f"states_{layer}" for layer in layers)]
    axes = {name: {0: "texts", 1: "tokens"} for name in (*names, *outputs[1:])} | {"embedding": {0: "texts"}}
    try:
        with torch.inference_mode():
            torch.onnx.export(
                Pipeline().eval(),
                tuple(tensors[name] for name in names),
                str(path),
                dynamo=False,
                opset_version=OPSET,
                input_names=names,
                output_names=outputs,
                dynamic_axes=axes,
            )
    finally:
        for hook in hooks:
            hook.remove()
    return names, list(layers)


def _quantise(exported: Path, path: Path, reference: Any, scratch: Path) -> None:
    """Dynamic int8, per channel, on the fused graph; the embedding tables stay float.

    Weights have 7 bits (`reduce_range`), as onnxruntime's guide asks for where VNNI is absent: with 8, the 16-bit
    intermediate sums can saturate. Cosine to fp32, measured 22 Nov 2026 on AVX2 without VNNI, mean and smallest: 300
    QQP questions 0.9938 and 0.9876 (8 bits: 0.9941 and 0.9847, at equal speed). English prompts of three words or more
    stay above 0.985 (1,748 texts, smallest 0.9861); single words fall to 0.954 and German sentences to 0.970, and no
    other of the eight settings tried kept all German ones above 0.985 either (best 0.982). Float tables cost 35 MB of
    disk and no time; with them quantised "hi" falls to 0.979.
    """
    optimizer = library("onnxruntime.transformers.optimizer")
    quantization = library("onnxruntime.quantization")
    settings = reference[0].auto_model.config
    fused = scratch / "fused.onnx"
    optimizer.optimize_model(
        str(exported),
        model_type="bert",
        num_heads=settings.num_attention_heads,
        hidden_size=settings.hidden_size,
        opt_level=0,
    ).save_model_to_file(str(fused))
    quantization.quantize_dynamic(
        str(fused),
        str(path),
        per_channel=True,
        reduce_range=True,
        weight_type=quantization.QuantType.QInt8,
        op_types_to_quantize=["MatMul", "Attention", "Gemm"],
        extra_options={"MatMulConstBOnly": True, "DefaultTensorType": 1},  # 1: float; fused operators hide their type
    )


def _agreement(
    reference: Any, made: Path, inputs: list[str], prefix: str, window: int, backend: str
) -> tuple[dict[str, Any], int]:
    """Cosine of the graph, one text at a time, to sentence-transformers. Raises ModelFault under AGREEMENT."""
    expected: NDArray[np.float32] = reference.encode(
        list(CHECK_TEXTS), normalize_embeddings=True, convert_to_numpy=True, show_progress_bar=False
    )
    dimension = int(expected.shape[1])
    graph = OnnxBackend(Artefact(made, backend, "", dimension, window, prefix, tuple(inputs)), threads=0)
    found = np.stack([graph.encode(text) for text in CHECK_TEXTS])
    cosines = (expected.astype(np.float64) * found).sum(axis=1)
    smallest, mean = AGREEMENT[backend]
    if not (cosines.min() >= smallest and cosines.mean() >= mean):  # written so that NaN refuses
        raise ModelFault(
            f"{backend} disagrees with sentence-transformers: "
            f"cosine {cosines.min():.5f} smallest, {cosines.mean():.5f} mean"
        )
    return {"smallest": float(cosines.min()), "mean": float(cosines.mean()), "texts": len(CHECK_TEXTS)}, dimension


def _publish(made: Path, target: Path, digest: str) -> Path:
    """Rename `made` to `target`, durable. A sound artefact already there wins; a damaged one is replaced."""
    for path in made.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    sync_directory(made)
    if target.exists() and not _is_sound(target, digest):
        aside = Path(tempfile.mkdtemp(dir=target.parent, prefix=DAMAGED))
        os.rename(target, aside / target.name)
        shutil.rmtree(aside)
    try:
        os.rename(made, target)
    except OSError:
        if not _is_sound(target, digest):
            raise
    sync_directory(target.parent)
    return target


def _is_sound(directory: Path, digest: str) -> bool:
    try:
        open_artefact(directory, digest)
    except ModelFault:
        return False
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 with the reason as the last line of standard error."""
    parser = argparse.ArgumentParser(prog=f"python -m {CONVERTER}", description="Convert a model to ONNX, once.")
    parser.add_argument("source", type=Path)
    parser.add_argument("--into", type=Path, required=True)
    parser.add_argument("--digest", required=True)
    parser.add_argument("--window", type=int, required=True)
    parser.add_argument("--backend", choices=[ONNX, INT8], action="append", required=True)
    options = parser.parse_args(arguments)
    os.umask(0o077)
    os.environ.update(SILENCE)
    warnings.simplefilter("ignore")  # the exporter's own, not ours
    try:
        for path in convert(options.source, options.into, options.digest, options.window, options.backend):
            sys.stdout.write(f"{path}\n")
    except ModelFault as fault:
        sys.stderr.write(f"{fault}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
