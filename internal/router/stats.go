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
)

// statistics turns HAProxy's counters, which begin anew with every reload and go
// on when a backend changes hands, into counters by service that never go back.
type statistics struct {
	mu   sync.Mutex // guards both maps
	last map[string]backendCounters
	sums map[string]*ServiceStats
}

type backendCounters struct {
	service string
	values  [counterCount]uint64
}

// counterColumns are the columns of "show stat" that only grow.
var counterColumns = [...]string{"hrsp_other", "hrsp_1xx", "hrsp_2xx", "hrsp_3xx", "hrsp_4xx", "hrsp_5xx", "stot", "econ", "eresp", "srv_abrt", "wretr", "wredis", "bin", "bout"}

const counterCount = len(counterColumns)

// Stats reads every service's counters from HAProxy.
func (r *Router) Stats(ctx context.Context) ([]ServiceStats, error) {
	answers, err := r.client.Do(ctx, "show stat -1 2 -1")
	if err != nil {
		return nil, fmt.Errorf("statistics: %w", err)
	}
	st := &r.stats
	st.mu.Lock()
	defer st.mu.Unlock()
	if st.last == nil {
		st.last, st.sums = map[string]backendCounters{}, map[string]*ServiceStats{}
	}
	for _, sum := range st.sums {
		sum.Active, sum.Queued, sum.ResponseMillis, sum.TotalMillis = 0, 0, 0, 0
	}
	for _, row := range haproxy.ParseStats(answers[0].Text) {
		owner, ok := r.owners.Load(row["pxname"])
		if !ok {
			continue
		}
		st.add(row, owner.(string))
	}
	all := make([]ServiceStats, 0, len(st.sums))
	for _, sum := range st.sums {
		all = append(all, *sum)
	}
	slices.SortFunc(all, func(a, b ServiceStats) int { return cmp.Compare(a.Service, b.Service) })
	return all, nil
}

func (st *statistics) add(row map[string]string, service string) {
	number := func(column string) uint64 {
		n, _ := strconv.ParseUint(row[column], 10, 64) // absent is 0
		return n
	}
	now := backendCounters{service: service}
	for i, column := range counterColumns {
		now.values[i] = number(column)
	}
	was := st.last[row["pxname"]]
	st.last[row["pxname"]] = now
	var delta [counterCount]uint64
	for i := range delta {
		switch {
		case was.service != "" && was.service != service:
			// The backend changed hands: what it counted before is not ours. It
			// rested, so nothing was counted since.
		case now.values[i] < was.values[i]:
			delta[i] = now.values[i] // reloaded
		default:
			delta[i] = now.values[i] - was.values[i]
		}
	}
	sum := st.sums[service]
	if sum == nil {
		sum = &ServiceStats{Service: service}
		st.sums[service] = sum
	}
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
		sum.ResponseMillis = max(sum.ResponseMillis, float64(number("rtime")))
	}
	sum.TotalMillis = max(sum.TotalMillis, float64(number("ttime")))
}
