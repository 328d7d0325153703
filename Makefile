# make demo and make test install what they need (apt, with sudo if not root).
VERSION  := $(shell git describe --always --dirty 2>/dev/null || echo dev)
FUZZTIME ?= 20s

.PHONY: build test unit race lint fuzz system cluster faults bench demo check deps haproxies fleetctl

build: ## bin/flotilla and bin/flotillad, without libraries: they also run on machines with another Linux
	CGO_ENABLED=0 go build -ldflags "-X flotilla/internal/cli.Version=$(VERSION)" -o bin/ ./cmd/flotilla ./cmd/flotillad

test: haproxies fleetctl lint ## everything that continuous integration runs
	@$(MAKE) --no-print-directory -j2 unit system
	@$(MAKE) --no-print-directory cluster

unit: # they wait more than they work: those of system share the machine with them
	go test -timeout 30m ./...

system: deps ## tests with a real systemd, in containers; needs root
	go test -tags system -timeout 30m ./internal/systemd
	go test -tags system -timeout 30m -run '^TestSystem' ./internal/agent
	go test -tags cluster -timeout 30m ./internal/nspawn

cluster: deps ## tests on whole clusters of such containers; needs root
	go test -tags cluster -p 1 -timeout 30m -run '^Test(Cluster|KilledUp|MachinesStory)$$' ./cmd/flotilla ./demo
	go test -tags cluster -timeout 45m -run '$(or $(RUN),.)' -skip '$(SLOW)' ./test/units

# Failures that take minutes each: a minute without a store, partitions, reboots.
SLOW := ^Test(Partition|StoreAway|Reboot|ManyGone|ManyUnits|Killed)$$
faults: deps ## those of the tests on whole clusters that take long, 10 minutes; continuous integration runs it after make test
	go test -tags cluster -p 1 -timeout 45m -run '$(SLOW)' ./test/units

race: haproxies fleetctl ## the tests under the race detector
	go test -race -timeout 60m ./...

check: lint race ## before a push

lint: ## what tools can tell about the code
	@echo gofmt -l .; out=$$(gofmt -l .); test -z "$$out" || { echo "not as gofmt writes it: $$out" >&2; exit 1; }
	go vet ./... && go vet -tags system,cluster ./...
	GOOS=darwin go build -o /dev/null ./cmd/flotilla
	go tool staticcheck ./...
	go tool errcheck ./...
	go mod tidy -diff

fuzz: ## every fuzz test for FUZZTIME
	@set -e; for pkg in $$(go list ./...); do \
		for f in $$(go test -list '^Fuzz' $$pkg | grep '^Fuzz'); do \
			echo "$$pkg $$f"; go test -run '^$$' -fuzz "^$$f$$" -fuzztime $(FUZZTIME) $$pkg; \
		done; \
	done

bench: deps build ## every claim of bench/, an hour on two cores, as root; BENCH=-quick for 6 minutes that show that it works
	@set -e; for claim in propagation size throughput churn nodes units; do go run ./bench/$$claim $(BENCH); done
	$(if $(BENCH),ROUNDS=1 SECONDS_EACH=1) bench/dns/run.sh

demo: ## three nodes on this machine; DEMO=once tells the story and exits; DEMO_CLUSTER=nspawn|loopback
	@scripts/install-deps.sh demo
	@$(MAKE) --no-print-directory build
	@go build -o bin/ ./demo ./examples/backend
	@bin/demo

deps:
	@scripts/install-deps.sh test

fleetctl: deps # the real one, to test with
	@test/fleet.sh fleetctl

haproxies: deps # the versions of HAProxy to test with, beside the installed one
	@test/haproxies.sh
