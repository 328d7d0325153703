package cli

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/url"
	"os"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"flotilla/internal/client"
)

// Say prints. A terminal or pipe that is gone has nobody to tell.
func Say(w io.Writer, format string, args ...any) { _, _ = fmt.Fprintf(w, format, args...) }

// SayJSON prints v as indented JSON.
func SayJSON(w io.Writer, v any) error {
	out := json.NewEncoder(w)
	out.SetIndent("", "  ")
	out.SetEscapeHTML(false)
	return out.Encode(v)
}

// show prints the answer to a request as --output says, or returns its error.
func show[T any](c *cli, cmd *cobra.Command, answer T, err error, text func(w io.Writer, answer T)) error {
	switch {
	case err != nil:
		return err
	case c.output == "json":
		return SayJSON(cmd.OutOrStdout(), answer)
	}
	text(cmd.OutOrStdout(), answer)
	return nil
}

// asking is what a command does that sends one request and shows the answer. {} in
// the path is the first argument.
func asking[T any](c *cli, method, path string, body any, text func(w io.Writer, answer T)) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, args []string) error {
		to := path
		if len(args) > 0 {
			to = strings.Replace(path, "{}", url.PathEscape(args[0]), 1)
		}
		var answer T
		err := c.dial().Do(cmd.Context(), method, to, nil, body, &answer)
		return show(c, cmd, answer, err, text)
	}
}

// completeLimit bounds how long a TAB waits for the node.
const completeLimit = time.Second

// complete asks the node for the words with which an argument may go on, if it may.
func complete[T any](c *cli, more bool, path, prefix string, words func(answer T) []string) []string {
	ctx, cancel := context.WithTimeout(context.Background(), completeLimit)
	defer cancel()
	if !more {
		return nil
	}
	answer, err := client.Get[T](ctx, c.dial(), path, nil)
	if err != nil {
		return nil
	}
	return slices.DeleteFunc(words(answer), func(word string) bool { return !strings.HasPrefix(word, prefix) })
}

// colourOn reports whether w is a terminal whose user wants colours.
func colourOn(w io.Writer) bool {
	f, ok := w.(*os.File)
	_, no := os.LookupEnv("NO_COLOR")
	return ok && !no && os.Getenv("TERM") != "dumb" && term.IsTerminal(int(f.Fd()))
}

// Painter colours text, or leaves it as it is.
type Painter struct{ colour bool }

// NewPainter returns the painter of what is written to w.
func NewPainter(w io.Writer) Painter { return Painter{colourOn(w)} }

func (p Painter) paint(code, s string) string {
	if !p.colour {
		return s
	}
	return "\x1b[" + code + "m" + s + "\x1b[0m"
}

// The colours of text.
func (p Painter) Red(s string) string    { return p.paint("31", s) }
func (p Painter) Green(s string) string  { return p.paint("32", s) }
func (p Painter) Yellow(s string) string { return p.paint("33", s) }
func (p Painter) Bold(s string) string   { return p.paint("1", s) }

// table prints rows in columns; the first is the heading. Cells must not be
// coloured: escape codes would count as letters.
func table(w io.Writer, rows ...[]string) { columnar(w, 0, 2, ' ', rows) }

// tabs prints rows as fleetctl does: columns end in one or more tabs.
func tabs(w io.Writer, rows [][]string) { columnar(w, 8, 1, '\t', rows) }

// columnar prints rows by a tabwriter of these settings, which on its own would
// write every cell to w by itself.
func columnar(w io.Writer, tabWidth, padding int, pad byte, rows [][]string) {
	whole := bufio.NewWriter(w)
	out := tabwriter.NewWriter(whole, 0, tabWidth, padding, pad, 0)
	for _, r := range rows {
		_, _ = fmt.Fprintln(out, strings.TrimRight(strings.Join(r, "\t"), "\t")) // see Say
	}
	_ = out.Flush()
	_ = whole.Flush()
}

// dash returns "-" for an empty cell.
func dash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

func yes(b bool) string {
	if b {
		return "yes"
	}
	return "no"
}

// ago returns how long ago t was, such as "3m20s".
func ago(t time.Time) string {
	if t.IsZero() {
		return "never"
	}
	return time.Since(t).Round(time.Second).String()
}
