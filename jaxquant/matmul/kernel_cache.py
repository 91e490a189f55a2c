"""Lowered kernels, kept beside what XLA compiled of them.

jax's persistent compilation cache finds a program by its text, which each process has to make anew,
and most of that is Mosaic GPU lowering kernels in Python. So where that cache is on, a lowered
kernel is a file in its folder, which other processes read instead.
"""

import contextlib
import functools
import hashlib
import json
import logging
import os
import uuid
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from jax import export
from jax.extend.core import Primitive
from jax.interpreters import mlir

from jaxquant.array import QuantizedArray
from jaxquant.hopper import interpreted
from jaxquant.matmul.tokens import QuantizedTokens

SUBFOLDER = "jaxquant-kernels"

_logger = logging.getLogger(__name__)
_DIGEST_BYTES = hashlib.sha256().digest_size
# Of each file, so that a kernel is in a program once.
_calls: dict[Path, Callable[..., Any]] = {}


def kept[**P, T](kernel: Callable[P, T]) -> Callable[P, T]:
    """The same function, for CUDA devices only, traced and lowered once for all processes.

    What is lowered is kept in the subfolder `jaxquant-kernels` of `jax_compilation_cache_dir`, if
    that is set and a folder of this machine. A file there that is not as it was written is made
    anew; where none can be written, each process lowers for itself.

    Args:
      kernel: a function of a module. Its arguments are pytrees of arrays, and of what `repr` says
        in full. Its lowering depends on them and on the source of this package alone.
    """

    @functools.wraps(kernel)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        folder = _folder()
        if folder is None:
            return kernel(*args, **kwargs)
        leaves, structure = jax.tree.flatten((args, kwargs))
        arrays = [leaf for leaf in leaves if _is_array(leaf)]

        def of_arrays(*arrays: Any) -> Any:
            each = iter(arrays)
            filled = [next(each) if _is_array(leaf) else leaf for leaf in leaves]
            args, kwargs = jax.tree.unflatten(structure, filled)
            function: Any = kernel
            return function(*args, **kwargs)

        described = [_shape(leaf) if _is_array(leaf) else repr(leaf) for leaf in leaves]
        key = (kernel.__module__, kernel.__qualname__, str(structure), *described, *_versions())
        path = folder / hashlib.sha256("\n".join(key).encode()).hexdigest()
        if path not in _calls:
            serialized = _read(path) or _make(path, of_arrays, arrays)
            # Where it was made too: the next process is to give XLA the same program.
            _calls[path] = _call(serialized)
        return _calls[path](*arrays)

    return run


def _folder() -> Path | None:
    """Where kernels are kept, or None if they are not."""
    folder = jax.config.jax_compilation_cache_dir
    if not folder or not jax.config.jax_enable_compilation_cache or interpreted():
        return None
    # What is manual in a mesh is lowered for that mesh.
    if "://" in folder or not jax.sharding.get_abstract_mesh().empty:
        return None
    if not find_spec("flatbuffers"):
        _log_once("kernels are lowered by each process: jax.export needs the package flatbuffers")
        return None
    return Path(folder) / SUBFOLDER


def _read(path: Path) -> bytes | None:
    """The lowered kernel of a file, or None if there is none."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest, serialized = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
    if digest == _digest(path, serialized):
        return serialized
    _logger.debug("%s: not a lowered kernel as it was written; made anew", path)
    return None


def _make(path: Path, function: Callable[..., Any], arrays: list[Any]) -> bytes:
    """Lowers a kernel, and writes it to a file."""
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arrays]
    lowered = export.export(jax.jit(function), platforms=["cuda"])(*shapes)
    serialized = bytes(lowered.serialize())
    try:
        _write(path, _digest(path, serialized) + serialized)
    except OSError as e:
        _logger.debug("%s: a lowered kernel could not be kept: %s", path, e)
    return serialized


def _call(serialized: bytes) -> Callable[..., Any]:
    lowered = export.deserialize(bytearray(serialized))

    def call(*arrays: Any) -> Any:
        return jax.tree.unflatten(lowered.out_tree, _lowered_p.bind(*arrays, lowered=lowered))

    return call


def _leaves(*arrays: Any, lowered: export.Exported) -> list[Any]:
    return jax.tree.leaves(lowered.call(*arrays))


# A program in which jax itself sees an Exported commits its results to their device, so that it is
# traced again when it is given them. It sees none in the lowering of another primitive.
_lowered_p = Primitive("lowered_kernel")
_lowered_p.multiple_results = True
_lowered_p.def_abstract_eval(lambda *_, lowered: lowered.out_avals)
_lowered_p.def_impl(_leaves)
mlir.register_lowering(_lowered_p, mlir.lower_fun(_leaves, multiple_results=True))


def _write(path: Path, content: bytes) -> None:
    """Makes a file that is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{uuid.uuid4().hex}")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def _digest(path: Path, serialized: bytes) -> bytes:
    """Of a file's name and content, so that neither can be another's."""
    return hashlib.sha256(path.name.encode() + serialized).digest()


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray)


def _shape(a: Any) -> str:
    return f"{a.dtype.name}{list(a.shape)}"


def _versions() -> tuple[str, ...]:
    """What a lowered kernel depends on besides the arguments."""
    return jax.__version__, jaxlib.__version__, f"x64 {jax.config.jax_enable_x64}", _sources()


@functools.cache
def _sources() -> str:
    """A digest of this package's source."""
    root, digest = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def _register(kind: type) -> None:
    """Tells `jax.export` how to write a dataclass that a kernel gives."""

    def to_json(static: tuple) -> bytes:
        return json.dumps(static, default=lambda dtype: {"dtype": dtype.name}).encode()

    def from_json(content: bytes) -> tuple:
        static = json.loads(content, object_hook=lambda found: jnp.dtype(found["dtype"]))
        return tuple(tuple(value) if isinstance(value, list) else value for value in static)

    export.register_pytree_node_serialization(
        kind,
        serialized_name=f"jaxquant.{kind.__name__}",
        serialize_auxdata=to_json,
        deserialize_auxdata=from_json,
    )


_register(QuantizedArray)
_register(QuantizedTokens)


@functools.cache
def _log_once(message: str) -> None:
    _logger.info(message)
