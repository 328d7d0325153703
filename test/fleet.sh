#!/bin/bash
# Builds the real fleetctl and fleetd 1.0.0: the client that our fleet API is
# made for, and the daemon to measure against.
#
#   .cache/fleet/fleetctl
#   .cache/fleet/fleetd     needs systemd's D-Bus and an etcd with --enable-v2
#
# The absolute paths of those named as arguments, or of both, are printed, one a
# line. What is there already is not built again. The sources come through the
# Go module proxy, unpatched, in the versions and with the checksums of
# test/fleet, a module of its own so that ours requires nothing of it.
set -euo pipefail

top=$(cd "$(dirname "$0")/.." && pwd)
cache=$top/.cache/fleet
version=1.0.0

# build NAME PACKAGE prints the path of the program.
build() {
	local made=$cache/$1 from fresh=yes
	for from in "$top"/test/fleet.sh "$top"/test/fleet/go.{mod,sum}; do
		[ "$made" -nt "$from" ] || fresh=
	done
	if [ -z "$fresh" ]; then
		echo "fleet.sh: building $1 $version" >&2
		# CGO is off so that it runs in containers with another libc, too.
		(cd "$top/test/fleet" && CGO_ENABLED=0 GOWORK=off GOFLAGS=-mod=readonly go build \
			-ldflags "-X github.com/coreos/fleet/version.Version=$version" -o "$made.new" "$2") >&2
		mv "$made.new" "$made"
	fi
	echo "$made"
}

mkdir -p "$cache"
exec 9>"$cache/.lock"
flock 9
[ $# -gt 0 ] || set -- fleetctl fleetd
for name; do
	case $name in
	fleetctl) build fleetctl github.com/coreos/fleet/fleetctl ;;
	fleetd) build fleetd github.com/coreos/fleet ;;
	*) echo "fleet.sh: there is no $name, only fleetctl and fleetd" >&2 && exit 2 ;;
	esac
done
