"""Energies over all class blocks against brute force over every block, and against the theory at large C."""

import pytest
import torch

from hesscope.core.errors import InputError, TooLargeError
from hesscope.operators.closed_form import OutputLayerEnergies, output_layer_blocks, output_layer_energies
from hesscope.theory import static_force

N, D, C = 40, 6, 50


def layer(scale=1.0, dtype=torch.float64, classes=C):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(N, D, generator=generator, dtype=torch.float64).to(dtype)
    weight = (torch.randn(classes, D, generator=generator, dtype=torch.float64) * scale / D**0.5).to(dtype)
    return features, weight


def brute_force(features, logits):
    """[C, C] energies from all C^2 blocks H_ij = (1/N) sum_n A_n[i, j] h_n h_n^T, formed in float64."""
    h, p = features.double(), torch.softmax(logits.double(), dim=1)
    A = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    return (torch.einsum("nij,nk,nl->ijkl", A, h, h) / len(h)).square().sum(dim=(2, 3))


@pytest.mark.parametrize("memory", [2**30, 40_000, 4_000], ids=["one tile", "some tiles", "many tiles"])
@pytest.mark.parametrize("given", ["logits", "weight"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
@pytest.mark.parametrize("scale", [0.1, 1.0, 4.0])
def test_equals_brute_force(given, memory, dtype, tolerance, scale):
    features, weight = layer(scale, dtype)
    expected = brute_force(features, features.double() @ weight.double().T)
    arguments = {"logits": features @ weight.T} if given == "logits" else {"weight": weight}
    found = output_layer_energies(features, **arguments, memory=memory)
    off = expected.clone().fill_diagonal_(0).sum()
    assert found.diagonal == pytest.approx(float(expected.trace()), rel=tolerance)
    assert found.off_diagonal == pytest.approx(float(off), rel=tolerance)
    assert found.ratio == pytest.approx(float(off / expected.trace() / (C - 1)), rel=2 * tolerance)
    torch.testing.assert_close(torch.from_numpy(found.per_class), expected.diag(), rtol=tolerance, atol=0)


def test_a_trained_head_whose_probabilities_are_nearly_one_keeps_its_digits():
    """Here the off-diagonal energy is a difference of nearly equal float32 numbers."""
    features, weight = layer(60.0, torch.float32)
    exact = output_layer_energies(features.double(), weight=weight.double())
    assert output_layer_energies(features, weight=weight).off_diagonal == pytest.approx(exact.off_diagonal, rel=1e-3)


@pytest.mark.parametrize("memory", [2**30, 4_000], ids=["one tile", "many tiles"])
def test_progress_counts_every_tile_once_and_ends_at_the_whole(memory):
    features, weight = layer()
    seen = []
    output_layer_energies(features, weight=weight, memory=memory, progress=lambda *step: seen.append(step))
    assert seen == [(done, len(seen)) for done in range(1, len(seen) + 1)]
    assert (len(seen) > 10) == (memory == 4_000)


def exact_energies(features, logits):
    """Diagonal and off-diagonal energy in exact arithmetic but for the exponentials: 1 - p from the other classes."""
    import mpmath

    mpmath.mp.dps = 300
    N, C = logits.shape
    rows = [[mpmath.exp(mpmath.mpf(float(x))) for x in row] for row in logits]
    p = [[x / sum(row) for x in row] for row in rows]
    gram = (features.double() @ features.double().T).square()
    q = [[x * (sum(row) - x) / sum(row) ** 2 for x in row] for row in rows]
    diagonal = off = mpmath.mpf(0)
    for n in range(N):
        for m in range(N):
            weight = mpmath.mpf(float(gram[n, m]))
            w = [p[n][i] * p[m][i] for i in range(C)]
            diagonal += weight * sum(q[n][i] * q[m][i] for i in range(C))
            off += weight * (sum(w) ** 2 - sum(x * x for x in w))
    return float(diagonal / N**2), float(off / N**2)


CERTAIN = [(1, 2, 300, 10), (3, 2, 300, 10), (5, 3, 0, 30), (7, 9, 15, 20), (10, 10, 100, 12), (6, 5, 0, 0)]
CASES = [(*case, dtype) for case in CERTAIN for dtype in (torch.float64, torch.float32)]
# Beyond a margin of 44 the squares of probabilities underflow in float32.
CASES.append((6, 3, 0, 300, torch.float64))


@pytest.mark.parametrize("memory", [2**30, 8000])
@pytest.mark.parametrize(("samples", "classes", "shift", "margin", "dtype"), CASES)
def test_certain_predictions_cost_no_digits(samples, classes, shift, margin, memory, dtype):
    """float64 to 1e-10 and float32 to 1e-4 where 1 - p is far below rounding; a plain softmax gives 0 or noise."""
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(samples, 4, generator=generator).to(dtype)
    logits = torch.randn(samples, classes, generator=generator) + shift
    logits[torch.arange(samples), torch.randint(0, classes, (samples,), generator=generator)] += margin
    found = output_layer_energies(features, logits.to(dtype), memory=memory)
    diagonal, off = exact_energies(features, logits)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    assert found.diagonal == pytest.approx(diagonal, rel=tolerance, abs=0)
    assert found.off_diagonal == pytest.approx(off, rel=tolerance, abs=0)
    if classes == 2:
        assert found.ratio == pytest.approx(1, rel=tolerance)


def test_a_record_survives_xarray():
    features, weight = layer()
    energies = output_layer_energies(features, weight=weight)
    again = OutputLayerEnergies.from_xarray(energies.to_xarray())
    assert (again.per_class == energies.per_class).all()
    for name in ("diagonal", "off_diagonal", "ratio", "diagonality", "samples", "classes", "provenance"):
        assert getattr(again, name) == getattr(energies, name)
    assert energies.to_xarray().attrs["ratio"] == energies.ratio
    with pytest.raises(InputError, match="record 'OutputLayerEnergies'"):
        OutputLayerEnergies.from_xarray(energies.to_xarray().assign_attrs(record="BlockEnergies"))


def test_blocks_of_chosen_classes():
    features, weight = layer()
    expected = brute_force(features, features @ weight.T)
    chosen = [3, 40, 7]
    found = torch.from_numpy(output_layer_blocks(features, chosen, weight=weight))
    torch.testing.assert_close(found, expected[chosen][:, chosen], rtol=1e-10, atol=0)


def test_a_bias_shifts_the_logits():
    features, weight = layer()
    bias = torch.linspace(-1, 1, C, dtype=torch.float64)
    with_bias = output_layer_energies(features, weight=weight, bias=bias)
    from_logits = output_layer_energies(features, logits=features @ weight.T + bias)
    assert with_bias.ratio == pytest.approx(from_logits.ratio, rel=1e-12)
    assert with_bias.ratio != pytest.approx(output_layer_energies(features, weight=weight).ratio, rel=1e-3)


def test_huge_logits_do_not_overflow():
    features, weight = layer()
    shifted = output_layer_energies(features, logits=features @ weight.T + 1e6)
    assert shifted.ratio == pytest.approx(output_layer_energies(features, weight=weight).ratio, rel=1e-8)


def test_two_classes_have_ratio_one():
    """A_n = pq [[1, -1], [-1, 1]]: all four blocks agree up to sign (MATH.md, section 4.3)."""
    features, weight = layer(classes=2)
    assert output_layer_energies(features, weight=weight).ratio == pytest.approx(1.0, rel=1e-12)


@pytest.mark.parametrize("classes", [32_000, 131_072])
def test_agrees_with_the_theory(classes):
    """Linear model at initialization, MATH.md section 4.3; 5 % as stated, nearly all of it from d = 256."""
    samples, d = 1024, 256
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(samples, d, generator=generator)
    weight = torch.randn(classes, d, generator=generator) / d**0.5
    predicted = static_force("linear", "cross_entropy", classes, d / samples).output_ratio
    assert output_layer_energies(features, weight=weight).ratio == pytest.approx(predicted, rel=0.05)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"logits": torch.zeros(3, 5)}, "features have N = 40 rows, but logits have 3"),
        ({"weight": torch.zeros(5, 3)}, "features have d = 6 columns, but weight has 3"),
        ({}, "either logits"),
        ({"logits": torch.zeros(40, 5), "weight": torch.zeros(5, 6)}, "either logits"),
        ({"logits": torch.zeros(40, 1)}, "at least 2 classes"),
        ({"logits": torch.full((40, 5), torch.nan)}, "logits holds values that are not finite"),
        ({"logits": torch.zeros(40, 5, dtype=torch.float64)}, "must be torch.float32"),
        ({"weight": torch.zeros(5, 6), "bias": torch.zeros(4)}, "one entry per row of weight"),
        ({"logits": torch.zeros(40)}, "2 dimensions"),
    ],
)
def test_bad_input(changes, words):
    with pytest.raises(InputError, match=words):
        output_layer_energies(torch.zeros(40, 6), **changes)


def test_a_memory_budget_below_one_tile_is_refused():
    features, weight = layer()
    with pytest.raises(TooLargeError, match="too small for one tile"):
        output_layer_energies(features, weight=weight, memory=100)
