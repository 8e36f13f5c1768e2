# Everything runs in .venv, which is made on the first call and reused afterwards.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip --disable-pip-version-check install --quiet -c constraints.txt

.PHONY: demo test check bench clean

demo: .venv/.installed
	$(BIN)/hesscope demo

test: .venv/.installed-test
	$(BIN)/python -m pytest -n 2

check: .venv/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# On a GPU machine nothing is installed: the benchmark of products and spectra needs torch, NumPy and SciPy only.
ifeq ($(DEVICE),cuda)
bench:
	PYTHONPATH=src $(PYTHON) -m benchmarks --device cuda
else
bench: .venv/.installed-bench
	$(BIN)/python -m benchmarks
endif

# Other libraries that we test and time against, without what they ask for: a torchvision, which replaces or breaks the
# torch that is here, and which nothing of theirs that we call needs.
PEERS := curvlinops-for-pytorch backpack-for-pytorch unfoldNd linear_operator einconv einops opt_einsum tqdm

# torch comes first, so that no other package can pull in a different build of it.
.venv/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) torch
	$(PIP) -e .
	touch $@

.venv/.installed-test: .venv/.installed
	$(PIP) -e '.[test]'
	$(PIP) --no-deps $(PEERS)
	touch $@

.venv/.installed-bench: .venv/.installed-test
	$(PIP) --no-deps hessian-eigenthings pyhessian
	touch $@

clean:
	rm -rf .venv out
