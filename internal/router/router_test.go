package router

import (
	"fmt"
	"net/http"
	"strings"
	"testing"
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
