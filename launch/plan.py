"""Plan: python launch/plan.py --config=FILE.py[:RECIPE] [--devices=4 --device_kind=h200] [--json].

Memory of each stage on each device, what fits, and an estimate of a step's time; nothing is loaded and no
device is needed. Exit status 1 where it does not fit. docs/memory.md, docs/measurements/scaling.md.
"""

import dataclasses
import json
import pathlib

from absl import flags

from opd_jax import cli, hardware

cli.define_config("configs/stable_opd.py")
flags.DEFINE_integer("devices", 1, "how many", lower_bound=1)
flags.DEFINE_enum("device_kind", "h200", list(hardware.DEVICES), "which")
flags.DEFINE_float("device_memory_gib", None, "memory of one; default that of the kind")
flags.DEFINE_bool("json", False, "print JSON in place of lines")
flags.DEFINE_bool("verify", False, "compile the programs and compare planned with compiled bytes")
flags.DEFINE_string(
    "target", "tests/h200/target_config.txtpb", "--verify: XLA's description of the GPU"
)


def main() -> None:
    """Print the plan."""
    from opd_jax.memory_plan import memory, report, verify, workload

    given = cli.FLAGS
    device = hardware.find(given.device_kind)
    if given.device_memory_gib is not None:
        device = dataclasses.replace(device, memory_gib=given.device_memory_gib)
    planned = memory.plan(workload.of_config(given.config, device, given.devices), device)
    plan = report.make(planned)
    if given.json:
        print(json.dumps(report.to_json(plan), indent=2), flush=True)
    else:
        print(*report.lines(plan), "", report.table(plan), sep="\n", flush=True)
    if given.verify:
        rows = verify.compare(given.config, planned.workload, device, pathlib.Path(given.target))
        print("\n" + verify.table(rows), flush=True)
    memory.require_fit(planned)


if __name__ == "__main__":
    cli.main(main)
