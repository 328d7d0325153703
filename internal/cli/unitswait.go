package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"flotilla/internal/client"
	"flotilla/internal/registry"
	"flotilla/internal/unitapi"
)

// streams are where a command prints.
type streams struct{ out, err io.Writer }

// waiting is how long a command waits for units.
type waiting struct {
	noBlock  bool
	attempts int           // fleetctl's way: of blockStep each; 0: --timeout counts
	timeout  time.Duration // 0: for ever
}

// blockStep is what one of fleetctl's --block-attempts stands for.
const blockStep = 250 * time.Millisecond

// add adds the flags. fleetctl waits for ever unless it is told otherwise.
func (w *waiting) add(cmd *cobra.Command, fleet bool) {
	limit := time.Minute
	if fleet {
		limit = 0
	}
	fl := cmd.Flags()
	fl.BoolVar(&w.noBlock, "no-block", false, "do not wait until the units are there; never waited for: global units")
	fl.IntVar(&w.attempts, "block-attempts", 0, "wait for N times a quarter of a second; 0: as long as --timeout says")
	fl.DurationVar(&w.timeout, "timeout", limit, "how long to wait; 0: for ever. After that the exit code is 3 (fleetctl: 1)")
}

func (w *waiting) limit() time.Duration {
	if w.attempts > 0 {
		return time.Duration(w.attempts) * blockStep
	}
	return w.timeout
}

// stand is how a unit stands to what is waited for.
type stand int

const (
	underWay stand = iota
	reached
	broken   // systemd says that it failed
	doubtful // it has ended, or it has failed: but is that about this start?
)

// goal judges a unit; note is put behind the line about it.
type goal func(u unitView) (s stand, note string)

// settle is how long a doubtful state has to last to be believed: the machine
// reports what systemd does a moment later.
const settle = 500 * time.Millisecond

// inactive: on no machine.
func inactive(u unitView) (stand, string) {
	if u.Current == registry.Inactive {
		return reached, ""
	}
	return underWay, ""
}

// loaded: on its machine to stay, in this version, and not about to stop.
func loaded(u unitView) (stand, string) {
	st, ok := u.own()
	if u.Current != registry.Loaded || !ok || u.Releasing != "" || st.Hash != u.Hash || st.Active == "deactivating" {
		return underWay, ""
	}
	return reached, ""
}

// stopped: as loaded, but a unit that never got a machine does not run either.
func stopped(u unitView) (stand, string) {
	if u.Current == registry.Inactive && u.Machine == nil {
		return reached, ""
	}
	return loaded(u)
}

// launched: started in this version where it is to stay, with as many restarts
// as asked for, and systemd says that it is active.
func launched(u unitView) (stand, string) {
	st, ok := u.own()
	if u.Current != registry.Launched || !ok || u.Releasing != "" || st.Hash != u.Hash || st.Restarts < u.Restarts {
		return underWay, ""
	}
	switch st.Active {
	case "active", "reloading", "refreshing":
		return reached, ""
	case "failed":
		return broken, st.Trouble
	case "inactive":
		if st.Waiting != "" {
			return underWay, ""
		}
		return doubtful, "it has ended"
	}
	return underWay, ""
}

// own returns the state that the unit's own machine reports.
func (u unitView) own() (unitapi.State, bool) {
	for _, st := range u.States {
		if u.Machine != nil && st.Machine == u.Machine.ID {
			return st, true
		}
	}
	return unitapi.State{}, false
}

// why says what keeps a unit from getting on.
func (u unitView) why() string {
	switch {
	case u.Machine == nil && u.Unplaced != "":
		return "on no machine: " + u.Unplaced
	case u.Machine == nil:
		return "on no machine: the engine has not placed it yet"
	case u.Releasing != "":
		return "leaving " + u.at(false) + ": " + u.Releasing
	}
	st, ok := u.own()
	switch {
	case !ok:
		return u.at(false) + " has not taken it up yet"
	case st.Trouble != "":
		return "on " + u.at(false) + ": " + st.Trouble
	case st.Waiting != "":
		return "on " + u.at(false) + ": " + st.Waiting
	case st.Hash != u.Hash:
		return u.at(false) + " still has the old version"
	}
	return fmt.Sprintf("on %s, systemd says: %s, %s (%s)", u.at(false), st.Load, st.Active, st.Sub)
}

// at shows the machine of a unit that has one.
func (u unitView) at(full bool) string { return machineLegend(u.Machine.ID, u.Machine.Address, full) }

// machineLegend shows a machine as fleetctl does.
func machineLegend(id, address string, full bool) string {
	text := shortID(id, full)
	if address != "" {
		text += "/" + address
	}
	return text
}

func shortID(id string, full bool) string {
	if full {
		return id
	}
	return id[:min(8, len(id))] + "..."
}

// line says how far a unit is.
func (u unitView) line(note string) string {
	text := fmt.Sprintf("Unit %s %s", u.Name, u.Current)
	if u.Machine != nil && u.Current != registry.Inactive {
		text += " on " + u.at(false)
	}
	if note != "" {
		text += " (" + note + ")"
	}
	return text
}

// outcome is what a wait has come to.
type outcome struct {
	reached []unitView
	broken  []unitView
	late    []unitView // time was up
	gone    []string   // destroyed while they were waited for
}

