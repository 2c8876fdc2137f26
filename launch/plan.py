"""Plan: python launch/plan.py --config=FILE.py[:RECIPE] [--devices=4 --device_kind=h200] [--json].

Prints the memory of each stage per device, the largest sizes that fit, and an estimate of the time of a
step. It loads no weights and needs no device. The exit status is 1 if the run does not fit.
See docs/memory.md and docs/measurements/scaling.md.
"""

import dataclasses
import json
import pathlib

from absl import flags

from opd_jax import cli, hardware

cli.define_config("configs/stable_opd.py")
flags.DEFINE_integer("devices", 1, "number of devices", lower_bound=1)
flags.DEFINE_enum("device_kind", "h200", list(hardware.DEVICES), "kind of the devices")
flags.DEFINE_float(
    "device_memory_gib", None, "memory of one device in GiB; default: that of --device_kind"
)
flags.DEFINE_bool("json", False, "print the plan as JSON instead of text")
flags.DEFINE_bool("verify", False, "compile the programs, and compare planned with compiled bytes")
flags.DEFINE_string(
    "target", "tests/h200/target_config.txtpb", "XLA's description of the GPU, for --verify"
)


def main() -> None:
    """Print the plan."""
    from opd_jax.memory_plan import memory, report, verify, workload

    options = cli.FLAGS
    device = hardware.find(options.device_kind)
    if options.device_memory_gib is not None:
        device = dataclasses.replace(device, memory_gib=options.device_memory_gib)
    memory_plan = memory.plan(workload.of_config(options.config, device, options.devices), device)
    run_plan = report.make(memory_plan)
    if options.json:
        print(json.dumps(report.to_json(run_plan), indent=2), flush=True)
    else:
        print(*report.lines(run_plan), "", report.table(run_plan), sep="\n", flush=True)
    if options.verify:
        target = pathlib.Path(options.target)
        rows = verify.compare(options.config, memory_plan.workload, device, target)
        print("\n" + verify.table(rows), flush=True)
    memory.require_fit(memory_plan)


if __name__ == "__main__":
    cli.main(main)
