package router

import (
	"fmt"
	"log/slog"
	"maps"
	"net/http"
	"strings"
	"testing"

	"flotilla/internal/catalog"
	"flotilla/internal/haproxy"
	"flotilla/internal/wire"
)

func TestRoutesByHostAndPath(t *testing.T) {
	eachHAProxy(t, func(t *testing.T, binary string) {
		b := newBed(t, testConfig(t, binary))
		web, api, other := endpoint(t, "web"), endpoint(t, "api"), endpoint(t, "other")
		b.put("web/scheme http", "web/hosts/1 "+web, "api/scheme http", "api/hosts/a "+api,
			"empty/scheme http", "hidden/scheme http", "hidden/hosts/1 "+other, "hidden/private 1",
			"noscheme/hosts/1 "+other,
			"shop/scheme http", "shop/hosts/1 "+other, "shop/domains/1 www.shop.example", "shop/domains/2 *.wild.example")
		b.wait()
		for _, c := range []struct{ host, path, want string }{
			{"web.example.com", "/", "web"}, {"WEB.Any.Domain:8080", "/", "web"}, {"web", "/", "web"}, {"web:80", "/", "web"}, {"web.", "/", "web"},
			{"any.domain", "/web", "web"}, {"any.domain", "/web/", "web"}, {"any.domain", "/web/a/b", "web"}, {"any.domain", "/web?x=1", "web"},
			{"any.domain", "/webx", "404"}, {"any.domain", "/", "404"}, {"any.domain", "//web/", "404"}, {"any.domain", "/x/../web", "404"},
			{"10.0.0.1", "/api", "api"}, {"[::1]:80", "/api", "api"},
			{"web.example.com", "/api", "web"},
			{"empty.example.com", "/", "503"}, {"any.domain", "/empty", "503"},
			{"hidden.example.com", "/", "404"}, {"any.domain", "/hidden", "404"},
			{"noscheme.example.com", "/", "404"},
			{"www.shop.example", "/", "other"}, {"a.wild.example", "/", "other"}, {"shop.example", "/", "other"},
			{"www.else.example", "/", "404"}, {"wild.example", "/", "404"},
		} {
			if got := b.answer(b.cfg.HTTPPort, c.host, c.path); got != c.want {
				t.Errorf("host %s path %s: got %s, want %s", c.host, c.path, got, c.want)
			}
		}
		if s := b.router.Status(); s.Reloads != 0 {
			t.Errorf("%d reloads: %s", s.Reloads, s.LastReload)
		}
	})
}

// TestDomainsComeFirst has custom domains that services' names would fit, too.
func TestDomainsComeFirst(t *testing.T) {
	eachHAProxy(t, func(t *testing.T, binary string) {
		b := newBed(t, testConfig(t, binary))
		check := func(when string, exact, wild, both, path string) {
			t.Helper()
			b.wait()
			for _, c := range []struct{ host, path, want string }{
				{"www.shop.example", "/", exact}, {"WWW.Shop.Example:8080", "/web", exact},
				{"web.wild.example", "/", wild}, {"Web.Wild.example:80", "/www", wild}, {"web.both.example", "/", both},
				{"new.wild.example", "/web", path},
				{"www.else.example", "/", "www"}, {"web.x.wild.example", "/", "web"}, {"web", "/", "web"}, {"x.y", "/WEB/z", "web"},
			} {
				if got := b.answer(b.cfg.HTTPPort, c.host, c.path); got != c.want {
					t.Errorf("%s: host %s path %s: got %s, want %s", when, c.host, c.path, got, c.want)
				}
			}
			if on := b.switchedOn(); on != (exact == "shop" || wild == "shop") {
				t.Errorf("%s: requests are looked up by custom domain: %t", when, on)
			}
		}
		for _, name := range []string{"web", "www", "shop", "own"} {
			b.put(name+"/scheme http", name+"/hosts/1 "+endpoint(t, name))
		}
		check("without domains", "www", "web", "web", "web")
		b.put("shop/domains/1 www.shop.example", "shop/domains/2 *.wild.example", "shop/domains/3 *.both.example", "own/domains/1 web.both.example")
		check("with domains", "shop", "shop", "own", "shop")
		b.halt(nil)
		b.start()
		check("after a restart", "shop", "shop", "own", "shop")
		b.put("-shop/domains/1", "-shop/domains/3", "-own/domains/1")
		check("with a wildcard only", "www", "shop", "web", "shop")
		b.put("shop/scheme https")
		b.wait()
		for _, host := range []string{"new.wild.example", "web.wild.example"} {
			if got := b.answer(b.cfg.HTTPPort, host, "/"); got != "301" {
				t.Errorf("host %s of a service on HTTPS: %s", host, got)
			}
			if got := b.tlsAnswer(host); got != "shop" {
				t.Errorf("https %s: %s", host, got)
			}
		}
		b.put("-shop/scheme")
		check("without domains again", "www", "web", "web", "web")
		if s := b.router.Status(); s.Reloads != 0 {
			t.Errorf("%d reloads: %s", s.Reloads, s.LastReload)
		}
	})
}

// switchedOn reports whether HAProxy looks requests up by custom domain.
func (b *bed) switchedOn() bool {
	b.t.Helper()
	return len(haproxy.ParseMap(b.command("show map " + b.router.mapFile(haproxy.DomainsMap))[0].Text)) > 0
}

