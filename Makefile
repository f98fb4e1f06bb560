# What one types; what it takes is in tests/scripts and critest/tools. Everything made is in target/.

TARGET := $(or $(CARGO_TARGET_DIR),$(CURDIR)/target)
CRITEST := $(TARGET)/release/podvisor-critest

.PHONY: all packages deps build deb images kernels guest test lint critest lab critest-lab test-lab demo bench clean
.PHONY: critest-vm critest-lab-vm critest-orders critest-peer test-gvisor kubernetes test-kubernetes fuzz
.PHONY: bench-idle bench-fs bench-vmm bench-load test-faults test-oci-runtime test-k8s-conformance test-kvm test-kubernetes-lab

all: build

# Installs what the machine lacks. Needs root only if something is missing.
packages:
	tests/scripts/deps

# The same, and the pinned Go programs.
deps: packages
	critest/tools/build crictl ginkgo nri-plugin runc

# The agent runs where there are no libraries, so it is linked statically; of what it uses nothing is compiled for that.
build: packages
	cargo build --release -p podvisor -p podvisor-monitor -p podvisor-fs -p podvisor-qemu -p podvisor-vmm -p podvisor-critest
	cargo rustc --release -p podvisor-agent --bin podvisor-agent -- -C target-feature=+crt-static

# A Debian package: the programs, the systemd unit, and what a node has to be told; config/package says what is in it.
deb: build
	config/package/build

# The images that the conformance suite pulls, and the suite itself, which names one of them by its digest.
images: build
	critest/tools/contents busybox busybox-static programs webservers
	critest/tools/build critest "$$($(CRITEST) images)"

# Debian's kernels 6.1 and 6.12, from which the tests build guests; about 60 MB, fetched once.
kernels: build
	tests/scripts/kernels

# The guest from one of them that tests start pods in virtual machines from.
guest: kernels
	tests/scripts/guest

lint: packages
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings

# Everything: lint, unit tests, black-box tests, conformance. The last line is the total.
test: deps build images guest lab
	tests/scripts/test

# All failure tests: kills at every stage and at random, runtimes, plugins and disks that fail. `make test` has a short form of them.
test-faults: deps build images guest
	cargo test --workspace --no-run
	PODVISOR_FAULTS=full tests/scripts/cargo-test --workspace --test faults

# The conformance suite alone, with each OCI runtime one by one or with those in HANDLER; ARGUMENTS go to it:
# ARGUMENTS="--focus Streaming". Every run is compared with critest/expected/HANDLER.txt.
HANDLER := runc crun runc-debian runsc
critest: deps images guest
	critest/tools/build $(filter runsc,$(HANDLER)) crictl
	tests/scripts/critest $(HANDLER)

# The same for pods in virtual machines, by QEMU's translator where there is no KVM.
critest-vm: deps images guest
	tests/scripts/critest vm

# One of the targets of pod-vm/fuzz/src/lib.rs, for so many seconds.
SECONDS := 60
fuzz: packages
	tests/scripts/fuzz $(TARGET) $(SECONDS)

# Pods on gVisor: what the conformance suite does not ask.
test-gvisor: deps images
	critest/tools/build runsc
	tests/scripts/cargo-test -p podvisor-tests --test black-box -- --ignored gvisor::

# The OCI runtime specification's own tests on the code that makes containers in machines, beside Debian's runc.
test-oci-runtime: deps
	critest/tools/build runtime-tools
	cargo build --release -p podvisor-critest
	cargo build -p podvisor-container --example oci-runtime
	$(CRITEST) sandbox -- tests/scripts/oci-runtime

# A control plane of Kubernetes from its own modules. The first time takes ten minutes.
kubernetes:
	tests/kubernetes/build

# Clusters on podvisor, started by kubeadm. RUNTIME=containerd runs on the peer what holds for every runtime. The debug build is what the
# daemon is upgraded to and from.
test-kubernetes: deps images guest kubernetes
	$(if $(filter containerd,$(RUNTIME)),critest/tools/build containerd)
	cargo build -p podvisor -p podvisor-monitor -p podvisor-fs -p podvisor-qemu -p podvisor-vmm
	tests/scripts/cargo-test -p podvisor-tests --test kubernetes -- --ignored

# Some of them in the lab, and what only the lab has (swap, memory protection, a shutdown of the node): on cgroup v2, podvisor from its
# package as a unit of systemd's, machines on KVM. Half an hour.
test-kubernetes-lab: deps images guest lab kubernetes
	tests/lab/test kubernetes

# Kubernetes' own conformance tests on such a cluster, those that FOCUS names, PROCS at once; compared with tests/kubernetes/conformance.txt.
# TRUST=untrusted makes every pod a machine that can be one, SERIAL=1 runs those that bear no others; RUNTIME=containerd as above.
FOCUS ?= \[sig-node\].*\[Conformance\]
test-k8s-conformance: deps images guest kubernetes
	$(if $(filter containerd,$(RUNTIME)),critest/tools/build containerd)
	tests/kubernetes/build conformance
	PODVISOR_FOCUS='$(FOCUS)' tests/scripts/cargo-test -p podvisor-tests --test kubernetes -- --ignored conformance::

