"""Operations whose second derivatives are missing, wrong, or wrong only when vectorized: found, not believed."""

import pytest
import torch
from torch import nn

import hesscope as hs
from hesscope.core.errors import DataError, ModelError
from hesscope.operators import choice
from tests.helpers import F64, randint, randn, relative_error

X, Y = randn(6, 1, 5, 5, seed=1), randint(3, 6, seed=2)


def by_finite_differences(objective, step=1e-5):
    """Central differences of the gradient, [P, P]: independent of second derivatives."""
    space, model = objective.parameters, objective.model
    theta = space.flatten({name: p.detach().clone() for name, p in model.named_parameters()})
    columns = []
    for k in range(space.size):
        gradients = []
        for sign in (1, -1):
            moved = theta.clone()
            moved[k] += sign * step
            for name, tensor in space.unflatten(moved).items():
                model.get_parameter(name).data.copy_(tensor)
            gradients.append(objective.gradient())
        columns.append((gradients[0] - gradients[1]) / (2 * step))
    for name, tensor in space.unflatten(theta).items():
        model.get_parameter(name).data.copy_(tensor)
    return torch.stack(columns, dim=1)


def group_normed(channels=4, groups=2, size=3):
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, channels, size), nn.GroupNorm(groups, channels), nn.Tanh(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(channels * (6 - size) ** 2, 3)).double()


@pytest.mark.parametrize(("channels", "groups", "size", "count"), [(4, 2, 3, 6), (2, 1, 4, 1), (4, 1, 5, 1)])
def test_group_norm_is_done_column_by_column_where_vmap_is_wrong(channels, groups, size, count):
    """PyTorch's vectorized double backward of group norm fails, or for one sample and group gives wrong numbers."""
    objective = hs.Objective(group_normed(channels, groups, size), "cross_entropy", (X[:count], Y[:count]))
    assert relative_error(hs.Hessian(objective).dense(), by_finite_differences(objective)) < 1e-7


def test_a_padded_transformer_is_not_random():
    """Without gradients PyTorch switches to a fast path whose outputs have another shape."""
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, dtype=F64)

    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.TransformerEncoder(layer, 1)
            self.head = nn.Linear(4, 3, dtype=F64)

        def forward(self, x):
            mask = torch.arange(6)[None, :] >= torch.tensor([3, 4, 4])[:, None]
            return self.head(self.encoder(x, src_key_padding_mask=mask)[:, 0])

    fast_path = torch.backends.mha.get_fastpath_enabled()
    objective = hs.Objective(Padded(), "cross_entropy", (randn(3, 6, 4, seed=1), randint(3, 3, seed=2)))
    v = randn(objective.parameters.size, seed=3)
    assert (hs.Hessian(objective) @ v).isfinite().all()
    assert torch.backends.mha.get_fastpath_enabled() == fast_path


def weight_normed():
    return nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 3, dtype=F64)), nn.Tanh())


def scaled_by_frequency():
    return nn.Sequential(Numbered(scale_grad_by_freq=True), nn.Linear(3, 3, dtype=F64))


@pytest.mark.parametrize("build", [weight_normed, scaled_by_frequency], ids=lambda build: build.__name__)
def test_a_matrix_that_is_not_symmetric_is_refused(build):
    torch.manual_seed(0)
    objective = hs.Objective(build(), "cross_entropy", (randn(8, 4, seed=1).abs() * 3, randint(3, 8, seed=2)))
    with pytest.raises(ModelError, match="the Hessian is not symmetric"):
        hs.Hessian(objective).dense()


class Doubling(nn.Linear):
    def forward(self, x):
        return super().forward(x.mul_(2))


class Clamping(nn.Linear):
    def forward(self, x):
        with torch.no_grad():
            self.weight.clamp_(-0.1, 0.1)
        return super().forward(x)


class Numbered(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.table = nn.Embedding(5, 3, dtype=F64, **options)

    def forward(self, x):
        return self.table(x[:, 0].long() % 5)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: Doubling(4, 3, dtype=F64), "writes to its inputs"),
        (lambda: Clamping(4, 3, dtype=F64), "writes to the parameter weight"),
        (lambda: Numbered(max_norm=0.1), "writes to the parameter table.weight"),
        (lambda: Numbered(sparse=True), "sparse and has no second derivative"),
        (lambda: torch.jit.script(nn.Linear(4, 3, dtype=F64)), "pass the module inside"),
        (lambda: nn.DataParallel(nn.Linear(4, 3, dtype=F64)), "pass the module inside"),
        (lambda: nn.Linear(4, 3, device="meta"), "meta device"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_models_that_are_no_function_of_their_parameters(build, words):
    model, x = build(), randn(8, 4, seed=1).abs()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    given = x.clone()
    with pytest.raises(ModelError, match=words):
        hs.Objective(model, "cross_entropy", (x, randint(3, 8, seed=2)))
    assert torch.equal(x, given)
    for name, tensor in model.state_dict().items():
        assert tensor.device.type == "meta" or torch.equal(tensor, before[name])


def test_batch_norm_without_statistics_needs_one_batch():
    model = nn.Sequential(nn.Linear(4, 3, dtype=F64), nn.BatchNorm1d(3, track_running_stats=False, dtype=F64))
    x, y = randn(8, 4, seed=1), randint(3, 8, seed=2)
    hs.Objective(model, "cross_entropy", (x, y))
    with pytest.raises(ModelError, match="1 is a batch norm without running statistics"):
        hs.Objective(model, "cross_entropy", [(x[:4], y[:4]), (x[4:], y[4:])])


def test_ambiguous_token_logits_are_refused():
    model = nn.Linear(4, 3, dtype=F64)
    with pytest.raises(DataError, match=r"may mean \[N, T, C\] or \[N, C, T\]"):
        hs.Objective(model, "cross_entropy", (randn(2, 3, 4, seed=1), randint(3, 2, 3, seed=2)))


def test_autocast_outside_changes_nothing():
    objective = hs.Objective(nn.Linear(4, 3), "cross_entropy", (randn(8, 4, seed=1).float(), randint(3, 8, seed=2)))
    v = torch.ones(15)
    expected = hs.Hessian(objective) @ v
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(hs.Hessian(objective) @ v, expected)


class Item:
    def __init__(self, x, y):
        self.x, self.y = x, y


class ItemLoader:
    """Batches that are objects of the user's own, drawn at random."""

    def __iter__(self):
        chosen = torch.randperm(8)[:4]
        yield Item(randn(8, 4, seed=1)[chosen], randint(3, 8, seed=2)[chosen])


def test_random_batches_of_the_user_s_own_type_are_seen():
    def loss(model, item):
        return nn.functional.cross_entropy(model(item.x), item.y, reduction="sum"), len(item.y)

    with pytest.raises(DataError, match="different data on a second pass"):
        hs.Objective(nn.Linear(4, 3, dtype=F64), loss, ItemLoader())


def test_checks_are_made_once(monkeypatch):
    """They cost two products: a product with one vector must not pay them again and again."""
    made = []
    check = choice.require_symmetric
    monkeypatch.setattr(choice, "require_symmetric", lambda *given: (made.append(1), check(*given)))
    H = hs.Hessian(
        hs.Objective(nn.Linear(4, 3, dtype=F64), "cross_entropy", (randn(8, 4, seed=1), randint(3, 8, seed=2)))
    )
    for columns in ((15,), (15, 1), (15, 2), (15,)):
        _ = H @ torch.ones(columns, dtype=F64)
    assert len(made) == 1
