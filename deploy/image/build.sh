#!/usr/bin/env bash
# Rule: one image from Debian's packages and PyPI's; no image registry is needed.
#
#   build.sh [NAME]      default name: localhost/meshbpf:VERSION; root, podman and debootstrap (vagrant/provision.sh image)
#
# The base is made once and kept as localhost/meshbpf-base:bookworm. MIRROR: where debootstrap takes it from.
# PODMAN: the command, with its options. This machine's certificates and pip settings serve the build and stay out of the image.
set -euo pipefail
cd "$(dirname "$0")/../.."

version() { sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml; }

readonly BASE=localhost/meshbpf-base:bookworm NAME=${1:-localhost/meshbpf:$(version)}
read -ra podman <<<"${PODMAN:-podman}"

base() { # directory
	debootstrap --variant=minbase --include=ca-certificates bookworm "$1/root" ${MIRROR:+"$MIRROR"} >"$1/log" ||
		{ tail -n 5 "$1/log" >&2; return 1; }
	rm -rf "$1"/root/var/cache/apt/archives/*.deb "$1"/root/var/lib/apt/lists/*
	tar --create --directory="$1/root" . | "${podman[@]}" import --quiet - "$BASE" >/dev/null
}

main() {
	[ "$(id -u)" -eq 0 ] || { printf 'only root may make a base\n  remedy: sudo %s\n' "$0" >&2; exit 69; }
	local ours=() file scratch
	scratch=$(mktemp -d)
	trap "rm -rf '$scratch'" EXIT
	"${podman[@]}" image exists "$BASE" || base "$scratch"
	for file in /etc/ssl/certs /etc/pip.conf; do
		[ ! -e "$file" ] || ours+=(--volume "$file:$file:ro")
	done
	# In a chroot: neither a runtime nor a container network is needed.
	"${podman[@]}" build --isolation=chroot --network=host "${ours[@]}" --build-arg "BASE=$BASE" \
		--ignorefile deploy/image/containerignore --file deploy/image/Containerfile --tag "$NAME" .
	printf 'built %s\n' "$NAME"
}

main
