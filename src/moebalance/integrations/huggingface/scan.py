"""Look into a folder of safetensors files: which tensors it has, and a router's when asked for.

Keys on disk need not be the module's names: Transformers renames as it loads, and wrappers put
prefixes before. A tensor is therefore found by what every naming keeps: the numbers on its path
(layer, encoder block), its last word, the word for its router, its shape.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from moebalance.integrations.huggingface.probe import NATIVE_BIAS
from moebalance.integrations.huggingface.routers import Site
from moebalance.integrations.names import without_adapters

INDEX_FILES = ("model.safetensors.index.json", "adapter_model.safetensors.index.json")


@dataclass(frozen=True)
class Weights:
    """The tensors of a folder, none of them read yet.

    Attributes:
        files: file of each key.
        shapes: shape of each key.
        absent: files that the folder's index names but that are not there.
    """

    files: dict[str, Path]
    shapes: dict[str, tuple[int, ...]]
    absent: tuple[str, ...]

    def read(self, key: str) -> Tensor:
        """Read one tensor."""
        with safe_open(self.files[key], framework="pt") as file:
            tensor: Tensor = file.get_tensor(key)
        return tensor

    def bias(self, site: Site) -> Tensor | None:
        """Read a router's selection bias, (E,) or (1, E); None if the files do not have it."""
        name = without_adapters(f"{site.name}.{site.bias_name}")
        key = self._find(name, NATIVE_BIAS)
        if key is None:  # some families call it `gate.bias` on disk
            key = self._find(name, ["bias"], within=_words(site), shape=(site.num_experts,))
        return None if key is None else self.read(key)

    def router_weight(self, site: Site) -> Tensor | None:
        """Read a router's matrix, (E, D); None if the files do not have it."""
        name, matrix = next((n, p) for n, p in site.router.named_parameters() if p.dim() == 2)
        key = self._find(
            without_adapters(f"{site.name}.{name}"),
            [_last(name)],
            within=_words(site),
            shape=tuple(matrix.shape),
        )
        return None if key is None else self.read(key)

    def _find(
        self,
        name: str,
        leaves: Sequence[str],
        *,
        within: Sequence[str] = (),
        shape: tuple[int, ...] | None = None,
    ) -> str | None:
        """Find the key of a tensor of the model under whatever naming; None if there is none.

        Args:
            name: the tensor's name in the model, such as `model.layers.3.mlp.gate.weight`.
            leaves: what its last word may be.
            within: words of which its path must have one; none for any path.
            shape: what its shape must be.
        """
        wanted, numbers = set(name.split(".")), _numbers(name)
        candidates = [
            key
            for key in self.files
            if _last(key) in leaves
            and _numbers(key) == numbers
            and (not within or not set(within).isdisjoint(key.split(".")))
            and (shape is None or self.shapes[key] == shape)
        ]
        # Encoder and decoder, or text and vision, share numbers: the most words in common win.
        return max(candidates, key=lambda key: len(wanted & set(key.split("."))), default=None)


def open_weights(folder: Path) -> Weights:
    """List the tensors of a folder's safetensors files, without the balancing state.

    Raises:
        ValueError: a file is truncated or no safetensors file.
    """
    named: set[str] = set()
    for index in INDEX_FILES:
        if (folder / index).is_file():
            named |= files_of(folder / index)
    present = {path.name for path in folder.glob("*.safetensors")}
    files: dict[str, Path] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for name in sorted(present):
        path = folder / name
        try:
            with safe_open(path, framework="pt") as file:
                if "moebalance" in (file.metadata() or {}):
                    continue  # the balancing state beside the weights
                for key in file.keys():  # noqa: SIM118
                    files[key] = path
                    shapes[key] = tuple(file.get_slice(key).get_shape())
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}): copy or download it again.") from error
    return Weights(files, shapes, tuple(sorted(named - present)))


def files_of(index: Path) -> set[str]:
    """The files that an index of shards names.

    Raises:
        ValueError: it is damaged, or names a file outside of its folder.
    """
    found = read_table(index).get("weight_map")
    names: list[Any] = list(found.values()) if isinstance(found, dict) else [None]
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(f"{index} is damaged: {str(name)[:80]!r} is no file of this folder.")
    return set(names)


def read_table(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds one object.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is damaged, or holds something else.
    """
    try:
        found = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds {type(found).__name__}, not a JSON object.")
    return found


def _numbers(name: str) -> list[str]:
    return [word for word in name.split(".") if word.isdecimal()]


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _words(site: Site) -> tuple[str, ...]:
    """What a router may be called on disk."""
    return _last(without_adapters(site.name)), "gate", "router"
