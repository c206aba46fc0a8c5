# SPDX-License-Identifier: GPL-2.0
# Everything is built and run in a Debian 13 root of its own (tools/build/setup), so the host needs only mmdebstrap.
# KDIR=... builds the modules for another kernel tree. The kernel's own build files are Kbuild and hv_core/Kbuild.

.DEFAULT_GOAL := modules
.PHONY: help setup all modules install demo test bench soak fuzz-mshv lint clean

SETUP := tools/build/setup
IN := tools/build/in-root
# The kernel's build system on this tree; objects go to the folder MO. (The quote is closed where it is used.)
# Debian's build tree has no vmlinux to take BTF from.
KBUILD = $(IN) sh -c '$(MAKE) -s -C "$$KDIR" CONFIG_DEBUG_INFO_BTF_MODULES= M=$(CURDIR)
# A bed, a test (or a list with commas) for `make test`; empty for all.
BED :=
TEST :=
# Length and first number of `make fuzz-mshv`; an empty seed is a new one each time.
FUZZ_SECONDS := 600
FUZZ_SEED :=
# Children of `make soak`.
BOOTS := 20
export KDIR HV_CACHE HV_SERIES HV_MIRROR

help: ## Lists the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

setup: ## Makes the Debian root and the kernel build tree in the cache (once, 5 minutes)
	@$(SETUP)

all: modules ## Builds everything

modules: setup ## Builds hv_core.ko into build/modules
	@mkdir -p build/modules
	@$(KBUILD) MO=$(CURDIR)/build/modules modules'
	@$(IN) selftests/build

install: ## Installs the modules for their kernel, the tools, and the rule that lets group mshv use /dev/mshv (INSTALL_MOD_PATH, DESTDIR)
	@tools/build/install

demo: modules ## Boots a Debian root that launches the hypervisor and boots a stock Debian child, all shown (BED=vmx: on VT-x)
	@$(IN) selftests/run --demo --bed "$(BED)"

test: modules ## Runs lint, unit tests and all beds; BED=svm TEST=launch runs one test on one bed, V=1 shows all results
	@$(IN) selftests/run $(if $(BED)$(TEST),--bed "$(BED)" --test "$(TEST)",--host) $(if $(V),--verbose)

bench: modules ## Counts the instructions of exits, KVM's and ours on the same beds (10 minutes)
	@$(IN) selftests/run --bed svm-count,vmx-count --test exit_cost

soak: modules ## Boots BOOTS children in a row on AMD-V and on VT-x (20: an hour)
	@$(IN) selftests/run --bed "$(or $(BED),svm,vmx)" --test boot --timeout $$(($(BOOTS) * 60 + 120)) --kernel child_boots=$(BOOTS) --verbose

fuzz-mshv: modules ## Random ioctls on /dev/mshv for FUZZ_SECONDS; what it found is found again with FUZZ_SEED
	@$(IN) selftests/run --bed "$(or $(BED),svm)" --test mshv_fuzz --timeout $$(($(FUZZ_SECONDS) * 2 + 120)) \
		--kernel "fuzz_seconds=$(FUZZ_SECONDS) fuzz_seed=$(FUZZ_SEED)"

lint: setup ## Checks the form of the sources
	@$(IN) sh -c 'find hv_core tools selftests -name "*.rs" | xargs rustfmt --check --config-path .'
	@$(IN) cargo clippy --quiet --workspace --all-targets -- -D warnings
	@mkdir -p build/lint
	@$(KBUILD) MO=$(CURDIR)/build/lint CLIPPY=1 KRUSTFLAGS=-Dwarnings modules'

clean: ## Removes what was built in this tree (the cache stays)
	rm -rf build
