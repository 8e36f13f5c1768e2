"""Commands. Heavy modules are imported inside the commands, so that `hesscope --help` answers at once."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Protocol, TypeVar

import typer

from hesscope._version import __version__
from hesscope.cli.interruption import interrupt
from hesscope.cli.progress import progress_bar
from hesscope.core.errors import HesscopeError, InputError

BAD_INPUT = 2
INTERRUPTED = 130

Number = TypeVar("Number", int, float)


class InFolder(Protocol):
    """A study that has been prepared: all that is asked of it here is where its results go."""

    @property
    def folder(self) -> Path:
        """Of the page, the figures and the results."""


Prepared = TypeVar("Prepared", bound=InFolder)

# Arguments of every command that measures what a STUDY.toml describes.
Study = Annotated[Path | None, typer.Argument(metavar="STUDY.toml", help="What to measure.")]
Example = Annotated[bool, typer.Option("--example", help="Print a commented STUDY.toml and stop.")]

# Said before the tables and figures of a trajectory, which take seconds.
WRITING = "writing the page ..."

# Parameters whose cuts are printed; all are in advice.json.
CUTS_SHOWN = 12

app = typer.Typer(
    name="hesscope",
    help="Measures, predicts and explains the structure of neural-network Hessians.",
    invoke_without_command=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Entry point: bad input is one line on standard error and exit code 2, an interruption 130."""
    # Threads of GNU OpenMP (PyTorch's on Linux) spin at barriers; beside one other busy process that made a dense
    # Hessian 20 times slower here. Spinning briefly costs nothing when the machine is free. NumPy multiplies small
    # matrices only, which its threads slow down likewise. Both are read when the libraries are loaded.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    for number in (signal.SIGINT, signal.SIGTERM):  # a batch system's end of time is as good as Ctrl-C
        signal.signal(number, interrupt)
    try:
        code = app(standalone_mode=False)  # typer turns Ctrl-C into the exit code 130
    except typer.TyperException as error:
        code = _fail(error.format_message())
    except HesscopeError as error:
        code = _fail(str(error))
    except OSError as error:
        code = _fail(f"{error.strerror or error}: {error.filename}" if error.filename else str(error))
    if code == INTERRUPTED:
        print("hesscope: interrupted; finished steps are kept, run the same command to continue", file=sys.stderr)
    sys.exit(code if isinstance(code, int) else 0)


@app.callback()
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    """Measures, predicts and explains the structure of neural-network Hessians."""
    if version:
        print(f"hesscope {__version__}")
    elif context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the page, the figures and the results.")] = Path("out/demo"),
    seed: Annotated[int, typer.Option(help="Root of all random streams.")] = 0,
) -> None:
    """Train small networks on handwritten digits and show the structure of their Hessians on a page."""
    _require_folder(out)
    from hesscope.study.demo import DemoSettings, demo_results, run_demo

    settings = DemoSettings(seed=seed)
    with progress_bar() as report:
        found = run_demo(out, settings, report)
    _say_found(found)
    from hesscope.report.demo_page import write_demo_page

    page = write_demo_page(out, demo_results(out, settings), _command())
    print(f"page: {page.resolve()}")


@app.command()
def analyze(study: Study = None, example: Example = False) -> None:
    """Measure the block structure of your own network's Hessian, as a STUDY.toml describes it."""
    path = _study_path("analyze", study, example)
    from hesscope.study.analyze import describe, prepare, run
    from hesscope.study.config import read_config

    prepared = prepare(read_config(path), path.parent)
    _carry_out(prepared, describe, run)
    from hesscope.report.study_page import write_study_page

    page = write_study_page(prepared.folder, prepared.store.require("energies"), _command())
    print(f"page: {page.resolve()}")


@app.command()
def spectrum(study: Study = None, example: Example = False) -> None:
    """Measure the eigenvalues, trace and norm of your own network's Hessian, as a STUDY.toml describes it."""
    path = _study_path("spectrum", study, example)
    from hesscope.study.config import read_config
    from hesscope.study.spectrum import RESULT, describe_spectrum, prepare_spectrum, run_spectrum

    prepared = prepare_spectrum(read_config(path), path.parent)
    _carry_out(prepared, describe_spectrum, run_spectrum)
    from hesscope.report.spectrum_page import block_table, spectrum_headline, spectrum_table, write_spectrum_page

    result = prepared.store.require(RESULT)
    _print_findings(spectrum_headline(result), spectrum_table(result), block_table(result))
    page = write_spectrum_page(prepared.folder, result, _command())
    print(f"page: {page.resolve()}")


