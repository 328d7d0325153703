package fleetapi

import (
	"flag"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"flotilla/internal/store/storetest"
)

var update = flag.Bool("update", false, "rewrite the transcripts with what is answered")

var headerLine = regexp.MustCompile(`^([A-Z][A-Za-z]*(?:-[A-Za-z]+)*): (.*)$`)

// TestTranscripts plays the requests of each file in testdata/transcripts and
// compares the answers. A file is a list of exchanges:
//
//	== what is seen here
//	PUT /fleet/v1/units/a.service
//	Content-Type: application/json
//	{"desiredState": "launched"}
//	--
//	409 application/json
//	{"error":{...}}
//
// The second word of the answer is its Content-Type, - if it has none. Lines
// such as "put KEY VALUE", "delete KEY" and "registered no" in front of a
// request change the store or the machine.
func TestTranscripts(t *testing.T) {
	endpoint := storetest.Start(t)
	files, err := filepath.Glob("testdata/transcripts/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatal("no transcripts", err)
	}
	for i, name := range files {
		t.Run(strings.TrimSuffix(filepath.Base(name), ".txt"), func(t *testing.T) {
			w := newWorld(t, endpoint, fmt.Sprintf("/transcript/%d/", i))
			w.hold = 1
			raw, err := os.ReadFile(name)
			if err != nil {
				t.Fatal(err)
			}
			head, rest, _ := strings.Cut(string(raw), "== ")
			got := head
			for exchange := range strings.SplitSeq("\n"+rest, "\n== ") {
				if exchange = strings.TrimPrefix(exchange, "\n"); exchange != "" {
					got += w.play(exchange)
				}
			}
			if *update {
				if err := os.WriteFile(name, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			if diff := cmp.Diff(strings.Split(string(raw), "\n"), strings.Split(got, "\n")); diff != "" {
				t.Errorf("%s differs (rewrite it with -update):\n%s", name, diff)
			}
		})
	}
}

// play carries out one exchange and returns it with the answer that came.
func (w *world) play(exchange string) string {
	w.Helper()
	question, _, _ := strings.Cut(exchange, "\n--\n")
	question = strings.TrimRight(question, "\n")
	lines := strings.Split(question, "\n")[1:]
	for ; len(lines) > 0; lines = lines[1:] {
		words := strings.SplitN(lines[0], " ", 3)
		switch {
		case words[0] == "put" && len(words) == 3:
			w.Put(words[1], words[2])
			continue
		case words[0] == "delete":
			w.Delete(words[1])
			continue
		case words[0] == "registered":
			w.registered.Store(words[1] == "yes")
			continue
		}
		break
	}
	if len(lines) == 0 {
		w.Fatalf("no request in:\n%s", exchange)
	}
	method, path, _ := strings.Cut(lines[0], " ")
	header := http.Header{}
	for lines = lines[1:]; len(lines) > 0; lines = lines[1:] {
		m := headerLine.FindStringSubmatch(lines[0])
		if m == nil {
			break
		}
		header.Add(m[1], m[2])
	}
	r := w.Do(method, path, header, strings.Join(lines, "\n"))
	if strings.HasPrefix(path, "/v1/") != (r.Header.Get("Server") == "") {
		w.Errorf("%s %s: header Server is %q", method, path, r.Header.Get("Server"))
	}
	if s := r.Header.Get("Server"); s != "" && s != "fleetd/1.2.3" {
		w.Errorf("%s %s: header Server is %q", method, path, s)
	}
	kind := r.Header.Get("Content-Type")
	if kind == "" {
		kind = "-"
	}
	body := r.Body
	if strings.HasPrefix(path, "/fleet/v1/discovery") && r.Status == 200 {
		body = "(the discovery document)"
	}
	answer := fmt.Sprintf("%d %s\n", r.Status, kind)
	if body != "" {
		answer += strings.TrimSuffix(body, "\n") + "\n"
	}
	return "== " + question + "\n--\n" + answer + "\n"
}