// TestRouteToNowhere has a route to a backend that is not there, which is not the
// same as no service.
func TestRouteToNowhere(t *testing.T) {
	eachHAProxy(t, func(t *testing.T, binary string) {
		b := newBed(t, testConfig(t, binary))
		b.wait()
		eventually(t, func() string {
			if s := b.router.Status(); !s.Serving {
				return fmt.Sprintf("not serving: %+v", s)
			}
			return ""
		})
		b.command("add map " + b.router.mapFile(haproxy.HTTPMap) + " lost nowhere:lost")
		if status, body, _ := b.get(b.cfg.HTTPPort, "lost.x", "/"); status != http.StatusServiceUnavailable {
			t.Errorf("%d, want 503: %s", status, body)
		}
	})
}

// TestRefusedServiceHoldsUpNobody takes the answers of HAProxy as given: a service
// that it refuses, or that waits for a reload that fails, is named with the first
// revision that it may lack, and the applied revision goes on without it.
func TestRefusedServiceHoldsUpNobody(t *testing.T) {
	r, err := New(testConfig(t, ""), catalog.NewFeed(), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	r.disk = newDisk(r.cfg.Dir, r.log)
	r.attached = true
	step := func(revision int64, refused, reload map[string]string) wire.RouterStatus {
		snapshot := &catalog.Snapshot{Revision: revision}
		r.note(snapshot, []string{"web", "api", "db"}, reload, refused)
		r.done = snapshot
		r.publish(nil)
		return r.Status()
	}
	check := func(when string, s wire.RouterStatus, applied int64, refused map[string]int64) {
		t.Helper()
		if s.Applied != applied || !maps.Equal(s.Refused, refused) || len(s.Problems) != len(refused) {
			t.Errorf("%s: applied %d, refused %v, problems %v, want %d and %v", when, s.Applied, s.Refused, s.Problems, applied, refused)
		}
	}
	check("all is well", step(10, nil, nil), 10, map[string]int64{})
	no := map[string]string{"web": "no"}
	check("a reload may help", step(20, no, nil), 10, map[string]int64{"web": 11})
	r.reload = reloading{}
	check("it did not", step(30, no, nil), 30, map[string]int64{"web": 11})
	check("another one waits for a reload", step(40, no, map[string]string{"api": "no free backend"}), 30, map[string]int64{"web": 11})
	r.reload.failures = 1
	check("which fails", step(50, no, map[string]string{"api": "no free backend"}), 50, map[string]int64{"web": 11, "api": 31})
	r.reload = reloading{}
	check("all is well again", step(60, nil, nil), 60, map[string]int64{})
}

func TestErrorPagesNameNodeAndService(t *testing.T) {
	eachHAProxy(t, func(t *testing.T, binary string) {
		b := newBed(t, testConfig(t, binary))
		b.put("empty/scheme http")
		b.wait()
		for _, c := range []struct {
			host, path, accept string
			status             int
			kind               string
			words              []string
		}{
			{"ghost.example.com", "/x", "text/html", 404, "text/html", []string{"n1", "ghost", "<html"}},
			{"<script>.example.com", "/<img>", "text/html", 404, "text/html", []string{"img"}},
			{"ghost.example.com", "/x", "application/json", 404, "application/json", []string{`"node":"n1"`, `"host":"ghost"`}},
			{"empty.example.com", "/", "text/html", 503, "text/html", []string{"n1", "empty", "<html"}},
			{"empty.example.com", "/", "application/json", 503, "application/json", []string{`"node":"n1"`, `"service":"empty"}`}},
		} {
			status, body, header := b.get(b.cfg.HTTPPort, c.host, c.path, "Accept: "+c.accept)
			if status != c.status || header.Get("Content-Type") != c.kind {
				t.Errorf("%s %s: %d %s, want %d %s", c.host, c.accept, status, header.Get("Content-Type"), c.status, c.kind)
			}
			for _, w := range c.words {
				if !strings.Contains(body, w) {
					t.Errorf("%s %s: no %q in %s", c.host, c.accept, w, body)
				}
			}
			if strings.Contains(body, "<script") || strings.Contains(body, "<img") {
				t.Errorf("%s %s: markup of the request in the answer: %s", c.host, c.accept, body)
			}
			if c.status == 503 && header.Get("Retry-After") == "" {
				t.Errorf("%s: no Retry-After", c.host)
			}
		}
	})
}

func TestHTTPSAndRedirect(t *testing.T) {
	eachHAProxy(t, func(t *testing.T, binary string) {
		b := newBed(t, testConfig(t, binary))
		e := endpoint(t, "web")
		b.put("plain/scheme http", "plain/hosts/1 "+e, "safe/scheme https", "safe/hosts/1 "+e, "both/scheme http-and-https", "both/hosts/1 "+e)
		b.wait()
		status, _, header := b.get(b.cfg.HTTPPort, "safe.example.com:8080", "/a?b=c")
		if want := fmt.Sprintf("https://safe.example.com:%d/a?b=c", b.cfg.HTTPSPort); status != http.StatusMovedPermanently || header.Get("Location") != want {
			t.Errorf("redirect: %d to %q, want 301 to %q", status, header.Get("Location"), want)
		}
		for host, want := range map[string]string{"plain.x.y": "404", "safe.x.y": "web", "both.x.y": "web"} {
			if got := b.tlsAnswer(host); got != want {
				t.Errorf("https %s: %s, want %s", host, got, want)
			}
		}
		if got := b.answer(b.cfg.HTTPPort, "both.x.y", "/"); got != "web" {
			t.Errorf("http both: %s", got)
		}
	})
}
