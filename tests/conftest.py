"""What all tests share: types checked at run time, several CPU devices, one hypothesis profile."""

import os
from pathlib import Path

import jaxtyping

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
