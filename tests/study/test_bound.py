"""Bounds of presets and of a user's own network: what is stored, what is set beside it, and going on after a stop."""

import json
from dataclasses import replace
from functools import partial
from math import hypot, inf, isnan, sqrt

import numpy as np
import pytest
import torch
from torch import nn

import hesscope as hs
from hesscope.core.errors import DataError, InputError
from hesscope.data import LabelledData, PatchPopulation, binary, digits
from hesscope.layerwise import gibbs, pac_bayes
from hesscope.study import bound_presets
from hesscope.study.bound import (
    bound_results,
    bound_steps,
    choose_bound,
    describe_bound,
    prepare_bound,
    run_bound,
)
from hesscope.study.bound_presets import BOUND_PRESETS, BoundOptions, initial_network, train_network
from hesscope.study.config import StudyConfig

HERE = "tests.study.test_bound"
SMALL = {"hidden": (8,), "samples": 200, "epochs": 3, "steps": 20}
TWO = ("diagonal_optimized", "kronecker")


@pytest.fixture(autouse=True)
def few_draws(monkeypatch):
    monkeypatch.setattr(gibbs, "LOCAL_DRAWS", 2000)
    monkeypatch.setattr(pac_bayes, "CHOOSING_DRAWS", {True: 400, False: 4})


def quiet(title, share):
    pass


def small(folder, **changes):
    return choose_bound("digits", **{**SMALL, "posteriors": TWO, "out": folder, **changes})


class Stop(KeyboardInterrupt):
    pass


def stop_when(words):
    """A reporter that interrupts once a title has these words."""

    def report(title, share):
        if words in title:
            raise Stop

    return report


# --- presets ----------------------------------------------------------------------------------------------------------


def test_both_labels_have_every_posterior_and_the_truth_beside_it(tmp_path):
    study = small(tmp_path / "run")
    assert not (tmp_path / "run").exists()
    titles = []
    assert run_bound(study, lambda title, share: titles.append((title, share))) == 0
    found = bound_results(study)
    assert [(each.attrs["labels"], each.attrs["posterior"]) for each in found] == [
        (labels, name) for labels in ("true", "random") for name in TWO
    ]
    assert {each.attrs["network"] for each in found} == {"64-8-2 ReLU network, 538 parameters"}
    assert {each.attrs["data"] for each in found} == {"200 of scikit-learn's handwritten digits, 0-4 against 5-9"}
    shares = [share for _, share in titles]
    assert np.diff(shares).min() > -1e-12
    assert (titles[0][0], titles[-1]) == ("true labels: training the network", ("done", 1.0))
    assert any(title.startswith("random labels: diagonal_optimized, bound 0.") for title, _ in titles)
    assert "true labels: kronecker" in dict(titles)

    # The record is what the library gives for the trained network, which is the one that was stored.
    options = BOUND_PRESETS["digits"].options(hidden=(8,), samples=200, epochs=3, seed=0)
    sample = BOUND_PRESETS["digits"].sample(options)
    for case, results in zip(study.cases, (found[:2], found[2:]), strict=True):
        stored = study.store.require(f"train-{case.labels}")["parameters"].to_numpy()
        data, _ = sample.labelled(case.labels, 0)
        model = initial_network(options, data)
        prior = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
        nn.utils.vector_to_parameters(torch.from_numpy(stored), model.parameters())
        objective = hs.Objective(model, "cross_entropy", (data.inputs, data.labels))
        record = hs.PacBayesBound.from_xarray(results[1])
        assert record.network_risk == hs.layerwise.network_risk(objective)
        assert not np.array_equal(stored, prior.numpy())
        wrong = float((model(sample.held_out.data.inputs).argmax(1) != sample.held_out.data.labels).double().mean())
        for each in results:
            attributes = each.attrs
            if case.labels == "random":
                assert (attributes["held_out_risk"], attributes["held_out_stderr"]) == (0.5, 0)
                assert (attributes["network_held_out"], attributes["held_out_exact"]) == (0.5, 1)
                assert attributes["held_out_what"] == "any classifier on random labels"
            else:
                assert attributes["network_held_out"] == pytest.approx(wrong, abs=1e-12)
                assert (attributes["held_out_what"], attributes["held_out_exact"]) == ("1,597 held-out digits", 0)
    again, estimate = made_again(study.cases[0], sample, study)
    record = hs.PacBayesBound.from_xarray(found[1])
    assert (record.bound, record.kl) == (again.bound, again.kl)
    risk, stderr = (found[1].attrs[f"held_out_{name}"] for name in ("risk", "stderr"))
    assert risk == estimate.value
    assert stderr == pytest.approx(hypot(estimate.stderr, sqrt(risk * (1 - risk) / 1597)), rel=1e-12)
    assert stderr > 1.2 * estimate.stderr

    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert len(names) == 1 + 2 * (1 + 1 + 2)
    assert not [name for name in names if name.startswith(("state-", "results-current", "."))]

    # Neither another choice of labels nor of posteriors is another run.
    other = small(tmp_path / "run", labels="random", posteriors=("kronecker", "diagonal"))
    assert run_bound(other, quiet) == 3
    assert [each.attrs["posterior"] for each in bound_results(other)] == ["diagonal", "kronecker"]


