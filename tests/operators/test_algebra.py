"""Products, sums, conversions and refusals of operators."""

import numpy as np
import pytest
import scipy.sparse
import scipy.sparse.linalg
import torch

import hesscope as hs
from hesscope.core.errors import InputError, TooLargeError
from tests.helpers import F64, build, cut, inputs_for, randint, randn, relative_error

N = 12


@pytest.fixture(scope="module")
def objective():
    return hs.Objective(build("tanh"), "cross_entropy", cut(inputs_for("tanh", N), randint(3, N, seed=2)))


@pytest.fixture(scope="module", name="H")
def hessian(objective):
    return hs.Hessian(objective)


@pytest.fixture(scope="module", name="G")
def gauss_newton(objective):
    return hs.GaussNewton(objective)


@pytest.fixture(scope="module")
def size(objective):
    return objective.parameters.size


def test_shape_dtype_device(H, size):
    assert H.shape == (size, size)
    assert H.dtype == F64
    assert H.device == torch.device("cpu")


@pytest.mark.parametrize("columns", [None, 0, 1, 3])
def test_product_with_vector_and_matrix(H, G, size, columns):
    right = randn(size, seed=8) if columns is None else randn(size, columns, seed=8)
    for operator in (H, G):
        product = operator @ right
        assert product.shape == right.shape
        assert not product.requires_grad
        assert torch.allclose(product, operator.dense() @ right, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("columns", [1, 4])
def test_number_of_columns_a_pass_changes_nothing(H, G, size, columns, monkeypatch):
    truth = [H.dense(), G.dense()]
    for operator in (type(H), type(G)):
        monkeypatch.setattr(operator, "columns_per_pass", columns)
    for operator, matrix in zip((H, G), truth, strict=True):
        assert relative_error(operator.dense(), matrix) < 1e-13


def test_the_right_hand_side_may_require_grad_and_is_not_changed(H, size):
    v = randn(size, seed=9).requires_grad_()
    before = v.detach().clone()
    assert not (H @ v).requires_grad
    assert torch.equal(v.detach(), before)
    assert v.grad is None


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_works_where_gradients_are_switched_off(H, G, size, mode):
    with mode():
        v = randn(size, seed=9)
        products = [operator @ v for operator in (H, G)]
        matrices = [operator.dense() for operator in (H, G)]
    for operator, product, matrix in zip((H, G), products, matrices, strict=True):
        assert relative_error(product.clone(), operator @ v.clone()) < 1e-14
        assert relative_error(matrix.clone(), operator.dense()) < 1e-14


ALGEBRA = {
    "sum": lambda H, G: H + G,
    "difference": lambda H, G: H - G,
    "scaled": lambda H, G: 3 * H,
    "scaled from the right": lambda H, G: H * 0.5,
    "negative": lambda H, G: -H,
    "nested": lambda H, G: 2 * (H - 0.25 * G) - (G + H) * 3.0,
    "NumPy scalar": lambda H, G: np.float64(2.0) * H,
}


@pytest.mark.parametrize("name", ALGEBRA)
def test_algebra_is_that_of_the_dense_matrices(H, G, size, name):
    combined, truth = ALGEBRA[name](H, G), ALGEBRA[name](H.dense(), G.dense())
    v = randn(size, 2, seed=10)
    assert combined.shape == H.shape
    assert combined.dtype == H.dtype
    assert relative_error(combined @ v, truth @ v) < 1e-12
    assert relative_error(combined.dense(), truth) < 1e-12
    assert torch.equal(combined.dense(), combined.dense().T)


@pytest.mark.parametrize("scalar", [np.float32(2), np.int64(2)])
def test_any_real_number_scales(H, scalar):
    """Numbers taken from arrays are NumPy's, and multiplication commutes."""
    assert relative_error((H * scalar).dense(), 2 * H.dense()) < 1e-14


REFUSED_COMBINATIONS = {
    "number": (lambda H: H + 1, "operators combine with operators, got int"),
    "tensor": (lambda H: H - H.dense(), "operators combine with operators, got Tensor"),
    "shape": (lambda H: H + hs.as_operator(torch.eye(3, dtype=F64)), "must share one shape"),
    "dtype": (
        lambda H: H + hs.as_operator(torch.eye(H.shape[0])),
        "must share one dtype, found torch.float32, torch.fl",
    ),
    "times text": (lambda H: H * "2", "can be multiplied by a number, got str"),
    "times operator": (lambda H: H * H, "can be multiplied by a number, got Hessian; use @ for products"),
}


@pytest.mark.parametrize("name", REFUSED_COMBINATIONS)
def test_refuses_to_combine_with(H, name):
    combine, message = REFUSED_COMBINATIONS[name]
    with pytest.raises(InputError, match=message):
        combine(H)


REFUSED_RIGHT_HAND_SIDES = {
    "length": (lambda P: torch.zeros(P + 1, dtype=F64), r"must have shape \[52\] or \[52, K\], got \[53\]"),
    "transposed": (lambda P: torch.zeros(2, P, dtype=F64), r"got \[2, 52\]"),
    "three axes": (lambda P: torch.zeros(P, 1, 1, dtype=F64), r"got \[52, 1, 1\]"),
    "scalar": (lambda P: torch.tensor(1.0, dtype=F64), r"got \[\]"),
    "dtype": (lambda P: torch.zeros(P), "must be torch.float64 on cpu like the operator, got torch.float32 on cpu"),
    "device": (lambda P: torch.zeros(P, dtype=F64, device="meta"), "got torch.float64 on meta"),
    "NumPy array": (lambda P: np.zeros(P), "must be a torch.Tensor, got ndarray"),
}


@pytest.mark.parametrize("name", REFUSED_RIGHT_HAND_SIDES)
def test_refuses_right_hand_sides_that_do_not_fit(H, size, name):
    assert size == 52
    make, message = REFUSED_RIGHT_HAND_SIDES[name]
    with pytest.raises(InputError, match=message):
        H @ make(size)


def test_too_large_a_dense_matrix_is_refused_before_any_work(H, size, monkeypatch):
    monkeypatch.setattr("hesscope.core.memory.available_bytes", lambda device="cpu": 2048)
    monkeypatch.setattr(type(H), "products", lambda self, V: pytest.fail("work was done"))
    with pytest.raises(
        TooLargeError, match=rf"the dense {size} x {size} matrix needs .* KiB, but 2.0 KiB are available; use"
    ):
        H.dense()


def test_scipy_finds_the_eigenvalues(H):
    found = scipy.sparse.linalg.eigsh(H.to_scipy(), k=3, which="LA", return_eigenvectors=False)
    assert relative_error(np.sort(found), torch.linalg.eigvalsh(H.dense())[-3:]) < 1e-10


def test_scipy_products(H, size):
    operator, dense = H.to_scipy(), H.dense().numpy()
    V = np.asfortranarray(np.random.default_rng(0).standard_normal((size, 3)))
    assert operator.dtype == np.float64
    for product, truth in [
        (operator @ V, dense @ V),
        (operator @ V[:, 0], dense @ V[:, 0]),
        (operator.rmatvec(V[:, 0]), dense.T @ V[:, 0]),
        (operator.T @ V, dense.T @ V),
    ]:
        np.testing.assert_allclose(product, truth, rtol=1e-11, atol=1e-14)


# --- matrices of others -----------------------------------------------------------------------------------------------

MATRIX = randn(6, 6, seed=12)

FOREIGN = {
    "tensor": MATRIX.clone,
    "array": MATRIX.numpy,
    "array in column order": lambda: np.asfortranarray(MATRIX.numpy()),
    "SciPy operator": lambda: scipy.sparse.linalg.aslinearoperator(MATRIX.numpy()),
    "SciPy sparse array": lambda: scipy.sparse.csr_array(MATRIX.numpy()),
    "itself": lambda: hs.as_operator(MATRIX),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_anything_with_a_shape_and_a_product_is_an_operator(name):
    operator = hs.as_operator(FOREIGN[name]())
    v = randn(6, 2, seed=13)
    assert operator.shape == (6, 6)
    assert operator.dtype == F64
    assert torch.allclose(operator @ v, MATRIX @ v, rtol=1e-14)
    assert torch.equal(operator.dense(), MATRIX)
    assert torch.allclose((operator - 2 * operator).dense(), -MATRIX, rtol=1e-14)
    np.testing.assert_allclose(operator.to_scipy() @ v.numpy(), (MATRIX @ v).numpy(), rtol=1e-14)


def read_only():
    array = MATRIX.numpy().copy()
    array.setflags(write=False)
    return array


@pytest.mark.parametrize("make", [read_only, lambda: MATRIX.numpy()[::-1, ::-1].copy()[::-1, ::-1]])
def test_arrays_that_torch_cannot_share_are_taken_too(make):
    """A read-only array or one with negative strides is a fine matrix: no warning, no error."""
    assert torch.equal(hs.as_operator(make()).dense(), MATRIX)


def test_symmetry_is_found_not_assumed():
    assert not hs.as_operator(MATRIX).symmetric
    assert hs.as_operator(MATRIX + MATRIX.T).symmetric


def test_a_dense_copy_can_be_written_to():
    M = MATRIX.clone()
    hs.as_operator(M).dense().zero_()
    assert torch.equal(M, MATRIX)


REFUSED_MATRICES = {
    "not square": (torch.zeros(2, 3), r"must be square, got shape \(2, 3\)"),
    "vector": (torch.zeros(3), r"must be square, got shape \(3,\)"),
    "integers": (np.eye(3, dtype=int), "must be real floating-point, got torch.int64"),
    "complex": (np.eye(3, dtype=complex), "must be real floating-point, got torch.complex128"),
    "complex SciPy": (scipy.sparse.csr_array(np.eye(3, dtype=complex)), "must be real floating-point, got complex128"),
    "list": ([[1.0]], "expected a matrix or an operator with shape, dtype and @, got list"),
    "none": (None, "got NoneType"),
}


@pytest.mark.parametrize("name", REFUSED_MATRICES)
def test_refuses_what_is_no_real_square_matrix(name):
    matrix, message = REFUSED_MATRICES[name]
    with pytest.raises(InputError, match=message):
        hs.as_operator(matrix)
