# `make check` takes under a minute and needs no root; `make test` is what a user needs to trust it, as root.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

CNI := build/cni/interceptor-cni

.PHONY: bpf cni docs check test unit netns runtimes deploy manifests torture kernels golden lock bench demo clean

$(STAMP): pyproject.toml requirements.lock
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -qq --disable-pip-version-check -r requirements.lock
	$(BIN)/pip install -qq --disable-pip-version-check --no-deps --config-settings editable_mode=compat -e .
	$(BIN)/python -m compileall -q interceptor cni
	touch $@

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest -q --co tests --ignore tests/deploy >/dev/null
	$(BIN)/pytest -q -n auto tests/unit tests/property

unit: $(STAMP)
	$(BIN)/pytest -q tests/unit tests/property

test: check $(CNI)
	$(BIN)/pytest -q -n 5 --dist loadscope -m 'not torture' tests/netns tests/proxy tests/cni tests/bpf tests/e2e

netns: $(STAMP)
	$(BIN)/pytest -q -n 4 --dist loadscope -m 'not torture' tests/netns

# Containers of real podman and containerd, captured by the installed plugin: about four minutes; tests/runtimes/setup.sh first.
runtimes: $(STAMP) $(CNI)
	$(BIN)/pytest -q tests/runtimes

# The image, built without a registry and run; the chart and the manifests against Kubernetes' schemas. tests/runtimes/setup.sh first.
deploy: $(STAMP)
	$(BIN)/pytest -q tests/deploy

manifests: $(STAMP)
	$(BIN)/python -m tests.deploy.rendering

# Long: 2,000 sampled packets a backend against `walk`, what packets make of libiptc's rules, deep hypothesis profiles.
torture: $(STAMP)
	HYPOTHESIS_PROFILE=deep $(BIN)/pytest -q tests/property
	$(BIN)/pytest -q -m torture --ignore tests/runtimes --ignore tests/deploy tests

# Other kernels, and kernels that lack something, under plain QEMU without KVM: vagrant/README.md. As root; needs
# vagrant/qemu/setup.sh. KERNELS=--short is what CI can afford; KERNELS="--kernel 6.1 --variant no-nat" is one machine.
KERNELS ?=
kernels: $(STAMP) $(CNI)
	$(BIN)/python -m vagrant.qemu $(KERNELS)

# Needs clang and linux-libc-dev; the objects are committed, so that nobody else does.
bpf: $(STAMP)
	$(BIN)/python -m tests.bpf.build

# The diff is reviewed like code.
docs: $(STAMP)
	$(BIN)/python -m tests.write_docs

# One static file for hosts that have no Python: Debian's libpython with the byte code appended.
cni: $(CNI)

$(CNI): $(wildcard cni/*.py cni/*/*.py cni/static/* cni/static/library/* interceptor/*.py interceptor/*/*.py)
	/usr/bin/python3.11 cni/static/build.py $@

golden: $(STAMP)
	$(BIN)/python -m tests.golden.write

lock:
	$(BIN)/pip freeze --exclude-editable | grep -v '^-e' > requirements.lock

# Does every measure work here? Under two minutes; says nothing of speed. The real thing: bench/README.md.
bench: $(STAMP)
	$(BIN)/python bench/init.py 5
	$(BIN)/python -m bench.proxies --quick --out -

demo: $(STAMP)
	$(BIN)/interceptor demo

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .hypothesis
