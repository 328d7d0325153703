package storetest_test

import (
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"flotilla/internal/store/storetest"
)

func TestStart(t *testing.T) {
	begin := time.Now()
	c, err := clientv3.NewFromURL(storetest.Start(t))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	if _, err := c.Put(t.Context(), "/a", "1"); err != nil {
		t.Fatal(err)
	}
	t.Logf("first write after %s", time.Since(begin))
}