def made_again(case, sample, study):
    """The Kronecker bound, and the risk of its posterior's networks on the digits that are held out."""
    stored = study.store.require(f"train-{case.labels}")["parameters"].to_numpy()
    nn.utils.vector_to_parameters(torch.from_numpy(stored), case.objective.model.parameters())
    found = hs.pac_bayes_bound(case.objective, case.prior, "kronecker", steps=20)
    unseen = hs.Objective(case.objective.model, "cross_entropy", sample.held_out.data.batch("cross_entropy"))
    return found, hs.layerwise.stochastic_risk(unseen, found.distribution)


def data_of(case):
    with case.objective.evaluating() as (_, batches):
        return next(iter(batches))[1]


def test_training_knows_the_labels_and_random_ones_teach_nothing(tmp_path):
    study = small(tmp_path, samples=400, epochs=60, posteriors=("isotropic",))
    run_bound(study, quiet)
    true, random = (study.store.require(f"train-{labels}").attrs["risk"] for labels in ("true", "random"))
    assert true < 0.1 < random < 0.5
    inputs, labels = data_of(study.cases[0])
    others, drawn = data_of(study.cases[1])
    assert torch.equal(inputs, others)
    assert 0.3 < float((labels != drawn).double().mean()) < 0.7


def test_an_interrupted_optimization_has_its_current_bound_and_goes_on_to_the_same_numbers(tmp_path):
    asked = partial(small, labels="true", posteriors=("diagonal_optimized",))
    whole, told = asked(tmp_path / "whole"), []
    run_bound(whole, lambda title, share: told.append(title))
    (expected,) = bound_results(whole)

    study = asked(tmp_path / "cut")
    assert bound_results(study) == []
    with pytest.raises(Stop):
        run_bound(study, stop_when("diagonal_optimized, bound 0."))
    (reached,) = bound_results(study)
    assert (reached.attrs["steps"], reached.attrs["planned_steps"]) == (2, 20)
    assert isnan(reached.attrs["held_out_risk"])
    assert reached.attrs["network_held_out"] == expected.attrs["network_held_out"]
    assert (tmp_path / "cut" / "state-bound-true-diagonal_optimized.pt").exists()

    calls = []
    assert run_bound(asked(tmp_path / "cut"), lambda title, share: calls.append(title)) == 2
    (result,) = bound_results(study)
    assert_same_numbers(result, expected)
    of_bound, again = ([title for title in some if "diagonal_optimized" in title] for some in (told, calls))
    assert len(of_bound) - len(again) == 2  # steps that were not done again
    assert {path.name for path in (tmp_path / "cut").iterdir()} == {
        path.name for path in (tmp_path / "whole").iterdir()
    }


