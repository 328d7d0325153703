package node

import (
	"context"
	"errors"
	"fmt"
)

// part is something that runs until its context ends.
type part struct {
	name string
	run  func(ctx context.Context) error
}

// errStopped is the error of a part that returned though nobody asked it to.
var errStopped = errors.New("stopped unasked")

// runAll starts every part and runs them until ctx ends or the first fails. Then
// it stops them one after the other, the last of the list first, so that a part
// outlives those that use it. A part that stops unasked is a failure.
func runAll(ctx context.Context, parts ...part) error {
	type running struct {
		part
		stop  context.CancelCauseFunc
		ended chan error
	}
	first := make(chan struct{}, len(parts)) // one token for each part that returned
	all := make([]running, len(parts))
	for i, p := range parts {
		// Without ctx's end: each part is stopped in its turn.
		own, stop := context.WithCancelCause(context.WithoutCancel(ctx))
		all[i] = running{p, stop, make(chan error, 1)}
		go func() {
			err := p.run(own)
			switch {
			case own.Err() != nil && (err == nil || errors.Is(err, own.Err()) || errors.Is(err, context.Cause(own))):
				err = nil // a normal stop
			case err == nil:
				err = errStopped
			}
			all[i].ended <- err
			first <- struct{}{}
		}()
	}
	select {
	case <-ctx.Done():
	case <-first:
	}
	var failed error
	for i := len(all) - 1; i >= 0; i-- {
		all[i].stop(context.Cause(ctx))
		if err := <-all[i].ended; err != nil {
			failed = errors.Join(fmt.Errorf("%s: %w", all[i].name, err), failed)
		}
	}
	return failed
}
