"""The examples in docstrings run and print what they say."""

import doctest
import importlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant

PACKAGE = Path(jaxquant.__file__).parent
MODULES = sorted(
    ".".join(("jaxquant", *path.relative_to(PACKAGE).with_suffix("").parts))
    for path in PACKAGE.rglob("*.py")
    if ">>> " in path.read_text()
)


@pytest.mark.parametrize("name", MODULES)
def test_doctest(name):
    module = importlib.import_module(name)
    names = {"jax": jax, "jnp": jnp, "np": np, "jq": jaxquant, **vars(module)}
    result = doctest.testmod(module, globs=names, optionflags=doctest.ELLIPSIS)
    assert result.attempted > 0
    assert result.failed == 0


def test_the_core_has_examples():
    core = {"jaxquant.config", "jaxquant.blocked", "jaxquant.tree", "jaxquant.matmul.api"}
    assert core <= set(MODULES)
