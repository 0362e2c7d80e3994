"""What tensors a checkpoint holds and where, from the headers of its safetensors files.

    | 8 bytes: length of the header | header, JSON: name -> dtype, shape, offsets | data |

Nothing but the headers is read, so a checkpoint of any size is known in milliseconds.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import ConfigError

MAX_HEADER_BYTES = 100 * 2**20  # the format's own limit
INDEX_NAME = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies."""

    file: Path
    dtype: str  # as safetensors spells it: F32, BF16, F16, ...
    shape: tuple[int, ...]
    num_bytes: int


def read_tensor_index(folder: Path) -> dict[str, TensorEntry]:
    """Return every tensor of a checkpoint by name, ordered by file, then by place in the file.

    Raises:
        ConfigError: There is no safetensors file, one is missing or damaged.
    """
    entries: dict[str, TensorEntry] = {}
    for file in tensor_files(folder):
        header = read_header(file)
        num_data_bytes = file.stat().st_size - 8 - len(header)
        try:
            for name, fields in json.loads(header).items():
                if name == "__metadata__":
                    continue
                begin, end = fields["data_offsets"]
                if end > num_data_bytes:
                    raise ConfigError(
                        f"model.path={folder}: {file.name} ends before tensor {name}: "
                        "the download is incomplete, get the file again",
                        field="model.path",
                    )
                entries[name] = TensorEntry(
                    file, fields["dtype"], tuple(fields["shape"]), end - begin
                )
        except (ValueError, KeyError, TypeError) as error:
            raise _damaged(file) from error
    return entries


def tensor_files(folder: Path) -> tuple[Path, ...]:
    """Return the safetensors files of a checkpoint, ordered by name.

    Raises:
        ConfigError: There is none, or one that the index names is missing.
    """
    index = folder / INDEX_NAME
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise ConfigError(
                f"model.path={folder}: {INDEX_NAME} cannot be read: {error}", field="model.path"
            ) from error
        files = tuple(folder / name for name in names)
    else:
        files = tuple(sorted(folder.glob("*.safetensors")))
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        raise ConfigError(
            f"model.path={folder}: no {missing[0] if missing else '*.safetensors'} file; "
            "give a folder that `save_pretrained` wrote or a complete download",
            field="model.path",
        )
    return files


def read_header(file: Path) -> bytes:
    """Return the JSON header of a safetensors file.

    Raises:
        ConfigError: The file is not one.
    """
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = stream.read(length) if 0 < length <= MAX_HEADER_BYTES else b""
    except OSError as error:
        raise ConfigError(f"model.path={file.parent}: {error}", field="model.path") from error
    if not header.startswith(b"{") or len(header) != length:
        raise _damaged(file)
    return header


def _damaged(file: Path) -> ConfigError:
    return ConfigError(
        f"model.path={file.parent}: {file.name} is no safetensors file: get it again",
        field="model.path",
    )
