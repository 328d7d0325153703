package store_test

import (
	"errors"
	"fmt"
	"testing"

	"flotilla/internal/store"
	"flotilla/internal/store/storetest"
)

func TestManyReadsAreOfOneRevision(t *testing.T) {
	c := open(t, storetest.Start(t))
	ctx := t.Context()
	var keys []string
	for i := range 300 { // more than one transaction takes
		key := fmt.Sprintf("/a/%03d", i)
		keys = append(keys, key)
		if _, err := c.Apply(ctx, []store.Op{store.Put(key, "old"), store.Put(fmt.Sprintf("/b/%03d", i), "old")}); err != nil {
			t.Fatal(err)
		}
	}
	_, before, err := c.GetMany(ctx, 0, "/a/000")
	if err != nil {
		t.Fatal(err)
	}
	after, err := c.Apply(ctx, []store.Op{store.Put("/a/299", "new"), store.Delete("/b/299")})
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		ask, at int64
		value   string
		b       int
	}{{before, before, "old", 300}, {0, after, "new", 299}} {
		got, at, err := c.GetMany(ctx, tc.ask, append(keys, "/none")...)
		if err != nil || at != tc.at || len(got) != 300 || got["/a/299"].Value != tc.value {
			t.Errorf("keys at %d: %d keys, the last one %q, at %d, %v", tc.ask, len(got), got["/a/299"].Value, at, err)
		}
		lists, at, err := c.ListMany(ctx, tc.ask, "/none/", "/b/", "/a/")
		if err != nil || at != tc.at || len(lists[0]) != 0 || len(lists[1]) != tc.b || lists[2][299].Value != tc.value {
			t.Errorf("lists at %d: %d, at %d, %v", tc.ask, len(lists), at, err)
		}
	}
	if _, _, err := c.GetMany(ctx, after+100, "/a/000"); err == nil || errors.Is(err, store.ErrUnavailable) {
		t.Errorf("a revision of the future: %v", err)
	}
}
