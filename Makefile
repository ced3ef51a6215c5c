# isopod: `make up` runs a cluster on this machine, `make test` passes the tests. See README.md.

TARGET   := x86_64-unknown-linux-gnu
RELEASE  := target/$(TARGET)/release
# What `make install` installs.
BIN      ?= $(RELEASE)
PREFIX   ?= /usr/local
# What the tests use of Debian: tools on the virtual hosts, a real registry; for benches the peers.
TEST_PACKAGES  := build-essential nftables iproute2 busybox-static tini procps curl jq conntrack util-linux bsdutils openssl \
                  docker-registry apache2-utils skopeo podman uidmap catatonit containerd strace etcd-server \
                  containernetworking-plugins
BENCH_PACKAGES := $(TEST_PACKAGES) crun runc time unbound dnsperf
VM_PACKAGES    := qemu-system-x86 debootstrap busybox-static e2fsprogs jq
ROOT_DIR ?= /

.PHONY: up test test-vm check bench order install uninstall build deps test-deps bench-deps vm-deps

build:
	cargo build --release --bins

# A cluster on this machine, in the foreground: Ctrl-C leaves pods running, `isopod down` stops everything.
up: deps build
	$(RELEASE)/isopod --root-dir $(ROOT_DIR) up

# What a node needs besides the executables.
deps:
	@command -v nft >/dev/null && command -v cc >/dev/null || { apt-get update -qq && apt-get install -y -qq --no-install-recommends build-essential nftables; }

test-deps:
	@dpkg -s $(TEST_PACKAGES) >/dev/null 2>&1 || { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(TEST_PACKAGES) >/dev/null; }
	@cargo nextest --version >/dev/null 2>&1 || cargo install --locked cargo-nextest

bench-deps:
	@dpkg -s $(BENCH_PACKAGES) >/dev/null 2>&1 || { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(BENCH_PACKAGES) >/dev/null; }

vm-deps:
	@dpkg -s $(VM_PACKAGES) >/dev/null 2>&1 || { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(VM_PACKAGES) >/dev/null; }

# Everything, unattended: lints, unit tests, kernel tests and end-to-end tests on virtual hosts. Needs root.
test: test-deps check
	cargo build --workspace --all-targets --locked
	cargo nextest run --workspace --locked --no-fail-fast

# What wants a machine of its own, in a virtual one: systemd, cgroup v2, WireGuard, SCTP, `make install`. Needs kubectl beside Debian's tools.
test-vm: vm-deps
	tests/vm/run

check: deps
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --locked -- -D warnings

# Everything, or some parts: `make bench ROWS="runtime"`; there are dns, proxy, start, pods, node, pull, api, services and runtime.
bench: test-deps bench-deps build
	cargo run --release -p isopod-tests --bin bench -- $(ROWS)

# Now and then, and before a release: which functions run is looked at anew, for the linker to put them together.
order: test-deps build
	cargo run --release -p isopod-tests --bin order

# As root, after `make build` as anybody: root need not have a Rust toolchain.
install:
	@test -x $(BIN)/isopod || { echo "$(BIN)/isopod is not there: run \`make build\` first" >&2; exit 1; }
	install -D -m 755 $(BIN)/isopod $(DESTDIR)$(PREFIX)/bin/isopod
	install -D -m 755 $(BIN)/isopod-runtime $(DESTDIR)$(PREFIX)/bin/isopod-runtime
	install -d $(DESTDIR)/etc/systemd/system
	sed 's:/usr/local/bin:$(PREFIX)/bin:' systemd/isopod.service > $(DESTDIR)/etc/systemd/system/isopod.service

uninstall:
	rm -f $(DESTDIR)$(PREFIX)/bin/isopod $(DESTDIR)$(PREFIX)/bin/isopod-runtime $(DESTDIR)/etc/systemd/system/isopod.service
