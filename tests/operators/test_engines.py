"""Every engine, on every kind of network, kept or made anew, against dense matrices by PyTorch alone."""

import pytest

import hesscope as hs
from hesscope.operators.engines import ENGINES
from tests.helpers import relative_error
from tests.operators import zoo

MATRICES = {"hessian": hs.Hessian, "gauss_newton": hs.GaussNewton, "fisher": hs.EmpiricalFisher}


@pytest.mark.parametrize("memory", [None, 0], ids=["kept", "streamed"])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("name", zoo.NAMES)
def test_products(name, matrix, engine, memory):
    found = zoo.specimen(name)
    objective = hs.Objective(found.model, "cross_entropy", found.batch)
    operator, dense = MATRICES[matrix](objective, engine=engine, memory=memory), zoo.truth(name, matrix)
    for columns in (1, 8):
        V = zoo.probes(len(dense), columns)
        for _ in range(2):  # the second product is from what was kept
            assert relative_error(operator @ V, dense @ V) < 1e-9
    v = zoo.probes(len(dense), 1)[:, 0]
    assert relative_error(operator @ v, dense @ v) < 1e-9
    kept = engine != "forward_over_reverse" and memory is None
    assert ("1 of 1 batches kept" in operator.explain()) == kept
