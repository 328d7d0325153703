// Package harness is what the benchmarks and the demo share: real nodes of the
// built program on loopback addresses or in containers, sample endpoints, what
// processes cost, and the report of a benchmark. It knows how a node is run and
// asked; it must not know any claim.
package harness

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"math"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"
)

// Bench is one run of one benchmark.
type Bench struct {
	Quick   bool   // a run that shows that it works, not how well
	Binary  string // flotilla; flotillad is beside it
	HAProxy string // absolute path
	Dir     string // for everything that is removed at the end; short enough for sockets

	name string
	out  io.Writer
	load string // average load before the run
}

// Main runs the benchmark that is kept in bench/<name> and exits. The result
// goes to stdout and, unless -quick is given, to a new file in its results.
// Flags of the benchmark's own have to be defined before.
func Main(name, claim string, run func(context.Context, *Bench) error) {
	b := &Bench{name: name}
	flag.BoolVar(&b.Quick, "quick", false, "few samples, small sizes, no file: shows that it works, not how well")
	flag.StringVar(&b.Binary, "flotilla", "bin/flotilla", "the program to measure")
	flag.StringVar(&b.HAProxy, "haproxy", "haproxy", "the HAProxy that it drives")
	out := flag.String("out", "", "file to write the result to (default: bench/"+name+"/results/<date>.txt)")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := b.run(ctx, claim, *out, run)
	stop()
	if err != nil {
		fmt.Fprintf(os.Stderr, "bench/%s: %v\n", name, err)
		os.Exit(1)
	}
}

func (b *Bench) run(ctx context.Context, claim, out string, run func(context.Context, *Bench) error) (err error) {
	if err := b.lock(ctx); err != nil {
		return err
	}
	if err := b.open(); err != nil {
		return err
	}
	defer func() {
		if err == nil {
			err = os.RemoveAll(b.Dir)
		} else {
			err = fmt.Errorf("%w (logs are in %s)", err, b.Dir)
		}
	}()
	b.out = os.Stdout
	if out == "" && !b.Quick {
		out = filepath.Join("bench", b.name, "results", time.Now().UTC().Format("2006-01-02-150405")+".txt")
	}
	if out != "" {
		if err := os.MkdirAll(filepath.Dir(out), 0o755); err != nil {
			return err
		}
		f, err := os.Create(out)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, f.Close()) }()
		b.out = io.MultiWriter(os.Stdout, f)
	}
	b.heading(ctx, claim)
	began := time.Now()
	if err := run(ctx, b); err != nil {
		return err
	}
	b.Printf("\ntook     %s; load before %s, after %s\n", time.Since(began).Round(time.Second), b.load, loadAverage())
	return nil
}

// lock waits until no other benchmark runs on this machine: two at a time would
// measure each other. It is held until this process ends.
func (b *Bench) lock(ctx context.Context) error {
	fd, err := syscall.Open(filepath.Join(os.TempDir(), "flotilla-bench.lock"), syscall.O_CREAT|syscall.O_RDWR|syscall.O_CLOEXEC, 0o666)
	if err != nil {
		return err
	}
	for said := false; syscall.Flock(fd, syscall.LOCK_EX|syscall.LOCK_NB) != nil; said = true {
		if !said {
			b.Logf("another benchmark runs; waiting for it")
		}
		if err := Pause(ctx, time.Second); err != nil {
			return err
		}
	}
	return nil
}

// open looks for what the run needs.
func (b *Bench) open() (err error) {
	if b.Binary, err = filepath.Abs(b.Binary); err != nil {
		return err
	}
	if _, err := os.Stat(b.Binary); err != nil {
		return fmt.Errorf("%w: run make build, in the root of the repository", err)
	}
	if b.HAProxy, err = Program(b.HAProxy, "scripts/install-deps.sh test"); err != nil {
		return err
	}
	b.Dir, err = os.MkdirTemp("", "fb-")
	if err != nil {
		return err
	}
	return os.Chmod(b.Dir, 0o755) // HAProxy gives up root's rights
}

func (b *Bench) heading(ctx context.Context, claim string) {
	b.load = loadAverage()
	b.Printf("%s: %s\n\n", b.name, claim)
	b.Printf("date     %s  commit %s\n", time.Now().UTC().Format(time.RFC3339), FirstLine(ctx, "git", "describe", "--always", "--dirty"))
	b.Printf("machine  %s, %d cores, %s, kernel %s, %s\n", cpuModel(), runtime.NumCPU(), memory(), FirstLine(ctx, "uname", "-r"), runtime.Version())
	b.Printf("command  go run ./bench/%s %s\n", b.name, strings.Join(os.Args[1:], " "))
	b.Printf("haproxy  %s\n", FirstLine(ctx, b.HAProxy, "-v"))
}

// Printf writes to the report.
func (b *Bench) Printf(format string, args ...any) {
	_, _ = fmt.Fprintf(b.out, format, args...)
}

