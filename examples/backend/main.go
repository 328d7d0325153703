// Command backend is something to route to: an HTTP server that says who it is
// and what it was asked, and a TCP server that greets and echoes lines.
//
//	go run ./examples/backend -name a -http 127.0.0.1:7001 -tcp 127.0.0.1:7101
package main

import (
	"bufio"
	"context"
	"errors"
	"flag"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/signal"
	"syscall"
	"time"
)

func main() {
	name := flag.String("name", "a", "what this backend calls itself")
	httpAddr := flag.String("http", "127.0.0.1:7001", "address of the HTTP server; empty: none")
	tcpAddr := flag.String("tcp", "", "address of the TCP server; empty: none")
	work := flag.Duration("work", 0, "how long an answer over HTTP takes")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, *name, *httpAddr, *tcpAddr, *work); err != nil {
		fmt.Fprintf(os.Stderr, "backend: %v\n", err)
		os.Exit(1)
	}
}

// run serves until ctx ends. It stops taking requests then and lets those that
// run finish, for 5 s at most.
func run(ctx context.Context, name, httpAddr, tcpAddr string, work time.Duration) error {
	if tcpAddr != "" {
		l, err := net.Listen("tcp", tcpAddr)
		if err != nil {
			return err
		}
		defer context.AfterFunc(ctx, func() { _ = l.Close() })()
		go echo(l, name)
		fmt.Printf("backend %s: tcp on %s\n", name, l.Addr())
	}
	if httpAddr == "" {
		<-ctx.Done()
		return nil
	}
	l, err := net.Listen("tcp", httpAddr)
	if err != nil {
		return err
	}
	fmt.Printf("backend %s: http on %s\n", name, l.Addr())
	server := &http.Server{Handler: answers(name, work), ReadHeaderTimeout: 10 * time.Second}
	ended := make(chan error, 1)
	go func() { ended <- server.Serve(l) }()
	select {
	case err := <-ended:
		return err
	case <-ctx.Done():
	}
	limit, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	if err := server.Shutdown(limit); err != nil {
		return err
	}
	if err := <-ended; !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// answers says after some work who answers and what arrived. /slow takes 2 s.
func answers(name string, work time.Duration) http.Handler {
	mux := http.NewServeMux()
	say := func(w http.ResponseWriter, r *http.Request) {
		time.Sleep(work)
		_, _ = fmt.Fprintf(w, "backend %s: %s %s host=%s client=%s proto=%s\n", name, r.Method, r.URL, r.Host,
			r.Header.Get("X-Forwarded-For"), r.Header.Get("X-Forwarded-Proto")) // a client that is gone does not want it
	}
	mux.HandleFunc("/", say)
	mux.HandleFunc("/slow", func(w http.ResponseWriter, r *http.Request) {
		select {
		case <-time.After(2 * time.Second):
			say(w, r)
		case <-r.Context().Done():
		}
	})
	return mux
}

// echo greets and repeats lines until the listener is closed.
func echo(l net.Listener, name string) {
	for {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			defer func() { _ = conn.Close() }() // the client has seen all it will
			_, _ = fmt.Fprintf(conn, "backend %s\n", name)
			for lines := bufio.NewScanner(conn); lines.Scan(); {
				if _, err := fmt.Fprintln(conn, lines.Text()); err != nil {
					return
				}
			}
		}()
	}
}
