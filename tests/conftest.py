"""Settings of every test: CPU, no network, and accidental broadcasting is an error."""

import atexit
import gc
import math
import os
import pathlib
import shutil
import tempfile
import time

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Many tests make whole runs of the same shapes: each program is compiled once a session, also in the
# processes that tests start and in those that `-n` divides the session among. Set, the variable names a
# folder that several sessions share, as those of .ci/run do.
os.environ["OPD_JAX_TEST_PROGRAMS"] = os.environ.get("OPD_JAX_TEST_PROGRAMS") or tempfile.mkdtemp(
    prefix=f"opd_jax_tests_{os.getpid()}_"
)
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ["OPD_JAX_TEST_PROGRAMS"]
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from launch.make_tiny import make_tokenizer
from opd_jax import models
from opd_jax.models import ModelConfig, decoder
from tests.support import real_data

jax.config.update("jax_numpy_rank_promotion", "raise")
if f"opd_jax_tests_{os.getpid()}_" in os.environ["OPD_JAX_TEST_PROGRAMS"]:  # made above
    atexit.register(shutil.rmtree, os.environ["OPD_JAX_TEST_PROGRAMS"], ignore_errors=True)

BEGAN = time.monotonic()
FAST_LANE = "not slow and not real"  # of pyproject.toml
QUICK_FLAGS = (
    "--xla_cpu_use_fusion_emitters=false"  # MLIR takes more than half of a small compilation
)


def pytest_configure(config) -> None:
    """The fast lane checks equations, not XLA: its own process compiles as quickly as XLA can.

    Compilation takes most of the time. Other lanes, and processes that tests start, compile as a run does.
    """
    if config.getoption("markexpr") == FAST_LANE:
        jax.config.update("jax_disable_most_optimizations", True)
        before = os.environ.get("XLA_FLAGS")
        os.environ["XLA_FLAGS"] = f"{before or ''} {QUICK_FLAGS}"
        jax.devices()  # reads them, once a process
        del os.environ["XLA_FLAGS"]
        if before is not None:
            os.environ["XLA_FLAGS"] = before


def pytest_collection_finish(session) -> None:
    """What modules hold stays to the end: a collection of garbage need not look at it each time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


def pytest_addoption(parser) -> None:
    """`--session-seconds`: a lane that must end by then says which tests it has left out."""
    parser.addoption(
        "--session-seconds",
        type=float,
        default=math.inf,
        help="skip the tests that have not begun after so many seconds",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item) -> None:
    """Skip what begins too late; fixtures are not made for it."""
    if time.monotonic() - BEGAN > item.config.getoption("--session-seconds"):
        pytest.skip("the time of this lane is used up (--session-seconds)")


def pytest_terminal_summary(terminalreporter) -> None:
    """Name the benchmark files that are not here: tests that read them have been skipped."""
    absent = real_data.absent()
    if absent:
        terminalreporter.section("benchmark files that are absent")
        terminalreporter.line(
            f"{', '.join(absent)}: not in {real_data.FOLDER} (OPD_JAX_DATA); tests that read them do not run"
        )


@pytest.fixture(scope="module", autouse=True)
def programs_of_one_module():
    """Compiled programs are kept for one module of tests: few are shared, and a session's take gigabytes."""
    yield
    jax.clear_caches()


@pytest.fixture
def strict_dtypes():
    """No silent float32 <-> bfloat16 promotion (optax does not survive this globally)."""
    with jax.numpy_dtype_promotion("strict"):
        yield


def tiny_config(**changes: object) -> ModelConfig:
    """A three-layer model of 99 tokens that a test can afford."""
    fields = {
        "model_type": "qwen2", "vocab_size": 99, "hidden_size": 32, "intermediate_size": 48,
        "num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "rope_theta": 1e4,
        "rms_norm_eps": 1e-6, "max_position": 256, "tie_embeddings": True, "qkv_bias": True,
        "qk_norm": False, "eos_token_ids": (1,),
    }  # fmt: skip
    return ModelConfig(**(fields | changes))  # type: ignore[arg-type]


def random_params(config: ModelConfig, seed: int = 0, scale: float = 5.0) -> decoder.Params:
    """Random weights, scaled up so that the model's distributions are far from uniform."""
    params = decoder.init(jax.random.key(seed), config)
    return jax.tree.map(lambda w: w * scale if w.ndim > 1 else w, params)


def noisy_params(config: ModelConfig, seed: int = 0) -> decoder.Params:
    """Like `random_params`, but biases and norms are random too; made by numpy, without compiling."""
    generator = np.random.default_rng(seed)

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        noise = 0.1 * generator.standard_normal(leaf.shape)
        return jnp.asarray(noise + (path[-1].key == "scale"), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, decoder.abstract_params(config))


def random_rows(config: ModelConfig, rows: int, width: int, seed: int = 0):
    """Tokens [rows, width] and lengths [rows], right-padded with zeros."""
    generator = np.random.default_rng(seed)
    length = generator.integers(width // 2, width + 1, rows).astype(np.int32)
    tokens = generator.integers(2, config.vocab_size, (rows, width)).astype(np.int32)
    tokens[np.arange(width)[None] >= length[:, None]] = 0
    return jnp.asarray(tokens), jnp.asarray(length)


def distance(a: object, b: object) -> float:
    """|a - b| / |b| over two whole trees of arrays, in float64."""
    a, b = (
        np.concatenate([np.ravel(np.asarray(x, np.float64)) for x in jax.tree.leaves(tree)])
        for tree in (a, b)
    )
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.fixture
def update_golden() -> bool:
    """UPDATE_GOLDEN=1 pytest rewrites the stored values; the diff is reviewed."""
    return os.environ.get("UPDATE_GOLDEN") == "1"


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> pathlib.Path:
    """Folders `student` and `teacher`: random weights, the tokenizer of the embedded models."""
    root = tmp_path_factory.mktemp("models")
    tokenizer = make_tokenizer()
    for seed, (name, width) in enumerate({"student": 16, "teacher": 32}.items()):
        model = ModelConfig(
            model_type="qwen2", vocab_size=len(tokenizer), hidden_size=width, intermediate_size=32,
            num_layers=2, num_heads=2, num_kv_heads=1, head_dim=width // 2, rope_theta=1e4,
            rms_norm_eps=1e-6, max_position=160, tie_embeddings=True, qkv_bias=True, qk_norm=False,
            eos_token_ids=(tokenizer.eos_token_id,),
        )  # fmt: skip
        models.save(str(root / name), model, decoder.init(jax.random.key(seed), model), tokenizer)
    return root
