package catalog

import (
	"fmt"
	"runtime"
	"testing"
)

// benchKeys are n services of seven keys: three of them endpoints.
func benchKeys(n int) []KeyValue {
	keys := make([]KeyValue, 0, 7*n)
	add := func(name, key, value string) {
		r := int64(len(keys) + 1)
		keys = append(keys, KeyValue{Key: Prefix + name + "/" + key, Value: value, CreateRevision: r, ModRevision: r})
	}
	for i := range n {
		name := fmt.Sprintf("service-%05d", i)
		add(name, "domains/1", name+".example.com")
		add(name, "host_port", fmt.Sprint(i+10_000))
		for e := range 3 {
			add(name, fmt.Sprintf("hosts/instance-%d", e), fmt.Sprintf("10.%d.%d.%d:8080", e, i/250, i%250+1))
		}
		add(name, "options", `{"balance":"roundrobin","timeout_server":"30s"}`)
		add(name, "scheme", "http")
	}
	return keys
}

func BenchmarkApplyOneChange(b *testing.B) {
	builder := NewBuilder(Policy{})
	builder.Apply(Batch{Revision: 1, Reset: true, Keys: benchKeys(10_000)})
	b.ReportAllocs()
	revision := int64(100_000)
	for b.Loop() {
		revision++
		builder.Apply(Batch{Revision: revision, Keys: []KeyValue{{Key: "/services/service-05000/hosts/instance-1",
			Value: fmt.Sprintf("10.9.9.%d:80", revision%250+1), CreateRevision: 5, ModRevision: revision}}})
	}
}

func BenchmarkReset70000Keys(b *testing.B) {
	keys := benchKeys(10_000)
	b.ReportAllocs()
	for b.Loop() {
		NewBuilder(Policy{}).Apply(Batch{Revision: 1, Reset: true, Keys: keys})
	}
}

func BenchmarkResetUnchanged(b *testing.B) {
	keys := benchKeys(10_000)
	builder := NewBuilder(Policy{})
	builder.Apply(Batch{Revision: 1, Reset: true, Keys: keys})
	b.ReportAllocs()
	for b.Loop() {
		builder.Apply(Batch{Revision: 1, Reset: true, Keys: keys})
	}
}

// 10,000 services with 30,000 endpoints and all their keys stay small.
func TestMemory(t *testing.T) {
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	builder := NewBuilder(Policy{})
	snap := builder.Apply(Batch{Revision: 1, Reset: true, Keys: benchKeys(10_000)})
	runtime.GC()
	runtime.ReadMemStats(&after)
	used := float64(after.HeapAlloc-before.HeapAlloc) / (1 << 20)
	t.Logf("%.1f MiB for %d services", used, snap.Len())
	if used > 40 {
		t.Errorf("%.1f MiB for %d services, want at most 40", used, snap.Len())
	}
	runtime.KeepAlive(builder)
}
