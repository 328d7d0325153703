package cli

import (
	"fmt"
	"net/http"
	"net/url"
	"strings"

	"github.com/spf13/cobra"

	"flotilla/internal/registry"
	"flotilla/internal/unitapi"
)

// unitStatusCommand is status as fleetctl has it; elsewhere it is a part of
// statusCommand.
func (c *cli) unitStatusCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "status UNIT...", Short: "Show what systemd says of units, on whatever machines they are",
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				Say(cmd.ErrOrStderr(), "No units given\n")
				return nil
			}
			return c.showUnits(cmd, args)
		},
	}
	cmd.Flags().Int("ssh-port", 22, "accepted for old scripts: the nodes are asked")
	return cmd
}

// showUnits shows where units are, why, and what systemd says there. It ends with
// the first exit code of systemctl that is not 0.
func (c *cli) showUnits(cmd *cobra.Command, args []string) error {
	names, err := journalNames(args)
	if err != nil {
		return err
	}
	var answer unitapi.Statuses
	if err := c.dial().Do(cmd.Context(), http.MethodGet, "/v1/unit-status", url.Values{"unit": names}, nil, &answer); err != nil {
		return c.noSuch(err, names)
	}
	w, code := cmd.OutOrStdout(), 0
	for _, s := range answer.Statuses {
		if code == 0 {
			code = s.Exit
		}
		if code == 0 && s.Problem != "" {
			code = ExitFailed
		}
	}
	if c.output == "json" {
		if err := SayJSON(w, answer); err != nil {
			return err
		}
	} else if err := c.sayStatuses(cmd, answer.Statuses); err != nil {
		return err
	}
	if code != 0 {
		return exitCode{ErrReported, code}
	}
	return nil
}

func (c *cli) sayStatuses(cmd *cobra.Command, statuses []unitapi.Status) error {
	w := cmd.OutOrStdout()
	units := map[string]unitView{}
	if !c.fleet {
		var names []string
		for _, s := range statuses {
			if s.Unit != "" && (len(names) == 0 || names[len(names)-1] != s.Unit) { // sorted by unit
				names = append(names, s.Unit)
			}
		}
		var err error
		if units, err = c.units(cmd.Context(), names...); len(names) > 0 && err != nil {
			return err
		}
	}
	for i, s := range statuses {
		if i > 0 {
			Say(w, "\n")
		}
		if u, ok := units[s.Unit]; ok {
			Say(w, "%s\n", whereabouts(u, s))
		}
		switch {
		case s.Problem != "" && s.Unit == "":
			Say(cmd.ErrOrStderr(), "%s%s\n", c.says(), plain(s.Problem))
		case s.Problem != "":
			Say(cmd.ErrOrStderr(), "%s%s: %s\n", c.says(), s.Unit, plain(s.Problem))
		default:
			Say(w, "%s\n", strings.TrimRight(plain(s.Text), "\n"))
		}
	}
	return nil
}

// whereabouts says in one line what is wanted of a unit, where it is and why.
func whereabouts(u unitView, s unitapi.Status) string {
	text := fmt.Sprintf("%s: to be %s", u.Name, u.Desired)
	on := s.Node
	if on == "" && s.Machine != "" {
		on = shortID(s.Machine, false)
	}
	switch {
	case u.Global && on != "":
		text += ", on " + on + " as on every machine that may have it"
	case on != "":
		text += ", on " + on
	case u.Desired != registry.Inactive:
		text += ", on no machine"
	}
	why := u.Placed
	if on == "" {
		why = u.Unplaced
	}
	if why != "" {
		text += ": " + why
	}
	if u.Releasing != "" {
		text += "; it leaves: " + u.Releasing
	}
	return text
}
