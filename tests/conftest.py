"""What all tests share: types checked at run time, several CPU devices, one hypothesis profile.

They run on a CPU, wherever they are. With JAXQUANT_TEST_GPU=1, those that have kernels run
(`hopper`) run on this machine's Hopper GPU instead, and no others.
"""

import os
from pathlib import Path

import jaxtyping
from hopper import ON_GPU

if not ON_GPU:
    os.environ["JAX_PLATFORMS"] = "cpu"  # of other processes, too

# Signatures that say shapes are checked, in tests only. The hook acts on imports, so it stands
# before the first one of the package; the modules are found by their text for the same reason.
PACKAGE = Path(__file__).parent.parent / "jaxquant"
jaxtyping.install_import_hook(
    [
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        for path in PACKAGE.rglob("*.py")
        if "from jaxtyping import" in path.read_text()
    ],
    "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))",
)

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_num_cpu_devices", 4)

hypothesis.settings.register_profile("dev", deadline=None, max_examples=25)
hypothesis.settings.register_profile(
    "ci", deadline=None, max_examples=25, derandomize=True, database=None
)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "dev")


def pytest_collection_modifyitems(config, items):
    def is_ours(item):
        return "hopper" in item.fixturenames if ON_GPU else not item.get_closest_marker("gpu")

    config.hook.pytest_deselected(items=[item for item in items if not is_ours(item)])
    items[:] = filter(is_ours, items)


def pytest_sessionstart():
    if ON_GPU:
        from jaxquant.hopper import multiprocessors

        try:
            multiprocessors(jax.numpy.zeros(()), "tests")
        except NotImplementedError as reason:
            pytest.exit(f"JAXQUANT_TEST_GPU is 1: {reason}", returncode=4)


@pytest.fixture
def unchecked():
    """Bad input reaches the package's own checks, as it does for users."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(autouse=True, scope="module")
def _no_programs_of_other_modules():
    # Each compiled program is several maps of memory, of which a process may have 65530: all
    # tests' programs together are more, and the compiler then crashes.
    yield
    jax.clear_caches()
