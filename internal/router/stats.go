package router

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"

	"flotilla/internal/haproxy"
	"flotilla/internal/wire"
)

// statistics turns HAProxy's counters, which begin anew with every reload and go
// on when a backend changes hands, into counters by service that never go back.
type statistics struct {
	mu   sync.Mutex // guards the rest, from the reading of HAProxy's counters to their use
	pid  string     // of the worker that last is about
	last map[string][counterCount]uint64
	sums map[string]*wire.ServiceCounters
}

// counterColumns are the columns of "show stat" that only grow.
var counterColumns = [...]string{"hrsp_other", "hrsp_1xx", "hrsp_2xx", "hrsp_3xx", "hrsp_4xx", "hrsp_5xx", "stot", "econ", "eresp", "srv_abrt", "wretr", "wredis", "bin", "bout"}

const counterCount = len(counterColumns)

// Stats reads every service's counters from HAProxy. What an old worker counts
// after a reload is missing.
func (r *Router) Stats(ctx context.Context) ([]wire.ServiceCounters, error) {
	st := &r.stats
	st.mu.Lock()
	defer st.mu.Unlock()
	answers, err := r.client.Do(ctx, "show info", "show stat -1 2 -1")
	if err != nil {
		return nil, fmt.Errorf("statistics: %w", err)
	}
	st.meet(answers[0])
	for _, sum := range st.sums {
		sum.Active, sum.Queued, sum.ResponseMS, sum.TotalMS = 0, 0, 0, 0
	}
	for _, row := range haproxy.ParseStats(r.ownedRows(answers[1].Text)) {
		if owner, ok := r.owners.Load(row["pxname"]); ok {
			st.add(row, owner.(string))
		}
	}
	all := make([]wire.ServiceCounters, 0, len(st.sums))
	for _, sum := range st.sums {
		all = append(all, *sum)
	}
	slices.SortFunc(all, func(a, b wire.ServiceCounters) int { return cmp.Compare(a.Service, b.Service) })
	return all, nil
}

// ownedRows leaves out the backends that are free, often most of them.
func (r *Router) ownedRows(text string) string {
	var b strings.Builder
	for line := range strings.Lines(text) {
		backend, _, _ := strings.Cut(line, ",")
		if _, ok := r.owners.Load(backend); ok || line[0] == '#' {
			b.WriteString(line)
		}
	}
	return b.String()
}

// meet forgets the counters of the worker before the one that info is from. The
// caller holds mu.
func (st *statistics) meet(info haproxy.Answer) {
	if pid := haproxy.ParseInfo(info.Text)["Pid"]; pid != st.pid {
		st.pid, st.last = pid, map[string][counterCount]uint64{}
	}
}

// add counts what the backend did since it was read last. The caller holds mu.
func (st *statistics) add(row map[string]string, service string) {
	number := func(column string) uint64 {
		n, _ := strconv.ParseUint(row[column], 10, 64) // absent is 0
		return n
	}
	if st.sums == nil {
		st.sums = map[string]*wire.ServiceCounters{}
	}
	sum := st.sums[service]
	if sum == nil {
		sum = &wire.ServiceCounters{Service: service}
		st.sums[service] = sum
	}
	var now, delta [counterCount]uint64
	was := st.last[row["pxname"]]
	for i, column := range counterColumns {
		now[i] = number(column)
		delta[i] = now[i] - min(was[i], now[i])
	}
	st.last[row["pxname"]] = now
	for class := range 6 {
		sum.Requests[class] += delta[class]
	}
	sum.Connections += delta[6]
	sum.Errors += delta[7] + delta[8] + delta[9]
	sum.Retries += delta[10] + delta[11]
	sum.BytesIn += delta[12]
	sum.BytesOut += delta[13]
	sum.Active += int(number("scur"))
	sum.Queued += int(number("qcur"))
	if strings.EqualFold(row["mode"], "http") {
		sum.ResponseMS = max(sum.ResponseMS, float64(number("rtime")))
	}
	sum.TotalMS = max(sum.TotalMS, float64(number("ttime")))
}