def assert_same_numbers(result, expected):
    for name in expected.data_vars:
        assert np.array_equal(result[name].to_numpy(), expected[name].to_numpy()), name
    for name in ("certificate_bound", "certificate_empirical_risk", "steps", "held_out_risk", "held_out_stderr"):
        assert result.attrs[name] == expected.attrs[name], name


def test_an_optimization_that_minutes_ended_goes_on_with_more(tmp_path):
    asked = partial(small, labels="true", posteriors=("kronecker_optimized",))
    whole = asked(tmp_path / "whole")
    run_bound(whole, quiet)
    short = asked(tmp_path / "run", minutes=1e-9)
    run_bound(short, quiet)
    (result,) = bound_results(short)
    assert (result.attrs["steps"], result.attrs["planned_steps"]) == (1, 20)
    assert 0 <= result.attrs["held_out_risk"] <= 1
    assert run_bound(asked(tmp_path / "run", minutes=1e-9), quiet) == 3
    longer = asked(tmp_path / "run")
    assert run_bound(longer, quiet) == 2
    assert_same_numbers(*bound_results(longer), *bound_results(whole))
    assert run_bound(asked(tmp_path / "run", minutes=1e-9), quiet) == 3  # nothing is left to be done
    assert bound_results(short)[0].attrs["minutes"] == inf
    assert not list((tmp_path / "run").glob("state-*"))


def test_a_training_that_was_killed_goes_on_to_the_same_parameters(tmp_path, monkeypatch):
    monkeypatch.setattr(bound_presets, "SAVED_EVERY", 0.0)
    data = binary(digits(standardize=False, dtype=torch.float32))
    data = LabelledData("some", data.inputs[:250], data.labels[:250], 2)
    state = tmp_path / "state.pt"

    def trained(identity, after=None, labels="true"):
        model = initial_network(BoundOptions(200, 4, 4, hidden=(5,)), data)
        seen = []

        def progress(share):
            seen.append(share)
            if share == after:
                raise Stop

        try:
            train_network(model, data, 4, 0, labels, identity, state, progress)
        except Stop:
            assert state.exists()
        else:
            assert not state.exists()
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()]), seen

    whole, shares = trained("this")
    assert shares == [0.25, 0.5, 0.75, 1.0]
    assert not torch.equal(trained("this", labels="random")[0], whole)  # another order of the samples
    trained("this", after=0.5)
    found, shares = trained("this")
    assert (torch.equal(found, whole), shares) == (True, [0.75, 1.0])
    trained("this", after=0.5)
    found, shares = trained("other")
    assert (torch.equal(found, whole), len(shares)) == (True, 4)
    state.write_bytes(b"no training")
    assert torch.equal(trained("this")[0], whole)


def test_the_risk_over_all_patches_is_exact(tmp_path, monkeypatch):
    pictures = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 3, 16, 15))).float()
    pictures[1] += 1.0
    population = PatchPopulation("little pictures", pictures, 8, True)
    monkeypatch.setattr(bound_presets, "patch_population", lambda dtype: population)
    monkeypatch.setattr(bound_presets, "POPULATION_BATCH", 50)  # the last batch is smaller
    study = choose_bound("patches", labels="true", posteriors=("kronecker",), out=tmp_path, **{**SMALL, "samples": 300})
    run_bound(study, quiet)
    (result,) = bound_results(study)
    assert result.attrs["held_out_what"] == "whole population of 144 patches"
    assert result.attrs["held_out_exact"] == 1
    assert result.attrs["data"] == "300 independent 8 x 8 patches of two photographs"
    data = population.take(range(len(population)))
    wrong = study.cases[0].objective.model(data.inputs).argmax(1) != data.labels
    assert result.attrs["network_held_out"] == pytest.approx(float(wrong.double().mean()), abs=1e-12)
    inputs, labels = data_of(study.cases[0])
    drawn = population.draw(300, 0)
    assert torch.equal(inputs, drawn.inputs) and torch.equal(labels, drawn.labels)


