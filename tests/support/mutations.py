"""Ten equations and laws broken one at a time: the fast lane must notice each of them.

python -m tests.support.mutations            all of them, a table; exit status 1 where one survives
python -m tests.support.mutations seed mask  these alone

Each is a change of one line in a copy of the working tree, tested by the files that a change there
concerns, without the slow lane.
"""

import dataclasses
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

from tests.support.paths import ROOT


@dataclasses.dataclass(frozen=True)
class Mutation:
    """One wrong line.

    Attributes:
      file: below opd_jax/. old, new: text of which `old` stands there exactly once.
      tests: files and folders below tests/.
    """

    file: str
    old: str
    new: str
    tests: tuple[str, ...]


MUTATIONS = {
    "sign": Mutation(
        "losses/advantage.py",
        "jax.lax.stop_gradient(teacher_logprob_BT - student_logprob_BT)",
        "jax.lax.stop_gradient(student_logprob_BT - teacher_logprob_BT)",
        ("losses/test_advantage.py",),
    ),
    "mask": Mutation(
        "training/batch.py",
        "scored_BT = mask_BT & counted_V[",
        "scored_BT = counted_V[",
        ("training/test_batch.py",),
    ),
    "shift": Mutation(
        "scoring/chunked.py",
        "_at(of.hidden_BTD, index_C - 1)",
        "_at(of.hidden_BTD, index_C)",
        ("scoring/test_score.py",),
    ),
    "clip side": Mutation(
        "losses/policy_gradient.py",
        "negative_BT = advantage_BT < 0",
        "negative_BT = advantage_BT > 0",
        ("losses/test_policy_gradient.py",),
    ),
    "normaliser": Mutation(
        "losses/token_weights.py",
        "(jnp.maximum(length_B1, 1.0) * jnp.maximum(responses, 1.0))",
        "(jnp.maximum(length_B1, 1.0) * length_B1.shape[0])",
        ("losses/test_token_weights.py",),
    ),
    "seed": Mutation(
        "rng.py",
        "jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), step), int(stream))",
        "jax.random.fold_in(jax.random.key(seed), int(stream))",
        ("test_rng.py",),
    ),
    "donated buffer": Mutation(
        "training/update.py",
        "@partial(jax.jit, donate_argnums=(0,))",
        "@jax.jit",
        ("training/test_update.py",),
    ),
    "stop-gradient": Mutation(
        "losses/policy_gradient.py",
        "logprob_BT - jax.lax.stop_gradient(sampler_logprob_BT)",
        "logprob_BT - sampler_logprob_BT",
        ("losses/test_constants.py",),
    ),
    "resume order": Mutation(
        "checkpoint/checkpoint.py",
        "data.set_state(self._iterator(step))",
        "self._iterator(step)",
        ("checkpoint/test_checkpoint.py",),
    ),
    "checksum": Mutation(
        "checkpoint/manifest.py",
        "check = zlib.crc32(chunk, check)",
        "check = zlib.crc32(b'', check)",
        ("checkpoint/test_manifest.py",),
    ),
}


def survives(mutation: Mutation, tree: pathlib.Path) -> tuple[bool, str]:
    """Whether every test passes with the mutation in `tree`, which is left as it was; pytest's last line."""
    file = tree / "opd_jax" / mutation.file
    text = file.read_text(encoding="utf-8")
    count = text.count(mutation.old)
    if count != 1:
        raise SystemExit(f"{mutation.file} has {count} times, wanted once: {mutation.old}")
    file.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider",
             *(f"tests/{name}" for name in mutation.tests)],
            cwd=tree, capture_output=True, text=True, check=False,
            env=os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"},
        )  # fmt: skip
    finally:
        file.write_text(text, encoding="utf-8")
    if done.returncode not in (0, 1):  # 1: tests failed
        raise SystemExit(f"pytest ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    failed = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
    return done.returncode == 0, failed[0].removeprefix("FAILED ") if failed else "no test failed"


def main(names: list[str]) -> int:
    """Run the named mutations, or all; print a table."""
    chosen = {name: MUTATIONS[name] for name in names or MUTATIONS}
    left = 0
    with tempfile.TemporaryDirectory(prefix="opd_jax_mutations_") as scratch:
        tree = pathlib.Path(scratch) / "tree"
        ignored = shutil.ignore_patterns(".git", ".venv*", "*_cache", "__pycache__", "runs")
        shutil.copytree(ROOT, tree, ignore=ignored)
        for name, mutation in chosen.items():
            began = time.monotonic()
            alive, text = survives(mutation, tree)
            left += alive
            state = "SURVIVES" if alive else "caught"
            print(
                f"{name:15} {state:8} {time.monotonic() - began:5.0f} s  {text[:110]}", flush=True
            )
    print(f"{len(chosen) - left} of {len(chosen)} caught")
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
