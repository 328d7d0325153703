#!/bin/bash
# Builds peers to measure against in the same run: see bench/propagation.
#
#   .cache/peers/confd      in the fork of abtreece
#   .cache/peers/traefik    without the pages of its dashboard
#
# The absolute paths of those named as arguments, or of both, are printed, one a
# line. What is there already is not built again. The sources come through the
# Go module proxy, unpatched, in the versions and with the checksums of
# test/peers; each is built as the module that it is, with its own go.mod and
# go.sum. Traefik needs several hundred modules and, the first time, many minutes.
set -euo pipefail

top=$(cd "$(dirname "$0")/.." && pwd)
cache=$top/.cache/peers

# build NAME MODULE LDFLAGS prints the path of the program. LDFLAGS may name @version@.
build() {
	local made=$cache/$1 fresh=yes from dir version
	for from in "$top"/test/peers.sh "$top"/test/peers/go.{mod,sum}; do
		[ "$made" -nt "$from" ] || fresh=
	done
	if [ -z "$fresh" ]; then
		cd "$top/test/peers"
		go mod download "$2" >&2
		dir=$(go list -mod=readonly -m -f '{{.Dir}}' "$2")
		version=$(go list -mod=readonly -m -f '{{.Version}}' "$2")
		echo "peers.sh: building $1 $version" >&2
		(cd "$dir" && CGO_ENABLED=0 go build -mod=readonly -ldflags "${3//@version@/${version#v}}" -o "$made.new" "./cmd/$1") >&2
		mv "$made.new" "$made"
	fi
	echo "$made"
}

export GOWORK=off
mkdir -p "$cache"
exec 9>"$cache/.lock"
flock 9
[ $# -gt 0 ] || set -- confd traefik
for name; do
	case $name in
	confd) build confd github.com/abtreece/confd "" ;;
	traefik) build traefik github.com/traefik/traefik/v3 "-X github.com/traefik/traefik/v3/pkg/version.Version=@version@" ;;
	*) echo "peers.sh: there is no $name, only confd and traefik" >&2 && exit 2 ;;
	esac
done
