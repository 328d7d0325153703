package cli

import (
	"context"
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"flotilla/internal/unitapi"
)

var machineFields = map[string]func(unitapi.Machine, bool) string{
	"machine":  func(m unitapi.Machine, full bool) string { return shortID(m.ID, full) },
	"ip":       func(m unitapi.Machine, _ bool) string { return m.Address },
	"metadata": func(m unitapi.Machine, _ bool) string { return metadataText(m.Metadata) },
	"node":     func(m unitapi.Machine, _ bool) string { return m.Node },
	"units":    func(m unitapi.Machine, _ bool) string { return strconv.Itoa(m.Units) },
	"state":    func(m unitapi.Machine, _ bool) string { return stateOf(m) },
}

// metadataText shows metadata as fleetctl does.
func metadataText(metadata map[string]string) string {
	var pairs []string
	for _, k := range slices.Sorted(maps.Keys(metadata)) {
		pairs = append(pairs, k+"="+metadata[k])
	}
	return strings.Join(pairs, ",")
}

// stateOf is what operators have done to a machine.
func stateOf(m unitapi.Machine) string {
	text := "in use"
	switch {
	case m.Drain:
		text = "draining"
	case m.Cordon:
		text = "cordoned"
	}
	if m.Reason != "" && text != "in use" {
		text += " (" + m.Reason + ")"
	}
	return text
}

func (c *cli) listMachinesCommand() *cobra.Command {
	return c.unitFlags(c.machinesList("list-machines", "machine,ip,metadata"))
}

// machinesList is list-machines, and machines list with more columns.
func (c *cli) machinesList(use, fields string) *cobra.Command {
	var l listing
	cmd := &cobra.Command{
		Use: use, Short: "List the machines of the cluster", Args: Between(0, 0, ""),
		Example: "  flotilla " + use + " --full --no-legend --fields machine,units,state",
		RunE: func(cmd *cobra.Command, _ []string) error {
			cols, err := columns(c, &l, machineFields)
			if err != nil {
				return err
			}
			var answer unitapi.Machines
			if c.fleet {
				answer.Machines, err = c.fleetMachines(cmd.Context())
			} else {
				answer, err = c.machinesAndFailover(cmd.Context())
			}
			if err != nil {
				return err
			}
			if c.output == "json" {
				return SayJSON(cmd.OutOrStdout(), append([]unitapi.Machine{}, answer.Machines...))
			}
			tabs(cmd.OutOrStdout(), rows(&l, cols, machineFields, answer.Machines))
			if f := answer.Failover; f != nil && !f.Allowed && len(f.Held) > 0 {
				Say(cmd.ErrOrStderr(), "flotilla: %s vanished together: their units wait until %s, unless you say: flotilla failover allow\n",
					count(len(f.Held), "machine"), time.Unix(f.Until, 0).Format(time.TimeOnly))
			}
			return nil
		},
	}
	l.add(cmd, fields, slices.Sorted(maps.Keys(machineFields)))
	return cmd
}

// fleetMachines asks fleet's API, which refuses while the node that answers is
// not registered itself: fleetctl's users see by it that something is wrong.
func (c *cli) fleetMachines(ctx context.Context) ([]unitapi.Machine, error) {
	var all []unitapi.Machine
	query := url.Values{}
	for {
		var page struct {
			Machines []struct {
				ID        string            `json:"id"`
				PrimaryIP string            `json:"primaryIP"`
				Metadata  map[string]string `json:"metadata"`
			} `json:"machines"`
			NextPageToken string `json:"nextPageToken"`
		}
		if err := c.dial().Do(ctx, http.MethodGet, "/fleet/v1/machines", query, nil, &page); err != nil {
			return nil, fleetSays{"Error retrieving list of active machines from fleet API (", closing{err,
				")\nPossible issues:\n  etcd is unhealthy and/or lost quorum\n  connection cannot be established to any etcd servers"}}
		}
		for _, m := range page.Machines {
			all = append(all, unitapi.Machine{ID: m.ID, Address: m.PrimaryIP, Metadata: m.Metadata})
		}
		if page.NextPageToken == "" {
			return all, nil
		}
		query.Set("nextPageToken", page.NextPageToken)
	}
}

