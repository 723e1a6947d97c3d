# Cubicle on one machine: set it up, start it, test it. `make` alone lists what there is.
#
#   make up ARGS='--listen 0.0.0.0:3000'    passes options on to `cubicle up`
#   make e2e ARGS='-k volumes'              passes options on to pytest

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

export PATH := $(PATH):/usr/local/sbin:/usr/sbin:/sbin:$(HOME)/.cargo/bin
TARGET := $(or $(CARGO_TARGET_DIR),target)
TRIPLE := x86_64-unknown-linux-gnu
AS_ROOT := $(if $(filter 0,$(shell id -u)),,sudo)
BIN := /usr/local/bin/cubicle

.PHONY: help
help: ## List what there is
	@awk -F ': .*## ' '/^[a-z0-9-]+:.* ## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: up
up: setup build ## Install what is missing, build, and run Cubicle in the foreground
	@$(AS_ROOT) ln -sfn $(abspath $(TARGET)/release/cubicle) $(BIN)
	@exec $(AS_ROOT) $(BIN) up $(ARGS)

.PHONY: setup
setup: ## Install the packages that building and running need
	@deploy/setup.sh

.PHONY: setup-test
setup-test:
	@deploy/setup.sh --test

.PHONY: build
build: guest ## Build the server, with its command line, and the guest daemon
	@cargo build --release --package cubicle

# The guest daemon must not need anything from the image that it serves: it is linked statically.
# For that the target is named, so that the flags do not reach build scripts and macros.
.PHONY: guest
guest: ## Build the daemon that runs inside the VMs
	@RUSTFLAGS='-C target-feature=+crt-static' \
	    cargo build --profile guest --target $(TRIPLE) --package cubicle-guest --bin cubicle-guest
	@mkdir -p $(TARGET)/release
	@ln -f $(TARGET)/$(TRIPLE)/guest/cubicle-guest $(TARGET)/release/cubicle-guest

.PHONY: kernel
kernel: ## Build a smaller guest kernel, for `cubicle up --kernel`
	@deploy/kernel/build.sh $(ARGS)

.PHONY: test
test: setup-test ## Run every check and every test, with real VMs and real clients
	@tests/run

.PHONY: lint
lint: setup-test ## Check the format, the code, the scripts and the dependencies
	@tests/run lint

.PHONY: unit
unit: setup-test ## Run the tests of the crates
	@tests/run unit

.PHONY: e2e
e2e: setup-test ## Run the end-to-end tests
	@tests/run e2e $(ARGS)

.PHONY: fmt
fmt: ## Format the code
	@cargo fmt --all

.PHONY: clean
clean: ## Remove what was built
	@cargo clean

.PHONY: uninstall
uninstall: ## Remove Cubicle's data and everything else that it put on this machine
	@$(AS_ROOT) deploy/uninstall.sh
