#!/bin/bash
# Makes the HAProxy versions of newer Debian releases runnable on this machine
# without installing them: 3.0 from trixie, and the newest stable one >= 3.4
# from sid or experimental. Each is unpacked, with the libraries it needs, into
#
#   .cache/haproxy/<version>/root      the files of the packages
#   .cache/haproxy/<version>/haproxy   the wrapper to run
#
# and the wrappers' absolute paths are printed, one a line. What is there
# already is not fetched again; remove .cache/haproxy to get newer packages.
# apt itself fetches, with lists and state of its own inside .cache, so
# signatures and checksums are verified and proxies work as on the whole machine.
#
# DEBIAN_MIRROR overrides the mirror of the machine's apt sources.
set -euo pipefail

top=$(cd "$(dirname "$0")/.." && pwd)
cache=$top/.cache/haproxy
keyring=/usr/share/keyrings/debian-archive-keyring.gpg

say() { echo "haproxies: $*" >&2; }
die() { say "$*"; exit 1; }

mirror() {
	local found
	found=$(apt-get indextargets --format '$(ORIGIN) $(LABEL) $(REPO_URI)' 'Created-By: Packages' 2>/dev/null |
		awk '$1 == "Debian" && $2 == "Debian" { print $3; exit }') || true
	echo "${DEBIAN_MIRROR:-${found:-http://deb.debian.org/debian}}"
}

# apt DIR TOOL ARGS... runs an apt tool whose whole world is DIR: no package
# counts as installed there, so dependencies resolve down to libc.
apt() {
	local dir=$1 tool=$2
	shift 2
	"$tool" -q -o Dir::Etc::sourcelist="$dir/sources.list" -o Dir::Etc::sourceparts=/dev/null \
		-o Dir::Etc::preferences=/dev/null -o Dir::Etc::preferencesparts=/dev/null \
		-o Dir::State="$dir/state" -o Dir::State::status="$dir/status" -o Dir::Cache="$dir/cache" \
		-o APT::Sandbox::User="$(id -un)" -o APT::Update::Error-Mode=any -o Acquire::Retries=3 \
		-o Acquire::Languages=none -o Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false "$@"
}

# have MIN BELOW prints the newest cached wrapper whose version is in [MIN, BELOW).
have() {
	local v best=
	for v in $(cd "$cache" && ls | sort -V); do
		if [ -x "$cache/$v/haproxy" ] && dpkg --compare-versions "$v" ge "$1" && dpkg --compare-versions "$v" lt "$2"; then
			best=$cache/$v/haproxy
		fi
	done
	[ -n "$best" ] && echo "$best"
}

# fetch MIN BELOW SUITE... unpacks the newest stable version in [MIN, BELOW) and prints its wrapper.
fetch() {
	local min=$1 below=$2 suite url work version='' v upstream ld libs
	shift 2
	url=$(mirror)
	say "fetching HAProxy >= $min, < $below from Debian $* at $url"
	[ -r "$keyring" ] || die "cannot verify Debian's packages: $keyring is missing; apt-get install debian-archive-keyring"
	work=$(mktemp -d "$cache/.new.XXXXXX")
	mkdir -p "$work"/{apt/state/lists/partial,apt/cache/archives/partial,debs,out/root}
	: >"$work/apt/status"
	for suite; do echo "deb [signed-by=$keyring] $url $suite main"; done >"$work/apt/sources.list"
	apt "$work/apt" apt-get update >&2 || die "cannot read the package lists of $* from $url (see the lines above)"
	for v in $(apt "$work/apt" apt-cache madison haproxy | awk '{ print $3 }'); do
		[[ $v == *dev* || $v == *rc* ]] && continue
		dpkg --compare-versions "$v" ge "$min" && dpkg --compare-versions "$v" lt "$below" || continue
		if [ -z "$version" ] || dpkg --compare-versions "$v" gt "$version"; then version=$v; fi
	done
	[ -n "$version" ] || die "no HAProxy >= $min, < $below in Debian $* at $url"
	# Of the dependencies only the libraries matter: nothing is configured, nothing runs as a service.
	libs=$(apt "$work/apt" apt-get -s --no-install-recommends install "haproxy=$version" |
		sed -nE 's/^Inst (haproxy|lib[^ ]*|zlib1g) \(([^ ]+) .*/\1=\2/p') || die "cannot resolve what haproxy $version needs"
	# shellcheck disable=SC2086
	(cd "$work/debs" && apt "$work/apt" apt-get download $libs >&2) || die "cannot download haproxy $version from $url (see the lines above)"
	for v in "$work"/debs/*.deb; do dpkg-deb -x "$v" "$work/out/root"; done
	ld=$(find "$work/out/root" -name 'ld-linux*.so.*' -type f -printf '%P\n' | head -n 1)
	[ -n "$ld" ] || die "no dynamic loader among the packages of haproxy $version"
	libs=$(find "$work/out/root" -path "*/usr/share" -prune -o -name '*.so.*' ! -type d -printf '%h\n' | sort -u | sed "s|^$work/out/root|\$root|" | paste -sd:)
	cat >"$work/out/haproxy" <<-END
		#!/bin/sh
		# HAProxy $version of Debian with its own loader and libraries. The master
		# starts itself again by argv[0] on a reload, hence --argv0; and this script
		# forks nothing, or its wait could swallow the exit of one of the master's workers.
		root=\${0%/*}/root
		exec "\$root/$ld" --argv0 "\$0" --library-path "$libs" "\$root/usr/sbin/haproxy" "\$@"
	END
	chmod +x "$work/out/haproxy"
	v=$("$work/out/root/$ld" --library-path "${libs//\$root/$work/out/root}" --list "$work/out/root/usr/sbin/haproxy" |
		grep "=>" | grep -vF "$work/out/root/") && die "haproxy $version would load libraries from outside its packages: $v"
	"$work/out/haproxy" -vv >/dev/null || die "haproxy $version does not run on this machine"
	upstream=${version%-*}
	upstream=${upstream#*:}
	rm -rf "${cache:?}/$upstream"
	mv "$work/out" "$cache/$upstream"
	rm -rf "$work"
	say "HAProxy $version is in $cache/$upstream"
	echo "$cache/$upstream/haproxy"
}

mkdir -p "$cache"
exec 9>"$cache/.lock"
flock 9
rm -rf "$cache"/.new.*
for tool in apt-get apt-cache dpkg-deb; do
	command -v "$tool" >/dev/null || die "needs $tool: HAProxy is taken from Debian packages, on Debian or Ubuntu"
done
have 3.0 3.1 || fetch 3.0 3.1 trixie
have 3.4 99 || fetch 3.4 99 sid experimental
