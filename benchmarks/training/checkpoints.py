"""Checkpoints from which a run that was killed goes on bit by bit."""

import json
import os
import shutil
import sys
import textwrap
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.tree_util as jtu
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from .errors import CheckpointError, first_line, OutputError


_Found = TypeVar("_Found")
_State = TypeVar("_State", bound=PyTree)

Facts = Mapping[str, Any]


class Checkpoints:
    """The last two checkpoints of a run, by Orbax.

    They are written beside the training, and have their names only when they are
    complete, so that whenever a run is killed, the newest one is whole. If a disk has
    damaged it since, the one before is taken: every checkpoint has the checksums of
    its arrays, and notes in JSON.
    """

    def __init__(self, folder: Path, *, create: bool = True):
        if create:
            # Orbax makes it beside the training, where an error is not seen.
            folder.mkdir(parents=True, exist_ok=True)
        elif not folder.is_dir():
            raise CheckpointError(f"There is no folder {folder} with checkpoints.")
        self.folder = folder.absolute()
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(max_to_keep=2, create=False),
        )

    def newest(self, load: Callable[[int], _Found]) -> tuple[int, _Found] | None:
        """The newest checkpoint that can be loaded, and what was loaded of it. Without
        any checkpoint it is `None`."""
        damaged: dict[int, str] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                found = load(step)
            except CheckpointError:
                raise
            except Exception as error:  # Orbax raises many, of all kinds.
                damaged[step] = textwrap.shorten(first_line(error), 120)
                continue
            for other, text in damaged.items():
                print(
                    f"The checkpoint of step {other} in {self.folder} is damaged "
                    f"({text}): the one of step {step} is taken.",
                    file=sys.stderr,
                )
            return step, found
        if not damaged:
            return None
        reasons = "; ".join(f"step {step}: {text}" for step, text in damaged.items())
        raise CheckpointError(
            f"No checkpoint in {self.folder} can be read ({reasons}). Remove the "
            "folder, or give another --output-dir."
        )

    def latest_step(self) -> int | None:
        """The step of the newest checkpoint."""
        return self._manager.latest_step()

    def set_newer_aside(self, step: int) -> None:
        """Move those that are damaged out of the way of a run that goes on."""
        newer = [other for other in self._manager.all_steps() if other > step]
        if not newer:
            return
        if jax.process_index() == 0:
            for other in newer:
                aside = self.folder.parent / f"damaged-{other}"
                shutil.rmtree(aside, ignore_errors=True)
                os.rename(self.folder / str(other), aside)
        ocp.multihost.sync_global_processes("damaged checkpoints")
        self._manager.reload()

    def notes(self, step: int) -> dict[str, Any]:
        """What was noted with the state of a step."""
        args = ocp.args.Composite(notes=ocp.args.JsonRestore())
        return self._manager.restore(step, args=args)["notes"]

    def restore(self, step: int, like: _State) -> _State:
        """The state at a step, of the structure and on the devices of another one.

        The checkpoint may have more than that.
        """
        arrays, others = eqx.partition(like, eqx.is_array)
        wanted, treedef = _named(arrays)
        saved = self.notes(step)["arrays"]
        somewhere = next(iter(wanted.values())).sharding
        structs = {}
        for name, (shape, dtype, _) in saved.items():
            sharding = wanted[name].sharding if name in wanted else somewhere
            structs[name] = jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(structs))
        restored = self._manager.restore(step, args=args)["state"]
        for name, struct in structs.items():
            _check_array(name, restored[name], struct, saved[name][2])
        for name, leaf in wanted.items():
            found = structs.get(name)
            if found is None or (found.shape, found.dtype) != (leaf.shape, leaf.dtype):
                raise WrongTreeError(
                    f"{name} is {_describe(found)}, and this model's is "
                    f"{_describe(leaf)}"
                )
        leaves = [restored[name] for name in wanted]
        return eqx.combine(jtu.tree_unflatten(treedef, leaves), others)

    def save(self, step: int, state: PyTree, notes: Facts) -> None:
        """Begin to write a checkpoint, and return as soon as the arrays are copied."""
        if step in self._manager.all_steps():
            return
        named, _ = _named(eqx.filter(state, eqx.is_array))
        arrays = {
            name: (leaf.shape, str(leaf.dtype), _checksum(leaf))
            for name, leaf in named.items()
        }
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(named),
                    notes=ocp.args.JsonSave(as_json({**notes, "arrays": arrays})),
                ),
                force=True,
            )
        except ValueError as error:  # of TensorStore, from a full disk
            raise self._not_written(error) from error

    def replace(self, step: int, state: PyTree, notes: Facts) -> None:
        """Write a checkpoint, and remove all others."""
        others = self._manager.all_steps()
        if step in others:
            self._manager.delete(step)
        self.save(step, state, notes)
        self._finish(self._manager.wait_until_finished)
        for other in others:
            if other != step:
                self._manager.delete(other)

    def close(self) -> None:
        """Wait until everything is written."""
        self._finish(self._manager.close)

    def _finish(self, wait: Callable[[], None]) -> None:
        try:
            wait()
        except ValueError as error:
            raise self._not_written(error) from error

    def _not_written(self, error: ValueError) -> OutputError:
        return OutputError(f"{self.folder} cannot be written ({first_line(error)}).")


class WrongTreeError(ValueError):
    """How the arrays of a checkpoint are not those of a model."""


def as_json(notes: Facts) -> dict[str, Any]:
    """Notes as they come back from a file: tuples are lists, and paths are strings."""
    return json.loads(json.dumps(notes, default=str, allow_nan=False))


def check_facts(wanted: Facts, found: Facts, folder: Path) -> None:
    """Raise a `CheckpointError` for the first fact that is not what it was."""
    found, wanted = _flatten(found), _flatten(as_json(wanted))
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            raise CheckpointError(
                f"The checkpoint in {folder} is of a run with "
                f"{name} = {found.get(name)}, and this one has "
                f"{wanted.get(name)}: give the same options, or another --output-dir."
            )


def _named(arrays: PyTree) -> tuple[dict[str, jax.Array], Any]:
    paths, treedef = jtu.tree_flatten_with_path(arrays)
    return {jtu.keystr(path): leaf for path, leaf in paths}, treedef


def _checksum(array: jax.Array) -> int | None:
    # Of what is split over several processes, none has all.
    if not (array.is_fully_addressable or array.is_fully_replicated):
        return None
    return zlib.crc32(np.ascontiguousarray(array).tobytes())


def _check_array(
    name: str, array: jax.Array, struct: jax.ShapeDtypeStruct, checksum: int | None
) -> None:
    # Orbax has given it the type that was asked for.
    if checksum is not None and _checksum(array) not in (None, checksum):
        raise ValueError(f"{name} is not what was written")
    if array.shape != struct.shape:
        raise ValueError(f"{name} has the shape {array.shape}, not {struct.shape}")


def _describe(array: Any) -> str:
    if array is None:
        return "missing"
    return f"{array.dtype}[{', '.join(map(str, array.shape))}]"


def _flatten(config: Facts, prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
