# queuectl needs no build: queuectl.py runs as it is. These are the chores around it.
# GNU make 3.81 or newer, a POSIX sh and Python 3.8 or newer.

PYTHON ?= python3
PREFIX ?= /usr/local
DESTDIR ?=
ARGS ?=

MAKEFLAGS += --no-print-directory
# Nothing is written beside the sources, and no plugin of this machine's pytest changes what a test does.
export PYTHONDONTWRITEBYTECODE = 1
export PYTEST_DISABLE_PLUGIN_AUTOLOAD = 1

RELEASE = queuectl.py test_queuectl.py README.md Makefile LICENSE
PIP_INSTALL = -m pip install --quiet --disable-pip-version-check --retries 1

# For recipes: `sh` fragments that leave the answer in a variable.
# $$v: the version of PYTHON, as 3.8; one line and the end if PYTHON can't be used.
python-version = v=`"$(PYTHON)" -c 'import sys; print("%d.%d" % sys.version_info[:2]); sys.exit(sys.version_info < (3, 8))'` \
	|| { echo "make: PYTHON=$(PYTHON) can't be used$${v:+ (it is Python $$v)}: queuectl needs Python 3.8 or newer" >&2; exit 1; }
# $$py: the Python that runs pytest, PYTHON itself if it has one, else that of .venv/3.8.
pytest-python = $(python-version); py="$(PYTHON)"; "$$py" -c 'import pytest' 2>/dev/null || py=.venv/$$v/bin/python
# Two Pythons of one version are told apart by this.
identity = import sys; print(sys.base_prefix, sys.version)

.PHONY: help
help:
	@echo "queuectl: a background job queue in one file. Targets:"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' "$(firstword $(MAKEFILE_LIST))"

.PHONY: test
test: pytest ## run the tests; PYTHON=python3.8 with another Python, ARGS="-x -k enqueue" for pytest
	@$(pytest-python); "$$py" -m pytest -p no:cacheprovider $(ARGS)

.PHONY: stress
stress: ## the same with storms of minutes and hundreds of thousands of jobs
	@QUEUECTL_TEST_FULL=1 $(MAKE) test

# Gives PYTHON a pytest in .venv/VERSION, unless it has one of its own or that one is there.
.PHONY: pytest
pytest:
	@$(pytest-python); [ "$$py" = "$(PYTHON)" ] && exit 0; venv=.venv/$$v; \
	"$$py" -c 'import pytest' 2>/dev/null \
		&& [ "`"$$py" -c '$(identity)'`" = "`"$(PYTHON)" -c '$(identity)'`" ] && exit 0; \
	echo "make: $(PYTHON) (Python $$v) has no pytest; installing one in $$venv"; mkdir -p .venv; \
	{ "$(PYTHON)" -m venv --clear "$$venv" && "$$py" $(PIP_INSTALL) pytest; } >"$$venv.log" 2>&1 && exit 0; \
	rm -rf "$$venv"; echo "make: no pytest for $(PYTHON) (Python $$v): it has none, and $$venv could not be made" \
		"(no network, or no venv and ensurepip; see $$venv.log)" >&2; exit 1

.PHONY: lint
lint: ## ruff and mypy --strict, installed in .venv/lint (skipped where that is not possible)
	@[ -f .ci/ruff.toml ] || { echo "skipped: lint (its settings are in the repository, not in the archive)"; exit 0; }; \
	$(python-version); py=.venv/lint/bin/python; \
	"$$py" -m ruff --version >/dev/null 2>&1 && "$$py" -m mypy --version >/dev/null 2>&1 || { \
		echo "make: installing ruff and mypy in .venv/lint"; mkdir -p .venv; \
		{ "$(PYTHON)" -m venv --clear .venv/lint && "$$py" $(PIP_INSTALL) ruff mypy; } >.venv/lint.log 2>&1 || { \
			rm -rf .venv/lint; echo "skipped: lint (ruff and mypy could not be installed; see .venv/lint.log)"; exit 0; }; }; \
	status=0; \
	echo "ruff check"; \
	"$$py" -m ruff check --no-cache --config .ci/ruff.toml \
		`ls -d queuectl.py test_queuectl.py .ci/demo .ci/*.py 2>/dev/null` || status=1; \
	for os in linux darwin; do \
		echo "mypy --strict --platform $$os"; \
		"$$py" -m mypy --config-file .ci/mypy.ini --strict --platform $$os --cache-dir .venv/lint/mypy queuectl.py || status=1; \
	done; exit $$status

.PHONY: bench
bench: ## how fast it is, next to xargs and others, as a table; a quarter of an hour; ARGS="--only drain"
	@[ -f .ci/bench.py ] || { echo "make: the benchmark is in the repository, not in the archive" >&2; exit 1; }
	@"$(PYTHON)" .ci/bench.py $(ARGS)

.PHONY: demo
demo: ## half a minute of real work in a temporary folder, its results checked
	@[ -f .ci/demo ] || { echo "make: the demo is in the repository, not in the archive" >&2; exit 1; }
	@"$(PYTHON)" .ci/demo

