package systemd

import (
	"encoding/json"
	"io"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	sdbus "github.com/coreos/go-systemd/v22/dbus"
	"github.com/google/go-cmp/cmp"
)

func TestEscape(t *testing.T) {
	for name, want := range map[string]string{
		"web.service":         "web_2eservice",
		`foo\x2dbar@1.socket`: "foo_5cx2dbar_401_2esocket",
		"1-2_3.service":       "_31_2d2_5f3_2eservice",
		"":                    "_",
	} {
		if got := sdbus.PathBusEscape(name); got != want {
			t.Errorf("%q is %q in a path, want %q", name, got, want)
		}
		if got := unescape(want); got != name {
			t.Errorf("unescape(%q) is %q, want %q", want, got, name)
		}
	}
	if got := unescape("a_zz_2"); got != "a_zz_2" {
		t.Errorf("unescape of what is no escape: %q", got)
	}
}

func FuzzEscape(f *testing.F) {
	f.Add("web@1.service")
	f.Fuzz(func(t *testing.T, name string) {
		path := sdbus.PathBusEscape(name)
		if got := unescape(path); got != name {
			t.Errorf("%q became %q and %q", name, path, got)
		}
		if i := strings.IndexFunc(path, func(r rune) bool {
			return !(r == '_' || '0' <= r && r <= '9' || 'a' <= r && r <= 'z' || 'A' <= r && r <= 'Z')
		}); i >= 0 {
			t.Errorf("%q is no part of an object path", path)
		}
	})
}

func TestChangesCoalesce(t *testing.T) {
	c := New(nil)
	for range 3 {
		c.changes.unit("b.service")
		c.changes.unit("a.service")
	}
	<-c.Changed()
	if diff := cmp.Diff(Change{Units: []string{"a.service", "b.service"}}, c.Take()); diff != "" {
		t.Error(diff)
	}
	if got := c.Take(); got.All || len(got.Units) > 0 {
		t.Errorf("taken twice: %+v", got)
	}
	c.changes.all()
	<-c.Changed()
	if !c.Take().All {
		t.Error("not all changed")
	}
}

func TestDecode(t *testing.T) {
	const common = `"__CURSOR":"s=1;i=2","__REALTIME_TIMESTAMP":"1700000000000001","_PID":"42"`
	at := time.UnixMicro(1700000000000001)
	for line, want := range map[string]Entry{
		`{` + common + `,"MESSAGE":"hello","PRIORITY":"3","SYSLOG_IDENTIFIER":"sh","_SYSTEMD_UNIT":"web.service"}`: {Unit: "web.service", Message: "hello", Priority: 3, Identifier: "sh"},
		`{` + common + `,"MESSAGE":[98,97,100,255],"_COMM":"cat","_SYSTEMD_UNIT":"web.service"}`:                   {Unit: "web.service", Message: "bad\uFFFD", Priority: 6, Identifier: "cat"},
		`{` + common + `,"MESSAGE":"Started.","_SYSTEMD_UNIT":"init.scope","UNIT":"web.service"}`:                  {Unit: "web.service", Message: "Started.", Priority: 6},
		`{` + common + `,"MESSAGE":null,"PRIORITY":["3","4"]}`:                                                     {Priority: 4},
		`{` + common + `,"MESSAGE":["one",[116,119,111]]}`:                                                         {Message: "two", Priority: 6},
		`{` + common + `,"MESSAGE":[],"PRIORITY":"x"}`:                                                             {Priority: 6},
	} {
		want.Time, want.Cursor, want.PID = at, "s=1;i=2", 42
		got, err := decode([]byte(line))
		if err != nil {
			t.Errorf("%s: %v", line, err)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s: %s", line, diff)
		}
	}
	for _, line := range []string{`{`, `[]`, `{"MESSAGE":"no time"}`, `{"__REALTIME_TIMESTAMP":"soon"}`} {
		if _, err := decode([]byte(line)); err == nil {
			t.Errorf("%s is no error", line)
		}
	}
}

// An entry is fit for text, and one that is written as journalctl does it and
// decoded again is the same.
func FuzzDecode(f *testing.F) {
	f.Add([]byte(`{"__REALTIME_TIMESTAMP":"1","MESSAGE":[[1],"a",{}]}`))
	f.Add([]byte(`{"__REALTIME_TIMESTAMP":"1700000000000001","__CURSOR":"s=1","_PID":"42","PRIORITY":"3","MESSAGE":[255,97],"_COMM":"sh","UNIT":"web.service"}`))
	f.Fuzz(func(t *testing.T, line []byte) {
		e, err := decode(line)
		if err != nil {
			if !cmp.Equal(e, Entry{}) {
				t.Errorf("an entry besides the error %v: %+v", err, e)
			}
			return
		}
		for _, s := range []string{e.Unit, e.Message, e.Identifier, e.Cursor} {
			if !utf8.ValidString(s) {
				t.Errorf("%q is not UTF-8", s)
			}
		}
		written, err := json.Marshal(map[string]string{
			"__CURSOR": e.Cursor, "__REALTIME_TIMESTAMP": strconv.FormatInt(e.Time.UnixMicro(), 10), "MESSAGE": e.Message,
			"PRIORITY": strconv.Itoa(e.Priority), "_PID": strconv.Itoa(e.PID), "SYSLOG_IDENTIFIER": e.Identifier, "_SYSTEMD_UNIT": e.Unit,
		})
		if err != nil {
			t.Fatal(err)
		}
		again, err := decode(written)
		if diff := cmp.Diff(e, again); diff != "" || err != nil {
			t.Errorf("%s is decoded as %+v, %v: %s", written, again, err, diff)
		}
	})
}

// A last line without an end was cut off by the end of journalctl.
func TestDecodeAll(t *testing.T) {
	input := "{\"__REALTIME_TIMESTAMP\":\"1\",\"MESSAGE\":\"a\"}\n\n{\"__REALTIME_TIMESTAMP\":\"2\",\"MESSAGE\":\"b\"}\n{\"__REAL"
	var got []string
	err := decodeAll(io.MultiReader(strings.NewReader(input[:10]), strings.NewReader(input[10:])), func(e Entry) bool {
		got = append(got, e.Message)
		return true
	})
	if err != nil || !slices.Equal(got, []string{"a", "b"}) {
		t.Errorf("%q, %v", got, err)
	}
}