def test_mnist_has_as_many_samples_as_the_papers_unless_told(tmp_path, monkeypatch):
    asked, held_out = [], slice(500, 700)

    def image_set(name, folder, split, samples, seed, standardize, flat, dtype):
        asked.append((name, folder, split, samples, standardize))
        data = digits(standardize=False, dtype=dtype)
        rows = slice(0, samples or 500) if split == "train" else held_out
        return LabelledData(f"mnist, {split}", data.inputs[rows], data.labels[rows], 10)

    monkeypatch.setattr(bound_presets, "image_set", image_set)
    monkeypatch.setattr(bound_presets, "MNIST_SAMPLES", 300)
    preset = BOUND_PRESETS["mnist"]
    sample = preset.sample(preset.options(folder=tmp_path, classes=10))
    assert asked == [("mnist", tmp_path, "train", None, False), ("mnist", tmp_path, "test", None, False)]
    assert (len(sample.data), sample.data.classes) == (300, 10)
    assert (sample.words, sample.held_out.what) == ("300 training images of MNIST", "200 test images")
    sample = preset.sample(preset.options(folder=tmp_path, samples=40))
    assert (len(sample.data), sample.data.classes, asked[2][3]) == (40, 2, 40)
    assert sample.words == "40 training images of MNIST, 0-4 against 5-9"
    first = choose_bound("mnist", folder=tmp_path, **SMALL).store.settings
    assert choose_bound("mnist", folder=tmp_path, **SMALL).store.settings == first
    held_out = slice(501, 701)
    assert choose_bound("mnist", folder=tmp_path, **SMALL).store.settings != first


def test_digits_are_split_into_what_is_learned_and_what_is_held_out():
    preset = BOUND_PRESETS["digits"]
    sample = preset.sample(preset.options(classes=10))
    learned, held_out = sample.data, sample.held_out.data
    assert (len(learned), len(held_out), learned.classes) == (1437, 360, 10)
    drawn, known = sample.labelled("random", 0)
    assert (known.known, known.exact, drawn.classes) == (0.9, True, 10)
    assert [preset.defaults.epochs_on(labels) for labels in ("true", "random")] == [100, 600]
    everything = torch.cat([learned.inputs, held_out.inputs])
    assert (float(everything.min()), float(everything.max())) == (0, 1)
    whole = digits(standardize=False, dtype=torch.float32).inputs
    assert torch.equal(everything.double().sum(0), whole.double().sum(0))
    assert sorted(map(tuple, everything.tolist())) == sorted(map(tuple, whole.tolist()))


def test_folders_of_other_runs_are_refused_and_other_networks_are_other_runs(tmp_path):
    study = small(tmp_path / "run", labels="true", posteriors=("isotropic",))
    run_bound(study, quiet)
    with pytest.raises(
        InputError, match=r"holds another run: there hidden = 8, steps = 20; here hidden = 9, steps = 10;"
    ):
        small(tmp_path / "run", hidden=(9,), steps=10)
    (tmp_path / "run" / "bound.json").write_text("{")
    with pytest.raises(InputError, match="cannot read"):
        small(tmp_path / "run")
    prints = {
        small(tmp_path, **changes).store.settings
        for changes in ({}, {"seed": 1}, {"delta": 0.1}, {"hidden": (8, 8)}, {"epochs": 4}, {"classes": 10})
    }
    assert len(prints) == 6
    assert small(tmp_path, labels="random", minutes=3.0).store.settings == small(tmp_path).store.settings


def test_labels_of_folders_and_plans():
    preset = BOUND_PRESETS["digits"]
    assert preset.label(preset.options(hidden=(600, 600), classes=10)) == "digits-600x600-C10"
    assert BOUND_PRESETS["patches"].label(BOUND_PRESETS["patches"].defaults) == "patches-600"
    assert preset.options(epochs=7).random_epochs == 7
    plan = dict(describe_bound(small(None, labels="true", minutes=2.0)))
    assert plan["network"] == "64-8-2 ReLU network, 538 parameters"
    assert plan["steps"] == "20 of each optimization, at most 2 minutes each"
    assert plan["results"] == "out/bound/digits-8-C2"
    assert len(bound_steps(small(None), [])) == 2 * (2 + 2)


