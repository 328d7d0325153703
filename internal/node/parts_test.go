package node

import (
	"context"
	"errors"
	"slices"
	"strings"
	"sync"
	"testing"
)

func TestRunAllStopsInReverse(t *testing.T) {
	var mu sync.Mutex // guards stopped
	var stopped []string
	parts := []part{}
	for _, name := range []string{"a", "b", "c"} {
		parts = append(parts, part{name, func(ctx context.Context) error {
			<-ctx.Done()
			mu.Lock()
			defer mu.Unlock()
			stopped = append(stopped, name)
			return ctx.Err()
		}})
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := runAll(ctx, parts...); err != nil {
		t.Error(err)
	}
	if want := []string{"c", "b", "a"}; !slices.Equal(stopped, want) {
		t.Errorf("stopped %v, want %v", stopped, want)
	}
}

func TestRunAllFailure(t *testing.T) {
	broken := errors.New("broken")
	wait := func(ctx context.Context) error { <-ctx.Done(); return nil }
	err := runAll(t.Context(), part{"a", wait}, part{"b", func(context.Context) error { return broken }}, part{"c", wait})
	if !errors.Is(err, broken) || !strings.HasPrefix(err.Error(), "b: ") {
		t.Errorf("error %v", err)
	}
	err = runAll(t.Context(), part{"a", wait}, part{"b", func(context.Context) error { return nil }})
	if !errors.Is(err, errStopped) {
		t.Errorf("a part that stops unasked: error %v", err)
	}
}
