#!/usr/bin/env bash
# Rule: one root file system, one kernel after the other, software emulation only; what runs inside is tests/vm/guest.sh.
#
#   test-vm.sh [5.10|6.1|6.12 ...]      all three by default; exit 1 when a step failed
#
# What is downloaded and built is kept in vagrant/.cache (delete it to renew): the root when its packages change, our
# dependencies when pyproject.toml changes, a kernel for ever. The repository is packed afresh each time.
set -Eeuo pipefail
trap 'say "line $LINENO failed: $BASH_COMMAND"' ERR
cd "$(dirname "$0")/.."

readonly CACHE=vagrant/.cache
readonly BOOT_SECONDS=${MESHBPF_VM_SECONDS:-240} # for one kernel, from power-on to power-off
readonly GUEST_PACKAGES=bpftool,curl,iproute2,kmod,libbpf1,procps,python3,python3-bpfcc
declare -rA SUITES=([5.10]=bullseye [6.1]=bookworm [6.12]=trixie)

say() { printf 'test-vm: %s\n' "$*" >&2; }

# The mirror this machine already uses for Debian, found by how its path ends: /debian or /debian-security.
mirror() {
	local found
	found=$(cat /etc/apt/sources.list /etc/apt/sources.list.d/*.{list,sources} 2>/dev/null |
		grep -v '^ *#' | grep -oE "(https?|file):[^] ]*/$1/?( |\$)" | sed -n '1s|[/ ]*$||p') || true
	printf '%s\n' "${found:-http://deb.debian.org/$1}"
}

digest() { sha256sum | cut -c1-12; }

# Made beside its name and renamed, so that a killed build is never taken for a whole one.
build() { # target, function
	[ -e "$1" ] && return
	say "making $1"
	rm -rf "$1.new"
	"$2" "$1.new"
	mv "$1.new" "$1"
}

root_archive() {
	local tree=$PWD/$CACHE/root.tree
	rm -rf "$tree"
	debootstrap --variant=minbase --include="$GUEST_PACKAGES" bookworm "$tree" "$(mirror debian)" >"$CACHE/debootstrap.log" ||
		{ tail -n 5 "$CACHE/debootstrap.log" >&2; return 1; }
	rm -rf "$tree"/var/cache/apt/* "$tree"/var/lib/apt/lists/* "$tree"/usr/share/{doc,man,locale,info}
	(cd "$tree" && find . -xdev -print0 | cpio --null --create --format=newc --quiet) | zstd -q -T0 -3 >"$1"
	rm -rf "$tree"
}

# For the guest's Python 3.11, whatever Python this machine has.
dependencies() {
	local wanted
	wanted=$(/usr/bin/python3 -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")')
	mapfile -t wanted <<<"$wanted"
	.venv/bin/python -m pip install --quiet --quiet --disable-pip-version-check --target "$1" --python-version 3.11 --implementation cp \
		--platform manylinux2014_x86_64 --platform manylinux_2_28_x86_64 --only-binary=:all: "${wanted[@]}"
}

# A plain package of a Debian suite, with apt's own signature check, by an apt that knows nothing of this machine's.
kernel() {
	local suite=${SUITES[$series]} apt=$CACHE/apt-$series name
	mkdir -p "$apt/lists/partial" "$apt/archives/partial"
	touch "$apt/status"
	printf 'deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] %s %s main\n' \
		"$(mirror debian)" "$suite" "$(mirror debian-security)" "$suite-security" >"$apt/sources.list"
	local options=(-q -o Dir::State="$PWD/$apt" -o Dir::State::status="$PWD/$apt/status" -o Dir::Cache="$PWD/$apt"
		-o Dir::Etc::sourcelist="$PWD/$apt/sources.list" -o Dir::Etc::sourceparts=- -o Dir::Etc::preferencesparts=-
		-o Dir::Etc::preferences=- -o APT::Architecture=amd64 -o APT::Architectures=amd64 -o APT::Sandbox::User=root
		-o Acquire::Check-Valid-Until=false -o Acquire::Languages=none -o Acquire::Retries=3)
	apt-get "${options[@]}" update >"$apt/log" 2>&1 || { tail -n 5 "$apt/log" >&2; return 1; }
	name=$(apt-cache "${options[@]}" show --no-all-versions linux-image-cloud-amd64 |
		grep -oE 'linux-image-[0-9][^ ,]*-cloud-amd64' | sed -n 1p)
	(cd "$apt" && apt-get "${options[@]}" download "$name" >>log 2>&1) || { tail -n 5 "$apt/log" >&2; return 1; }
	dpkg-deb --extract "$apt/$name"_*.deb "$apt/unpacked"
	mkdir -p "$1/modules"
	cp "$apt"/unpacked/boot/vmlinuz-* "$1/vmlinuz"
	find "$apt/unpacked" -name 'veth.ko*' -exec cp {} "$1/modules/" \;
	printf '%s\n' "$name" >"$1/name"
	rm -rf "$apt"
}

# The part that changes: the repository as it lies here (tracked or not, but nothing ignored), init, dependencies, modules.
# Made once, so that every kernel gets the same.
overlay() { # file, kernels
	local tree=$CACHE/overlay.tree file=$1
	shift
	rm -rf "$tree"
	local python=$tree/usr/local/lib/python3.11/dist-packages
	mkdir -p "$tree/mesh" "$tree/modules" "$tree/usr/local/bin" "${python%/*}"
	git ls-files -z --cached --others --exclude-standard |
		tar --null --files-from=- --ignore-failed-read --create | tar --extract --directory="$tree/mesh"
	cp -a "$CACHE/dependencies-$dependencies_key" "$python"
	echo /mesh >"$python/mesh.pth"
	printf '#!/bin/sh\nexec python3 -m meshbpf.cli "$@"\n' >"$tree/usr/local/bin/meshbpf"
	chmod 755 "$tree/usr/local/bin/meshbpf"
	for series in "$@"; do cp -r "$CACHE/kernel-$series/modules" "$tree/modules/$series"; done
	install -m 755 tests/vm/init "$tree/init"
	(cd "$tree" && find . -print0 | cpio --null --create --format=newc --quiet) | zstd -q -T0 -1 >"$file"
	rm -rf "$tree"
}

# Prints the guest's `vm ...` lines; the whole console goes to the log.
boot() {
	local log=$CACHE/console-$series.log initrd=$CACHE/initrd started=$SECONDS status=0 lines
	timeout --foreground --kill-after=5 "$BOOT_SECONDS" qemu-system-x86_64 -accel tcg,thread=multi -cpu max -smp 2 -m 3000 \
		-nodefaults -nographic -no-reboot -net none -serial file:"$log" -monitor none \
		-kernel "$CACHE/kernel-$series/vmlinuz" -initrd "$initrd" \
		-append "console=ttyS0 rdinit=/init panic=-1 loglevel=4 random.trust_cpu=on mitigations=off" </dev/null || status=$?
	lines=$(tr -d '\r' <"$log" | grep -a '^vm ' || true)
	grep -v '^vm end' <<<"$lines" | sed "s/^vm /vm $series /" || true
	local seconds=$((SECONDS - started)) end=PASS
	{ [ "$status" -eq 0 ] && grep -q '^vm end' <<<"$lines"; } || end=FAIL
	printf 'vm %s powered-off %s %ss qemu=%s %s\n' "$series" "$end" "$seconds" "$status" "$(<"$CACHE/kernel-$series/name")"
	[ $end = PASS ] || { say "the guest did not reach its end; its last words ($log):"; tail -n 30 "$log" >&2; }
}

main() {
	local chosen=("$@") series root_key dependencies_key results=$CACHE/results passed failed
	[ $# -gt 0 ] || chosen=(5.10 6.1 6.12)
	for series in "${chosen[@]}"; do
		[ -n "${SUITES[$series]:-}" ] || { sed -n '4s/^# *//p' "$0" >&2; exit 2; }
	done
	[ "$(id -u)" -eq 0 ] || { printf 'only root may make a root file system\n  remedy: sudo %s\n' "$0" >&2; exit 69; }
	mkdir -p "$CACHE"
	exec 9>"$CACHE/lock"
	flock --nonblock 9 || { say "another run holds $CACHE/lock"; exit 1; }
	root_key=$({ echo "$GUEST_PACKAGES"; declare -f root_archive; } | digest)
	dependencies_key=$({ grep -A 20 '^dependencies' pyproject.toml | sed '/^]/q'; declare -f dependencies; } | digest)
	build "$CACHE/root-$root_key.cpio.zst" root_archive
	build "$CACHE/dependencies-$dependencies_key" dependencies
	find "$CACHE" -mindepth 1 -maxdepth 1 \( -name 'root-*' -o -name 'dependencies-*' \) \
		! -name "root-$root_key.*" ! -name "dependencies-$dependencies_key" -exec rm -rf {} +
	for series in "${chosen[@]}"; do build "$CACHE/kernel-$series" kernel; done
	overlay "$CACHE/overlay" "${chosen[@]}"
	cat "$CACHE/root-$root_key.cpio.zst" "$CACHE/overlay" >"$CACHE/initrd"
	rm "$CACHE/overlay"
	for series in "${chosen[@]}"; do boot; done | tee "$results"
	rm "$CACHE/initrd"
	passed=$(grep -cE '^vm [^ ]+ [^ ]+ PASS' "$results" || true)
	failed=$(grep -cE '^vm [^ ]+ [^ ]+ FAIL' "$results" || true)
	printf '%s passed, %s failed\n' "$passed" "$failed"
	[ "$failed" -eq 0 ] || exit 1
}

main "$@"