@app.command()
def advise(study: Study = None, example: Example = False) -> None:
    """Find the partition that your own network's Hessian is block-diagonal in, and write it down for an optimizer."""
    path = _study_path("advise", study, example)
    from hesscope.study.advise import (
        ENERGIES,
        RESULT,
        SPECTRA,
        ZOOM,
        describe_advise,
        prepare_advise,
        run_advise,
        write_advice,
    )
    from hesscope.study.config import read_config

    prepared = prepare_advise(read_config(path), path.parent)
    _carry_out(prepared, describe_advise, run_advise)
    from hesscope.report.advise_page import advise_headline, advise_table, cut_table, write_advise_page

    store = prepared.store
    result = store.require(RESULT)
    cuts = cut_table(result)
    hidden = len(cuts) - 1 - CUTS_SHOWN
    more = f"... and {hidden} more, with less energy" if hidden > 0 else ""
    _print_findings(advise_headline(result), advise_table(result), cuts[: 1 + CUTS_SHOWN], more=more)
    print(f"advice: {write_advice(prepared.folder, result).resolve()}")
    page = write_advise_page(
        prepared.folder, result, store.require(ENERGIES), store.load(SPECTRA), store.load(ZOOM), _command()
    )
    print(f"page: {page.resolve()}")


@app.command()
def layers(study: Study = None, example: Example = False) -> None:
    """Measure each layer of your own network: how near its Hessian is to a Kronecker product, and what follows."""
    path = _study_path("layers", study, example)
    from hesscope.study.config import read_config
    from hesscope.study.layers import describe_layers, layers_results, prepare_layers, run_layers

    prepared = prepare_layers(read_config(path), path.parent)
    _carry_out(prepared, describe_layers, run_layers)
    from hesscope.report.layers_page import layers_headline, layers_table, write_layers_page

    found = layers_results(prepared)
    _print_findings(layers_headline(found.table), layers_table(found.table))
    page = write_layers_page(
        prepared.folder, found.table, found.factors, found.structures, found.low_ranks, found.full, _command()
    )
    print(f"page: {page.resolve()}")


@app.command()
def track(study: Study = None, example: Example = False) -> None:
    """Measure the Hessian along the stored checkpoints of a training run, as a STUDY.toml describes it."""
    path = _study_path("track", study, example)
    from hesscope.study.config import read_config
    from hesscope.study.track import describe_track, prepare_track, run_track, track_force, track_results

    prepared = prepare_track(read_config(path), path.parent)
    _carry_out(prepared, describe_track, run_track)
    print(WRITING, flush=True)
    from hesscope.report.dynamics_page import write_dynamics_page
    from hesscope.report.dynamics_words import dynamics_headline, dynamics_table, force_table

    trajectory = track_results(prepared)
    force = track_force(prepared, trajectory)
    tables = [dynamics_table(trajectory), *([] if force is None else [force_table(force)])]
    _print_findings(dynamics_headline(trajectory, force), *tables)
    page = write_dynamics_page(prepared.folder, trajectory, force, _command())
    print(f"page: {page.resolve()}")


@app.command()
def dynamics(
    preset: Annotated[
        str | None, typer.Argument(metavar="PRESET", help="Its name; without one, all are listed.")
    ] = None,
    loss: Annotated[str | None, typer.Option(help="cross_entropy or mse.")] = None,
    optimizer: Annotated[str | None, typer.Option(help="adam or sgd.")] = None,
    classes: Annotated[int | None, typer.Option(help="Number of classes C.")] = None,
    partition: Annotated[str | None, typer.Option(help="Blocks of the gpt: head, row or token.")] = None,
    steps: Annotated[int | None, typer.Option(help="Updates of the parameters.")] = None,
    snapshots: Annotated[int | None, typer.Option(help="Steps that are measured, log-spaced, at most.")] = None,
    samples: Annotated[int | None, typer.Option(help="Samples N; for the gpt, windows of text to measure on.")] = None,
    seed: Annotated[int, typer.Option(help="Root of all random streams.")] = 0,
    budget: Annotated[
        float | None, typer.Option(help="Share of the training's time that measuring may take, such as 0.1.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the page and the results; out/dynamics/RUN unless told.")
    ] = None,
) -> None:
    """Train the network of a preset and measure its Hessian along the way: what is static in it, what dynamic."""
    from hesscope.study.dynamics import (
        choose_dynamics,
        describe_dynamics,
        dynamics_results,
        preset_table,
        run_dynamics,
        static_table,
    )

    if preset is None:
        _print_table(preset_table(), left=True)
        return
    os.environ["HF_HUB_OFFLINE"] = "1"  # as in `head`
    chosen = {"loss": loss, "optimizer": optimizer, "classes": classes, "partition": partition}
    chosen |= {"steps": steps, "snapshots": snapshots, "samples": samples}
    run = choose_dynamics(preset, chosen, seed, budget, out)
    _carry_out(run, describe_dynamics, run_dynamics)
    print(WRITING, flush=True)
    from hesscope.report.dynamics_page import write_dynamics_page
    from hesscope.report.dynamics_words import dynamics_headline, dynamics_table, force_table

    trajectory, force = dynamics_results(run)
    tables = [dynamics_table(trajectory), *([] if force is None else [force_table(force)]), static_table(run)]
    _print_findings(dynamics_headline(trajectory, force), *filter(None, tables))
    page = write_dynamics_page(run.folder, trajectory, force, _command(), run.title)
    print(f"page: {page.resolve()}")