// Pace of the questions to the node, of how many units one is, and how long the
// node may be silent.
const (
	firstPoll = 20 * time.Millisecond
	lastPoll  = 250 * time.Millisecond
	perUnit   = 5 * time.Millisecond // more for each that is waited for
	slowPoll  = time.Second
	atOnce    = 100
	silence   = 15 * time.Second
)

// await asks for the units, again and again, until each is where the goal wants
// it or has failed, or time is up. It prints a line for each that is there. Many
// are asked for in turns: the node has better things to do.
func (r *unitRun) await(ctx context.Context, names []string, g goal, w waiting) (outcome, error) {
	var result outcome
	since := map[string]time.Time{} // when a state in doubt was first seen
	began, answered, pause := time.Now(), time.Now(), firstPoll
	told := map[string]string{}
	for len(names) > 0 {
		over := w.limit() > 0 && time.Since(began) >= w.limit()
		asked, others := names, []string(nil)
		if !over {
			asked, others = names[:min(atOnce, len(names))], names[min(atOnce, len(names)):]
		}
		found, err := r.units(ctx, asked...)
		now := time.Now()
		switch {
		case ctx.Err() != nil:
			return result, ctx.Err()
		case err != nil && (refusedForGood(err) || now.Sub(answered) > silence):
			return result, err
		case err == nil:
			answered = now
		}
		left := slices.Clone(others)
		for _, name := range asked {
			u, ok := found[name]
			switch {
			case err != nil:
				left = append(left, name)
				continue
			case !ok:
				result.gone = append(result.gone, name)
				continue
			}
			s, note := g(u)
			if s == broken || s == doubtful {
				if since[name].IsZero() {
					since[name] = now
				}
				if now.Sub(since[name]) < settle {
					s = underWay
				}
			} else {
				delete(since, name)
			}
			switch {
			case s == reached || s == doubtful:
				result.reached = append(result.reached, u)
				if r.output != "json" {
					Say(r.io.out, "%s\n", u.line(note))
				}
			case s == broken:
				result.broken = append(result.broken, u)
			case over:
				result.late = append(result.late, u)
			default:
				left = append(left, name)
			}
		}
		if over && err != nil {
			return result, err
		}
		names = left
		if len(names) == 0 {
			break
		}
		if r.fleet && w.limit() == 0 && now.Sub(began) > patience {
			r.murmur(left, found, told)
		}
		select {
		case <-ctx.Done():
			return result, ctx.Err()
		case <-time.After(pause):
		}
		pause = min(pause*3/2, lastPoll+time.Duration(len(names))*perUnit, slowPoll)
	}
	return result, nil
}

// patience is how long a wait without end says nothing.
const patience = 5 * time.Second

// murmur says on stderr what units wait for, each reason once.
func (r *unitRun) murmur(names []string, found map[string]unitView, told map[string]string) {
	said := 0
	for _, name := range names {
		if u, ok := found[name]; ok && told[name] != u.why() && said < 10 {
			said++
			told[name] = u.why()
			Say(r.io.err, "Waiting for unit %s: %s\n", name, u.why())
		}
	}
}

// refusedForGood reports whether asking again is useless.
func refusedForGood(err error) bool {
	var e *client.Error
	return errors.As(err, &e) && (e.Code == client.CodeNoNode || e.Code == client.CodeBadRequest || e.Code == client.CodeNotFound || e.Code == client.CodeNotAllowed)
}

// conclude turns what became of the units into the error of the command: nil if
// all are where they should be.
func (r *unitRun) conclude(o outcome, state registry.Desired, limit time.Duration) error {
	if r.fleet {
		return r.concludeFleet(o, state)
	}
	all := len(o.reached) + len(o.broken) + len(o.late) + len(o.gone)
	for _, name := range o.gone {
		Say(r.io.err, "Unit %s was destroyed meanwhile\n", name)
	}
	for _, u := range o.broken {
		Say(r.io.err, "Unit %s failed %s\n", u.Name, u.why())
	}
	for _, u := range o.late {
		Say(r.io.err, "Unit %s is not %s: %s\n", u.Name, state, u.why())
	}
	switch {
	case len(o.broken) > 0:
		name := o.broken[0].Name
		return hinted{fmt.Errorf("%d of %s failed to start", len(o.broken), count(all, "unit")),
			[]string{"its last lines: flotilla journal " + name, "and systemd's view: flotilla status " + name}}
	case len(o.gone) > 0:
		return fmt.Errorf("%d of %s were destroyed meanwhile", len(o.gone), count(all, "unit"))
	case len(o.late) > 0:
		text := fmt.Errorf("%d of %s not %s after %s", len(o.late), count(all, "unit"), state, limit)
		return exitCode{hinted{text, []string{"flotilla explain " + o.late[0].Name, "wait longer with --timeout, or not at all with --no-block"}}, ExitNotConverged}
	}
	return nil
}

func (r *unitRun) concludeFleet(o outcome, state registry.Desired) error {
	var lines []string
	for _, name := range o.gone {
		lines = append(lines, "Error waiting for units: unit "+name+" was destroyed meanwhile")
	}
	for _, u := range o.broken {
		lines = append(lines, fmt.Sprintf("Error waiting for units: Failed to find an active unit %s: %s", u.Name, u.why()))
	}
	for _, u := range o.late {
		lines = append(lines, fmt.Sprintf("Error waiting for units: timed out waiting for unit %s to report state %s", u.Name, state), "Unit "+u.Name+": "+u.why())
	}
	if len(lines) == 0 {
		return nil
	}
	return errors.New(strings.Join(lines, "\n"))
}
