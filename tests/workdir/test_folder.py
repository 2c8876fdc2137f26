"""Which configs go on with a workdir."""

import json

import pytest

from opd_jax import config as configuration
from opd_jax import workdir
from opd_jax.errors import WorkdirError


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"loss.kl_estimator": "k3", "loss.beta_kl": 0.1}, "loss.kl_clamp: 0.0 there, 10.0 now"),
        (
            {"loss.group_coef": 1.0},
            "grading.grader: 'that of an older version' there, 'guarded' now",
        ),
    ],
)
def test_a_run_of_an_older_version_does_not_get_another_objective_unsaid(tmp_path, fields, field):
    config = configuration.default()
    config.update_from_flattened_dict(fields)
    old = json.loads(configuration.to_json(config))
    del old["loss"]["kl_clamp"], old["grading"], old["scoring"]["temperature"]
    (tmp_path / "config.json").write_text(json.dumps(old))
    with pytest.raises(WorkdirError, match=f"belongs to another config .{field}"):
        workdir.check(tmp_path, config)
    assert len(workdir.check(tmp_path, config, accept=True)) == 1


def test_fields_that_came_later_and_change_nothing_are_no_difference(tmp_path):
    config = configuration.default()
    old = json.loads(configuration.to_json(config))
    del old["loss"]["kl_clamp"], old["grading"], old["scoring"]["temperature"]
    (tmp_path / "config.json").write_text(json.dumps(old))
    assert workdir.check(tmp_path, config) == []
