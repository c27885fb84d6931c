#!/usr/bin/env bash
# Rule: every system package that meshbpf, its tests or its benchmarks need stands here, and nowhere else.
#
#   provision.sh run|test|bench|image|vm ...     install what is missing of these groups (no apt call when nothing is)
#   provision.sh list run|test|bench|image|vm    print the packages of a group, one a line
#
# Debian 12 and Ubuntu 24.04. Installing starts no service. Exit codes: 2 usage, 69 this machine lacks something.
set -euo pipefail

readonly POLICY=/usr/sbin/policy-rc.d
readonly MARK='written by meshbpf provision.sh'

usage() {
	sed -n '4,5s/^# *//p' "$0" >&2
	exit 2
}

lack() { # what, remedy
	printf '%s\n  remedy: %s\n' "$1" "$2" >&2
	exit 69
}

distribution() { sed -n 's/^ID=//p' /etc/os-release | tr -d '"'; }

# `package` or `package=command`: the second is content with the command, wherever it comes from.
list() {
	case $1 in
	run)
		printf '%s\n' ca-certificates python3 python3-venv python3-bpfcc libbpf1 iproute2 procps util-linux
		if [ "$(distribution)" = ubuntu ]; then
			printf '%s\n' linux-tools-common linux-tools-generic # these hold bpftool there
		else
			printf '%s\n' bpftool
		fi
		;;
	test)
		printf '%s\n' curl=curl gcc iptables=iptables libc6-dev openssl=openssl prometheus=promtool systemd=systemctl tcpdump=tcpdump wrk=wrk
		# Real clients and servers of tests/e2e. The JDK, because a JRE cannot start from source; ten seconds to install.
		printf '%s\n' apache2-bin=apache2 bind9-dnsutils=dig default-jdk-headless=javac dnsmasq-base=dnsmasq haproxy=haproxy \
			nginx-light=nginx nodejs=node postgresql redis-server=redis-server redis-tools=redis-cli
		list image
		;;
	image) printf '%s\n' crun=crun debian-archive-keyring debootstrap=debootstrap podman=podman ;;
	bench) printf '%s\n' haproxy=haproxy iptables=iptables nftables=nft nginx-light=nginx wrk=wrk ;;
	vm) printf '%s\n' cpio debian-archive-keyring debootstrap qemu-system-x86=qemu-system-x86_64 xz-utils zstd ;;
	*) usage ;;
	esac
}

installed() { [ "$(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null)" = installed ]; }

missing() { # groups
	local group entry
	for group in "$@"; do
		for entry in $(list "$group"); do
			[ "${entry#*=}" != "$entry" ] && command -v "${entry#*=}" >/dev/null && continue
			installed "${entry%%=*}" || printf '%s\n' "${entry%%=*}"
		done
	done | sort -u
}

# A policy-rc.d that is already there is the administrator's; one with our mark was left by a killed run.
hold_services() {
	[ ! -e $POLICY ] || grep -q "$MARK" $POLICY || return 0
	trap 'rm -f $POLICY' EXIT
	trap 'exit 130' INT TERM HUP
	printf '#!/bin/sh\n# %s: an install starts no service.\nexit 101\n' "$MARK" >$POLICY
	chmod 755 $POLICY
}

install() { # packages
	export DEBIAN_FRONTEND=noninteractive
	local apt=(apt-get -q -o DPkg::Lock::Timeout=300 -o Acquire::Retries=3)
	exec 9>/run/meshbpf-provision.lock
	flock 9
	hold_services
	"${apt[@]}" update
	"${apt[@]}" install -y --no-install-recommends "$@" 9>&-
}

main() {
	[ $# -gt 0 ] || usage
	if [ "$1" = list ]; then
		[ $# -eq 2 ] || usage
		list "$2" | sed 's/=.*//'
		return
	fi
	local group packages
	for group in "$@"; do list "$group" >/dev/null; done
	command -v dpkg-query >/dev/null || lack "this machine has no Debian packages" \
		"use Debian 12 or Ubuntu 24.04, or install the equivalents of: $(for group in "$@"; do list "$group"; done | sed 's/=.*//' | tr '\n' ' ')"
	mapfile -t packages < <(missing "$@")
	[ ${#packages[@]} -gt 0 ] || return 0
	[ "$(id -u)" -eq 0 ] || lack "missing packages, and only root may install them: ${packages[*]}" "sudo $0 $*"
	install "${packages[@]}"
	mapfile -t packages < <(missing "$@")
	[ ${#packages[@]} -eq 0 ] || lack "still missing after the install: ${packages[*]}" "apt-get install ${packages[*]}"
}

main "$@"
