# `make demo` and `make test` set up all they need on a fresh machine; `make help` lists the rest.

# The Python of the tests and benchmarks. `make gpu-check PYTHON=python3` runs where torch is installed without a .venv.
PYTHON ?= .venv/bin/python
INSTALLED := .venv/.installed
PEER_INSTALLED := .venv-peer/.installed

.DEFAULT_GOAL := help
.PHONY: help install fetch demo test test-crash test-storage test-faults test-zoo test-speeds lab check bench bench-peer gpu-check clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(INSTALLED) ## make .venv, with .venv/bin/zinf in it

fetch: install ## get the demo's model and text into data/ (SmolLM2-135M and the King James Bible)
	.venv/bin/python recipes/fetch_smollm2.py

demo: fetch ## train SmolLM2-135M with its whole state on disk: 12 steps, a few minutes
	.venv/bin/zinf launch recipes/smollm2-135m.yaml

# Integration tests wait for most of their time, so the unit tests have what cores they leave: there are two workers of
# those and one more than there are cores of these, which step back. Ranks of tests that run beside each other have more
# threads than there are cores: one that waits must not spin.
test: install lab ## run the unit and integration tests, beside each other
	@echo 'What the tests print comes when all of a kind are over, in some minutes.'
	@$(MAKE) --no-print-directory --jobs 2 --output-sync=target test-integration test-units

.PHONY: test-units test-integration
test-units: install
	OMP_NUM_THREADS=1 nice -n 19 $(PYTHON) -m pytest --numprocesses $$(($$(nproc) + 1)) --dist worksteal tests/unit tests/gpu

test-integration: install
	OMP_WAIT_POLICY=passive $(PYTHON) -m pytest --numprocesses 2 --dist loadgroup tests/integration

test-crash: install ## kill a run 25 times in a row, on 1 and 2 ranks, in training and in the writes of checkpoints
	$(PYTHON) -m pytest tests/crash

test-storage: install ## fail every call that reads, writes, syncs or names a file, one at a time: half an hour
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest --numprocesses auto tests/storage_faults

test-faults: install lab ## every fault of a run on many hosts, at ten moments each, by SSH and by srun: an hour
	ZINF_FAULT_MOMENTS=10 $(PYTHON) -m pytest --numprocesses 2 --dist loadgroup tests/integration/test_faults.py \
	  tests/integration/test_ssh.py tests/integration/test_preflight.py tests/integration/test_slurm_jobs.py tests/integration/test_bench_links.py \
	  tests/integration/test_relays.py --junitxml=.faults.xml
	PYTHONPATH=tests $(PYTHON) -m programs.fault_table .faults.xml

test-zoo: install ## every model type of the installed transformers, made tiny, against plain PyTorch; and all that is sampled
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest --numprocesses auto tests/zoo
	ZINF_TEST_ALL=1 OMP_NUM_THREADS=1 $(PYTHON) -m pytest --numprocesses auto -m sampled tests/unit

test-speeds: ## the tests as on a machine whose measured speeds are a tenth of this one's, and ten times them
	ZINF_TEST_SPEED=0.1 $(MAKE) test
	ZINF_TEST_SPEED=10 $(MAKE) test

# Tests make hosts of their own out of sshd and network namespaces, with a Slurm on them, and open reports in a browser;
# where these can't be had they say so and skip. RUNLEVEL=1 keeps the packages from starting servers of their own.
lab:
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && ! { command -v sshd && command -v ip && command -v rsync && command -v tcsh && command -v fish && command -v chromium && command -v slurmctld && command -v munged; } >/dev/null; then \
	  { apt-get update -qq && RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
	    openssh-client openssh-server iproute2 rsync tcsh fish chromium slurm-wlm munge; } >/dev/null 2>&1 \
	  || echo 'note: not all of sshd, ip, rsync, tcsh, fish, chromium and Slurm are here; tests that need them are skipped'; fi

check: install ## lint, formatting and types, of the tests too
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	$(PYTHON) -m mypy recipes/fetch_smollm2.py
	$(PYTHON) -m mypy -p benchmarks

bench: install ## measure this machine, side by side with plain PyTorch
	$(PYTHON) -m benchmarks.run

bench-peer: install $(PEER_INSTALLED) ## the same with DeepSpeed beside it, and a sweep over 1 to 16 micro-batches
	$(PYTHON) -m benchmarks.run --rounds 1 --steps 3 --cases 8x16 8x64 1x16 --contenders plain zinf-cpu zinf-nvme deepspeed deepspeed-small
	$(PYTHON) -m benchmarks.run --rounds 2 --steps 3 --cases 1x16 --contenders plain zinf-in-3.2-gib deepspeed-small
	$(PYTHON) -m benchmarks.run --rounds 1 --steps 2 --cases sweep --contenders zinf-nvme deepspeed

gpu-check: ## the tests and benchmarks of an accelerator, in 10 minutes; without one, a rehearsal on the CPU
	$(PYTHON) -m pytest tests/gpu; tests=$$?; $(PYTHON) -m benchmarks.gpu && exit $$tests

clean: ## remove build products and caches; .venv, data and runs stay
	rm -rf build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -path './.venv*' -prune -o -name __pycache__ -type d -exec rm -rf {} +

# Debian and Ubuntu ship venv as a package of its own. torch comes first and exact: on a machine without a GPU a bare
# `torch` may bring gigabytes of CUDA. The stamp is written last, so an install cut short is taken up again.
$(INSTALLED): pyproject.toml
	@python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo 'error: zinf needs Python 3.10 or newer' >&2; exit 1; }
	@python3 -c 'import ensurepip' 2>/dev/null \
	  || { [ "$$(id -u)" = 0 ] && apt-get update -qq && apt-get install -y -qq python3-venv; } \
	  || { echo 'error: python3 has no venv: sudo apt-get install python3-venv' >&2; exit 1; }
	python3 -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[dev,demo,report,wandb,mlflow,adapters,pictures]'
	@touch $@

# DeepSpeed has an environment of its own, with the same torch and transformers. Its operators are compiled here, before anything is timed.
$(PEER_INSTALLED): $(INSTALLED)
	@{ [ -e /usr/include/libaio.h ] && command -v g++ && python3 -c 'import os, sysconfig; os.stat(sysconfig.get_path("include") + "/Python.h")'; } >/dev/null 2>&1 \
	  || { [ "$$(id -u)" = 0 ] && apt-get update -qq && apt-get install -y -qq g++ libaio-dev python3-dev; } \
	  || { echo 'error: DeepSpeed compiles its operators: sudo apt-get install g++ libaio-dev python3-dev' >&2; exit 1; }
	python3 -m venv .venv-peer
	.venv-peer/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	DS_BUILD_OPS=0 .venv-peer/bin/python -m pip install --quiet --disable-pip-version-check deepspeed==0.19.8 \
	  transformers==$$(.venv/bin/python -c 'from importlib.metadata import version; print(version("transformers"))')
	.venv-peer/bin/python -m benchmarks.deepspeed_peer
	@touch $@
