#!/bin/bash
# Registers a TCP service with nothing but etcdctl. Its host_port opens on every
# node. It needs a running node and a backend:
#
#   go run ./examples/backend -http '' -tcp 127.0.0.1:7101 &
#   examples/tcp-service.sh
#
# NODE, STORE, A and HOST_PORT say where things are.
set -euo pipefail
node=${NODE:-127.0.0.1}
port=${HOST_PORT:-7100}
export ETCDCTL_API=3 ETCDCTL_ENDPOINTS=${STORE:-http://$node:2379}

etcdctl put /services/echo/scheme tcp
etcdctl put /services/echo/host_port "$port"
etcdctl put /services/echo/hosts/a "${A:-127.0.0.1:7101}"

# etcdctl does not wait for the routers: try until the backend greets.
for _ in $(seq 20); do
	if answer=$(echo "over tcp" | nc -N -w 2 "$node" "$port") && [ -n "$answer" ]; then
		echo "$answer"
		echo "to remove it: etcdctl del --prefix /services/echo/"
		exit 0
	fi
	sleep 0.5
done
echo "tcp-service: $node:$port does not answer; see: flotilla services explain echo" >&2
exit 1
