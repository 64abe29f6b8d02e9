"""SciML's network, and the study of its tutorial."""

import json
from typing import Any

import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from benchmarks.training.sciml import SciMLClassifier, SciMLConfig
from benchmarks.training.studies.sciml_tutorial import (
    LOGS,
    NAME,
    Table,
    TutorialSettings,
)


pytestmark = pytest.mark.one_precision


def test_the_head_sees_means_of_windows():
    model = SciMLClassifier(SciMLConfig(channels=2, windows=3), key=jr.key(0))
    features = jr.normal(jr.key(1), (2, 13, 13))
    found = model.head[2](features)
    # Windows of 5, 4 and 4 pixels.
    parts = [jnp.split(rows, (5, 9), axis=2) for rows in jnp.split(features, (5, 9), 1)]
    means = jnp.stack([jnp.mean(part, (1, 2)) for row in parts for part in row], 1)
    np.testing.assert_allclose(found, jnp.ravel(means), rtol=1e-5)
    one = SciMLClassifier(SciMLConfig(channels=2), key=jr.key(0))
    np.testing.assert_allclose(
        one.head[2](features), jnp.mean(features, axis=(1, 2)), rtol=1e-5
    )


def test_weights_are_drawn_as_in_lux():
    model = SciMLClassifier(SciMLConfig(model_type="skipdeq"), key=jr.key(0))
    layers = {
        9: model.stem[0],
        16 * 64: model.stem[3],
        9 * 64: model.deq.init[0],
        64: model.head[3],
    }
    for fan_in, layer in layers.items():
        assert jnp.max(jnp.abs(layer.weight)) == pytest.approx(
            (3 / fan_in) ** 0.5, 0.02
        )
        assert jnp.std(layer.weight) == pytest.approx(fan_in**-0.5, 0.05)
        assert 0.8 * fan_in**-0.5 < jnp.max(jnp.abs(layer.bias)) < fan_in**-0.5
    cell: Any = model.deq.cell
    weights = np.stack([layer.weight for layer in (cell.state, cell.inject, cell.mix)])
    np.testing.assert_allclose(weights.std(axis=(1, 2, 3, 4)), 0.01, rtol=0.02)
    # Normal: one in twenty is beyond two deviations, and no two layers are alike.
    assert np.mean(np.abs(weights) > 0.02) == pytest.approx(0.0455, rel=0.05)
    correlations = np.corrcoef(weights.reshape(3, -1)) - np.eye(3)
    assert np.abs(correlations).max() < 0.02


def row(model, phase):
    return {"model": model, "phase": phase, "accuracy (%)": 70.0}


def test_table_goes_on_from_its_file_and_has_the_logs(tmp_path, capsys):
    settings = TutorialSettings(output_dir=tmp_path)
    table = Table(settings)
    for name in (("skipdeq", "adams"), ("deq", "adams"), ("deq", "pretraining")):
        table.add(row(*name), {"seeds": 5})
    table = Table(settings)
    assert table.find("deq", "adams", {"seeds": 5}) == row("deq", "adams")
    assert table.find("deq", "adams", {"seeds": 4}) is None
    assert table.find("deq", "broyden", {"seeds": 5}) is None
    # One with other settings is replaced.
    table.add(row("deq", "adams") | {"accuracy (%)": 71.0}, {"seeds": 4})
    tables = json.loads((tmp_path / f"{NAME}.json").read_text())["tables"]
    rows = {(row["model"], row["phase"]): row for row in tables["rows"]}
    assert len(rows) == len(tables["rows"]) == 18
    assert [name for name, row in rows.items() if "accuracy (%)" in row] == [
        ("deq", "pretraining"),
        ("deq", "adams"),
        ("skipdeq", "adams"),
    ]
    assert rows["skipdeq", "tsit5"]["of each seed (%)"] == "not run"
    # Skip DEQs are not in the logs, and every other phase is there twice.
    assert [line["accuracy (%)"] for line in tables["logs"]] == [
        *(70.0, 64.4, 51.8),
        *(71.0, 70.8, 70.4),
        *(None, 66.6, 68.4),
        *(None, 76.2, 73.8),
    ]
    assert {*tables["logs"][0]} == {*LOGS[0], "evaluations"}
