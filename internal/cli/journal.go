package cli

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"

	"github.com/spf13/cobra"

	"flotilla/internal/client"
	"flotilla/internal/wire"
)

func (c *cli) journalCommand() *cobra.Command {
	var lines int
	var follow bool
	var format string
	cmd := &cobra.Command{
		Use: "journal UNIT...", Short: "Show what units have logged, on whatever nodes they are",
		Long: `Show the journal of units: of one, of all instances of a template or of a global unit,
merged by time over all nodes that have them. A node that is away is reported, and the
others are shown. UNIT may be a pattern: 'web@*' or 'web@{1..3}'.`,
		Example:           "  flotilla journal web.service\n  flotilla journal 'web@*' -f",
		ValidArgsFunction: c.completeUnits,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 && c.fleet {
				return fleetText("No units given")
			}
			if err := c.atLeastOne(cmd, args); err != nil {
				return err
			}
			print, ok := journalFormats[format]
			if !ok {
				return Usage(fmt.Sprintf("--output %q is none of text, short, short-iso, cat and json", format), cmd.CommandPath()+" --help")
			}
			names, err := unitNames(args)
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
			return c.showJournal(cmd, query, print)
		},
	}
	cmd.Flags().IntVarP(&lines, "lines", "n", 10, "number of lines, of all units together; -1 for all")
	cmd.Flags().BoolVarP(&follow, "follow", "f", false, "go on with new lines as they come")
	cmd.Flags().Bool("sudo", false, "accepted for old scripts: the node may read its journal")
	cmd = c.unitFlags(cmd)
	cmd.Flags().StringVarP(&format, "output", "o", "short", "form of a line: short (or text), short-iso, cat or json")
	return cmd
}

// printLine prints one line. several says that more than one unit may be shown.
type printLine func(w io.Writer, l wire.JournalLine, several bool) error

var journalFormats = map[string]printLine{
	"text": shortLine("Jan 02 15:04:05"), "short": shortLine("Jan 02 15:04:05"), "short-iso": shortLine(time.RFC3339),
	"cat": func(w io.Writer, l wire.JournalLine, _ bool) error {
		_, err := fmt.Fprintln(w, harmless(l.Message))
		return err
	},
	"json": func(w io.Writer, l wire.JournalLine, _ bool) error {
		out := json.NewEncoder(w)
		out.SetEscapeHTML(false)
		return out.Encode(l)
	},
}

// shortLine shows a line as journalctl does. Of several units it shows the unit
// and not what the program calls itself.
func shortLine(layout string) printLine {
	return func(w io.Writer, l wire.JournalLine, several bool) error {
		head := l.Time.Local().Format(layout) + " " + l.Node + " "
		who := l.Identifier
		if several || who == "" {
			who = l.Unit
		}
		head += harmless(who)
		if l.PID > 0 {
			head += fmt.Sprintf("[%d]", l.PID)
		}
		head += ": "
		message := strings.ReplaceAll(strings.TrimSuffix(harmless(l.Message), "\n"), "\n", "\n"+strings.Repeat(" ", len([]rune(head))))
		_, err := fmt.Fprintln(w, head+message)
		return err
	}
}

// harmless replaces the control characters, which could command a terminal. Lines
// and tabs stay.
func harmless(s string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsControl(r) && r != '\n' && r != '\t' {
			return unicode.ReplacementChar
		}
		return r
	}, s)
}

func (c *cli) showJournal(cmd *cobra.Command, query url.Values, print printLine) error {
	names := query["unit"]
	several := len(names) > 1 || slices.ContainsFunc(names, isPattern)
	troubled := false
	for l, err := range client.Lines[wire.JournalLine](cmd.Context(), c.dial(), http.MethodGet, "/v1/journal", query, nil) {
		switch {
		case cmd.Context().Err() != nil: // Ctrl-C is how following ends
			return nil
		case err != nil:
			return err
		case l.Problem != "":
			troubled = true
			Say(cmd.ErrOrStderr(), "%s%s\n", c.prefix(), harmless(l.Problem))
			continue
		}
		if err := print(cmd.OutOrStdout(), l, several); errors.Is(err, os.ErrClosed) {
			return nil // nobody reads any more
		} else if err != nil {
			return fmt.Errorf("print the journal: %w", err)
		}
	}
	if troubled {
		return exitCode{ErrReported, ExitFailed}
	}
	return nil
}

// prefix is in front of the program's own lines.
func (c *cli) prefix() string {
	if c.fleet {
		return ""
	}
	return "flotilla: "
}
