package remote

import (
	"cmp"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"golang.org/x/term"
)

// Terminal hands a terminal of this process to a command on the far side, until
// restore is called.
func Terminal(in *os.File) (restore func(), pty *PTY, err error) {
	fd := int(in.Fd())
	state, err := term.MakeRaw(fd)
	if err != nil {
		return nil, nil, fmt.Errorf("prepare the terminal: %w", err)
	}
	size := func() Size {
		columns, rows, err := term.GetSize(fd)
		if err != nil {
			return Size{Columns: 80, Rows: 24}
		}
		return Size{Columns: columns, Rows: rows}
	}
	resized, changed, done := make(chan Size, 1), make(chan os.Signal, 1), make(chan struct{})
	signal.Notify(changed, syscall.SIGWINCH)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for {
			select {
			case <-changed:
			case <-done:
				return
			}
			select {
			case resized <- size():
			case <-done:
				return
			}
		}
	}()
	restore = func() {
		signal.Stop(changed)
		close(done)
		<-ended
		_ = term.Restore(fd, state) // there is no other way back
	}
	return restore, &PTY{Term: cmp.Or(os.Getenv("TERM"), "xterm"), Size: size(), Resized: resized}, nil
}
