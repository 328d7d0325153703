package cli

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"

	"github.com/spf13/cobra"

	"flotilla/internal/client"
	"flotilla/internal/unitapi"
)

func (c *cli) journalCommand() *cobra.Command {
	var lines int
	var follow, sudo bool
	var format string
	cmd := &cobra.Command{
		Use: "journal UNIT...", Short: "Show what units have logged, on whatever machines they are",
		Long: `Show the journal of units: of one, of all instances of a template or of a global unit,
merged by time over all machines that have them. A machine that is away is told of, and
the others are shown. UNIT may be a pattern: 'web@*' or 'web@{1..3}'.`,
		Example:           "  flotilla journal web.service\n  flotilla journal 'web@*' -f",
		ValidArgsFunction: c.completeUnits,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				if c.fleet {
					return fleetText("No units given")
				}
				return Usage(cmd.CommandPath()+" needs a unit", cmd.UseLine())
			}
			show, ok := journalFormats[format]
			if !ok {
				return Usage(fmt.Sprintf("--output %q is none of text, short, short-iso, cat and json", format), cmd.CommandPath()+" --help")
			}
			names, err := journalNames(args)
			if err != nil {
				return err
			}
			query := url.Values{"unit": names, "lines": {strconv.Itoa(lines)}}
			if lines < 0 {
				query.Set("lines", "all")
			}
			if follow {
				query.Set("follow", "1")
			}
			return c.showJournal(cmd, query, names, show)
		},
	}
	cmd.Flags().IntVarP(&lines, "lines", "n", 10, "number of lines, of all units together; -1 for all")
	cmd.Flags().BoolVarP(&follow, "follow", "f", false, "go on with new lines as they come")
	cmd.Flags().BoolVar(&sudo, "sudo", false, "accepted for old scripts: the node may read its journal")
	cmd = c.unitFlags(cmd)
	cmd.Flags().StringVarP(&format, "output", "o", "short", "form of a line: short (or text), short-iso, cat or json")
	return cmd
}

// journalNames are names and patterns as the API takes them.
func journalNames(args []string) ([]string, error) {
	expanded, err := expandAll(args)
	if err != nil {
		return nil, err
	}
	for i, arg := range expanded {
		if !isPattern(arg) {
			expanded[i], _ = unitName(arg)
		}
	}
	return expanded, nil
}

// showLine prints one line. several says that more than one unit may be shown.
type showLine func(w io.Writer, l unitapi.JournalLine, several bool) error

var journalFormats = map[string]showLine{
	"text": shortLine("Jan 02 15:04:05"), "short": shortLine("Jan 02 15:04:05"), "short-iso": shortLine(time.RFC3339),
	"cat": func(w io.Writer, l unitapi.JournalLine, _ bool) error {
		_, err := fmt.Fprintln(w, plain(l.Message))
		return err
	},
	"json": func(w io.Writer, l unitapi.JournalLine, _ bool) error {
		out := json.NewEncoder(w)
		out.SetEscapeHTML(false)
		return out.Encode(l)
	},
}

// shortLine shows a line as journalctl does. Of several units it shows the unit
// and not what the program calls itself.
func shortLine(layout string) showLine {
	return func(w io.Writer, l unitapi.JournalLine, several bool) error {
		head := l.Time.Local().Format(layout) + " " + l.Node + " "
		who := l.Identifier
		if several || who == "" {
			who = l.Unit
		}
		head += plain(who)
		if l.PID > 0 {
			head += fmt.Sprintf("[%d]", l.PID)
		}
		head += ": "
		text := strings.ReplaceAll(strings.TrimSuffix(plain(l.Message), "\n"), "\n", "\n"+strings.Repeat(" ", len([]rune(head))))
		_, err := fmt.Fprintln(w, head+text)
		return err
	}
}

// plain leaves out what could command a terminal.
func plain(text string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsControl(r) && r != '\n' && r != '\t' {
			return unicode.ReplacementChar
		}
		return r
	}, text)
}

func (c *cli) showJournal(cmd *cobra.Command, query url.Values, names []string, show showLine) error {
	ctx, w := cmd.Context(), cmd.OutOrStdout()
	body, err := c.dial().Stream(ctx, "/v1/journal", query)
	if err != nil {
		return c.noSuch(err, names)
	}
	defer func() { _ = body.Close() }() // it was read as far as anybody wants
	several := len(names) > 1 || slices.ContainsFunc(names, isPattern)
	in := bufio.NewReaderSize(body, 64<<10)
	troubled := false
	for {
		raw, err := in.ReadBytes('\n')
		switch {
		case ctx.Err() != nil: // Ctrl-C is how following ends
			return nil
		case err == io.EOF && troubled:
			return exitCode{ErrReported, ExitFailed}
		case err == io.EOF:
			return nil
		case err != nil:
			return fmt.Errorf("read the journal: %w", err)
		case len(raw) == 1:
			continue
		}
		var l unitapi.JournalLine
		if err := json.Unmarshal(raw, &l); err != nil {
			return fmt.Errorf("read the journal: the node's answer is not understood: %w", err)
		}
		if l.Problem != "" {
			troubled = true
			Say(cmd.ErrOrStderr(), "%s%s\n", c.says(), plain(l.Problem))
			continue
		}
		if err := show(w, l, several); errors.Is(err, os.ErrClosed) {
			return nil // nobody reads any more
		} else if err != nil {
			return fmt.Errorf("print the journal: %w", err)
		}
	}
}

// says is in front of what the program itself has to say.
func (c *cli) says() string {
	if c.fleet {
		return ""
	}
	return "flotilla: "
}

// noSuch puts the answer that there is no such unit into fleetctl's words.
func (c *cli) noSuch(err error, names []string) error {
	var e *client.Error
	if c.fleet && errors.As(err, &e) && e.Code == client.CodeNotFound && len(names) == 1 {
		return c.missingUnit(names[0])
	}
	return err
}

// missingUnit is the error that there is no such unit; isNotFound knows it.
func (c *cli) missingUnit(name string) error {
	if c.fleet {
		return fleetText("Unit %s does not exist.", name)
	}
	return &client.Error{Code: client.CodeNotFound, Message: fmt.Sprintf("there is no unit %s", name), Hint: "flotilla list-unit-files"}
}
