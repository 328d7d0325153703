#!/bin/bash
# Registers an HTTP service with nothing but etcdctl, and asks for it by host and
# by path. It needs a running node and two backends:
#
#   go run ./examples/backend -name a -http 127.0.0.1:7001 &
#   go run ./examples/backend -name b -http 127.0.0.1:7002 &
#   examples/http-service.sh
#
# NODE, HTTP_PORT, STORE, A and B say where things are.
set -euo pipefail
node=${NODE:-127.0.0.1}
port=${HTTP_PORT:-8080}
export ETCDCTL_API=3 ETCDCTL_ENDPOINTS=${STORE:-http://$node:2379}

etcdctl put /services/hello/scheme http
etcdctl put /services/hello/hosts/a "${A:-127.0.0.1:7001}"
etcdctl put /services/hello/hosts/b "${B:-127.0.0.1:7002}"

# etcdctl does not wait for the routers: ask until the service answers.
curl -fsS --retry 20 --retry-delay 1 --retry-all-errors -o /dev/null "http://$node:$port/hello"

echo "by host:"
curl -fsS -H "Host: hello.example.com" "http://$node:$port/some/page"
echo "by path, twice, so that both endpoints answer:"
curl -fsS "http://$node:$port/hello/some/page"
curl -fsS "http://$node:$port/hello/some/page"
echo "to remove it: etcdctl del --prefix /services/hello/"
