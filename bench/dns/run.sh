#!/usr/bin/env bash
# DNS: queries per second, CPU per query and latency, beside dnsmasq in the same
# run, and CoreDNS too if COREDNS names its binary. Alternating rounds; nothing
# is pinned. Needs go, dnsperf, dnsmasq, dig.
#
#   bench/dns/run.sh                       prints raw samples, medians and ratios
#   ROUNDS=5 SECONDS_EACH=10 bench/dns/run.sh
set -euo pipefail
cd "$(dirname "$0")/../.."

rounds=${ROUNDS:-3}
each=${SECONDS_EACH:-5}
services=${SERVICES:-10000}
dir=$(mktemp -d)
pids=()
cleanup() {
	for p in "${pids[@]}"; do kill "$p" 2>/dev/null || true; done
	wait 2>/dev/null || true
	rm -rf "$dir"
}
trap cleanup EXIT

declare -A addr pid
start() { # name address command...
	local name=$1
	addr[$name]=$2
	shift 2
	"$@" >"$dir/$name.log" 2>&1 &
	pid[$name]=$!
	pids+=($!)
	for _ in $(seq 100); do
		if dig +short +tries=1 +time=1 "@${addr[$name]}" -p 5300 svc1.local | grep -q .; then return; fi
		kill -0 "${pid[$name]}" || break
	done
	cat "$dir/$name.log" >&2
	echo "bench/dns: $name does not answer" >&2
	exit 1
}

# The same names for all: services in the domain, and 1,000 names of an upstream.
for i in $(seq 0 $((services - 1))); do echo "10.9.0.1 svc$i.local"; done >"$dir/hosts"
for i in $(seq 0 999); do echo "192.0.2.1 name$i.example.test"; done >"$dir/upstream-hosts"
echo "192.0.2.1 svc1.local" >>"$dir/upstream-hosts"
awk '{print $2, "A"}' "$dir/hosts" | shuf --random-source=<(yes) >"$dir/local.q"
grep example "$dir/upstream-hosts" | awk '{print $2, "A"}' | shuf --random-source=<(yes) >"$dir/cached.q"

masq=(dnsmasq --keep-in-foreground --conf-file=/dev/null --port=5300 --bind-interfaces --no-resolv --no-hosts
	--user= --group= --pid-file= --cache-size=20000)
start upstream 127.0.54.9 "${masq[@]}" --listen-address=127.0.54.9 --addn-hosts="$dir/upstream-hosts" --local-ttl=86400
go build -o "$dir/flotilla-dns" ./bench/dns
start flotilla 127.0.54.1 "$dir/flotilla-dns" -listen 127.0.54.1:5300 -upstream 127.0.54.9:5300 -services "$services"
start dnsmasq 127.0.54.2 "${masq[@]}" --listen-address=127.0.54.2 --addn-hosts="$dir/hosts" --local=/local/ --server=127.0.54.9#5300
systems=(flotilla dnsmasq)
if [ -n "${COREDNS:-}" ]; then
	cat >"$dir/Corefile" <<-CONF
		local:5300 {
			bind 127.0.54.3
			hosts $dir/hosts
		}
		.:5300 {
			bind 127.0.54.3
			cache
			forward . 127.0.54.9:5300
		}
	CONF
	start coredns 127.0.54.3 "$COREDNS" -conf "$dir/Corefile"
	systems+=(coredns)
fi

ticks() { awk '{sub(/^.*\) /, ""); print $12 + $13}' "/proc/$1/stat"; }
hz=$(getconf CLK_TCK)

load="dnsperf -p 5300 -c 8 -q 100 -l $each"
latency="dnsperf -p 5300 -c 8 -Q 5000 -l $each -v"
echo "date     $(date -u +%FT%TZ)  commit $(git rev-parse --short HEAD)"
echo "machine  $(awk -F': ' '/model name/{print $2; exit}' /proc/cpuinfo), $(nproc) cores, kernel $(uname -r), $(go version | cut -d' ' -f3)"
echo "others   $(dnsmasq --version | head -1 | cut -d' ' -f1-3), ${COREDNS:+$("$COREDNS" -version | head -1), }$(dnsperf -h 2>&1 | grep -io 'version.*')"
echo "names    $services services in the domain; 1000 upstream names, all cached before the rounds"
echo "load     $load -s SERVER -d NAMES"
echo "latency  $latency -s SERVER -d NAMES"
echo
echo "test   system    round  queries/s  cpu us/query  lost"
for test in ${TESTS:-local cached}; do
	for s in "${systems[@]}"; do # fill the caches
		dnsperf -p 5300 -s "${addr[$s]}" -d "$dir/$test.q" -n 1 >/dev/null
	done
	for round in $(seq "$rounds"); do
		for s in "${systems[@]}"; do
			before=$(ticks "${pid[$s]}")
			$load -s "${addr[$s]}" -d "$dir/$test.q" >"$dir/out"
			after=$(ticks "${pid[$s]}")
			awk -v t="$test" -v s="$s" -v r="$round" -v cpu=$(((after - before) * 1000000 / hz)) '
				/Queries completed:/ {n = $3} /Queries lost:/ {lost = $3} /Queries per second:/ {qps = $4}
				END {printf "%-6s %-9s %5d %10.0f %13.2f %5d\n", t, s, r, qps, cpu / n, lost}' "$dir/out" | tee -a "$dir/load.txt"
		done
	done
done
echo
echo "test   system    round  p50 us  p99 us  cpu us/query  at 5,000 queries/s"
for round in $(seq "$rounds"); do
	for s in "${systems[@]}"; do
		before=$(ticks "${pid[$s]}")
		$latency -s "${addr[$s]}" -d "$dir/local.q" >"$dir/out"
		after=$(ticks "${pid[$s]}")
		awk '$1 == ">" && $2 == "NOERROR" {print $NF * 1000000}' "$dir/out" | sort -n >"$dir/rtt"
		awk -v s="$s" -v r="$round" -v cpu=$(((after - before) * 1000000 / hz)) '{v[NR] = $1}
			END {printf "local  %-9s %5d %7.0f %7.0f %13.2f\n", s, r, v[int(NR / 2) + 1], v[int(NR * 0.99) + 1], cpu / NR}' "$dir/rtt" | tee -a "$dir/latency.txt"
	done
done

median() { sort -n | awk '{v[NR] = $1} END {print v[int((NR + 1) / 2)]}'; }
of() { awk -v t="$2" -v s="$3" -v c="$4" '$1 == t && $2 == s {print $c}' "$dir/$1.txt" | median; }
echo
echo "medians"
for test in ${TESTS:-local cached}; do
	for s in "${systems[@]}"; do
		echo "$test $s $(of load "$test" "$s" 4) $(of load "$test" "$s" 5) $(of load $test flotilla 4) $(of load $test flotilla 5)"
	done
done | awk '{printf "%-6s %-9s %7.0f queries/s %6.2f us", $1, $2, $3, $4}
	$2 != "flotilla" {printf "   flotilla: %.2f times its rate, %.2f times its CPU", $5 / $3, $6 / $4}
	{print ""}'
for s in "${systems[@]}"; do echo "$s $(of latency local "$s" 4) $(of latency local "$s" 5) $(of latency local "$s" 6)"; done |
	awk '{printf "local  %-9s p50 %.0f us, p99 %.0f us, %.2f us of CPU at 5,000 queries/s\n", $1, $2, $3, $4}'
for s in "${systems[@]}"; do echo "memory $s $(awk '/VmRSS/{print $2}' "/proc/${pid[$s]}/status") KiB"; done
