"""Checkpoints from which a run that was killed goes on bit by bit."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.tree_util as jtu
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from .errors import CheckpointError


_State = TypeVar("_State", bound=PyTree)


class Checkpoints:
    """The last checkpoints of a run, by Orbax.

    They are written beside the training, and have their names only when they are
    complete, so that whenever a run is killed, the newest one is whole.

    Checkpoints of another `config`, which is all that decides how a run goes, are
    refused.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any]):
        # As it comes back from a file: tuples are lists, paths are strings.
        self._config = json.loads(json.dumps(config, default=str))
        self._manager = ocp.CheckpointManager(
            folder.absolute(), options=ocp.CheckpointManagerOptions(max_to_keep=2)
        )

    def latest_step(self) -> int | None:
        """The step of the newest checkpoint."""
        step = self._manager.latest_step()
        if step is None:
            return None
        args = ocp.args.Composite(config=ocp.args.JsonRestore())
        found = _flatten(self._manager.restore(step, args=args)["config"])
        wanted = _flatten(self._config)
        for name in sorted(found.keys() | wanted.keys()):
            if found.get(name) != wanted.get(name):
                raise CheckpointError(
                    f"The checkpoint in {self._manager.directory} is of a run with "
                    f"{name} = {found.get(name)}, and this one has "
                    f"{wanted.get(name)}: give the same options, or another "
                    "--output-dir."
                )
        return step

    def restore(self, step: int, like: _State) -> _State:
        """The state at a step, of the structure and on the devices of another one."""
        arrays, others = eqx.partition(like, eqx.is_array)
        names, treedef = _named(arrays)
        structs = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
            for name, leaf in names.items()
        }
        args = ocp.args.Composite(state=ocp.args.StandardRestore(structs))
        restored = self._manager.restore(step, args=args)["state"]
        leaves = [restored[name] for name in names]
        return eqx.combine(jtu.tree_unflatten(treedef, leaves), others)

    def save(self, step: int, state: PyTree) -> None:
        """Begin to write a checkpoint, and return as soon as the arrays are copied."""
        names, _ = _named(eqx.filter(state, eqx.is_array))
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(names),
                config=ocp.args.JsonSave(self._config),
            ),
        )

    def close(self) -> None:
        """Wait until everything is written."""
        self._manager.close()


def _named(arrays: PyTree) -> tuple[dict[str, jax.Array], Any]:
    paths, treedef = jtu.tree_flatten_with_path(arrays)
    return {jtu.keystr(path): leaf for path, leaf in paths}, treedef


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
