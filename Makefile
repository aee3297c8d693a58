# queuectl needs no build: queuectl.py runs as it is. These are the chores around it.
# Needs make, a POSIX sh and Python 3.8 or newer; the targets lint, bench and demo need the repository.

PYTHON ?= python3
PREFIX ?= /usr/local
RELEASE = queuectl.py test_queuectl.py README.md Makefile LICENSE

# Nothing is written beside the sources.
export PYTHONDONTWRITEBYTECODE = 1

.PHONY: help
help:
	@echo "queuectl: a background job queue in one file. Targets:"
	@sed -n 's/^\([a-z]*\):.*## /  make \1	/p' Makefile

.PHONY: test
test: ## run the tests, on every core; PYTHON=python3.8 with another Python, ARGS="-x -k enqueue" for pytest
	@"$(PYTHON)" test_queuectl.py $(ARGS)

.PHONY: stress
stress: ## the same with storms of minutes and hundreds of thousands of jobs
	@QUEUECTL_TEST_FULL=1 "$(PYTHON)" test_queuectl.py $(ARGS)

.PHONY: lint
lint: ## ruff and mypy --strict, installed in .venv/lint (skipped where that is not possible)
	@PYTHON="$(PYTHON)" .ci/lint

.PHONY: bench
bench: ## how fast it is, next to xargs and others, as a table; a quarter of an hour; ARGS="--only drain"
	@"$(PYTHON)" .ci/bench.py $(ARGS)

.PHONY: demo
demo: ## half a minute of real work in a temporary folder, its results checked
	@"$(PYTHON)" .ci/demo

.PHONY: install
install: ## install the command `queuectl`; PREFIX=/usr/local, and DESTDIR for packagers
	@"$(PYTHON)" queuectl.py install --prefix "$(DESTDIR)$(PREFIX)"

.PHONY: uninstall
uninstall: ## remove what `make install` with the same PREFIX made
	@"$(PYTHON)" queuectl.py uninstall --prefix "$(DESTDIR)$(PREFIX)"

.PHONY: dist
dist: ## an archive for other machines, with its checksum, in dist/
	rm -rf dist && mkdir -p dist/queuectl && cp -p $(RELEASE) dist/queuectl
	cd dist && tar -czf queuectl.tar.gz queuectl
	cd dist && { sha256sum queuectl.tar.gz || shasum -a 256 queuectl.tar.gz; } >queuectl.tar.gz.sha256

.PHONY: clean
clean: ## remove what these targets made here: dist/, .venv/ and caches
	rm -rf dist .venv __pycache__ .ci/__pycache__ .pytest_cache .benchmarks .mypy_cache .ruff_cache