# --- a network of the user's own --------------------------------------------------------------------------------------


def network(seed: int = 3) -> nn.Module:
    return hs.models.mlp((64, 8, 2), seed=seed, bias=True, dtype=torch.float32)


def unseeded() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 2))


class Normalized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = network()
        self.register_buffer("scale", torch.ones(64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x * self.scale)


def samples(first: int = 0, last: int = 250, classes: int = 2) -> LabelledData:
    data = digits(standardize=False, dtype=torch.float32)
    data = binary(data) if classes == 2 else data
    return LabelledData("digits", data.inputs[first:last], data.labels[first:last], classes)


def fit(model: nn.Module, seed: int = 0) -> nn.Module:
    data = samples()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(data.inputs), data.labels).backward()
        optimizer.step()
    return model


def write(folder, trained, **changes):
    """A study of a network with these parameters; `bound`: its section."""
    torch.save(trained.state_dict(), folder / "weights.pt")
    section = {"posteriors": ["kronecker"], "steps": 20, **changes.pop("bound", {})}
    given = {"model": f"{HERE}:network", "data": f"{HERE}:samples", "checkpoint": "weights.pt", "output": "out"}
    return StudyConfig.model_validate({**given, **changes, "bound": section})


def test_an_own_network_is_bounded_from_its_initialization_and_checkpoint(tmp_path):
    model = fit(network())
    held_out = {"held_out": f"{HERE}:samples", "held_out_arguments": {"first": 300, "last": 420}, "delta": 0.02}
    study = prepare_bound(write(tmp_path, model, bound=held_out, seed=5), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["weights.pt"]
    assert run_bound(study, quiet) == 0
    (result,) = bound_results(study)
    data = samples()
    objective = hs.Objective(model, "cross_entropy", (data.inputs, data.labels))
    expected = hs.pac_bayes_bound(objective, network(), "kronecker", 0.02, steps=20, seed=5)
    found = hs.PacBayesBound.from_xarray(result)
    assert (found.bound, found.kl, found.network_risk) == (expected.bound, expected.kl, expected.network_risk)
    unseen = samples(300, 420)
    risk = float((model(unseen.inputs).argmax(1) != unseen.labels).double().mean())
    assert result.attrs["network_held_out"] == pytest.approx(risk, abs=1e-12)
    assert (result.attrs["held_out_what"], result.attrs["labels"]) == ("120 held-out samples", "true")
    assert result.attrs["network"] == "MLP, 538 parameters"
    assert run_bound(prepare_bound(write(tmp_path, model, bound=held_out, seed=5), tmp_path), quiet) == 2
    assert not (tmp_path / "out" / "bound.json").exists()

    changed = {"seed": 6}, {"bound": {**held_out, "delta": 0.1}}, {"bound": {}}, {"model_arguments": {"seed": 4}}
    others = [
        prepare_bound(write(tmp_path, model, **{"bound": held_out, "seed": 5, **each}), tmp_path) for each in changed
    ]
    assert len({study.store.settings, *(each.store.settings for each in others)}) == 5


def test_initial_parameters_can_be_told_and_nothing_need_be_held_out(tmp_path):
    initial = network(seed=9)
    torch.save(initial.state_dict(), tmp_path / "initial.pt")
    model = fit(network(seed=9))
    study = prepare_bound(write(tmp_path, model, model=f"{HERE}:network", bound={"prior": "initial.pt"}), tmp_path)
    run_bound(study, quiet)
    (result,) = bound_results(study)
    data = samples()
    expected = hs.pac_bayes_bound(hs.Objective(model, "cross_entropy", (data.inputs, data.labels)), initial, steps=20)
    assert result.attrs["certificate_bound"] == expected.bound
    assert all(isnan(result.attrs[name]) for name in ("held_out_risk", "held_out_stderr", "network_held_out"))
    assert result.attrs["held_out_what"] == ""
    torch.manual_seed(0)
    own = unseeded()
    torch.save(own.state_dict(), tmp_path / "initial.pt")
    prepare_bound(write(tmp_path, fit(own), model=f"{HERE}:unseeded", bound={"prior": "initial.pt"}), tmp_path)


def test_another_loss_is_bounded_if_its_bound_is_told(tmp_path):
    model = fit(network())
    told = {"loss_bound": 0.5, "posteriors": ["diagonal"], "held_out": f"{HERE}:samples"}
    told["held_out_arguments"] = {"first": 300, "last": 420}
    study = prepare_bound(write(tmp_path, model, loss="mse", bound=told), tmp_path)
    run_bound(study, quiet)
    (result,) = bound_results(study)
    objective = hs.Objective(model, "mse", samples().batch("mse"))
    assert result.attrs["network_risk"] == hs.layerwise.network_risk(objective, 0.5)
    unseen = hs.Objective(model, "mse", samples(300, 420).batch("mse"))
    assert result.attrs["network_held_out"] == hs.layerwise.network_risk(unseen, 0.5)
    assert (
        result.attrs["certificate_bound"] == hs.pac_bayes_bound(objective, network(), "diagonal", loss_bound=0.5).bound
    )


REFUSED = [
    ({"checkpoint": None}, "bound needs a checkpoint"),
    ({"model": "hf:folder"}, "bound does not take model = 'hf:folder': no initialization of it is known"),
    (
        {"bound": {"posteriors": ["kroneker"]}},
        "bound.posteriors must be some of isotropic, .* did you mean 'kronecker'?",
    ),
    ({"bound": {"posteriors": ["diagonal", "diagonal"]}}, "bound.posteriors must name each posterior once"),
    ({"loss": "mse"}, "the loss 'mse' is not in"),
    ({"bound": {"held_out": f"{HERE}:samples"}}, "gives the samples of data themselves"),
    ({"bound": {"held_out": f"{HERE}:sample"}}, r"bound.held_out = '.*:sample': module .* has no 'sample'"),
    ({"bound": {"held_out_arguments": {"first": 3}}}, "bound.held_out_arguments has no function bound.held_out"),
    ({"bound": {"prior": "nowhere.pt"}}, "checkpoint .*nowhere.pt does not exist"),
    ({"data_arguments": {"last": 12}}, "n = 12 samples are too few for a grid"),
    ({"data_arguments": {"classes": 10}}, r"targets must lie in \[0, 2\)"),
]


@pytest.mark.parametrize(("changes", "words"), REFUSED, ids=[words[:30] for _, words in REFUSED])
def test_what_does_not_fit_is_refused_before_any_work(tmp_path, changes, words):
    with pytest.raises((InputError, DataError), match=words) as caught:
        prepare_bound(write(tmp_path, network(seed=4), **changes), tmp_path)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["weights.pt"]


def test_a_prior_that_depends_on_the_samples_is_refused(tmp_path):
    with pytest.raises(
        InputError, match=r"checkpoint = 'weights.pt': prior depends on the data: it equals the trained"
    ):
        prepare_bound(write(tmp_path, network()), tmp_path)
    with pytest.raises(InputError, match=r"unseeded' makes another network each time, .* pass the initial parameters"):
        prepare_bound(write(tmp_path, unseeded(), model=f"{HERE}:unseeded"), tmp_path)
    model = Normalized()
    fit(model)
    prepare_bound(write(tmp_path, model, model=f"{HERE}:Normalized"), tmp_path)
    model.scale *= 2
    with pytest.raises(InputError, match=r"'scale' has changed since the prior"):
        prepare_bound(write(tmp_path, model, model=f"{HERE}:Normalized"), tmp_path)


def test_settings_are_in_the_folder(tmp_path):
    run_bound(small(tmp_path, labels="true", posteriors=("isotropic",)), quiet)
    found = json.loads((tmp_path / "bound.json").read_text())
    assert found["preset"] == "digits"
    assert {"hidden", "samples", "epochs", "random_epochs", "classes", "seed", "delta", "steps"} <= set(found)
    assert replace(BOUND_PRESETS["digits"].defaults, seed=3).in_words["seed"] == "3"
