package systemd

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// JournalQuery says which entries Journal yields. The zero value of a field
// asks for nothing special.
type JournalQuery struct {
	Units  []string  // of these units, and what systemd says about them; nil: all entries
	Lines  int       // only the last so many; 0: from the beginning; negative: none
	Since  time.Time // not before
	After  string    // only those after the entry with this cursor
	Follow bool      // go on with new entries until ctx ends
}

// Entry is one entry of the journal.
type Entry struct {
	Time       time.Time
	Unit       string // that wrote it or that systemd writes about
	Message    string // bytes that are not UTF-8 are replaced by U+FFFD
	PID        int    // 0: unknown
	Priority   int    // 0 emergency ... 7 debug; 6 when it has none
	Identifier string // what syslog shows before the message
	Cursor     string // identifies the entry in this machine's journal
}

// Journal yields entries, oldest first. It ends after the last one or, if it
// follows, with an error when ctx ends. A line that cannot be decoded and a failure
// of journalctl are errors, and end it too. Each call runs a journalctl of its own,
// which ends with the loop.
func Journal(ctx context.Context, q JournalQuery) iter.Seq2[Entry, error] {
	return func(yield func(Entry, error) bool) {
		if err := journal(ctx, q, func(e Entry) bool { return yield(e, nil) }); err != nil {
			yield(Entry{}, fmt.Errorf("read the journal: %w", err))
		}
	}
}

// errEnough means that the reader wants no more entries.
var errEnough = errors.New("enough")

func journal(ctx context.Context, q JournalQuery, each func(Entry) bool) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	cmd := command(ctx, "journalctl", q.arguments()...)
	var complaint tail
	cmd.Stderr = &complaint
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	err = decodeAll(out, each)
	if err != nil {
		cancel()
	}
	ended := cmd.Wait()
	switch {
	case errors.Is(err, errEnough):
		return nil
	case ctx.Err() != nil && err == nil:
		return context.Cause(ctx)
	case err != nil:
		return err
	case ended != nil && len(complaint.text) > 0:
		return fmt.Errorf("%w: %s", ended, bytes.TrimSpace(complaint.text))
	}
	return ended
}

func (q JournalQuery) arguments() []string {
	args := []string{
		"--output=json", "--all", "--no-pager", "--quiet",
		"--output-fields=MESSAGE,PRIORITY,_PID,SYSLOG_IDENTIFIER,_COMM,_SYSTEMD_UNIT,UNIT,OBJECT_SYSTEMD_UNIT",
		"--lines=" + q.lines(),
	}
	for _, name := range q.Units {
		args = append(args, "--unit="+name)
	}
	if !q.Since.IsZero() {
		args = append(args, fmt.Sprintf("--since=@%d.%06d", q.Since.Unix(), q.Since.Nanosecond()/1000))
	}
	if q.After != "" {
		args = append(args, "--after-cursor="+q.After)
	}
	if q.Follow {
		args = append(args, "--follow")
	}
	return args
}

func (q JournalQuery) lines() string {
	switch {
	case q.Lines == 0:
		return "all"
	case q.Lines < 0:
		return "0"
	}
	return strconv.Itoa(q.Lines)
}

func decodeAll(r io.Reader, each func(Entry) bool) error {
	lines := bufio.NewReaderSize(r, 64<<10)
	for {
		line, err := lines.ReadBytes('\n')
		if len(bytes.TrimSpace(line)) > 0 && err == nil {
			e, err := decode(line)
			if err != nil {
				return err
			}
			if !each(e) {
				return errEnough
			}
		}
		if err != nil { // the end of the pipe; a last line without a newline was cut off
			if errors.Is(err, io.EOF) || errors.Is(err, os.ErrClosed) {
				return nil
			}
			return err
		}
	}
}

func decode(line []byte) (Entry, error) {
	var raw struct {
		Cursor     text `json:"__CURSOR"`
		Time       text `json:"__REALTIME_TIMESTAMP"` // microseconds
		Message    text `json:"MESSAGE"`
		Priority   text `json:"PRIORITY"`
		PID        text `json:"_PID"`
		Identifier text `json:"SYSLOG_IDENTIFIER"`
		Command    text `json:"_COMM"`
		From       text `json:"_SYSTEMD_UNIT"`
		About      text `json:"UNIT"`
		Object     text `json:"OBJECT_SYSTEMD_UNIT"`
	}
	if err := json.Unmarshal(line, &raw); err != nil {
		return Entry{}, fmt.Errorf("decode an entry: %w", err)
	}
	us, err := strconv.ParseInt(string(raw.Time), 10, 64)
	if err != nil {
		return Entry{}, fmt.Errorf("decode an entry: time %q is not a number", raw.Time)
	}
	e := Entry{
		Time:       time.UnixMicro(us),
		Message:    string(raw.Message),
		Priority:   6,
		Identifier: string(raw.Identifier),
		Cursor:     string(raw.Cursor),
	}
	for _, unit := range []text{raw.About, raw.Object, raw.From} {
		if unit != "" {
			e.Unit = string(unit)
			break
		}
	}
	if e.Identifier == "" {
		e.Identifier = string(raw.Command)
	}
	if n, err := strconv.Atoi(string(raw.PID)); err == nil {
		e.PID = n
	}
	if n, err := strconv.Atoi(string(raw.Priority)); err == nil {
		e.Priority = n
	}
	return e, nil
}

// text is a field of an entry: a string, an array of bytes where it is not
// UTF-8, an array of either where the entry has it several times (the last one
// counts), or null.
type text string

func (t *text) UnmarshalJSON(data []byte) error {
	var value any
	if err := json.Unmarshal(data, &value); err != nil {
		return err
	}
	*t = field(value)
	return nil
}

func field(value any) text {
	switch v := value.(type) {
	case string:
		return text(v)
	case []any:
		if len(v) == 0 {
			return ""
		}
		if _, isByte := v[0].(float64); !isByte {
			return field(v[len(v)-1])
		}
		raw := make([]byte, len(v))
		for i := range v {
			n, _ := v[i].(float64)
			raw[i] = byte(n)
		}
		return text(strings.ToValidUTF8(string(raw), "\uFFFD"))
	}
	return ""
}

// Show returns what `systemctl status` prints about the unit, and its exit
// code: 0 active, 3 not active, 4 no such unit. An error means that it did not
// run.
func Show(ctx context.Context, name string) (string, int, error) {
	cmd := command(ctx, "systemctl", "status", "--full", "--no-pager", "--", name)
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	switch {
	case ctx.Err() != nil:
		return "", -1, fmt.Errorf("show unit %s: %w", name, context.Cause(ctx))
	case errors.As(err, &exit) && exit.Exited():
		return string(out), exit.ExitCode(), nil
	case err != nil:
		return "", -1, fmt.Errorf("show unit %s: %w", name, err)
	}
	return string(out), 0, nil
}

// command is a process that gets SIGTERM when ctx ends, and SIGKILL a second
// later.
func command(ctx context.Context, name string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Env = append(os.Environ(), "LC_ALL=C.UTF-8", "SYSTEMD_COLORS=0", "SYSTEMD_URLIFY=0")
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = time.Second
	return cmd
}

// tail keeps the end of what is written to it.
type tail struct{ text []byte }

func (t *tail) Write(p []byte) (int, error) {
	t.text = append(t.text, p...)
	if over := len(t.text) - 1024; over > 0 {
		t.text = append(t.text[:0], t.text[over:]...)
	}
	return len(p), nil
}