# Installs the module compiled here and now, never to be checked again, and a launcher that names its
# Python outright and skips what only slows the start (site-packages: queuectl uses none). What it
# made is noted in lib/queuectl/installed: uninstall removes that and no more.
define INSTALL_PY
import os, py_compile, shlex, shutil, sys
root = os.path.abspath(os.path.expanduser(sys.argv[1]))
lib, launcher = os.path.join(root, "lib", "queuectl"), os.path.join(root, "bin", "queuectl")
tag, python = sys.implementation.cache_tag, sys.executable
line = "#!" + python + " -IS"
if " " in python or len(os.fsencode(line)) > 127:  # more than a first line can say: sh says it, in words that Python reads past
    line = "#!/bin/sh\n" + "\x27\x27\x27exec\x27 " + shlex.quote(python) + " -IS \"$$0\" \"$$@\"\n\x27 \x27\x27\x27"
try:
    os.umask(0o022)
    new = [d for d in ("bin", "lib", ".") if not os.path.isdir(os.path.join(root, d))]
    shutil.rmtree(os.path.join(lib, "__pycache__"), ignore_errors=True)  # of an earlier version
    os.makedirs(os.path.join(lib, "__pycache__"))
    os.makedirs(os.path.dirname(launcher), exist_ok=True)
    with open(os.path.join(lib, "installed"), "a") as f:
        f.writelines(d + "\n" for d in new)
    module = os.path.join(lib, "queuectl.py")
    shutil.copyfile("queuectl.py", module + ".new")
    os.replace(module + ".new", module)
    py_compile.compile(module, os.path.join(lib, "__pycache__", "queuectl.%s.pyc" % tag), doraise=True,
                       invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
    with open(launcher + ".new", "w") as f:
        f.write(line + """
import os
import sys

prefix = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
sys.path.insert(0, os.path.join(prefix, "lib", "queuectl"))
from queuectl import main

if __name__ == "__main__":
    sys.exit(main())
""")
    os.chmod(launcher + ".new", 0o755)
    os.replace(launcher + ".new", launcher)
except OSError as e:
    sys.exit("make: can\x27t install in %s: %s (PREFIX=\"$$HOME/.local\" needs no rights)" % (root, e))
print("installed: %s (Python %s)" % (launcher, sys.version.split()[0]))
if os.path.dirname(launcher) not in os.environ.get("PATH", "").split(os.pathsep) and len(sys.argv) < 3:
    print("note: %s is not on the PATH" % os.path.dirname(launcher))
endef

.PHONY: install
install: export PROGRAM = $(INSTALL_PY)
install: ## install the command `queuectl`; PREFIX=/usr/local, and DESTDIR for packagers
	@$(python-version); "$(PYTHON)" -I -c "$$PROGRAM" "$(DESTDIR)$(PREFIX)" $(if $(DESTDIR),staged)

.PHONY: uninstall
uninstall: ## remove what `make install` with the same PREFIX made
	@root="$(DESTDIR)$(PREFIX)"; case "$$root" in '~/'*) root="$$HOME/$${root#??}";; esac; \
	lib="$$root/lib/queuectl"; \
	[ -f "$$lib/installed" ] || { echo "make: no queuectl is installed in $$root" >&2; exit 1; }; \
	made=`cat "$$lib/installed"`; \
	rm -f "$$root/bin/queuectl" "$$lib/queuectl.py" "$$lib/__pycache__"/queuectl.*.pyc "$$lib/installed" || exit 1; \
	rmdir "$$lib/__pycache__" "$$lib" 2>/dev/null; \
	for dir in $$made; do rmdir "$$root/$${dir#.}" 2>/dev/null; done; \
	echo "removed: $$root/bin/queuectl"

# The same sources and the same Python give the same bytes: no owner, the time of the last commit.
define DIST_PY
import gzip, hashlib, os, re, subprocess, sys, tarfile
missing = [name for name in sys.argv[1:] if not os.path.isfile(name)]
if missing:
    sys.exit("make: no archive without " + ", ".join(missing))
said = subprocess.run([sys.executable, "queuectl.py", "--version"], stdout=subprocess.PIPE, universal_newlines=True, check=True).stdout
version = re.search(r"[0-9]+(\.[0-9]+)+[0-9A-Za-z.+-]*", said).group()
try:
    git = subprocess.run(["git", "log", "-1", "--format=%ct"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout
except OSError:
    git = b""
time = int(os.environ.get("SOURCE_DATE_EPOCH") or git or 315532800)
os.makedirs("dist", exist_ok=True)
name = "queuectl-%s.tar.gz" % version
path = os.path.join("dist", name)
with open(path, "wb") as raw, gzip.GzipFile("", "wb", 9, raw, mtime=0) as packed, \
        tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as tar:
    for member in sorted(sys.argv[1:]):
        info = tarfile.TarInfo("queuectl-%s/%s" % (version, member))
        info.size, info.mtime, info.mode = os.path.getsize(member), time, 0o755 if member == "queuectl.py" else 0o644
        with open(member, "rb") as f:
            tar.addfile(info, f)
with open(path, "rb") as f:
    digest = hashlib.sha256(f.read()).hexdigest()
with open(path + ".sha256", "w") as f:
    f.write("%s  %s\n" % (digest, name))
print("%s\n%s.sha256: %s" % (path, path, digest))
print("to check it where it arrives, in its folder: sha256sum -c %s.sha256 (macOS: shasum -a 256 -c)" % name)
endef

.PHONY: dist
dist: export PROGRAM = $(DIST_PY)
dist: ## an archive for other machines, with its checksum, in dist/
	@$(python-version); "$(PYTHON)" -c "$$PROGRAM" $(RELEASE)

.PHONY: clean
clean: ## remove what these targets made here: dist/, .venv/ and caches
	rm -rf dist .venv __pycache__ .ci/__pycache__ .pytest_cache .benchmarks .mypy_cache .ruff_cache