@app.command()
def bound(
    what: Annotated[
        str | None,
        typer.Argument(metavar="[PRESET | STUDY.toml]", help="A preset or a study; without one, presets are listed."),
    ] = None,
    example: Example = False,
    hidden: Annotated[str | None, typer.Option(help="Widths of one to three hidden layers, as in 600,600.")] = None,
    labels: Annotated[str | None, typer.Option(help="true, random or both; both unless told.")] = None,
    classes: Annotated[int | None, typer.Option(help="Classes of digits: 2 (0-4 against 5-9) or 10.")] = None,
    posteriors: Annotated[
        str | None, typer.Option(help="Posteriors separated by commas, such as diagonal,kronecker; all unless told.")
    ] = None,
    delta: Annotated[
        float | None, typer.Option(help="Probability with which each bound may fail; 0.05 unless told.")
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Samples n to train on and to compute the bound from.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes of the training over the samples.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of each optimization; 4000 unless told.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Minutes after which each optimization ends.")] = None,
    seed: Annotated[int | None, typer.Option(help="Root of all random streams; 0 unless told.")] = None,
    folder: Annotated[Path | None, typer.Option(help="Of your own copy of MNIST.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the page and the results; out/bound/RUN unless told.")
    ] = None,
) -> None:
    """Bound the risk on new data of networks drawn around a trained one, by PAC-Bayes with several posteriors."""
    if example:
        _study_path("bound", None, example)
    from hesscope.study.bound import (
        bound_preset_table,
        bound_results,
        choose_bound,
        describe_bound,
        prepare_bound,
        run_bound,
    )

    told: dict[str, Any] = {
        "hidden": None if hidden is None else _numbers("--hidden", hidden, int),
        "posteriors": None if posteriors is None else _words(posteriors),
    }
    told |= {"labels": labels, "classes": classes, "delta": delta, "samples": samples, "epochs": epochs}
    told |= {"steps": steps, "minutes": minutes, "seed": seed, "folder": folder, "out": out}
    given = {name: value for name, value in told.items() if value is not None}
    if what is None:
        if given:
            raise InputError(f"--{next(iter(given))} needs a preset to go with (hesscope bound lists them)")
        _print_table(bound_preset_table(), left=True)
        return
    if what.endswith(".toml"):
        if given:
            raise InputError(f"--{next(iter(given))} is for presets; a STUDY.toml says it (hesscope bound --example)")
        from hesscope.study.config import read_config

        run = prepare_bound(read_config(Path(what)), Path(what).parent)
    else:
        run = choose_bound(what, **given)
    from hesscope.report.bound_page import write_bound_page
    from hesscope.report.bound_words import bound_sentences, bound_table

    try:
        _carry_out(run, describe_bound, run_bound)
    except KeyboardInterrupt:
        if reached := bound_results(run):  # every one of them holds
            _print_findings("\n".join(bound_sentences(reached)), bound_table(reached))
        raise
    print(WRITING, flush=True)
    found = bound_results(run)
    _print_findings("\n".join(bound_sentences(found)), bound_table(found))
    page = write_bound_page(run.folder, found, _command(), run.title)
    print(f"page: {page.resolve()}")


@app.command()
def compare(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN_A RUN_B ...", help="Folders of `hesscope layers`, or their STUDY.toml.")
    ],
    layer: Annotated[
        list[str] | None, typer.Option(help="A layer to compare, once for each; all that the runs share unless told.")
    ] = None,
    k: Annotated[int | None, typer.Option("--k", help="Largest dimension; all eigenpairs unless told.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the page, the figures and the results.")] = Path("out/compare"),
) -> None:
    """Compare the top eigenspaces of layers between networks that `hesscope layers` has measured."""
    from hesscope.study.compare import compare_results, describe_compare, prepare_compare, run_compare

    prepared = prepare_compare(runs, out, layer or (), k)
    _carry_out(prepared, describe_compare, run_compare)
    from hesscope.report.compare_page import compare_headline, compare_table, write_compare_page

    shared = compare_results(prepared)
    _print_findings(compare_headline(shared), compare_table(shared))
    page = write_compare_page(out, shared, _command())
    print(f"page: {page.resolve()}")


