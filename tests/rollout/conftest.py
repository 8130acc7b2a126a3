"""One tiny model and one engine for all rollout tests, so that it is compiled once."""

import jax
import pytest
from decoding import ENDS, ENGINE, MODEL

from sdjax.models import decoder
from sdjax.parallel import single_device_mesh
from sdjax.rollout.engine import Engine


@pytest.fixture(scope="session")
def params():
    """Weights three times as large as at initialisation, so that distributions are not flat."""
    return jax.tree.map(lambda x: 3 * x, decoder.init_params(MODEL, jax.random.key(0)))


@pytest.fixture(scope="session")
def engine():
    """One engine for all tests that do not need another shape: compiled once."""
    return Engine(MODEL, ENGINE, single_device_mesh(), ENDS)