// Logf says on stderr what goes on now.
func (b *Bench) Logf(format string, args ...any) {
	fmt.Fprintf(os.Stderr, time.Now().Format("15:04:05 ")+format+"\n", args...)
}

// AtMost reports got against a bar that it must not exceed.
func (b *Bench) AtMost(what string, got, bar float64, unit string) {
	b.verdict(what, got, "at most", bar, unit, got <= bar)
}

// AtLeast reports got against a bar that it must reach.
func (b *Bench) AtLeast(what string, got, bar float64, unit string) {
	b.verdict(what, got, "at least", bar, unit, got >= bar)
}

func (b *Bench) verdict(what string, got float64, relation string, bar float64, unit string, ok bool) {
	word := "SHORT"
	if ok {
		word = "PASS"
	}
	b.Printf("%-5s    %s: %s%s (bar: %s %s)\n", word, what, number(got), unit, relation, number(bar))
}

func number(f float64) string {
	if f == math.Trunc(f) {
		return fmt.Sprintf("%.0f", f)
	}
	return fmt.Sprintf("%.3g", f)
}

// Sizes are the numbers of services that claims are about.
func (b *Bench) Sizes() []int {
	if b.Quick {
		return []int{10, 1000}
	}
	return []int{10, 1000, 10000}
}

// Program returns the absolute path of a program that is named or given by its
// path; its error names the command that provides it.
func Program(name, provider string) (string, error) {
	path, err := exec.LookPath(name)
	if err == nil {
		path, err = filepath.Abs(path)
	}
	if err != nil {
		return "", fmt.Errorf("%w: run %s", err, provider)
	}
	return path, nil
}

// Until asks cond every so often until it returns nil, and fails with its last
// error when that takes longer than limit.
func Until(ctx context.Context, limit, every time.Duration, what string, cond func() error) error {
	began := time.Now()
	for {
		err := cond()
		switch {
		case err == nil:
			return nil
		case time.Since(began) > limit:
			return fmt.Errorf("waited %s for %s: %w", time.Since(began).Round(time.Millisecond), what, err)
		}
		if stopped := Pause(ctx, every); stopped != nil {
			return fmt.Errorf("wait for %s: %w: %w", what, stopped, err)
		}
	}
}

// Pause waits for d, or returns ctx's error.
func Pause(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// Every calls do at once and then at each tick, until length is over. Calls that
// take longer than interval lose ticks.
func Every(ctx context.Context, interval, length time.Duration, do func() error) error {
	tick := time.NewTicker(interval)
	defer tick.Stop()
	for began := time.Now(); time.Since(began) < length; {
		if err := do(); err != nil {
			return err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	return nil
}

// Percentile returns the smallest sample that p percent of them do not exceed;
// NaN of none.
func Percentile(samples []float64, p float64) float64 {
	if len(samples) == 0 {
		return math.NaN()
	}
	sorted := slices.Sorted(slices.Values(samples))
	return sorted[max(0, int(math.Ceil(p/100*float64(len(sorted))))-1)]
}

// Median is the 50th percentile.
func Median(samples []float64) float64 { return Percentile(samples, 50) }

// Spread says how samples are spread, in ms.
func Spread(ms []float64) string {
	return fmt.Sprintf("n %d  p50 %.2f  p90 %.2f  p99 %.2f  max %.2f ms", len(ms), Median(ms), Percentile(ms, 90), Percentile(ms, 99), Percentile(ms, 100))
}

// Join writes samples side by side.
func Join(samples []float64, format string) string {
	words := make([]string, len(samples))
	for i, s := range samples {
		words[i] = fmt.Sprintf(format, s)
	}
	return strings.Join(words, " ")
}

// FirstLine returns the first line that a command prints, or what went wrong.
func FirstLine(ctx context.Context, name string, args ...string) string {
	out, err := exec.CommandContext(ctx, name, args...).Output()
	if err != nil {
		return err.Error()
	}
	line, _, _ := strings.Cut(strings.TrimSpace(string(out)), "\n")
	return line
}

func cpuModel() string { return field("/proc/cpuinfo", "model name") }

func memory() string {
	var kib int
	if _, err := fmt.Sscanf(field("/proc/meminfo", "MemTotal"), "%d", &kib); err != nil {
		return "unknown memory"
	}
	return fmt.Sprintf("%d MiB", kib>>10)
}

// field returns the value of the first line "name : value" of a file.
func field(path, name string) string {
	raw, err := os.ReadFile(path)
	if err != nil {
		return ""
	}
	for line := range strings.Lines(string(raw)) {
		if key, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(key) == name {
			return strings.TrimSpace(value)
		}
	}
	return ""
}

func loadAverage() string {
	raw, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return "unknown"
	}
	one, _, _ := strings.Cut(string(raw), " ")
	return one
}