@app.command()
def theory(
    classes: Annotated[str, typer.Option(help="Numbers of classes C, separated by commas.")] = "10,100,1000,10000",
    gamma: Annotated[str, typer.Option(help="Inputs per sample d/N, separated by commas.")] = "0.5",
    width: Annotated[str, typer.Option(help="Hidden widths m, separated by commas.")] = "8",
    loss: Annotated[str, typer.Option(help="cross_entropy, mse, or both separated by a comma.")] = "cross_entropy",
    model: Annotated[str, typer.Option(help="one_hidden or linear.")] = "one_hidden",
    activation: Annotated[str, typer.Option(help="relu, tanh or gelu.")] = "relu",
    hidden_scale: Annotated[float, typer.Option(help="Standard deviation of W in units of 1/sqrt(d).")] = 1.0,
    output_scale: Annotated[float, typer.Option(help="Standard deviation of V in units of 1/sqrt(fan-in).")] = 1.0,
    rtol: Annotated[float, typer.Option(help="Relative standard error of sampled predictions.")] = 0.02,
    out: Annotated[Path, typer.Option(help="Folder for the page, the figures and the results.")] = Path("out/theory"),
    seed: Annotated[int, typer.Option(help="Root of all random streams.")] = 0,
) -> None:
    """Predict how block-diagonal Hessians are at random initialization: a table and figures, no network involved."""
    _require_folder(out)
    from hesscope.study.prediction import RESULT, TheorySettings, run_theory, theory_store

    settings = TheorySettings(
        model=model,
        losses=_words(loss),
        classes=_numbers("--classes", classes, int),
        gammas=_numbers("--gamma", gamma, float),
        widths=_numbers("--width", width, int),
        activation=activation,
        hidden_scale=hidden_scale,
        output_scale=output_scale,
        rtol=rtol,
        seed=seed,
    )
    with progress_bar() as report:
        found = run_theory(out, settings, report)
    _say_found(found)
    from hesscope.report.static_page import theory_table, write_theory_page

    result = theory_store(out, settings).require(RESULT)
    _print_table(theory_table(result))
    page = write_theory_page(out, result, _command())
    print(f"page: {page.resolve()}")


@app.command()
def sweep(
    classes: Annotated[str, typer.Option(help="Numbers of classes C, separated by commas.")] = "10,30,100,300,1000",
    networks: Annotated[int, typer.Option(help="Independent networks (seeds) of each kind at every C.")] = 5,
    loss: Annotated[str, typer.Option(help="cross_entropy, mse, or both separated by a comma.")] = "cross_entropy,mse",
    inputs: Annotated[int, typer.Option(help="Inputs d.")] = 500,
    samples: Annotated[int, typer.Option(help="Samples N.")] = 1000,
    width: Annotated[int, typer.Option(help="Hidden neurons m.")] = 8,
    activation: Annotated[str, typer.Option(help="relu, tanh or gelu.")] = "relu",
    rtol: Annotated[float, typer.Option(help="Relative standard error of sampled predictions.")] = 0.02,
    out: Annotated[Path, typer.Option(help="Folder for the page, the figures and the results.")] = Path("out/sweep"),
    seed: Annotated[int, typer.Option(help="Root of all random streams.")] = 0,
) -> None:
    """Measure the off-diagonal ratio r of random networks over the number of classes, and set theory beside it."""
    _require_folder(out)
    from hesscope.study.sweep import RESULT, SweepSettings, run_sweep, sweep_store

    settings = SweepSettings(
        classes=_numbers("--classes", classes, int),
        networks=networks,
        losses=_words(loss),
        inputs=inputs,
        samples=samples,
        width=width,
        activation=activation,
        rtol=rtol,
        seed=seed,
    )
    with progress_bar() as report:
        found = run_sweep(out, settings, report)
    _say_found(found)
    from hesscope.report.static_page import sweep_table, write_sweep_page

    result = sweep_store(out, settings).require(RESULT)
    _print_table(sweep_table(result))
    page = write_sweep_page(out, result, _command())
    print(f"page: {page.resolve()}")