# The same suite in three random orders and with four specs at once.
SEEDS := 1 20 300
critest-orders: deps images
	tests/scripts/critest $(foreach handler,$(filter runc crun,$(HANDLER)),$(SEEDS:%=$(handler):%) $(handler):parallel)

# The same suite and images against containerd: where it fails, the suite's surroundings are wrong.
critest-peer: deps images
	critest/tools/build containerd
	tests/scripts/critest containerd

# A virtual machine with cgroup v2, AppArmor and systemd; tests/README.md says more.
lab:
	tests/lab/setup

# The conformance suite in it: with the cgroupfs driver, then with systemd as PID 1 and its driver.
IN_LAB := tests/lab/run --lsm landlock,apparmor --memory 4G --time-limit 3600
critest-lab: deps images lab
	$(IN_LAB) -- $(CRITEST) sandbox -- $(CRITEST) run --expected critest/expected/lab-cgroupfs.txt $(ARGUMENTS)
	$(IN_LAB) --systemd -- $(CRITEST) machine -- $(CRITEST) run --expected critest/expected/lab-systemd.txt $(ARGUMENTS)

# The same with every pod a machine of podvisor-vmm's, on the lab's KVM; compared with the list of the machines by QEMU (`make critest-vm`).
# One processor for the lab, as in tests/lab/test.
IN_LAB_VM := tests/lab/run --cpus 1 --modules "kvm_amd tun loop" --lsm landlock --memory 5G --time-limit 7200
critest-lab-vm: deps images guest lab
	$(IN_LAB_VM) -- $(CRITEST) sandbox -- $(CRITEST) run --expected critest/expected/vm.txt --handler vm --runtime-handler vm --hypervisor kvm $(ARGUMENTS)

# What only it can show: machines on KVM, limits of cgroup v2, checkpoints by CRIU, the daemon as a unit of systemd's, a loss of power.
test-lab: deps images guest lab
	tests/lab/test

# Machines on this machine's own KVM, for processors that the lab does not have; says why not where that cannot be.
test-kvm: deps images guest
	tests/scripts/kvm $(ARGUMENTS)

# Pulls an image through a mirror and runs pods with it, one of them in a virtual machine, showing every step.
demo: build kernels
	critest/tools/build crictl
	critest/tools/contents busybox-static
	tests/scripts/demo

# podvisor beside containerd, CRI-O, the OCI runtimes and QEMU alone: tests/bench/README.md. The last table is the goals. SHORT=1 leaves out the
# peers and what takes long; PUBLISH=1 writes README.md's section and tests/bench/results. ARGUMENTS="--workloads pod,log" runs a part.
BENCH_SHORT := --subjects podvisor,podvisor-crun,podvisor-builtin,runc,crun,podvisor-vm,qemu --rounds 4 \
	--workloads pod,at-once,grow,log,streams,pull,machine,timeline
bench: deps build guest
	critest/tools/contents busybox programs
	$(if $(SHORT),,critest/tools/build containerd crio)
	cargo build --release -p podvisor-compare
	$(TARGET)/release/podvisor-compare run --output $(TARGET)/bench $(if $(SHORT),$(BENCH_SHORT)) $(if $(PUBLISH),--publish) $(ARGUMENTS)

# What the daemon and a virtual machine hold and do when there is nothing to do; ARGUMENTS is memory, machine or clock.
bench-idle: deps build guest
	critest/tools/contents busybox
	cargo build --release -p podvisor-tests --bin podvisor-idle
	$(CRITEST) sandbox -- $(TARGET)/release/podvisor-idle $(ARGUMENTS)

# Throughput and processor time of podvisor-fs behind a virtual machine, beside those of the distribution's virtiofsd.
bench-fs: deps build kernels
	tests/scripts/cargo-test --release -p podvisor-fs --bench throughput

# podvisor-vmm's boot, exits and memory beside QEMU's on KVM, in the lab.
bench-vmm: deps build guest lab
	bench=$$(cargo bench -p podvisor-vmm --bench boot --no-run 2>&1 | sed -n 's/.*Executable .*(\(.*\))$$/\1/p') && \
	"$$bench" && tests/lab/run --cpus 1 --modules "kvm_amd tun loop" --lsm landlock --time-limit 3600 -- "$$bench" 10

# Lists, memory and leftovers of a node with 200 pods.
bench-load: deps build
	critest/tools/contents busybox
	cargo build --release -p podvisor-tests --bin podvisor-load
	$(CRITEST) sandbox -- $(TARGET)/release/podvisor-load

clean:
	rm -rf $(TARGET)
