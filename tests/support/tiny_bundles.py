"""A bundle of a tiny model, and one that may be damaged."""

import hashlib
import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from polar_fx.compiled import CompiledModel, compile
from polar_fx.output.digest import digest
from tiny_models import make

DEPTH, LENGTH = 4, 63
PROGRAMS = ("identity", "skip 1", "0 (1-2)*2@0.5 3")


def compiled_model() -> CompiledModel:
    """A tiny model whose regions are compiled once a test session: the session's store keeps
    them.
    """
    return compile(make("llama"), "aot_inductor", max_length=LENGTH)


def hybrid() -> Any:
    """A tiny model whose first layer keeps the state of a convolution, with attention and a mixture
    of experts in the second one.
    """
    experts = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
    kinds = ["conv", "full_attention"]
    return make("lfm2_moe", layer_types=kinds, num_hidden_layers=2, num_dense_layers=1, **experts)


def compiled_hybrid(backend: Any = "aot_inductor") -> CompiledModel:
    """That, compiled once a test session likewise, for prompts in parts of 8 tokens."""
    return compile(hybrid(), backend, max_length=LENGTH, prefill_chunk=8)


def tokenizer_of_words() -> Any:
    """A tokenizer of the tiny models' vocabulary."""
    vocabulary = {f"w{i}": i for i in range(100)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0")


class Mutable:
    """A bundle of one's own: hard links, so a file is never written to but replaced."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def manifest(self) -> dict[str, Any]:
        return json.loads((self.folder / "manifest.json").read_text())

    def put(self, path: str, content: bytes) -> None:
        """Replace a file, and tell the manifest nothing."""
        place = self.folder / path
        place.unlink(missing_ok=True)
        place.write_bytes(content)

    def sign(self, manifest: dict[str, Any]) -> None:
        """Write a manifest with the checksum it should have."""
        manifest = {k: v for k, v in manifest.items() if k != "checksum"}
        self.put("manifest.json", json.dumps({**manifest, "checksum": digest(manifest)}).encode())

    def forge(self, path: str, content: bytes) -> None:
        """Replace a file and make the manifest fit."""
        self.put(path, content)
        manifest, sha256 = self.manifest(), hashlib.sha256(content).hexdigest()
        for file in manifest["files"]:
            if file["path"] == path:
                file |= {"bytes": len(content), "sha256": sha256}
        if path == "symbols.json":
            manifest["fingerprints"]["graphs"] = sha256
        self.sign(manifest)