@app.command()
def head(
    model: Annotated[Path, typer.Option(help="Folder with a Hugging Face causal language model and its tokenizer.")],
    text: Annotated[Path, typer.Option(help="Text in UTF-8 whose next tokens are predicted.")],
    out: Annotated[Path, typer.Option(help="Folder for the page, the figures and the results.")] = Path("out/head"),
    tokens: Annotated[int, typer.Option(help="Tokens of the text to use, at most.")] = 1024,
    context: Annotated[
        int | None, typer.Option(help="Tokens of a window; by default the model's positions, at most 512.")
    ] = None,
    top: Annotated[int, typer.Option(help="Tokens in the table and the block map.")] = 20,
    dtype: Annotated[str, typer.Option(help="float32 or float64.")] = "float32",
) -> None:
    """Measure the output layer of a language model: the energies of all C² token blocks of its Hessian, exactly."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is loaded: a model in a folder needs no network
    _require_folder(out)
    from hesscope.study.head import RESULT, HeadSettings, describe_head, head_store, prepare_head, run_head

    settings = HeadSettings(model, text, tokens, context, top, dtype)
    store = head_store(out, settings)
    if store.has(RESULT):
        print("measured before under these settings; only the page is written again")
    else:
        study = prepare_head(settings)
        for what, how_much in describe_head(study, out):
            print(f"{what + ':':<13}{how_much}", flush=True)
        with progress_bar() as report:
            found = run_head(study, store, report)
        _say_found(found)
    from hesscope.report.head_page import head_summary, write_head_page

    result = store.require(RESULT)
    for what, how_much in head_summary(result):
        print(f"{what + ':':<13}{how_much}")
    page = write_head_page(out, result, _command())
    print(f"page: {page.resolve()}")


def _study_path(command: str, study: Path | None, example: bool) -> Path:
    """The STUDY.toml that was given; if the example was asked for, prints that and ends the command."""
    if example:
        from hesscope.study.config import example_study

        print(example_study(command), end="")
        raise typer.Exit
    if study is None:
        raise InputError(f"{command} needs a STUDY.toml (hesscope {command} --example prints one to start from)")
    return study


def _carry_out(
    prepared: Prepared,
    describe: Callable[[Prepared], list[tuple[str, str]]],
    run: Callable[[Prepared, Callable[[str, float], None]], int],
) -> None:
    """Say what is about to be done, and do it."""
    _require_folder(prepared.folder)
    for what, how_much in describe(prepared):
        print(f"{what + ':':<11}{how_much}", flush=True)
    with progress_bar() as report:
        found = run(prepared, report)
    _say_found(found)


def _print_findings(headline: str, *tables: list[tuple[str, ...]], more: str = "") -> None:
    """A sentence, and tables with an empty line before and after each; `more`: what follows the last one."""
    print(headline)
    for table in tables:
        print()
        _print_table(table)
    print(f"{more}\n" if more else "")


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _numbers(option: str, text: str, kind: Callable[[str], Number]) -> tuple[Number, ...]:
    """The numbers of a list such as 10,100,1000."""
    try:
        return tuple(kind(word) for word in _words(text))
    except ValueError:
        accepted = "whole numbers" if kind is int else "numbers"
        raise InputError(f"{option} must be {accepted} separated by commas, got {text!r}") from None


def _print_table(rows: list[tuple[str, ...]], left: bool = False) -> None:
    """Columns of text, the first row being their names; flush right, or left."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = (cell.ljust(width) if left else cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())


def _require_folder(folder: Path) -> None:
    """Refuse, before any work, an output folder that cannot be written to."""
    nearest = next(place for place in (folder, *folder.resolve().parents) if place.exists())
    if not nearest.is_dir():
        raise InputError(f"the output folder {folder} cannot be made: {nearest} is not a folder")
    try:
        with tempfile.TemporaryDirectory(dir=nearest):
            pass
    except OSError as error:
        raise InputError(f"the output folder {folder} cannot be written to: {error.strerror}") from error


def _say_found(found: int) -> None:
    if found:
        print(f"continued an earlier run: {found} finished step{'s' if found > 1 else ''} found")


def _command() -> str:
    return shlex.join(["hesscope", *sys.argv[1:]])


def _fail(message: str) -> int:
    print(f"hesscope: {' '.join(message.split())}", file=sys.stderr)
    return BAD_INPUT
