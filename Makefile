# What one types; what it takes is in tests/scripts and critest/tools. Everything made is in target/.

TARGET := $(or $(CARGO_TARGET_DIR),$(CURDIR)/target)
CRITEST := $(TARGET)/release/podvisor-critest

.PHONY: all packages deps build images kernels test lint critest lab critest-lab test-lab demo bench clean

all: build

# Installs what the machine lacks. Needs root only if something is missing.
packages:
	tests/scripts/deps

# The same, and the pinned Go programs.
deps: packages
	critest/tools/build crictl ginkgo runc

build: packages
	cargo build --release -p podvisor -p podvisor-monitor -p podvisor-critest

# The images that the conformance suite pulls, and the suite itself, which names one of them by its digest.
images: build
	critest/tools/contents busybox busybox-static programs webservers
	critest/tools/build critest "$$($(CRITEST) images)"

# Debian's kernels 6.1 and 6.12, from which the tests build guests; about 60 MB, fetched once.
kernels: build
	tests/scripts/kernels

lint: packages
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings

# Everything: lint, unit tests, black-box tests, conformance. The last line is the total.
test: deps build images kernels
	tests/scripts/test

# The conformance suite alone with HANDLER=runc or crun; ARGUMENTS go to it: ARGUMENTS="--focus Streaming --parallel 4".
HANDLER := runc
critest: deps images
	$(CRITEST) sandbox -- $(CRITEST) run --handler $(HANDLER) --expected critest/expected/$(HANDLER).txt $(ARGUMENTS)

# A virtual machine with cgroup v2, AppArmor and systemd; tests/README.md says more.
lab:
	tests/lab/setup

# The conformance suite in it: with the cgroupfs driver, then with systemd as PID 1 and its driver.
IN_LAB := tests/lab/run --lsm landlock,apparmor --memory 4G --time-limit 3600
critest-lab: deps images lab
	$(IN_LAB) -- $(CRITEST) sandbox -- $(CRITEST) run --expected critest/expected/lab-cgroupfs.txt $(ARGUMENTS)
	$(IN_LAB) --systemd -- $(CRITEST) machine -- $(CRITEST) run --expected critest/expected/lab-systemd.txt $(ARGUMENTS)

# What only it can show: limits of cgroup v2, the daemon as a unit of systemd's, a loss of power.
test-lab: deps images lab
	tests/lab/test

# Pulls an image through a mirror and runs a pod with it, showing every step.
demo: build
	critest/tools/build crictl
	critest/tools/contents busybox-static
	tests/scripts/demo

# Times and memory, beside those of the OCI runtimes alone.
bench: deps build
	critest/tools/contents busybox
	cargo build --release -p podvisor-tests --bin podvisor-bench
	$(CRITEST) sandbox -- $(TARGET)/release/podvisor-bench

clean:
	rm -rf $(TARGET)
