package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// process is a child of the demo, with its pid and its output in files, so that
// the next demo finds it if this one is killed.
type process struct {
	name  string
	pid   int
	ended chan struct{} // closed when it has ended
}

// start starts a program in a process group of its own: Ctrl-C is for the demo
// alone. One of the arguments must be or contain dir, which marks it as ours.
func start(dir, name string, argv ...string) (*process, error) {
	log, err := os.OpenFile(filepath.Join(dir, name+".log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, err
	}
	defer func() { _ = log.Close() }() // the child has its own
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	for _, kv := range os.Environ() {
		if !strings.HasPrefix(kv, "FLOTILLA_") { // settings of some other node
			cmd.Env = append(cmd.Env, kv)
		}
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	p := &process{name: name, pid: cmd.Process.Pid, ended: make(chan struct{})}
	go func() {
		defer close(p.ended)
		_ = cmd.Wait() // how it ended is in its log
	}()
	if err := os.WriteFile(pidFile(dir, name), fmt.Appendln(nil, p.pid), 0o644); err != nil {
		return nil, errors.Join(err, syscall.Kill(-p.pid, syscall.SIGKILL))
	}
	return p, nil
}

func pidFile(dir, name string) string { return filepath.Join(dir, name+".pid") }

// readPid returns the process that a pid file names, 0 if it does not run or is
// not of the demo in dir: numbers are used again.
func readPid(dir, path string) int {
	raw, err := os.ReadFile(path)
	if err != nil {
		return 0
	}
	first, _, _ := strings.Cut(string(raw), "\n")
	pid, err := strconv.Atoi(first)
	if err != nil || pid < 2 || !runs(dir, pid) {
		return 0
	}
	return pid
}

// runs reports whether pid is a live process with dir in its arguments. A
// zombie has none.
func runs(dir string, pid int) bool {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	return err == nil && strings.Contains(string(raw), dir)
}

// kill ends the groups of all these processes at once, and returns when they
// are gone.
func kill(dir string, pids ...int) error {
	for _, pid := range pids {
		if err := syscall.Kill(-pid, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
			return fmt.Errorf("kill process %d: %w", pid, err)
		}
	}
	for began := time.Now(); ; time.Sleep(time.Millisecond) {
		left := 0
		for _, pid := range pids {
			if runs(dir, pid) {
				left = pid
			}
		}
		if left == 0 {
			return nil
		}
		if time.Since(began) > 10*time.Second {
			return fmt.Errorf("process %d does not end on SIGKILL", left)
		}
	}
}

// livePids returns the live processes that pid files in the place name.
func livePids(dir string, patterns ...string) []int {
	var pids []int
	for _, pattern := range patterns {
		files, _ := filepath.Glob(filepath.Join(dir, pattern)) // the patterns are good
		for _, f := range files {
			if pid := readPid(dir, f); pid != 0 {
				pids = append(pids, pid)
			}
		}
	}
	return pids
}

// cleanUp ends every process that has a pid file in the place, nodes before
// what they would start again, and removes the directory and what a node that
// was killed leaves in the kernel.
func cleanUp(p *place) error {
	if err := kill(p.dir, livePids(p.dir, "*.pid")...); err != nil {
		return err
	}
	if err := kill(p.dir, livePids(p.dir, "*/*.pid", "*/*/*.pid")...); err != nil {
		return err
	}
	for _, addr := range p.addrs {
		// Refused where there is none, and where we never could make one.
		_ = exec.Command("nft", "delete", "table", "ip", "flotilla_"+strings.ReplaceAll(addr, ".", "_")).Run()
	}
	return os.RemoveAll(p.dir)
}

// logTails returns the last lines of every log in the place.
func logTails(dir string) string {
	var b strings.Builder
	files, _ := filepath.Glob(filepath.Join(dir, "*.log"))
	for _, f := range files {
		raw, err := os.ReadFile(f)
		if err != nil {
			continue
		}
		lines := strings.Split(strings.TrimSpace(string(raw)), "\n")
		for _, l := range lines[max(0, len(lines)-5):] {
			fmt.Fprintf(&b, "  %s: %s\n", filepath.Base(f), l)
		}
	}
	return b.String()
}
