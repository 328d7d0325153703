package router

import (
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"flotilla/internal/haproxy"
	"flotilla/internal/wire"
)

// counted returns the counters of one service.
func (b *bed) counted(service string) wire.ServiceCounters {
	b.t.Helper()
	all, err := b.router.Stats(b.t.Context())
	if err != nil {
		b.t.Fatal(err)
	}
	for _, s := range all {
		if s.Service == service {
			return s
		}
	}
	return wire.ServiceCounters{Service: service}
}

// hurryRest makes the backends that rest free, and lets the lowest of them be
// taken first.
func (b *bed) hurryRest() {
	b.t.Helper()
	for {
		left := make(chan int)
		b.router.requests <- func() {
			s := &b.router.slots
			for _, list := range []*[]retired{&s.retiring, &s.resting} {
				for i := range *list {
					(*list)[i].since = time.Time{}
				}
			}
			if err := b.router.retire(b.t.Context(), time.Now()); err != nil {
				b.t.Error(err)
			}
			for _, fresh := range s.fresh {
				slices.SortFunc(fresh, func(a, b string) int { return compareServerNames("s"+tail(b), "s"+tail(a)) })
			}
			left <- len(s.retiring) + len(s.resting)
		}
		if <-left == 0 {
			return
		}
		<-time.After(20 * time.Millisecond)
	}
}

func tail(backend string) string {
	_, number, _ := strings.Cut(backend, ".")
	return number
}

func TestStatistics(t *testing.T) {
	t.Parallel()
	eachHAProxy(t, func(t *testing.T, binary string) {
		t.Parallel()
		b := newBed(t, testConfig(t, binary))
		e := serve(t, func(w http.ResponseWriter, r *http.Request) {
			var status int
			if _, err := fmt.Sscanf(r.URL.Path, "/%d", &status); err != nil {
				t.Error(err)
			}
			w.WriteHeader(status)
		})
		b.put("web/scheme http", "web/hosts/1 "+e, "empty/scheme http", "raw/scheme tcp", "raw/hosts/1 "+tcpEndpoint(t, "raw"), "raw/host_port 7001")
		b.wait()
		ask := func(service string, times, status int) {
			t.Helper()
			for range times {
				if got, body, _ := b.get(8080, service+".example", fmt.Sprint("/", status)); got != status {
					t.Errorf("%s: %d, want %d: %s", service, got, status, body)
				}
			}
		}
		want := func(service, when string, requests [6]uint64) {
			t.Helper()
			if got := b.counted(service); got.Requests != requests {
				t.Errorf("%s, %s: %v, want %v", service, when, got.Requests, requests)
			}
		}
		ask("web", 5, 200)
		ask("web", 2, 302)
		ask("web", 3, 404)
		ask("web", 1, 500)
		ask("empty", 2, 503)
		if got := b.tcpAnswer(7001); got != "raw" {
			t.Error(got)
		}
		want("web", "at first", [6]uint64{0, 0, 5, 2, 3, 1})
		want("empty", "at first", [6]uint64{0, 0, 0, 0, 0, 2})
		if s := b.counted("web"); s.Connections != 11 || s.BytesIn == 0 || s.BytesOut == 0 {
			t.Errorf("web: %+v", s)
		}
		eventually(t, func() string {
			if s := b.counted("raw"); s.Connections != 1 || s.BytesIn == 0 || s.BytesOut == 0 || s.Active != 0 {
				return fmt.Sprintf("raw: %+v", s)
			}
			return ""
		})

		// More after a reload than before it, and nothing read in between.
		ask("web", 3, 200)
		b.put("other/scheme tcp", "other/host_port 7002", "other/hosts/1 "+e)
		b.wait()
		ask("web", 20, 200)
		want("web", "after a reload", [6]uint64{0, 0, 28, 2, 3, 1})

		// Another service gets the backend: what was not read yet is the old one's.
		ask("web", 4, 200)
		was, _ := b.backendOf("web")
		b.put("-web/scheme")
		b.wait()
		b.hurryRest()
		want("web", "after it went", [6]uint64{0, 0, 32, 2, 3, 1})
		b.put("next/scheme http", "next/hosts/1 "+e)
		b.wait()
		if is, runtime := b.backendOf("next"); is != was && !runtime {
			t.Errorf("the next service has backend %s, not the free %s", is, was)
		}
		ask("next", 7, 200)
		want("next", "in the backend of another", [6]uint64{0, 0, 7, 0, 0, 0})
		want("web", "after another has its backend", [6]uint64{0, 0, 32, 2, 3, 1})
		b.put("web/scheme http")
		b.wait()
		ask("web", 50, 200)
		want("web", "after it came back", [6]uint64{0, 0, 82, 2, 3, 1})

		// Several readers at once.
		var readers sync.WaitGroup
		for range 4 {
			readers.Go(func() {
				var last uint64
				for range 20 {
					is := b.counted("web").Requests[2]
					if is < last {
						t.Errorf("the counter went from %d to %d", last, is)
					}
					last = is
				}
			})
		}
		ask("web", 50, 200)
		readers.Wait()
		want("web", "at last", [6]uint64{0, 0, 132, 2, 3, 1})
	})
}

// backendOf is the backend that serves a service, and whether HAProxy makes them
// at run time.
func (b *bed) backendOf(service string) (backend string, runtime bool) {
	found := make(chan string)
	b.router.requests <- func() {
		runtime = b.router.version.MakesBackends()
		for _, value := range b.router.have.owned[service] {
			backend, _ = haproxy.RouteOwner(value)
		}
		found <- backend
	}
	return <-found, runtime
}
