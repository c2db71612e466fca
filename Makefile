# demo, test, bench, ceiling and lint do all their own set-up, in a virtual environment beside this file; gpu uses the
# Python at hand, with the packages it has.
PYTHON ?= python3
VENV := .venv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
# where `make bench` puts its results
RESULTS ?= bench/results/here
SOURCES := pyproject.toml setup.py constraints.txt README.md LICENSE MANIFEST.in \
	$(wildcard csrc/* csrc/*/* kernels/*.py rwn_ext/*.py rwn_ext/*/*.py)

.DELETE_ON_ERROR:
.PHONY: demo test bench ceiling lint gpu gpu-full gpu-csrc clean

demo: $(VENV)/installed-paper
	# from a folder without the sources: the package as installed, with its compiled kernels
	cd $(VENV) && bin/python -m rwn_ext.paper demo --out "$(CURDIR)/demo"

# Tests and benchmarks run the code of this folder, its compiled kernels too.
INPLACE = $(VENV)/bin/python setup.py --quiet build_ext --inplace

test: $(VENV)/installed-test
	$(INPLACE)
	$(VENV)/bin/python -m pytest --numprocesses auto

# On a GPU all cases would take hours: the most important are begun within this time, and nothing is compiled.
ON_GPU = $(VENV)/bin/python -c 'import sys, torch; print(sys.argv[1 + torch.cuda.is_available()])'

bench: $(VENV)/installed-bench
	$(INPLACE)
	mkdir -p $(RESULTS)
	# exit status 6, and 3 below: some cases are left out for want of time
	$(VENV)/bin/python -m pytest bench -q $(if $(QUICK),--quick,$$($(ON_GPU) --compiled=$(or $(COMPILED),some) "--budget 200")) \
		--benchmark-columns=median,iqr --benchmark-disable-gc --benchmark-json=$(RESULTS)/bench.json || test $$? = 6
	# it would continue what was measured before
	rm -f $(RESULTS)/kernels.json
	$(VENV)/bin/python -m bench.bench_kernels $(RESULTS) --just-tested \
		$(if $(QUICK),--budget 2,$$($(ON_GPU) "" "--budget 80")) || test $$? = 3
	$(VENV)/bin/python -m bench.report $(RESULTS)

ceiling: $(VENV)/installed-bench
	$(INPLACE)
	mkdir -p $(RESULTS)
	$(VENV)/bin/python -m pytest bench/bench_ceiling.py -q --ceiling --benchmark-columns=median,iqr --benchmark-disable-gc \
		--benchmark-json=$(RESULTS)/ceiling.json
	$(VENV)/bin/python -m bench.report $(RESULTS)

lint: $(VENV)/installed-lint
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

# Everything that needs a GPU, without a virtual environment or network: for a machine that has torch for its GPU. Within
# 8 minutes, every level for some seconds; gpu-full takes hours and can be continued. OUT is for the results.
gpu:
	$(PYTHON) -m bench.gpu $(if $(OUT),--out $(OUT))

gpu-full:
	$(PYTHON) -m bench.gpu --full $(if $(OUT),--out $(OUT))

# Every CUDA kernel against a host reference and under compute-sanitizer: nvcc, cmake and ninja are all it needs.
gpu-csrc:
	csrc/checks/run

clean:
	rm -rf $(VENV) build *.egg-info demo reproduced runs

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# Each of these holds the package as `pip install .` builds it, with one of its extras.
$(VENV)/installed-%: $(VENV)/bin/python $(SOURCES)
	$(PIP) install --quiet --constraint constraints.txt ".[$*]"
	touch $@
