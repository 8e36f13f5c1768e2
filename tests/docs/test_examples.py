"""Every Python block of README and docs runs, page by page, in an empty folder, as a reader would type it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hesscope as hs
from hesscope.core.rng import stream
from hesscope.data import digits

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Part of what the last cell of each example prints.
PRINTED = {
    "convolution": "of the energy on the diagonal",
    "gpt2": "of the energy on the diagonal",
    "shared_eigenspaces": "x chance",
}
WITH_CODE = [page for page in PAGES if "```python" in page.read_text()]


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: page.stem)
def test_examples_run(page, tmp_path):
    code = "\n".join(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error", "-c", code]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr


def test_the_readme_example_has_ten_lines():
    code, *_ = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) == 10


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("script", sorted((ROOT / "examples").glob("*.py")), ids=lambda script: script.stem)
def test_example_scripts_run(script):
    command = [sys.executable, "-W", "error", str(script)]
    run = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    assert PRINTED[script.stem] in run.stdout


def test_the_numbers_quoted_for_the_digits():
    """docs/static-force.md quotes the demo's network at initialization."""
    training, _ = digits(dtype=torch.float64).split(1437, stream(0, "demo", "split"))
    model = hs.models.one_hidden(64, 16, 10, seed=0, dtype=torch.float64)
    rows = hs.Partition.by_row(model)
    objective = hs.Objective(model, "cross_entropy", training.batch("cross_entropy"))
    energies = hs.block_energies(hs.Hessian(objective), rows)
    force = hs.theory.static_force("one_hidden", "cross_entropy", 10, 64 / 1437, 16)
    measured = [energies.off_diagonal_ratio(rows.labels[:16]), energies.off_diagonal_ratio(rows.labels[16:])]
    text = " ".join((ROOT / "docs" / "static-force.md").read_text().split())
    assert f"predicted {force.hidden_ratio:.4f} and {force.output_ratio:.4f}" in text
    assert f"measured {measured[0]:.4f} and {measured[1]:.4f}" in text
