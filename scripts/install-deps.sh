#!/bin/bash
# Installs the Debian or Ubuntu packages that Flotilla's demo or tests use and
# this machine lacks, saying which and why. It does nothing when all is there.
#
#   install-deps.sh demo     what `make demo` needs
#   install-deps.sh test     that, and what the tests and benchmarks need
set -euo pipefail

# One need a line: the command or file to look for, its package, what for.
demo='
haproxy   haproxy          the router
etcdctl   etcd-client      to register services by hand
curl      curl             HTTP through the router
nc.openbsd netcat-openbsd  TCP through the router
dig       bind9-dnsutils   DNS questions
'
machines='
systemd-nspawn systemd-container machines of their own for the nodes
mmdebstrap mmdebstrap     their root file system
/usr/share/keyrings/debian-archive-keyring.gpg debian-archive-keyring signatures of their packages
ip        iproute2         their network
nft       nftables         their way to other networks
ssh       openssh-client   shells on them
'
test='
gcc       gcc              the race detector
/usr/include/stdio.h libc6-dev the race detector
dnsmasq   dnsmasq-base     the DNS server we compare with
dnsperf   dnsperf          DNS load
wrk       wrk              HTTP load
h2load    nghttp2-client   HTTP/2 load
/usr/sbin/sshd openssh-server the other side of our ssh
ssh-agent openssh-client   keys for ssh
nft       nftables         TCP ports without reloads
ip        iproute2         network namespaces
systemd-nspawn systemd-container machines of clusters on this one
mmdebstrap mmdebstrap      their root file systems
/usr/share/keyrings/debian-archive-keyring.gpg debian-archive-keyring signatures of further HAProxy versions
'

say() { echo "install-deps: $*" >&2; }
die() { say "$*"; exit 1; }

case ${1:-} in
demo)
	needs=$demo
	# Only root can make machines; others see the cluster on loopback addresses.
	if [ "$(id -u)" = 0 ] && [ "${DEMO_CLUSTER:-}" != loopback ]; then needs+=$machines; fi
	;;
test) needs=$demo$machines$test ;;
*) die "usage: $0 demo|test" ;;
esac

PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin # where routers and firewalls hide from users
command -v go >/dev/null || die "Go 1.26 or newer is missing: see https://go.dev/doc/install"

missing=()
while read -r thing package why; do
	if [ -n "$thing" ] && ! [ -e "$thing" ] && ! command -v "$thing" >/dev/null; then
		say "$package is missing ($why)"
		missing+=("$package")
	fi
done <<<"$needs"
[ ${#missing[@]} -gt 0 ] || exit 0

command -v apt-get >/dev/null || die "this is not Debian or Ubuntu; install by hand what provides: ${missing[*]}"
as_root=()
if [ "$(id -u)" != 0 ]; then
	command -v sudo >/dev/null || die "neither root nor sudo; run as root: apt-get install ${missing[*]}"
	as_root=(sudo)
	say "installing needs root: sudo may ask for your password"
fi
say "apt-get install ${missing[*]}"
apt_get() { "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -q -o DPkg::Lock::Timeout=300 "$@" >&2; }
apt_get update || say "some package lists could not be read (see the lines above); going on with the others"
apt_get install -y --no-install-recommends "${missing[@]}" ||
	die "apt-get could not install ${missing[*]} (see the lines above)"
