package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"

	"golang.org/x/term"
)

// teller writes the story for people: headings, commands as they could be
// pasted, and what they answered. Colour is for terminals only.
type teller struct {
	out    *os.File
	colour bool
	began  time.Time
	steps  int
}

func newTeller(out *os.File) *teller {
	return &teller{out: out, began: time.Now(), colour: term.IsTerminal(int(out.Fd())) && os.Getenv("NO_COLOR") == ""}
}

const (
	bold  = "1"
	faint = "2"
	red   = "31"
	green = "32"
	cyan  = "36"
)

func (t *teller) paint(code, text string) string {
	if !t.colour {
		return text
	}
	return "\x1b[" + code + "m" + text + "\x1b[0m"
}

func (t *teller) say(format string, args ...any) {
	_, _ = fmt.Fprintf(t.out, format+"\n", args...) // nobody is left to tell
}

// step begins the next chapter.
func (t *teller) step(title string) {
	t.steps++
	t.say("\n%s %s", t.paint(bold, fmt.Sprintf("%d. %s", t.steps, title)),
		t.paint(faint, fmt.Sprintf("(%.1f s)", time.Since(t.began).Seconds())))
}

// command shows a command line without running it.
func (t *teller) command(line string) { t.say("  %s %s", t.paint(faint, "$"), t.paint(cyan, line)) }

// commandLimit is how long a command may take: the longest one makes machines.
const commandLimit = 6 * time.Minute

// run shows a shell command, runs it and shows what it writes as it comes, which it
// returns.
func (t *teller) run(ctx context.Context, line string) (string, error) {
	t.command(line)
	read, write, err := os.Pipe()
	if err != nil {
		return "", err
	}
	ctx, cancel := context.WithTimeout(ctx, commandLimit)
	defer cancel()
	cmd := exec.CommandContext(ctx, "sh", "-c", line)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // Ctrl-C is for the demo, which ends it
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGINT) }
	cmd.WaitDelay = 10 * time.Second
	cmd.Stdout, cmd.Stderr = write, write
	if err := cmd.Start(); err != nil {
		return "", errors.Join(err, read.Close(), write.Close())
	}
	_ = write.Close() // the command has its own
	var out []string
	for lines := bufio.NewScanner(read); lines.Scan(); {
		out = append(out, lines.Text())
		t.say("    %s", lines.Text())
	}
	if err := errors.Join(cmd.Wait(), read.Close()); err != nil {
		return "", fmt.Errorf("%s: %w", line, err)
	}
	return strings.Join(out, "\n"), nil
}

// took says a duration the way people do.
func took(d time.Duration) string {
	if d < time.Second {
		return fmt.Sprintf("%.0f ms", float64(d)/float64(time.Millisecond))
	}
	return fmt.Sprintf("%.1f s", d.Seconds())
}