func (c *cli) machinesCommand() *cobra.Command {
	cmd := group("machines", "List machines, take them out of use, set their metadata",
		c.machinesList("list", "machine,node,ip,units,state,metadata"),
		c.settingsCommand("cordon", "Place nothing new on a machine; what is there stays", unitapi.SettingsChange{Cordon: new(true)}, "is cordoned: nothing new is placed there"),
		c.settingsCommand("uncordon", "Use a machine again: neither cordoned nor draining", unitapi.SettingsChange{Cordon: new(false), Drain: new(false), Reason: new("")}, "is in use again"),
		c.settingsCommand("drain", "Move all units away from a machine; global units stay", unitapi.SettingsChange{Cordon: new(true), Drain: new(true)}, "is draining: its units move away"),
		c.leaveCommand(), c.metadataCommand())
	return c.clientFlags(cmd)
}

func (c *cli) leaveCommand() *cobra.Command {
	return &cobra.Command{
		Use: "leave", Short: "Stop all units of the machine whose node answers, and take it out of the cluster", Args: Between(0, 0, ""),
		Long: `Stop all units of the machine whose node answers, global ones too, and take it out
of the cluster. The others start elsewhere. The machine comes back when its node is
started again. To move units away while the others stay, drain it.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := c.dial().Do(cmd.Context(), http.MethodPost, "/v1/leave", nil, nil, nil); err != nil {
				return err
			}
			Say(cmd.OutOrStdout(), "the machine has left the cluster; it comes back when its node is started again\n")
			return nil
		},
	}
}

const machineHelp = "MACHINE is an ID or its beginning, the name of a node, or an address."

func (c *cli) settingsCommand(use, short string, set unitapi.SettingsChange, done string) *cobra.Command {
	var reason string
	var wait bool
	var timeout time.Duration
	cmd := &cobra.Command{
		Use: use + " MACHINE", Short: short, Long: short + ".\n\n" + machineHelp,
		Args: Between(1, 1, "one machine"), ValidArgsFunction: c.completeMachines,
		RunE: func(cmd *cobra.Command, args []string) error {
			all, err := c.machines(cmd.Context())
			if err != nil {
				return err
			}
			m, err := findMachine(all, args[0])
			if err != nil {
				return err
			}
			body := set
			if reason != "" {
				body.Reason = &reason
			}
			changed, err := c.set(cmd, m, body)
			if err != nil {
				return err
			}
			w := cmd.OutOrStdout()
			if c.output != "json" {
				Say(w, "machine %s %s\n", machineName(m), done)
			}
			if wait {
				if err := c.awaitEmpty(cmd, m, timeout); err != nil {
					return err
				}
			}
			if c.output == "json" {
				return SayJSON(w, changed)
			}
			return nil
		},
	}
	if use != "uncordon" {
		cmd.Flags().StringVar(&reason, "reason", "", "why, for those who wonder later")
	}
	if use == "drain" {
		cmd.Flags().BoolVar(&wait, "wait", false, "return when no unit is placed there any more")
		cmd.Flags().DurationVar(&timeout, "timeout", 5*time.Minute, "how long to --wait; after that the exit code is 3")
	}
	return cmd
}

func machineName(m unitapi.Machine) string {
	if m.Node == "" {
		return machineLegend(m.ID, m.Address, false)
	}
	return m.Node + " (" + machineLegend(m.ID, m.Address, false) + ")"
}

// awaitEmpty waits until no unit is placed on the machine, and says which are
// left if that takes too long.
func (c *cli) awaitEmpty(cmd *cobra.Command, m unitapi.Machine, limit time.Duration) error {
	ctx, began, left := cmd.Context(), time.Now(), -1
	for {
		all, err := c.machines(ctx)
		if err != nil {
			return err
		}
		now, err := findMachine(all, m.ID)
		if err != nil {
			return fmt.Errorf("machine %s is gone, and its units with it", machineName(m))
		}
		m = now
		if m.Units == 0 {
			if c.output != "json" {
				Say(cmd.OutOrStdout(), "no unit is placed there any more\n")
			}
			return nil
		}
		if m.Units != left && c.output != "json" {
			left = m.Units
			Say(cmd.OutOrStdout(), "%s to go\n", count(left, "unit"))
		}
		if time.Since(began) > limit {
			return exitCode{c.stillThere(ctx, m, limit), ExitNotConverged}
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(lastPoll):
		}
	}
}

func (c *cli) stillThere(ctx context.Context, m unitapi.Machine, limit time.Duration) error {
	text := fmt.Sprintf("%s still on machine %s after %s", count(m.Units, "unit"), machineName(m), limit)
	units, err := c.units(ctx)
	if err != nil {
		return fmt.Errorf("%s", text)
	}
	first := ""
	for _, u := range sortedUnits(units) {
		if u.Machine != nil && u.Machine.ID == m.ID {
			if first == "" {
				first = u.Name
			}
			text += "\n" + u.Name + ": " + u.reason()
		}
	}
	return hinted{fmt.Errorf("%s", text), []string{"flotilla explain " + first}}
}

func (c *cli) metadataCommand() *cobra.Command {
	set := &cobra.Command{
		Use: "set MACHINE KEY=VALUE...", Short: "Set metadata of a machine", Args: Between(2, 1000, "a machine and KEY=VALUE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			change := map[string]*string{}
			for _, arg := range args[1:] {
				k, v, ok := strings.Cut(arg, "=")
				if !ok || v == "" || !metadataKey(k) {
					return Usage(fmt.Sprintf("%q is not KEY=VALUE", arg), "such as disk=ssd; keys are of letters, digits, '_', '.' and '-'")
				}
				change[k] = &v
			}
			return c.setMetadata(cmd, args[0], change)
		},
	}
	remove := &cobra.Command{
		Use: "remove MACHINE KEY...", Short: "Remove metadata of a machine, also what its configuration says", Args: Between(2, 1000, "a machine and KEY"),
		RunE: func(cmd *cobra.Command, args []string) error {
			change := map[string]*string{}
			for _, k := range args[1:] {
				if !metadataKey(k) {
					return Usage(fmt.Sprintf("%q is not a key of metadata", k), "keys are of letters, digits, '_', '.' and '-'")
				}
				change[k] = new("")
			}
			return c.setMetadata(cmd, args[0], change)
		},
	}
	for _, cmd := range []*cobra.Command{set, remove} {
		cmd.Long = cmd.Short + ". It stays so when the machine restarts.\n\n" + machineHelp
		cmd.ValidArgsFunction = c.completeMachines
	}
	return group("metadata", "Set or remove metadata of a machine, over what its configuration says", set, remove)
}

// metadataKey reports whether a text can be the key of metadata.
func metadataKey(k string) bool {
	const letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_.-"
	return k != "" && strings.Trim(k, letters) == ""
}

// setMetadata changes the metadata of one machine and prints what it has now.
func (c *cli) setMetadata(cmd *cobra.Command, text string, change map[string]*string) error {
	all, err := c.machines(cmd.Context())
	if err != nil {
		return err
	}
	m, err := findMachine(all, text)
	if err != nil {
		return err
	}
	changed, err := c.set(cmd, m, unitapi.SettingsChange{Metadata: change})
	if err != nil {
		return err
	}
	if c.output == "json" {
		return SayJSON(cmd.OutOrStdout(), changed)
	}
	m.Metadata = changed.Settings.Merge(m.Metadata)
	Say(cmd.OutOrStdout(), "metadata of machine %s: %s\n", machineName(m), dash(metadataText(m.Metadata)))
	return nil
}

// set changes the settings of a machine.
func (c *cli) set(cmd *cobra.Command, m unitapi.Machine, change unitapi.SettingsChange) (unitapi.SettingsChanged, error) {
	var changed unitapi.SettingsChanged
	err := c.dial().Do(cmd.Context(), http.MethodPost, "/v1/machines/"+url.PathEscape(m.ID)+"/settings", nil, change, &changed)
	return changed, err
}

func (c *cli) completeMachines(_ *cobra.Command, args []string, prefix string) ([]string, cobra.ShellCompDirective) {
	ctx, cancel := context.WithTimeout(context.Background(), completeLimit)
	defer cancel()
	all, err := c.machines(ctx)
	if err != nil || len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	var names []string
	for _, m := range all {
		name := m.Node
		if name == "" || !strings.HasPrefix(name, prefix) {
			name = m.ID
		}
		if strings.HasPrefix(name, prefix) {
			names = append(names, name+"\t"+m.Address)
		}
	}
	return names, cobra.ShellCompDirectiveNoFileComp
}
